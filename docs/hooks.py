"""Pages of the documentation that are generated from the code: the configuration, the commands, and results/README.md."""

import os
import subprocess
import sys
from pathlib import Path

from mkdocs.structure.files import File

REPOSITORY = Path(__file__).parent.parent


def _help_text(*words: str) -> str:
    """What a command prints with --help, in 100 columns."""
    environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "cxt", *words, "--help"], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.rstrip()


def commands_page() -> str:
    """The page of all commands: what `cxt --help` and each command's --help print."""
    from cxt.cli import COMMANDS

    parts = ["# Commands", "", f"```text\n{_help_text()}\n```"]
    for name, (module, what) in COMMANDS.items():
        parts += [f"## `cxt {name}`", f"{what[0].upper()}{what[1:]}. The same as `python -m {module}`."]
        parts.append(f"```text\n{_help_text(name)}\n```")
    return "\n\n".join(parts) + "\n"


def configuration_page() -> str:
    """config/README.md as a page of the site."""
    return (REPOSITORY / "config" / "README.md").read_text()


def results_page() -> str:
    """results/README.md as a page of the site."""
    return (REPOSITORY / "results" / "README.md").read_text()


def on_files(files, config):
    """Add the generated pages; called by mkdocs."""
    pages = {
        "reference/commands.md": commands_page,
        "reference/configuration.md": configuration_page,
        "reference/results.md": results_page,
    }
    for path, make in pages.items():
        files.append(File.generated(config, path, content=make()))
    return files
