# Which package the rules use: in a checkout the one beside them; where Snakemake fetches the rules one by one, as those of a
# `module` from github(…), the one that is installed.

import importlib.metadata
import sys

VERSION = "0.1.0"
"""Of the package that these rules are made for."""


def check_installed_package():
    """Refuse to go on, with exit status 2 and one message, if the installed package is not of this version."""
    try:
        found = importlib.metadata.version("cxt")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != VERSION:
        print(
            f"cxt: these rules need version {VERSION} of the package cxt in the environment of Snakemake, found {found}; install "
            "the package from the same tag or commit as the rules (pip install 'cxt[all] @ git+https://…@<tag>')",
            file=sys.stderr,
        )
        sys.exit(2)


if (ROOT / "src" / "cxt").is_dir():
    sys.path.insert(0, str(ROOT / "src"))
else:
    check_installed_package()

from cxt.config.shipped import default_configfile
