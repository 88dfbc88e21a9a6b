"""Quantised checkpoints: every matrix as int8 with a scale for each row, a quarter of the size.

    cxt checkpoint quantize results/broad.ckpt broad-int8.ckpt

The file has one more entry than others, `scales`, with the scales of every matrix in `state_dict`, and its record has a table
`quantization` with the sha256 of its source. Readers get the rounded weights as float32, so that everything that uses a
checkpoint can use it; vectors (layer norms, biases) are stored as they are. It cannot be trained from. Its record has no
lineage, because it is not the checkpoint that a workflow plans.
"""

from pathlib import Path

import torch

from cxt.checkpoints.file import write_checkpoint
from cxt.checkpoints.inspection import read_verified_checkpoint
from cxt.checkpoints.record import QUANTIZATION_BITS
from cxt.checkpoints.safetensors import CONFIG, WEIGHTS
from cxt.errors import BadRequest
from cxt.io import check_writable, file_sha256
from cxt.model.quantization import round_to_integers


def quantize_matrices(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Round every matrix of *weights* to int8; return weights and, by the same names, the matrices' scales."""
    weights, scales = dict(weights), {}
    for name, value in weights.items():
        if value.ndim == 2:
            weights[name], scales[name] = round_to_integers(value, bits=QUANTIZATION_BITS)
    return weights, scales


def quantize_checkpoint(path, out) -> None:
    """Write the checkpoint *path* with quantised weights to *out*.

    Parameters
    ----------
    path : path-like
        A checkpoint, training state, file of the original package, or config.json of an exported directory.
    out : path-like
        File to write.

    Raises
    ------
    BadRequest
        If *path* is quantised already or cannot be read, or *out* is *path*, its parent, or cannot be written.
    Failed
        If a weight is not finite.
    """
    checkpoint = read_verified_checkpoint(path)
    record = checkpoint.record
    if record.get("quantization") is not None:
        raise BadRequest(f"{path} is quantised already, from a checkpoint of sha256 {record['quantization']['source']}")
    if Path(out).exists() and Path(out).samefile(path):
        raise BadRequest(f"{out} is the checkpoint to quantise; choose another name for the result")
    if Path(out).is_file() and file_sha256(out) == (record["parent"] or {}).get("sha256"):
        raise BadRequest(f"{out} is the checkpoint that {path} was trained from; choose another name for the result")
    check_writable(out)
    weights_file = Path(path).with_name(WEIGHTS) if Path(path).name == CONFIG else path
    source = {"bits": QUANTIZATION_BITS, "source": file_sha256(weights_file), "lineage": record["lineage"]}
    name = None if record["name"] is None else f"{record['name']}-int{QUANTIZATION_BITS}"
    weights, scales = quantize_matrices(checkpoint.state_dict)
    write_checkpoint(out, weights, record | {"name": name, "lineage": None, "quantization": source}, scales=scales)
