"""The checkpoint record, model_summary.json and the announcement of a run."""

import importlib.metadata
import platform

from cxt.checkpoints.record import build_checkpoint_record
from cxt.config.regions import RegionPlan
from cxt.config.training import TrainingConfig
from cxt.console import counted, get_logger
from cxt.model.flops import training_flops
from cxt.model.memory import training_memory
from cxt.model.transformer import CoalescenceModel
from cxt.trainer.module import compile_backend
from cxt.trainer.request import RunRequest

logger = get_logger(__name__)

PACKAGES = ("torch", "pytorch-lightning", "numpy", "numba", "zarr", "tskit", "msprime", "stdpopsim")
"""Packages whose versions are recorded in a checkpoint."""

NOT_RECORDED = {"scratch", "mlflow", "wandb", "histograms", "metrics", "profiler", "profile_batches"}
"""Settings that are not in a checkpoint: what is observed of a run, and where on one machine."""

LATER_SETTINGS = ("batch_size_eval", "callbacks", "regions", "weight_by_windows")
"""Settings that are not in a checkpoint at their defaults, as before there were such settings."""


def build_record(request: RunRequest) -> dict:
    """The record of the checkpoint: plain dicts, lists, numbers and strings."""
    lora = {} if request.lora is None else {"lora": request.lora.model_dump()}
    shape = ("window_size", "sequence_length", "samples", "missing", "scales")
    return build_checkpoint_record(
        request.network,
        request.adapter,
        name=request.name,
        preset=request.preset,
        training=_list_training(request.training),
        lineage=request.lineage,
        dataset={key: request.manifest[key] for key in shape}
        | {
            "lineage": request.manifest.get("lineage"),
            "sha256": request.dataset_sha256,
            "simulated": request.simulated and [variant["name"] for variant in request.simulated],
            "ranges": request.manifest.get("ranges"),
        },
        parent=None
        if request.parent is None
        else {
            "name": request.parent.record["name"],
            "lineage": request.parent.record.get("lineage"),
            "sha256": request.parent_sha256,
        }
        | ({} if request.published_sha256 is None else {"published": request.published_sha256}),
        **({} if request.soft_targets is None else {"teacher": request.soft_targets["teacher"]}),
        accelerator=request.accelerator,
        devices=request.world,
        precision=request.precision,
        threads=request.training.threads,
        processor=platform.processor() or platform.machine(),
        versions={package: importlib.metadata.version(package) for package in PACKAGES},
        **lora,
    )


def _list_training(training: TrainingConfig) -> dict:
    """The settings to record: not those of `NOT_RECORDED`, nor later ones that are off."""
    return training.model_dump(
        exclude=NOT_RECORDED | {name for name in LATER_SETTINGS if getattr(training, name) == getattr(TrainingConfig(), name)}
    )


def build_summary(request: RunRequest, model: CoalescenceModel) -> dict:
    """The content of model_summary.json: size, data, length and cost of the run."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plan = request.region_plan
    memory = training_memory(
        plan.resize(request.network, plan.row_windows), request.training, request.adapter, request.lora,
        precision=request.precision, on_gpu=request.accelerator != "cpu", parameters=total, trained=trainable,
    )  # fmt: skip
    read = plan.resize(request.network, plan.mean_windows)
    flops = training_flops(read, request.adapter, request.lora, objective=request.training.objective)
    return {
        "parameters": total,
        "trainable_parameters": trainable,
        "precision": request.precision,
        "memory_mb": {part: size / 1e6 for part, size in memory.items()},  # of each device
        "train_items": request.manifest["splits"]["train"]["items"],
        "test_items": request.manifest["splits"]["test"]["items"],
        "effective_batch": request.effective_batch,
        "batch_size": request.training.batch_size,
        "grad_accum": request.training.grad_accum,
        "devices": request.world,
        "nodes": request.machines,
        "accelerator": request.accelerator,
        "compile": compile_backend(request.training, request.device_type) or "none",
        "attention": request.training.attention,
        "objective": request.training.objective,
        "loss_path": request.training.loss_path,
        "gradient_checkpointing": request.training.gradient_checkpointing,
        "planned_steps": request.total_steps,
        "flops_per_item": flops,
        "flops": flops * request.effective_batch * request.total_steps,
    } | ({} if plan.is_off else {"regions": _describe_regions(plan)})  # fmt: skip


def _describe_regions(plan: RegionPlan) -> dict:
    """Lengths of the regions of a run, and how much of each row they fill."""
    return {
        "dataset_windows": plan.dataset_windows,
        "windows": [plan.shortest, plan.longest],
        "mean_windows": round(plan.mean_windows, 2),
        "per_row": plan.per_row,
        "row_windows": plan.row_windows,
        "fill": 1.0,  # never padded
    }


def _say_regions(plan: RegionPlan) -> str:
    """Which regions of the examples a run reads."""
    regions, of = plan.regions, f"of the {plan.dataset_windows} of each example"
    if regions.pack:
        return (
            f"{plan.per_row} regions of {plan.shortest} to {plan.longest} windows {of} in each row of {plan.row_windows}, "
            "which they fill to 100%"
        )
    if regions.in_order:
        return f"regions of {plan.windows} windows {of}, {plan.chunks} one after another"
    if regions.first_windows:
        return f"regions of {regions.first_windows} windows {of} at first, growing to {plan.windows}"
    between = f"{plan.shortest} to " if plan.shortest < plan.windows else ""
    return f"regions of {between}{plan.windows} windows {of}"


def describe_other_precision(request: RunRequest) -> str:
    """Why a run uses another precision than that of its settings."""
    wanted = request.training.precision
    if request.accelerator == "gpu":
        return f"this GPU has no bfloat16, which {wanted} needs; training in {request.precision}"
    where = "the CPU" if request.accelerator == "cpu" else "this GPU"
    return (
        f"precision {wanted} is for {'GPUs' if request.accelerator == 'cpu' else 'other GPUs'}; training in 32-true on {where}"
    )


def announce(request: RunRequest, summary: dict) -> None:
    """Log what will be trained, on which data and for how long."""
    training = request.training
    if request.precision != training.precision:
        logger.info(f"{request.name}: {describe_other_precision(request)}")
    for callback in training.callbacks:
        logger.warning(
            f"{request.name}: the callback {callback.class_path} is a setting of this run by its name and arguments only; if "
            "its code changes, start the run again with --restart"
        )
    if not summary["test_items"]:
        logger.info(f"{request.name}: the dataset has no test examples; training without validation")
    rows = f" x {request.region_plan.per_row}" if request.region_plan.per_row > 1 else ""
    on = f" on {request.machines} machines" if request.machines > 1 else ""
    logger.info(
        f"{request.name}: {summary['trainable_parameters']:,} of {summary['parameters']:,} parameters train, "
        f"{counted(summary['train_items'], 'example')}, effective batch {request.effective_batch} "
        f"({training.batch_size}{rows} x {training.grad_accum} x {request.world}), {counted(request.total_steps, 'step')}, "
        f"{request.precision} on {request.world} {request.accelerator}{on}, {counted(training.threads, 'thread')}"
    )
    if "regions" in summary:
        logger.info(f"{request.name}: {_say_regions(request.region_plan)}")
    if summary["compile"] != "none":
        logger.info(f"{request.name}: the first step compiles the network ({summary['compile']}), which takes about a minute")
