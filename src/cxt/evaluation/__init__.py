"""Accuracy: metrics, baselines, figures."""
