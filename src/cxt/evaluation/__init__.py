"""Evaluation of accuracy: metrics, baselines and figures."""
