"""The configuration files that come with cxt: `config/` of a checkout, or its copy inside an installed package."""

import importlib.resources
from pathlib import Path

COPIED_TO = "shipped_files"
"""Directory of this package into which the build of a wheel copies `config/` (see pyproject.toml)."""


def config_directory() -> Path:
    """Directory of config.yaml, paper.yaml and the examples.

    Returns
    -------
    Path
        `config/` of the checkout that this package is run from, where users edit it; otherwise the installed copy.
    """
    checkout = Path(__file__).resolve().parents[3]
    if (checkout / "pyproject.toml").is_file() and (checkout / "config" / "config.yaml").is_file():
        return checkout / "config"
    return Path(str(importlib.resources.files("cxt.config") / COPIED_TO))


def default_configfile() -> Path:
    """Path of the default configuration, config.yaml."""
    return config_directory() / "config.yaml"


def find_configfile(path) -> Path:
    """Path of a configuration file that a user names.

    Parameters
    ----------
    path : str or Path
        A file, or the name of one that comes with cxt, with or without `config/` before it: `config/paper.yaml`.

    Returns
    -------
    Path
        *path* if it exists or no such file comes with cxt; otherwise the file that comes with cxt.
    """
    path = Path(path)
    name = path.relative_to("config") if path.is_relative_to("config") else path
    shipped = config_directory() / name
    return shipped if not path.exists() and not name.is_absolute() and shipped.is_file() else path
