"""Reading configuration files, merging overlays, and resolving the configuration."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from cxt.config.checks import check_consistency, fill_scenarios
from cxt.config.configuration import Configuration
from cxt.config.models import FILE_KEYS
from cxt.config.parent_files import ParentFile, fill_parent_files, is_path
from cxt.config.repeats import expand_repeats
from cxt.config.shipped import default_configfile, find_configfile
from cxt.config.yaml import read_yaml
from cxt.lineage import RESULTS

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


NAMED_FILES = (
    ("scenarios", "demography"), ("scenarios", "files"), ("datasets", "mask", "path"),
    ("translate", "input"), ("translate", "populations"), ("translate", "mask"),
)  # fmt: skip
"""Where a configuration names files: section, then keys of each of its entries."""

FILES_OR_NAMES = tuple(("translate", key) for key in ("model", "samples", "pairs", "ancestral"))
"""Where it names files or something else: a text is a path if there is such a file."""

PARENTS = tuple(("models", key) for key in FILE_KEYS)
"""Where it names models or files: a text is a path if `is_path` says so."""


def locate_files(config: dict, configfiles: Sequence) -> dict:
    """Make the paths in a configuration, which are relative to the file that names them, valid in the working directory.

    Parameters
    ----------
    config : dict
        Merged from *configfiles*, and perhaps the command line, whose paths are relative to the working directory.
    configfiles : sequence of path-like
        In the order in which they were merged.
    """
    contents = [(Path(path).absolute().parent, read_yaml(path)) for path in configfiles]
    for section, *keys in NAMED_FILES + FILES_OR_NAMES + PARENTS:
        entries = config.get(section)
        for name in entries if isinstance(entries, dict) else ():
            found = _look_up(config, [section, name, *keys])
            if isinstance(found, list) and (section, *keys) in NAMED_FILES:
                if directories := [where for where, content in contents if _look_up(content, [section, name, *keys]) == found]:
                    config = merge(config, _nest([section, name, *keys], [_place(path, directories[-1]) for path in found]))
                continue
            if not isinstance(found, str) or _is_placed(found):
                continue
            if (section, *keys) in PARENTS and not is_path(found):
                continue
            directories = [where for where, content in contents if _look_up(content, [section, name, *keys]) == found]
            if (section, *keys) in FILES_OR_NAMES:
                directories = [where for where in directories if (where / found).is_file()]
            if directories:
                path = _place(found, directories[-1])
                if (section, *keys) in PARENTS and not is_path(path):
                    path = os.path.join(os.curdir, path)  # a run directory here
                config = merge(config, _nest([section, name, *keys], path))
    return config


def _is_placed(path) -> bool:
    """Whether a path is absolute, or a file of the workflow, which is relative to the working directory."""
    return not isinstance(path, str) or os.path.isabs(path) or path.startswith(f"{RESULTS}/")


def _place(path, directory: Path):
    """A path that is relative to *directory*, for the working directory."""
    if _is_placed(path):
        return path
    path = os.path.relpath(directory / path)
    return os.path.abspath(path) if path.startswith(os.pardir) else path


def _look_up(config, keys: Sequence[str]):
    """The value of nested *keys*; None if there is none."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _nest(keys: Sequence[str], value) -> dict:
    """A mapping in which nested *keys* have *value*."""
    for key in reversed(keys):
        value = {key: value}
    return value


def load(configfiles=(), *, default=DEFAULT_CONFIG, read_parent: Callable[[str], ParentFile] | None = None) -> dict:
    """The checked configuration: the default one, with *configfiles* merged into it in order and defaults filled in.

    *read_parent* reads the files that models start from, see `resolve`.

    Raises BadRequest for anything that `resolve` refuses.
    """
    paths = [default, *map(find_configfile, configfiles)]
    config: dict = {}
    for path in paths:
        config = merge(config, read_yaml(path))
    return resolve(locate_files(config, paths), read_parent=read_parent)


def resolve(config: dict, *, read_parent: Callable[[str], ParentFile] | None = None) -> dict:
    """Check *config*, key by key and for consistency, and return it without nulls and with defaults filled in.

    Demes files are replaced by their content, scenario sets by their scenarios, and repeated models by their repeats. The
    result is JSON-able and keeps numbers as they were written, because lineages are digests of it.

    *read_parent* is `cxt.checkpoints.parents.read_parent_file`, which reads the files that models start from. Their
    descriptions become a section of the result.
    """
    scenarios = config.get("scenarios")
    removed = {name for name, scenario in scenarios.items() if scenario is None} if isinstance(scenarios, dict) else set()
    read = Configuration.read(without_nulls(config), problem="the configuration is not valid:")
    resolved = read.resolved()
    expand_repeats(resolved)
    fill_scenarios(resolved, removed)
    fill_parent_files(resolved, FILE_KEYS, read_parent)
    check_consistency(resolved)
    return resolved
