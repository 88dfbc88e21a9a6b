"""Each model of the configuration: its parents, network, adapter and training settings."""

from cxt.config.network import PRESETS, SIZES, AdapterConfig, LoraConfig, ModelConfig
from cxt.config.on_the_fly import FIXED_TRAINING, MARK, is_on_the_fly, list_simulated_variants
from cxt.config.parent_files import SECTION, ParentFile, is_path
from cxt.config.regions import RegionPlan
from cxt.config.training import TrainingConfig
from cxt.errors import BadRequest, suggest_nearest
from cxt.io import canonical_json

PARENT_KEYS = ("checkpoint", "resume_adapter", "lora_of")
"""Keys of a model that name its parent, another model or a file; a model has at most one of them."""

FILE_KEYS = (*PARENT_KEYS, "teacher")
"""Keys of a model that name another model, or a checkpoint file."""


def get_parent_key(model: dict) -> str | None:
    """The key that names the model's parent or its file, or None."""
    return next((key for key in PARENT_KEYS if key in model), None)


def get_parent(model: dict) -> str | None:
    """Name of the parent model; None without a parent, or if the parent is a file."""
    key = get_parent_key(model)
    return None if key is None or is_path(model[key]) else model[key]


def get_parent_file(config: dict, name: str) -> ParentFile | None:
    """The file that model *name* starts from; None without a parent, or if the parent is another model."""
    key = get_parent_key(config["models"][name])
    return None if key is None else list_files(config, name).get(key)


def get_teacher(model: dict) -> str | None:
    """Name of the model that teaches a model; None without a teacher, or if it is a file."""
    teacher = model.get("teacher")
    return None if teacher is None or is_path(teacher) else teacher


def list_files(config: dict, name: str) -> dict[str, ParentFile]:
    """The checkpoint files that model *name* names, by the keys that name them."""
    model = config["models"][name]
    return {key: ParentFile.from_json(config[SECTION][model[key]]) for key in FILE_KEYS if key in model and is_path(model[key])}


def list_needed(model: dict) -> list[str]:
    """Names of the models that must be trained before: its parent and its teacher."""
    return [name for name in (get_parent(model), get_teacher(model)) if name is not None]


def trace_parents(config: dict, name: str) -> list[str]:
    """*name*, its parent, and so on up to one without a parent, or with a file; BadRequest on unknown parents and cycles."""
    chain = [name]
    while (parent := get_parent(config["models"][chain[-1]])) is not None:
        if parent not in config["models"]:
            raise BadRequest(f"models.{chain[-1]}: unknown parent '{parent}'{_advise_parent(config, parent, chain)}")
        if parent in chain:
            raise BadRequest(f"models: a cycle of parents: {' <- '.join([*chain, parent])}")
        chain.append(parent)
    return chain


def _advise_parent(config: dict, parent: str, chain: list[str]) -> str:
    """What to name in place of a parent that is no model, as the end of a message."""
    if parent in config.get("ensembles", {}):
        return ", which is an ensemble and has no checkpoint; name one of its members"
    nearest = suggest_nearest(parent, [name for name in config["models"] if name not in chain])
    return f"{nearest}; a checkpoint file is given by its path, such as ./{parent.removesuffix('.ckpt')}.ckpt"


def check_order(config: dict) -> None:
    """BadRequest if a model needs itself, by way of parents and teachers."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            raise BadRequest(f"models: a cycle of parents and teachers: {' <- '.join([*path[path.index(name) :], name])}")
        if name not in done:
            for needed in list_needed(config["models"][name]):
                visit(needed, [*path, name])
            done.add(name)

    for name in config["models"]:
        visit(name, [])


def is_adapter(config: dict, name: str) -> bool:
    """Whether the model has a sample-size adapter."""
    model = config["models"][name]
    return "adapter" in model or "resume_adapter" in model


def count_dataset_windows(config: dict, name: str) -> int:
    """Windows of an example of the dataset that model *name* is trained on."""
    dataset = config["datasets"][config["models"][name]["dataset"]]
    return dataset["sequence_length"] // dataset["window_size"]


def build_region_plan(config: dict, name: str) -> RegionPlan:
    """How the examples of its dataset are cut into regions for model *name*."""
    windows = count_dataset_windows(config, name)
    return RegionPlan(windows, config["models"][name].get("windows", windows), build_training_config(config, name).regions)


def build_network_config(config: dict, name: str) -> ModelConfig:
    """The network of model *name*: its preset, sizes inherited from its parents, its own sizes, and the dataset's shape."""
    chain = trace_parents(config, name)
    model, file = config["models"][name], get_parent_file(config, chain[-1])
    # Behaviour that only published weights have is inherited from a file, as the trainer inherits it from a checkpoint.
    sizes: dict = {} if file is None else {key: getattr(file.network, key) for key in (*SIZES, "start_token_in_prefix")}
    for ancestor in reversed(chain):
        architecture = config["models"][ancestor].get("architecture", {})
        if ancestor == chain[-1] and file is None:
            sizes = {key: getattr(PRESETS[config["models"][ancestor]["preset"]], key) for key in SIZES}
        sizes |= {key: value for key, value in architecture.items() if key in sizes}
    own_settings = {key: value for key, value in model.get("architecture", {}).items() if key not in SIZES}
    dataset = config["datasets"][model["dataset"]]
    # The backbone of an adapter model keeps the number of samples that it was first trained with.
    backbone = next((ancestor for ancestor in chain if not is_adapter(config, ancestor)), None)
    if backbone is None and file is not None:
        samples = file.network.samples
    else:
        samples = config["datasets"][config["models"][backbone]["dataset"]]["samples"]
    shape = {
        "windows": model.get("windows", count_dataset_windows(config, name)),
        "window_size": dataset["window_size"],
        "scales": len(dataset["scales"]),
        "samples": samples,
    }
    return PRESETS[model["preset"]].replace(**(sizes | own_settings | shape))


def build_adapter_config(config: dict, name: str) -> AdapterConfig | None:
    """The adapter of model *name*, with settings inherited from the adapter it resumes; None for a plain model."""
    if not is_adapter(config, name):
        return None
    chain = trace_parents(config, name)
    file = get_parent_file(config, chain[-1])
    settings: dict = {}
    if file is not None and file.adapter is not None:
        settings = file.adapter.model_dump(exclude={"samples"})
    for ancestor in reversed(chain):
        settings |= config["models"][ancestor].get("adapter", {})
    if "lastN" not in settings.get("unfreeze_strategy", AdapterConfig().unfreeze_strategy):
        settings.pop("last_n", None)  # not used
    return AdapterConfig(**settings, samples=config["datasets"][config["models"][name]["dataset"]]["samples"])


def build_teaching_spec(config: dict, name: str) -> dict:
    """How the teacher of model *name* is read: the specification of `cxt.teach`."""
    training = build_training_config(config, name)
    return {"reading": "auto", "replicates": training.distill.replicates, "seed": training.seed}


def get_teacher_network(config: dict, name: str) -> ModelConfig:
    """The network of the teacher of model *name*."""
    file = list_files(config, name).get("teacher")
    return build_network_config(config, config["models"][name]["teacher"]) if file is None else file.network


def get_teacher_objective(config: dict, name: str) -> str:
    """What the teacher of model *name* was trained to predict."""
    file = list_files(config, name).get("teacher")
    return build_training_config(config, config["models"][name]["teacher"]).objective if file is None else file.objective


def count_teacher_samples(config: dict, name: str) -> int:
    """Haplotypes that the teacher of model *name* reads."""
    file = list_files(config, name).get("teacher")
    return count_input_samples(config, config["models"][name]["teacher"]) if file is None else file.trained_model.samples


def count_input_samples(config: dict, name: str) -> int:
    """Haplotypes that a model reads: those of its dataset."""
    return config["datasets"][config["models"][name]["dataset"]]["samples"]


def build_lora_config(config: dict, name: str) -> LoraConfig | None:
    """The low-rank changes of model *name*; None for a model without."""
    settings = config["models"][name].get("lora")
    return None if settings is None else LoraConfig(**settings)


def build_training_config(config: dict, name: str) -> TrainingConfig:
    """The training settings of model *name*; without `devices` and `nodes`, which are resources of the rule."""
    settings = config["training"] | config["models"][name].get("training", {})
    settings = {key: value for key, value in settings.items() if key not in ("devices", "nodes", "max_steps")}
    return TrainingConfig(**settings)


def get_max_steps(config: dict, name: str) -> int | None:
    """Optimizer steps after which the training of model *name* ends; None: those of its epochs."""
    return config["models"][name].get("training", {}).get("max_steps")


def build_source_settings(config: dict, name: str) -> dict:
    """Settings of model *name* for examples other than a dataset's, and steps other than its epochs'; they replace others."""
    max_steps = get_max_steps(config, name)
    settings: dict = {} if max_steps is None else {"max_steps": max_steps}
    dataset = config["datasets"][config["models"][name]["dataset"]]
    if not is_on_the_fly(dataset):
        return settings
    defaults = TrainingConfig().model_dump(include=set(FIXED_TRAINING))
    return settings | defaults | {
        "simulate": dataset["scenarios"],
        "simulate_specs": canonical_json(list_simulated_variants(config, dataset)),
        "window_size": dataset["window_size"],
        "samples": dataset["samples"],
        "eval_samples": dataset[MARK],
    }  # fmt: skip


def build_training_settings(config: dict, name: str) -> dict:
    """The settings of model *name* for `python -m cxt.train --config`: flat, one key per flag."""
    network = build_network_config(config, name)
    settings = {"model": config["models"][name]["preset"], "name": name}
    for key in (*SIZES, "mask_singletons", "start_token_in_prefix"):
        settings[key] = getattr(network, key)
    if network.windows != count_dataset_windows(config, name):
        settings["windows"] = network.windows
    settings |= build_training_config(config, name).model_dump()
    settings |= build_source_settings(config, name)
    adapter = build_adapter_config(config, name)
    if adapter is not None:
        settings |= {
            "adapter": True,
            "adapter_samples": adapter.samples,
            "adapter_bottleneck": adapter.bottleneck,
            "adapter_dropout": adapter.dropout,
            "unfreeze_strategy": adapter.unfreeze_strategy,
            "last_n": adapter.last_n,
            "overwrite_bin0": adapter.overwrite_bin0,
        }
    else:
        del settings["backbone_lr_factor"]  # not a setting of plain models
    lora = build_lora_config(config, name)
    return settings if lora is None else settings | {f"lora_{key}": value for key, value in lora}
