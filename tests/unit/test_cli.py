"""The console script and the package's front."""

import importlib
import re
import tomllib

import pytest
from helpers.repository import REPOSITORY, run_python

from cxt import preprocess
from cxt.cli import COMMANDS
from cxt.errors import BadRequest


def test_console_script():
    assert tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]["cxt"] == "cxt.cli:main"
    code = "import sys; from cxt.cli import main; sys.argv = ['cxt', *sys.argv[1:]]; main()"
    assert "simulate" in run_python("-c", code).stdout
    done = run_python("-c", code, "simulat", check=False)
    assert done.returncode == 2
    assert "unknown command 'simulat'; did you mean 'simulate'" in done.stderr
    assert "--dataset-path" in run_python("-c", code, "train", "--help").stdout
    for stage in ("simulate", "preprocess", "dataset", "evaluate"):
        assert "usage: " in run_python("-m", "cxt", stage, "--help").stdout


def test_every_command_is_listed():
    package = REPOSITORY / "src" / "cxt"
    mains = {path.stem for path in package.rglob("*.py") if "\ndef main(argv" in path.read_text()}
    assert mains == COMMANDS.keys()
    assert run_python("-m", "cxt").stdout.startswith("usage: cxt COMMAND")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset", "export", ".", "--out", "o", "--limit", "-1"], "--limit must be a positive integer, got -1"),
        (["evaluate", "--threads", "100000"], "--threads must be an integer from 1 to 1024, got 100000"),
        (["plan", "--devices", "-1"], "--devices must be an integer from 0 to 1024, got -1"),
        (["plan", "--calibrate", "--seconds", "nan"], "--seconds must be a finite positive number, got nan"),
        (["trees", "x", "--out", "o", "--index", "-1"], "--index must be a non-negative integer, got -1"),
        (["simulate", "--spec", "{}", "--out", "o", "--count", "0"], "--count must be positive, got 0"),
        (["preprocess", "shard", "--batch", "b", "--test", "o", "--start", "-1", "--count", "0"],
         "--start must be .*, got -1.*--count must be a positive integer, got 0"),
        (["checkpoint", "diff", "a", "b", "--rtol", "nan"], "--rtol must be a finite non-negative number, got nan"),
        (["bench", "train", "--threads", "100000", "--workers", "999"], "--threads .*, got 100000.*--workers .*, got 999"),
        (["plan", "--machine", "mine"], "--machine cannot be used without --calibrate"),
        (["evaluate", "--checkpoint", "c", "--batches", "[]", "--out", "o", "--figures", "f", "--spec",
          '{"window_size": 1, "sequence_length": 1, "samples": 3, "scales": [1], "pairs": -1, "replicates": 0, '
          '"batch_size": 1.5, "seed": 1}'], "--spec: pairs must .*, got -1; replicates .*, got 0; batch_size .*1.5"),
        (["bench", "decode", "--seconds", "inf"], "--seconds must be a finite positive number, got inf"),
        (["find_lr", "--highest", ".inf"], "must be finite"),
        (["find_lr", "--num-steps", str(10**30)], "must be a whole number from 20 to 1000000000, got 1000"),
    ],
)  # fmt: skip
def test_numbers_that_mean_nothing(words, message):
    with pytest.raises(BadRequest) as caught:
        importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
    assert re.search(message, str(caught.value), flags=re.S), str(caught.value)


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


def test_verbosity(tmp_path, capsys):
    """Progress is shown by default, with the time and the module under -v, and not under -q."""
    words = ["--spec", '{"length": 10000, "accessible_run": 900, "inaccessible_run": 100}', "--seed", "1"]
    lines = {}
    for flag in ("", "-q", "-v"):
        preprocess.main(["mask", *words, "--out", str(tmp_path / "mask.npz"), *filter(None, [flag])])
        lines[flag] = capsys.readouterr().out
    assert lines[""].startswith(f"{tmp_path}/mask.npz: 10000 bp, ")
    assert lines["-q"] == ""
    assert lines["-v"].endswith(f" cxt.preprocess: {lines['']}")
    preprocess.main(["mask", *words, "--out", str(tmp_path / "mask.npz")])
    assert capsys.readouterr().out == lines[""]
