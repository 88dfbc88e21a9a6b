"""Models that are trained on simulations made while they train, in place of a dataset.

Each gets an entry of its own in the `datasets` of the resolved configuration: the shape of its examples, without shards.
"""

from cxt.config.datasets import Layout
from cxt.config.network import PRESETS
from cxt.config.variants import list_variants
from cxt.errors import BadRequest

MARK = "on_the_fly"
"""Key of these entries: the number of examples that are held out for validation."""

KEYS = ("window_size", "samples", "eval_samples")
"""Keys of a model that are for simulation on the fly only."""

FIXED_TRAINING = ("epochs", "storage", "scratch")
"""Settings of training that are for stored datasets only."""


def is_on_the_fly(dataset: dict) -> bool:
    """Whether an entry of `datasets` stands for the simulations that a model makes while it trains."""
    return MARK in dataset


def list_stored_datasets(config: dict) -> list[str]:
    """Names of the datasets that are made and stored."""
    return [name for name, dataset in config["datasets"].items() if not is_on_the_fly(dataset)]


def list_simulated_variants(config: dict, dataset: dict) -> list[dict]:
    """The parameters of the variants that a model simulates while it trains."""
    names = dataset["scenarios"]
    return [variant.spec for name in names for variant in list_variants(name, config["scenarios"][name])]


def check_source(name: str, model: dict) -> None:
    """BadRequest unless a model has either a dataset or scenarios to simulate, and only the keys that go with it."""
    at = f"models.{name}"
    if ("dataset" in model) == ("simulate" in model):
        raise BadRequest(
            f"{at}: `dataset` and `simulate` cannot be used together; remove one"
            if "dataset" in model
            else f"{at}: it has no examples to train on; name a dataset with `dataset`, or scenarios with `simulate`"
        )
    if "dataset" in model:
        if given := [f"`{key}`" for key in KEYS if key in model]:
            raise BadRequest(f"{at}: {', '.join(given)} cannot be used without `simulate`; the dataset has its own")
        return
    training = model.get("training", {})
    if "windows" in model:
        raise BadRequest(
            f"{at}: `windows` cannot be used with `simulate`, which simulates no longer sequences than it reads; set "
            "`sequence_length` of its scenarios"
        )
    if "teacher" in model:
        raise BadRequest(f"{at}: `teacher` cannot be used with `simulate`, because a teacher reads the examples of a dataset")
    if "max_steps" not in training:
        raise BadRequest(
            f"{at}.simulate: simulated examples never run out; say when training ends with `training: {{max_steps: …}}`"
        )
    if "eval_samples" not in model:
        raise BadRequest(f"{at}.simulate: it needs held-out examples for validation; add `eval_samples`, such as 200")
    if given := [f"`{key}`" for key in FIXED_TRAINING if key in training]:
        raise BadRequest(
            f"{at}.training: {', '.join(given)} cannot be used with `simulate`, where every example is new and none is stored; "
            "use `max_steps`"
        )


def fill_simulated(config: dict) -> None:
    """Give each model with `simulate` an entry of `datasets` with the shape of its examples; *config* is modified in place.

    Raises
    ------
    BadRequest
        If scenarios cannot be simulated on the fly, or differ in length.
    """
    for name, model in config["models"].items():
        if "simulate" not in model:
            continue
        at = f"models.{name}.simulate"
        variants = list_simulated_variants(config, {"scenarios": model["simulate"]})
        if files := next((variant["name"] for variant in variants if variant["kind"] == "trees"), None):
            raise BadRequest(
                f"{at}: '{files}' is cut from files, which have only so many pieces; make a dataset of it, and name that "
                "with `dataset`"
            )
        lengths = sorted({int(variant["sequence_length"]) for variant in variants})
        if len(lengths) != 1:
            raise BadRequest(f"{at}: the scenarios must have sequences of the same length, got {lengths} bp")
        fewest = 2 * min(sum(v["samples"].values()) if "samples" in v else v["individuals"] for v in variants)
        layout = Layout().resolved() | {
            "window_size": model.get("window_size", PRESETS[model["preset"]].window_size),
            "sequence_length": lengths[0],
            "samples": model.get("samples", fewest),
            "pairs": 1,
        }
        model["dataset"] = f"{name}:simulate"
        config["datasets"][model["dataset"]] = layout | {"scenarios": model["simulate"], MARK: model["eval_samples"]}
