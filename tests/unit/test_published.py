"""Files of the original package: read without running anything, imported, trained on, and exported."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from helpers.repository import GOLDEN, run_python
from helpers.simulations import build_dataset, constant_scenario
from safetensors.torch import load_file

from cxt import load_model
from cxt import train as train_stage
from cxt.checkpoints.file import import_published, read_checkpoint, write_checkpoint
from cxt.checkpoints.inspection import compare_checkpoints, describe_checkpoint
from cxt.checkpoints.load import find_checkpoint
from cxt.checkpoints.published import allow_published_classes, find_nearest_preset, is_published
from cxt.checkpoints.safetensors import write_export
from cxt.config.network import PRESETS
from cxt.errors import BadRequest
from cxt.workflow.verification import verify

PLAIN, ADAPTER = GOLDEN / "published_style.ckpt", GOLDEN / "published_style_adapter.ckpt"
BOTH = pytest.mark.parametrize(("file", "suffix"), [(PLAIN, ""), (ADAPTER, "5")], ids=["plain", "adapter"])


def content_of(file) -> dict:
    """What is in a published file, its configuration as a plain dict."""
    with allow_published_classes():
        content = torch.load(file, weights_only=True)
    content["hyper_parameters"]["gpt_config"] = dict(content["hyper_parameters"]["gpt_config"].fields)
    return content


def changed(file, out, change):
    """A copy of a published file in which *change* has changed something."""
    content = content_of(file)
    change(content)
    torch.save(content, out)
    return out


def original_class(name, module="cxt.config"):
    """A class of that name as a pickle sees it, in a module that exists while it is written."""
    made = types.ModuleType(module)
    setattr(made, name, type(name, (), {"__module__": module}))
    return made, getattr(made, name)


def holding(value, out, *, module=None):
    """A published file in which *value* is one of the hyper-parameters; *module* holds its class."""
    content = content_of(PLAIN)
    content["hyper_parameters"]["extra"] = value
    with pytest.MonkeyPatch.context() as patch:
        if module is not None:
            patch.setitem(sys.modules, module.__name__, module)
        torch.save(content, out)
    return out


def agrees(model, suffix):
    """Whether logits and loss are those of the original code, on a CPU in float32."""
    expected = np.load(GOLDEN / "model.npz")
    x, y = torch.from_numpy(expected[f"x{suffix}"]), torch.from_numpy(expected["y"])
    with torch.no_grad():
        np.testing.assert_allclose(model(x, y).numpy(), expected[f"logits{suffix}"][:, :500], atol=1e-5)
        assert float(model.loss(x, y)) == pytest.approx(float(expected[f"loss{suffix}"]), abs=1e-5)


@pytest.mark.slow
@BOTH
def test_import(file, suffix, tmp_path):
    out = tmp_path / "made" / "x.ckpt"
    done = run_python("-m", "cxt.commands.checkpoint", "import", file, "--out", out, "--name", "mine")
    assert "imported  from published_style" in done.stdout
    assert "start token in the prefix" in done.stdout
    assert set(torch.load(out, weights_only=True)) == {"cxt", "state_dict"}  # and under weights_only
    about = read_checkpoint(out)
    assert about.record["name"] == "mine"
    assert about.model.start_token_in_prefix
    assert about.adapter is None if not suffix else about.adapter.overwrite_bin0
    assert (about.record["step"], about.record["dataset"]["samples"]) == (1, 5 if suffix else 10)
    agrees(load_model(out), suffix)
    agrees(load_model(file), suffix)
    assert "intact and finite; imported from published_style" in verify(out, configfiles=[])
    assert compare_checkpoints(out, file, rtol=0, atol=0)[0]
    assert str(file) in describe_checkpoint(file)
    left = run_python("-m", "cxt.commands.checkpoint", "import", out, "--out", tmp_path / "again.ckpt", check=False)
    assert left.returncode == 2
    assert "is already a checkpoint of cxt; use it as it is" in left.stderr


def test_names(tmp_path):
    for file, name in (
        ("broad_adapter_epoch=2-step=792.ckpt", "broad_adapter"),
        ("narrow.ckpt", "narrow"),
        ("epoch=1-step=5280.ckpt", "narrow"),
    ):
        shutil.copy(PLAIN, tmp_path / file)
        assert read_checkpoint(tmp_path / file).record["name"] == name
    for name, network in PRESETS.items():
        assert find_nearest_preset(network) == name
    shutil.copy(PLAIN, tmp_path / "residual_epoch=1-step=5280.ckpt")
    with pytest.raises(BadRequest, match="legacy `residual` model does not predict ln TMRCA"):
        read_checkpoint(tmp_path / "residual_epoch=1-step=5280.ckpt")


class Harmful:
    """What a pickle can do to who loads it."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


# As these are called in a file: by the names that Python 2 had for them.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "named"),
    [(os.system, rf"{os.name}\.system"), (subprocess.check_output, r"commands\.check_output"), (eval, r"builtin.*\.eval")],
)
def test_nothing_in_a_file_is_run(function, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "marker"
    command = f"open({str(marker)!r}, 'w').close()" if function is eval else f"touch {marker}"
    arguments = (["touch", str(marker)],) if function is subprocess.check_output else (command,)
    file = holding(Harmful(function, *arguments), tmp_path / "evil.ckpt")
    torch.load(file, weights_only=False)
    assert marker.exists()  # it does harm where it can
    marker.unlink()
    for read in (load_model, read_checkpoint, lambda path: import_published(path, tmp_path / "x.ckpt")):
        with pytest.raises(BadRequest, match=rf"is refused, and no code in it was executed: it contains pickled {named}, but"):
            read(file)
    done = run_python("-m", "cxt.commands.checkpoint", "import", file, "--out", tmp_path / "x.ckpt", check=False)
    assert done.returncode == 2
    assert "is refused" in done.stderr
    assert "Traceback" not in done.stderr
    assert not marker.exists()
    assert not (tmp_path / "x.ckpt").exists()


def test_other_pickle_protocols_run_nothing(tmp_path):
    """From the fourth on names are not in the instructions: torch refuses those whole."""
    marker = tmp_path / "marker"
    data = pickle.dumps(Harmful(os.system, f"touch {marker}"), protocol=4)
    with zipfile.ZipFile(PLAIN) as source, zipfile.ZipFile(tmp_path / "x.ckpt", "w") as out:
        for name in source.namelist():
            out.writestr(name, data if name.endswith("data.pkl") else source.read(name))
    with pytest.raises(BadRequest, match="cannot be read, it is damaged or not a checkpoint of cxt: Unsupported op"):
        load_model(tmp_path / "x.ckpt")
    assert not marker.exists()


def test_other_classes_are_refused_by_name(tmp_path):
    module, unknown = original_class("DecoderConfig")
    file = holding(unknown(), tmp_path / "x.ckpt", module=module)
    with pytest.raises(BadRequest, match=r"it contains pickled cxt\.config\.DecoderConfig, but may"):
        load_model(file)
    module, known = original_class("TrainingConfig")
    settings = known()
    settings.max_lr = 3e-4
    file = holding({"a": settings, "b": (1, 2)}, tmp_path / "x.ckpt", module=module)
    kept = read_checkpoint(file).record["published"]["hyper_parameters"]["extra"]
    assert kept == {"a": {"max_lr": 3e-4}, "b": [1, 2]}
    file = holding(np.arange(3), tmp_path / "x.ckpt")
    with pytest.raises(BadRequest, match="it contains pickled .*numpy"):
        load_model(file)


class Calls:
    """Makes an allowed class in another way than the files do."""

    def __init__(self, cls):
        self.cls = cls

    def __reduce__(self):
        return self.cls, (1, 2)


def test_an_allowed_class_takes_nothing_but_fields(tmp_path):
    module, known = original_class("ModelConfig")
    file = holding(Calls(known), tmp_path / "x.ckpt", module=module)
    with pytest.raises(BadRequest, match="it is damaged or not a checkpoint of cxt"):
        load_model(file)


def test_damaged(tmp_path):
    for size in (100, 5000, 20_000, PLAIN.stat().st_size - 10):
        (tmp_path / "x.ckpt").write_bytes(PLAIN.read_bytes()[:size])
        with pytest.raises(BadRequest, match="cannot be read, it is damaged"):
            load_model(tmp_path / "x.ckpt")
    done = run_python("-m", "cxt.commands.checkpoint", "import", tmp_path / "x.ckpt", "--out", tmp_path / "y.ckpt", check=False)
    assert done.returncode == 2
    torch.save({"a": 1}, tmp_path / "x.ckpt")
    with pytest.raises(BadRequest, match="x.ckpt is not a file of the original package: expected .*, found a. Weights"):
        import_published(tmp_path / "x.ckpt", tmp_path / "y.ckpt")
    shutil.copy(PLAIN, tmp_path / "x.ckpt")
    with pytest.raises(BadRequest, match="is the file to import"):
        import_published(tmp_path / "x.ckpt", tmp_path / "x.ckpt")
    with pytest.raises(BadRequest, match="cannot be written: it is a directory"):
        import_published(tmp_path / "x.ckpt", tmp_path)


def settings(**new):
    return lambda content: content["hyper_parameters"]["gpt_config"].update(new)


def tensor(name, value):
    return lambda content: content["state_dict"].update({name: value})


CHANNELS = "model.transformer.bt2ls.weights"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (PLAIN, tensor(CHANNELS, torch.tensor([0.6, 0.4])), rf"{CHANNELS} must be .*\(0.7, 0.3\), got \[0.6"),
        (PLAIN, tensor(CHANNELS, torch.tensor([0.7])), "must be the fixed weights"),
        (PLAIN, lambda content: content["state_dict"].pop(CHANNELS), f"{CHANNELS} is missing"),
        (PLAIN, tensor("model.transformer.wpe.weight", torch.ones(3)), "model.transformer.wpe.weight is not known"),
        (PLAIN, tensor("model.mask_token", torch.ones(())), "model.mask_token is not known"),
        (PLAIN, tensor("model.head.weight", torch.ones(326, 80)), "model.head.weight is not known"),
        (
            PLAIN,
            tensor("model.lm_head.weight", torch.ones(326, 8)),
            r"lm_head.weight must have shape \(326, 80\).*got \(326, 8\)",
        ),
        (PLAIN, tensor("model.lm_head.weight", 3), "model.lm_head.weight is not a tensor"),
        (PLAIN, settings(num_samples=50), r"proj01.weight must have shape \(20, 50\) by its hyper-parameters, got \(20, 10\)"),
        (PLAIN, settings(n_embd=96), "must have shape"),
        (PLAIN, settings(n_embd=81), "width 81 is not a multiple"),
        (PLAIN, settings(n_layer=10**9), "layers must be an integer from 1 to 1000, got 1000000000"),
        (PLAIN, settings(n_layer=900), "n_layer is 900, but it has weights of 2 blocks"),
        (PLAIN, settings(n_layer="2"), "n_layer must be int, got '2'"),
        (PLAIN, settings(output_dim=100), "must have shape"),
        (PLAIN, settings(combined_dim=1000), "combined_dim must be odd .*, got 1000"),
        (PLAIN, settings(bias=True), "bias must be False, got True"),
        (PLAIN, settings(residual=True), "residual True is an unknown setting"),
        (PLAIN, lambda content: content["hyper_parameters"]["gpt_config"].pop("n_head"), "n_head is missing"),
        (PLAIN, lambda content: content["hyper_parameters"].pop("gpt_config"), "have no `gpt_config`"),
        (PLAIN, lambda content: content.update(state_dict=[]), "no hyper-parameters or no weights"),
        (PLAIN, lambda content: content.update(epoch="one"), "its epoch must be a whole number, got 'one'"),
        (
            ADAPTER,
            lambda content: content["hyper_parameters"].update(ie_new=10),
            "`ie_new` must be fewer samples than .*, got 10",
        ),
        (
            ADAPTER,
            lambda content: content["hyper_parameters"].update(ie_new=4),
            r"model.adapter.se.0.weight must have shape .* got \(1, 5\)",
        ),
        (
            ADAPTER,
            lambda content: content["hyper_parameters"].update(adapter_bottleneck=0),
            "`adapter_bottleneck` must be a positive whole number, got 0",
        ),
        (
            ADAPTER,
            lambda content: content["hyper_parameters"].update(adapter_dropout=2),
            r"`adapter_dropout` must be a number in \[0, 1\), got 2",
        ),
        (
            ADAPTER,
            lambda content: content["hyper_parameters"].update(new_mask_index=1),
            "`new_mask_index` must be 0, .*, got 1",
        ),
        (
            ADAPTER,
            lambda content: content["hyper_parameters"].pop("ie_new"),
            "adapter weights need .*`ie_new`",
        ),
        (ADAPTER, lambda content: content["state_dict"].pop("model.adapter.alpha"), "model.adapter.alpha is missing"),
    ],
)
def test_what_does_not_fit_is_named(file, change, message, tmp_path):
    changed(file, tmp_path / "x.ckpt", change)
    with pytest.raises(BadRequest, match=rf"(?s)x.ckpt is not a checkpoint of the original package that this.*{message}"):
        load_model(tmp_path / "x.ckpt")


def test_what_makes_no_difference(tmp_path):
    """A configuration that is a plain dict, and caches for decoding."""
    cache = tensor("model.transformer.h.0.attn.kv_cache.k", torch.zeros(1, 4, 1001, 20))
    agrees(load_model(changed(PLAIN, tmp_path / "x.ckpt", cache)), "")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """500 windows for the network of the golden files: ten samples, and five."""
    root = tmp_path_factory.mktemp("data")
    shape = {"window_size": 100, "sequence_length": 50_000, "pairs": 2, "scales": [2, 8, 32, 64]}
    entry = constant_scenario(simulations=3, individuals=5, sequence_length=50_000)
    build_dataset(root / "n10", entry=entry, samples=10, **shape)
    build_dataset(root / "n5", entry=entry, samples=5, **shape)
    return root


def train(monkeypatch, *arguments):
    """One step that moves nothing, on the golden files' network."""
    still = ["--epochs", 1, "--batch-size", 2, "--grad-accum", 2, "--lr", 1e-12, "--min-lr", 0, "--weight-decay", 0]
    small = ["--model", "narrow", "--layers", 2, "--width", 80, "--devices", 0, "--threads", 1, "--decode-items", 0]
    monkeypatch.setattr(sys, "argv", ["train", *map(str, [*small, *still, *arguments])])
    train_stage.main()


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def close(a, b, *, part=""):
    return all(torch.allclose(a[key], b[key], atol=1e-8) for key in a if key.startswith(part))


def test_a_child(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "child.ckpt"
    parent = tmp_path / "parent.ckpt"
    import_published(PLAIN, parent)
    arguments = ["--dataset-path", data / "n10", "--checkpoint", parent]
    train(monkeypatch, *arguments, "--run-dir", tmp_path / "run", "--out", out)
    captured = capsys.readouterr()
    assert "sources attend to the start token" in captured.err
    assert "the window size changes from 2000 to 100 bp" in captured.out
    child, before = read_checkpoint(out), read_checkpoint(PLAIN)
    assert child.model.start_token_in_prefix
    assert child.record["parent"]["name"] == "published_style"
    assert close(before.state_dict, child.state_dict)
    agrees(load_model(out), "")
    assert "start_token_in_prefix: true" in (tmp_path / "run" / "config.yaml").read_text()
    train(monkeypatch, *arguments, "--print-config")
    assert "start_token_in_prefix: true" in capsys.readouterr().out
    train(monkeypatch, *arguments, "--run-dir", tmp_path / "own", "--out", out, "--start-token-in-prefix", "false")
    assert not read_checkpoint(out).model.start_token_in_prefix
    assert "start token" not in capsys.readouterr().err
    with pytest.raises(BadRequest, match="--layers 6, but checkpoint .* has 2; omit the flag"):
        train(monkeypatch, *arguments, "--layers", 6, "--run-dir", tmp_path / "other")


@pytest.mark.slow
def test_an_adapter_on_it(data, tmp_path, monkeypatch):
    """The file itself is a parent, too, and so is what it was exported to."""
    out = tmp_path / "adapter.ckpt"
    run_python("-m", "cxt.commands.checkpoint", "export", PLAIN, "--out", tmp_path / "exported")
    for parent in (PLAIN, tmp_path / "exported"):
        arguments = ["--dataset-path", data / "n5", "--checkpoint", parent, "--adapter", "--adapter-bottleneck", 8]
        train(monkeypatch, *arguments, "--run-dir", tmp_path / parent.stem, "--out", out)
        child, before = read_checkpoint(out), read_checkpoint(PLAIN)
        assert child.model.start_token_in_prefix
        assert (child.adapter.samples, child.adapter.overwrite_bin0) == (5, False)
        assert close(before.state_dict, child.state_dict)


@pytest.mark.slow
def test_an_adapter_of_it(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "child.ckpt"
    arguments = ["--dataset-path", data / "n5", "--resume-adapter", ADAPTER, "--adapter-bottleneck", 8, "--out", out]
    train(monkeypatch, *arguments, "--run-dir", tmp_path / "run")
    assert "the adapter overwrites bin 0" in capsys.readouterr().err
    child, before = read_checkpoint(out), read_checkpoint(ADAPTER)
    assert child.adapter.overwrite_bin0
    assert child.model.start_token_in_prefix
    assert close(before.state_dict, child.state_dict)
    agrees(load_model(out), "5")
    train(monkeypatch, *arguments, "--run-dir", tmp_path / "own", "--overwrite-bin0", "false")
    assert not read_checkpoint(out).adapter.overwrite_bin0


@pytest.mark.slow
@BOTH
def test_export(file, suffix, tmp_path):
    done = run_python("-m", "cxt.commands.checkpoint", "export", file, "--out", tmp_path / "exported")
    assert "exported to" in done.stdout
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == ["config.json", "model.safetensors"]
    before = read_checkpoint(file)
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == before.state_dict.keys()
    assert all(torch.equal(exported[key], value) for key, value in before.state_dict.items())
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (config["model"]["layers"], config["model"]["grid_high"]) == (2, 17.0)
    after = read_checkpoint(find_checkpoint(tmp_path / "exported"))
    assert after.record == before.record
    assert (after.model, after.adapter) == (before.model, before.adapter)
    agrees(load_model(tmp_path / "exported"), suffix)
    assert find_checkpoint(tmp_path / "exported" / "model.safetensors") == tmp_path / "exported" / "config.json"
    assert compare_checkpoints(find_checkpoint(tmp_path / "exported"), file, rtol=0, atol=0)[0]


@pytest.mark.slow
def test_export_keeps_types_and_views(tmp_path):
    about = read_checkpoint(PLAIN)
    whole = torch.arange(40.0).bfloat16().view(4, 10)
    odd = {"half": whole, "view": whole.T, "part": whole[1], "scalar": torch.tensor(2.0, dtype=torch.float64)}
    write_export(tmp_path / "x", odd, about.record)
    back = read_checkpoint(tmp_path / "x" / "config.json").state_dict
    assert {key: value.dtype for key, value in back.items()} == {key: value.dtype for key, value in odd.items()}
    assert all(torch.equal(back[key], odd[key]) for key in odd)
    write_checkpoint(tmp_path / "half.ckpt", {k: v.bfloat16() for k, v in about.state_dict.items()}, about.record)
    run_python("-m", "cxt.commands.checkpoint", "export", tmp_path / "half.ckpt", "--out", tmp_path / "half")
    assert {value.dtype for value in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert compare_checkpoints(tmp_path / "half" / "config.json", tmp_path / "half.ckpt", rtol=0, atol=0)[0]


@pytest.mark.slow
def test_damaged_exports(tmp_path):
    directory = tmp_path / "x"
    about = read_checkpoint(PLAIN)

    def refused(message):
        with pytest.raises(BadRequest, match=message):
            load_model(directory / "config.json")
        write_export(directory, about.state_dict, about.record)

    refused("there is no checkpoint .*config.json")
    (directory / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes()[:-1] + b"x")
    refused("is damaged, or does not belong to config.json")
    (directory / "model.safetensors").unlink()
    refused("there is no exported checkpoint in")
    (directory / "config.json").write_text("{")
    refused("config.json cannot be read")
    (directory / "config.json").write_text('{"architectures": ["BertModel"]}')
    refused("was not written by `cxt checkpoint export`")
    write_export(directory, about.state_dict, about.record | {"format": 99})
    refused("has format 99, but this cxt reads formats up to 1")
    write_export(directory, about.state_dict | {"x": torch.ones(1)}, about.record)
    refused("x is not in this model")
    bad = {key: value * float("nan") for key, value in about.state_dict.items()}
    write_checkpoint(tmp_path / "nan.ckpt", bad, about.record)
    done = run_python("-m", "cxt.commands.checkpoint", "export", tmp_path / "nan.ckpt", "--out", tmp_path / "nan", check=False)
    assert done.returncode == 1
    assert "not finite" in done.stderr
    done = run_python("-m", "cxt.commands.checkpoint", "export", PLAIN, "--out", tmp_path / "nan.ckpt" / "x", check=False)
    assert done.returncode == 2
    assert not is_published({"cxt": {}, "pytorch-lightning_version": "2", "hyper_parameters": {}})
