"""Checkpoint files: trained weights together with everything needed to use them.

    cxt checkpoint show results/broad.ckpt
    cxt checkpoint verify results/broad.ckpt
    cxt checkpoint diff results/broad.ckpt old/broad.ckpt
    cxt checkpoint import published.ckpt --out broad.ckpt
    cxt checkpoint import --dir published --out imported
    cxt checkpoint verify --dir results
    cxt checkpoint export broad --out exported
    cxt checkpoint merge results/lora.ckpt merged.ckpt
    cxt checkpoint quantize broad broad-int8.ckpt

A checkpoint is a torch file with two entries, `state_dict` and `cxt` (plain dicts, lists, numbers and strings), which
loads under `weights_only=True`. That of a LoRA holds only its matrices (see `cxt.checkpoints.lora`). Training states, which
hold more, files of the original package (see `cxt.checkpoints.published`) and exported directories can be read as well.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch

from cxt.checkpoints.archive import UNREADABLE, open_verified, pack
from cxt.checkpoints.published import CLASSES, MODULE, allow_published_classes, is_published, read_published
from cxt.checkpoints.record import build_checkpoint_record, check_record, check_tensors, restore_matrices
from cxt.checkpoints.safetensors import CONFIG, read_export
from cxt.config.network import AdapterConfig, LoraConfig, ModelConfig
from cxt.config.regions import RegionPlan, Regions
from cxt.errors import BadRequest, first_line
from cxt.io import atomic_write, check_writable
from cxt.model.adapter import build_model
from cxt.model.inputs import TrainedOn
from cxt.model.parametrizations import select_published_tensors
from cxt.model.transformer import CoalescenceModel


class Checkpoint(NamedTuple):
    """A checkpoint's weights, network configuration and record.

    The weights of a quantised one are floats here, too. With *lora*, they are its low-rank matrices only.
    """

    state_dict: dict[str, torch.Tensor]
    model: ModelConfig
    adapter: AdapterConfig | None
    record: dict
    lora: LoraConfig | None = None


def _intern_strings(value):
    """*value* with equal strings as one object: pickle distinguishes these, and equal checkpoints must have equal bytes."""
    if isinstance(value, dict):
        return {_intern_strings(key): _intern_strings(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_intern_strings(child) for child in value]
    return sys.intern(value) if type(value) is str else value


def write_checkpoint(path, state_dict: dict, record: dict, *, scales: dict | None = None) -> None:
    """Write a checkpoint atomically, with what it holds of the network's state dict.

    *scales* are those of a quantised one, whose matrices are integers, see `cxt.checkpoints.quantized`.
    """
    published = _select_published(state_dict, record) if scales is None else state_dict
    tensors = {key: value.detach().cpu() for key, value in published.items()}
    more = {} if scales is None else {"scales": scales}
    atomic_write(path, pack({"cxt": _intern_strings(record), "state_dict": tensors} | more))


def _select_published(state_dict: dict[str, torch.Tensor], record: dict) -> dict[str, torch.Tensor]:
    if not any(".parametrizations." in str(key) for key in state_dict):
        return state_dict
    bits = (record.get("training") or {}).get("quantized_bits", 0)
    return select_published_tensors(state_dict, has_lora=record.get("lora") is not None, bits=bits)


def _read_torch_file(path):
    """Read a torch file without executing pickled code; BadRequest if that is not possible."""
    if not Path(path).is_file():
        raise BadRequest(f"there is no checkpoint {path}")
    try:
        with allow_published_classes(), open_verified(path) as file:
            refused = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
            file.seek(0)
            content = None if refused else torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise BadRequest(
            f"checkpoint {path} cannot be read, it is damaged or not a checkpoint of cxt: {first_line(error)}"
        ) from None
    if refused:
        raise BadRequest(
            f"checkpoint {path} is refused, and no code in it was executed: it contains pickled {', '.join(refused)}, but may "
            f"contain only tensors, plain values and {MODULE}'s {', '.join(CLASSES)}; get the file again from its publisher"
        )
    return content


def read_checkpoint(path) -> Checkpoint:
    """Read a checkpoint, a training state, an exported directory by its config.json, or a file of the original package.

    Raises
    ------
    BadRequest
        If the file is missing, damaged, of another program, of a newer format, or contains code that would have to be executed
        to read it.
    """
    content = {}
    if Path(path).name == CONFIG:
        weights, record = read_export(Path(path).parent)
    else:
        content = _read_torch_file(path)
        if is_published(content):
            weights, network, adapter, more = read_published(content, path)
            return Checkpoint(weights, network, adapter, build_checkpoint_record(network, adapter, **more))
        if not isinstance(content, dict) or "cxt" not in content or "state_dict" not in content:
            raise BadRequest(f"{path} is not a cxt checkpoint: it has no `cxt` entry")
        weights, record = content["state_dict"], content["cxt"]
    try:
        network, adapter, lora, record = check_record(record)
        if "scales" in content and "quantization" not in record:
            raise BadRequest("it has scales, but its record does not say that it is quantised")
        if "quantization" in record and Path(path).name != CONFIG:  # an export has floats
            weights = restore_matrices(weights, content.get("scales"))
        check_tensors(weights)
        if "pytorch-lightning_version" in content:
            weights = {  # an objective may have parameters of its own
                key.removeprefix("model."): value for key, value in weights.items() if not key.startswith("objective.")
            }
            weights = _select_published(weights, record)
            for key, name in (("step", "global_step"), ("epoch", "epoch")):
                if type(content.get(name)) is not int:
                    raise BadRequest(f"it is a training state without its {name}")
                record[key] = content[name]
    except BadRequest as error:
        raise BadRequest(f"checkpoint {path} cannot be used: {error}") from None
    return Checkpoint(weights, network, adapter, record, lora)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type in which most of a checkpoint's numbers are stored; that of a quantised one is float32."""
    sizes: dict[torch.dtype, int] = {}
    for value in checkpoint.state_dict.values():
        sizes[value.dtype] = sizes.get(value.dtype, 0) + value.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def check_weights(expected: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], *, name) -> None:
    """Raise BadRequest naming the tensors of *weights* that do not fit the state dict *expected*."""
    problems = [f"{key} is missing" for key in expected if key not in weights]
    problems += [f"{key} is not in this model" for key in weights if key not in expected]
    problems += [
        f"{key} must have shape {tuple(value.shape)}, got {tuple(weights[key].shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if problems:
        listed = "\n  ".join(problems[:8]) + (f"\n  … and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise BadRequest(f"the weights of {name} do not fit this model:\n  {listed}")


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], *, name) -> None:
    """Load *weights* into *model*, strictly; BadRequest names the tensors that do not fit."""
    check_weights(model.state_dict(), weights, name=name)
    model.load_state_dict(weights)


def build_checkpoint_model(checkpoint: Checkpoint, *, name, windows: int | None = None) -> CoalescenceModel:
    """Build the network of a checkpoint with its weights; BadRequest if they do not fit, before memory is allocated for it.

    It reads regions of *windows* windows; by default, those of the checkpoint.
    """
    with torch.device("meta"):
        described = build_model(checkpoint.model, checkpoint.adapter).state_dict()
    check_weights(described, checkpoint.state_dict, name=name)
    network = checkpoint.model if windows is None else checkpoint.model.replace(windows=windows)
    model = build_model(network, checkpoint.adapter)
    model.load_state_dict(checkpoint.state_dict)
    data, training, plan = checkpoint.record["dataset"], checkpoint.record["training"] or {}, find_region_plan(checkpoint)
    model.trained_on = TrainedOn(
        scales=tuple(data["scales"]),
        ranges=data.get("ranges") or {},
        windows=(plan.shortest, plan.longest),
    )
    model.precision = checkpoint.record.get("precision") or "32-true"
    model.objective = training.get("objective", "autoregressive")
    model.carries_bin = training.get("regions", {}).get("carry", False)
    return model


def find_region_plan(checkpoint: Checkpoint) -> RegionPlan:
    """The lengths of the regions that a checkpoint was trained on."""
    windows, length = checkpoint.model.windows, checkpoint.record["dataset"].get("sequence_length")
    regions = (checkpoint.record["training"] or {}).get("regions", {})
    shortest = min(regions.get("shortest", 0), windows)
    whole = length // checkpoint.model.window_size if isinstance(length, int) else windows
    return RegionPlan(whole, windows, Regions(shortest=shortest, pack=bool(shortest and regions.get("pack"))))


def is_published_file(path) -> bool:
    """Whether a torch file is one of the original package; BadRequest if it cannot be read."""
    return is_published(_read_torch_file(path))


def import_published(path, out, *, name: str | None = None) -> None:
    """Write the file *path* of the original package as a checkpoint of cxt, *out*.

    *name* is the name of the model in the checkpoint; by default, the file name up to `_epoch=`.

    Raises
    ------
    BadRequest
        If *path* is not such a file, or *out* cannot be written.
    """
    content = _read_torch_file(path)
    if not is_published(content):
        is_checkpoint = isinstance(content, dict) and "cxt" in content
        if is_checkpoint:
            raise BadRequest(f"{path} is already a checkpoint of cxt; use it as it is")
        keys = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
        raise BadRequest(
            f"{path} is not a file of the original package: expected what Lightning saves, with hyper_parameters and "
            f"state_dict, found {keys or 'nothing'}. Weights of other code cannot be imported"
        )
    if Path(out).exists() and Path(out).samefile(path):
        raise BadRequest(f"--out {out} is the file to import; choose another name for the checkpoint")
    weights, network, adapter, more = read_published(content, path)
    check_writable(out)
    write_checkpoint(out, weights, build_checkpoint_record(network, adapter, **more | ({} if name is None else {"name": name})))
