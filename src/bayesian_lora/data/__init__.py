"""Tasks, their loading, and batches for M chains."""
