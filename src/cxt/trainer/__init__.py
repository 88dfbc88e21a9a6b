"""Training: one run, from a request to a finished checkpoint."""
