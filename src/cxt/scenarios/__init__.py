"""Scenarios: from a name to a tree sequence."""
