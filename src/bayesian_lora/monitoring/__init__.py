"""Long runs watched in constant memory."""
