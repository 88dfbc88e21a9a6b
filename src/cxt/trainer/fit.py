"""Train one run, from its request to a finished checkpoint in its run directory."""

import contextlib
import dataclasses
import errno
import logging
import os
import signal
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment

from cxt.checkpoints.file import load_weights, write_checkpoint
from cxt.checkpoints.run_directory import RunDirectory
from cxt.checkpoints.training_log import read_log
from cxt.config.flags import cap_workers
from cxt.config.learning import is_readable
from cxt.console import get_logger
from cxt.data.loaders import DataModule, SequentialBatchSampler, ValidationRegions
from cxt.data.noise import NoiseSchedule
from cxt.data.pair_dataset import open_dataset
from cxt.data.regions import RegionSchedule
from cxt.data.simulated import SimulatedDataset
from cxt.errors import BadRequest, Failed, first_line, try_drawing
from cxt.model.adapter import build_model
from cxt.model.parametrizations import attach
from cxt.model.transformer import CoalescenceModel
from cxt.random_seeds import torch_seed
from cxt.trainer.averaging import WeightAverage
from cxt.trainer.log import TrainingLog
from cxt.trainer.machines import Machines
from cxt.trainer.module import Reseed, TrainingModule
from cxt.trainer.profiling import Profiling
from cxt.trainer.prolonging import Prolonged, begin_with
from cxt.trainer.request import RunRequest
from cxt.trainer.summary import announce, build_record, build_summary
from cxt.trainer.trackers import Trackers, build_loggers
from cxt.trainer.training_state import AtomicIO, StateSaver, find_state_to_continue
from cxt.trainer.user_callbacks import build_callbacks, stop_if_not_storable
from cxt.trainer.validation import DecodedExamples, Validation

logger = get_logger(__name__)

STATE_VARIABLE = "CXT_TRAINING_STATE"
"""Environment variable: training state to continue from, for the processes that the first one of a machine starts."""


def build_region_schedule(request: RunRequest) -> RegionSchedule:
    """The regions of each batch of a run, which are whole examples unless the settings say otherwise."""
    training = request.training
    return RegionSchedule(
        plan=request.region_plan, seed=training.seed, grad_accum=training.grad_accum,
        batches_per_epoch=request.batches_per_epoch, total_steps=request.total_steps,
    )  # fmt: skip


def build_data(request: RunRequest) -> DataModule:
    """The training and test examples of a run, from a dataset or to be simulated."""
    grid, training, noise = request.grid, request.training, None
    if not training.noise.is_off:
        noise = NoiseSchedule(
            noise=training.noise, seed=training.seed, grad_accum=training.grad_accum, steps_per_epoch=request.steps_per_epoch,
            total_steps=request.total_steps,
        )  # fmt: skip
    settings = {
        "batch_size": training.batch_size, "seed": training.seed, "workers": cap_workers(training.workers),
        "validation_items": training.validation_items, "noise": noise, "batch_size_eval": training.batch_size_eval,
    }  # fmt: skip
    if request.simulated is not None:
        train, test = (
            SimulatedDataset(request.simulated, request.manifest, split, seed=training.seed, grid=grid)
            for split in ("train", "test")
        )
        return DataModule(train, test, **settings, order=SequentialBatchSampler, in_processes=True)
    train, test = (
        open_dataset(
            request.dataset_path,
            split,
            grid=grid,
            storage=training.storage,
            scratch=training.scratch,
            soft_targets=request.soft_targets and request.soft_targets["directory"],
            progress=lambda line: logger.info(f"{request.name}: {line}"),
        )
        for split in ("train", "test")
    )
    if request.region_plan.is_off:
        return DataModule(train, test, **settings)
    test = ValidationRegions(test, request.region_plan)
    return DataModule(train, test, **settings, regions=build_region_schedule(request))


def build_starting_model(request: RunRequest) -> CoalescenceModel:
    """The network before its first step, with random weights from the seed, or those of the parent if there is one."""
    torch.manual_seed(torch_seed(request.training.seed, "weights"))
    model = build_model(request.network, request.adapter)
    model.objective = request.training.objective
    if request.parent is not None:
        weights = request.parent.state_dict
        if model.config.reads_rates and not request.parent.model.reads_rates:
            name = "backbone.rate_embedding.weight"
            weights = weights | {name: model.state_dict()[name]}  # zero
        if request.adapter is not None and not request.resumes_adapter:
            backbone = {key.removeprefix("backbone."): value for key, value in weights.items()}
            load_weights(model.backbone, backbone, name=request.parent_file)
        else:
            load_weights(model, weights, name=request.parent_file)
    attach(model, lora=request.lora, noise=request.training.weight_noise, bits=request.training.quantized_bits)
    return model


def build_trainer(request: RunRequest, loggers: list, callbacks: list) -> pl.Trainer:
    """Lightning's trainer for this run."""
    training = request.training
    return pl.Trainer(
        accelerator=request.accelerator,
        devices=request.devices,
        num_nodes=request.machines,
        # Without this option, DDP reorders the gradients after its first step, so that a resumed run
        # would sum those of three or more devices in another order than the run that it continues.
        strategy="ddp_find_unused_parameters_true" if request.world > 1 else "auto",
        # Under Slurm, Lightning's default would train on one device with a part of the data.
        plugins=[LightningEnvironment(), AtomicIO()],
        precision=request.precision,
        deterministic="warn" if request.accelerator == "gpu" and training.deterministic else False,
        max_epochs=training.epochs,
        min_epochs=0,
        max_steps=request.total_steps,
        check_val_every_n_epoch=training.epochs + 1,  # never: `StateSaver` validates, at optimizer steps
        accumulate_grad_batches=training.grad_accum,
        gradient_clip_val=training.grad_clip or None,
        use_distributed_sampler=False,
        logger=loggers,
        callbacks=callbacks,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        log_every_n_steps=training.log_every,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def quieten() -> None:
    """Silence Lightning's own messages."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",  # features cost less than a worker
        ".*cumsum_cuda_kernel does not have a deterministic.*",  # used in decoding, not in training
        ".*exists and is not empty.*",  # the directory of a run that is continued
        ".*smaller than the logging interval.*",
        ".*functools.lru_cache.*",  # FlexAttention's block mask, which a compiled step rebuilds
        ".*`srun` command is available.*",  # ranks are started by the trainer, never by srun
    ):
        warnings.filterwarnings("ignore", message=message)


def set_up_torch(request: RunRequest) -> None:
    """Set torch's number of threads, and the precision and determinism of its GPU kernels."""
    torch.set_num_threads(request.training.threads)
    if request.world > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(request.training.threads))  # Lightning would set another number for rank 0
    if request.accelerator == "gpu":
        torch.set_float32_matmul_precision("medium")
        if request.training.deterministic:
            import torch._inductor.config as inductor

            torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and nothing here reads uninitialized memory
            if hasattr(inductor, "deterministic"):  # selects kernels by rules instead of by timing them
                inductor.deterministic = True


def fit(
    request: RunRequest,
    run: RunDirectory,
    data: DataModule,
    *,
    machines: Machines | None = None,
    deadline: float | None = None,
    wanted_state: Path | None = None,
    prolonged: Prolonged | None = None,
) -> None:
    """Train to the end, from the start or from a training state; rank 0 writes the finished checkpoint and its figures.

    Parameters
    ----------
    request : RunRequest
        The run to train.
    run : RunDirectory
        Locked by the first process of the first machine, which records the start of the run in it.
    data : DataModule
        From `build_data`.
    machines : Machines, optional
        Passed by the first process of each machine only, not by those that it has started for its other devices.
    deadline : float, optional
        Time of `time.monotonic` after which the run saves and ends with status 75.
    wanted_state : Path, optional
        Training state to continue from; by default, the newest that can be read.
    prolonged : Prolonged, optional
        A shorter run, with whose training state this one begins.

    Raises
    ------
    BadRequest
        If no training state can be read, or the one to continue from does not exist on this machine.
    Failed
        If loss, gradient or weights are not finite, memory runs out, or a training state cannot be written (status 1); after
        saving because of a signal (143, 129 for SIGHUP, 130 for SIGINT) or the deadline (75).
    """
    quieten()
    set_up_torch(request)
    training = request.training
    model = build_starting_model(request)
    record = build_record(request)
    module = TrainingModule(
        model, training, record=record, total_steps=request.total_steps, scales=request.manifest["scales"],
        regions=build_region_schedule(request),
    )  # fmt: skip
    terms = module.objective.names if len(module.objective.names) > 1 else ()
    examples = None
    decoding = {"batch_size": training.batch_size_eval} if training.batch_size_eval else {}
    if training.decode_items and len(data.test_set) and is_readable(training.objective):
        examples = DecodedExamples(
            data.test_set, examples=training.decode_items, grid=request.grid, metrics=training.metrics, **decoding
        )
    log = TrainingLog(
        run.log, request.name, total_steps=request.total_steps, steps_per_epoch=request.steps_per_epoch,
        examples_per_batch=request.batch_examples, every=training.log_every,
        validates=request.validates_after, terms=terms, metrics=training.metrics if examples else (),
        checks_gradient=request.precision != "16-mixed",
    )  # fmt: skip
    first = machines is not None and machines.is_first
    trackers = Trackers(
        run, request.settings, histograms=training.histograms, validates=request.validates_after, name=request.name,
        window_size=request.manifest["window_size"],
    )  # fmt: skip
    validation = Validation(
        run, request.name, log, record=record, examples=examples, trackers=trackers, seed=training.seed,
        steps_per_epoch=request.steps_per_epoch, patience=training.patience, min_delta=training.min_delta,
    )  # fmt: skip
    average = WeightAverage(model, training.ema_decay) if training.ema_decay else None
    own = build_callbacks(training.callbacks)

    def refuse(trainer: pl.Trainer) -> None:
        log.stop_if_bad(trainer)
        stop_if_not_storable(own)

    state_saver = StateSaver(
        run, request.name, every_steps=training.save_every, every_minutes=training.save_minutes, keep=training.keep_saves,
        total_steps=request.total_steps, validates=request.validates_after, refuse=refuse, deadline=deadline,
        validated_weights=contextlib.nullcontext if average is None else average.averaged,
    )  # fmt: skip
    profiling = None
    if training.profiler != "none" and first:
        profiling = Profiling(run.path, request.name, kind=training.profiler, batches=training.profile_batches)
    callbacks = [Reseed(training.seed), log, validation, module.adaptive_rate, average, *own, profiling, trackers, state_saver]
    loggers = build_loggers(training, run, name=request.name, first=first)
    trainer = build_trainer(request, loggers, [callback for callback in callbacks if callback is not None])
    trainer._signal_connector.register_signal_handlers = lambda: None  # Lightning's handlers would replace ours
    last = None
    if trainer.is_global_zero:
        summary = build_summary(request, model)
        announce(request, summary)
        if run.read_record() is None:
            run.start(request.identity, request.settings, grid=dataclasses.asdict(request.grid), summary=summary)
            if prolonged is not None:
                begin_with(prolonged, run, request, record, columns=log.columns)
        last = find_state_to_continue(run, request.name, wanted=wanted_state)
        if last is not None:
            logger.info(f"{request.name}: continuing from {last}")
    if machines is not None:
        os.environ[STATE_VARIABLE] = machines.share("" if last is None else str(last.absolute()))
    last = os.environ[STATE_VARIABLE] or None
    if last is not None and not os.path.exists(last):
        raise BadRequest(
            f"the training state {last} does not exist on this machine; all machines must share the run directory's file system"
        )
    with state_saver.listening():
        run_trainer(trainer, request, module, data, last)
    if trainer.global_step != request.total_steps and not validation.stopped and own:
        raise Failed(
            f"{request.name}: a callback stopped the training at step {trainer.global_step} of {request.total_steps}, so that "
            "there is no finished checkpoint; to end early, use patience or max_steps"
        )
    if trainer.global_step != request.total_steps and not validation.stopped:
        raise RuntimeError(f"{request.name}: training stopped at step {trainer.global_step} of {request.total_steps}")
    if average is not None:
        average.load_average()
    if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
        raise Failed(
            f"{request.name}: the trained weights are not finite; lower the learning rate, or clip the gradient "
            "(grad_clip: 1.0)"
        )
    if trainer.is_global_zero:
        finish(request, run, module.model, validation, step=trainer.global_step, examples=examples)
        trackers.finished(trainer, run.finished_checkpoint())


def run_trainer(trainer: pl.Trainer, request: RunRequest, module: TrainingModule, data: DataModule, training_state) -> None:
    """Run Lightning's fit. An exception becomes a message, and ends the processes for this machine's other devices."""
    try:
        trainer.fit(module, data, ckpt_path=training_state, weights_only=True)
    except BaseException as error:
        launcher = trainer.strategy.launcher
        if launcher is not None and trainer.local_rank == 0 and not getattr(error, "agreed", False):
            launcher.kill(signal.SIGKILL)  # they would wait for this process forever
            launcher.procs.clear()  # otherwise Lightning would kill this process before it has reported the error
        # torch's message on a CPU is "can't allocate memory".
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            raise Failed(describe_out_of_memory(request, error)) from error
        if is_compiler_error(error):
            raise Failed(
                f"{request.name}: the network could not be compiled ({first_line(error)}); `compile: none` trains without "
                "compiling, in a new run"
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise Failed(f"{request.name}: {error}; free disk space and run the same command again") from error
        raise


def is_compiler_error(error: BaseException) -> bool:
    """Whether an exception comes from `torch.compile`."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return isinstance(error, TorchDynamoException | InductorError)


def describe_out_of_memory(request: RunRequest, error: Exception) -> str:
    """A message about lack of memory, with settings that need less."""
    training = request.training
    half = max(1, training.batch_size // 2)
    accumulation = -(-training.batch_size * training.grad_accum // half)
    return (
        f"{request.name}: out of memory on {request.world} {request.accelerator} ({first_line(error)}). Lower batch_size and "
        f"raise grad_accum, which keeps the effective batch of {request.effective_batch}: batch_size: {half}, grad_accum: "
        f"{accumulation}. Fewer windows (windows, or a shorter sequence_length) help most, then gradient_checkpointing: true. "
        "Any of these starts a new run"
    )


def finish(
    request: RunRequest, run: RunDirectory, model: CoalescenceModel, validation: Validation, *, step: int, examples
) -> None:
    """Write the finished checkpoint, record which one is published, and draw the figures."""
    epoch = (step - 1) // request.steps_per_epoch
    finished = run.checkpoints / f"{request.name}_epoch={epoch}-step={step}.ckpt"
    write_checkpoint(finished, model.state_dict(), validation.record | {"epoch": epoch, "step": step})
    run.finish(validation.best_checkpoint() if request.training.export == "best" else finished)
    lost = try_drawing(lambda: draw(request, run, model, examples))
    if lost:  # not an error, because the checkpoint is complete
        logger.warning(f"{request.name}: trained, but not all figures could be drawn ({lost})")


def draw(request: RunRequest, run: RunDirectory, model: CoalescenceModel, examples) -> None:
    """Draw losses.png, and tracks.png of the decoded examples."""
    from cxt.evaluation.figures import draw_losses, draw_tracks

    draw_losses(read_log(run.log), run.path / "losses.png", title=f"{request.name}: training")
    if examples is not None:
        device = next(model.parameters()).device
        tracks = examples.arrange_tracks(examples.decode(model.eval(), seed=request.training.seed, device=device))
        draw_tracks(tracks, run.path / "tracks.png", title=request.name, window_size=request.manifest["window_size"])
