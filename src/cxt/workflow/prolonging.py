"""Finding a shorter training of a model, which a longer one continues."""

from pathlib import Path

from cxt.checkpoints.run_directory import RunDirectory
from cxt.config.models import build_training_config
from cxt.errors import BadRequest
from cxt.workflow.lineages import model_lineage, run_directory


def find_run_to_prolong(config: dict, name: str) -> str | None:
    """The run directory of the longest training of a model with fewer epochs, and otherwise of the same lineage.

    None if there is none, or the model's present training has begun. Whether a training can be prolonged is for the trainer to
    say, which knows its steps.
    """
    own = Path(run_directory(config, name))
    if (own / "run.json").exists():
        return None
    epochs = build_training_config(config, name).epochs
    found = {}
    for path in own.parent.glob(f"{name}-*/run.json"):
        try:
            identity = (RunDirectory(path.parent).read_record() or {})["identity"]
            fewer, lineage = identity["settings"]["epochs"], identity["lineage"]
        except (BadRequest, LookupError, TypeError):
            continue  # damaged, or of another program; a training does not depend on it
        if fewer < epochs and path.parent.name == f"{name}-{lineage}" and lineage == _lineage_with(config, name, epochs=fewer):
            found[fewer] = path.parent
    return str(found[max(found)]) if found else None


def _lineage_with(config: dict, name: str, *, epochs: int) -> str:
    """The lineage that a model has with another number of epochs."""
    model = config["models"][name]
    changed = model | {"training": model.get("training", {}) | {"epochs": epochs}}
    return model_lineage(dict(config) | {"models": config["models"] | {name: changed}}, name)
