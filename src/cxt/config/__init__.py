"""The configuration: its sections, defaults and bounds, and reading of configuration files."""
