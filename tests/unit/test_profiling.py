"""Profiles of the first steps, and callbacks of users."""

import json
import sys

import pytest
import torch

from cxt.checkpoints.file import read_checkpoint
from cxt.config.learning import UserCallback
from cxt.errors import BadRequest, Failed
from cxt.trainer.profiling import divide_time, format_parts
from cxt.trainer.train_model import train_model
from cxt.trainer.training_state import find_damage
from cxt.trainer.user_callbacks import build_callbacks

SMALL = {
    "layers": 1, "heads": 2, "width": 16, "devices": 0, "batch_size": 4, "grad_accum": 2, "epochs": 1, "max_steps": 6,
    "objective": "marginal", "decode_items": 0,
}  # fmt: skip

MINE = """
import pathlib
import numpy as np
import torch
from pytorch_lightning.callbacks import Callback

class Count(Callback):
    def __init__(self, path, every=1):
        if every < 1:
            raise ValueError("every must be positive")
        self.path, self.steps = path, 0
    def on_train_batch_end(self, trainer, module, *rest):
        self.steps += 1
    def on_train_end(self, trainer, module):
        open(self.path, "w").write(str(self.steps))

class Other:
    pass

class Stored(Callback):
    # Counts steps, across interruptions; from step *bad* on, with a number that a training state cannot hold.
    def __init__(self, path="/dev/null", kind="dict", bad=1000):
        self.path, self.kind, self.bad, self.steps = path, kind, bad, 0
    def state_dict(self):
        steps = np.float64(self.steps) if self.steps >= self.bad else self.steps
        good = {"steps": steps, "mean": torch.zeros(2)}
        return {"dict": good, "path": {"steps": pathlib.Path("x")}, "lambda": lambda: 1}[self.kind]
    def load_state_dict(self, state):
        self.steps = state["steps"]
    def on_train_batch_end(self, trainer, module, *rest):
        self.steps += 1
    def on_train_end(self, trainer, module):
        open(self.path, "w").write(str(self.steps))
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_callbacks_for_cxt.py").write_text(MINE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_callbacks_for_cxt"
    sys.modules.pop("my_callbacks_for_cxt", None)


def test_parts_of_a_step():
    durations = {
        "[Strategy]SingleDeviceStrategy.batch_to_device": [0.1, 0.1],
        "[Strategy]SingleDeviceStrategy.training_step": [0.5, 0.5],
        "[Strategy]SingleDeviceStrategy.backward": [1.0, 1.0],
        "[Callback]X.on_before_backward": [9.0],
        "run_training_batch": [2.0, 1.5],
    }
    parts = divide_time(durations, seconds=5.0, waited=0.3)
    expected = {"waiting for data": 0.3, "moving to the device": 0.2, "forward": 1.0, "backward": 2.0, "optimizer": 0.5}
    assert parts == pytest.approx(expected | {"other": 1.0})
    assert format_parts(parts, batches=2).endswith("optimizer 250.0 ms (10%), other 500.0 ms (20%)")


@pytest.mark.parametrize("kind", ["simple", "advanced", "pytorch"])
def test_profiles_change_nothing(dataset, tmp_path, kind, caplog):
    weights = []
    for profiler in ("none", kind):
        run = tmp_path / profiler
        train_model(
            **SMALL, dataset_path=dataset, run_dir=run, out=tmp_path / f"{profiler}.ckpt", profiler=profiler, profile_batches=5
        )
        weights.append(read_checkpoint(tmp_path / f"{profiler}.ckpt").state_dict)
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    assert not (tmp_path / "none/profile.txt").exists()
    report = (tmp_path / kind / "profile.txt").read_text(encoding="utf-8")
    assert report.startswith("5 batches: waiting for data ")
    assert {"simple": "run_training_batch", "advanced": "cumulative", "pytorch": "aten::"}[kind] in report
    assert "5 batches took" in caplog.text
    if kind == "pytorch":
        assert json.loads((tmp_path / "pytorch/profile-trace.json").read_text(encoding="utf-8"))["traceEvents"]


def test_a_short_run_is_profiled_to_its_end(dataset, tmp_path):
    train_model(**SMALL, dataset_path=dataset, run_dir=tmp_path / "run", profiler="simple", profile_batches=1000)
    assert (tmp_path / "run/profile.txt").read_text(encoding="utf-8").startswith("11 batches: ")


def test_a_callback_of_ones_own(dataset, tmp_path, mine, caplog):
    called = [{"class_path": f"{mine}.Count", "init_args": {"path": str(tmp_path / "steps")}}]
    train_model(**SMALL, dataset_path=dataset, run_dir=tmp_path / "run", callbacks=called)
    assert (tmp_path / "steps").read_text() == "12"
    assert f"the callback {mine}.Count is a setting of this run" in caplog.text
    settings = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))["identity"]["settings"]
    assert settings["callbacks"][0]["class_path"] == f"{mine}.Count"


@pytest.mark.parametrize(
    ("path", "arguments", "says"),
    [
        ("Count", {}, "must be a module and a class"),
        ("no_such_module.Count", {}, "cannot be imported"),
        ("{}.Coumt", {}, "did you mean 'Count'"),
        ("{}.Other", {}, "not a subclass"),
        ("{}.Count", {"pth": 1}, "does not take init_args"),
        ("{}.Count", {"path": "x", "every": 0}, "every must be positive"),
        ("{}.Stored", {"kind": "path"}, r"the state_dict of \w+.Stored must consist of numbers, text"),
        ("{}.Stored", {"kind": "lambda"}, "so that a run can be continued"),
        ("{}.Stored", {"bad": 0}, r"convert other values, such as numpy's with float\(\)"),
    ],
)
def test_wrong_callbacks(mine, path, arguments, says):
    with pytest.raises(BadRequest, match=says):
        build_callbacks([UserCallback(class_path=path.format(mine), init_args=arguments)])


def test_the_state_of_a_callback_is_continued(dataset, tmp_path, mine):
    called = [{"class_path": f"{mine}.Stored", "init_args": {"path": str(tmp_path / "steps")}}]
    settings = {**SMALL, "dataset_path": dataset, "run_dir": tmp_path / "run", "callbacks": called, "save_every": 1}
    with pytest.raises(Failed, match="out of time"):
        train_model(**settings, max_minutes=1e-9)
    assert not (tmp_path / "steps").exists()
    train_model(**settings)
    assert (tmp_path / "steps").read_text() == "12"


def test_a_state_that_could_not_be_read_again_is_not_saved(dataset, tmp_path, mine):
    called = [{"class_path": f"{mine}.Stored", "init_args": {"bad": 5}}]
    run = tmp_path / "run"
    with pytest.raises(Failed, match="Stored must consist of .*; no training state with it was saved") as failed:
        train_model(**SMALL, dataset_path=dataset, run_dir=run, callbacks=called, save_every=1)
    assert failed.value.status == 1
    assert find_damage(run / "checkpoints/last.ckpt") is None
    assert not list((run / "checkpoints").glob("step=6.ckpt"))
