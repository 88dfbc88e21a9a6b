"""Checkpoints: trained weights with what is needed to use them; writing, reading, and loading a model by name.

    python -m cxt.checkpoint show results/broad.ckpt
    python -m cxt.checkpoint verify results/broad.ckpt
    python -m cxt.checkpoint diff results/broad.ckpt old/broad.ckpt

A checkpoint is a torch file with two entries, `state_dict` and `cxt` (plain dicts, lists, numbers and strings), and
loads under `weights_only=True`. The trainer's own saves hold more, and are read as well.
"""

import argparse
import dataclasses
import io
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from cxt.adapter import build_model
from cxt.config import AdapterConfig, ModelConfig
from cxt.errors import BadRequest, Failed, exit_on_bad_request, first_line, nearest
from cxt.files import atomic_write
from cxt.model import CoalescenceModel
from cxt.rundir import RunDirectory

FORMAT = 1


class Checkpoint(NamedTuple):
    """A checkpoint's weights and what it says of itself."""

    state_dict: dict[str, torch.Tensor]
    model: ModelConfig
    adapter: AdapterConfig | None
    record: dict


def model_record(config: ModelConfig, adapter: AdapterConfig | None, **more) -> dict:
    """The `cxt` entry of a checkpoint: the network's configuration, and *more* of its history."""
    return {
        "format": FORMAT,
        "model": dataclasses.asdict(config),
        "adapter": None if adapter is None else dataclasses.asdict(adapter),
        **more,
    }


def write_checkpoint(path, state_dict: dict, record: dict) -> None:
    """Write a checkpoint under a temporary name and rename it."""
    out = io.BytesIO()
    torch.save({"cxt": record, "state_dict": {key: value.detach().cpu() for key, value in state_dict.items()}}, out)
    atomic_write(path, out.getvalue())


def read_checkpoint(path) -> Checkpoint:
    """Read a checkpoint, or one of the trainer's saves.

    Raises
    ------
    BadRequest
        If the file is missing, damaged, not one of cxt's, or of a newer format.
    """
    if not Path(path).is_file():
        raise BadRequest(f"there is no checkpoint {path}")
    if not zipfile.is_zipfile(path):
        raise BadRequest(f"checkpoint {path} cannot be read, it is damaged or not one of cxt's: not a zip archive")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        reason = first_line(error)
        raise BadRequest(f"checkpoint {path} cannot be read, it is damaged or not one of cxt's: {reason}") from None
    if not isinstance(content, dict) or "cxt" not in content or "state_dict" not in content:
        raise BadRequest(f"{path} is not a cxt checkpoint: it has no `cxt` entry")
    record = content["cxt"]
    if record["format"] > FORMAT:
        raise BadRequest(f"checkpoint {path} has format {record['format']}, this cxt reads up to {FORMAT}; update cxt")
    weights = content["state_dict"]
    if "pytorch-lightning_version" in content:
        weights = {key.removeprefix("model."): value for key, value in weights.items()}
        record = record | {"step": content["global_step"], "epoch": content["epoch"]}
    adapter = record["adapter"]
    return Checkpoint(weights, ModelConfig(**record["model"]), None if adapter is None else AdapterConfig(**adapter), record)


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], *, source) -> None:
    """Load *weights* into *model*, all of them and nothing else; BadRequest names the tensors that do not fit."""
    own = model.state_dict()
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
    model.load_state_dict(weights)


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
    for file in (run.finished_checkpoint(), run.last):
        if file is not None and file.is_file():
            if best:
                print(f"note: {path} has no best weights yet, taking {file.name}", file=sys.stderr)
            return file
    raise BadRequest(f"{path} has saved nothing yet")


def find_checkpoint(name_or_path, *, best: bool = False) -> Path:
    """The file of a checkpoint given by name, by path, or by the run directory that it is in.

    Of a run directory, the finished weights or else the last save; with *best*, those of the lowest validation loss. A name
    is looked up as `<name>.ckpt` in $CXT_CHECKPOINT_CACHE, then `results/`, then `~/.cache/cxt/checkpoints`.

    Raises
    ------
    BadRequest
        If there is none; it says where was looked and what is there.
    """
    path = Path(name_or_path)
    if (path / "run.json").is_file():
        return _checkpoint_of_run(path, best=best)
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
    name_or_path : name such as "broad", looked up as `find_checkpoint` says, or path of a `.ckpt` file or a run directory
    device : torch device to put it on
    best : of a run directory, the weights of the lowest validation loss instead of the last

    Returns
    -------
    CoalescenceModel
        ``forward(X, y)`` takes log1p counts (B, 2, scales, windows, samples) and tokens (B, windows + 1) and returns
        logits (B, windows, vocabulary); ``generate(X)`` decodes.

    Raises
    ------
    BadRequest
        If there is no such checkpoint, or it is damaged.
    """
    path = find_checkpoint(name_or_path, best=best)
    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint.model, checkpoint.adapter)
    load_weights(model, checkpoint.state_dict, source=path)
    return model.to(device).eval()


def main() -> None:
    from cxt.inspection import diff, show, verify

    parser = argparse.ArgumentParser(
        prog="python -m cxt.checkpoint", description="Look at checkpoints, check them, compare them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("show", help="what a checkpoint is: network, training, dataset, parent, lineage")
    command.add_argument("checkpoint", help="name, file or run directory")
    command = commands.add_parser("verify", help="whether it is whole, and what the configuration asks for; exit 1 if not")
    command.add_argument("checkpoint", help="name, file or run directory")
    command.add_argument("--configfile", nargs="+", default=[], help="overlays over the default configuration")
    command = commands.add_parser("diff", help="the worst differing tensor of two, and what else differs; exit 1 if not close")
    command.add_argument("checkpoint", help="name, file or run directory")
    command.add_argument("other", help="name, file or run directory")
    command.add_argument("--rtol", type=float, default=1e-5, help="relative tolerance (default 1e-5)")
    command.add_argument("--atol", type=float, default=1e-6, help="absolute tolerance (default 1e-6)")
    args = parser.parse_args()
    path = find_checkpoint(args.checkpoint)
    if args.command == "show":
        print(show(path))
    elif args.command == "verify":
        print(verify(path, configfiles=args.configfile))
    else:
        close, text = diff(path, find_checkpoint(args.other), rtol=args.rtol, atol=args.atol)
        print(text)
        if not close:
            raise Failed("")


if __name__ == "__main__":
    exit_on_bad_request(main)
