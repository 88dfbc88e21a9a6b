"""TMRCA tracks from genotypes: blocks of a genome, calibration, and the files that are written."""
