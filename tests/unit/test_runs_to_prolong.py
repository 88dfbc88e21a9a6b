"""Which of several trainings of a model the workflow prolongs."""

import json
import os

import pytest
import yaml
from helpers.repository import TINY

from cxt.config.file import load
from cxt.workflow.jobs import count_model_examples
from cxt.workflow.lineages import run_directory
from cxt.workflow.prolonging import find_run_to_prolong

NAMES = ["narrow", "broad_w200", "broad_adapter", "w200_wmissing", "w200_wmissing_adapter"]


def configure(directory, windows: int | None = None, **training) -> dict:
    """The tiny configuration with `broad` only, trained as said, on regions of *windows* windows."""
    training = {"schedule": "constant", "batch_size": 4, "grad_accum": 1} | training
    content = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    model = {"preset": "broad", "dataset": "processed", "training": training, "windows": windows}
    path = directory / "x.yaml"
    path.write_text(yaml.safe_dump(content | {"models": dict.fromkeys(NAMES) | {"broad": model}}), encoding="utf-8")
    return load([path])


def leave_run(directory, *, done: int | None, epochs: int = 1, **training) -> str:
    """The run directory of such a training, as one leaves it that was interrupted or ended at step *done*."""
    config = configure(directory, epochs=epochs, **training)
    run = directory / run_directory(config, "broad")
    (run / "checkpoints").mkdir(parents=True)
    settings = {"epochs": epochs} | ({"max_steps": training["max_steps"]} if "max_steps" in training else {})
    record = {"identity": {"settings": settings, "lineage": run.name.removeprefix("broad-")}, "finished": None}
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    if done is not None:
        os.symlink(f"step={done}.ckpt", run / "checkpoints" / "last.ckpt")
    return run_directory(config, "broad")


@pytest.fixture
def steps(tmp_path, monkeypatch) -> int:
    """Steps of an epoch."""
    monkeypatch.chdir(tmp_path)
    return count_model_examples(configure(tmp_path), "broad", "train") // 4


def test_the_one_that_has_come_furthest(tmp_path, steps):
    assert steps > 20
    wanted = configure(tmp_path, epochs=5)
    assert find_run_to_prolong(wanted, "broad") is None
    few = leave_run(tmp_path, done=20, max_steps=20)
    assert find_run_to_prolong(wanted, "broad") == few
    two = leave_run(tmp_path, done=2 * steps, epochs=2)
    assert find_run_to_prolong(wanted, "broad") == two  # although it says nothing of max_steps
    leave_run(tmp_path, done=steps, epochs=4)  # interrupted
    assert find_run_to_prolong(wanted, "broad") == two
    four = leave_run(tmp_path, done=2 * steps, max_steps=4 * steps)  # interrupted there, too
    assert find_run_to_prolong(wanted, "broad") == four
    leave_run(tmp_path, done=5 * steps, max_steps=5 * steps)  # as long as the one that is asked for
    leave_run(tmp_path, done=6 * steps, epochs=6)
    leave_run(tmp_path, done=3 * steps, epochs=3, seed=2)
    leave_run(tmp_path, done=None, epochs=3)  # nothing to begin with
    assert find_run_to_prolong(wanted, "broad") == four
    shorter = configure(tmp_path, max_steps=2 * steps)
    assert find_run_to_prolong(shorter, "broad") == few
    assert find_run_to_prolong(configure(tmp_path, max_steps=20), "broad") is None  # begun
    assert find_run_to_prolong(configure(tmp_path, max_steps=19), "broad") is None


def test_what_cannot_be_read_is_left_out(tmp_path, steps):
    good = leave_run(tmp_path, done=3, epochs=1)
    for number, text in enumerate(("{", "[]", "{}", '{"identity": {"settings": {}, "lineage": "x"}}')):
        other = tmp_path / "results" / "runs" / f"broad-{number}"
        other.mkdir()
        (other / "run.json").write_text(text, encoding="utf-8")
    bad = tmp_path / leave_run(tmp_path, done=9, epochs=2)
    (bad / "checkpoints" / "last.ckpt").unlink()
    (bad / "checkpoints" / "last.ckpt").write_text("no link")
    assert find_run_to_prolong(configure(tmp_path, epochs=5), "broad") == good


def test_steps_of_regions_are_counted(tmp_path, steps):
    """Read in order, each example gives five batches, so that an epoch has five times the steps."""
    regions = {"windows": 2, "regions": {"in_order": True}}
    run = leave_run(tmp_path, done=4 * steps, max_steps=4 * steps, **regions)
    assert find_run_to_prolong(configure(tmp_path, epochs=1, **regions), "broad") == run
    assert find_run_to_prolong(configure(tmp_path, max_steps=4 * steps - 1, **regions), "broad") is None
