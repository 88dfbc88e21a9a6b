"""Configuration files: reading them, merging overlays, and the resolved configuration that the workflow digests."""

from cxt.config.checks import check_consistency, fill_scenarios
from cxt.config.configuration import Configuration
from cxt.config.shipped import default_configfile, find_configfile
from cxt.config.yaml import read_yaml

DEFAULT_CONFIG = default_configfile()


def merge(base: dict, overlay: dict) -> dict:
    """*overlay* over *base* as Snakemake merges config files: mappings key by key, everything else replaced."""
    result = dict(base)
    for key, value in overlay.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def without_nulls(value):
    """*value* without the mapping entries that are null: an overlay removes a key or an entry by `null`."""
    if isinstance(value, dict):
        return {key: without_nulls(child) for key, child in value.items() if child is not None}
    return value


def load(configfiles=(), *, default=DEFAULT_CONFIG) -> dict:
    """The checked configuration: *configfiles* in order over the default one, defaults filled in.

    Raises BadRequest for anything that `resolve` refuses.
    """
    config = read_yaml(default)
    for path in configfiles:
        config = merge(config, read_yaml(find_configfile(path)))
    return resolve(config)


def resolve(config: dict) -> dict:
    """*config* without nulls, checked key by key and in itself, with defaults filled in.

    Demes files are replaced by their content, and scenario sets by the scenarios in them. What comes out is JSON-able, and
    numbers are as they were written: lineages are digests of it.
    """
    scenarios = config.get("scenarios")
    removed = {name for name, scenario in scenarios.items() if scenario is None} if isinstance(scenarios, dict) else set()
    read = Configuration.read(without_nulls(config), problem="the configuration is not valid:")
    resolved = read.resolved()
    fill_scenarios(resolved, removed)
    check_consistency(resolved)
    return resolved
