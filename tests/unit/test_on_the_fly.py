"""Models that the workflow trains on simulations made on the fly, and `max_steps` as a key of a model's training."""

import dataclasses

import pytest
import yaml
from helpers.repository import REPOSITORY, TINY

from cxt.config.file import merge, resolve
from cxt.config.models import build_network_config
from cxt.config.variants import list_variants
from cxt.config.yaml import read_yaml
from cxt.data import simulated
from cxt.errors import BadRequest
from cxt.scenarios.registry import simulate_tree_sequence
from cxt.trainer.launch import train
from cxt.trainer.options import read_options
from cxt.trainer.request import build_request
from cxt.workflow.costs import Costs
from cxt.workflow.estimates import estimate_costs, format_estimate, use_devices
from cxt.workflow.jobs import check_plan
from cxt.workflow.lineages import evaluation_batches, model_lineage
from cxt.workflow.settings import neutral_training_flags, write_settings

MINE = {
    "preset": "broad", "simulate": ["constant"], "eval_samples": 8, "architecture": {"layers": 1, "heads": 2, "width": 16},
    "training": {"max_steps": 3},
}  # fmt: skip


def configuration(*, scenarios=None, shared_training=None, **changes) -> dict:
    """The tiny configuration with one more model, which is MINE with *changes* (None removes a key)."""
    base = merge(read_yaml(REPOSITORY / "config" / "config.yaml"), read_yaml(TINY))
    model = {key: value for key, value in (MINE | changes).items() if value is not None}
    overlay = {"models": {"mine": model}, "scenarios": scenarios or {}, "training": shared_training or {}}
    return resolve(merge(base, overlay))


def options_of(config: dict, tmp_path):
    """What the trainer reads of the settings file that the workflow writes."""
    file = tmp_path / "mine.yaml"
    file.write_text(write_settings(config, "models", "mine"), encoding="utf-8")
    words = ["--config", str(file), *neutral_training_flags(config, "mine"), "--lineage", model_lineage(config, "mine")]
    return read_options(words)


def test_the_trainer_gets_scenarios_in_place_of_a_dataset(tmp_path):
    config = configuration(scenarios={"constant": {"population_size": [5_000, 10_000]}})
    check_plan(config)
    options = options_of(config, tmp_path)
    assert (options.dataset_path, options.simulate, options.max_steps) == (None, ("constant",), 3)
    request = build_request(options)
    assert request.total_steps == 3
    assert request.network == build_network_config(config, "mine")
    assert [spec["population_size"] for spec in request.simulated] == [5_000, 10_000]
    splits = request.manifest["splits"]
    assert splits == {"train": {"items": 3 * 4 * request.training.grad_accum}, "test": {"items": 8}}
    assert {(batch["scenario"], batch["count"]) for batch in evaluation_batches(config, "mine")} == {
        ("constant-population_size=5000", 3), ("constant-population_size=10000", 3),
    }  # fmt: skip


def test_window_size_and_samples_are_those_of_the_model(tmp_path):
    config = configuration(window_size=1000, samples=10)
    network = build_network_config(config, "mine")
    assert (network.windows, network.window_size, network.samples) == (20, 1000, 10)
    assert build_request(options_of(config, tmp_path)).network == network


def test_the_lineage_covers_the_scenarios():
    lineage = model_lineage(configuration(), "mine")
    assert model_lineage(configuration(shared_training={"epochs": 7, "scratch": "/tmp"}), "mine") == lineage
    assert model_lineage(configuration(scenarios={"constant": {"simulations": 40}}), "mine") == lineage
    for changes in (
        {"scenarios": {"constant": {"mutation_rate": 2e-8}}},
        {"simulate": ["constant", "stdpopsim_papanu"]},
        {"samples": 10},
        {"training": {"max_steps": 4}},
        {"window_size": 1000},
        {"eval_samples": 9},
    ):
        assert model_lineage(configuration(**changes), "mine") != lineage
    assert model_lineage(configuration() | {"seed": 5}, "mine") == lineage  # the training's seed, not the workflow's, counts


def test_nothing_changes_for_other_models():
    base = merge(read_yaml(REPOSITORY / "config" / "config.yaml"), read_yaml(TINY))
    plain, more = resolve(base), configuration()
    assert set(more["datasets"]) - set(plain["datasets"]) == {"mine:simulate"}
    for name in plain["models"]:
        assert model_lineage(plain, name) == model_lineage(more, name)
        assert write_settings(plain, "models", name) == write_settings(more, "models", name)


def test_the_plan_counts_its_steps():
    config = configuration()
    planned = estimate_costs(config, Costs())
    assert planned["models"]["mine"]["steps"] == 3
    assert "mine:simulate" not in planned["datasets"]
    assert "mine" in format_estimate(config, planned, Costs())


@pytest.mark.slow
def test_the_plan_counts_its_simulations(tmp_path, monkeypatch):
    """As many as the trainer makes; without workers it waits for them, and those of workers take no time of its own."""
    names = ["constant", "stdpopsim_papanu"]
    training = {"max_steps": 7, "batch_size": 4, "grad_accum": 2, "validate_every": 3, "decode_items": 2, "workers": 0}
    shared = {"validation_items": 5}
    config = configuration(simulate=names, training=training, shared_training=shared)
    made = []

    def simulate(spec, *, index, seed):
        made.append(spec["name"])
        return simulate_tree_sequence(spec, index=index, seed=seed)

    with monkeypatch.context() as patch:
        patch.setattr(simulated, "simulate_tree_sequence", simulate)
        train(dataclasses.replace(options_of(config, tmp_path), run_dir=tmp_path / "run"), began=0.0)
    planned = estimate_costs(config, Costs())
    model = planned["models"]["mine"]
    part = model["simulate"]
    assert part["simulations"] == len(made) == 7 * 4 * 2 + 3 * 5 + 2 * 2
    assert part["variants"] == 2
    costs = Costs()
    variants = [variant for name in names for variant in list_variants(name, config["scenarios"][name])]
    seconds = {variant.name: costs.simulation(variant.spec)["seconds"] for variant in variants}
    assert part["core_hours"] == pytest.approx(sum(seconds[name] for name in made) / 3600, rel=0.1)
    alone = model["core_hours"] - part["core_hours"]
    assert alone == pytest.approx(
        planned["models"]["broad"]["core_hours"] * model["flops"] / planned["models"]["broad"]["flops"]
    )
    assert model["hours"] == pytest.approx(alone + part["core_hours"])  # one thread
    with_workers = configuration(simulate=names, training=training | {"workers": 4}, shared_training=shared)
    hours = estimate_costs(with_workers, Costs())["models"]["mine"]["hours"]
    assert hours == pytest.approx(max(alone, part["core_hours"] / 4))
    text = format_estimate(config, planned, Costs())
    assert f"mine makes {part['simulations']} simulations of 2 variants while it trains: " in text
    unknown = configuration(scenarios={"constant": {"population_size": 4321}}, training=training)
    assert "Not counted, because not measured: constant" in format_estimate(unknown, estimate_costs(unknown, Costs()), Costs())
    # On a GPU, the processor has the simulations only.
    model = estimate_costs(use_devices(config, 1), Costs())["models"]["mine"]
    assert model["core_hours"] == model["simulate"]["core_hours"] == part["core_hours"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "processed"}, "models.mine: `dataset` and `simulate` cannot be used together"),
        ({"simulate": None, "eval_samples": None}, "models.mine: it has no examples to train on; name a dataset"),
        ({"training": {}}, "simulated examples never run out; say when training ends with `training: {max_steps"),
        ({"eval_samples": None}, "needs held-out examples for validation; add `eval_samples`"),
        ({"training": {"max_steps": 3, "epochs": 2}}, "`epochs` cannot be used with `simulate`"),
        (
            {"teacher": "broad", "training": {"max_steps": 3, "objective": "distill"}},
            "`teacher` cannot be used with `simulate`",
        ),
        ({"simulate": None, "dataset": "processed"}, "`eval_samples` cannot be used without `simulate`"),
        ({"simulate": ["constnt"]}, "models.mine.simulate: unknown scenario 'constnt'; did you mean 'constant'"),
        ({"samples": 60}, "models.mine.samples: 60 haplotypes requested, but scenario 'constant' samples only 25 individuals"),
        ({"window_size": 3000}, "models.mine: sequence_length 20000 is not a multiple of window_size 3000"),
        ({"preset": "w200_wmissing"}, "missing"),
        ({"training": {"max_steps": 0}}, "models.mine.training.max_steps must be a positive integer, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(BadRequest) as error:
        check_plan(configuration(**changes))
    assert message in str(error.value)


def test_scenarios_of_different_lengths_are_refused():
    island = {"kind": "island", "sequence_length": 30_000, "simulations": 0}
    with pytest.raises(BadRequest, match=r"models.mine.simulate: .* sequences of the same length, got \[20000, 30000\] bp"):
        configuration(scenarios={"island": island}, simulate=["constant", "island"])


@pytest.mark.parametrize(("max_steps", "epochs"), [(3, 2), (20, 3)])
def test_max_steps_takes_the_place_of_epochs(dataset, max_steps, epochs):
    """108 examples in batches of 4 of 4: seven steps an epoch."""
    words = ["--dataset-path", str(dataset), "--epochs", "2", "--batch-size", "4", "--grad-accum", "4", "--devices", "0"]
    words += ["--layers", "1", "--heads", "2", "--width", "16"]
    plain, request = (build_request(read_options([*words, *more])) for more in ([], [f"--max-steps={max_steps}"]))
    assert (plain.total_steps, plain.training.epochs) == (14, 2)
    assert (request.total_steps, request.training.epochs) == (max_steps, epochs)


def test_max_steps_of_a_model_beside_a_dataset(tmp_path):
    config = configuration(simulate=None, eval_samples=None, dataset="processed")
    plain = configuration(simulate=None, eval_samples=None, dataset="processed", training={})
    assert yaml.safe_load(write_settings(config, "models", "mine"))["max_steps"] == 3
    assert model_lineage(config, "mine") != model_lineage(plain, "mine")
    assert estimate_costs(config, Costs())["models"]["mine"]["steps"] == 3
