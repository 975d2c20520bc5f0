"""Training jobs that are posted by themselves."""
