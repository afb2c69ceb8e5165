"""What a configuration should have for a data set, and what went wrong in a run."""
