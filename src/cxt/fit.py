"""One training run, from a checked plan to a finished checkpoint in its run directory."""

import dataclasses
import importlib.metadata
import logging
import platform
import sys
import warnings

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities.exceptions import SIGTERMException

from cxt.adapter import build_model
from cxt.checkpoint import Checkpoint, load_weights, model_record, write_checkpoint
from cxt.config import AdapterConfig, ModelConfig, TrainingConfig, steps_per_epoch
from cxt.datamodule import DataModule, InOrder
from cxt.dataset import open_dataset
from cxt.live import SimulatedDataset
from cxt.model import CoalescenceModel
from cxt.rundir import RunDirectory
from cxt.targets import Grid
from cxt.training import Progress, Reseed, TrainingModule

PACKAGES = ("torch", "pytorch-lightning", "numpy", "numba", "zarr", "tskit", "msprime", "stdpopsim")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a run needs to know, checked.

    Attributes
    ----------
    name, preset : of the checkpoint and of its architecture
    dataset_path, manifest, dataset_sha256 : the dataset, its dataset.json, and that file's digest
    simulated : leaf scenarios to simulate on the fly instead, with a manifest made for them; None for a dataset on disk
    network, adapter, training : the configurations; adapter is None for a plain model
    parent, parent_file, parent_sha256 : checkpoint to start from, or None
    resumes_adapter : the parent's adapter weights are loaded too
    accelerator, devices : as Lightning takes them; a number of devices, or a list of GPU indices
    lineage : digest of everything the checkpoint depends on, or None
    max_steps : optimizer steps after which training ends, whatever the epochs say; None for no limit
    """

    name: str
    preset: str
    dataset_path: str | None
    manifest: dict
    dataset_sha256: str
    simulated: list[dict] | None
    network: ModelConfig
    adapter: AdapterConfig | None
    training: TrainingConfig
    parent: Checkpoint | None
    parent_file: str | None
    parent_sha256: str | None
    resumes_adapter: bool
    accelerator: str
    devices: int | list[int]
    lineage: str | None
    max_steps: int | None

    @property
    def world(self) -> int:
        """Number of devices."""
        return len(self.devices) if isinstance(self.devices, list) else self.devices

    @property
    def precision(self) -> str:
        """What is computed in: the settings' on GPUs, 32-true on a CPU."""
        return self.training.precision if self.accelerator == "gpu" else "32-true"

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; BadRequest if the dataset is smaller than a batch."""
        return min(self.max_steps or self.all_steps, self.all_steps)

    @property
    def all_steps(self) -> int:
        """Optimizer steps of all epochs."""
        return self.training.epochs * steps_per_epoch(
            items=self.manifest["splits"]["train"]["items"],
            batch_size=self.training.batch_size,
            grad_accum=self.training.grad_accum,
            world=self.world,
        )

    @property
    def batches_between_validations(self) -> int | None:
        """Batches of a device between two validations; None for the end of each epoch."""
        return self.training.validate_every * self.training.grad_accum or None

    def record(self) -> dict:
        """What the checkpoint will say of itself: plain dicts, lists, numbers and strings."""
        shape = ("window_size", "sequence_length", "samples", "missing", "scales")
        return model_record(
            self.network,
            self.adapter,
            name=self.name,
            preset=self.preset,
            training=dataclasses.asdict(self.training),
            lineage=self.lineage,
            dataset={key: self.manifest[key] for key in shape}
            | {"sha256": self.dataset_sha256, "simulated": self.simulated and [leaf["name"] for leaf in self.simulated]},
            parent=None if self.parent is None else {"name": self.parent.record["name"], "sha256": self.parent_sha256},
            accelerator=self.accelerator,
            devices=self.world,
            precision=self.precision,
            threads=self.training.threads,
            processor=platform.processor() or platform.machine(),
            versions={package: importlib.metadata.version(package) for package in PACKAGES},
        )


def data_of(plan: Plan) -> DataModule:
    """The items that a run trains on and is validated with: read, or to be simulated."""
    grid = Grid(plan.network.grid_low, plan.network.grid_high, plan.network.bins)
    training = plan.training
    settings = {
        "batch_size": training.batch_size, "seed": training.seed, "workers": training.workers,
        "validation_items": training.validation_items,
    }  # fmt: skip
    if plan.simulated is not None:
        train, test = (
            SimulatedDataset(plan.simulated, plan.manifest, split, seed=training.seed, grid=grid) for split in ("train", "test")
        )
        return DataModule(train, test, **settings, order=InOrder, in_processes=True)
    train, test = (
        open_dataset(
            plan.dataset_path,
            split,
            grid=grid,
            storage=training.storage,
            progress=lambda line: print(f"{plan.name}: {line}", flush=True),
        )
        for split in ("train", "test")
    )
    return DataModule(train, test, **settings)


def starting_model(plan: Plan) -> CoalescenceModel:
    """The network before its first step: random weights from the seed, then the parent's where there is one."""
    torch.manual_seed(plan.training.seed)
    model = build_model(plan.network, plan.adapter)
    if plan.parent is not None:
        weights = plan.parent.state_dict
        if plan.adapter is not None and not plan.resumes_adapter:
            backbone = {key.removeprefix("backbone."): value for key, value in weights.items()}
            load_weights(model.backbone, backbone, source=plan.parent_file)
        else:
            load_weights(model, weights, source=plan.parent_file)
    return model


def announce(plan: Plan, model: CoalescenceModel) -> None:
    """Say what will be trained, on what, and for how long."""
    training = plan.training
    if plan.precision != training.precision:
        print(f"{plan.name}: precision {training.precision} is for GPUs, training in 32-true on the CPU", flush=True)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"{plan.name}: {trainable:,} of {sum(p.numel() for p in model.parameters()):,} parameters train, "
        f"{plan.manifest['splits']['train']['items']:,} items, "
        f"effective batch {training.batch_size * training.grad_accum * plan.world} "
        f"({training.batch_size} x {training.grad_accum} x {plan.world}), {plan.total_steps} steps, "
        f"{plan.precision} on {plan.world} {plan.accelerator}, {training.threads} threads",
        flush=True,
    )


def trainer_of(plan: Plan, run: RunDirectory) -> pl.Trainer:
    """Lightning's trainer with this run's saves, logs and progress."""
    training = plan.training
    saves = ModelCheckpoint(
        dirpath=run.checkpoints,
        filename="last",
        every_n_train_steps=training.save_every,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    progress = Progress(
        plan.name,
        total_steps=plan.total_steps,
        items_per_batch=training.batch_size * plan.world,
        save_every=training.save_every,
    )
    return pl.Trainer(
        accelerator=plan.accelerator,
        devices=plan.devices,
        strategy="ddp" if plan.world > 1 else "auto",
        # Under Slurm, Lightning's own choice would train on one device and a share of the data.
        plugins=[LightningEnvironment()],
        precision=plan.precision,
        max_epochs=training.epochs,
        max_steps=plan.total_steps,
        val_check_interval=plan.batches_between_validations,
        check_val_every_n_epoch=None if training.validate_every else 1,
        accumulate_grad_batches=training.grad_accum,
        gradient_clip_val=training.grad_clip or None,
        use_distributed_sampler=False,
        logger=TensorBoardLogger(save_dir=run.path, name="", version="", default_hp_metric=False),
        callbacks=[saves, Reseed(training.seed), progress],
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def quieten() -> None:
    """Leave out what Lightning says of itself."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",  # features cost less than a worker
        ".*exists and is not empty.*",  # that of the run which is continued
        ".*smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def fit(plan: Plan, run: RunDirectory, data: DataModule) -> None:
    """Train to the end, or from the last save to the end; rank 0 writes the finished checkpoint.

    Raises
    ------
    RuntimeError
        If training stops early, or loss or weights are not finite.
    SystemExit
        With status 143 after a SIGTERM.
    """
    quieten()
    torch.set_num_threads(plan.training.threads)
    if plan.accelerator == "gpu":
        torch.set_float32_matmul_precision("medium")
    model = starting_model(plan)
    record = plan.record()
    module = TrainingModule(model, plan.training, record=record, total_steps=plan.total_steps)
    trainer = trainer_of(plan, run)
    last = run.last if run.last.exists() else None
    if trainer.is_global_zero:
        announce(plan, model)
        if last is not None:
            print(f"{plan.name}: continuing from {last}", flush=True)
    try:
        trainer.fit(module, data, ckpt_path=last, weights_only=True)
    except SIGTERMException:
        if trainer.is_global_zero:
            saved = "its last save" if run.last.exists() else "the start: nothing was saved yet"
            print(
                f"{plan.name}: stopped by SIGTERM at step {trainer.global_step}; the next try continues from {saved}",
                flush=True,
            )
        sys.exit(143)  # Lightning's own status would be 0
    if trainer.global_step != plan.total_steps:
        raise RuntimeError(f"{plan.name}: training stopped at step {trainer.global_step} of {plan.total_steps}")
    if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
        raise RuntimeError(
            f"{plan.name}: the trained weights are not finite; lower the learning rate, or clip the gradient (grad_clip: 1.0)"
        )
    if trainer.is_global_zero:
        epoch = (plan.total_steps - 1) // (plan.all_steps // plan.training.epochs)
        finished = run.checkpoints / f"{plan.name}_epoch={epoch}-step={plan.total_steps}.ckpt"
        write_checkpoint(finished, model.state_dict(), record | {"epoch": epoch, "step": plan.total_steps})
        run.finish(finished)
