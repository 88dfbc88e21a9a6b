"""Run directories: what is in them, how they are continued, and what everyday settings do."""

import csv
import dataclasses
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers.repository import REPOSITORY, TINY, locking_process, run_python
from helpers.training import FINE, SMALL, equal, train, weights

import cxt
from cxt import load_model
from cxt.checkpoints.file import read_checkpoint, write_checkpoint
from cxt.checkpoints.run_directory import RunDirectory
from cxt.checkpoints.training_log import COLUMNS, TIMING, keep_rows, read_log
from cxt.commands import checkpoint as checkpoint_stage
from cxt.commands import find_lr as find_lr_stage
from cxt.commands import runs as runs_stage
from cxt.config.file import load
from cxt.config.models import build_training_settings
from cxt.config.training import PRECISIONS, RESULT_NEUTRAL_SETTINGS, TrainingConfig, list_result_neutral_settings
from cxt.data.examples import compute_model_input
from cxt.data.loaders import EpochBatchSampler
from cxt.data.pair_dataset import PairDataset
from cxt.errors import BadRequest, Failed
from cxt.io import acquire_lock
from cxt.random_seeds import torch_seed
from cxt.trainer import learning_rate_search
from cxt.trainer.fit import build_data, build_starting_model, build_trainer, set_up_torch
from cxt.trainer.log import TrainingLog
from cxt.trainer.optimizers import parameter_groups
from cxt.trainer.options import OPTIONS, TRAINING_SETTINGS, build_parser, read_options
from cxt.trainer.request import RunRequest, build_request
from cxt.trainer.schedules import AdaptiveRate, learning_rate_factor
from cxt.trainer.training_state import list_training_states
from cxt.trainer.validation import Validation
from cxt.workflow.lineages import run_directory


def call(stage, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["it", *map(str, arguments)])
    stage.main()


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """A finished run, with its checkpoint published beside it."""
    directory = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        train(
            patch, *SMALL, *FINE, "--dataset-path", dataset, "--run-dir", directory / "run", "--out", directory / "broad.ckpt",
            "--save-every", 3, "--log-every", 2, "--validate-every", 4, "--decode-items", 3, "--epochs", 3,
        )  # fmt: skip
    return directory


# What is in a run directory


@pytest.mark.slow
def test_everything_a_run_leaves(finished):
    run = RunDirectory(finished / "run")
    run_files = {path.name for path in run.path.iterdir() if not path.name.startswith("events.")}
    assert run_files >= {
        "run.json",
        "config.yaml",
        "grid.json",
        "model_summary.json",
        "training_log.csv",
        "losses.png",
        "tracks.png",
    }
    page = (REPOSITORY / "docs" / "howto" / "add-a-checkpoint.md").read_text(encoding="utf-8")
    described = page.partition("## What a run leaves")[2]
    assert [name for name in run_files if f"`{name}" not in described] == []
    assert json.loads((run.path / "grid.json").read_text()) == {"low": 3.0, "high": 17.0, "bins": 324}
    names = sorted(path.name for path in run.checkpoints.iterdir())
    assert names == ["best.ckpt", "broad_epoch=2-step=21.ckpt", "last.ckpt", "step=20.ckpt", "step=21.ckpt"]
    with open(run.log) as file:
        assert tuple(next(csv.reader(file))) == COLUMNS
    rows = read_log(run.log)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 21]
    validated = {row["step"]: row for row in rows if row["val_loss"] is not None}
    assert list(validated) == [4, 8, 12, 16, 20, 21]
    assert all(row["val_mse"] > 0 and -1 <= row["val_r"] <= 1 for row in validated.values())
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert all(row["grad_norm"] > 0 and row["items_per_s"] > 0 and 0 <= row["data_wait"] <= 1 for row in rows)
    assert rows[0]["lr"] == pytest.approx(1e-3 * 1 / 2)  # the second of two steps of warm-up
    best = min(validated.values(), key=lambda row: row["val_loss"])
    assert read_checkpoint(run.best).record["step"] == best["step"]
    assert read_checkpoint(run.best).record["val_loss"] == best["val_loss"]


def test_model_summary_by_hand(finished):
    summary = json.loads((finished / "run" / "model_summary.json").read_text())
    state = weights(finished / "broad.ckpt")
    count = sum(value.numel() for value in state.values())
    assert (summary["parameters"], summary["trainable_parameters"], summary["effective_batch"]) == (count, count, 16)
    assert summary["memory_mb"].pop("activations") > 0  # compared with a measurement in test_edges.py
    assert summary["memory_mb"] == {"weights": 4 * count / 1e6, "gradients": 4 * count / 1e6, "optimizer": 8 * count / 1e6}
    assert summary["planned_steps"] == 21
    assert summary["flops"] == summary["flops_per_item"] * 16 * 21


@pytest.mark.slow
def test_config_runs_it_again(finished, tmp_path, monkeypatch):
    config = finished / "run" / "config.yaml"
    train(monkeypatch, "--config", config, "--run-dir", tmp_path / "again", "--out", tmp_path / "again.ckpt")
    assert (tmp_path / "again.ckpt").read_bytes() == (finished / "broad.ckpt").read_bytes()


@pytest.mark.slow
def test_from_python(finished, dataset, tmp_path):
    config = finished / "run" / "config.yaml"
    run = cxt.train_model(config, run_dir=tmp_path / "run", out=tmp_path / "x.ckpt")
    assert run == tmp_path / "run"
    assert (tmp_path / "x.ckpt").read_bytes() == (finished / "broad.ckpt").read_bytes()
    with pytest.raises(BadRequest, match="unknown option epoch; did you mean 'epochs'"):
        cxt.train_model(config, epoch=3)
    with pytest.raises(BadRequest, match="epochs"):
        cxt.train_model(config, epochs="many")
    with pytest.raises(BadRequest, match="epochs must be a positive integer, got 0"):
        cxt.train_model(config, epochs=0, run_dir=tmp_path / "none")


def test_load_model_of_a_run(finished, tmp_path, capsys):
    last, best = load_model(finished / "run").state_dict(), load_model(finished / "run", best=True).state_dict()
    assert equal(last, weights(finished / "broad.ckpt"))
    assert equal(best, weights(finished / "run/checkpoints/best.ckpt"))
    copy = shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    (copy / "checkpoints/best.ckpt").unlink()
    assert equal(load_model(copy, best=True).state_dict(), last)
    assert "has no best weights yet" in capsys.readouterr().err


# Continuing


def interrupted(dataset, run, *more) -> list:
    """Arguments of a run that was stopped by SIGUSR1 after some states were saved."""
    arguments = [
        *SMALL, *FINE, "--dataset-path", dataset, "--run-dir", run, "--epochs", 300, "--save-every", 5, "--decode-items", 0,
        *more,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    process = subprocess.Popen(
        [sys.executable, "-m", "cxt.train", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while len(list_training_states(RunDirectory(run))) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate()[0]
    assert process.returncode == 143
    assert "stopped by SIGUSR1" in output
    return arguments


@pytest.mark.slow
@pytest.mark.long
def test_damaged_saves(dataset, tmp_path):
    run = RunDirectory(tmp_path / "run")
    arguments = interrupted(dataset, run.path, "--keep-saves", 4)
    saves = list_training_states(run)
    assert len(saves) == 4  # exactly as many as asked for
    assert run.last.resolve() == saves[0].resolve()
    saves[0].write_bytes(saves[0].read_bytes()[:1000])
    (run.checkpoints / "step=99999.ckpt.tmp").write_bytes(b"half")
    stop = ["--max-minutes", 0.0001]
    done = run_python("-m", "cxt.train", *arguments, *stop, check=False)
    assert done.returncode == 75
    assert f"the training state {saves[0]} cannot be read" in done.stdout
    assert f"continuing from {saves[1]}" in done.stdout
    assert "out of time (--max-minutes, or the end of the Slurm allocation) at step" in done.stderr
    assert not list(run.checkpoints.glob("*.tmp"))
    for path in list_training_states(run):
        path.write_bytes(b"")
    done = run_python("-m", "cxt.train", *arguments, check=False)
    assert done.returncode == 2
    assert "no earlier training state is left" in done.stderr


@pytest.mark.slow
@pytest.mark.long
def test_resume_by_path(dataset, tmp_path, monkeypatch):
    run = RunDirectory(tmp_path / "lightning_logs/version_0")
    arguments = interrupted(dataset, run.path, "--keep-saves", 3, "--max-minutes", 60)
    bare = [word for word in arguments if word not in ("--run-dir", run.path)]
    earlier = list_training_states(run)[1]
    stop = ["--max-minutes", 0.0001]
    done = run_python("-m", "cxt.train", *bare, *stop, "--resume", earlier, check=False)
    assert done.returncode == 75
    assert f"continuing from {earlier}" in done.stdout
    steps = [row["step"] for row in read_log(run.log)]
    assert steps == sorted(set(steps))
    done = run_python("-m", "cxt.train", *bare, *stop, "--resume", run.path, check=False)
    assert done.returncode == 75
    assert "continuing from" in done.stdout
    done = run_python("-m", "cxt.train", *bare, *stop, "--log-dir", tmp_path, "--resume", check=False)
    assert done.returncode == 75
    for path, message in (
        (tmp_path / "nowhere", "there is no such run or training state"),
        (run.log, "must be a run directory, or a training state in its checkpoints"),
    ):
        with pytest.raises(BadRequest, match=message):
            train(monkeypatch, *bare, "--resume", path)
    with pytest.raises(BadRequest, match=r"was started with lr 0.001 instead of 0.002"):
        train(monkeypatch, *bare, "--resume", run.path, "--lr", 2e-3)


def cut_at(run: RunDirectory, step: int) -> None:
    """Make a finished run look as if it had been killed right after it saved a step."""
    for path in list_training_states(run):
        if int(path.stem.split("=")[1]) > step:
            path.unlink()
    state = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps(state | {"finished": None}))
    for path in run.checkpoints.glob("broad_*"):
        path.unlink()


@pytest.mark.long
@pytest.mark.parametrize(("batch", "accumulation", "validate_every"), [(6, 1, 0), (4, 3, 0), (8, 2, 5)])
def test_resumed_at_every_save(dataset, tmp_path, batch, accumulation, validate_every):
    """One after another, so that each resumed run is itself resumed, at the ends of epochs and elsewhere."""
    settings = {
        "model": "broad", "layers": 1, "heads": 2, "width": 16, "dropout": 0.1, "threads": 1, "devices": 0, "lr": 1e-3,
        "min_lr": 1e-4, "decay_steps": 0, "warmup_steps": 3, "dataset_path": dataset, "batch_size": batch, "epochs": 3,
        "grad_accum": accumulation, "validate_every": validate_every, "decode_items": 1, "log_every": 1, "keep_saves": 1000,
        "save_every": 4, "save_minutes": 0,
    }  # fmt: skip
    whole, cut = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "cut")
    cxt.train_model(**settings, run_dir=whole.path)
    shutil.copytree(whole.path, cut.path, symlinks=True)
    steps = sorted(int(path.stem.split("=")[1]) for path in list_training_states(whole))
    for step in steps[:-1]:
        cut_at(cut, step)
        cxt.train_model(**settings, run_dir=cut.path)
        one, other = (torch.load(run.last, weights_only=True) for run in (whole, cut))
        assert equal(one["state_dict"], other["state_dict"]), step
        assert one["loops"] == other["loops"], step
        logs = [[{key: row[key] for key in row if key not in TIMING} for row in read_log(run.log)] for run in (whole, cut)]
        assert logs[0] == logs[1], step


@pytest.mark.slow
def test_a_save_under_another_name(dataset, tmp_path, monkeypatch):
    """Nothing is removed for a state that is none of the run's."""
    run = RunDirectory(tmp_path / "run")
    arguments = interrupted(dataset, run.path)
    before = list_training_states(run)
    shutil.copy(before[0], run.checkpoints / "keep.ckpt")
    with pytest.raises(BadRequest, match=r"keep.ckpt is not one of the training states of .*; choose from step="):
        train(monkeypatch, *arguments, "--resume", run.checkpoints / "keep.ckpt")
    assert list_training_states(run) == before


def test_no_earlier_save_of_a_finished_run(finished, dataset, monkeypatch):
    save = finished / "run/checkpoints/step=20.ckpt"
    with pytest.raises(BadRequest, match="is finished; omit the training state"):
        train(monkeypatch, "--config", finished / "run/config.yaml", "--resume", save)


@pytest.mark.slow
def test_other_devices(dataset, tmp_path, monkeypatch):
    arguments = interrupted(dataset, tmp_path / "run")
    two = ["--accelerator", "cpu", "--devices", 2]
    with pytest.raises(BadRequest, match=r"was started on 1 cpu and cannot continue on 2 cpu.* --restart.*rm -r"):
        train(monkeypatch, *arguments, *two)


def test_stale_and_held_locks(tmp_path, capsys):
    path = tmp_path / "run.lock"
    path.write_text("process 4000000 on elsewhere")
    held = acquire_lock(path, "the run")
    assert "note: taking over the run: process 4000000 on elsewhere ended without releasing it" in capsys.readouterr().err
    code = f"from cxt.io import acquire_lock; acquire_lock({str(path)!r}, 'the run')"
    done = run_python("-c", code, check=False)
    assert f"the run is in use by process {os.getpid()}" in done.stderr
    assert f"kill {os.getpid()}" in done.stderr
    held.close()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/proc"), reason="mounts a small file system")
@pytest.mark.long
def test_disk_full_while_saving(dataset, tmp_path):
    """Exit 1, the earlier state intact; with room, it goes on."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", small], check=False).returncode:
        pytest.skip("may not mount a file system")
    try:
        arguments = [
            *SMALL, *FINE, "--dataset-path", dataset, "--run-dir", small / "run", "--out", tmp_path / "x.ckpt", "--epochs", 8,
            "--save-every", 5, "--keep-saves", 100, "--validation-items", 4, "--decode-items", 0,
        ]  # fmt: skip
        done = run_python("-m", "cxt.train", *arguments, check=False)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "could not be saved" in done.stderr
        assert "Free disk space and run the same command again" in done.stderr
        assert not (tmp_path / "x.ckpt").exists()
        run = RunDirectory(small / "run")
        for path in list_training_states(run):
            torch.load(path, weights_only=True)
        assert not list(run.checkpoints.glob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=60m", small], check=True)
        done = run_python("-m", "cxt.train", *arguments)
        assert "continuing from" in done.stdout
    finally:
        subprocess.run(["umount", small], check=True)
    whole = [word if word != small / "run" else tmp_path / "run" for word in arguments]
    whole[whole.index(tmp_path / "x.ckpt")] = tmp_path / "y.ckpt"
    run_python("-m", "cxt.train", *whole)
    assert equal(weights(tmp_path / "x.ckpt"), weights(tmp_path / "y.ckpt"))


# Guards


def test_out_of_memory(dataset, tmp_path, monkeypatch):
    def loss(self, x, y, rates, *, regions, path, criterion):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("cxt.model.transformer.CoalescenceModel.loss", loss)
    with pytest.raises(Failed, match=r"out of memory on 1 cpu .*batch_size: 4, grad_accum: 4"):
        train(monkeypatch, *SMALL, "--dataset-path", dataset, "--run-dir", tmp_path / "run")


def test_clipping(dataset, tmp_path, monkeypatch):
    for clip in (0, 1e-9):
        arguments = ["--dataset-path", dataset, "--epochs", 1, "--weight-decay", 0, "--warmup-steps", 0, "--log-every", 1]
        train(monkeypatch, *SMALL, *arguments, "--grad-clip", clip, "--run-dir", tmp_path / str(clip), "--max-steps", 1)
    before = starting(dataset)
    free, clipped = (weights(next((tmp_path / str(clip) / "checkpoints").glob("broad_*"))) for clip in (0, 1e-9))
    moved = {
        name: max(float((state[k] - before[k]).abs().max()) for k in before) for name, state in (("f", free), ("c", clipped))
    }
    assert moved["c"] < moved["f"] / 5
    (row,) = read_log(tmp_path / "1e-09" / "training_log.csv")
    assert row["grad_norm"] > 1e-3  # before clipping


def request_for(*arguments) -> RunRequest:
    """What the command line of a run asks for."""
    return build_request(read_options([*map(str, arguments)]))


def starting(dataset):
    request = request_for(*SMALL, "--dataset-path", dataset)
    return build_starting_model(request).state_dict()


# Validation


class Recorder:
    """What `Validation` and the log see of a trainer."""

    def __init__(self, loss, step):
        self.callback_metrics, self.global_step, self.is_global_zero, self.should_stop = {"val_loss": loss}, step, True, False


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "stops_at", "best"),
    [
        ([5, 4, 3, 2], 2, 0.0, None, 4),
        ([5, 4, 4.5, 4.2, 3], 2, 0.0, 4, 2),
        ([5, 4.95, 4.9, 4.85], 2, 0.1, 3, 3),  # the best is the lowest, whatever min_delta says
        ([5, 4.95, 4.89, 4.85, 4.84], 2, 0.1, 5, 5),
        ([5, float("nan"), 6], 2, 0.0, 3, 1),
        ([5, 6, 7, 8], 0, 0.0, None, 1),
    ],
)
def test_early_stopping_and_best(tmp_path, finished, losses, patience, min_delta, stops_at, best):
    run = RunDirectory(tmp_path)
    run.checkpoints.mkdir()
    about = read_checkpoint(finished / "broad.ckpt").record
    module = SimpleNamespace(model=load_model(finished / "broad.ckpt"), device=torch.device("cpu"))
    rows = []
    log = SimpleNamespace(terms=(), validated=lambda trainer, values: rows.append(values))
    trackers = SimpleNamespace(validated=lambda *_: None)
    settings = {
        "record": about, "examples": None, "trackers": trackers, "seed": 1, "steps_per_epoch": 10, "patience": patience,
        "min_delta": min_delta,
    }  # fmt: skip
    validation = Validation(run, "x", log, **settings)
    stopped = None
    for step, loss in enumerate(losses, 1):
        trainer = Recorder(loss, step)
        state = validation.state_dict()
        validation = Validation(run, "x", log, **settings)
        validation.load_state_dict(state)  # as if it had been interrupted before each
        validation.on_validation_end(trainer, module)
        if trainer.should_stop:
            stopped = step
            break
    assert stopped == stops_at
    assert read_checkpoint(run.best).record["step"] == best


def test_stopping_early_publishes(dataset, tmp_path, monkeypatch, capsys):
    arguments = ["--dataset-path", dataset, "--patience", 1, "--min-delta", 100, "--validate-every", 3, "--decode-items", 0]
    train(monkeypatch, *SMALL, *arguments, "--run-dir", tmp_path / "run", "--out", tmp_path / "x.ckpt")
    # The first validation is better than nothing; the second is not better by 100.
    assert "stops early at step 6" in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "x.ckpt").record["step"] == 6


def test_export_best(dataset, tmp_path, monkeypatch):
    arguments = [*SMALL, "--lr", 0.3, "--warmup-steps", 0, "--dataset-path", dataset, "--validate-every", 1, "--max-steps", 9]
    train(monkeypatch, *arguments, "--export", "best", "--run-dir", tmp_path / "run", "--out", tmp_path / "x.ckpt")
    rows = read_log(tmp_path / "run/training_log.csv")
    best = min((row for row in rows if row["val_loss"] is not None), key=lambda row: row["val_loss"])
    assert best["step"] < 9
    assert read_checkpoint(tmp_path / "x.ckpt").record["step"] == best["step"]
    other = read_checkpoint(tmp_path / "x.ckpt")
    write_checkpoint(tmp_path / "run/checkpoints/best.ckpt", other.state_dict, other.record | {"note": "by hand"})
    again = [*arguments, "--export", "best", "--run-dir", tmp_path / "run"]
    with pytest.raises(Failed, match="is missing or was changed, and cannot be published"):
        train(monkeypatch, *again)


# Settings


def test_schedules():
    values = {}
    for schedule in ("cosine", "linear", "constant", "wsd", "log_linear", "rex", "cosine_restarts"):
        training = TrainingConfig(
            lr=1.0, min_lr=0.1, warmup_steps=10, decay_steps=110, schedule=schedule, cycles=2, cycle_decay=0.3
        )
        values[schedule] = [learning_rate_factor(step, training, total_steps=500) for step in (0, 5, 10, 50, 60, 110, 400)]
    assert values["cosine"] == pytest.approx([0, 0.5, 1, 0.1 + 0.9 * 0.6545085, 0.55, 0.1, 0.1])
    assert values["linear"] == pytest.approx([0, 0.5, 1, 0.64, 0.55, 0.1, 0.1])
    assert values["constant"] == pytest.approx([0, 0.5, 1, 1, 1, 1, 1])
    assert values["wsd"] == pytest.approx([0, 0.5, 1, 1, 0.1 + 0.9 * 0.9330127, 0.1, 0.1])
    assert values["log_linear"] == pytest.approx([0, 0.5, 1, 0.1**0.4, 0.1**0.5, 0.1, 0.1])
    assert values["rex"] == pytest.approx([0, 0.5, 1, 0.1 + 0.9 * 0.6 / 0.8, 0.1 + 0.9 * 0.5 / 0.75, 0.1, 0.1])
    # After 40 of 100 steps, 0.8 of the first of two cosines; after 50, the top of the second.
    expected = [0, 0.5, 1, 0.1 + 0.9 * 0.0954915, 0.1 + 0.9 * 0.3, 0.1, 0.1]
    assert values["cosine_restarts"] == pytest.approx(expected)
    with pytest.raises(BadRequest, match="log_linear cannot end at min_lr 0"):
        TrainingConfig(schedule="log_linear", min_lr=0.0)


def test_adaptive_schedule():
    """Up after two better validations, down after two that are not, within its bounds, and with a pause after each."""
    settings = {"up": 2.0, "down": 0.5, "patience_up": 2, "patience_down": 2, "threshold": 0.01, "cooldown": 1, "highest": 2.5}
    training = TrainingConfig(schedule="adaptive", adaptive=settings, lr=1.0, min_lr=0.3)
    rate, factors = AdaptiveRate(training), []
    losses = [5, 4, 3.9, 3, 2, 2, 2, 2, 1.999, 1.998, 1.999, 1.997, 1.997, 1]
    for loss in losses:
        again = AdaptiveRate(training)  # as if it had been interrupted before each
        again.load_state_dict(rate.state_dict())
        rate = again
        rate.update(loss)
        factors.append(rate.factor)
    # 5, 4: up; 3.9: pause; 3, 2: up, to the bound; 2: pause; 2, 2: down; 1.999: pause; 1.998, 1.999: down; …
    assert factors == [1, 2, 2, 2, 2.5, 2.5, 2.5, 1.25, 1.25, 1.25, 0.625, 0.625, 0.625, 0.625]
    assert learning_rate_factor(50, training, total_steps=100) == 1.0
    low = AdaptiveRate(
        TrainingConfig(schedule="adaptive", adaptive=settings | {"cooldown": 0, "patience_down": 1}, lr=1.0, min_lr=0.3)
    )
    for loss in (1, 1, 1, 1, 1):
        low.update(loss)
    assert low.factor == 0.3
    neutral = list_result_neutral_settings(TrainingConfig().model_dump())
    assert {"validate_every", "validation_items"} <= set(neutral)
    assert not {"validate_every", "validation_items"} & set(list_result_neutral_settings(training.model_dump()))


def test_precision_names():
    for name, others in PRECISIONS.items():
        for word in (name, *others):
            assert TrainingConfig(precision=word).precision == name
    assert TrainingConfig(precision=False).precision == "32-true"  # how YAML reads `no`
    assert TrainingConfig(precision=16).precision == "16-mixed"
    with pytest.raises(BadRequest, match="unknown precision 'banana'; choose from 16-mixed, 32-true, bf16-mixed, bf16-true"):
        TrainingConfig(precision="banana")


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(BadRequest) as error:
        TrainingConfig(epochs=0, patience=-1, schedule="cosin", min_delta=-0.5)
    for text in (
        "epochs must be a positive integer, got 0",
        "patience must be",
        "unknown schedule 'cosin'; did you mean 'cosine'",
        "min_delta must be",
    ):
        assert text in str(error.value)


def test_print_config(monkeypatch, capsys):
    for model, masks in (("w200_wmissing", False), ("broad", True)):
        train(monkeypatch, "--model", model, "--print-config")
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["mask_singletons"] is masks
        published = {
            "lr": 3e-4, "min_lr": 3e-5, "warmup_steps": 10, "decay_steps": 150_000, "batch_size": 128, "grad_accum": 6,
            "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "precision": "bf16-mixed", "grad_clip": 0.0, "schedule": "cosine",
        }  # fmt: skip
        assert {key: printed[key] for key in published} == published


OPTIONAL = {
    "schedule": "cosine", "patience": 0, "min_delta": 0.0, "export": "last", "grad_clip": 0.0, "validate_every": 0,
    "validation_items": 0, "decode_items": 0, "keep_saves": 2, "save_minutes": 10.0, "log_every": 10, "storage": "auto",
    "workers": 0, "save_every": 200, "compile": "auto", "attention": "split", "loss_path": "target",
    "gradient_checkpointing": False, "objective": "autoregressive", "weight_noise": 0.0, "quantized_bits": 0, "ema_decay": 0.0,
    "rates_dropout": 0.5, "joint_weight": 0.5,
}  # fmt: skip
RECIPES = {  # spec: layers, epochs, learning rate
    "narrow": (6, 6, 3e-4), "broad": (10, 2, 3e-4), "broad_w200": (10, 2, 3e-5), "broad_adapter": (10, 3, 3e-4),
    "w200_wmissing": (10, 2, 3e-5), "w200_wmissing_adapter": (10, 10, 3e-5),
}  # fmt: skip


@pytest.mark.slow
def test_optional_features_leave_the_recipes_alone(dataset, tmp_path, monkeypatch):
    """The six recipes as they are published, and the first ten losses of a run those of a plain loop in torch."""
    config = load([REPOSITORY / "config" / "paper.yaml"])
    for model, (layers, epochs, lr) in RECIPES.items():
        settings = build_training_settings(config, model)
        assert (settings["layers"], settings["epochs"], settings["lr"], settings["min_lr"]) == (layers, epochs, lr, 3e-5)
        decides = OPTIONAL.keys() - set(RESULT_NEUTRAL_SETTINGS)
        assert {key: settings[key] for key in decides} == {key: OPTIONAL[key] for key in decides}
    arguments = [*SMALL, "--dropout", 0.1, "--epochs", 3, "--dataset-path", dataset, "--max-steps", 10]
    explicit = [word for key, value in OPTIONAL.items() for word in ("--" + key.replace("_", "-"), value)]
    runs = {"off": explicit, "default": [], "on": ["--validate-every", 3, "--decode-items", 2, "--patience", 50]}
    losses = {}
    for name, more in runs.items():
        train(monkeypatch, *arguments, *more, "--log-every", 1, "--run-dir", tmp_path / name)
        losses[name] = [row["train_loss"] for row in read_log(tmp_path / name / "training_log.csv")]
    plain = plain_losses(dataset, arguments)
    assert losses["off"] == losses["default"] == losses["on"] == plain


def plain_losses(dataset, arguments) -> list[float]:
    """Ten optimizer steps without Lightning and without any of our callbacks."""
    request = request_for(*arguments)
    training = request.training
    model, items = build_starting_model(request).train(), PairDataset(dataset, "train")
    optimizer = torch.optim.AdamW(parameter_groups(model, training), betas=(training.beta1, training.beta2))
    rates = [group["lr"] for group in optimizer.param_groups]
    sampler = EpochBatchSampler(examples=len(items), batch_size=training.batch_size, seed=training.seed)
    losses, number = [], 0
    for epoch in range(training.epochs):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        for first in range(0, len(batches), training.grad_accum):
            window, total = batches[first : first + training.grad_accum], torch.zeros(())
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate_factor(len(losses), training, total_steps=request.total_steps)
            for chosen in window:
                torch.manual_seed(torch_seed(training.seed, "dropout", 0, number=number))
                number += 1
                counts, missing, tokens, *_ = items.batch(chosen)
                loss = model.loss(compute_model_input(counts, missing), tokens) / training.grad_accum
                loss.backward()
                total = total + loss.detach()
            losses.append(float(total * (training.grad_accum / len(window))))
            optimizer.step()
            optimizer.zero_grad()
            if len(losses) == 10:
                return losses
    raise AssertionError("fewer than ten steps")


STEP = {
    "aot_eager": ["--compile", "aot_eager"],
    "inductor": ["--compile", "inductor"],
    "full": ["--loss-path", "full"],
    "chunked": ["--loss-path", "chunked", "--gradient-checkpointing"],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", STEP)
@pytest.mark.long
def test_ways_to_compute_a_step(dataset, tmp_path, monkeypatch, way):
    """The same losses but for rounding, a checkpoint under the same names, and exact to continue."""
    if way == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor compiles with g++")
    arguments = [
        *SMALL, "--dataset-path", dataset, "--epochs", 2, "--log-every", 1, "--decode-items", 0, "--save-every", 4,
        "--keep-saves", 9, "--dropout", 0,
    ]  # fmt: skip
    train(monkeypatch, *arguments, "--run-dir", tmp_path / "default")
    train(monkeypatch, *arguments, *STEP[way], "--run-dir", tmp_path / "other")
    default, other = RunDirectory(tmp_path / "default"), RunDirectory(tmp_path / "other")
    for key in ("train_loss", "val_loss", "grad_norm"):
        expected = [row[key] for row in read_log(default.log)]
        actual = [row[key] for row in read_log(other.log)]
        assert len(actual) > 8
        assert all(a is b is None or a == pytest.approx(b, rel=1e-4) for a, b in zip(actual, expected, strict=True)), key
    one, two = (read_checkpoint(run.finished_checkpoint()) for run in (default, other))
    assert one.state_dict.keys() == two.state_dict.keys()
    summary = json.loads((tmp_path / "other" / "model_summary.json").read_text())
    assert summary["compile"] == (way if way in ("aot_eager", "inductor") else "none")
    assert summary["gradient_checkpointing"] == (way == "chunked")
    finished_bytes = other.finished_checkpoint().read_bytes()
    cut_at(other, 8)
    train(monkeypatch, *arguments, *STEP[way], "--run-dir", tmp_path / "other")
    assert other.finished_checkpoint().read_bytes() == finished_bytes


@pytest.mark.parametrize(
    ("accelerator", "wanted", "expected"), [("gpu", True, True), ("gpu", False, False), ("cpu", True, False)]
)
def test_deterministic_on_gpus(dataset, tmp_path, monkeypatch, accelerator, wanted, expected):
    """What is asked of torch and Lightning; whether a GPU then repeats itself, only one can show."""
    import torch._inductor.config as inductor

    request = request_for(*SMALL, "--dataset-path", dataset, "--deterministic", wanted)
    request = dataclasses.replace(request, accelerator=accelerator)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr("cxt.trainer.fit.pl.Trainer", dict)
    precision, before = torch.get_float32_matmul_precision(), inductor.deterministic
    inductor.deterministic = False
    try:
        set_up_torch(request)
        assert inductor.deterministic == expected
    finally:
        torch.set_float32_matmul_precision(precision)
        inductor.deterministic = before
    assert torch.utils.deterministic.fill_uninitialized_memory != expected
    assert build_trainer(request, RunDirectory(tmp_path), [])["deterministic"] == ("warn" if expected else False)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="breaks g++")
def test_no_compiler(dataset, tmp_path):
    """What torch.compile raises becomes a message that says how to go on."""
    arguments = [*SMALL, "--dataset-path", dataset, "--epochs", 1, "--compile", "inductor", "--run-dir", tmp_path / "run"]
    broken = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run_python("-m", "cxt.train", *arguments, env=broken, check=False)
    assert done.returncode == 1, done.stderr
    assert "could not be compiled" in done.stderr
    assert "`compile: none` trains without" in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))


def test_what_changes_no_result():
    assert "validate_every" in list_result_neutral_settings({"patience": 0, "export": "last"})
    assert "validate_every" not in list_result_neutral_settings({"patience": 2, "export": "last"})
    assert "validation_items" not in list_result_neutral_settings({"patience": 0, "export": "best"})


def test_bfloat16_network(dataset):
    """Everything in bfloat16, as on a GPU with precision bf16-true."""
    request = request_for(*SMALL, "--dataset-path", dataset)
    model = build_starting_model(request).to(torch.bfloat16)
    counts, missing, tokens, *_ = build_data(request).train_set.batch(range(4))
    loss = model.loss(compute_model_input(counts, missing), tokens)
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
    assert loss.dtype == model.backbone.rotary.dtype == torch.float32  # too coarse in 16 bits
    assert torch.isfinite(loss)
    tokens, probabilities = model.generate(compute_model_input(counts, missing), window_size=1000, replicates=2)
    assert torch.isfinite(probabilities).all()


# The log


def test_rows_are_dropped_and_cut_lines_too(tmp_path):
    path = tmp_path / "training_log.csv"
    header = ",".join(COLUMNS)
    rows = [f"{step},0,5.5,,,,0.001,1.0,10,0.1,1" for step in (2, 4, 6)]
    path.write_text("\n".join([header, *rows]) + "\n8,0,5.")
    assert [row["step"] for row in read_log(path)] == [2, 4, 6]
    keep_rows(path, up_to=4)
    assert path.read_text() == "\n".join([header, *rows[:2]]) + "\n"
    keep_rows(path, up_to=0)
    assert path.read_text() == header + "\n"
    path.write_text("ste")
    keep_rows(path, up_to=0)
    assert path.read_text() == header + "\n"
    keep_rows(tmp_path / "none.csv", up_to=3)
    assert not (tmp_path / "none.csv").exists()


def test_a_loss_of_16_bits_that_is_not_finite(tmp_path):
    """With a gradient scaler single gradients may overflow; a loss may not."""
    log = TrainingLog(
        tmp_path / "l.csv", "x", total_steps=9, steps_per_epoch=3, examples_per_batch=4, every=1, validates=lambda step: False,
        checks_gradient=False,
    )  # fmt: skip
    log._first_bad = torch.tensor(-1)
    sampler = EpochBatchSampler(examples=30, batch_size=4, seed=1)
    described = SimpleNamespace(scenario="constant", index=7, pair=(1, 2))
    trainer = SimpleNamespace(
        world_size=1, is_global_zero=True, accumulate_grad_batches=2, train_dataloader=SimpleNamespace(sampler=sampler),
        datamodule=SimpleNamespace(train_set=SimpleNamespace(describe=lambda item: described)),
    )  # fmt: skip
    module = SimpleNamespace(device=torch.device("cpu"))
    log._look_at(torch.tensor(3.0), trainer, module, step=4)
    with pytest.raises(Failed, match=r"not finite at step 5. Epoch 1, batches 2 to 3: constant 7 pair 1-2; .*8 in total"):
        log._look_at(torch.tensor(float("nan")), trainer, module, step=5)


# Commands


def test_show_verify_diff(finished, tmp_path, monkeypatch, capsys):
    path = finished / "broad.ckpt"
    call(checkpoint_stage, monkeypatch, "show", path)
    output = capsys.readouterr().out
    assert "broad (preset broad), step 21, epoch 2" in output
    assert "324 bins" in output
    assert "parent    none" in output
    call(checkpoint_stage, monkeypatch, "show", finished / "run/checkpoints/last.ckpt")
    assert "step 21" in capsys.readouterr().out
    call(checkpoint_stage, monkeypatch, "diff", path, finished / "run")
    assert "weights are equal" in capsys.readouterr().out
    content = read_checkpoint(path)
    other = dict(content.state_dict)
    other["backbone.head.weight"] = other["backbone.head.weight"].clone()
    other["backbone.head.weight"][3, 4] += 0.25
    write_checkpoint(tmp_path / "other.ckpt", other, content.record | {"step": 22})
    with pytest.raises(Failed):
        call(checkpoint_stage, monkeypatch, "diff", path, tmp_path / "other.ckpt")
    output = capsys.readouterr().out
    assert "step: 21 and 22" in output
    assert "1 tensor differs, most of all backbone.head.weight: by 0.25" in output
    call(checkpoint_stage, monkeypatch, "diff", path, tmp_path / "other.ckpt", "--atol", 1)
    assert "weights are close" in capsys.readouterr().out
    with pytest.raises(
        Failed,
        match="the weights are intact, but it does not match the configuration: its lineage is None.*` makes it again",
    ):
        call(checkpoint_stage, monkeypatch, "verify", path)
    other["backbone.head.weight"][0, 0] = float("nan")
    write_checkpoint(tmp_path / "nan.ckpt", other, content.record)
    with pytest.raises(Failed, match="nan.ckpt has weights that are not finite: backbone.head.weight"):
        call(checkpoint_stage, monkeypatch, "verify", tmp_path / "nan.ckpt")


def test_verify_in_a_workflow(workflow, tmp_path, monkeypatch, capsys):
    for model in ("narrow", "w200_wmissing_adapter"):
        call(checkpoint_stage, monkeypatch, "verify", workflow / f"results/{model}.ckpt", "--configfile", TINY)
    assert "its parent is" in capsys.readouterr().out
    results = tmp_path / "results"
    results.mkdir()
    shutil.copy(workflow / "results/broad_w200.ckpt", results)
    parent = read_checkpoint(workflow / "results/broad.ckpt")
    write_checkpoint(results / "broad.ckpt", parent.state_dict, parent.record | {"note": "by hand"})
    with pytest.raises(Failed, match="is not the parent that it was trained from"):
        call(checkpoint_stage, monkeypatch, "verify", results / "broad_w200.ckpt", "--configfile", TINY)


def test_runs_and_prune(workflow, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "runs"
    shutil.copytree(workflow / "results/runs", directory, symlinks=True)
    config = load([TINY])
    old = shutil.copytree(directory / run_directory(config, "narrow").rsplit("/", 1)[1], directory / "narrow-0123456789ab")
    (directory / "mine").mkdir()  # no run, whatever it is
    busy = shutil.copytree(old, directory / "narrow-ba9876543210")
    call(runs_stage, monkeypatch, "--directory", directory, "--configfile", TINY)
    output = capsys.readouterr().out
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(f"cluster: {{runs: {directory}}}\n")
    call(runs_stage, monkeypatch, "--configfile", TINY, elsewhere)
    assert capsys.readouterr().out == output
    assert output.count("current: ") == 6
    assert output.count("not of this configuration") == 2
    held = locking_process(busy)
    with pytest.raises(BadRequest, match="there is no terminal; add --yes"):
        call(runs_stage, monkeypatch, "--directory", directory, "--configfile", TINY, "--prune")
    call(runs_stage, monkeypatch, "--directory", directory, "--configfile", TINY, "--prune", "--yes")
    held.communicate("\n")
    assert "1 run removed" in capsys.readouterr().out
    assert not old.exists()
    assert busy.exists()
    assert len([path for path in directory.iterdir() if path.is_dir()]) == 8


@pytest.mark.slow
def test_find_lr(dataset, tmp_path, monkeypatch, capsys):
    arguments = [*SMALL, "--dataset-path", dataset, "--num-steps", 60, "--highest", 0.5]
    call(find_lr_stage, monkeypatch, *arguments, "--plot", tmp_path / "lr.png")
    output = capsys.readouterr().out
    assert 1e-6 < float(output.split("suggested learning rate: ")[1].split()[0]) < 0.5
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BadRequest, match="--lowest and --highest must be finite, positive and in rising order"):
        call(find_lr_stage, monkeypatch, *arguments, "--lowest", 1)
    with pytest.raises(BadRequest, match="--num-steps must be a whole number from 20 to .*, got 3"):
        call(find_lr_stage, monkeypatch, *SMALL, "--dataset-path", dataset, "--num-steps", 3)


@pytest.mark.slow
def test_find_lr_steps_by_hand(dataset):
    """One point for every optimizer step, in whichever way accumulation divides an epoch's batches, with the loss by hand."""
    for accumulate, steps_of in ((1, [1] * 9), (4, [4, 4, 1]), (100, [9])):
        arguments = ["--dataset-path", str(dataset), *map(str, SMALL), "--batch-size", "12", "--grad-accum", str(accumulate)]
        request = request_for(*arguments, "--dropout", "0")
        search = learning_rate_search.find_lr(request, lowest=1e-12, highest=1e-11, num_steps=20)
        np.testing.assert_allclose(search.rates, np.geomspace(1e-12, 1e-11, 20))
        assert len(search.losses) == 20
        # At such rates the weights stay, so that each step's loss is the mean over its batches of the first network's.
        model, items = build_starting_model(request).eval(), PairDataset(dataset, "train")
        sampler = EpochBatchSampler(examples=len(items), batch_size=12, seed=request.training.seed)
        expected = []
        for epoch in range(20):
            sampler.set_epoch(epoch)
            batches = iter(sampler)
            for size in steps_of:
                losses = [items.batch(next(batches)) for _ in range(size)]
                losses = [float(model.loss(compute_model_input(b.counts, b.missing), b.tokens).detach()) for b in losses]
                expected.append(np.mean(losses))
            if len(expected) >= 20:
                break
        average = 0.0
        for step, (loss, step_loss) in enumerate(zip(search.losses, expected[:20], strict=True), start=1):
            average = 0.98 * average + 0.02 * step_loss
            assert loss == pytest.approx(average / (1 - 0.98**step), rel=1e-5)


def test_search_for_a_learning_rate():
    """Where the loss falls most steeply, counted by hand; it ends where the loss grows, and says so if that is too early."""
    search = learning_rate_search.Search()
    rates = np.geomspace(1e-5, 1e-1, 60)
    assert all(search.add(rate, 5 - 4 / (1 + np.exp(-20 * np.log10(rate / 1e-3)))) for rate in rates.tolist())
    slopes = np.gradient(search.losses[10:-1], rates[10:-1])
    assert search.suggestion() == pytest.approx(rates[10:-1][slopes.argmin()])
    assert not search.add(1.0, 1e6)
    assert not learning_rate_search.Search().add(1e-3, float("nan"))
    assert learning_rate_search.Search(rates=[1e-3] * 12, losses=[1.0] * 12).suggestion() is None


def test_arguments_of_train_model_are_the_flags():
    """The same names as on the command line, in a signature that an editor knows."""
    parameters = inspect.signature(cxt.train_model).parameters
    flags = {action.dest for action in build_parser()._actions} - {"help", "config", "print_config"}
    assert parameters.keys() - {"config", "unknown"} == flags == {*OPTIONS, *TRAINING_SETTINGS}
    assert all(parameters[name].default is None for name in flags)


def test_training_leaves_the_environment_alone(dataset, tmp_path, monkeypatch):
    """In a user's process, also when it fails."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("NODE_RANK", "0")
    before = dict(os.environ)
    settings = {
        "layers": 1, "heads": 2, "width": 16, "threads": 1, "devices": 0, "dataset_path": dataset, "batch_size": 4,
        "grad_accum": 1, "max_steps": 2, "decode_items": 1,
    }  # fmt: skip
    cxt.train_model(**settings, run_dir=tmp_path / "run")
    assert dict(os.environ) == before
    with pytest.raises(BadRequest, match="there is no dataset directory"):
        cxt.train_model(**settings | {"dataset_path": tmp_path / "nowhere"}, run_dir=tmp_path / "none")
    with pytest.raises(Failed, match="not finite"):
        cxt.train_model(**settings, lr=1e30, warmup_steps=0, run_dir=tmp_path / "bad")
    assert dict(os.environ) == before
