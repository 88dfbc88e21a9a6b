"""Places that are not like a laptop: an ASCII locale, full devices, folders that cannot be written, a notebook's settings."""

import ast
import os
import subprocess
import sys

import pytest
from helpers.repository import REPOSITORY

from cxt.errors import BadRequest
from cxt.trainer.module import check_compiler_cache

on_full_device = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="writes to /dev/full")


def command(*words, **environment):
    """Run Python with *words* in a changed environment: (status, stdout, stderr)."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")} | environment
    done = subprocess.run([sys.executable, *words], capture_output=True, env=environment, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_text_files_have_an_encoding():
    """Every file that is opened as text says which encoding: the locale's may be ASCII."""
    places = []
    for path in sorted((REPOSITORY / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            opens = isinstance(node.func, ast.Name) and name == "open"
            modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            binary = opens and any("b" in mode and len(mode) <= 3 for mode in modes)
            if (
                (opens or name in ("read_text", "write_text"))
                and not binary
                and "encoding" not in [k.arg for k in node.keywords]
            ):
                places.append(f"{path.name}:{node.lineno}")
    assert not places


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


def test_ascii_locale():
    status, out, err = command("-m", "cxt.plan", **ASCII)
    assert (status, err) == (0, "")
    assert "scenario" in out
    code = """
from cxt.errors import BadRequest
from cxt.console import exit_on_bad_request
def main():
    print("2 \\xd7 3")
    raise BadRequest("1 \\xd7 2")
exit_on_bad_request(main)
"""
    assert command("-c", code, **ASCII) == (2, "2 \\xd7 3\n", "cxt: 1 \\xd7 2\n")


@on_full_device
@pytest.mark.parametrize(("words", "unbuffered"), [(["plan"], ""), (["runs", "--help"], "1")])
def test_full_device(words, unbuffered):
    with open("/dev/full", "wb") as full:
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        run = [sys.executable, "-m", "cxt", words[0]]
        done = subprocess.run([*run, *words[1:]], stdout=full, stderr=subprocess.PIPE, env=environment, check=False)
        assert done.returncode == 1
        assert done.stderr.decode() == "cxt: standard output cannot be written: No space left on device\n"
        assert subprocess.run([*run, "--nonsense"], stdout=full, stderr=full, check=False).returncode == 2


def test_reader_that_has_gone():
    for unbuffered in ("", "1"):
        run = subprocess.Popen(
            [sys.executable, "-m", "cxt.commands.runs", "--help"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
        run.stdout.close()
        assert run.stderr.read() == b""
        assert run.wait() == 141


@on_full_device
def test_progress_that_is_lost_ends_no_work(tmp_path):
    code = f"""
from cxt.console import progress_only
from cxt.console import exit_on_bad_request
def main():
    with progress_only():
        for step in range(3):
            print("step", step, flush=True)
        open({str(tmp_path / "result")!r}, "w").close()
exit_on_bad_request(main)
"""
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0
    assert (tmp_path / "result").exists()
    assert done.stderr.decode() == "cxt: standard output cannot be written (No space left on device); continuing without it\n"


@pytest.mark.parametrize("backend", ["module://no_such.backend", "nonsense"])
def test_backend_of_a_notebook(tmp_path, backend):
    code = f"""
import sys
from cxt.console import exit_on_bad_request
def main():
    from cxt.evaluation.figures import draw_learning_rates
    draw_learning_rates([1e-3, 1e-2], [2.0, 1.0], 1e-2, {str(tmp_path / "lr.png")!r}, title="x")
    assert "matplotlib.pyplot" not in sys.modules
    import cxt.trainer.fit  # whose packages import it
exit_on_bad_request(main)
"""
    assert command("-c", code, MPLBACKEND=backend)[::2] == (0, "")
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")


def test_compiled_code_that_cannot_be_kept():
    code = """
import numba.core.caching as caching
for kind in (caching.InTreeCacheLocator, caching.UserWideCacheLocator, caching.UserProvidedCacheLocator):
    kind.ensure_cache_path = lambda self: (_ for _ in ()).throw(OSError(30, "read-only"))
import numpy as np, cxt.data.targets
from cxt.data.kernels import count_bits
assert count_bits(np.uint64(7)) == 3
"""
    status, _, err = command("-c", code)
    assert status == 0, err
    assert err.count("set NUMBA_CACHE_DIR to a writable directory") == 1


@pytest.mark.long
def test_compiler_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(BadRequest, match=r"TORCHINDUCTOR_CACHE_DIR=.*Not a directory.*compile: none"):
        check_compiler_cache()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "made" / "here"))
    check_compiler_cache()
