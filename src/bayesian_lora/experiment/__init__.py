"""The only room that joins `Config` to all the others: set up, train and evaluate a run."""
