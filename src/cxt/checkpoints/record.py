"""The record of a checkpoint, which describes its network and training, and checks of records that are read.

Files come from other versions and other people. After `check_record`, every key is present and of the right type, sizes are
bounded, and the two configurations can be built, so that readers need no further checks.
"""

import math
from typing import get_args

import torch

from cxt.config.learning import Objective
from cxt.config.network import AdapterConfig, LoraConfig, ModelConfig
from cxt.config.training import ARCHITECTURE_SINCE_FORMAT_1
from cxt.errors import BadRequest

FORMAT = 1

TEXT, NUMBER, WHOLE, FLAG, TABLE, LIST = (str,), (int, float), (int,), (bool,), (dict,), (list,)
NONE = type(None)

RECORD_KEYS = {
    "format": WHOLE, "model": TABLE, "adapter": (dict, NONE), "lora": (dict, NONE),
    "name": (str, NONE), "preset": (str, NONE), "lineage": (str, NONE),
    "training": (dict, NONE), "dataset": TABLE, "parent": (dict, NONE), "teacher": TABLE, "versions": TABLE,
    "published": TABLE, "quantization": TABLE, "accelerator": (str, NONE), "devices": (int, NONE), "precision": (str, NONE),
    "threads": (int, NONE),
    "processor": (str, NONE), "step": (int, NONE), "epoch": (int, NONE), "val_loss": NUMBER,
}  # fmt: skip
"""The keys of a record, with the types of their values."""

TABLE_KEYS = {
    "training": {"batch_size": WHOLE, "grad_accum": WHOLE, "epochs": WHOLE, "lr": NUMBER, "seed": WHOLE},
    "dataset": {"scales": LIST, "missing": FLAG},
    "parent": {"name": (str, NONE), "sha256": (str, NONE)},
    "published": {"file": TEXT, "sha256": TEXT, "hyper_parameters": TABLE},
    "quantization": {"bits": WHOLE, "source": TEXT, "lineage": (str, NONE)},
}  # fmt: skip
"""Required keys of a record's tables, with the types of their values; tables may have more keys."""

OPTIONAL_DATASET_KEYS = {
    "window_size": (int, NONE), "sequence_length": (int, float, NONE), "samples": (int, NONE), "sha256": (str, NONE),
    "simulated": (list, NONE), "ranges": (dict, NONE),
}  # fmt: skip
"""Keys that a record's dataset may lack, in files of earlier versions."""

LARGEST_SIZES = {
    "layers": 1000, "heads": 1000, "width": 100_000, "windows": 100_000, "samples": 100_000, "scales": 1000, "bins": 1_000_000,
    "window_size": 10**9, "bottleneck": 100_000, "rank": 100_000,
}  # fmt: skip
"""Bounds far above any real network, so that a damaged file cannot allocate unlimited memory."""

QUANTIZATION_BITS = 8
"""Bits of a weight in a quantised checkpoint."""

MAX_VALUES = 100_000
"""Largest number of values in a record, including those in tables and lists; one that contains itself would be endless."""


def build_checkpoint_record(config: ModelConfig, adapter: AdapterConfig | None, **more) -> dict:
    """The `cxt` entry of a checkpoint: the configuration of the network, and *more* entries about its history."""
    return {
        "format": FORMAT,
        "model": config.model_dump(),
        "adapter": None if adapter is None else adapter.model_dump(),
        **more,
    }


def check_plain(value, *, what: str) -> None:
    """BadRequest unless *value* consists of tables with text keys, lists, numbers and text, and not too many of them."""
    remaining, count = [(value, 0)], 0
    while remaining:
        value, depth = remaining.pop()
        count += 1
        if count > MAX_VALUES or depth > 50:
            raise BadRequest(f"{what} holds more values than cxt ever writes")
        if type(value) is dict:
            if not all(type(key) is str for key in value):
                raise BadRequest(f"{what} holds a key that is not text")
            remaining += [(child, depth + 1) for child in value.values()]
        elif type(value) is list:
            remaining += [(child, depth + 1) for child in value]
        elif type(value) is int and value.bit_length() > 4096:
            raise BadRequest(f"{what} holds a number of {value.bit_length()} bits")
        elif not (value is None or type(value) in (str, int, float, bool)):
            raise BadRequest(f"{what} must hold only numbers, text, lists and tables, got a {type(value).__name__}")


def _has_type(value, types: tuple) -> bool:
    return type(value) in types or (value is None and NONE in types)


def _describe_types(types: tuple) -> str:
    named = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a table", list: "a list"}
    return "a number" if types == NUMBER else " or ".join(named.get(kind, "null") for kind in types)


def _format_value(value) -> str:
    """Format a value for a message, shortened if it is long."""
    if isinstance(value, list) and len(value) <= 20:
        return f"[{', '.join(_format_value(child) if isinstance(child, int | float | str) else '…' for child in value)}]"
    if value is not None and not isinstance(value, str | int | float):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    return repr(value) if len(str(value)) <= 60 else repr(str(value)[:57] + "…")


def _check_types(table: dict, expected: dict, *, within: str) -> None:
    for key, types in expected.items():
        if key in table and not _has_type(table[key], types):
            raise BadRequest(f"its {within}{key} must be {_describe_types(types)}, got {_format_value(table[key])}")


def _check_known(table: dict, known_keys, *, within: str) -> None:
    if unknown := sorted(key for key in table if key not in known_keys):
        raise BadRequest(
            f"its {within.rstrip('.') or 'record'} has {', '.join(map(_format_value, unknown[:5]))}, which this cxt does not "
            "know: a newer cxt wrote it; update cxt"
        )


def _check_required(table: dict, expected, *, within: str) -> None:
    if lacking := [key for key in expected if key not in table]:
        raise BadRequest(f"its {within.rstrip('.') or 'record'} lacks {', '.join(lacking)}")


def _build_configuration(kind, table: dict, *, within: str):
    """Build the ModelConfig, AdapterConfig or LoraConfig described by a table of a record."""
    accepted = {int: WHOLE, float: NUMBER, bool: (bool,)}
    fields = {name: accepted.get(field.annotation, TEXT) for name, field in kind.model_fields.items()}
    _check_known(table, fields, within=within)
    _check_required(table, fields, within=within)
    _check_types(table, fields, within=within)
    for key, value in table.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BadRequest(f"its {within}{key} must be a finite number, got {value}")
    configuration = kind(**table)
    check_sizes(configuration)
    return configuration


def check_sizes(configuration: ModelConfig | AdapterConfig | LoraConfig) -> None:
    """BadRequest for sizes that no real network has, before memory is allocated."""
    for name, value in configuration:
        largest = LARGEST_SIZES.get(name)
        if largest is not None and not 0 <= value <= largest:
            raise BadRequest(f"its {name} must be from 0 to {largest}, got {_format_value(value)}")
    if isinstance(configuration, ModelConfig) and not configuration.grid_low < configuration.grid_high:
        raise BadRequest(f"its grid_low must be below grid_high ({configuration.grid_high}), got {configuration.grid_low}")
    if isinstance(configuration, AdapterConfig) and (configuration.bottleneck < 1 or not 0 <= configuration.dropout < 1):
        raise BadRequest(
            f"its adapter must have a positive bottleneck and a dropout in [0, 1), got {configuration.bottleneck} and "
            f"{configuration.dropout}"
        )


def _check_ranges(ranges: dict) -> None:
    for name, pair in ranges.items():
        numbers = type(pair) is list and len(pair) == 2 and all(_has_type(value, NUMBER) for value in pair)
        if pair is not None and not (numbers and -math.inf < pair[0] <= pair[1] < math.inf):
            raise BadRequest(f"its dataset.ranges.{name} must be two numbers, the smaller first, got {_format_value(pair)}")


def _check_regions(training: dict) -> None:
    _check_types(training, {"regions": TABLE}, within="training.")
    regions = training.get("regions", {})
    _check_types(regions, {"shortest": WHOLE, "pack": FLAG, "carry": FLAG}, within="training.regions.")
    if (shortest := regions.get("shortest", 0)) < 0:
        raise BadRequest(f"its training.regions.shortest must not be negative, got {_format_value(shortest)}")


def check_record(record) -> tuple[ModelConfig, AdapterConfig | None, LoraConfig | None, dict]:
    """Check a record; return network, adapter, LoRA, and the record with None for keys that an earlier version's file lacks.

    Raises
    ------
    BadRequest
        If it is of a newer format, has an unknown key, lacks a required one, or a value is of the wrong type or size. The
        message names the key but not the file, which the caller adds.
    """
    if type(record) is not dict:
        raise BadRequest(f"its `cxt` record must be a table, got {_format_value(record)}")
    check_plain(record, what="its `cxt` record")
    _check_required(record, ("format",), within="")
    _check_types(record, {"format": WHOLE}, within="")
    if record["format"] > FORMAT:
        raise BadRequest(f"it has format {record['format']}, but this cxt reads formats up to {FORMAT}; update cxt")
    _check_known(record, RECORD_KEYS, within="")
    _check_required(record, ("model", "adapter", "dataset"), within="")
    _check_types({"versions": {}} | record, RECORD_KEYS, within="")
    record = dict.fromkeys(("name", "preset", "lineage", "training", "parent", "versions", "step", "epoch")) | record
    record["versions"] = record["versions"] or {}
    for part, expected in TABLE_KEYS.items():
        if record.get(part) is not None:
            _check_required(record[part], expected, within=f"{part}.")
            _check_types(record[part], expected, within=f"{part}.")
    if record["training"] is not None:
        machine = {"accelerator": TEXT, "devices": WHOLE, "precision": TEXT, "threads": WHOLE}
        _check_required(record, machine, within="")
        _check_types(record, machine, within="")
        if (objective := record["training"].get("objective", "autoregressive")) not in get_args(Objective):
            raise BadRequest(
                f"its training.objective must be one of {', '.join(get_args(Objective))}, got {_format_value(objective)}; "
                "update cxt if the file is newer"
            )
        _check_regions(record["training"])
        if type(bits := record["training"].get("quantized_bits", 0)) is not int or bits not in (0, *range(2, 9)):
            raise BadRequest(f"its training.quantized_bits must be 0 or from 2 to 8, got {_format_value(bits)}")
    if "quantization" in record:
        _check_known(record["quantization"], TABLE_KEYS["quantization"], within="quantization.")
        if record["quantization"]["bits"] != QUANTIZATION_BITS:
            bits = _format_value(record["quantization"]["bits"])
            raise BadRequest(f"its quantization.bits must be {QUANTIZATION_BITS}, got {bits}; update cxt if the file is newer")
    _check_types(record["versions"], dict.fromkeys(record["versions"], TEXT), within="versions.")
    record["model"] = ARCHITECTURE_SINCE_FORMAT_1 | record["model"]
    network = _build_configuration(ModelConfig, record["model"], within="model.")
    adapter = None if record["adapter"] is None else _build_configuration(AdapterConfig, record["adapter"], within="adapter.")
    lora = _build_lora(record)
    _check_types(record["dataset"], OPTIONAL_DATASET_KEYS, within="dataset.")
    record["dataset"] = dict.fromkeys(OPTIONAL_DATASET_KEYS) | record["dataset"]
    scales = record["dataset"]["scales"]
    if len(scales) != network.scales or not all(_has_type(scale, WHOLE) and 0 < scale <= 10**6 for scale in scales):
        raise BadRequest(f"its dataset.scales must be {network.scales} positive whole numbers, got {_format_value(scales)}")
    if not all(_has_type(name, TEXT) for name in record["dataset"]["simulated"] or []):
        raise BadRequest("its dataset.simulated must be a list of names")
    _check_ranges(record["dataset"]["ranges"] or {})
    return network, adapter, lora, record


def _build_lora(record: dict) -> LoraConfig | None:
    """The LoRA of a record; BadRequest unless its base can be identified, by a name without directories and a digest."""
    if record.get("lora") is None:
        return None
    parent = record["parent"] or {}
    if record["adapter"] is not None or not all(parent.get(key) for key in ("name", "sha256")):
        raise BadRequest("its lora needs a parent with a name and a sha256, and no adapter")
    if "/" in parent["name"] or "\0" in parent["name"]:
        raise BadRequest(f"its parent.name must be a name without directories, got {_format_value(parent['name'])}")
    return _build_configuration(LoraConfig, record["lora"], within="lora.")


def check_tensors(weights, *, within: str = "") -> None:
    """BadRequest unless *weights* are tensors by name, of floating-point numbers that are all stored in the file.

    They are the weights, or what *within* says.
    """
    entry = "scales" if within else "state_dict"
    if not isinstance(weights, dict):
        raise BadRequest(f"its `{entry}` must be tensors by name, got {_format_value(weights)}")
    for key, value in weights.items():
        if type(key) is not str:
            raise BadRequest(f"its `{entry}` must have text as keys, got {_format_value(key)}")
        if not isinstance(value, torch.Tensor):
            raise BadRequest(f"its {within}{key} must be a tensor, got {_format_value(value)}")
        is_dense = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not (is_dense and value.is_floating_point()):
            raise BadRequest(
                f"its {within}{key} must be a dense tensor of floats, got one of {value.dtype} ({value.layout}, {value.device})"
            )
        _check_stored(f"{within}{key}", value)


def _check_stored(name: str, value: torch.Tensor) -> None:
    # A tensor of any size can be a view of a single stored number.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise BadRequest(f"its {name} claims shape {tuple(value.shape)}, more numbers than the file contains")


def restore_matrices(weights: dict, scales) -> dict[str, torch.Tensor]:
    """The weights of a quantised checkpoint as floats, given its `state_dict` and `scales`.

    Raises
    ------
    BadRequest
        Unless every matrix is of int8 and has float32 scales, one positive number for each row, and nothing else has.
    """
    if not isinstance(weights, dict):
        raise BadRequest(f"its `state_dict` must be tensors by name, got {_format_value(weights)}")
    check_tensors(scales, within="scales of ")
    restored = dict(weights)
    for name in scales:
        value, scale = weights.get(name), scales[name]
        if (
            not isinstance(value, torch.Tensor)
            or value.dtype != torch.int8
            or value.layout is not torch.strided
            or value.ndim != 2
        ):
            raise BadRequest(f"its {name} has scales, but is not a matrix of int8")
        _check_stored(name, value)
        if scale.dtype != torch.float32 or scale.shape != (len(value), 1):
            raise BadRequest(f"its scales of {name} must be {len(value)} float32 numbers, one for each row")
        if not (torch.isfinite(scale).all() and (scale > 0).all()):
            raise BadRequest(f"its scales of {name} must be finite and positive")
        restored[name] = value * scale
    matrices = [name for name, value in weights.items() if isinstance(value, torch.Tensor) and value.ndim == 2]
    if without := [name for name in matrices if name not in scales]:
        raise BadRequest(f"it is quantised, but has no scales of {without[0]}")
    return restored
