"""Prolonging a run: a new, longer run that begins with the whole training state of a shorter one.

It ends in the weights, bit for bit, of a run that was planned that long from the start. So it is only done where nothing that
the shorter run did depends on its length.
"""

import dataclasses
from pathlib import Path

import torch

from cxt.checkpoints.archive import open_verified, pack
from cxt.checkpoints.file import read_checkpoint, write_checkpoint
from cxt.checkpoints.run_directory import RunDirectory
from cxt.checkpoints.training_log import COLUMNS, keep_rows
from cxt.config.training import TrainingConfig, list_result_neutral_settings
from cxt.console import get_logger
from cxt.errors import BadRequest
from cxt.io import atomic_link, atomic_write, file_sha256
from cxt.trainer.request import RunRequest
from cxt.trainer.training_state import find_damage, get_step, list_training_states
from cxt.trainer.validation import Validation

logger = get_logger(__name__)

LENGTHS = ("epochs", "max_steps")
"""Settings of a run's length."""


@dataclasses.dataclass(frozen=True)
class Prolonged:
    """The run that is prolonged, and the training state of it from which the longer one continues."""

    run: RunDirectory
    state: Path

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return get_step(self.state)

    def moved(self, path: Path) -> "Prolonged":
        """The same after the run directory was renamed to *path*."""
        return Prolonged(RunDirectory(path), path / "checkpoints" / self.state.name)


def differs_in_length_only(before: dict, identity: dict, *, of_workflow: bool = False) -> bool:
    """Whether two identities of runs differ in epochs or steps, and in nothing else.

    With *of_workflow* they also differ in their lineage, of which the workflow has found that it differs by the length only.
    """

    def without_length(whole: dict) -> dict:
        rest = whole | {"settings": {key: value for key, value in whole["settings"].items() if key not in LENGTHS}}
        return rest | {"lineage": None} if of_workflow else rest

    return before != identity and without_length(before) == without_length(identity)


def describe_length_dependence(training: TrainingConfig) -> str | None:
    """What in a training depends on its number of steps, and what to choose instead; None if nothing does."""
    if training.schedule not in ("constant", "adaptive") and not training.decay_steps:
        return (
            f"the schedule {training.schedule} with decay_steps 0 lowers the learning rate until the last step, so that a "
            "longer run differs from its first step on; for runs that can be prolonged, choose schedule: constant, or set "
            "decay_steps"
        )
    if any(term.final_weight not in (None, term.weight) for term in training.losses):
        return "a term of the losses has a final_weight, which it reaches at the last step; to prolong runs, omit it"
    if training.patience:
        return "patience may have ended the shorter run where the longer one would end, too; to prolong runs, set it to 0"
    if training.regions.first_windows:
        return (
            "regions.first_windows grows in a fraction of the steps, so that a longer run differs from its first step on; to "
            "prolong runs, omit it"
        )
    noise = training.noise
    if not noise.is_off and noise.initial_factor != noise.final_factor:
        return (
            "noise has an initial_factor and a final_factor, which it reaches at the last step; for runs that can be "
            "prolonged, set both to the same"
        )
    return None


def choose_state_to_prolong(run: RunDirectory, record: dict, request: RunRequest, *, wanted: Path | None = None) -> Prolonged:
    """The training state of *run*, a shorter run of the same settings, from which the requested one continues.

    Parameters
    ----------
    run : RunDirectory
        The shorter run, finished or not.
    record : dict
        Its run.json.
    request : RunRequest
        The longer run.
    wanted : Path, optional
        The state to continue from; by default the newest that can be read.

    Raises
    ------
    BadRequest
        If the requested run is not longer, the training depends on its length, or there is no state to continue from.
    """
    settings = record["identity"]["settings"]
    planned = settings.get("max_steps") or settings["epochs"] * request.steps_per_epoch
    if request.total_steps <= planned:
        raise BadRequest(
            f"{run.path} was planned for {planned} steps, and this request is for {request.total_steps}; a run can be made "
            "longer, but not shorter. Raise epochs or max_steps, or train a shorter one in another run directory"
        )
    if (reason := describe_length_dependence(request.training)) is not None:
        raise BadRequest(f"{run.path} cannot be prolonged from {planned} to {request.total_steps} steps: {reason}")
    # A run is validated after its last step. That must not decide anything, unless the longer run is validated there, too.
    decides = "validate_every" not in list_result_neutral_settings(request.settings)
    tested = bool(request.manifest["splits"]["test"]["items"])
    last_is_usable = not (decides and tested) or request.validates_after(planned)
    states = list_training_states(run)
    if wanted is not None:
        states = [path for path in states if path.resolve() == wanted.resolve()]
    usable = [path for path in states if get_step(path) < planned or (get_step(path) == planned and last_is_usable)]
    has_lost_best = False
    for path in usable:
        if (damage := find_damage(path)) is not None:
            logger.info(f"{request.name}: the training state {path} cannot be read ({damage})")
        elif request.training.export == "best" and not _has_best(run, path, request):
            has_lost_best = True
        else:
            return Prolonged(run, path)
    if has_lost_best or (states and not usable):
        effect = "replaced the best weights before it" if has_lost_best else "decides about its weights"
        raise BadRequest(
            f"{run.path} cannot be prolonged: the validation after its last step, {planned}, {effect}, and a longer run is not "
            f"validated there; choose validate_every so that {planned} is a multiple of it"
        )
    raise BadRequest(
        f"{run.path} cannot be prolonged: it has no training state that can be read; omit --resume to start afresh"
    )


def _has_best(run: RunDirectory, path: Path, request: RunRequest) -> bool:
    """Whether the longer run will have the best weights on which a training state counts.

    Those in the run directory may be better ones, of a later validation. The longer run makes these itself, unless that was
    the validation after the last step of the shorter run.
    """
    best = _read_state(path)["callbacks"].get(Validation.__qualname__)
    if best is None or not best["sha256"]:
        return True
    if not run.best.is_file():
        return False
    return file_sha256(run.best) == best["sha256"] or request.validates_after(read_checkpoint(run.best).record["step"])


def _read_state(path: Path) -> dict:
    """The content of a training state, on the CPU."""
    with open_verified(path, sealed=True) as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def begin_with(prolonged: Prolonged, run: RunDirectory, request: RunRequest, record: dict, *, columns=COLUMNS) -> None:
    """Copy the training state, the log and the best weights of a shorter run into the run directory of the longer one.

    If that fails, the longer run has not been started, so that the next try begins with the shorter run, too.

    Parameters
    ----------
    prolonged : Prolonged
        The shorter run, which is locked meanwhile.
    run : RunDirectory
        The longer run, which has just been started.
    request, record : RunRequest, dict
        The longer run, and the record of its checkpoints.
    columns : sequence of str
        Columns of the training log.
    """
    path = run.checkpoints / prolonged.state.name
    try:
        prolonged.run.lock()
        state = _read_state(prolonged.state)
        state["cxt"] = record
        best = state["callbacks"].get(Validation.__qualname__)
        old_best = prolonged.run.best
        if best is not None and old_best.is_file() and file_sha256(old_best) == best["sha256"]:
            checkpoint = read_checkpoint(old_best)
            about = {key: checkpoint.record[key] for key in ("epoch", "step", "val_loss")}
            write_checkpoint(run.best, checkpoint.state_dict, record | about)
            best["sha256"] = file_sha256(run.best)
        step = prolonged.step
        if prolonged.run.log.is_file():
            atomic_write(run.log, prolonged.run.log.read_bytes())
            has_row = step % request.training.log_every == 0 or request.validates_after(step)
            keep_rows(run.log, up_to=step if has_row else step - 1, columns=columns)
        atomic_write(path, pack(state))
        atomic_link(run.last, path.name)
    except BaseException:
        for made in (run.path / "run.json", run.last, path, run.best, run.log):
            made.unlink(missing_ok=True)
        raise
    finally:
        prolonged.run.release()
    logger.info(f"{request.name}: prolonging {prolonged.run.path} from step {step} of it to step {request.total_steps}")
