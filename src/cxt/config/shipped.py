"""The configuration files and checkpoints that come with cxt: those of a checkout, or their copies in an installed package."""

import importlib.resources
from pathlib import Path

COPIED_TO = {"config": "shipped_files", "checkpoints": "shipped_checkpoints"}
"""Directories of this package into which the build of a wheel copies those of a checkout (see pyproject.toml)."""


def _shipped_directory(name: str) -> Path:
    """The directory *name* of the checkout that this package is run from; otherwise the installed copy."""
    checkout = Path(__file__).resolve().parents[3]
    if (checkout / "pyproject.toml").is_file() and (checkout / "config" / "config.yaml").is_file():
        return checkout / name
    return Path(str(importlib.resources.files("cxt.config") / COPIED_TO[name]))


def config_directory() -> Path:
    """Directory of config.yaml, paper.yaml and the examples; in a checkout, users edit it."""
    return _shipped_directory("config")


def checkpoint_directory() -> Path:
    """Directory of the checkpoints that come with cxt, such as `small.ckpt`."""
    return _shipped_directory("checkpoints")


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
