"""The workflow, interrupted while it trains: by signals, by a full disk, by numbers that are not finite."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.repository import REPOSITORY, TINY, snakemake

from cxt.checkpoints.run_directory import RunDirectory
from cxt.trainer.training_state import list_training_states

KILLS = int(os.environ.get("CXT_RESUME_KILLS", "0"))
"""Kills of each model by `make test-resume`; 0 leaves the long tests out."""
thorough = pytest.mark.skipif(not KILLS, reason="takes long: `make test-resume`")


@pytest.fixture(autouse=True, scope="module")
def interruptible():
    """Whatever started the tests may ignore Ctrl-C, as a shell makes its background jobs do, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


LONG = {"narrow": 120} | ({"broad_adapter": 60, "w200_wmissing_adapter": 120} if KILLS else {})
"""Epochs of the models that train for some seconds."""


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    """tests/tiny.yaml, but some models train for some seconds."""
    config = yaml.safe_load(TINY.read_text())
    for model, epochs in LONG.items():
        training = {"epochs": epochs, "save_every": 20, "save_minutes": 0, "decode_items": 2}
        config["models"].setdefault(model, {})["training"] = training
    path = tmp_path_factory.mktemp("long") / "long.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def whole(workflow, long, tmp_path_factory) -> Path:
    """The workflow with those models trained without interruption."""
    directory = tmp_path_factory.mktemp("whole") / "whole"
    shutil.copytree(workflow, directory, symlinks=True)
    snakemake(*[f"results/{model}.ckpt" for model in LONG], cwd=directory, configfile=long)
    return directory


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy", symlinks=True)


def forget(directory: Path, model: str) -> None:
    """Remove a checkpoint and the long run that made it."""
    (directory / f"results/{model}.ckpt").unlink()
    for run in (directory / "results/runs").glob(f"{model}-*"):
        if run.is_dir() and len(list((run / "checkpoints").glob("step=*.ckpt"))) > 1:
            shutil.rmtree(run)


def start(directory: Path, target: str, configfile: Path, **environment) -> subprocess.Popen:
    words = ["-m", "snakemake", "--snakefile", REPOSITORY / "Snakefile", "--directory", directory, "--cores", "2"]
    words += ["--rerun-incomplete", "--show-failed-logs", "--configfile", configfile, "--", target]
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "src")} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def run_of(directory: Path, model: str) -> Path | None:
    """The run directory of a model that is not finished."""
    locked_runs = [path.with_suffix("") for path in (directory / "results/runs").glob(f"{model}-*.lock") if path.read_text()]
    return locked_runs[0] if locked_runs and locked_runs[0].is_dir() else None


def trainer_of(directory: Path, process: subprocess.Popen, *, beyond: str | None = "") -> int:
    """Process number of the trainer that Snakemake has started, once its last save is another than *beyond* (None: at once)."""
    began = time.monotonic()
    while process.poll() is None:
        assert time.monotonic() - began < 120
        for lock in (directory / "results/runs").glob("*.lock"):
            words = lock.read_text().split()
            if len(words) != 4 or not Path(f"/proc/{words[1]}").exists():
                continue
            saves = list_training_states(RunDirectory(lock.with_suffix("")))
            if beyond is None or (saves and saves[0].name != beyond):
                return int(words[1])
        time.sleep(0.02)
    raise Through


class Through(AssertionError):
    """Snakemake has ended before its trainer was seen."""


def ended(number: int) -> None:
    """Wait until a process is gone."""
    began = time.monotonic()
    while Path(f"/proc/{number}").exists():
        if "Z" in Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0]:
            return
        assert time.monotonic() - began < 60
        time.sleep(0.05)


def assert_ends_the_same(directory: Path, whole: Path, model: str, configfile: Path) -> None:
    """The next run of the same command ends with the checkpoint of an undisturbed one."""
    process = start(directory, f"results/{model}.ckpt", configfile)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert (directory / f"results/{model}.ckpt").read_bytes() == (whole / f"results/{model}.ckpt").read_bytes()
    assert not list((directory / "results").glob("*.tmp"))


pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")


@thorough
@pytest.mark.parametrize("model", LONG)
def test_trainer_killed(copy, whole, long, model):
    """`kill -9` of the trainer at random moments, each followed by the same command."""
    forget(copy, model)
    rng = np.random.default_rng([5, KILLS])
    kills = continued = runs = 0
    while kills < KILLS:
        process = start(copy, f"results/{model}.ckpt", long)
        with contextlib.suppress(ProcessLookupError, Through):
            trainer = trainer_of(copy, process, beyond=None)
            time.sleep(rng.uniform(0, 6))
            os.kill(trainer, signal.SIGKILL)
        output = process.communicate()[0]
        continued += "continuing from" in output
        if process.returncode == 0:  # it was through before; another run, then
            assert_ends_the_same(copy, whole, model, long)
            forget(copy, model)
            runs += 1
            continue
        kills += 1
        assert not (copy / f"results/{model}.ckpt").exists()
    assert_ends_the_same(copy, whole, model, long)
    print(f"{model}: {kills} kills of {runs + 1} runs, {continued} tries continued a save")


@pytest.mark.long
def test_interrupted_again_and_again(copy, whole, long):
    """`kill -9` and SIGTERM to the trainer, Ctrl-C to all: each time the same command goes on from the last save."""
    forget(copy, "narrow")
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = start(copy, "results/narrow.ckpt", long)
        saves = list_training_states(RunDirectory(run)) if (run := run_of(copy, "narrow")) else []
        trainer = trainer_of(copy, process, beyond=saves[0].name if saves else "")
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            os.kill(trainer, number)
        output = process.communicate()[0]
        assert process.returncode != 0
        assert ("continuing from" in output) == bool(saves)
        ended(trainer)
        if number == signal.SIGTERM:
            assert re.search(r"narrow: stopped by SIGTERM at step (\d+); the same command continues from step \1", output)
        assert not (copy / "results/narrow.ckpt").exists()
    assert_ends_the_same(copy, whole, "narrow", long)


@thorough
def test_snakemake_alone_interrupted(copy, whole, long):
    forget(copy, "narrow")
    process = start(copy, "results/narrow.ckpt", long)
    trainer = trainer_of(copy, process)
    os.kill(process.pid, signal.SIGINT)
    process.communicate()
    assert process.returncode != 0
    ended(trainer)
    assert_ends_the_same(copy, whole, "narrow", long)


@pytest.mark.long
def test_snakemake_killed_while_the_trainer_lives_on(copy, whole, long, tmp_path):
    """A second trainer is refused, of this run and of another one that publishes the same checkpoint."""
    forget(copy, "narrow")
    process = start(copy, "results/narrow.ckpt", long)
    trainer = trainer_of(copy, process)
    os.kill(trainer, signal.SIGSTOP)  # it must not be through before the others try
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    locked = snakemake("results/narrow.ckpt", cwd=copy, configfile=long, check=False)
    assert locked.returncode == 1
    assert "--unlock" in locked.stdout + locked.stderr
    snakemake("--unlock", cwd=copy, configfile=long)
    other = yaml.safe_load(long.read_text())
    other["models"]["narrow"]["training"]["lr"] = 1e-3
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    for configfile, what in ((long, r"results/runs/narrow-\w+"), (tmp_path / "other.yaml", "results/narrow.ckpt")):
        refused = snakemake("--show-failed-logs", "results/narrow.ckpt", cwd=copy, configfile=configfile, check=False)
        assert refused.returncode == 1
        output = refused.stdout + refused.stderr
        assert re.search(
            rf"cxt: {what} is in use by process {trainer} on \S+; wait for it or stop it \(to stop it: kill", output
        )
    os.kill(trainer, signal.SIGTERM)
    os.kill(trainer, signal.SIGCONT)
    ended(trainer)
    assert not (copy / "results/narrow.ckpt").exists()
    assert_ends_the_same(copy, whole, "narrow", long)


def injected(directory: Path, code: str) -> dict:
    """An environment in which every Python process runs *code* at its start."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": f"{directory}{os.pathsep}{REPOSITORY / 'src'}"}


def test_not_finite_ends_the_run_and_what_would_follow(copy, long, tmp_path):
    """A NaN in a batch: exit 1, the log is shown, nothing is published, and no descendant starts."""
    for model in ("broad", "broad_adapter", "broad_w200"):
        (copy / f"results/{model}.ckpt").unlink()
    shutil.rmtree(copy / "results/runs")
    code = (
        "import sys\n"
        "if 'cxt.train' in sys.orig_argv:\n"
        "    import cxt.data.examples as d\n"
        "    original, calls = d.compute_model_input, []\n"
        "    def compute_model_input(counts, missing):\n"
        "        x = original(counts, missing)\n"
        "        calls.append(1)\n"
        "        return x * float('nan') if len(calls) == 7 else x\n"
        "    d.compute_model_input = compute_model_input\n"
    )
    process = start(copy, "results/broad_adapter.ckpt", long, **injected(tmp_path / "nan", code))
    output = process.communicate()[0]
    assert process.returncode == 1
    assert "cxt: broad: loss or gradient is not finite at step 7. Epoch 0, batches 6 to 6: " in output
    assert "Try half the learning rate" in output
    assert not (copy / "results/broad.ckpt").exists()
    assert not list((copy / "results/runs").glob("broad_adapter-*"))


@pytest.mark.parametrize("stage", ["simulate", "preprocess", "train"])
def test_failed_upstream_never_leaves_a_current_checkpoint(copy, long, tmp_path, stage):
    """A stage fails after a change of the configuration: the old checkpoint must not look up to date."""
    config = yaml.safe_load(long.read_text())
    config["scenarios"]["constant"]["population_size"] = 12345
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(config))
    code = f"import sys\nif 'cxt.{stage}' in sys.orig_argv: sys.exit(1)\n"
    process = start(copy, "results/narrow.ckpt", changed, **injected(tmp_path / "broken", code))
    output = process.communicate()[0]
    assert process.returncode == 1, output
    done = snakemake("-n", "results/narrow.ckpt", cwd=copy, configfile=changed)
    assert "output: results/narrow.ckpt" in done.stdout + done.stderr
