"""One training run, from a checked plan to a finished checkpoint in its run directory."""

import dataclasses
import errno
import importlib.metadata
import logging
import os
import platform
import signal
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.environments import LightningEnvironment

from cxt.checkpoints.file import Checkpoint, load_weights, write_checkpoint
from cxt.checkpoints.record import model_record
from cxt.checkpoints.run_directory import RunDirectory
from cxt.config.settings import AdapterConfig, ModelConfig, TrainingConfig, steps_per_epoch
from cxt.data.grid import Grid
from cxt.data.loaders import DataModule, SequentialBatchSampler
from cxt.data.pair_dataset import open_dataset
from cxt.data.simulated import SimulatedDataset
from cxt.errors import BadRequest, Failed, first_line, try_drawing
from cxt.model.adapter import build_model
from cxt.model.flops import training_flops
from cxt.model.transformer import CoalescenceModel
from cxt.seeds import torch_seed
from cxt.trainer.log import TrainingLog, read_log
from cxt.trainer.machines import Machines
from cxt.trainer.module import Reseed, TrainingModule, compile_backend
from cxt.trainer.training_state import AtomicIO, StateSaver, find_state_to_continue
from cxt.trainer.validation import DecodedItems, Validation, truth_beside_prediction

SAVE_OF_RANK_0 = "CXT_SAVE"
PACKAGES = ("torch", "pytorch-lightning", "numpy", "numba", "zarr", "tskit", "msprime", "stdpopsim")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a run needs to know, checked.

    Attributes
    ----------
    name, preset : of the checkpoint and of its architecture
    dataset_path, manifest, dataset_sha256 : the dataset, its dataset.json, and that file's digest
    simulated : variants to simulate on the fly instead, with a manifest made for them; None for a dataset on disk
    network, adapter, training : the configurations; adapter is None for a plain model
    parent, parent_file, parent_sha256 : checkpoint to start from, or None
    resumes_adapter : the parent's adapter weights are loaded too
    accelerator, devices : of a machine, as Lightning takes them; a number of devices, or a list of GPU indices
    machines : number of machines
    lineage : digest of everything the checkpoint depends on, or None
    max_steps : optimizer steps after which training ends, whatever the epochs say; None for no limit
    deadline : of `time.monotonic`, after which the run saves and ends with status 75; None for none
    wanted_save : the training state to continue from; None for the newest
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
    machines: int
    lineage: str | None
    max_steps: int | None
    deadline: float | None = None
    wanted_save: Path | None = None

    @property
    def world(self) -> int:
        """Number of devices, on all machines."""
        return self.machines * (len(self.devices) if isinstance(self.devices, list) else self.devices)

    @property
    def precision(self) -> str:
        """What is computed in: the settings' on GPUs, 32-true on a CPU."""
        return self.training.precision if self.accelerator == "gpu" else "32-true"

    @property
    def device_type(self) -> str:
        """As torch names it."""
        return "cuda" if self.accelerator == "gpu" else "cpu"

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; BadRequest if the dataset is smaller than a batch."""
        return min(self.max_steps or self.all_steps, self.all_steps)

    @property
    def all_steps(self) -> int:
        """Optimizer steps of all epochs."""
        return self.training.epochs * self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return steps_per_epoch(
            items=self.manifest["splits"]["train"]["items"],
            batch_size=self.training.batch_size,
            grad_accum=self.training.grad_accum,
            world=self.world,
        )

    @property
    def effective_batch(self) -> int:
        """Items of an optimizer step."""
        return self.training.batch_size * self.training.grad_accum * self.world

    @property
    def grid(self) -> Grid:
        """Of ln generations, that of the network."""
        return Grid(self.network.grid_low, self.network.grid_high, self.network.bins)

    def validates_after(self, step: int) -> bool:
        """Whether there is a validation after an optimizer step: every so many, or after each epoch; and after the last."""
        if not self.manifest["splits"]["test"]["items"]:
            return False
        return step % (self.training.validate_every or self.steps_per_epoch) == 0 or step == self.total_steps

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
            | {
                "lineage": self.manifest.get("lineage"),
                "sha256": self.dataset_sha256,
                "simulated": self.simulated and [variant["name"] for variant in self.simulated],
                "ranges": self.manifest.get("ranges"),
            },
            parent=None
            if self.parent is None
            else {
                "name": self.parent.record["name"],
                "lineage": self.parent.record.get("lineage"),
                "sha256": self.parent_sha256,
            },
            accelerator=self.accelerator,
            devices=self.world,
            precision=self.precision,
            threads=self.training.threads,
            processor=platform.processor() or platform.machine(),
            versions={package: importlib.metadata.version(package) for package in PACKAGES},
        )


def build_data(plan: Plan) -> DataModule:
    """The items that a run trains on and is validated with: read, or to be simulated."""
    grid, training = plan.grid, plan.training
    settings = {
        "batch_size": training.batch_size, "seed": training.seed, "workers": training.workers,
        "validation_items": training.validation_items,
    }  # fmt: skip
    if plan.simulated is not None:
        train, test = (
            SimulatedDataset(plan.simulated, plan.manifest, split, seed=training.seed, grid=grid) for split in ("train", "test")
        )
        return DataModule(train, test, **settings, order=SequentialBatchSampler, in_processes=True)
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


def build_starting_model(plan: Plan) -> CoalescenceModel:
    """The network before its first step: random weights from the seed, then the parent's where there is one."""
    torch.manual_seed(torch_seed(plan.training.seed, "weights"))
    model = build_model(plan.network, plan.adapter)
    if plan.parent is not None:
        weights = plan.parent.state_dict
        if plan.adapter is not None and not plan.resumes_adapter:
            backbone = {key.removeprefix("backbone."): value for key, value in weights.items()}
            load_weights(model.backbone, backbone, source=plan.parent_file)
        else:
            load_weights(model, weights, source=plan.parent_file)
    return model


def build_summary(plan: Plan, model: CoalescenceModel) -> dict:
    """model_summary.json: what will be trained, on what, for how long, and what it takes."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    width = 2 if plan.precision == "bf16-true" else 4
    flops = training_flops(plan.network, plan.adapter)
    return {
        "parameters": total,
        "trainable_parameters": trainable,
        "precision": plan.precision,
        # AdamW keeps two moments of each trainable parameter, in its type.
        "memory_mb": {
            "weights": total * width / 1e6, "gradients": trainable * width / 1e6, "optimizer": 2 * trainable * width / 1e6,
        },
        "train_items": plan.manifest["splits"]["train"]["items"],
        "test_items": plan.manifest["splits"]["test"]["items"],
        "effective_batch": plan.effective_batch,
        "batch_size": plan.training.batch_size,
        "grad_accum": plan.training.grad_accum,
        "devices": plan.world,
        "nodes": plan.machines,
        "accelerator": plan.accelerator,
        "compile": compile_backend(plan.training, plan.device_type) or "none",
        "attention": plan.training.attention,
        "loss_path": plan.training.loss_path,
        "gradient_checkpointing": plan.training.gradient_checkpointing,
        "planned_steps": plan.total_steps,
        "flops_per_item": flops,
        "flops": flops * plan.effective_batch * plan.total_steps,
    }  # fmt: skip


def announce(plan: Plan, summary: dict) -> None:
    """Say what will be trained, on what, and for how long."""
    training = plan.training
    if plan.precision != training.precision:
        print(f"{plan.name}: precision {training.precision} is for GPUs, training in 32-true on the CPU", flush=True)
    if not summary["test_items"]:
        print(f"{plan.name}: the dataset has no test items: training without validation", flush=True)
    on = f" on {plan.machines} machines" if plan.machines > 1 else ""
    print(
        f"{plan.name}: {summary['trainable_parameters']:,} of {summary['parameters']:,} parameters train, "
        f"{summary['train_items']:,} items, effective batch {plan.effective_batch} "
        f"({training.batch_size} x {training.grad_accum} x {plan.world}), {plan.total_steps} steps, "
        f"{plan.precision} on {plan.world} {plan.accelerator}{on}, {training.threads} threads",
        flush=True,
    )
    if summary["compile"] != "none":
        print(
            f"{plan.name}: the first step compiles the network ({summary['compile']}), which takes a minute or so", flush=True
        )


def trainer_of(plan: Plan, run: RunDirectory, callbacks: list) -> pl.Trainer:
    """Lightning's trainer for this run."""
    training = plan.training
    return pl.Trainer(
        accelerator=plan.accelerator,
        devices=plan.devices,
        num_nodes=plan.machines,
        # None is unused; but without this, DDP puts the gradients into another order after its first step, and a resumed run
        # would sum those of three or more devices in another order than the run that it continues.
        strategy="ddp_find_unused_parameters_true" if plan.world > 1 else "auto",
        # Under Slurm, Lightning's own choice would train on one device and a share of the data.
        plugins=[LightningEnvironment(), AtomicIO()],
        precision=plan.precision,
        deterministic="warn" if plan.accelerator == "gpu" and training.deterministic else False,
        max_epochs=training.epochs,
        min_epochs=0,
        max_steps=plan.total_steps,
        check_val_every_n_epoch=training.epochs + 1,  # never: `StateSaver` validates, at optimizer steps
        accumulate_grad_batches=training.grad_accum,
        gradient_clip_val=training.grad_clip or None,
        use_distributed_sampler=False,
        logger=TensorBoardLogger(save_dir=run.path, name="", version="", default_hp_metric=False),
        callbacks=callbacks,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        log_every_n_steps=training.log_every,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def quieten() -> None:
    """Leave out what Lightning says of itself."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",  # features cost less than a worker
        ".*cumsum_cuda_kernel does not have a deterministic.*",  # of decoding, which trains nothing
        ".*exists and is not empty.*",  # that of the run which is continued
        ".*smaller than the logging interval.*",
        ".*functools.lru_cache.*",  # FlexAttention's block mask, which a compiled step makes anew
        ".*`srun` command is available.*",  # a rank is started by the trainer, never by srun
    ):
        warnings.filterwarnings("ignore", message=message)


def set_up_torch(plan: Plan) -> None:
    """Torch's threads, and how exact its matrix products on a GPU are in 32-bit parts."""
    torch.set_num_threads(plan.training.threads)
    if plan.world > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(plan.training.threads))  # or Lightning sets another number for rank 0
    if plan.accelerator == "gpu":
        torch.set_float32_matmul_precision("medium")
        if plan.training.deterministic:
            import torch._inductor.config as inductor

            torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time, and nothing here reads such memory
            if hasattr(inductor, "deterministic"):  # chooses kernels by rules, not by their speed on the day
                inductor.deterministic = True


def fit(
    plan: Plan,
    run: RunDirectory,
    data: DataModule,
    *,
    machines: Machines | None = None,
    identity: dict | None = None,
    settings: dict | None = None,
) -> None:
    """Train to the end, or from the last training state to the end; rank 0 writes the finished checkpoint and its figures.

    *identity* and *settings* are recorded in the run directory, unless the run has begun before. The first process of a machine
    gives all three; those it has started for its other devices give none.

    Raises
    ------
    BadRequest
        If none of the training states can be read, or this machine does not see the one to continue from.
    Failed
        If loss, gradient or weights are not finite, memory runs out, or a training state cannot be written (status 1); after
        a signal (143; 130 for SIGINT) or when the time is up (75), saved.
    """
    quieten()
    set_up_torch(plan)
    training = plan.training
    model = build_starting_model(plan)
    record = plan.record()
    module = TrainingModule(model, training, record=record, total_steps=plan.total_steps)
    log = TrainingLog(
        run.log, plan.name, total_steps=plan.total_steps, steps_per_epoch=plan.steps_per_epoch,
        items_per_batch=training.batch_size * plan.world, every=training.log_every,
        validates=plan.validates_after, checks_gradient=plan.precision != "16-mixed",
    )  # fmt: skip
    items = None
    if training.decode_items and len(data.test_set):
        items = DecodedItems(data.test_set, items=training.decode_items, grid=plan.grid)
    validation = Validation(
        run, plan.name, log, record=record, items=items, seed=training.seed, steps_per_epoch=plan.steps_per_epoch,
        patience=training.patience, min_delta=training.min_delta,
    )  # fmt: skip
    state_saver = StateSaver(
        run, plan.name, every_steps=training.save_every, every_minutes=training.save_minutes, keep=training.keep_saves,
        total_steps=plan.total_steps, validates=plan.validates_after, refuse=log.stop_if_bad, deadline=plan.deadline,
    )  # fmt: skip
    trainer = trainer_of(plan, run, [Reseed(training.seed), log, validation, state_saver])
    trainer._signal_connector.register_signal_handlers = lambda: None  # Lightning's would take the place of ours
    last = None
    if trainer.is_global_zero:
        summary = build_summary(plan, model)
        announce(plan, summary)
        if run.state() is None:
            run.start(identity, settings, grid=dataclasses.asdict(plan.grid), summary=summary)
        last = find_state_to_continue(run, plan.name, wanted=plan.wanted_save)
        if last is not None:
            print(f"{plan.name}: continuing from {last}", flush=True)
    if machines is not None:
        os.environ[SAVE_OF_RANK_0] = machines.share("" if last is None else str(last.absolute()))
    last = os.environ[SAVE_OF_RANK_0] or None
    if last is not None and not os.path.exists(last):
        raise BadRequest(f"this machine does not see {last}, to continue from; all need the file system of the run directory")
    with state_saver.listening():
        run_trainer(trainer, plan, module, data, last)
    if trainer.global_step != plan.total_steps and not validation.stopped:
        raise RuntimeError(f"{plan.name}: training stopped at step {trainer.global_step} of {plan.total_steps}")
    if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
        raise Failed(
            f"{plan.name}: the trained weights are not finite; lower the learning rate, or clip the gradient (grad_clip: 1.0)"
        )
    if trainer.is_global_zero:
        finish(plan, run, module.model, validation, step=trainer.global_step, items=items)


def run_trainer(trainer: pl.Trainer, plan: Plan, module: TrainingModule, data: DataModule, save) -> None:
    """Lightning's fit; what it raises becomes a message, and ends the processes of this machine's other devices."""
    try:
        trainer.fit(module, data, ckpt_path=save, weights_only=True)
    except BaseException as error:
        launcher = trainer.strategy.launcher
        if launcher is not None and trainer.local_rank == 0 and not getattr(error, "agreed", False):
            launcher.kill(signal.SIGKILL)  # they would wait for this one for ever
            launcher.procs.clear()  # seeing them gone, Lightning would kill this one before it says why
        # "can't allocate memory" is what torch says on a CPU.
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            raise Failed(out_of_memory(plan, error)) from error
        if is_compiler_error(error):
            raise Failed(
                f"{plan.name}: the network could not be compiled ({first_line(error)}); `compile: none` trains without, and "
                "starts a new run"
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise Failed(f"{plan.name}: {error}; make room and run the same command again") from error
        raise


def is_compiler_error(error: BaseException) -> bool:
    """Whether `torch.compile` has raised it."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return isinstance(error, TorchDynamoException | InductorError)


def out_of_memory(plan: Plan, error: Exception) -> str:
    """What to do about it, in words."""
    training = plan.training
    half = max(1, training.batch_size // 2)
    accumulation = -(-training.batch_size * training.grad_accum // half)
    return (
        f"{plan.name}: out of memory on {plan.world} {plan.accelerator} ({first_line(error)}). Lower batch_size and "
        f"raise grad_accum, which keeps the effective batch of {plan.effective_batch}: batch_size: {half}, grad_accum: "
        f"{accumulation}. Fewer windows (a shorter sequence_length) help most, then gradient_checkpointing: true; these start "
        "a new run"
    )


def finish(plan: Plan, run: RunDirectory, model: CoalescenceModel, validation: Validation, *, step: int, items) -> None:
    """Write the finished checkpoint, record which one is published, and draw the figures."""
    epoch = (step - 1) // plan.steps_per_epoch
    finished = run.checkpoints / f"{plan.name}_epoch={epoch}-step={step}.ckpt"
    write_checkpoint(finished, model.state_dict(), validation.record | {"epoch": epoch, "step": step})
    run.finish(validation.best_checkpoint() if plan.training.export == "best" else finished)
    lost = try_drawing(lambda: draw(plan, run, model, items))
    if lost:  # the checkpoint is what was asked for
        print(f"{plan.name}: trained, but not all figures could be drawn ({lost})", file=sys.stderr, flush=True)


def draw(plan: Plan, run: RunDirectory, model: CoalescenceModel, items) -> None:
    """losses.png, and tracks.png of the items that are decoded."""
    from cxt.evaluation.figures import draw_losses, draw_tracks

    draw_losses(read_log(run.log), run.path / "losses.png", title=f"{plan.name}: training")
    if items is not None:
        tracks = truth_beside_prediction(items, model, seed=plan.training.seed)
        draw_tracks(tracks, run.path / "tracks.png", title=plan.name, window_size=plan.manifest["window_size"])
