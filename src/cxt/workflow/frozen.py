"""A configuration that no longer changes, which remembers what was derived from it.

A plan of thousands of jobs asks for the same variants and lineages again and again.
"""

import functools
from collections.abc import Callable


class FrozenConfiguration(dict):
    """A resolved configuration that is not changed any more."""

    def __init__(self, config: dict):
        super().__init__(config)
        self.derived: dict[tuple, object] = {}


def derived_once(function: Callable) -> Callable:
    """Let *function* of a configuration, names and numbers compute each result once, if the configuration is frozen."""

    @functools.wraps(function)
    def remembered(config, *names):
        if not isinstance(config, FrozenConfiguration):
            return function(config, *names)
        key = (function, *names)
        if key not in config.derived:
            config.derived[key] = function(config, *names)
        return config.derived[key]

    return remembered
