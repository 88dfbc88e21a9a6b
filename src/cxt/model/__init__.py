"""The network: attention, transformer, adapter and decoder."""
