"""Finding a shorter training of a model, which a longer one continues."""

import os
from pathlib import Path
from typing import NamedTuple

from cxt.checkpoints.run_directory import RunDirectory
from cxt.config.models import build_region_plan, build_training_config, get_max_steps
from cxt.config.on_the_fly import is_on_the_fly
from cxt.config.training import steps_per_epoch
from cxt.errors import BadRequest
from cxt.workflow.jobs import count_model_examples, get_world_size
from cxt.workflow.lineages import model_lineage, run_directory


class Length(NamedTuple):
    """How long a training is: *max_steps* optimizer steps, or *epochs* if that is None."""

    epochs: int
    max_steps: int | None


def find_run_to_prolong(config: dict, name: str) -> str | None:
    """The run directory of the training of a model that has come furthest, is shorter, and otherwise of the same lineage.

    None if there is none, or the model's present training has begun. Of several that have come equally far, it is the one that
    was planned longest. Whether a training can be prolonged is for the trainer to say.
    """
    own = Path(run_directory(config, name))
    if (own / "run.json").exists() or is_on_the_fly(config["datasets"][config["models"][name]["dataset"]]):
        return None
    wanted = _count_steps(config, name, Length(build_training_config(config, name).epochs, get_max_steps(config, name)))
    found = {}
    for path in own.parent.glob(f"{name}-*/run.json"):
        run = RunDirectory(path.parent)
        try:
            identity = (run.read_record() or {})["identity"]
            settings, lineage = identity["settings"], identity["lineage"]
            other = Length(settings["epochs"], settings.get("max_steps"))
            planned, done = _count_steps(config, name, other), _find_last_step(run)
        except (BadRequest, LookupError, TypeError, AttributeError, ValueError, OSError):
            continue  # damaged, or of another program; a training does not depend on it
        is_same = run.path.name == f"{name}-{lineage}" and lineage == _lineage_with(config, name, other)
        if planned < wanted and is_same:
            found[done, planned, run.path.name] = run.path
    return str(found[max(found)]) if found else None


def _count_steps(config: dict, name: str, length: Length) -> int:
    """Optimizer steps of a training of a model that is *length* long."""
    if length.max_steps is not None:
        return length.max_steps
    training = build_training_config(config, name)
    return length.epochs * steps_per_epoch(
        examples=count_model_examples(config, name, "train"), batch_size=training.batch_size, grad_accum=training.grad_accum,
        world=get_world_size(config, name), plan=build_region_plan(config, name),
    )  # fmt: skip


def _find_last_step(run: RunDirectory) -> int:
    """The step of a run's newest training state, to which `last.ckpt` links; OSError or ValueError without one."""
    return int(os.readlink(run.last).removeprefix("step=").removesuffix(".ckpt"))


def _lineage_with(config: dict, name: str, length: Length) -> str:
    """The lineage that a model has with another length."""
    model = config["models"][name]
    training = {key: value for key, value in model.get("training", {}).items() if key != "max_steps"}
    training |= {key: value for key, value in length._asdict().items() if value is not None}
    return model_lineage(dict(config) | {"models": config["models"] | {name: model | {"training": training}}}, name)
