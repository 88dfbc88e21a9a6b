"""Estimates from a trained model."""
