"""Kinds, sweeps, seeds, batches, the held-out rule, and the batch file."""

import json

import numpy as np
import pytest
import stdpopsim
import tskit
from helpers.repository import run_python
from helpers.simulations import check_genealogies, constant_scenario, simulate

from cxt.config.variants import Variant, list_variants
from cxt.errors import BadRequest
from cxt.scenarios.batches import read_batch, write_batch
from cxt.scenarios.indices import EVALUATION_START, assign_split, count_in_split, simulation_batches
from cxt.scenarios.msprime_models import build_zigzag, split_island_samples
from cxt.scenarios.registry import check_scenarios, simulate_tree_sequence
from cxt.scenarios.seeds import build_random_generator
from cxt.scenarios.stdpopsim_catalogue import list_autosomes, list_sampled_populations, select_models

RATES = {"mutation_rate": 1.29e-8, "recombination_rate": 1.28e-8}
SPECS = [
    {"name": "constant", "kind": "constant", "population_size": 20_000, **RATES},
    {"name": "sawtooth", "kind": "sawtooth", "population_size": 20_000, "magnitude": 3, **RATES},
    {"name": "island", "kind": "island", "population_size": 10_000, "migration_rate": 0.1, **RATES},
    {"name": "aratha", "kind": "stdpopsim", "species": "AraTha"},
    {"name": "aedaeg", "kind": "stdpopsim", "species": "AedAeg", "population_size": 1e6},
]


def spec_of(spec, **changes):
    return {"individuals": 10, "sequence_length": 20_000} | spec | changes


@pytest.mark.parametrize("spec", SPECS, ids=[spec["name"] for spec in SPECS])
def test_kinds(spec):
    spec = spec_of(spec)
    ts = simulate_tree_sequence(spec, index=3, seed=1)
    assert (ts.num_samples, ts.sequence_length) == (20, 20_000)
    check_genealogies(ts)
    about = ts.metadata["cxt"]
    assert (about["scenario"], about["index"], about["seed"], about["spec"]) == (spec["name"], 3, 1, spec)
    assert about["mutation_rate"] > 0
    if spec["kind"] != "stdpopsim":  # infinite sites: biallelic, at real positions
        assert ts.genotype_matrix().max() == 1
        assert np.any(ts.sites_position != np.floor(ts.sites_position))
    again = simulate_tree_sequence(spec, index=3, seed=1)
    assert again.tables.equals(ts.tables, ignore_provenance=True)
    for index, seed in ((4, 1), (3, 2)):
        other = simulate_tree_sequence(spec, index=index, seed=seed)
        assert not np.array_equal(other.tables.nodes.time, ts.tables.nodes.time)


def test_parametric_demographies():
    diversity = np.mean(
        [simulate_tree_sequence(spec_of(SPECS[0]), index=i, seed=1).diversity(mode="branch") for i in range(60)]
    )
    assert diversity == pytest.approx(4 * 20_000, rel=0.1)
    island = simulate_tree_sequence(spec_of(SPECS[2], individuals=25), index=0, seed=1)
    populations = island.nodes_population[island.samples()]
    assert np.bincount(populations).tolist() == [30, 10, 10]
    assert split_island_samples(25) == (15, 5, 5)
    assert split_island_samples(5) == (3, 1, 1)
    assert split_island_samples(4) == (4, 0, 0)


def test_sawtooth_history():
    """The zig-zag: size after integrating the growth rates, at the ends of its first epochs."""
    size = build_zigzag(20_000, 3).debug().population_size_trajectory([20, 30, 200, 30_000_000])[:, 0]
    expected = 20_000 * np.exp(-10 * 6437.7516497364 / 4e4)
    assert size[0] == pytest.approx(20_000)
    assert size[1] == pytest.approx(expected)
    assert size[2] == pytest.approx(expected * np.exp(170 * 378.691273513906 / 3e4))
    assert size[3] == pytest.approx(20_000)


def test_sweeps():
    entry = constant_scenario(population_size=[10_000, 20_000], mutation_rate=[1e-8, 5e-8])
    variants = list_variants("grid", entry)
    assert [variant.name for variant in variants] == [
        "grid-mutation_rate=1e-08-population_size=10000", "grid-mutation_rate=1e-08-population_size=20000",
        "grid-mutation_rate=5e-08-population_size=10000", "grid-mutation_rate=5e-08-population_size=20000",
    ]  # fmt: skip
    assert variants[1].spec["population_size"] == 20_000
    close = list_variants("close", constant_scenario(population_size=[1_234_567, 1_234_568]))
    assert close[0].name != close[1].name
    assert "simulations" not in variants[1].spec
    assert list_variants("one", constant_scenario())[0] == Variant(
        "one", {"name": "one"} | {k: v for k, v in constant_scenario().items() if k not in ("simulations", "batch")}, 20, 20
    )


def test_batches_and_split():
    assert simulation_batches(simulations=25, batch=10) == [(0, 10), (10, 10), (20, 5)]
    assert [i for i in range(30) if assign_split(i) == "test"] == [0, 10, 20]
    for n in range(1, 45):  # the published counts: test = ceil(n / 10)
        assert count_in_split(0, n, "test") == -(-n // 10)
        assert count_in_split(0, n, "train") + count_in_split(0, n, "test") == n
    for start in range(25):
        for n in range(25):
            for split in ("train", "test"):
                assert count_in_split(start, n, split) == sum(assign_split(i) == split for i in range(start, start + n))
    assert EVALUATION_START > 100_000_000


def test_seeds_depend_on_everything_but_order():
    spec = spec_of(SPECS[0])
    reordered = dict(reversed(spec.items()))

    def draw(**changes):
        arguments = {"seed": 1, "spec": spec, "index": 0, "purpose": "simulate"} | changes
        return build_random_generator(**arguments).integers(2**62)

    assert draw() == draw(spec=reordered)
    changed = [
        draw(), draw(seed=2), draw(index=1), draw(purpose="pairs"), draw(spec=spec | {"population_size": 1}),
        draw(spec=spec | {"name": "other"}),
    ]  # fmt: skip
    assert len(set(changed)) == len(changed)


def test_stdpopsim_catalogue():
    homsap = {"name": "h", "species": "HomSap", "sequence_length": 1_000_000}
    models = select_models(homsap)
    assert len(models) == 10
    assert not {"AncientEurasia_9K19", "PapuansOutOfAfrica_10J19", "AncientEurope_4A21"} & set(models)
    assert {c.id for c in list_autosomes(homsap)} == {str(i) for i in range(1, 23)}
    canfam = stdpopsim.get_species("CanFam").get_demographic_model("EarlyWolfAdmixture_6F14")
    assert "ancDOG" not in list_sampled_populations(canfam)
    assert "BSJ" in list_sampled_populations(canfam)
    assert select_models({"name": "c", "species": "CanFam", "models": []}) == []
    assert all(c.length >= 30_000_000 for c in list_autosomes(homsap | {"sequence_length": 30_000_000}))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"species": "HomSpa"}, "unknown species 'HomSpa'; did you mean 'HomSap'"),
        ({"species": "HomSap", "models": ["OutOfAfrica_3G9"]}, "no model 'OutOfAfrica_3G9'; did you mean 'OutOfAfrica_3G09'"),
        ({"species": "HomSap", "sequence_length": 10**9}, "no autosome of HomSap is as long"),
    ],
)
def test_stdpopsim_errors(entry, message):
    entry = {"kind": "stdpopsim", "simulations": 1, "batch": 10, "individuals": 5, "sequence_length": 1000} | entry
    with pytest.raises(BadRequest, match=message):
        check_scenarios({"scenarios": {"x": entry}})


def test_batch_file(tmp_path):
    spec = list_variants("constant", constant_scenario())[0].spec
    path = tmp_path / "a.trees.batch"
    write_batch(path, spec, start=10, count=3, seed=1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.trees.batch"]
    read = list(read_batch(path, start=10, count=3))
    assert [ts.metadata["cxt"]["index"] for ts in read] == [10, 11, 12]
    assert read[1].tables.equals(simulate_tree_sequence(spec, index=11, seed=1).tables, ignore_provenance=True)


def test_damaged_batches(tmp_path):
    spec = list_variants("constant", constant_scenario())[0].spec
    path = tmp_path / "a.trees.batch"
    write_batch(path, spec, start=0, count=3, seed=1)
    whole = path.read_bytes()
    with open(path, "rb") as file:
        tskit.load(file)
        tskit.load(file)
        cut = file.tell()

    def fails(message, *, count=3, start=0, scenario=None):
        with pytest.raises(BadRequest, match=message):
            list(read_batch(path, start=start, count=count, scenario=scenario))

    path.write_bytes(whole[:cut])
    fails("truncated: it holds only 2 of 3 tree sequences")
    path.write_bytes(whole[: cut + 1000])
    fails("damaged or truncated at tree sequence 2 of 3")
    path.write_bytes(b"")
    fails("truncated: it holds only 0 of 3 tree sequences")
    path.write_bytes(whole)
    fails("more than 2 tree sequences", count=2)
    fails("tree sequence 0 must be simulation 5 of 'constant', got 0 of 'constant'", start=5)
    fails("must be simulation 0 of 'island', got 0 of 'constant'", scenario="island")
    simulate(seed=1).dump(path)
    fails("has no cxt identity", count=1)


@pytest.mark.slow
def test_command(tmp_path):
    out = tmp_path / "x.trees.batch"
    run_python("-m", "cxt.simulate", "--scenario", "sawtooth", "--count", 2, "--out", out)
    assert len(list(read_batch(out, start=0, count=2, scenario="sawtooth"))) == 2
    spec = json.dumps(spec_of(SPECS[0]))
    run_python("-m", "cxt.simulate", "--spec", spec, "--start", 5, "--count", 1, "--seed", 7, "--out", out)
    assert next(read_batch(out, start=5, count=1)).metadata["cxt"]["seed"] == 7
    for arguments, message in (
        (["--scenario", "sawtoth"], "unknown scenario 'sawtoth'; did you mean 'sawtooth'"),
        (["--spec", "{"], "not valid JSON"),
        (["--spec", '{"name": "x", "kind": "y"}'], "a name and a kind, one of constant"),
        (["--spec", '{"name": "x", "kind": "constant", "magnitude": 3}'], "--spec.magnitude: unknown key"),
    ):
        done = run_python("-m", "cxt.simulate", *arguments, "--count", 1, "--out", out, check=False)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def zigzag_sizes(population_size: float, magnitude: float) -> list[tuple[float, float, float]]:
    """(time, size, growth rate) of each epoch of the zig-zag but the first, by hand: sizes carried from epoch to epoch."""
    rates = [
        6437.7516497364 / 4e4,
        *(
            rate / (magnitude * 1e4)
            for rate in (
                -378.691273513906, -643.77516497364, 37.8691273513906, 64.377516497364, -3.78691273513906,
                -6.4377516497364, 0.378691273513906, 0.64377516497364, -0.0378691273513906, -0.064377516497364,
                0.00378691273513906,
            )
        ),
        0.0,
    ]  # fmt: skip
    times = [20, 30, 200, 300, 2e3, 3e3, 2e4, 3e4, 2e5, 3e5, 2e6, 3e6, 2e7]
    result, size = [], population_size
    for i, (time, rate) in enumerate(zip(times, rates, strict=True)):
        if i:
            size *= np.exp(-rates[i - 1] * (time - times[i - 1]))
        result.append((time, population_size if time == 2e7 else size, rate))
    return result
