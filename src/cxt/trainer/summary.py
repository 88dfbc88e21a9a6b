"""The checkpoint record, model_summary.json and the announcement of a run."""

import importlib.metadata
import platform

from cxt.checkpoints.record import build_checkpoint_record
from cxt.console import get_logger
from cxt.model.flops import training_flops
from cxt.model.transformer import CoalescenceModel
from cxt.trainer.module import compile_backend
from cxt.trainer.request import RunRequest

logger = get_logger(__name__)

PACKAGES = ("torch", "pytorch-lightning", "numpy", "numba", "zarr", "tskit", "msprime", "stdpopsim")
"""Packages whose versions are recorded in a checkpoint."""


def build_record(request: RunRequest) -> dict:
    """The record of the checkpoint: plain dicts, lists, numbers and strings."""
    lora = {} if request.lora is None else {"lora": request.lora.model_dump()}
    shape = ("window_size", "sequence_length", "samples", "missing", "scales")
    return build_checkpoint_record(
        request.network,
        request.adapter,
        name=request.name,
        preset=request.preset,
        training=request.training.model_dump(exclude={"scratch"}),  # a path on one machine
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


def build_summary(request: RunRequest, model: CoalescenceModel) -> dict:
    """The content of model_summary.json: size, data, length and cost of the run."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    width = 2 if request.precision == "bf16-true" else 4
    moments = {"sgd": 1, "lion": 1, "muon": 1, "adafactor": 0}.get(request.training.optimizer.name, 2)
    flops = training_flops(request.network, request.adapter, request.lora, objective=request.training.objective)
    return {
        "parameters": total,
        "trainable_parameters": trainable,
        "precision": request.precision,
        # AdamW keeps two moments of each trainable parameter, in the parameter's type; Muon mostly one.
        "memory_mb": {
            "weights": total * width / 1e6, "gradients": trainable * width / 1e6,
            "optimizer": moments * trainable * width / 1e6,
        },
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
    }  # fmt: skip


def announce(request: RunRequest, summary: dict) -> None:
    """Log what will be trained, on which data and for how long."""
    training = request.training
    if request.precision != training.precision:
        logger.info(f"{request.name}: precision {training.precision} is for GPUs; training in 32-true on the CPU")
    if not summary["test_items"]:
        logger.info(f"{request.name}: the dataset has no test examples; training without validation")
    on = f" on {request.machines} machines" if request.machines > 1 else ""
    logger.info(
        f"{request.name}: {summary['trainable_parameters']:,} of {summary['parameters']:,} parameters train, "
        f"{summary['train_items']:,} examples, effective batch {request.effective_batch} "
        f"({training.batch_size} x {training.grad_accum} x {request.world}), {request.total_steps} steps, "
        f"{request.precision} on {request.world} {request.accelerator}{on}, {training.threads} threads"
    )
    if summary["compile"] != "none":
        logger.info(f"{request.name}: the first step compiles the network ({summary['compile']}), which takes about a minute")
