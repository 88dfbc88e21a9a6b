"""Checkpoints: trained weights with what is needed to use them; writing, reading, and loading a model by name.

    cxt checkpoint show results/broad.ckpt
    cxt checkpoint verify results/broad.ckpt
    cxt checkpoint diff results/broad.ckpt old/broad.ckpt
    cxt checkpoint import published.ckpt --out broad.ckpt
    cxt checkpoint export broad --out exported

A checkpoint is a torch file with two entries, `state_dict` and `cxt` (plain dicts, lists, numbers and strings), and
loads under `weights_only=True`. The trainer's own saves hold more, and are read as well. So are files of the original
package, as `cxt.checkpoints.published` says, and exported directories.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from cxt.checkpoints.archive import UNREADABLE, opened, packed
from cxt.checkpoints.published import CLASSES, MODULE, is_published, read_published, stand_ins
from cxt.checkpoints.record import check_record, check_tensors, model_record
from cxt.checkpoints.safetensors import CONFIG, WEIGHTS, is_portable, read_portable
from cxt.config.settings import AdapterConfig, ModelConfig
from cxt.errors import BadRequest, first_line, nearest
from cxt.io import atomic_write
from cxt.model.adapter import build_model
from cxt.model.inputs import TrainedOn
from cxt.model.transformer import CoalescenceModel
from cxt.trainer.run_directory import RunDirectory


class Checkpoint(NamedTuple):
    """A checkpoint's weights and what it says of itself."""

    state_dict: dict[str, torch.Tensor]
    model: ModelConfig
    adapter: AdapterConfig | None
    record: dict


def _interned(value):
    """*value* with equal texts being one object: a pickle tells whether they are, and equal checkpoints have equal bytes."""
    if isinstance(value, dict):
        return {_interned(key): _interned(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_interned(child) for child in value]
    return sys.intern(value) if type(value) is str else value


def write_checkpoint(path, state_dict: dict, record: dict) -> None:
    """Write a checkpoint under a temporary name and rename it."""
    tensors = {key: value.detach().cpu() for key, value in state_dict.items()}
    atomic_write(path, packed({"cxt": _interned(record), "state_dict": tensors}))


def _read_torch_file(path):
    """What is in a torch file, without running anything that is pickled in it; BadRequest if it cannot be read so."""
    if not Path(path).is_file():
        raise BadRequest(f"there is no checkpoint {path}")
    try:
        with stand_ins(), opened(path) as file:
            refused = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
            file.seek(0)
            content = None if refused else torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise BadRequest(f"checkpoint {path} cannot be read, it is damaged or not one of cxt's: {first_line(error)}") from None
    if refused:
        raise BadRequest(
            f"checkpoint {path} is refused, nothing in it was run: it holds pickled {', '.join(refused)}, where only "
            f"tensors, plain values and {MODULE}'s {', '.join(CLASSES)} are expected; get the file again from its publisher"
        )
    return content


def read_checkpoint(path) -> Checkpoint:
    """Read a checkpoint, a save of the trainer's, an exported directory by its config.json, or a file of the original package.

    Raises
    ------
    BadRequest
        If the file is missing, damaged, neither cxt's nor of the original package, of a newer format, or holds anything that
        would have to be run to be read.
    """
    content = {}
    if Path(path).name == CONFIG:
        weights, record = read_portable(Path(path).parent)
    else:
        content = _read_torch_file(path)
        if is_published(content):
            weights, network, adapter, more = read_published(content, path)
            return Checkpoint(weights, network, adapter, model_record(network, adapter, **more))
        if not isinstance(content, dict) or "cxt" not in content or "state_dict" not in content:
            raise BadRequest(f"{path} is not a cxt checkpoint: it has no `cxt` entry")
        weights, record = content["state_dict"], content["cxt"]
    try:
        network, adapter, record = check_record(record)
        check_tensors(weights)
        if "pytorch-lightning_version" in content:
            weights = {key.removeprefix("model."): value for key, value in weights.items()}
            for key, name in (("step", "global_step"), ("epoch", "epoch")):
                if type(content.get(name)) is not int:
                    raise BadRequest(f"it is a save of the trainer's without its {name}")
                record[key] = content[name]
    except BadRequest as error:
        raise BadRequest(f"checkpoint {path} cannot be used: {error}") from None
    return Checkpoint(weights, network, adapter, record)


def check_weights(own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], *, source) -> None:
    """BadRequest naming the tensors of *weights* that a network with the state dict *own* cannot take."""
    problems = [f"{key} is missing" for key in own if key not in weights]
    problems += [f"{key} is not in this model" for key in weights if key not in own]
    problems += [
        f"{key} has shape {tuple(weights[key].shape)}, expected {tuple(value.shape)}"
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if problems:
        shown = "\n  ".join(problems[:8]) + (f"\n  … and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise BadRequest(f"the weights of {source} do not fit this model:\n  {shown}")


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], *, source) -> None:
    """Load *weights* into *model*, all of them and nothing else; BadRequest names the tensors that do not fit."""
    check_weights(model.state_dict(), weights, source=source)
    model.load_state_dict(weights)


def model_of(checkpoint: Checkpoint, *, source) -> CoalescenceModel:
    """The network of a checkpoint with its weights; BadRequest if they do not fit, before memory is taken for it."""
    with torch.device("meta"):
        described = build_model(checkpoint.model, checkpoint.adapter).state_dict()
    check_weights(described, checkpoint.state_dict, source=source)
    model = build_model(checkpoint.model, checkpoint.adapter)
    model.load_state_dict(checkpoint.state_dict)
    data = checkpoint.record["dataset"]
    model.trained_on = TrainedOn(scales=tuple(data["scales"]), ranges=data.get("ranges") or {})
    return model


def checkpoint_directories() -> list[Path]:
    """Where `load_model` looks for a name, in order."""
    directories = [Path("results"), Path.home() / ".cache" / "cxt" / "checkpoints"]
    if os.environ.get("CXT_CHECKPOINT_CACHE"):
        directories.insert(0, Path(os.environ["CXT_CHECKPOINT_CACHE"]))
    return directories


def _checkpoint_of_run(path: Path, *, best: bool) -> Path:
    """The best, else the last weights of a run directory."""
    run = RunDirectory(path)
    if best and run.best.is_file():
        return run.best
    finished = run.finished_checkpoint()
    if finished is None and (run.state() or {}).get("finished"):
        print(f"note: the finished checkpoint of {path} is gone or damaged, taking the last save", file=sys.stderr)
    for file in (finished, run.last):
        if file is not None and file.is_file():
            if best:
                print(f"note: {path} has no best weights yet, taking {file.name}", file=sys.stderr)
            return file
    raise BadRequest(f"{path} has saved nothing yet")


def _path_of(name_or_path) -> Path:
    """A name or path as a Path; BadRequest if it can be neither."""
    if not isinstance(name_or_path, str | os.PathLike) or not os.fspath(name_or_path):
        raise BadRequest(f"no checkpoint is called {name_or_path!r}: expected the name or the path of one")
    path = Path(name_or_path)
    try:
        os.stat(path)
    except (OSError, ValueError) as error:  # it need not be there as a path, but must be able to
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            shown = str(path) if len(str(path)) <= 60 else f"{str(path)[:57]}…"
            raise BadRequest(f"no checkpoint is called {shown!r}: {getattr(error, 'strerror', None) or error}") from None
    return path


def find_checkpoint(name_or_path, *, best: bool = False) -> Path:
    """The file of a checkpoint given by name, by path, or by the run directory or the exported directory that it is in.

    Of a run directory, the finished weights or else the last save; with *best*, those of the lowest validation loss. Of an
    exported directory, its config.json, which knows its weights by digest. A name is looked up as `<name>.ckpt` in
    $CXT_CHECKPOINT_CACHE, then `results/`, then `~/.cache/cxt/checkpoints`.

    Raises
    ------
    BadRequest
        If there is none; it says where was looked and what is there.
    """
    path = _path_of(name_or_path)
    if (path / "run.json").is_file():
        return _checkpoint_of_run(path, best=best)
    directory = path.parent if path.name == WEIGHTS else path
    if is_portable(directory):
        return directory / CONFIG
    if path.suffix == ".ckpt" or len(path.parts) > 1:
        if path.is_file():
            return path
        raise BadRequest(f"there is no checkpoint {path}")
    directories = checkpoint_directories()
    for directory in directories:
        if (directory / f"{path}.ckpt").is_file():
            return directory / f"{path}.ckpt"
    there = {file.stem for directory in directories for file in directory.glob("*.ckpt")}
    raise BadRequest(f"no checkpoint '{path}' in {', '.join(map(str, directories))}{nearest(str(path), there)}")


def load_model(name_or_path, *, device="cpu", best: bool = False) -> CoalescenceModel:
    """A trained model, in eval mode.

    Parameters
    ----------
    name_or_path : name such as "broad", looked up as `find_checkpoint` says, or path of a `.ckpt` file (one of the original
        package, too), a run directory, or an exported directory
    device : torch device to put it on
    best : of a run directory, the weights of the lowest validation loss instead of the last

    Returns
    -------
    CoalescenceModel
        ``forward(X, y)`` takes log1p counts (B, 2, scales, windows, samples) and tokens (B, windows + 1) and returns
        logits (B, windows, vocabulary); ``generate(X, window_size=…)`` decodes. Its ``trained_on`` holds the ranges of the
        data that it was trained on, where its file has them; of a fine-tuned model, those of its own dataset.

    Raises
    ------
    BadRequest
        If there is no such checkpoint, it is damaged or has weights that are not finite, or torch cannot use *device*.
    """
    device = _device_of(device)
    path = find_checkpoint(name_or_path, best=best)
    model = model_of(read_checkpoint(path), source=path).eval()
    if bad := [key for key, value in model.state_dict().items() if not torch.isfinite(value).all()]:
        raise BadRequest(f"checkpoint {path} has weights that are not finite: {bad[0]}; train it again, or get another copy")
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # a torch without it
        raise BadRequest(f"device {device}: {first_line(error)}") from None


def _device_of(device) -> torch.device:
    """A torch device by its name; BadRequest if there is none, or no such GPU."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BadRequest(f"device {device!r}: {first_line(error)}") from None
    present = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= present:
        has = f"torch sees {present} GPU{'' if present == 1 else 's'}"
        raise BadRequest(f"device {found}, but {has}; leave device out to use the CPU")
    return found
