"""Genotypes from people's files: VCF, BCF, VCF Zarr, tree sequences and arrays."""
