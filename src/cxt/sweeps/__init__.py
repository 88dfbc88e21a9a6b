"""Searches of training settings: many trials of one training, on one dataset."""
