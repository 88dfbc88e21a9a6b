"""Trained weights in files: writing, reading, finding, exchanging."""
