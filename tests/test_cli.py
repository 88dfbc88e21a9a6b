"""The console script and the package's front."""

import tomllib

from conftest import REPOSITORY, run_python


def test_console_script():
    assert tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]["cxt"] == "cxt.cli:main"
    code = "import sys; from cxt.cli import main; sys.argv = ['cxt', *sys.argv[1:]]; main()"
    assert "simulate" in run_python("-c", code).stdout
    done = run_python("-c", code, "simulat", check=False)
    assert done.returncode == 2
    assert "unknown command 'simulat'; did you mean 'simulate'" in done.stderr
    assert "--dataset-path" in run_python("-c", code, "train", "--help").stdout
    for stage in ("simulate", "preprocess", "dataset", "evaluate"):
        assert "usage: " in run_python("-m", f"cxt.{stage}", "--help").stdout


def test_importing_is_quick_and_names_are_there():
    code = """
import sys, cxt
assert not {"torch", "numba", "msprime"} & sys.modules.keys()
assert callable(cxt.pair_features) and callable(cxt.pair_log_tmrca) and callable(cxt.load_model) and cxt.PairDataset
try:
    cxt.nothing
except AttributeError:
    pass
else:
    sys.exit("no AttributeError")
"""
    run_python("-c", code)
