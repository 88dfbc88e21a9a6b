"""Scenarios of one's own: sweeps, Demes files, inline histories, scenario sets; and what is refused of them."""

import json
import shutil
import subprocess
import sys

import demes
import msprime
import numpy as np
import pytest
import yaml
from helpers.repository import REPOSITORY, TINY, run_python, snakemake
from helpers.simulations import check_genealogies, constant_scenario
from helpers.tree_files import write_own_trees

from cxt.checkpoints.file import read_checkpoint
from cxt.config.file import load, merge, resolve
from cxt.config.variants import check_variants, get_scenario_name, list_variants
from cxt.config.yaml import read_yaml
from cxt.errors import BadRequest
from cxt.scenarios.registry import simulate_tree_sequence
from cxt.workflow.jobs import check_plan, find_variant

EXAMPLES = REPOSITORY / "config" / "examples"
DEMES = {
    "description": "for people",
    "time_units": "years",
    "generation_time": 25,
    "demes": [
        {"name": "old", "description": "x", "epochs": [{"start_size": 1000, "end_time": 5000}]},
        {"name": "north", "ancestors": ["old"], "epochs": [{"start_size": 2000}]},
        {"name": "south", "ancestors": ["old"], "epochs": [{"start_size": 500}]},
        {"name": "lost", "ancestors": ["old"], "epochs": [{"start_size": 500, "end_time": 100}]},
    ],
}
MINE = {
    "kind": "demes", "demography": DEMES, "samples": {"south": 3, "north": 2}, "mutation_rate": 1e-8,
    "recombination_rate": 1e-8, "simulations": 10, "sequence_length": 20_000,
}  # fmt: skip
HISTORY = {
    "kind": "msprime", "history": [{"time": 0, "population_size": 1000}, {"time": 100, "population_size": 50}],
    "mutation_rate": 1e-8, "recombination_rate": 1e-8, "simulations": 10, "sequence_length": 20_000,
}  # fmt: skip


def config_with(**scenarios) -> dict:
    """tests/tiny.yaml over the default, with more scenarios, checked."""
    config = merge(read_yaml(REPOSITORY / "config" / "config.yaml"), read_yaml(TINY))
    config = resolve(merge(config, {"scenarios": scenarios}))
    check_plan(config)
    return config


def spec_of(**scenario) -> dict:
    return find_variant(config_with(mine=scenario), "mine").spec


def test_combinations_are_taken_together():
    entry = constant_scenario(
        population_size=[10_000, 2.0e4],
        combinations=[
            {"mutation_rate": 1e-8, "recombination_rate": 1e-8},
            {"mutation_rate": 1e-8, "recombination_rate": 5e-8},
            {"mutation_rate": 5e-8, "recombination_rate": 1e-8},
        ],
    )
    check_variants("llm", entry)
    variants = list_variants("llm", entry)
    assert len(variants) == 6
    assert variants[0].name == "llm-mutation_rate=1e-08-population_size=10000-recombination_rate=1e-08"
    assert variants[5].name == "llm-mutation_rate=5e-08-population_size=20000-recombination_rate=1e-08"
    rates = {(variant.spec["mutation_rate"], variant.spec["recombination_rate"]) for variant in variants}
    assert rates == {(1e-8, 1e-8), (1e-8, 5e-8), (5e-8, 1e-8)}
    assert all("combinations" not in variant.spec and get_scenario_name(variant.name) == "llm" for variant in variants)


def test_the_same_number_written_differently_is_the_same_variant():
    a, b = (list_variants("x", constant_scenario(population_size=size))[0] for size in (20_000, 2.0e4))
    assert json.dumps(a.spec) == json.dumps(b.spec)
    assert (
        list_variants("x", constant_scenario(ancestry_model="hudson"))[0].spec
        == list_variants("x", constant_scenario())[0].spec
    )
    old, new = (HISTORY | {"batch": 10, "history": [{"time": 0, "population_size": size}]} for size in (10, 10.0))
    assert json.dumps(list_variants("x", old)[0].spec) == json.dumps(list_variants("x", new)[0].spec)
    assert load([TINY])["scenarios"]["constant"]["simulations"] == 20
    base = merge(read_yaml(REPOSITORY / "config" / "config.yaml"), read_yaml(TINY))
    assert type(resolve(merge(base, {"seed": 2.0, "scenarios": {"constant": {"simulations": 2.0e1}}}))["seed"]) is int


def test_sweeping_a_required_parameter_by_combinations():
    config = config_with(
        sweep={"kind": "hard_sweep", "simulations": 10, "sequence_length": 20_000,
               "combinations": [{"position": 5000, "selection_coefficient": 0.1},
                                {"position": 9000, "selection_coefficient": 1}]}
    )  # fmt: skip
    names = [variant.name for variant in list_variants("sweep", config["scenarios"]["sweep"])]
    assert names == ["sweep-position=5000-selection_coefficient=0.1", "sweep-position=9000-selection_coefficient=1"]


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (
            {"kind": "constant", "population_size": []},
            "population_size must be a positive number, or a list of distinct values, got []",
        ),
        (
            {"kind": "constant", "mutation_rate": "1e-8 per bp"},
            "mutation_rate must be a number in (0, 0.5], or a list of distinct values, got '1e-8 per bp'",
        ),
        ({"kind": "constant", "mutation_rate": "1"}, "mutation_rate must be a number in (0, 0.5], or a list"),
        ({"kind": "constant", "mutation_rate": -1e-8}, "or a list of distinct values, got -1e-08"),
        (
            {"kind": "constant", "combinations": []},
            "combinations must be a list of mappings from parameters to numbers, got []",
        ),
        (
            {"kind": "constant", "combinations": [{"mutation_rat": 1e-8}]},
            "combinations.mutation_rat: unknown key; did you mean",
        ),
        (
            {"kind": "constant", "combinations": [{"mutation_rate": -1}]},
            "combinations.mutation_rate must be a number in (0, 0.5]",
        ),
        ({"kind": "constant", "combinations": [{"mutation_rate": 0.1}, {"population_size": 1}]}, "every row must set the same"),
        (
            {"kind": "constant", "mutation_rate": [1e-8], "combinations": [{"mutation_rate": 1e-8}]},
            "`mutation_rate` is a list and also set by `combinations`",
        ),
        ({"kind": "constant", "ancestry_model": "smc"}, "ancestry_model must be one of hudson, smc_prime, got 'smc'"),
        ({"kind": "hard_sweep", "selection_coefficient": 0.1}, "`position` is missing"),
        ({"kind": "hard_sweep", "selection_coefficient": 0.1, "position": 20_000}, "outside the sequence of 20000 bp"),
        ({"kind": ["constant"]}, "`kind` must be one of constant, demes"),
        (
            {"kind": "constant", "population_size": float("nan")},
            "population_size must be a finite positive",
        ),
        (
            HISTORY | {"history": [{"time": 0, "population_size": 9}, {"time": float("inf"), "population_size": 9}]},
            "history.1.time must be a finite non-negative number, got inf",
        ),
        ({"kind": "constant", "simulations": 12.5}, "simulations must be an integer from 0 to 100000000, got 12.5"),
        (
            MINE
            | {
                "demography": DEMES
                | {
                    "demes": [
                        {
                            "name": "north",
                            "epochs": [
                                {"start_size": 10, "end_time": 5},
                                {"start_size": 10, "end_size": 20, "size_function": "linear"},
                            ],
                        }
                    ]
                },
                "samples": {"north": 1},
            },
            "msprime cannot simulate this Demes model",
        ),
        ({"kind": "constant", "recombination_rate": 5}, "recombination_rate must be a number in [0, 0.5]"),
        ({"kind": "constant", "individuals": 10**12}, "individuals must be an integer from 1 to 30000, got 1000000000000"),
        (MINE | {"demography": {"time_units": "generations"}}, "is not a valid Demes model: "),
        ({"kind": "konstant"}, "unknown kind 'konstant'; did you mean 'constant'"),
        (HISTORY | {"history": []}, "history must be a list of {time: generations ago"),
        (HISTORY | {"history": [{"time": 5, "population_size": 10}]}, "history must begin at time 0 (today), got 5"),
        (HISTORY | {"history": [{"time": 0, "population_size": 10}] * 2}, "time 0 follows 0; times must rise"),
        (HISTORY | {"history": [{"time": 0, "size": 10}]}, "history.0: `population_size` is missing"),
        ({key: value for key, value in HISTORY.items() if key != "mutation_rate"}, "`mutation_rate` is missing (Mutations per"),
        ({key: value for key, value in MINE.items() if key != "recombination_rate"}, "`recombination_rate` is missing"),
        (MINE | {"samples": {"nrth": 1}}, "there is no deme 'nrth'; did you mean 'north'"),
        (MINE | {"samples": {"lost": 5}}, "deme 'lost' ended 4 generations ago, but samples are taken at time 0"),
        (
            MINE | {"samples": {"north": {"individuals": 5, "time": 100}}},
            "samples.north must be a positive integer, got {'individuals': 5, 'time': 100}",
        ),
        (MINE | {"samples": {}}, "samples names no deme; choose from north, south"),
        (MINE | {"demography": "no/such.yaml"}, "there is no file"),
        (MINE | {"demography": {"time_units": "generations", "demes": [{"name": "a"}]}}, "is not a valid Demes model"),
        (
            {"kind": "stdpopsim", "species": "HomSap", "models": ["Africa_1T1"]},
            "no model 'Africa_1T1'; did you mean 'Africa_1T12'",
        ),
        (
            {"kind": "stdpopsim", "species": "AraTha", "genetic_map": "SalomeAverage"},
            "AraTha has no genetic map 'SalomeAverage'; did you mean 'SalomeAveraged_TAIR10'",
        ),
        (
            {"kind": "stdpopsim", "species": "DroMel", "sequence_length": 10**9},
            "no autosome of DroMel is as long as sequence_length 1000000000; the longest has",
        ),
    ],
)
def test_refused_before_anything_runs(scenario, message):
    scenario = {"simulations": 10, "sequence_length": 20_000} | scenario
    with pytest.raises(BadRequest) as error:
        config_with(mine=scenario)
    assert message in str(error.value)


@pytest.mark.slow
def test_refused_by_the_workflow(tmp_path):
    """The same through Snakemake: one message on stderr, exit 2, nothing made."""
    for text, message in (
        ("scenarios: {mine: {kind: constant, simulations: 10, population_size: []}}", "must be a positive number"),
        ("scenarios: {mine: {kind: constant, simulations: 10}, mine: {kind: constant}}", "'mine' is given twice"),
        ("scenarios: {7: {kind: constant, simulations: 10}}", "scenarios: the name 7 must be text"),
        ("datasets: {Processed: {scenarios: all}}", "datasets 'processed' and 'Processed' differ in case only"),
        ("scenarios: {Constant: {kind: constant, simulations: 10}}", "'constant' and 'Constant' differ in case only"),
        (f"scenarios: {{mine: {{kind: demes, demography: {TINY}, simulations: 10, samples: {{a: 1}}, mutation_rate: 1.0e-8,"
         " recombination_rate: 1.0e-8}}", "is not a valid Demes model"),
    ):  # fmt: skip
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text(text)
        done = run_python(
            "-m", "snakemake", "--snakefile", REPOSITORY / "Snakefile", "--directory", tmp_path / "work", "--cores", "1",
            "-n", "--configfile", TINY, overlay, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not list((tmp_path / "work").glob("results/*"))


ROOTS = [{"name": name, "epochs": [{"start_size": 100}]} for name in "AB"]


@pytest.mark.parametrize(
    ("rest", "meet"),
    [
        ({}, False),
        ({"migrations": [{"demes": ["A", "B"], "rate": 1e-3}]}, True),
        ({"migrations": [{"source": "A", "dest": "B", "rate": 1e-3}]}, True),
        ({"migrations": [{"demes": ["A", "B"], "rate": 1e-3, "start_time": 100}]}, False),
        ({"pulses": [{"sources": ["A"], "dest": "B", "proportions": [0.5], "time": 10}]}, False),
        # A pulse of proportion 1 variants none behind, one of less does, and beyond it lineages may come back by migration.
        ({"pulses": [{"sources": ["A"], "dest": "B", "proportions": [1], "time": 10}]}, True),
        ({"pulses": [{"sources": ["A"], "dest": "B", "proportions": [0.999], "time": 10}]}, False),
        ({"pulses": [{"sources": ["A"], "dest": "B", "proportions": [1], "time": 10}],
          "migrations": [{"source": "B", "dest": "A", "rate": 1e-3, "start_time": 100, "end_time": 50}]}, False),
        ({"pulses": [{"sources": ["A"], "dest": "B", "proportions": [1], "time": 10}],
          "migrations": [{"source": "B", "dest": "A", "rate": 1e-3, "start_time": 9}]}, True),
        ({"demes": [*ROOTS, {"name": "C", "epochs": [{"start_size": 100}]}],
          "pulses": [{"sources": ["A", "C"], "dest": "B", "proportions": [0.3, 0.7], "time": 10},
                     {"sources": ["A"], "dest": "C", "proportions": [1], "time": 20}]}, True),
        # Of two pulses at one time the last is the most recent: B's lineages are in C when C is emptied, or come too late.
        ({"demes": [*ROOTS, {"name": "C", "epochs": [{"start_size": 100}]}],
          "pulses": [{"sources": ["A"], "dest": "C", "proportions": [1], "time": 10},
                     {"sources": ["C"], "dest": "B", "proportions": [1], "time": 10}]}, True),
        ({"demes": [*ROOTS, {"name": "C", "epochs": [{"start_size": 100}]}],
          "pulses": [{"sources": ["C"], "dest": "B", "proportions": [1], "time": 10},
                     {"sources": ["A"], "dest": "C", "proportions": [1], "time": 10}]}, False),
        ({"demes": [{"name": "O", "epochs": [{"start_size": 9, "end_time": 50}]}]
          + [deme | {"ancestors": ["O"]} for deme in ROOTS]}, True),
    ],
)  # fmt: skip
def test_demes_that_never_meet(rest, meet):
    """Without a common ancestor msprime would recombine for ever; refused, and only where it would."""
    scenario = MINE | {"demography": {"time_units": "generations", "demes": ROOTS} | rest, "samples": {"A": 2, "B": 2}}
    if meet:
        check_genealogies(simulate_tree_sequence(spec_of(**scenario), index=0, seed=1))
    else:
        with pytest.raises(BadRequest, match="lineages from A and [BC] may never coalesce"):
            spec_of(**scenario)
    assert spec_of(**scenario | {"samples": {"A": 2}} | ({} if meet else {"demography": {
        "time_units": "generations", "demes": ROOTS}}))  # fmt: skip


def test_every_variant_must_fit_its_dataset():
    base = merge(read_yaml(REPOSITORY / "config" / "config.yaml"), read_yaml(TINY))
    short = {"kind": "constant", "simulations": 10, "combinations": [{"sequence_length": 1000}, {"sequence_length": 20_000}]}
    few = {"kind": "constant", "simulations": 10, "sequence_length": 20_000, "combinations": [{"individuals": 2}]}
    for scenario, message in (
        (short, "scenario 'mine-sequence_length=1000' simulates only 1000 bp"),
        (few, "scenario 'mine-individuals=2' samples only 2 individuals"),
    ):
        overlay = {"scenarios": {"mine": scenario}, "datasets": {"processed_narrow": {"scenarios": ["constant", "mine"]}}}
        with pytest.raises(BadRequest) as error:
            resolve(merge(base, overlay))
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 2024-13-45", "is not valid YAML: month must be in 1..12"),
        (b"scenarios: &a {x: *a}", "is not valid YAML"),
        (b"seed: \xff\xfe", "is not valid YAML"),
        (b"seed: [", "is not valid YAML"),
        (b"- a list", "does not contain a mapping"),
        (b"seed: 1\nseed: 2", "'seed' is given twice in one mapping .line 2."),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, message):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(BadRequest, match=message):
        read_yaml(tmp_path / "x.yaml")


@pytest.mark.slow
def test_unknown_batches_are_refused_by_the_workflow(tmp_path):
    for target, message in (
        ("results/simulations/constnat/0.trees.batch", "unknown variant 'constnat'; did you mean 'constant'"),
        (
            "results/simulations/constant/5.trees.batch",
            "no simulation batch of 'constant' begins at 5; choose from 0, 10, 1000000000",
        ),
    ):
        done = snakemake("-n", target, cwd=tmp_path, check=False)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_two_variants_with_one_name():
    entry = constant_scenario(combinations=[{"mutation_rate": 1e-8}, {"mutation_rate": 1e-08 * 1.0}])
    with pytest.raises(BadRequest, match="two variants have the same name, 'x-mutation_rate=1e-08'"):
        check_variants("x", entry)


def test_demes_is_what_msprime_reads(tmp_path):
    path = tmp_path / "mine.yaml"
    demes.dump(demes.Graph.fromdict(DEMES), path)
    spec = spec_of(**MINE | {"demography": str(path)})
    assert spec == spec_of(**MINE)  # a file or its content: the same simulations
    assert "description" not in spec["demography"]
    ts = simulate_tree_sequence(spec, index=4, seed=1)
    check_genealogies(ts)
    names = [population.metadata["name"] for population in ts.populations()]
    assert [names[ts.nodes_population[u]] for u in ts.samples()] == ["south"] * 6 + ["north"] * 4
    reference = msprime.Demography.from_demes(demes.Graph.fromdict(DEMES).in_generations())
    demography = msprime.Demography.from_demes(demes.Graph.fromdict(spec["demography"]))
    demography.assert_equivalent(reference)
    many = [{"name": f"deme{i}", "epochs": [{"start_size": 1000}]} for i in range(2000)]
    with pytest.raises(BadRequest, match="more than the 50000 that fit"):
        spec_of(**MINE | {"demography": {"time_units": "generations", "demes": many}})


@pytest.mark.long
@pytest.mark.slow
def test_inline_history_is_piecewise_constant():
    """Mean TMRCA of two samples without recombination against the integral of the survival function."""
    spec = spec_of(**HISTORY | {"recombination_rate": 0, "individuals": 1, "sequence_length": 100})
    times = [simulate_tree_sequence(spec, index=i, seed=2).first().tmrca(0, 1) for i in range(2000)]
    grid = np.linspace(0, 5000, 500_001)
    hazard = np.where(grid < 100, 1 / 2000, 1 / 100)
    expected = np.exp(-np.cumsum(hazard) * grid[1]).sum() * grid[1]
    assert np.mean(times) == pytest.approx(expected, rel=4 * np.std(times) / np.sqrt(2000) / expected)


def test_scenario_sets():
    base = read_yaml(REPOSITORY / "config" / "config.yaml")
    config = resolve(base)
    assert config["datasets"]["processed"]["scenarios"] == base["scenario_sets"]["all"]
    assert config["datasets"]["processed_small_window"]["scenarios"] == base["scenario_sets"]["high_ne"]
    # A set and a scenario of it name it once; a scenario that an overlay removes leaves every set and `simulations_of`.
    base = read_yaml(REPOSITORY / "config" / "config.yaml")
    overlay = {
        "scenarios": {"stdpopsim_aedaeg": None},
        "datasets": {"processed": {"scenarios": ["high_ne", "stdpopsim_drosec", "constant"]}},
        "models": {"broad": {"evaluation": "high_ne"}},
    }
    config = resolve(merge(base, overlay))
    assert config["datasets"]["processed"]["scenarios"] == ["stdpopsim_papanu", "stdpopsim_drosec", "constant"]
    assert config["models"]["broad"]["evaluation"] == ["stdpopsim_papanu", "stdpopsim_drosec"]
    assert "stdpopsim_aedaeg" not in config["evaluation"]["simulations_of"]
    for overlay, message in (
        (
            {"scenario_sets": {"high_ne": ["constnat"]}},
            "scenario_sets.high_ne: unknown scenario 'constnat'; did you mean 'constant'",
        ),
        (
            {"datasets": {"processed": {"scenarios": "al"}}},
            "datasets.processed.scenarios: unknown scenario 'al'; did you mean 'all'",
        ),
        ({"scenario_sets": {"constant": ["island"]}}, "'constant' names both a scenario and a scenario set"),
        ({"scenario_sets": {"high_ne": []}}, "datasets.processed_small_window.scenarios: no scenario is left in the sets"),
        ({"scenarios": {"sawtooth": {"simulations": 0}}}, "'sawtooth' has `simulations: 0`, which is for evaluation only"),
    ):
        with pytest.raises(BadRequest) as error:
            resolve(merge(read_yaml(REPOSITORY / "config" / "config.yaml"), overlay))
        assert message in str(error.value)


def test_examples_are_sound(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_own_trees(tmp_path)
    for path in (EXAMPLES / "demes.yaml", EXAMPLES / "msprime.yaml", EXAMPLES / "trees.yaml"):
        config = load([path])
        check_plan(config)
        name = next(iter(read_yaml(path)["models"]))
        for variant in list_variants(name, config["scenarios"][name]):
            ts = simulate_tree_sequence(variant.spec | {"sequence_length": 10_000}, index=0, seed=1)
            assert ts.sequence_length == 10_000
            check_genealogies(ts)
            assert ts.num_samples == 50


@pytest.mark.slow
@pytest.mark.long
def test_from_a_demes_file_to_a_checkpoint(workflow, tmp_path):
    """The walk of the README at a tiny scale: the example's scenario, dataset and model over a finished `broad`."""
    directory = shutil.copytree(workflow, tmp_path / "work", symlinks=True)
    example = read_yaml(EXAMPLES / "demes.yaml")
    example["scenarios"]["two_islands"] |= {
        "demography": str(EXAMPLES / "two_islands.demes.yaml"), "simulations": 20, "sequence_length": 20_000, "batch": 10,
    }  # fmt: skip
    example["datasets"]["two_islands"] |= {"sequence_length": 20_000, "pairs": 4}
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(yaml.safe_dump(example))
    before = (directory / "results/broad.ckpt").read_bytes()
    targets = ["results/two_islands.ckpt", "results/evaluation/two_islands.json"]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--snakefile", REPOSITORY / "Snakefile", "--directory", directory, "--cores", "2",
         "--show-failed-logs", *targets, "--configfile", TINY, overlay],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (directory / "results/broad.ckpt").read_bytes() == before  # its parent was there
    assert "output: results/two_islands.ckpt" in done.stdout + done.stderr
    assert "output: results/broad.ckpt" not in done.stdout + done.stderr
    table = json.loads((directory / targets[1]).read_text())
    assert np.isfinite(table["scenarios"]["two_islands"]["mse"])
    checkpoint = read_checkpoint(directory / targets[0])
    assert checkpoint.record["name"] == "two_islands"


@pytest.mark.long
@pytest.mark.slow
def test_demes_file_that_changes_changes_the_simulations(workflow, tmp_path):
    """Its content is part of the lineage; words for people are not."""
    directory = shutil.copytree(workflow, tmp_path / "work", symlinks=True)
    path = tmp_path / "species.yaml"
    overlay = tmp_path / "mine.yaml"
    scenario = MINE | {"demography": str(path), "batch": 10}
    overlay.write_text(yaml.safe_dump(merge(read_yaml(TINY), {"scenarios": {"mine": scenario}})))
    target = "results/simulations/mine/0.trees.batch"

    def planned() -> bool:
        done = snakemake("-n", target, cwd=directory, configfile=overlay)
        return "Nothing to be done" not in done.stdout + done.stderr

    path.write_text(yaml.safe_dump(DEMES))
    snakemake(target, cwd=directory, configfile=overlay)
    assert not planned()
    path.write_text("# a comment\n" + yaml.safe_dump(DEMES | {"description": "other words"}))
    assert not planned()
    changed = json.loads(json.dumps(DEMES))
    changed["demes"][0]["epochs"][0]["start_size"] = 1001
    path.write_text(yaml.safe_dump(changed))
    assert planned()
