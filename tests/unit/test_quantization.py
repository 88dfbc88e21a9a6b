"""Weights as integers, and checkpoints that hold them."""

import copy

import numpy as np
import pytest
import torch
from helpers.repository import GOLDEN
from helpers.training import FINE, SMALL, train

import cxt
from cxt.checkpoints.archive import pack
from cxt.checkpoints.file import read_checkpoint, write_checkpoint
from cxt.checkpoints.inspection import compare_checkpoints, describe_checkpoint
from cxt.checkpoints.quantized import quantize_checkpoint
from cxt.checkpoints.safetensors import CONFIG
from cxt.commands import checkpoint as checkpoint_stage
from cxt.errors import BadRequest, Failed
from cxt.io import file_sha256
from cxt.model.quantization import round_to_integers
from cxt.workflow.verification import verify


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rounding_is_that_of_a_loop(bits, dtype):
    torch.manual_seed(1)
    weight = torch.randn(7, 11).to(dtype)
    weight[3] = 0
    weight[4] *= 1e-20
    integers, scales = round_to_integers(weight, bits=bits)
    assert integers.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert scales.shape == (7, 1)
    largest = 2 ** (bits - 1) - 1
    for row, values in enumerate(weight.float().numpy()):
        scale = np.abs(values).max() / np.float32(largest) if values.any() else np.float32(1)
        assert scales[row, 0] == scale
        for column, value in enumerate(values):
            integer = int(np.rint(value / scale))
            assert integers[row, column] == integer
            assert abs(integer) <= largest
            assert abs(float(integer) * float(scale) - float(value)) <= float(scale) / 2 * (1 + 1e-6)


def test_rounding_twice_is_rounding_once():
    torch.manual_seed(2)
    integers, scales = round_to_integers(torch.randn(5, 9))
    again, same = round_to_integers(integers * scales)
    assert torch.equal(integers, again)
    assert torch.allclose(scales, same, rtol=1e-6)


def test_smallest_numbers():
    integers, scales = round_to_integers(torch.full((2, 3), 1e-45))
    assert integers.abs().max() <= 127
    assert (scales > 0).all()


@pytest.mark.parametrize(
    ("weight", "bits", "expected"),
    [
        (torch.ones(3), 8, "matrix of floats"),
        (torch.ones(3, 3, dtype=torch.int8), 8, "matrix of floats"),
        (torch.tensor([[1.0, torch.inf]]), 8, "not finite"),
        (torch.tensor([[1.0, torch.nan]]), 8, "not finite"),
        (torch.ones(3, 3), 1, "bits must be from 2 to 8"),
        (torch.ones(3, 3), 9, "bits must be from 2 to 8"),
    ],
    ids=["vector", "integers", "infinite", "nan", "one bit", "nine bits"],
)
def test_what_cannot_be_rounded(weight, bits, expected):
    with pytest.raises(ValueError, match=expected):
        round_to_integers(weight, bits=bits)


# Checkpoints


@pytest.fixture(scope="module")
def parent(dataset, tmp_path_factory):
    directory = tmp_path_factory.mktemp("parent")
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        arguments = (*SMALL, *FINE, "--dataset-path", dataset, "--run-dir", directory / "run", "--lineage", "abc")
        train(patch, *arguments, "--width", 64, "--epochs", 1, "--out", directory / "broad.ckpt")
    torch.set_num_threads(before)
    return directory / "broad.ckpt"


@pytest.fixture
def quantized(parent, tmp_path):
    checkpoint_stage.main(["quantize", str(parent), str(tmp_path / "small.ckpt")])
    return tmp_path / "small.ckpt"


def test_a_quantised_checkpoint(parent, quantized, capsys):
    """Every matrix is what a loop over its rows makes of it; all else is as it was, and the file is a quarter of the size."""
    content = torch.load(quantized, weights_only=True)
    full, read, model = read_checkpoint(parent), read_checkpoint(quantized), cxt.load_model(quantized)
    assert set(content) == {"cxt", "state_dict", "scales"}
    for name, weight in full.state_dict.items():
        stored, used = content["state_dict"][name], read.state_dict[name]
        assert torch.equal(used, model.state_dict()[name])
        if weight.ndim == 2:
            assert stored.dtype == torch.int8
            for row, values in enumerate(weight.numpy()):
                scale = np.abs(values).max() / np.float32(127) if values.any() else np.float32(1)
                np.testing.assert_array_equal(used[row].numpy(), np.rint(values / scale).astype(np.float32) * scale)
        else:
            assert torch.equal(stored, weight)
            assert torch.equal(used, weight)
            assert name not in content["scales"]
    assert quantized.stat().st_size < 0.35 * parent.stat().st_size  # scales and vectors weigh more in a small network
    assert read.record["quantization"] == {"bits": 8, "source": file_sha256(parent), "lineage": "abc"}
    assert read.record["name"] == "broad-int8"
    assert read.record["lineage"] is None
    same = full.record.keys() - {"name", "lineage"}
    assert {key: read.record[key] for key in same} == {key: full.record[key] for key in same}
    described = describe_checkpoint(quantized)
    assert f"matrices rounded to 8 bits, from {file_sha256(parent)}" in described
    assert "rounded to 8 bits" not in describe_checkpoint(parent)
    quantize = ["quantize", str(parent), str(quantized)]
    checkpoint_stage.main(quantize)
    assert capsys.readouterr().out.strip() == described


def test_quantising_twice_gives_equal_bytes(parent, quantized, tmp_path):
    quantize_checkpoint(parent, tmp_path / "again.ckpt")
    assert (tmp_path / "again.ckpt").read_bytes() == quantized.read_bytes()


def test_predictions_are_close(parent, quantized):
    torch.manual_seed(3)
    x, y = torch.rand(2, 2, 2, 20, 20) * 2, torch.randint(2, 326, (2, 21))
    with torch.no_grad():
        full, small = (cxt.load_model(path)(x, y).log_softmax(-1).exp() for path in (parent, quantized))
    assert not torch.equal(full, small)
    assert (full - small).abs().sum(-1).max() < 0.02  # twice the total variation


def test_what_else_reads_it(parent, quantized, tmp_path, capsys):
    close, text = compare_checkpoints(parent, quantized, rtol=0, atol=1e-6)
    assert not close
    assert "quantization" in text
    assert compare_checkpoints(parent, quantized, rtol=0, atol=0.01)[0]
    assert "quantised, so there is no configuration to compare it with" in verify(quantized, configfiles=[])
    checkpoint_stage.main(["export", str(quantized), "--out", str(tmp_path / "exported")])
    exported = read_checkpoint(tmp_path / "exported" / CONFIG)
    assert exported.record == read_checkpoint(quantized).record
    for name, value in read_checkpoint(quantized).state_dict.items():
        assert torch.equal(value, exported.state_dict[name])
    for path in (quantized, tmp_path / "exported"):
        with pytest.raises(BadRequest, match="is quantised already"):
            checkpoint_stage.main(["quantize", str(path), str(tmp_path / "twice.ckpt")])
    assert not (tmp_path / "twice.ckpt").exists()


@pytest.mark.parametrize("name", ["published_style.ckpt", "published_style_adapter.ckpt"])
def test_published_files(name, tmp_path):
    """With an adapter, whose matrices are rounded, too."""
    quantize_checkpoint(GOLDEN / name, tmp_path / "small.ckpt")
    model, full = cxt.load_model(tmp_path / "small.ckpt").state_dict(), cxt.load_model(GOLDEN / name).state_dict()
    for key, value in full.items():
        if value.ndim == 2:
            integers, scales = round_to_integers(value)
            value = integers * scales
        assert torch.equal(model[key], value)


@pytest.mark.parametrize("flag", ["--checkpoint", "--resume-adapter"])
def test_training_from_it_is_refused(flag, parent, quantized, dataset, tmp_path, monkeypatch):
    checkpoint_stage.main(["export", str(quantized), "--out", str(tmp_path / "exported")])
    for path in (quantized, tmp_path / "exported"):
        with pytest.raises(BadRequest, match=f"is quantised: .*start from its source, the .*{file_sha256(parent)}"):
            train(monkeypatch, *SMALL, "--dataset-path", dataset, flag, path, "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_quantised(parent, tmp_path):
    own = tmp_path / "own.ckpt"
    own.write_bytes(parent.read_bytes())
    with pytest.raises(BadRequest, match="is the checkpoint to quantise; choose another name"):
        quantize_checkpoint(own, own)
    assert own.read_bytes() == parent.read_bytes()
    about = read_checkpoint(parent)
    about.state_dict["backbone.head.weight"][3, 4] = torch.inf
    write_checkpoint(own, about.state_dict, about.record)
    with pytest.raises(Failed, match=r"not finite: backbone.head.weight"):
        quantize_checkpoint(own, tmp_path / "small.ckpt")
    with pytest.raises(BadRequest, match="there is no checkpoint"):
        checkpoint_stage.main(["quantize", str(tmp_path / "none.ckpt"), str(tmp_path / "small.ckpt")])
    assert not (tmp_path / "small.ckpt").exists()


HEAD, NORM = "backbone.head.weight", "backbone.norm.weight"


def without_record(content):
    content["cxt"].pop("quantization")


def without_scales(content):
    content.pop("scales")


def set_in(part, name, make):
    def change(content):
        content[part][name] = make(content[part].get(name))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_record, "it has scales, but its record does not say that it is quantised"),
        (without_scales, "its `scales` must be tensors by name, got None"),
        (lambda content: content["scales"].pop(HEAD), f"it is quantised, but has no scales of {HEAD}"),
        (set_in("scales", HEAD, lambda s: s[:-1]), f"its scales of {HEAD} must be 326 float32 numbers"),
        (set_in("scales", HEAD, lambda s: s[:, 0]), f"its scales of {HEAD} must be 326 float32 numbers"),
        (set_in("scales", HEAD, lambda s: s.double()), f"its scales of {HEAD} must be 326 float32 numbers"),
        (set_in("scales", HEAD, lambda s: s * 0), f"its scales of {HEAD} must be finite and positive"),
        (set_in("scales", HEAD, lambda s: s * torch.nan), f"its scales of {HEAD} must be finite and positive"),
        (set_in("scales", HEAD, lambda s: torch.ones(1).expand(326, 1)), "more numbers than the file contains"),
        (set_in("scales", HEAD, lambda s: "text"), f"its scales of {HEAD} must be a tensor"),
        (set_in("scales", "other", lambda s: torch.ones(3, 1)), "its other has scales, but is not a matrix of int8"),
        (set_in("scales", NORM, lambda s: torch.ones(64, 1)), f"its {NORM} has scales, but is not a matrix of int8"),
        (set_in("state_dict", HEAD, lambda w: w.float()), f"its {HEAD} has scales, but is not a matrix of int8"),
        (set_in("state_dict", HEAD, lambda w: w.to(torch.int16)), f"its {HEAD} has scales, but is not a matrix of int8"),
        (
            set_in("state_dict", HEAD, lambda w: torch.ones(1, 1, dtype=w.dtype).expand(326, 64)),
            "more numbers than the file contains",
        ),
        (set_in("state_dict", NORM, lambda w: w.to(torch.int8)), f"its {NORM} must be a dense tensor of floats"),
        (set_in("cxt", "quantization", lambda q: q | {"bits": 4}), "its quantization.bits must be 8, got 4"),
        (set_in("cxt", "quantization", lambda q: q | {"zero": 1}), "its quantization has 'zero', which this cxt does not know"),
        (set_in("cxt", "quantization", lambda q: {"bits": 8}), "its quantization lacks source"),
        (set_in("cxt", "quantization", lambda q: q | {"source": 8}), "its quantization.source must be text"),
    ],
)
def test_files_that_would_be_misread(change, message, quantized):
    content = copy.deepcopy(torch.load(quantized, weights_only=True))
    change(content)
    quantized.write_bytes(pack(content))
    for read in (cxt.load_model, describe_checkpoint):
        with pytest.raises(BadRequest, match=message):
            read(quantized)
