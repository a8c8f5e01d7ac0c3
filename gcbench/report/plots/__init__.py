"""Pictures of runs and predictions."""
