"""Translate a user's genotypes into TMRCA tracks."""
