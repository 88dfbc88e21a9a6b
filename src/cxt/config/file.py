"""Reading configuration files, merging overlays, and resolving the configuration."""

from cxt.config.checks import check_consistency, fill_scenarios
from cxt.config.configuration import Configuration
from cxt.config.shipped import default_configfile, find_configfile
from cxt.config.yaml import read_yaml

DEFAULT_CONFIG = default_configfile()


def merge(base: dict, overlay: dict) -> dict:
    """Merge *overlay* into *base* as Snakemake merges config files: mappings key by key, everything else replaced."""
    result = dict(base)
    for key, value in overlay.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def without_nulls(value):
    """Remove mapping entries that are null: an overlay removes a key or an entry with `null`."""
    if isinstance(value, dict):
        return {key: without_nulls(child) for key, child in value.items() if child is not None}
    return value


def load(configfiles=(), *, default=DEFAULT_CONFIG) -> dict:
    """The checked configuration: the default one, with *configfiles* merged into it in order and defaults filled in.

    Raises BadRequest for anything that `resolve` refuses.
    """
    config = read_yaml(default)
    for path in configfiles:
        config = merge(config, read_yaml(find_configfile(path)))
    return resolve(config)


def resolve(config: dict) -> dict:
    """Check *config*, key by key and for consistency, and return it without nulls and with defaults filled in.

    Demes files are replaced by their content, and scenario sets by their scenarios. The result is JSON-able and keeps numbers
    as they were written, because lineages are digests of it.
    """
    scenarios = config.get("scenarios")
    removed = {name for name, scenario in scenarios.items() if scenario is None} if isinstance(scenarios, dict) else set()
    read = Configuration.read(without_nulls(config), problem="the configuration is not valid:")
    resolved = read.resolved()
    fill_scenarios(resolved, removed)
    check_consistency(resolved)
    return resolved
