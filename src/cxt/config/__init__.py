"""What a user may write: sections, defaults, bounds, and reading of configuration files."""
