"""Adapters stacked, compared, trained further, grown and gated."""
