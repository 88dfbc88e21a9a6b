"""The package by itself: what its base install needs, and its public names."""

import re
import tomllib
from importlib.metadata import packages_distributions

import pytest
from helpers.repository import GOLDEN, REPOSITORY, run_python
from helpers.simulations import simulate

from cxt.config.shipped import config_directory, find_configfile
from cxt.errors import EXTRAS, advise_extra

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


@pytest.mark.slow
def test_base_install_uses_a_checkpoint(dataset, tmp_path):
    """With the packages of extras installed, but not to be imported; .ci/wheel does the same where they are not."""
    simulate(seed=1, length=1_000_000, rate=1e-8, discrete=False).dump(tmp_path / "sample.trees")
    script = REPOSITORY / "tests" / "helpers" / "base_install.py"
    done = run_python(script, GOLDEN / "published_style.ckpt", dataset, "sample.trees", "--block", cwd=tmp_path)
    assert done.stdout.strip() == "[]"
    assert (tmp_path / "posterior.png").is_file()


@pytest.mark.parametrize("command", ["simulate", "train", "plan", "find_lr", "sweep"])
def test_missing_extra_is_one_line(command, tmp_path):
    code = (
        "import sys\nfrom helpers import base_install\n"
        f"sys.meta_path.insert(0, base_install.Blocked); sys.argv = ['cxt', {command!r}]\n"
        "from cxt.cli import main; main()"
    )
    done = run_python("-c", code, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"cxt: this needs the package \w+, which .*: pip install 'cxt\[(simulate|train)\]'\n", done.stderr)


def test_extras_are_those_of_the_project():
    names = {name: set(map(str.lower, distributions)) for name, distributions in packages_distributions().items()}
    for package, extra in EXTRAS.items():
        listed = {re.match(r"[\w-]+", entry)[0] for entry in PROJECT["optional-dependencies"][extra]}
        # Lightning's parts come with it.
        assert names[package] & listed or package == "lightning_fabric", package
    assert advise_extra(ModuleNotFoundError("no", name="numpy")) is None
    assert "cxt[simulate]" in advise_extra(ModuleNotFoundError("no", name="msprime.core"))


def test_configurations_that_come_with_cxt(tmp_path, monkeypatch):
    assert config_directory() == REPOSITORY / "config"
    monkeypatch.chdir(tmp_path)
    for name in ("paper.yaml", "config/paper.yaml"):
        assert find_configfile(name) == REPOSITORY / "config" / "paper.yaml"
    (tmp_path / "paper.yaml").write_text("")
    assert str(find_configfile("paper.yaml")) == "paper.yaml"
    assert str(find_configfile("other.yaml")) == "other.yaml"


def test_public_names():
    import cxt

    assert re.match(r"\d+\.\d+|0\+unknown", cxt.__version__)
    assert set(cxt.__all__) <= set(dir(cxt))
    assert (REPOSITORY / "src" / "cxt" / "py.typed").exists()


def test_every_public_name_is_in_the_reference():
    import cxt

    text = (REPOSITORY / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE))
    assert documented == {f"{module}.{name}" for name, module in cxt._MODULES.items()}


def test_table_of_trials():
    """docs/learning.md holds what `benchmarks/learning.py table` prints."""
    benchmarks = REPOSITORY / "benchmarks"
    printed = run_python(benchmarks / "learning.py", "table", "--results", benchmarks / "learning").stdout
    assert printed.count("\n") > 20
    assert printed in (REPOSITORY / "docs" / "learning.md").read_text()


def test_table_of_errors_in_genotypes():
    """docs/trust.md holds what `benchmarks/robustness.py table` prints."""
    benchmarks = REPOSITORY / "benchmarks"
    printed = run_python(benchmarks / "robustness.py", "table", "--results", benchmarks / "robustness").stdout
    assert printed.count("\n") > 10
    assert printed in (REPOSITORY / "docs" / "trust.md").read_text()
