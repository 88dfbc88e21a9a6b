"""Checks of models: their parents and teachers, networks, training settings and evaluations."""

import dataclasses

from cxt.config.collected import ProblemCollector, prefix_errors
from cxt.config.contradictions import check_training
from cxt.config.dataset_checks import check_scenario_fits
from cxt.config.learning import choose_reading, is_readable
from cxt.config.models import (
    PARENT_KEYS,
    build_adapter_config,
    build_lora_config,
    build_network_config,
    build_region_plan,
    build_training_config,
    count_dataset_windows,
    get_parent_file,
    get_parent_key,
    get_teacher,
    get_teacher_objective,
    is_adapter,
    list_files,
    trace_parents,
)
from cxt.config.network import (
    TrainedModel,
    check_adapter_samples,
    check_inheritance,
    check_lora,
    check_missingness,
    count_pairs,
)
from cxt.config.on_the_fly import is_on_the_fly
from cxt.config.parent_files import ParentFile
from cxt.config.regions import check_regions
from cxt.config.repeats import is_later_repeat
from cxt.errors import BadRequest, suggest_nearest


def list_checked(config: dict) -> list[str]:
    """The models to check: of the repeats of a model only the first, because they differ in their seeds only."""
    return [name for name in config["models"] if not is_later_repeat(config, name)]


def check_parents(config: dict, name: str) -> None:
    """BadRequest unless a model's dataset and parents exist, and the parent has an adapter if and only if it must."""
    model = config["models"][name]
    at = f"models.{name}"
    if model["dataset"] not in config["datasets"]:
        raise BadRequest(
            f"{at}.dataset: unknown dataset '{model['dataset']}'{suggest_nearest(model['dataset'], config['datasets'])}"
        )
    keys = [f"`{key}`" for key in PARENT_KEYS if key in model]
    if len(keys) > 1:
        raise BadRequest(f"{at}: {' and '.join(keys)} cannot be used together")
    _, *parents = trace_parents(config, name)
    if (file := get_parent_file(config, name)) is not None:
        _check_parent_file(model, file, at=at)
    elif "checkpoint" in model and is_adapter(config, parents[0]):
        raise BadRequest(f"{at}.checkpoint: '{parents[0]}' is an adapter model; use `resume_adapter: {parents[0]}`")
    elif "resume_adapter" in model and not is_adapter(config, parents[0]):
        raise BadRequest(f"{at}.resume_adapter: '{parents[0]}' has no adapter; use `checkpoint: {parents[0]}`")
    if "adapter" in model and not parents and file is None:
        raise BadRequest(f"{at}.adapter: an adapter needs a trained backbone; name one with `checkpoint`")
    teacher = get_teacher(model)
    if teacher is not None and teacher not in config["models"]:
        raise BadRequest(f"{at}.teacher: unknown model '{teacher}'{suggest_nearest(teacher, config['models'])}")
    _check_lora_keys(config, name, parents)


def _check_parent_file(model: dict, file: ParentFile, *, at: str) -> None:
    """BadRequest unless the file that a model starts from has an adapter if and only if it must."""
    if "resume_adapter" in model and file.adapter is None:
        raise BadRequest(f"{at}.resume_adapter: {file.path} has no adapter; use `checkpoint: {file.path}`")
    if "checkpoint" in model and file.adapter is not None:
        raise BadRequest(f"{at}.checkpoint: {file.path} is an adapter model; use `resume_adapter: {file.path}`")
    if "lora_of" in model and file.adapter is not None:
        raise BadRequest(f"{at}.lora_of: {file.path} is an adapter model, which cannot be the base of LoRA")


def _check_bottleneck(config: dict, name: str, file: ParentFile | None) -> None:
    """BadRequest if a model resumes the adapter of a file with another width of the gated branch."""
    adapter = build_adapter_config(config, name)
    if file is None or file.adapter is None or adapter is None or adapter.bottleneck == file.adapter.bottleneck:
        return
    raise BadRequest(
        f"models.{name}.adapter.bottleneck: {adapter.bottleneck}, but the adapter of {file.path} has "
        f"{file.adapter.bottleneck}; omit `adapter` to inherit its settings, or set the same"
    )


def _check_lora_keys(config: dict, name: str, parents: list[str]) -> None:
    """BadRequest unless `lora` and `lora_of` come together, without adapter, and the base is a plain model."""
    model, at = config["models"][name], f"models.{name}"
    if "lora" in model and "lora_of" not in model:
        raise BadRequest(f"{at}.lora: LoRA needs a trained base; name one with `lora_of`")
    if "lora_of" not in model:
        return
    if "lora" not in model:
        raise BadRequest(f"{at}.lora_of: it needs `lora`; add `lora: {{}}` for the default rank, alpha and targets")
    if "adapter" in model:
        raise BadRequest(f"{at}: `adapter` and `lora` cannot be used together")
    if not parents:
        return  # a file
    base = parents[0]
    if is_adapter(config, base):
        raise BadRequest(f"{at}.lora_of: '{base}' is an adapter model, which cannot be the base of LoRA")
    if "lora" in config["models"][base]:
        raise BadRequest(
            f"{at}.lora_of: '{base}' is itself a LoRA of '{parents[1]}'; use `lora_of: {parents[1]}`, or train all weights "
            f"from the merged ones with `checkpoint: {base}`"
        )


def check_models(config: dict) -> None:
    """BadRequest unless all models have a network, an adapter and training settings, and fit their datasets and parents.

    A model whose parent is not valid is skipped, because it inherits the parent's sizes.
    """
    problems = ProblemCollector()
    wrong: set[str] = set()
    shared_training_is_wrong = False
    for name in sorted(list_checked(config), key=lambda name: len(trace_parents(config, name))):
        _, *parents = trace_parents(config, name)
        if wrong.intersection(parents):
            continue
        before = len(problems.messages)
        with problems.collect():
            _check_evaluation(config, name)
        with problems.collect(), prefix_errors(f"models.{name}.architecture"):
            build_network_config(config, name)
        own_training = config["models"][name].get("training", {})
        if own_training or not shared_training_is_wrong:
            at = f"models.{name}.training" if own_training else f"training, of models.{name}"
            with problems.collect(), prefix_errors(at):
                build_training_config(config, name)
            shared_training_is_wrong = any(message.startswith("training, of ") for message in problems.messages)
        with problems.collect():
            if "backbone_lr_factor" in own_training and not is_adapter(config, name):
                raise BadRequest(f"models.{name}.training: backbone_lr_factor cannot be used without an adapter; remove it")
        with problems.collect(), prefix_errors(f"models.{name}.adapter"):
            build_adapter_config(config, name)
        if len(problems.messages) == before:
            with problems.collect():
                model, file = _trained_model(config, name), get_parent_file(config, name)
                if file is not None:
                    at = f"models.{name}.{get_parent_key(config['models'][name])}"
                    model, parent = dataclasses.replace(model, name=at), file.trained_model
                else:
                    parent = _trained_model(config, parents[0], name_in_messages=parents[0]) if parents else None
                if parent is not None:
                    check_inheritance(model, parent)
                    _check_bottleneck(config, name, file)
                    if (lora := build_lora_config(config, name)) is not None:
                        check_lora(lora, model.network, parent.network, name=model.name, base_name=parent.name)
                check_missingness(model)
                check_adapter_samples(model)
            if not shared_training_is_wrong:
                with problems.collect():
                    _check_training(config, name)
                with problems.collect():
                    _check_teacher(config, name)
        if len(problems.messages) > before:
            wrong.add(name)
    problems.refuse()


def _check_teacher(config: dict, name: str) -> None:
    """BadRequest unless a model that distills has a teacher, which can read the examples of the model's dataset."""
    model, at = config["models"][name], f"models.{name}"
    objective, teacher = build_training_config(config, name).objective, model.get("teacher")
    if objective == "distill" and teacher is None:
        raise BadRequest(f"{at}: the objective distill needs a teacher; name a model with `teacher`")
    if teacher is None:
        return
    if objective != "distill":
        raise BadRequest(
            f"{at}.teacher: a teacher is for the objective distill, not for {objective}; add `training: {{objective: distill}}`"
        )
    if not is_readable(taught := get_teacher_objective(config, name)):
        raise BadRequest(f"{at}.teacher: '{teacher}' cannot teach, because its objective {taught} predicts no times")
    dataset_name = model["dataset"]
    dataset = config["datasets"][dataset_name]
    if (file := list_files(config, name).get("teacher")) is None:
        other = config["datasets"][config["models"][teacher]["dataset"]]
        network, has_missingness = build_network_config(config, teacher), "mask" in other
    else:
        network, has_missingness = file.network, file.trained_model.has_missingness
        other = {"window_size": network.window_size, "sequence_length": network.windows * network.window_size}
        other |= {"scales": file.scales, "samples": file.trained_model.samples}
    for key in ("window_size", "sequence_length", "scales"):
        if dataset[key] != other[key]:
            raise BadRequest(
                f"{at}.teacher: '{teacher}' was trained with {key} {other[key]}, but dataset '{dataset_name}' has "
                f"{dataset[key]}; choose a teacher with the same windows"
            )
    if ("mask" in dataset) != has_missingness:
        which = "with" if has_missingness else "without"
        raise BadRequest(f"{at}.teacher: '{teacher}' was trained {which} missingness, unlike dataset '{dataset_name}'")
    if network.windows != (there := count_dataset_windows(config, name)):
        raise BadRequest(
            f"{at}.teacher: '{teacher}' reads regions of {network.windows} windows, but must read whole examples of dataset "
            f"'{dataset_name}', which have {there}; choose a teacher without `windows`"
        )
    if other["samples"] < dataset["samples"]:
        raise BadRequest(
            f"{at}.teacher: '{teacher}' reads {other['samples']} haplotypes, fewer than the {dataset['samples']} of dataset "
            f"'{dataset_name}'"
        )
    for scenario in dataset["scenarios"]:
        check_scenario_fits(scenario, config["scenarios"][scenario], f"{at}.teacher", other)


def _check_training(config: dict, name: str) -> None:
    """BadRequest if settings of a model's training contradict each other, or the way in which it is to be read."""
    _, *parents = trace_parents(config, name)
    model, training = config["models"][name], build_training_config(config, name)
    file = get_parent_file(config, name)
    parent_objective = None if file is None else file.objective
    with prefix_errors(f"models.{name}"):
        check_training(
            training,
            build_network_config(config, name),
            build_adapter_config(config, name),
            has_lora="lora" in model,
            parent_objective=build_training_config(config, parents[0]).objective if parents else parent_objective,
            on_gpu=model.get("training", {}).get("devices", config["training"]["devices"]) > 0,
        )
        plan = build_region_plan(config, name)
        check_regions(plan, training, build_network_config(config, name))
        if not plan.is_off and is_on_the_fly(config["datasets"][model["dataset"]]):
            raise BadRequest("`regions` cannot be used with `simulate`, which simulates no longer sequences than it reads")
        if not is_readable(training.objective) and "evaluation" in model:
            raise BadRequest(f"`evaluation` cannot be used with the objective {training.objective}, which predicts no times")
    if is_readable(training.objective):
        with prefix_errors("evaluation.reading"):
            choose_reading(training.objective, config["evaluation"]["reading"], name=f"models.{name}")


def _check_evaluation(config: dict, name: str) -> None:
    """BadRequest if a model is evaluated on more pairs than exist, or on scenarios that do not fit its dataset's shape."""
    dataset = config["datasets"][config["models"][name]["dataset"]]
    asked, exist = config["evaluation"]["pairs"], count_pairs(dataset["samples"])
    if asked > exist:
        raise BadRequest(
            f"evaluation.pairs: {asked} pairs requested, but the {dataset['samples']} samples of models.{name} have only "
            f"{exist}"
        )
    for scenario in config["models"][name].get("evaluation", []):
        check_scenario_fits(scenario, config["scenarios"][scenario], f"models.{name}.evaluation", dataset)


def _trained_model(config: dict, name: str, *, name_in_messages: str | None = None) -> TrainedModel:
    """The properties that decide whether model *name* fits its dataset and its parent."""
    dataset_name = config["models"][name]["dataset"]
    dataset = config["datasets"][dataset_name]
    return TrainedModel(
        name=name_in_messages or f"models.{name}",
        network=build_network_config(config, name),
        dataset=dataset_name,
        scales=dataset["scales"],
        samples=dataset["samples"],
        has_missingness="mask" in dataset,
        has_adapter=is_adapter(config, name),
    )
