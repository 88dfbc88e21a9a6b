"""Describing, verifying and comparing checkpoints."""

import torch

from cxt.checkpoints.file import Checkpoint, build_checkpoint_model, find_region_plan, read_checkpoint, stored_dtype
from cxt.checkpoints.load import read_usable_checkpoint
from cxt.console import counted
from cxt.errors import Failed


def _describe_training(checkpoint: Checkpoint) -> str:
    """Describe how the weights were trained."""
    record, plan = checkpoint.record, find_region_plan(checkpoint)
    training = record["training"]
    if training is None and record.get("published") is None:
        return "not known"
    if training is None:
        settings = record["published"]["hyper_parameters"].get("training_config", {})
        described = ", ".join(f"{key} {value}" for key, value in settings.items()) if isinstance(settings, dict) else ""
        return f"by the original package: {described or 'its file does not say how'}"
    effective = training["batch_size"] * plan.per_row * training["grad_accum"] * record["devices"]
    lengths = f", regions of {plan.shortest} to {plan.longest} windows" if plan.shortest < plan.longest else ""
    return (
        f"{counted(training['epochs'], 'epoch')}, effective batch {effective}, lr {training['lr']:g}, "
        f"{training.get('schedule', 'cosine')}, {record['precision']} on {record['devices']} {record['accelerator']}, "
        f"{counted(record['threads'], 'thread')}, seed {training['seed']}{lengths}"
    )


def _describe_ranges(ranges: dict | None) -> str:
    """Describe the ranges of the training data."""
    described = [f"{name.replace('_', ' ')} {pair[0]:.3g} to {pair[1]:.3g}" for name, pair in (ranges or {}).items() if pair]
    return ", ".join(described) or "not known"


def _describe_parent(parent: dict | None) -> str:
    """Describe the checkpoint that training started from."""
    if parent is None:
        return "none"
    published = f", imported from the published file {parent['published']}" if "published" in parent else ""
    return f"{parent['name']}, {parent['sha256']}{published}"


def describe_checkpoint(path) -> str:
    """Describe a checkpoint as text."""
    checkpoint = read_checkpoint(path)
    record, network, adapter = checkpoint.record, checkpoint.model, checkpoint.adapter
    data, parent, published = record["dataset"], record["parent"], record.get("published")
    parameters = sum(value.numel() for value in checkpoint.state_dict.values())
    dtype = str(stored_dtype(checkpoint)).removeprefix("torch.")
    loss = f", validation loss {record['val_loss']:.4f}" if "val_loss" in record else ""
    rows = {
        "model": f"{record['name']} (preset {record['preset']}), step {record['step']}, epoch {record['epoch']}{loss}",
        "network": f"{counted(network.layers, 'block')}, {counted(network.heads, 'head')}, width {network.width}, "
        f"dropout {network.dropout:g}; "
        f"{parameters:,} parameters{'' if dtype == 'float32' else f' in {dtype}'}",
        "input": f"{network.windows} windows of {network.window_size} bp, {network.samples} samples, {network.scales} scales"
        f"{'' if network.mask_singletons else ', missingness in bin 0'}{', rates' if network.reads_rates else ''}"
        f"{', separate embeddings' if network.separate_embeddings else ''}"
        f"{', start token in the prefix' if network.start_token_in_prefix else ''}",
        "grid": f"{network.bins} bins of ln generations from {network.grid_low:g} to {network.grid_high:g}",
        "adapter": "none" if adapter is None else ", ".join(f"{k} {v}" for k, v in adapter),
        "training": _describe_training(checkpoint),
        "dataset": f"{data['sha256'] or 'not known'}"
        + (f", simulated: {', '.join(data['simulated'])}" if data.get("simulated") else ""),
        "ranges": _describe_ranges(data.get("ranges")),
        "parent": _describe_parent(parent),
        "lineage": record["lineage"] or "none: not trained by the workflow",
        "made with": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    if checkpoint.lora is not None:
        settings = ", ".join(f"{k} {v}" for k, v in checkpoint.lora)
        rows["lora"] = f"{settings}; the file holds low-rank changes of its parent only"
    if (quantization := record.get("quantization")) is not None:
        rows["weights"] = f"matrices rounded to {quantization['bits']} bits, from {quantization['source']}"
    if published is not None:
        rows["imported"] = f"from {published['file']}, {published['sha256']}"
    return "\n".join([str(path), *(f"  {key:10s}{value}" for key, value in rows.items())])


def read_verified_checkpoint(path) -> Checkpoint:
    """Read a checkpoint, and check that its weights are finite and fit its network; a LoRA is merged into its base.

    Raises
    ------
    BadRequest
        If it cannot be read, its weights do not fit, or the base of a LoRA is missing.
    Failed
        If a weight is not finite.
    """
    checkpoint = read_usable_checkpoint(path)
    build_checkpoint_model(checkpoint, name=path)
    bad = [key for key, value in checkpoint.state_dict.items() if not torch.isfinite(value).all()]
    if bad:
        raise Failed(f"{path} has weights that are not finite: {', '.join(bad)}")
    return checkpoint


def compare_checkpoints(a, b, *, rtol: float, atol: float) -> tuple[bool, str]:
    """Whether the weights of two checkpoints are close, and a description of how the two differ.

    They are close, as in `torch.allclose`, if abs(a - b) <= atol + rtol · abs(b) everywhere. A LoRA is merged into its base.
    """
    first, second = read_usable_checkpoint(a), read_usable_checkpoint(b)
    lines = []
    for key in sorted(first.record.keys() | second.record.keys()):
        one, other = first.record.get(key), second.record.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            for name in sorted(one.keys() | other.keys()):
                if one.get(name) != other.get(name):
                    lines.append(f"  {key}.{name}: {one.get(name)} and {other.get(name)}")
        elif one != other:
            lines.append(f"  {key}: {one} and {other}")
    left, right = first.state_dict, second.state_dict
    close = left.keys() == right.keys()
    lines += [f"  {key} is only in {a if key in left else b}" for key in sorted(left.keys() ^ right.keys())]
    worst, differing = (-1.0, ""), 0
    for key in sorted(left.keys() & right.keys()):
        if left[key].shape != right[key].shape:
            lines.append(f"  {key}: shapes {tuple(left[key].shape)} and {tuple(right[key].shape)}")
            close = False
            continue
        x, y = left[key].double(), right[key].double()
        differing += not torch.equal(x, y)
        distance = float((x - y).abs().max()) if x.numel() else 0.0
        # NaN counts as an infinite difference.
        worst = max(worst, (distance if distance == distance else float("inf"), key))
        close &= torch.allclose(x, y, rtol=rtol, atol=atol)
    if differing:
        lines.append(
            f"  {counted(differing, 'tensor')} differ{'s' if differing == 1 else ''}, most of all {worst[1]}: by {worst[0]:.3g}"
        )
    verdict = "equal" if not differing and close else ("close" if close else "different")
    return close, "\n".join([f"{a} and {b}: weights are {verdict}", *lines])
