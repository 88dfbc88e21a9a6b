"""Exported checkpoints for other programs: a directory of `model.safetensors` and `config.json`.

The weights have the names and types of the checkpoint. The configuration is the checkpoint's record (`model` is the network and
its grid of ln generations, `adapter` the adapter or null), with digests of the weights and of itself.
"""

import json
from pathlib import Path

import torch

from cxt.errors import BadRequest, first_line
from cxt.io import atomic_write, digest, file_sha256, json_text, replace_nan

WEIGHTS, CONFIG = "model.safetensors", "config.json"
LARGEST_CONFIG = 10_000_000


def is_export(directory) -> bool:
    """Whether *directory* holds both files."""
    return all((Path(directory) / name).is_file() for name in (WEIGHTS, CONFIG))


def write_export(directory, state_dict: dict[str, torch.Tensor], record: dict) -> None:
    """Write both files atomically, the configuration last."""
    from safetensors.torch import save

    directory = Path(directory)
    # safetensors does not accept tensors that share memory.
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state_dict.items()}
    atomic_write(directory / WEIGHTS, save(tensors))
    record = replace_nan(record)  # as it is read back
    config = record | {"weights": {"file": WEIGHTS, "sha256": file_sha256(directory / WEIGHTS)}, "digest": digest(record)}
    atomic_write(directory / CONFIG, json_text(config, indent=2).encode())


def read_export(directory) -> tuple[dict[str, torch.Tensor], dict]:
    """Read the weights and the record that `write_export` has written.

    Raises
    ------
    BadRequest
        If a file is missing, damaged or was not written by cxt, or the two do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    directory = Path(directory)
    if not is_export(directory):
        raise BadRequest(f"there is no exported checkpoint in {directory}, which would consist of {WEIGHTS} and {CONFIG}")
    try:
        if (directory / CONFIG).stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it is larger than {LARGEST_CONFIG} bytes")
        record = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise BadRequest(f"{directory / CONFIG} cannot be read: {first_line(error)}") from None
    if not isinstance(record, dict) or not {"format", "model", "adapter", "weights"} <= record.keys():
        raise BadRequest(f"{directory / CONFIG} was not written by `cxt checkpoint export`")
    expected, recorded_digest = record.pop("weights"), record.pop("digest", None)
    if recorded_digest is not None and recorded_digest != digest(record):  # exports of earlier versions have none
        raise BadRequest(f"{directory / CONFIG} is damaged, or was changed after it was exported; export it again")
    if expected != {"file": WEIGHTS, "sha256": file_sha256(directory / WEIGHTS)}:
        raise BadRequest(f"{directory / WEIGHTS} is damaged, or does not belong to {CONFIG}; export both again")
    try:
        return load_file(directory / WEIGHTS), record
    except (SafetensorError, OSError) as error:
        raise BadRequest(f"{directory / WEIGHTS} cannot be read: {first_line(error)}") from None
