"""TensorBoard, MLflow and Weights & Biases get the numbers of the training log."""

import json
import math
import socket
import struct
from types import SimpleNamespace

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cxt.checkpoints.run_directory import RunDirectory
from cxt.checkpoints.training_log import TIMING, read_log
from cxt.config.training import TrainingConfig
from cxt.errors import BadRequest
from cxt.trainer import trackers
from cxt.trainer.trackers import check_trackers, describe_hyperparameters, send
from cxt.trainer.train_model import train_model

SMALL = {
    "layers": 1, "heads": 2, "width": 16, "devices": 0, "batch_size": 4, "grad_accum": 2, "epochs": 1, "max_steps": 8,
    "objective": "marginal", "decode_items": 3, "validate_every": 4, "log_every": 2, "metrics": ["crps"],
}  # fmt: skip


def logged(run):
    """{column: {step: value}} of a training log, without the columns of time."""
    rows = read_log(run / "training_log.csv")
    names = [name for name in rows[0] if name not in ("step", "epoch", *TIMING)]
    return {name: {row["step"]: row[name] for row in rows if row[name] is not None} for name in names}


def test_tensorboard(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "SECONDS_BETWEEN_FIGURES", 0)
    train_model(**SMALL, dataset_path=dataset, run_dir=tmp_path / "run", histograms=True)
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    events.Reload()
    expected = logged(tmp_path / "run")
    assert set(expected["val_crps"]) == {4, 8}
    for name, values in expected.items():
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx(values, rel=1e-6)  # float32
    assert [event.step for event in events.Images("tracks")] == [4, 8]
    tags = events.Tags()["histograms"]
    assert any(tag.startswith("weights/backbone.") for tag in tags)
    assert any(tag.startswith("gradients/backbone.") for tag in tags)
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"batch_size" in content
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    shown = yaml.safe_load((tmp_path / "run" / "hparams.yaml").read_text(encoding="utf-8"))
    assert shown.keys() == settings.keys()
    assert shown["batch_size"] == settings["batch_size"]


def test_figures_are_not_drawn_all_the_time(dataset, tmp_path):
    train_model(**SMALL, dataset_path=dataset, run_dir=tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [event.step for event in events.Images("tracks")] == [4]
    assert not events.Tags()["histograms"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "file"])
def test_mlflow(dataset, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    from mlflow import MlflowClient

    # An address of its own for each test, because MLflow keeps the database of an address open.
    address = {"sqlite": f"sqlite:///{tmp_path}/mlflow.db", "file": "file:./mlruns"}[kind]
    run = tmp_path / "run"
    train_model(**SMALL, dataset_path=dataset, run_dir=run, mlflow=address, name="mine")
    client = MlflowClient(address)
    [experiment] = client.search_experiments(filter_string="name = 'cxt'")
    [tracked] = client.search_runs([experiment.experiment_id])
    assert tracked.info.run_id == json.loads((run / "trackers.json").read_text(encoding="utf-8"))["mlflow"]["run"]
    assert tracked.info.run_name == "mine"
    assert tracked.info.status == "FINISHED"
    for name, values in logged(run).items():
        found = {metric.step: metric.value for metric in client.get_metric_history(tracked.info.run_id, name)}
        assert found == pytest.approx(values, rel=1e-12)
    assert tracked.data.params["batch_size"] == "4"
    files = {file.path for file in client.list_artifacts(tracked.info.run_id)}
    assert files >= {"config.yaml", "losses.png", "tracks.png", "tracks", "mine_epoch=0-step=8.ckpt"}


@pytest.mark.slow
def test_a_continued_run_goes_on_at_mlflow(dataset, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    address = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(Exception, match="out of time") as stopped:
        train_model(**SMALL, dataset_path=dataset, run_dir=tmp_path / "run", mlflow=address, save_every=1, max_minutes=1e-9)
    assert stopped.value.status == 75
    train_model(**SMALL, dataset_path=dataset, run_dir=tmp_path / "run", mlflow=address, save_every=1)
    client = MlflowClient(address)
    [experiment] = client.search_experiments(filter_string="name = 'cxt'")
    [tracked] = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    steps = {metric.step for metric in client.get_metric_history(tracked.info.run_id, "train_loss")}
    assert steps == set(logged(tmp_path / "run")["train_loss"])


@pytest.mark.slow
def test_mlflow_without_its_server(dataset, tmp_path, caplog):
    """One message before training begins, and everything as it was; a run that is known there goes on without it."""
    with socket.socket() as free:  # a port at which nobody listens
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    settings = {**SMALL, "dataset_path": dataset, "mlflow": address}
    run = tmp_path / "run"
    message = f"mlflow {address} cannot be used: .*; start its server or correct the address, or train without mlflow"
    with pytest.raises(BadRequest, match=message):
        train_model(**settings, run_dir=run)
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    train_model(**SMALL | {"max_steps": 2}, dataset_path=dataset, run_dir=run)  # another one, which is there meanwhile
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(BadRequest, match=message):
        train_model(**settings, run_dir=run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.lock"]
    known = tmp_path / "known"
    known.mkdir()
    (known / "trackers.json").write_text(json.dumps({"mlflow": {"address": address, "run": "0" * 32}}), encoding="utf-8")
    train_model(**settings, run_dir=known)
    assert "cannot be used, and gets nothing more of this run" in caplog.text
    assert RunDirectory(known).finished_checkpoint() is not None


@pytest.mark.slow
def test_wandb_offline(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    run = tmp_path / "run"
    train_model(**SMALL, dataset_path=dataset, run_dir=run, wandb="cxt", name="mine")
    wandb.teardown()  # ends its service, which writes the file
    [file] = run.glob("wandb/offline-run-*/run-*.wandb")
    found = read_wandb(file)
    for name, values in logged(run).items():
        assert found[name] == pytest.approx(values, rel=1e-12)
    assert json.loads((run / "trackers.json").read_text(encoding="utf-8"))["wandb"]["run"] in file.name


def read_log_format(data):
    """The records of a file in LevelDB's log format: blocks of 32 KiB with pieces (checksum, length, type, bytes)."""
    at, pieces = 7, []  # after the file's own header
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        pieces.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield b"".join(pieces)
            pieces = []


def read_wandb(file):
    """{metric: {step: value}} of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, dict[int, float]] = {}
    for data in read_log_format(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for name, value in row.items():
                if isinstance(value, int | float) and "trainer/global_step" in row:
                    found.setdefault(name, {})[row["trainer/global_step"]] = value
    return found


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mlflow": "mlruns"}, "sqlite:///mlflow.db"),
        ({"mlflow": "https://me:secret@server"}, "must not contain a password"),
        ({"wandb": "cxt"}, "WANDB_MODE=offline"),
    ],
)
def test_wrong_trackers(settings, says, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(BadRequest, match=says) as refused:
        check_trackers(TrainingConfig(**settings))
    assert "secret" not in str(refused.value)


def test_a_tracker_that_fails_is_given_up(caplog):
    class Broken:
        def log(self):
            raise OSError("no route to host")

    class Whole:
        rows = 0

        def log(self):
            self.rows += 1

    whole = Whole()
    trainer = SimpleNamespace(loggers=[Broken(), whole])
    for _ in range(2):
        send(trainer, lambda tracker: tracker.log())
    assert whole.rows == 2
    assert caplog.text.count("no route to host") == 1


def test_hyperparameters_are_plain():
    found = describe_hyperparameters({"lr": 0.1, "losses": [{"name": "emd"}], "gpus": None, "seed": 3, "x": math.pi})
    assert found == {"lr": 0.1, "losses": '[{"name": "emd"}]', "gpus": "null", "seed": 3, "x": math.pi}
