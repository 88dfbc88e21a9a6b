"""envs/Dockerfile and envs/apptainer.def: both hold all of the workflow, and set the same."""

import re
import subprocess

from helpers.repository import REPOSITORY

DOCKERFILE = (REPOSITORY / "envs/Dockerfile").read_text().replace("\\\n", " ")
DEFINITION = (REPOSITORY / "envs/apptainer.def").read_text()
TRACKED = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split()


def copied_by_docker() -> set[str]:
    """Files and directories that the image has."""
    lines = re.findall(r"^COPY (.*) (\S+)$", DOCKERFILE, flags=re.M)
    return {source for sources, _ in lines for source in sources.split()} - {"envs/install.sh"}


def section(name: str) -> list[str]:
    """Lines of a section of the definition for Apptainer."""
    return [line.strip() for line in re.search(rf"^%{name}\n(.*?)(\n\n|\Z)", DEFINITION, flags=re.M | re.S)[1].splitlines()]


def test_both_hold_the_same_files():
    copied = copied_by_docker()
    assert copied == {line.split()[0] for line in section("files")}
    pattern = r"(checkpoints|config|envs|rules|src|workflow)/|(Snakefile|pyproject\.toml)$"
    needed = {path for path in TRACKED if re.match(pattern, path)}
    for path in copied:
        assert (REPOSITORY / path).exists(), path
    assert not {path for path in needed if path not in copied and path.split("/")[0] not in copied}


def test_nothing_that_is_copied_is_ignored():
    patterns = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert patterns[0] == "*"
    assert copied_by_docker() == {pattern[1:] for pattern in patterns if pattern.startswith("!")}


def test_both_set_the_same_variables():
    docker = set(re.findall(r"(\w+)=", re.search(r"^ENV (.*)", DOCKERFILE, flags=re.M)[1]))
    apptainer = set(re.findall(r"export (\w+)=", "\n".join(section("environment"))))
    assert docker == apptainer
    assert {"XDG_CACHE_HOME", "MPLCONFIGDIR", "NUMBA_CACHE_DIR"} <= docker


def test_ends_as_another_user_than_root():
    assert re.findall(r"^USER (.*)", DOCKERFILE, flags=re.M)[-1] == "cxt"
