"""Checks of the whole configuration: names that must be known, and sections that must fit together."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from cxt.config.contradictions import check_training
from cxt.config.demes import read_demes
from cxt.config.ensembles import check_ensembles
from cxt.config.learning import choose_reading, is_readable
from cxt.config.models import (
    PARENT_KEYS,
    build_adapter_config,
    build_lora_config,
    build_network_config,
    build_region_plan,
    build_training_config,
    check_order,
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
from cxt.config.on_the_fly import check_source, fill_simulated, is_on_the_fly
from cxt.config.parent_files import ParentFile
from cxt.config.regions import check_regions
from cxt.config.repeats import is_later_repeat
from cxt.config.scenarios import complete_parameters
from cxt.config.tree_files import check_shared_files, fill_tree_files
from cxt.config.variants import NOT_PARAMETERS, check_variants, list_variants
from cxt.errors import BadRequest, suggest_nearest


class _ProblemCollector:
    """Collects the bad requests of independent checks, to raise them together."""

    def __init__(self) -> None:
        self.messages: dict[str, None] = {}

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Collect the BadRequest that a check in this block raises."""
        try:
            yield
        except BadRequest as error:
            self.messages[str(error)] = None

    def refuse(self) -> None:
        """Raise one BadRequest with all collected messages, if there are any."""
        if len(self.messages) > 1:
            raise BadRequest("\n  ".join(["the configuration is not valid:", *self.messages]))
        if self.messages:
            raise BadRequest(next(iter(self.messages)))


def fill_scenarios(config: dict, removed: set[str]) -> None:
    """Replace Demes files and scenario sets by their content; describe files of tree sequences, and examples on the fly.

    Parameters
    ----------
    config : the configuration, modified in place
    removed : scenarios that an overlay has removed, which are dropped from all sets
    """
    problems = _ProblemCollector()
    for name, scenario in config["scenarios"].items():
        with problems.collect():
            _check_scenario(name, scenario)
    with problems.collect():
        _check_names(config)
    for name in list_checked(config):
        with problems.collect():
            check_source(name, config["models"][name])
    problems.refuse()
    check_shared_files(config["scenarios"])
    _fill_sets(config, removed)
    fill_simulated(config)
    evaluation = config["evaluation"]
    evaluation["simulations_of"] = {k: v for k, v in evaluation["simulations_of"].items() if k not in removed}


def check_consistency(config: dict) -> None:
    """BadRequest naming everything in a complete configuration that does not fit together.

    Models are checked only if all datasets are valid.
    """
    problems = _ProblemCollector()
    for name, dataset in config["datasets"].items():
        with problems.collect():
            _check_dataset(config, name, dataset)
    for name in config["evaluation"]["simulations_of"]:
        with problems.collect():
            if name not in config["scenarios"]:
                raise BadRequest(
                    f"evaluation.simulations_of: unknown scenario '{name}'{suggest_nearest(name, config['scenarios'])}"
                )
    problems.refuse()
    for name in list_checked(config):
        with problems.collect():
            _check_parents(config, name)
    problems.refuse()
    check_order(config)
    _check_models(config)
    check_ensembles(config)


def list_checked(config: dict) -> list[str]:
    """The models to check: of the repeats of a model only the first, because they differ in their seeds only."""
    return [name for name in config["models"] if not is_later_repeat(config, name)]


def _check_scenario(name: str, scenario: dict) -> None:
    """Check a scenario's sweep, replace the path of a Demes file by its content, and describe files of tree sequences."""
    at = f"scenarios.{name}"
    base = {key: value for key, value in scenario.items() if key not in NOT_PARAMETERS}
    for row in scenario.get("combinations", []):
        complete_parameters(scenario["kind"], base | row, at=f"{at}.combinations")
    if scenario["kind"] == "demes":
        scenario["demography"] = read_demes(scenario["demography"], at=at)
    if scenario["kind"] == "trees":
        fill_tree_files(scenario, at=at)
    check_variants(name, scenario)


def _check_names(config: dict) -> None:
    """BadRequest if two names differ in case only (some file systems ignore case), or a scenario and a set share a name."""
    for section in ("scenarios", "datasets", "models"):
        first: dict[str, str] = {}
        for name in config[section]:
            other = first.setdefault(name.casefold(), name)
            if other != name:
                raise BadRequest(f"{section} '{other}' and '{name}' differ in case only; rename one of them")
    for name in config["scenarios"]:
        if name in config["scenario_sets"]:
            raise BadRequest(f"'{name}' names both a scenario and a scenario set; rename one of them")


def _fill_sets(config: dict, removed: set[str]) -> None:
    """Replace the names of sets by their scenarios, each once and in order, wherever scenarios are listed."""
    scenarios, sets = config["scenarios"], config["scenario_sets"]
    for name, members in sets.items():
        for member in members:
            if member not in scenarios and member not in removed:
                raise BadRequest(f"scenario_sets.{name}: unknown scenario '{member}'{suggest_nearest(member, scenarios)}")

    def filled(names, at: str) -> list[str]:
        result: dict[str, None] = {}
        for name in [names] if isinstance(names, str) else names:
            if name not in scenarios and name not in sets:
                raise BadRequest(f"{at}: unknown scenario '{name}'{suggest_nearest(name, [*scenarios, *sets])}")
            result |= dict.fromkeys(member for member in sets.get(name, [name]) if member in scenarios)
        return list(result)

    for name, dataset in config["datasets"].items():
        dataset["scenarios"] = filled(dataset["scenarios"], f"datasets.{name}.scenarios")
        if not dataset["scenarios"]:
            raise BadRequest(f"datasets.{name}.scenarios: no scenario is left in the sets it names; name at least one scenario")
    for name, model in config["models"].items():
        for key in ("evaluation", "simulate"):
            if key in model:
                model[key] = filled(model[key], f"models.{name}.{key}")
        if model.get("simulate") == []:
            raise BadRequest(f"models.{name}.simulate: no scenario is left in the sets it names; name at least one scenario")


def _check_dataset(config: dict, name: str, dataset: dict) -> None:
    at = f"models.{name.partition(':')[0]}" if is_on_the_fly(dataset) else f"datasets.{name}"
    length, window = dataset["sequence_length"], dataset["window_size"]
    for scenario_name in dataset["scenarios"]:
        scenario = config["scenarios"][scenario_name]
        if not scenario["simulations"] and not is_on_the_fly(dataset):
            raise BadRequest(
                f"{at}.scenarios: '{scenario_name}' has `simulations: 0`, which is for evaluation only; set it to 2 or more"
            )
        _check_scenario_fits(scenario_name, scenario, at, dataset)
        regions = dataset["regions_per_simulation"]
        for variant in list_variants(scenario_name, scenario):
            if regions * length > variant.spec["sequence_length"]:
                raise BadRequest(
                    f"{at}.regions_per_simulation: {regions} regions of {length} bp do not fit into the "
                    f"{variant.spec['sequence_length']} bp of scenario '{variant.name}'"
                )
    if length % window:
        raise BadRequest(f"{at}: sequence_length {length} is not a multiple of window_size {window}")
    exist = count_pairs(dataset["samples"])
    if dataset["pairs"] > exist:
        raise BadRequest(f"{at}.pairs: {dataset['pairs']} pairs requested, but {dataset['samples']} samples have only {exist}")
    mask = dataset.get("mask", {})
    if "path" in mask and not Path(mask["path"]).is_file():
        raise BadRequest(f"{at}.mask.path: there is no file {mask['path']}")
    if "path" not in mask and mask.get("length", length) < length:
        raise BadRequest(f"{at}.mask.length: {mask['length']} bp is shorter than sequence_length {length}")


def count_individuals(scenario: dict) -> int:
    """Diploid individuals that a scenario samples."""
    return sum(scenario["samples"].values()) if "samples" in scenario else scenario["individuals"]


def _check_scenario_fits(name: str, scenario: dict, at: str, dataset: dict) -> None:
    """BadRequest if simulations of *scenario* are too short or have too few samples for *dataset*."""
    for variant in list_variants(name, scenario):
        if variant.spec["sequence_length"] < dataset["sequence_length"]:
            raise BadRequest(
                f"{at}.sequence_length: {dataset['sequence_length']} bp requested, but scenario '{variant.name}' simulates "
                f"only {variant.spec['sequence_length']} bp"
            )
        individuals = count_individuals(variant.spec)
        if 2 * individuals < dataset["samples"]:
            raise BadRequest(
                f"{at}.samples: {dataset['samples']} haplotypes requested, but scenario '{variant.name}' samples only "
                f"{individuals} individuals ({2 * individuals} haplotypes)"
            )


def _check_parents(config: dict, name: str) -> None:
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


def _check_models(config: dict) -> None:
    """BadRequest unless all models have a network, an adapter and training settings, and fit their datasets and parents.

    A model whose parent is not valid is skipped, because it inherits the parent's sizes.
    """
    problems = _ProblemCollector()
    wrong: set[str] = set()
    shared_training_is_wrong = False
    for name in sorted(list_checked(config), key=lambda name: len(trace_parents(config, name))):
        _, *parents = trace_parents(config, name)
        if wrong.intersection(parents):
            continue
        before = len(problems.messages)
        with problems.collect():
            _check_evaluation(config, name)
        with problems.collect(), _prefix_errors(f"models.{name}.architecture"):
            build_network_config(config, name)
        own_training = config["models"][name].get("training", {})
        if own_training or not shared_training_is_wrong:
            at = f"models.{name}.training" if own_training else f"training, of models.{name}"
            with problems.collect(), _prefix_errors(at):
                build_training_config(config, name)
            shared_training_is_wrong = any(message.startswith("training, of ") for message in problems.messages)
        with problems.collect():
            if "backbone_lr_factor" in own_training and not is_adapter(config, name):
                raise BadRequest(f"models.{name}.training: backbone_lr_factor cannot be used without an adapter; remove it")
        with problems.collect(), _prefix_errors(f"models.{name}.adapter"):
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
        _check_scenario_fits(scenario, config["scenarios"][scenario], f"{at}.teacher", other)


def _check_training(config: dict, name: str) -> None:
    """BadRequest if settings of a model's training contradict each other, or the way in which it is to be read."""
    _, *parents = trace_parents(config, name)
    model, training = config["models"][name], build_training_config(config, name)
    file = get_parent_file(config, name)
    parent_objective = None if file is None else file.objective
    with _prefix_errors(f"models.{name}"):
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
        with _prefix_errors("evaluation.reading"):
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
        _check_scenario_fits(scenario, config["scenarios"][scenario], f"models.{name}.evaluation", dataset)


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


@contextlib.contextmanager
def _prefix_errors(at: str) -> Iterator[None]:
    """Prefix a BadRequest of the `with` block with the section *at* of the configuration."""
    try:
        yield
    except BadRequest as error:
        raise BadRequest(f"{at}: {error}") from None
