"""Targets, lineages, run directories and costs for the rules."""
