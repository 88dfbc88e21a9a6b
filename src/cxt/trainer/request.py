"""The resolved, checked request of a run."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxt.config.contradictions import check_training
from cxt.config.flags import note_more_than_cores
from cxt.config.learning import is_readable
from cxt.config.network import PRESETS, AdapterConfig, LoraConfig, ModelConfig
from cxt.config.regions import RegionPlan, check_regions
from cxt.config.training import (
    TrainingConfig,
    averaging_decay,
    drop_later_defaults,
    list_result_neutral_settings,
    steps_per_epoch,
)
from cxt.console import get_logger
from cxt.data.grid import Grid
from cxt.data.manifest import read_manifest
from cxt.data.shards import MANIFEST
from cxt.errors import BadRequest, suggest_nearest
from cxt.io import file_sha256
from cxt.lineage import STAGE_VERSION, describe_difference, how_to_replan, stage_lineage
from cxt.trainer.data_source import check_source, identify_soft_targets, plan_simulations
from cxt.trainer.devices import choose_devices, choose_precision, has_bfloat16
from cxt.trainer.options import TrainingOptions
from cxt.trainer.parents import (
    ADAPTER_FLAGS,
    NETWORK_FLAGS,
    check_adapter_flags,
    inherit,
    read_parent,
    resolve_lora,
    resolve_network,
)

if TYPE_CHECKING:  # importing torch takes seconds
    from cxt.checkpoints.file import Checkpoint

logger = get_logger(__name__)

RUN_CONTROL_OPTIONS = (
    "resume", "prolong", "restart", "run_dir", "log_dir", "out", "log_out", "max_minutes", "lineage", "settings_lineage",
    "dataset_lineage", "parent_lineage", "parent_sha256", "soft_targets_lineage", "wait_for_lock",
)  # fmt: skip
"""Options that are not settings of a run: its directory, how it starts and ends, and the lineages the workflow expects."""

OPTIONS_IDENTIFIED_OTHERWISE = (
    "dataset_path", "soft_targets", "configfile", "checkpoint", "resume_adapter", "lora_of", "gpus", "devices", "nodes",
    "accelerator",
)  # fmt: skip
"""Settings that are in a run's identity in another form: files by digest, devices by number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRequest:
    """Everything that determines a run, checked.

    Attributes
    ----------
    name, preset : str
        Name of the checkpoint, and of its architecture.
    dataset_path : str or None
        The dataset; None if scenarios are simulated on the fly.
    manifest : dict
        Its dataset.json, or the equivalent for simulated scenarios.
    dataset_sha256 : str
        Digest of the manifest.
    simulated : list of dict or None
        Variants to simulate on the fly; None for a dataset on disk.
    network, adapter, lora, training : ModelConfig, AdapterConfig or None, LoraConfig or None, TrainingConfig
        Settings; *adapter* is None for a plain model, and *lora* if all weights are trained.
    soft_targets : dict or None
        directory, digest, and teacher of the soft targets; None without a teacher.
    parent : Checkpoint or None
        The checkpoint to start from.
    parent_file, parent_sha256 : str or None
        Its file, and that file's digest.
    published_sha256 : str or None
        Digest of the published file that the workflow imported the parent from.
    resumes_adapter : bool
        Whether the parent's adapter weights are loaded too.
    accelerator : str
        `cpu`, `gpu` or `mps`.
    devices : int or list of int
        Number of devices of each machine, or indices of GPUs.
    precision : str
        Precision of the arithmetic: that of the settings, if the devices have it.
    machines : int
        Number of machines.
    lineage : str or None
        Digest of everything the checkpoint depends on.
    max_steps : int or None
        Optimizer steps after which training ends, in place of the epochs.
    identity : dict
        Everything that identifies the run: settings that affect the result, devices, lineage, digests of dataset and parent.
    settings : dict
        All settings, in the format of `--config`.
    """

    name: str
    preset: str
    dataset_path: str | None
    manifest: dict
    dataset_sha256: str
    simulated: list[dict] | None
    network: ModelConfig
    adapter: AdapterConfig | None
    lora: LoraConfig | None
    training: TrainingConfig
    soft_targets: dict | None
    parent: "Checkpoint | None"
    parent_file: str | None
    parent_sha256: str | None
    published_sha256: str | None
    resumes_adapter: bool
    accelerator: str
    devices: int | list[int]
    precision: str
    machines: int
    lineage: str | None
    max_steps: int | None
    identity: dict[str, Any]
    settings: dict[str, Any]

    @property
    def world(self) -> int:
        """Number of devices on all machines."""
        return self.machines * count_devices(self.devices)

    @property
    def device_type(self) -> str:
        """Torch's name of the type of device."""
        return {"gpu": "cuda"}.get(self.accelerator, self.accelerator)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; BadRequest if the dataset is smaller than a batch."""
        return self.max_steps or self.all_steps

    @property
    def all_steps(self) -> int:
        """Optimizer steps of all epochs."""
        return self.training.epochs * self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return steps_per_epoch(
            examples=self.manifest["splits"]["train"]["items"],
            batch_size=self.training.batch_size,
            grad_accum=self.training.grad_accum,
            world=self.world,
            plan=self.region_plan,
        )

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of each device in an epoch."""
        examples = self.manifest["splits"]["train"]["items"]
        return self.region_plan.count_batches(examples=examples, batch_size=self.training.batch_size, world=self.world)

    @property
    def region_plan(self) -> RegionPlan:
        """How the examples are cut into regions."""
        return RegionPlan(self.manifest["windows"], self.network.windows, self.training.regions)

    @property
    def batch_examples(self) -> int:
        """Examples per micro-batch on all devices."""
        return self.training.batch_size * self.region_plan.per_row * self.world

    @property
    def effective_batch(self) -> int:
        """Examples per optimizer step."""
        return self.batch_examples * self.training.grad_accum

    @property
    def grid(self) -> Grid:
        """The network's grid of ln generations."""
        return Grid(self.network.grid_low, self.network.grid_high, self.network.bins)

    def validates_after(self, step: int) -> bool:
        """Whether to validate after an optimizer step: every `validate_every` steps or once per epoch, and after the last."""
        if not self.manifest["splits"]["test"]["items"]:
            return False
        return step % (self.training.validate_every or self.steps_per_epoch) == 0 or step == self.total_steps


def count_devices(devices: int | list[int]) -> int:
    """Number of devices of a machine, given in Lightning's format."""
    return len(devices) if isinstance(devices, list) else devices


def build_request(options: TrainingOptions) -> RunRequest:
    """Resolve the options of a run and check them against dataset, parent and devices.

    Parameters
    ----------
    options : TrainingOptions
        From the command line or from Python.

    Returns
    -------
    RunRequest

    Raises
    ------
    BadRequest
        If the options cannot be fulfilled.
    """
    _check_preset(options)
    check_source(options)
    check_adapter_flags(options)
    accelerator, devices = choose_devices(options)
    training = options.training
    precision = choose_precision(training.precision, accelerator, has_bfloat16=has_bfloat16(accelerator))
    world = options.nodes * count_devices(devices)
    if options.simulate is None:
        simulated, manifest = None, read_manifest(options.dataset_path)
        data_digest = file_sha256(Path(options.dataset_path) / MANIFEST)
    else:
        training = training.replace(epochs=1, validate_every=training.validate_every or -(-options.max_steps // 10))
        simulated, manifest = plan_simulations(options, training, world=world)
        data_digest = stage_lineage("preprocess", STAGE_VERSION["simulate"], simulated, manifest)
    parent_file, parent = read_parent(options)
    _check_lineages(options, manifest, parent)
    options = inherit(options, parent)
    if options.windows == manifest["windows"]:  # the same as leaving it out
        options = dataclasses.replace(options, windows=None)
    network, adapter = resolve_network(options, manifest, parent)
    lora = resolve_lora(options, network, parent)
    check_training(
        training,
        network,
        adapter,
        has_lora=lora is not None,
        parent_objective=None if parent is None else (parent.record["training"] or {}).get("objective", "autoregressive"),
        on_gpu=accelerator == "gpu",
    )
    plan = RegionPlan(manifest["windows"], network.windows, training.regions)
    check_regions(plan, training, network)
    if training.mlflow is not None or training.wandb is not None:
        from cxt.trainer.trackers import check_trackers

        check_trackers(training)
    if training.callbacks:
        from cxt.trainer.user_callbacks import build_callbacks

        build_callbacks(training.callbacks)  # to refuse wrong ones before any work
    soft_targets = identify_soft_targets(options, manifest, network)
    examples = {split: manifest["splits"][split]["items"] for split in ("train", "test")}
    per_epoch = steps_per_epoch(
        examples=examples["train"], batch_size=training.batch_size, grad_accum=training.grad_accum, world=world, plan=plan
    )
    if options.max_steps is not None:  # takes the place of the epochs
        training = training.replace(epochs=max(training.epochs, -(-options.max_steps // per_epoch)))
    if not examples["test"] and (training.patience or training.export == "best"):
        asks = "patience" if training.patience else "export: best"
        raise BadRequest(f"{asks} needs validation, but the dataset has no test examples")
    if not examples["test"] and training.schedule == "adaptive":
        raise BadRequest("the schedule adaptive needs validation, but the dataset has no test examples")
    settings = list_settings(options)
    parent_digest = None if parent_file is None else file_sha256(parent_file)
    leave_out = {*OPTIONS_IDENTIFIED_OTHERWISE, *list_result_neutral_settings(settings)}
    identity = {
        "settings": drop_later_defaults({key: value for key, value in settings.items() if key not in leave_out}),
        # On several machines, GPUs may sum in another order. Earlier runs have recorded the word "nodes".
        "devices": f"{world} {accelerator}"
        + (f" on {options.nodes} nodes" if options.nodes > 1 else "")
        + (f" in {precision}" if accelerator == "gpu" and precision != training.precision else ""),
        "lineage": options.lineage,
        "dataset": data_digest,
        "parent": parent_digest,
    } | ({} if soft_targets is None else {"soft_targets": soft_targets["digest"]})
    request = RunRequest(
        name=options.checkpoint_name,
        preset=options.model,
        dataset_path=options.dataset_path,
        manifest=manifest,
        dataset_sha256=data_digest,
        simulated=simulated,
        network=network,
        adapter=adapter,
        lora=lora,
        training=training,
        soft_targets=soft_targets,
        parent=parent,
        parent_file=None if parent_file is None else str(parent_file),
        parent_sha256=parent_digest,
        published_sha256=None if options.parent_sha256 == parent_digest else options.parent_sha256,
        resumes_adapter=options.resume_adapter is not None,
        accelerator=accelerator,
        devices=devices,
        precision=precision,
        machines=options.nodes,
        lineage=options.lineage,
        max_steps=options.max_steps,
        identity=identity,
        settings=settings,
    )
    _note_doubtful_settings(request)
    return request


def resolve_settings(options: TrainingOptions) -> dict[str, Any]:
    """All settings of a run, in the format of --config; sizes that are not given come from the parent or the preset."""
    _check_preset(options)
    check_adapter_flags(options)
    options = inherit(options, read_parent(options)[1])
    return {key: getattr(PRESETS[options.model], key) for key in NETWORK_FLAGS} | list_settings(options)


def list_settings(options: TrainingOptions) -> dict[str, Any]:
    """The settings that determine the result, in the format of --config."""
    leave_out = set(RUN_CONTROL_OPTIONS) if options.has_adapter else {*RUN_CONTROL_OPTIONS, *ADAPTER_FLAGS}
    return {key: value for key, value in options.flatten().items() if key not in leave_out and value is not None}


def _check_preset(options: TrainingOptions) -> None:
    if options.model not in PRESETS:
        raise BadRequest(f"unknown model '{options.model}'{suggest_nearest(options.model, PRESETS)}")


def _check_lineages(options: TrainingOptions, manifest: dict, parent: "Checkpoint | None") -> None:
    """BadRequest if settings, dataset or parent are not those that the workflow has planned for the run."""
    if options.simulate is not None and options.dataset_lineage is not None:
        raise BadRequest("--dataset-lineage cannot be used with --simulate")
    settings_for = options.settings_lineage and options.lineage
    checked = [(f"the settings of {options.checkpoint_name}", options.settings_lineage, settings_for)]
    checked.append((f"dataset {options.dataset_path}", manifest.get("lineage"), options.dataset_lineage))
    if options.parent_lineage is not None:
        if parent is None:
            raise BadRequest("--parent-lineage needs --checkpoint, --resume-adapter or --lora-of")
        checked.append((f"parent {options.parent}", parent.record.get("lineage"), options.parent_lineage))
    if options.parent_sha256 is not None:
        _check_parent_digest(options, parent)
    problems = [
        f"{what}: {describe_difference(lineage, planned)}"
        for what, lineage, planned in checked
        if planned not in (None, lineage)
    ]
    if problems:
        target = options.out or options.dataset_path or options.parent
        raise BadRequest(f"the inputs of training are not the planned ones: {'; '.join(problems)}; {how_to_replan(target)}")


def _check_parent_digest(options: TrainingOptions, parent: "Checkpoint | None") -> None:
    """BadRequest unless the parent is the planned file, or was imported from it."""
    from cxt.checkpoints.load import find_checkpoint  # imports torch

    if parent is None or options.parent is None:
        raise BadRequest("--parent-sha256 needs --checkpoint, --resume-adapter or --lora-of")
    found = file_sha256(find_checkpoint(options.parent))
    if options.parent_sha256 not in (found, parent.record.get("published", {}).get("sha256")):
        raise BadRequest(
            f"parent {options.parent} is not the planned one: its sha256 must be {options.parent_sha256}, got {found}; "
            f"{how_to_replan(options.out or options.dataset_path or options.parent)}"
        )


FEW_EXAMPLES = 1000
"""Test examples that take seconds to read, even on a small machine."""


def _note_doubtful_settings(request: RunRequest) -> None:
    """Note on stderr, once per machine, which settings have no effect in this run, or cost more than they should."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    training, notes = request.training, []
    examples = request.manifest["splits"]["test"]["items"]
    for name in ("validation_items", "decode_items"):
        number = getattr(training, name)
        if number > examples and number != getattr(TrainingConfig(), name):
            notes.append(f"{name} is {number}, but the dataset has only {examples} test examples: using all")
    checked, trained = min(training.validation_items or examples, examples), request.total_steps * request.effective_batch
    if checked >= FEW_EXAMPLES and checked > 10 * trained:
        notes.append(
            f"each validation reads {checked:,} test examples, and the whole training only {trained:,}; "
            f"validation_items: {FEW_EXAMPLES // 2} takes fewer"
        )
    if training.joint_weight != TrainingConfig().joint_weight and training.objective != "joint":
        notes.append(f"joint_weight {training.joint_weight:g} has no effect with the objective {training.objective}")
    defaults = TrainingConfig()
    if training.decode_items not in (0, defaults.decode_items) and not is_readable(training.objective):
        notes.append(f"decode_items has no effect with the objective {training.objective}, which predicts no times")
    if training.masked != defaults.masked and training.objective != "masked":
        notes.append(f"masked has no effect with the objective {training.objective}")
    if training.contrastive != defaults.contrastive and training.objective != "contrastive":
        notes.append(f"contrastive has no effect with the objective {training.objective}")
    if training.losses != defaults.losses and training.objective == "masked":
        notes.append("losses has no effect with the objective masked, which has a loss of its own")
    for name in ("cycles", "cycle_decay"):
        if getattr(training, name) != getattr(TrainingConfig(), name) and training.schedule != "cosine_restarts":
            notes.append(f"{name} {getattr(training, name):g} has no effect with the schedule {training.schedule}")
    if training.distill != TrainingConfig().distill and training.objective != "distill":
        notes.append(f"distill has no effect with the objective {training.objective}")
    if training.adaptive != TrainingConfig().adaptive and training.schedule != "adaptive":
        notes.append(f"adaptive has no effect with the schedule {training.schedule}")
    if training.noise != TrainingConfig().noise and training.noise.is_off:
        notes.append("noise has no effect, because all of its rates, or both of its factors, are 0")
    regions = training.regions
    if regions.growth != defaults.regions.growth and not regions.first_windows:
        notes.append(f"regions.growth {regions.growth:g} has no effect without first_windows")
    if request.region_plan.longest < request.network.windows:
        notes.append(
            f"the network reads {request.network.windows} windows, but no region of its training is longer than "
            f"{request.region_plan.longest}, for which a row of {request.region_plan.row_windows} has room beside the others; "
            f"windows: {request.region_plan.longest} reads no more"
        )
    if regions.varies and training.compile == "auto" and request.accelerator == "gpu":
        notes.append("the network is not compiled, because the number of windows varies; regions.pack would keep it the same")
    if (reached := averaging_decay(request.total_steps, training.ema_decay)) < training.ema_decay:
        notes.append(
            f"ema_decay {training.ema_decay:g} is not reached in {request.total_steps} steps, because the decay warms up to "
            f"{reached:.4g} in them"
        )
    if training.min_delta and not training.patience:
        notes.append(f"min_delta {training.min_delta:g} has no effect without patience")
    for note in notes:
        logger.warning(f"note: {note}")
    cpus = request.devices if request.accelerator == "cpu" and isinstance(request.devices, int) else 1
    note_more_than_cores(threads=training.threads, workers=training.workers, processes=cpus)
