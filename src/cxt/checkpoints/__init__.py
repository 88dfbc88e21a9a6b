"""Checkpoints: writing, reading, finding and exchanging trained weights."""
