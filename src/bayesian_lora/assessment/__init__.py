"""From predictions to what is reported of a run."""
