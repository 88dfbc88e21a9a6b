"""What the rules ask: targets, lineages, run directories, costs."""
