"""One training run, from a request to a finished checkpoint."""
