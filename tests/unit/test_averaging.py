"""Exponential moving averages of the weights."""

import numpy as np
import pytest
import torch
from helpers.repository import run_python
from helpers.training import FINE, SMALL, equal, train, weights

from cxt.checkpoints.file import read_checkpoint
from cxt.checkpoints.run_directory import RunDirectory
from cxt.checkpoints.training_log import read_log
from cxt.config.training import averaging_decay
from cxt.errors import BadRequest, Failed
from cxt.model.adapter import build_model
from cxt.trainer.averaging import STEP_WEIGHTS, WeightAverage
from cxt.trainer.training_state import list_training_states

EVERY_STEP = ["--save-every", 1, "--save-minutes", 0, "--keep-saves", 1000]
SETTINGS = [*SMALL, *FINE, "--decode-items", 2, "--validate-every", 3]


@pytest.fixture(scope="module", autouse=True)
def few_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def parent(dataset, tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    with pytest.MonkeyPatch.context() as patch:
        arguments = (*SMALL, *FINE, "--dataset-path", dataset, "--run-dir", directory / "run")
        train(patch, *arguments, "--epochs", 1, "--out", directory / "parent.ckpt")
    return directory / "parent.ckpt"


def read_states(run):
    """The training states of a run by step, from the first."""
    states = [torch.load(path, weights_only=True) for path in list_training_states(RunDirectory(run))]
    return {state["global_step"]: state for state in reversed(states)}


def average_slowly(average: dict, steps: dict[int, dict], decay: float) -> dict[int, dict]:
    """The averages after each step, in double precision, given the one before them and the weights after each step."""
    average, averages = {name: value.double().numpy() for name, value in average.items()}, {}
    for t, step in steps.items():
        d = min(decay, (1 + t) / (10 + t))
        average = {name: d * average[name] + (1 - d) * value.double().numpy() for name, value in step.items()}
        averages[t] = average
    return averages


@pytest.mark.parametrize("decay", [0.3, 0.9])
@pytest.mark.parametrize("kind", ["adamw", "muon", "adapter"])
def test_the_average_is_that_of_all_steps(parent, dataset, dataset_n10, tmp_path, monkeypatch, kind, decay):
    if kind == "adapter":
        data = ["--dataset-path", dataset_n10, "--adapter", "--adapter-bottleneck", 4, "--last-n", 1]
    else:
        data = ["--dataset-path", dataset, "--optimizer", kind]
    arguments = [*SETTINGS, *EVERY_STEP, *data, "--checkpoint", parent]
    train(monkeypatch, *arguments, "--run-dir", tmp_path / "plain", "--out", tmp_path / "plain.ckpt")
    train(monkeypatch, *arguments, "--ema-decay", decay, "--run-dir", tmp_path / "ema", "--out", tmp_path / "ema.ckpt")
    states, plain = read_states(tmp_path / "ema"), read_states(tmp_path / "plain")
    assert list(states) == list(plain) == list(range(1, max(plain) + 1))
    for step, state in states.items():  # averaging does not change training
        assert equal(state[STEP_WEIGHTS], plain[step]["state_dict"])
    steps = {step: state[STEP_WEIGHTS] for step, state in states.items()}
    start = {f"model.{name}": value for name, value in weights(parent).items()}
    if kind == "adapter":  # whose initial weights are in no file
        assert torch.equal(
            states[1]["state_dict"]["model.backbone.token_embedding.weight"], start["model.backbone.token_embedding.weight"]
        )
        start = states[1]["state_dict"]
        del steps[1]
    for step, average in average_slowly(start, steps, decay).items():
        for name, value in states[step]["state_dict"].items():
            np.testing.assert_allclose(value.numpy(), average[name], rtol=1e-5, atol=1e-7)
    published, last = weights(tmp_path / "ema.ckpt"), states[max(states)]["state_dict"]
    assert equal({f"model.{name}": value for name, value in published.items()}, last)
    assert not equal(published, weights(tmp_path / "plain.ckpt"))
    moved = [name for name in published if not torch.equal(published[name], weights(tmp_path / "plain.ckpt")[name])]
    assert any(name.startswith("adapter.") for name in moved) == (kind == "adapter")
    assert any(name.startswith("backbone.blocks.2") for name in moved)
    assert ("backbone.token_embedding.weight" in moved) == (kind != "adapter")


def test_what_is_validated_is_the_average(dataset, tmp_path, monkeypatch):
    """The logged losses are those of a model with the average of that step; the best one is published."""
    from cxt import PairDataset

    arguments = [*SETTINGS, *EVERY_STEP, "--dataset-path", dataset, "--ema-decay", 0.8, "--export", "best"]
    train(monkeypatch, *arguments, "--lr", 0.02, "--run-dir", tmp_path / "run", "--out", tmp_path / "best.ckpt")
    items = PairDataset(dataset, "test")
    x, y = map(torch.stack, zip(*(items[i] for i in range(len(items))), strict=True))
    rows = {row["step"]: row for row in read_log(tmp_path / "run" / "training_log.csv") if row["val_loss"] is not None}
    losses, differ = {}, 0
    for step, row in rows.items():
        file = tmp_path / "run" / "checkpoints" / f"step={step}.ckpt"
        checkpoint = read_checkpoint(file)
        model = build_model(checkpoint.model).eval()
        model.load_state_dict(checkpoint.state_dict)
        with torch.no_grad():
            losses[step] = float(model.loss(x, y))
            model.load_state_dict(
                {k.removeprefix("model."): v for k, v in torch.load(file, weights_only=True)[STEP_WEIGHTS].items()}
            )
            differ += abs(float(model.loss(x, y)) - losses[step]) > 1e-3
        assert row["val_loss"] == pytest.approx(losses[step], rel=1e-4)
    assert differ > len(rows) / 2
    best = min(rows, key=lambda step: rows[step]["val_loss"])
    published = read_checkpoint(tmp_path / "best.ckpt")
    assert published.record["step"] == best
    assert equal(published.state_dict, weights(tmp_path / "run" / "checkpoints" / f"step={best}.ckpt"))


def test_warm_up():
    assert averaging_decay(1, 0.999) == 2 / 11
    assert averaging_decay(100, 0.5) == 0.5
    assert averaging_decay(10**6, 0.999) == 0.999
    decays = [averaging_decay(step, 0.99) for step in range(1, 2000)]
    assert decays == sorted(decays)


def test_a_decay_that_is_not_reached_is_said(dataset, tmp_path, monkeypatch, caplog):
    arguments = [*SMALL, "--dataset-path", dataset, "--epochs", 1, "--decode-items", 0, "--ema-decay"]
    train(monkeypatch, *arguments, 0.9999, "--run-dir", tmp_path / "a")
    assert "note: ema_decay 0.9999 is not reached in 7 steps, because the decay warms up to 0.4706 in them" in caplog.text
    caplog.clear()
    train(monkeypatch, *arguments, 0.4, "--run-dir", tmp_path / "b")
    assert "ema_decay" not in caplog.text


def test_half_precision_is_averaged_in_float32(parent):
    """Steps that are too small for bfloat16 add up in the average of bfloat16 weights."""
    model = build_model(read_checkpoint(parent).model).to(torch.bfloat16)
    average = WeightAverage(model, 0.999)
    weight = model.backbone.head.weight
    start = weight.detach().float().clone()

    class Step:
        global_step = 10**5

    with torch.no_grad():
        weight.copy_(start * 2)
    for _ in range(100):
        Step.global_step += 1
        average.on_train_batch_end(Step, None, None, None, 0)
    assert average.average["backbone.head.weight"].dtype == torch.float32
    torch.testing.assert_close(average.average["backbone.head.weight"], start * (2 - 0.999**100), rtol=1e-4, atol=1e-7)
    with average.averaged():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.float(), start * (2 - 0.999**100), rtol=0.005, atol=1e-7)
    assert torch.equal(weight.float(), start * 2)


def test_the_weights_come_back_after_an_error(parent):
    model = build_model(read_checkpoint(parent).model)
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with average.averaged():
        assert not equal(model.state_dict(), before)
    assert equal(model.state_dict(), before)
    with pytest.raises(ZeroDivisionError), average.averaged():
        1 / 0  # noqa: B018
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_continues_exactly(dataset, tmp_path, monkeypatch, precision):
    """In the arithmetic of a GPU, which a CPU has when it is told to: the state holds the average in float32."""
    monkeypatch.setattr("cxt.trainer.request.choose_precision", lambda *words, **more: precision)
    arguments = [*SETTINGS, *EVERY_STEP, "--dataset-path", dataset, "--ema-decay", 0.9]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(monkeypatch, *arguments, "--run-dir", whole, "--out", tmp_path / "whole.ckpt")
    with pytest.raises(Failed, match="out of time"):
        train(monkeypatch, *arguments, "--max-minutes", 1e-9, "--run-dir", cut, "--out", tmp_path / "cut.ckpt")
    train(monkeypatch, *arguments, "--run-dir", cut, "--out", tmp_path / "cut.ckpt")
    assert (tmp_path / "whole.ckpt").read_bytes() == (tmp_path / "cut.ckpt").read_bytes()
    states = read_states(whole)
    assert equal(states[14]["state_dict"], read_states(cut)[14]["state_dict"])
    name = "model.backbone.head.weight"
    assert states[14]["state_dict"][name].dtype == torch.float32
    assert states[14][STEP_WEIGHTS][name].dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    start = states[1]["state_dict"]
    expected = average_slowly(start, {step: states[step][STEP_WEIGHTS] for step in range(2, 15)}, 0.9)[14]
    np.testing.assert_allclose(states[14]["state_dict"][name].numpy(), expected[name], rtol=1e-5, atol=1e-7)
    assert torch.equal(
        weights(tmp_path / "whole.ckpt")[name[6:]].float(),
        states[14]["state_dict"][name].to(states[14][STEP_WEIGHTS][name].dtype).float(),
    )


@pytest.mark.slow
def test_two_processes_average_alike(dataset, tmp_path):
    """DDP on two CPU processes, resumed after it was stopped, ends as without the stop."""
    arguments = [*SETTINGS, "--dataset-path", dataset, "--ema-decay", 0.9, "--accelerator", "cpu", "--grad-accum", 1]
    arguments[arguments.index("--devices") + 1] = "2"
    words = list(map(str, arguments))
    for name, more in (("whole", []), ("cut", ["--max-minutes", "1e-9"]), ("cut", [])):
        run_python(
            "-m", "cxt.train", *words, *more, "--run-dir", str(tmp_path / name), "--out", str(tmp_path / f"{name}.ckpt"),
            env={"OMP_NUM_THREADS": "1"}, check=not more,
        )  # fmt: skip
    assert (tmp_path / "whole.ckpt").read_bytes() == (tmp_path / "cut.ckpt").read_bytes()


@pytest.mark.parametrize("decay", ["1", "-0.1", "1.5", "nan", "much"])
def test_decays_that_are_none(dataset, monkeypatch, decay):
    with pytest.raises((BadRequest, SystemExit)):
        train(monkeypatch, *SMALL, "--dataset-path", dataset, "--ema-decay", decay)
