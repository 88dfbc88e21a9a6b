"""From the name of a scenario to a tree sequence."""
