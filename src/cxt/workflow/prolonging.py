"""Finding a shorter training of a model, which a longer one continues."""

from pathlib import Path
from typing import NamedTuple

from cxt.checkpoints.run_directory import RunDirectory
from cxt.config.models import build_training_config, get_max_steps
from cxt.errors import BadRequest
from cxt.workflow.lineages import model_lineage, run_directory


class Length(NamedTuple):
    """How long a training is: *max_steps* optimizer steps, or *epochs* if that is None."""

    epochs: int
    max_steps: int | None

    def may_be_shorter(self, other: "Length") -> bool:
        """Whether it is shorter than *other*, or may be, for all that is known without the number of examples."""
        if self.max_steps is None and other.max_steps is None:
            return self.epochs < other.epochs
        return self.max_steps is None or other.max_steps is None or self.max_steps < other.max_steps


def find_run_to_prolong(config: dict, name: str) -> str | None:
    """The run directory of the longest training of a model that is shorter, and otherwise of the same lineage.

    None if there is none, or the model's present training has begun. Whether a training can be prolonged is for the trainer to
    say, which knows its steps.
    """
    own = Path(run_directory(config, name))
    if (own / "run.json").exists():
        return None
    length = Length(build_training_config(config, name).epochs, get_max_steps(config, name))
    found = {}
    for path in own.parent.glob(f"{name}-*/run.json"):
        try:
            identity = (RunDirectory(path.parent).read_record() or {})["identity"]
            settings, lineage = identity["settings"], identity["lineage"]
            other = Length(settings["epochs"], settings.get("max_steps"))
        except (BadRequest, LookupError, TypeError, AttributeError):
            continue  # damaged, or of another program; a training does not depend on it
        is_same = path.parent.name == f"{name}-{lineage}" and lineage == _lineage_with(config, name, other)
        if other.may_be_shorter(length) and is_same:
            found[other.max_steps or 0, other.epochs] = path.parent
    return str(found[max(found)]) if found else None


def _lineage_with(config: dict, name: str, length: Length) -> str:
    """The lineage that a model has with another length."""
    model = config["models"][name]
    training = {key: value for key, value in model.get("training", {}).items() if key != "max_steps"}
    training |= {key: value for key, value in length._asdict().items() if value is not None}
    return model_lineage(dict(config) | {"models": config["models"] | {name: model | {"training": training}}}, name)
