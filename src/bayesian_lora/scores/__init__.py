"""Figures of merit and their errors, from arrays alone."""
