"""The network: attention, transformer, adapter."""
