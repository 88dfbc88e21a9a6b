"""Benchmarks of speed and memory of training and decoding."""
