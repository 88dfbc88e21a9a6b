"""Checkpoints and training states that were damaged, made to do harm, or written by another version: none is used."""

import copy
import io
import shutil
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from helpers.repository import GOLDEN
from helpers.training import FINE, SMALL, train

from cxt import load_model
from cxt.checkpoints.archive import Damaged, check_bytes, open_verified, pack
from cxt.checkpoints.file import import_published, read_checkpoint, write_checkpoint
from cxt.checkpoints.inspection import compare_checkpoints, describe_checkpoint, read_verified_checkpoint
from cxt.checkpoints.load import find_checkpoint
from cxt.checkpoints.record import build_checkpoint_record
from cxt.checkpoints.run_directory import RunDirectory
from cxt.checkpoints.safetensors import CONFIG, WEIGHTS, write_export
from cxt.commands import checkpoint as checkpoint_stage
from cxt.config.network import ModelConfig
from cxt.config.training import ARCHITECTURE_SINCE_FORMAT_1
from cxt.errors import BadRequest
from cxt.model.adapter import build_model
from cxt.trainer.parents import read_parent
from cxt.trainer.training_state import AtomicIO, find_state_to_continue, list_training_states
from cxt.workflow.verification import verify

FLIPS = 200
NETWORK = ModelConfig(layers=1, heads=2, width=16, windows=6, samples=6, scales=2, window_size=1000, bins=20)


def record_of(**changes) -> dict:
    dataset = {"scales": [2, 4], "missing": False, "window_size": 1000, "sequence_length": 6000, "samples": 6}
    return build_checkpoint_record(NETWORK, None, name="x", preset="broad", lineage="abc", dataset=dataset) | changes


@pytest.fixture
def checkpoint(tmp_path):
    """A finished checkpoint of a small network."""
    torch.manual_seed(1)
    write_checkpoint(tmp_path / "x.ckpt", build_model(NETWORK).state_dict(), record_of(step=3, epoch=0))
    return tmp_path / "x.ckpt"


def training_state(step: int) -> dict:
    """What a training state holds of a small network, as far as readers look."""
    torch.manual_seed(step)
    weights = {f"model.{key}": value for key, value in build_model(NETWORK).state_dict().items()}
    return {
        "cxt": record_of(), "state_dict": weights, "pytorch-lightning_version": "2.6", "global_step": step, "epoch": 0,
        "loops": {"fit_loop": {"epoch_progress": {"total": step}}}, "optimizer_states": [{"exp_avg": torch.rand(50)}],
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run directory with two training states."""
    run = RunDirectory(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    for step in (3, 6):
        AtomicIO().save_checkpoint(training_state(step), run.checkpoints / f"step={step}.ckpt")
    return run


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def refused(path) -> None:
    """Every reader refuses the file, and none calls it whole."""
    for read in (
        load_model, read_checkpoint, read_verified_checkpoint, describe_checkpoint, lambda path: verify(path, configfiles=[]),
        lambda path: compare_checkpoints(path, path, rtol=0, atol=0),
        lambda path: import_published(path, path.with_name("imported.ckpt")),
        lambda path: read_parent(
            SimpleNamespace(
                checkpoint=str(path), resume_adapter=None, lora_of=None, parent=str(path), resume=False, restart=False,
                adapter=False,
            )
        ),
    ):  # fmt: skip
        with pytest.raises(BadRequest, match="cannot be read, it is damaged"):
            read(path)


def test_no_single_bit_goes_unnoticed(checkpoint, run, tmp_path, capsys):
    """Half of the flips in a checkpoint, half in a training state."""
    generator = torch.Generator().manual_seed(1)
    save = run.checkpoints / "step=6.ckpt"
    for path in (checkpoint, save):
        data = path.read_bytes()
        for bit in torch.randint(0, 8 * len(data), (FLIPS // 2,), generator=generator).tolist():
            path.write_bytes(flipped(data, bit))
            refused(path)
            if path == save:
                assert find_state_to_continue(run, "m") == run.checkpoints / "step=3.ckpt"
                assert "cannot be read" in capsys.readouterr().out
                with pytest.raises(BadRequest, match="cannot be read"):
                    AtomicIO().load_checkpoint(path)
                with pytest.raises(BadRequest, match="cannot be continued from"):
                    find_state_to_continue(run, "m", wanted=path)
        path.write_bytes(data)
    assert load_model(checkpoint)
    assert find_state_to_continue(run, "m") == save
    assert AtomicIO().load_checkpoint(save)["global_step"] == 6
    (run.checkpoints / "step=3.ckpt").write_bytes(b"")
    save.write_bytes(flipped(data, 8 * 400))
    with pytest.raises(BadRequest, match="no earlier training state is left"):
        find_state_to_continue(run, "m")


def test_every_bit_and_every_length(tmp_path):
    """Of a file of one tensor: headers, padding, data, directory and the digest itself."""
    data = bytes(pack({"w": torch.arange(4.0)}))
    path = tmp_path / "x"
    wrong = [flipped(data, bit) for bit in range(8 * len(data))] + [data[:end] for end in range(0, len(data), 7)]
    wrong += [data[:-end] for end in range(1, 120)] + [data + b"x"]
    for content in wrong:
        with pytest.raises(Damaged):
            check_bytes(io.BytesIO(content))
    path.write_bytes(data)
    with open_verified(path) as file:
        assert torch.equal(torch.load(file, weights_only=True)["w"], torch.arange(4.0))
    assert torch.equal(torch.load(path, weights_only=True)["w"], torch.arange(4.0))
    assert bytes(pack({"w": torch.arange(4.0)})) == data


@pytest.mark.parametrize("name", ["published_style.ckpt", "published_style_adapter.ckpt"])
def test_files_without_a_digest(name, tmp_path):
    """Earlier ones, and the original package's: no flip in their tensors is taken."""
    data = (GOLDEN / name).read_bytes()
    with open_verified(GOLDEN / name), zipfile.ZipFile(GOLDEN / name) as archive:
        tensors = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    path = tmp_path / "x.ckpt"
    for entry in tensors[:: len(tensors) // 10]:
        start = data.index(entry.filename.encode(), entry.header_offset) + len(entry.filename)
        start += int.from_bytes(data[entry.header_offset + 28 : entry.header_offset + 30], "little")
        path.write_bytes(flipped(data, 8 * (start + entry.file_size // 2)))
        with pytest.raises(BadRequest, match="the checksum of its entry .* differs"):
            load_model(path)
        with pytest.raises(BadRequest, match="the checksum of its entry .* differs"):
            import_published(path, tmp_path / "y.ckpt")


def test_compressed_entries_are_not_unpacked(run, tmp_path):
    """A thousand times what the file is large: refused before any of it is read."""
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out, out.open("archive/data.pkl", "w") as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    assert path.stat().st_size < 100_000
    shutil.copy(path, run.checkpoints / "step=9.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile.ZipExtFile, "read", lambda *_: pytest.fail("an entry was read"))
        patch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch read the file"))
        for read in (load_model, lambda path: import_published(path, tmp_path / "y.ckpt")):
            with pytest.raises(BadRequest, match="data.pkl is compressed, which torch never does; nothing was unpacked"):
                read(path)
    assert find_state_to_continue(run, "m") == run.checkpoints / "step=6.ckpt"


def test_weights_that_are_not_finite(checkpoint):
    content = read_checkpoint(checkpoint)
    key = next(iter(content.state_dict))
    content.state_dict[key].fill_(float("nan"))
    write_checkpoint(checkpoint, content.state_dict, content.record)
    with pytest.raises(BadRequest, match=rf"x\.ckpt has weights that are not finite: {key}"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: None,
        lambda state: state.update(state_dict=3),
        lambda state: state["state_dict"].update({"model.backbone.embedding.weight": torch.zeros(2)}),
        lambda state: state.update(optimizer_states="text"),
    ],
)
def test_a_training_state_that_something_else_wrote_is_passed_over(run, change, capsys):
    """Without a digest nothing says that it is what the trainer saved, and Lightning trusts whatever it holds."""
    save = run.checkpoints / "step=6.ckpt"
    state = torch.load(save, weights_only=True)
    change(state)
    torch.save(state, save)
    with pytest.raises(BadRequest, match=r"cannot be continued from: it does not end in a digest"):
        find_state_to_continue(run, "m", wanted=save)
    with pytest.raises(BadRequest, match="does not end in a digest: it was written by another program, or an earlier cxt"):
        AtomicIO().load_checkpoint(save)
    assert find_state_to_continue(run, "m") == run.checkpoints / "step=3.ckpt"
    assert "does not end in a digest" in capsys.readouterr().out


def test_sizes_that_are_not_there(tmp_path):
    """Entries that share their bytes, and one that claims more than the file has."""
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(1000))
        first = archive.infolist()[0]
        for i in range(50):
            again = copy.copy(first)
            again.filename = f"archive/data/{i}"
            archive.filelist.append(again)
    with pytest.raises(BadRequest, match="overlap, or claim to be larger than the file"):
        load_model(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(1000))
        archive.infolist()[0].file_size = archive.infolist()[0].compress_size = 10**9
    with pytest.raises(BadRequest, match="overlap, or claim to be larger than the file"):
        load_model(path)


# What a checkpoint says of itself


def without(key):
    return lambda record: record.pop(key)


def within(part, **changes):
    return lambda record: record[part].update(changes)


BAD_RECORDS = [
    (lambda record: record.clear(), "its record lacks format"),
    (within("model", layers=10**7), "layers must be an integer from 1 to 1000, got 10000000"),
    (within("model", windows=10**9), "windows must be .*, got 1000000000"),
    (within("model", width="16"), "model.width must be a whole number, got '16'"),
    (within("model", dropout=float("nan")), "model.dropout must be a finite number, got nan"),
    (within("model", rope_base=1e6), "its model has 'rope_base', which this cxt does not know: a newer cxt wrote it"),
    (lambda record: record["model"].pop("bins"), "its model lacks bins"),
    (lambda record: record.update(format="1"), "its format must be a whole number, got '1'"),
    (lambda record: record.update(format=2), "it has format 2, but this cxt reads formats up to 1; update cxt"),
    (lambda record: record.update(quantised=True), "its record has 'quantised', which this cxt does not know"),
    (without("model"), "its record lacks model"),
    (without("dataset"), "its record lacks dataset"),
    (within("dataset", scales="2 4"), "dataset.scales must be a list, got '2 4'"),
    (within("dataset", scales=[2]), r"dataset.scales must be 2 positive whole numbers, got \[2\]"),
    (within("dataset", ranges={"diversity": [2.0, 1.0]}), r"ranges.diversity must be two numbers, .*, got \[2.0, 1.0\]"),
    (lambda record: record.update(training={"lr": 1e-3}), "its training lacks batch_size"),
    (lambda record: record.update(training="long"), "its training must be a table or null, got 'long'"),
    (lambda record: record.update(parent={"name": "y"}), "its parent lacks sha256"),
    (lambda record: record.update(versions={"torch": 2}), "versions.torch must be text, got 2"),
    (lambda record: record.update(name=torch.ones(3)), "must hold only numbers, text, lists and tables, got a Tensor"),
    (lambda record: record.update(adapter={"samples": 3}), "its adapter lacks bottleneck"),
    (lambda record: record.update(step="3"), "its step must be a whole number or null, got '3'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_RECORDS)
def test_records_that_are_not_understood(change, message, checkpoint, tmp_path):
    about = read_checkpoint(checkpoint)
    record = copy.deepcopy(about.record)
    change(record)
    write_checkpoint(checkpoint, about.state_dict, record)
    readers = [
        load_model,
        describe_checkpoint,
        read_verified_checkpoint,
        lambda path: compare_checkpoints(path, path, rtol=0, atol=0),
    ]
    for read in readers:
        with pytest.raises(BadRequest, match=message):
            read(checkpoint)


def test_records_from_before_a_setting_of_the_network(checkpoint):
    about = read_checkpoint(checkpoint)
    earlier = copy.deepcopy(about.record)
    for key, default in ARCHITECTURE_SINCE_FORMAT_1.items():
        assert earlier["model"].pop(key) == default
    write_checkpoint(checkpoint, about.state_dict, earlier)
    assert read_checkpoint(checkpoint).model == about.model
    load_model(checkpoint)


def test_records_of_other_types(checkpoint):
    weights = read_checkpoint(checkpoint).state_dict
    endless = {}
    endless["training"] = endless
    many = []
    for _ in range(40):
        many = [many, many]
    for record, message in (
        ("broad", "record must be a table, got 'broad'"),
        (3, "record must be a table, got 3"),
        (record_of() | {"training": endless}, "more values than cxt ever writes"),
        (record_of() | {"training": {"a": many}}, "more values than cxt ever writes"),
        (record_of() | {1: 2}, "holds a key that is not text"),
    ):
        checkpoint.write_bytes(pack({"cxt": record, "state_dict": weights}))
        with pytest.raises(BadRequest, match=message):
            describe_checkpoint(checkpoint)


def test_weights_of_other_types(checkpoint):
    about = read_checkpoint(checkpoint)
    name = "backbone.head.weight"
    for value, message in (
        ("text", f"its {name} must be a tensor, got 'text'"),
        (torch.ones(1).expand(10**6, 10**6), "more numbers than the file contains"),
        (torch.ones(22, 16, dtype=torch.int64), "must be a dense tensor of floats, got one of torch.int64"),
        (torch.empty(10**6, 10**6, device="meta"), "must be a dense tensor of floats"),
    ):
        checkpoint.write_bytes(pack({"cxt": about.record, "state_dict": about.state_dict | {name: value}}))
        for read in (load_model, describe_checkpoint):
            with pytest.raises(BadRequest, match=message):
                read(checkpoint)
    checkpoint.write_bytes(pack({"cxt": about.record, "state_dict": [1]}))
    with pytest.raises(BadRequest, match="`state_dict` must be tensors by name, got "):
        describe_checkpoint(checkpoint)


@pytest.mark.parametrize("key", ["global_step", "epoch"])
def test_a_save_without_its_step(key, run):
    state = training_state(6)
    state.pop(key)
    AtomicIO().save_checkpoint(state, run.checkpoints / "step=6.ckpt")
    with pytest.raises(BadRequest, match=f"training state without its {key}"):
        load_model(run.checkpoints / "step=6.ckpt")


def test_weights_are_compared_before_a_network_is_built(checkpoint):
    """Of a size within bounds, and far more than its weights."""
    about = read_checkpoint(checkpoint)
    record = copy.deepcopy(about.record)
    record["model"]["width"] = 64_000  # 4.1e9 weights in one matrix
    write_checkpoint(checkpoint, about.state_dict, record)
    with pytest.raises(BadRequest, match="do not fit this model"):
        load_model(checkpoint)


def test_exports(checkpoint, tmp_path):
    """Whatever bit of the weights is flipped, and what the configuration says of itself."""
    about = read_checkpoint(checkpoint)
    write_export(tmp_path / "x", about.state_dict, about.record)
    assert load_model(tmp_path / "x")
    assert read_checkpoint(tmp_path / "x" / CONFIG).record == about.record
    weights, config = ((tmp_path / "x" / name).read_bytes() for name in (WEIGHTS, CONFIG))
    for bit in range(0, 8 * len(weights), 8 * len(weights) // 50):
        (tmp_path / "x" / WEIGHTS).write_bytes(flipped(weights, bit))
        with pytest.raises(BadRequest, match="is damaged"):
            load_model(tmp_path / "x")
    (tmp_path / "x" / WEIGHTS).write_bytes(weights)
    for changed, message in (
        (config.replace(b"17.0", b"15.0"), "is damaged, or was changed after it was exported"),
        (b"[" * 100_000, "cannot be read"),
        (config.rstrip() + b" " * 10_000_001, "cannot be read: it is larger than 10000000 bytes"),
    ):
        (tmp_path / "x" / CONFIG).write_bytes(changed)
        with pytest.raises(BadRequest, match=message):
            load_model(tmp_path / "x")


# Requests


def test_names_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, message in (
        (None, "must be given by its name or path, got None"),
        ("", "must be given by its name or path, got ''"),
        (3, "must be given by its name or path, got 3"),
        ("a" * 5000, "there is no checkpoint 'aaa.*…': .*too long"),
        ("a\0b", "null byte"),
    ):
        with pytest.raises(BadRequest, match=message) as caught:
            load_model(name)
        assert len(str(caught.value)) < 200
    with pytest.raises(BadRequest, match="no checkpoint 'broad' in"):
        find_checkpoint("broad")


def test_devices(checkpoint):
    for device, message in (("gpu", "device 'gpu': "), (1.5, "device 1.5: "), ("cuda:99", "device cuda:99, but torch sees")):
        with pytest.raises(BadRequest, match=message):
            load_model(checkpoint, device=device)
    if not torch.cuda.is_available():
        with pytest.raises(BadRequest, match="device cuda, but torch sees 0 GPUs; omit device to use the CPU"):
            load_model(checkpoint, device="cuda")


def test_nothing_is_left_behind(tmp_path, monkeypatch, checkpoint):
    """A file that cannot be imported or exported makes no folder."""
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(checkpoint.read_bytes()[:-1])
    for words in (("import", tmp_path / "missing.ckpt"), ("import", damaged), ("import", checkpoint), ("export", damaged)):
        monkeypatch.setattr(sys, "argv", ["checkpoint", *map(str, words), "--out", str(tmp_path / "made" / "x.ckpt")])
        with pytest.raises(BadRequest):
            checkpoint_stage.main()
        assert not (tmp_path / "made").exists()


def test_a_run_goes_on_from_the_save_before(dataset, tmp_path, monkeypatch, capsys):
    """One flipped bit in the newest training state, one in the finished checkpoint: the run ends in the weights that it had."""
    arguments = [
        *SMALL,
        *FINE,
        "--dataset-path",
        dataset,
        "--run-dir",
        tmp_path / "run",
        "--save-every",
        3,
        "--decode-items",
        0,
    ]
    train(monkeypatch, *arguments)
    run = RunDirectory(tmp_path / "run")
    finished, newest = run.finished_checkpoint(), list_training_states(run)[0]
    whole = finished.read_bytes()
    for path in (finished, newest):
        data = path.read_bytes()
        path.write_bytes(flipped(data, 8 * (len(data) // 2)))
    capsys.readouterr()
    train(monkeypatch, *arguments)
    output = capsys.readouterr().out
    assert f"the training state {newest} cannot be read (its content does not match the digest at its end" in output
    assert "continuing from the one before" in output
    assert run.finished_checkpoint().read_bytes() == whole
