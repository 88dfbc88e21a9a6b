"""`cxt plan`, and the published set that config/paper.yaml describes."""

import json
import re

import msprime
import numpy as np
import pytest
from helpers.repository import REPOSITORY, TINY, run_python
from helpers.simulations import maps_taken_as_present

from cxt.config.file import load, merge, resolve
from cxt.config.models import build_network_config
from cxt.config.network import PRESETS, AdapterConfig
from cxt.config.variants import list_variants
from cxt.config.yaml import read_yaml
from cxt.errors import BadRequest
from cxt.model.flops import decoding_flops, forward_flops, training_flops
from cxt.scenarios import stdpopsim_models as catalogue
from cxt.scenarios.indices import simulation_batches as batches_of
from cxt.scenarios.registry import SIMULATORS, simulate_tree_sequence
from cxt.workflow import costs as costs_module
from cxt.workflow.costs import (
    Costs,
    TooLong,
    list_used_variants,
    measure_costs,
    measure_shard,
    measure_simulation,
    shorten_spec,
    variant_key,
)
from cxt.workflow.estimates import estimate_costs, use_devices
from cxt.workflow.jobs import collect_variants, dataset_spec, find_variant

PAPER = REPOSITORY / "config" / "paper.yaml"
SCRIPT = REPOSITORY / "config" / "paper_script.yaml"
MODELS = ["narrow", "broad", "broad_w200", "w200_wmissing", "broad_adapter", "w200_wmissing_adapter"]


def run_plan(*arguments, cwd, check=True):
    return run_python("-m", "cxt.plan", *arguments, cwd=cwd, check=check)


@pytest.fixture(scope="module")
def paper() -> dict:
    return load([PAPER])


def test_published_counts(tmp_path):
    """spec: 33 790 simulations, 30 409 of them for training, 6 040 in the small-window base; steps on three GPUs."""
    plan = json.loads(run_plan("--configfile", PAPER, "--devices", 3, "--json", cwd=tmp_path).stdout)
    assert plan["simulations"] == 33_790
    datasets = plan["datasets"]
    assert datasets["processed"]["train_simulations"] == datasets["processed_n10"]["train_simulations"] == 30_409
    assert datasets["processed_narrow"]["train_simulations"] == 9_000
    small = [datasets[f"processed_small_window{rest}"] for rest in ("", "_missing_data", "_missing_data_n10")]
    assert [d["train_simulations"] + d["test_simulations"] for d in small] == [6_040] * 3
    assert [d["train_simulations"] for d in small] == [5_434] * 3
    assert datasets["processed"]["train_items"] == 6_081_800
    assert small[2]["train_items"] == 5_434 * 20
    assert [plan["models"][name]["steps"] for name in MODELS] == [4692, 5280, 944, 944, 792, 480]
    assert {model["effective_batch"] for model in plan["models"].values()} == {2304}
    assert all(d["bytes"] > 0 for d in datasets.values())
    assert all(m["gpu_hours"] > 0 for m in plan["models"].values())


@pytest.mark.parametrize(
    ("devices", "steps"), [(1, [14064, 15838, 2830, 2830, 2376, 1420]), (2, [7032, 7920, 1416, 1416, 1188, 710])]
)
def test_published_steps_on_fewer_gpus(paper, devices, steps):
    plan = estimate_costs(use_devices(paper, devices), Costs())
    assert [plan["models"][name]["steps"] for name in MODELS] == steps


def test_script_list():
    """37 170 simulations; on 2 GPUs broad would end at step 8 708 and broad_adapter at 436 an epoch."""
    plan = estimate_costs(use_devices(load([PAPER, SCRIPT]), 2), Costs())
    assert plan["simulations"] == 37_170
    assert plan["datasets"]["processed"]["train_simulations"] == 33_437
    assert plan["models"]["broad"]["steps"] == 8_708


def test_published_variants(paper):
    """Numbers of variants and of simulations each, (5e-8, 5e-8) nowhere, and the sweeps' positions."""
    scenarios = paper["scenarios"] | load([PAPER, SCRIPT])["scenarios"]
    expected = {
        "llm_ne_constant": (9, 500),
        "llm_ne_sawtooth": (27, 125),
        "llm_island_3pop": (18, 50),
        "llm_hard_sweeps": (27, 50),
    }
    for name, (number, simulations) in expected.items():
        variants = list_variants(name, scenarios[name])
        assert (len(variants), {variant.simulations for variant in variants}) == (number, {simulations})
        assert not any(variant.spec["mutation_rate"] == variant.spec["recombination_rate"] == 5e-8 for variant in variants)
    # The published positions: one generator seeded 42, a draw for each combination in loop order, the skipped ones included.
    rng = np.random.RandomState(42)  # the published generator
    drawn = {}
    for size in (10_000, 20_000, 40_000):
        for mutation in (1e-8, 5e-8):
            for recombination in (1e-8, 5e-8):
                for s in (0.01, 0.1, 1):
                    drawn[size, mutation, recombination, s] = int(rng.choice([250_000, 500_000, 750_000]))
    for variant in list_variants("llm_hard_sweeps", scenarios["llm_hard_sweeps"]):
        keys = ("population_size", "mutation_rate", "recombination_rate", "selection_coefficient")
        assert variant.spec["position"] == drawn[tuple(variant.spec[key] for key in keys)]
    species = {"musmus", "ratnor", "gorgor", "orysat", "susscr", "phosin"}
    assert {f"stdpopsim_{name}" for name in species} == set(load([PAPER])["scenario_sets"]["new_species"])
    assert all(scenarios[f"stdpopsim_{name}"]["simulations"] == 0 for name in species)
    assert len(paper["scenario_sets"]["high_ne"]) == 13
    assert {entry["kind"] for entry in scenarios.values()} | {"demes", "msprime", "trees"} == set(SIMULATORS)


def seeds_of(config: dict, monkeypatch) -> dict[tuple[str, int], tuple]:
    """{(variant, index): seeds handed to msprime for ancestry and mutations} for every simulation, without simulating any."""

    class Stop(Exception):
        pass

    caught: list[int] = []

    def catch(*args, **kwargs):
        caught.append(kwargs["random_seed"])
        if len(caught) == 2:
            raise Stop

    for name in ("sim_ancestry", "sim_mutations"):
        monkeypatch.setattr(msprime, name, catch)
    monkeypatch.setattr(catalogue, "list_mapped_autosomes", catalogue.list_autosomes)  # the maps taken as present
    monkeypatch.setattr(catalogue, "read_chromosome_map", lambda *a: msprime.RateMap.uniform(1e10, 1e-8))
    names = {name for dataset in config["datasets"].values() for name in dataset["scenarios"]}
    result = {}
    for variant in collect_variants(config, sorted(names)):
        for index in range(variant.simulations):
            caught.clear()
            with pytest.raises(Stop):
                simulate_tree_sequence(variant.spec, index=index, seed=config["seed"])
            result[variant.name, index] = tuple(caught)
    return result


@pytest.mark.slow
@pytest.mark.long
def test_no_two_simulations_share_seeds(paper, monkeypatch):
    """All 33 790: msprime's two seeds, of which each comes once in a variant, and no pair comes twice."""
    seeds = seeds_of(paper, monkeypatch)
    assert len(seeds) == 33_790
    assert len(set(seeds.values())) == len(seeds)
    for place in (0, 1):
        assert len({(variant, pair[place]) for (variant, _), pair in seeds.items()}) == len(seeds)
    assert all(1 <= s < 2**32 for pair in seeds.values() for s in pair)


def test_seeds_stay_when_scenarios_come_and_go(monkeypatch):
    """Others added, removed and reordered, and more simulations: simulation i keeps its seeds."""
    base = read_yaml(TINY)
    config = resolve(merge(read_yaml(REPOSITORY / "config" / "config.yaml"), base))
    before = seeds_of(config, monkeypatch)
    other = json.loads(json.dumps(base))
    other["scenarios"]["constant"]["simulations"] = 40
    other["scenarios"]["more"] = {"kind": "island", "simulations": 10, "sequence_length": 20000}
    other["datasets"]["processed"]["scenarios"] = ["more", "stdpopsim_papanu", "constant"]
    config = resolve(merge(read_yaml(REPOSITORY / "config" / "config.yaml"), other))
    config["scenarios"] = dict(reversed(config["scenarios"].items()))
    after = seeds_of(config, monkeypatch)
    assert len(after) == len(before) + 20 + 10
    assert all(after[key] == seeds for key, seeds in before.items())


def test_flops_by_counting():
    """Against every product of matrices written out, for one item of `broad`."""
    broad = PRESETS["broad"]
    w, d, layers = 500, 400, 10
    linear = 2 * (2 * w) * (d * 3 * d + d * d + d * 4 * d + 4 * d * d) * layers
    attention = 0
    for queries, keys in [(w, [w] * w), (w, [w + i + 1 for i in range(w)])]:
        assert len(keys) == queries
        attention += sum(2 * 2 * d * k for k in keys) * layers
    head = 2 * w * d * 326
    embedding = 2 * 2 * 4 * w * (50 * 100 + 100 * 100)
    parts = forward_flops(broad)
    assert (parts["blocks"], parts["attention"], parts["head"], parts["embedding"]) == (linear, attention, head, embedding)
    total = sum(parts.values())
    assert total == pytest.approx(48.7e9, rel=0.01)
    assert training_flops(broad) == 3 * total
    assert training_flops(broad, AdapterConfig()) == 3 * total - (0.8 * linear + head + embedding)
    assert training_flops(broad, AdapterConfig(unfreeze_strategy="none")) == 3 * total - (linear + head + embedding)
    one, two = (decoding_flops(broad, replicates=r) for r in (1, 2))
    assert one == pytest.approx(total, rel=0.001)  # prefill and targets together attend to the same
    assert two < 2 * one


@pytest.mark.slow
@pytest.mark.long
def test_costs_are_measured(tmp_path, paper):
    """--calibrate, then the plan uses its figures; an exact length wins, others are stretched and named."""
    out = run_plan(
        "--configfile", TINY, "--calibrate", "--table", "table.md", "--machine", "a test", "--seconds", 0.2, cwd=tmp_path
    )
    assert "constant 20,000 bp:" in out.stderr
    assert "not measured" not in out.stdout
    written = json.loads((tmp_path / "results/costs.json").read_text())
    config = load([TINY])
    spec = find_variant(config, "constant").spec
    assert written["simulations"][variant_key(spec)]["20000"]["seconds"] > 0
    table = (tmp_path / "table.md").read_text()
    assert "| constant | 20,000 |" in table
    costs = Costs([tmp_path / "results/costs.json"])
    plan = estimate_costs(config, costs)
    assert plan["simulate"]["core_hours"] > 0
    assert plan["simulate"]["not_measured"] == []
    assert not plan["simulate"]["extrapolated"]
    stretched = costs.simulation(spec | {"sequence_length": 40_000})
    assert stretched["extrapolated"]
    assert "a test" in " ".join(plan["measured_on"])
    unknown = estimate_costs(load([TINY, SCENARIO(tmp_path)]), costs)
    assert unknown["simulate"]["not_measured"] == ["unknown"]


def SCENARIO(tmp_path):
    path = tmp_path / "unknown.yaml"
    path.write_text(
        "scenarios: {unknown: {kind: constant, population_size: 321, simulations: 10, sequence_length: 20000}}\n"
        "datasets: {processed_narrow: {scenarios: [constant, unknown]}}\n"
    )
    return path


def test_a_variant_that_takes_too_long_is_measured_shorter(tmp_path, monkeypatch):
    """Its cost is a power of the length, from two shorter ones; a sweep's position moves along."""
    monkeypatch.setattr(costs_module, "EXTRAPOLATION_LENGTHS", (5_000, 10_000))
    overlay = tmp_path / "x.yaml"
    overlay.write_text(
        "scenarios: {sweep: {kind: hard_sweep, simulations: 10, sequence_length: 20000, position: 15000,"
        " selection_coefficient: 0.1}}\n"
        "datasets: {processed_narrow: {scenarios: [sweep]}, processed: {scenarios: [sweep]}}\n"
    )
    config = load([TINY, overlay])
    saved = []
    with pytest.raises(StopIteration):  # after the first variant
        measure_costs(config, machine="m", save=lambda costs: (saved.append(costs), next(iter(()))), seconds=0, longest=1e-9)
    (lengths,) = saved[0]["simulations"].values()
    assert sorted(lengths) == ["10000", "5000"]
    assert saved[0]["shards"] == {}
    spec = find_variant(config, "sweep").spec
    assert shorten_spec(spec, 5_000) == spec | {"sequence_length": 5_000, "position": 3_750}
    costs = Costs()
    costs.simulations[variant_key(spec)] = {"5000": {"seconds": 1, "trees": 1, "sites": 1, "bytes": 1},
                                         "10000": {"seconds": 4, "trees": 2, "sites": 2, "bytes": 2}}  # fmt: skip
    stretched = costs.simulation(spec)
    assert stretched["seconds"] == pytest.approx(16)
    assert (stretched["trees"], stretched["bytes"], stretched["extrapolated"]) == (4, 4, True)


def test_measured_figures_are_of_the_simulation():
    config = load([TINY])
    variant = find_variant(config, "constant")
    cost, made = measure_simulation(variant.spec, budget=0, longest=60)
    assert (cost["replicates"], cost["trees"], cost["sites"]) == (1, made[0].num_trees, made[0].num_sites)
    assert cost["bytes"] > 1000
    shard = measure_shard(made, dataset_spec(config, "processed_narrow"), None)
    assert shard["bytes"] > 500
    with pytest.raises(TooLong):
        measure_simulation({**variant.spec, "population_size": 10**7, "sequence_length": 10**6}, budget=0, longest=0.5)


def test_variants_are_listed_with_their_own_numbers(tmp_path):
    example = REPOSITORY / "config" / "examples" / "msprime.yaml"
    out = run_plan("--configfile", example, "--variants", cwd=tmp_path).stdout
    rows = [line.split() for line in out.splitlines() if line.startswith("bottleneck-")]
    assert [row[:4] for row in rows] == [["bottleneck-mutation_rate=1e-08", "1", "50", "100"],
                                         ["bottleneck-mutation_rate=2e-08", "1", "50", "100"]]  # fmt: skip


@pytest.mark.slow
def test_plan_refuses(tmp_path):
    for arguments, message in (
        (["--devices", -1], "--devices must be an integer from 0 to 1024, got -1"),
        (["--costs", "none.json"], "there is no file none.json"),
        (["--configfile", "none.yaml"], "none.yaml cannot be read"),
        (["--configfile", TINY, "--devices", 50], "fewer than one batch of 4 on 50 devices"),
    ):
        done = run_plan(*arguments, cwd=tmp_path, check=False)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(BadRequest, match="broken.json is not a file of costs"):
        Costs([tmp_path / "broken.json"])


@pytest.mark.slow
def test_paper_workflow_is_planned(tmp_path):
    """`snakemake -n` on the published configuration, its maps taken as present."""
    done = run_python(
        "-m", "snakemake", "--snakefile", REPOSITORY / "Snakefile", "--directory", tmp_path, "--cores", "2", "-n",
        "--quiet", "rules", "--configfile", PAPER, env={"STDPOPSIM_CACHE": str(maps_taken_as_present(tmp_path / "cache"))},
    )  # fmt: skip
    assert re.search(r"^train +6$", done.stdout, flags=re.M)
    batches = sum(
        len(batches_of(simulations=variant.simulations, batch=variant.batch))
        for variant in list_used_variants(load([PAPER]))
        if variant.simulations
    )
    assert int(re.search(r"^simulate +(\d+)$", done.stdout, flags=re.M)[1]) > batches  # and those for evaluation


def test_shipped_costs_cover_the_default_configuration():
    found = estimate_costs(load([]), Costs())
    assert not [name for name, dataset in found["datasets"].items() if dataset["not_measured"]]
    assert not found["simulate"]["not_measured"]


def test_validations_are_counted():
    """Every `validate_every` steps and after the last one, or after each epoch; each costs the forward pass of its examples."""
    base = merge(read_yaml(REPOSITORY / "config" / "config.yaml"), read_yaml(TINY))
    flops = {}
    for every in (0, 5, 7, 1000):
        config = resolve(merge(base, {"training": {"validate_every": every, "epochs": 2, "validation_items": 3}}))
        model = estimate_costs(config, Costs())["models"]["narrow"]
        steps, flops[every] = model["steps"], model["flops"]
    network = build_network_config(config, "narrow")
    one = 3 * sum(forward_flops(network).values())
    assert steps > 14
    assert round((flops[0] - flops[1000]) / one) == 1  # two epochs; or the end alone
    for every in (5, 7):
        expected = len({*range(every, steps + 1, every), steps})
        assert round((flops[every] - flops[1000]) / one) == expected - 1
