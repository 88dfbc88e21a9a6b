"""Tree sequences of one's own as training data: pieces, targets, mutations, samples, and what is refused of them."""

import dataclasses
import json
import shutil

import msprime
import numpy as np
import pytest
import tskit
import tszip
from helpers.repository import REPOSITORY, TINY, run_python
from helpers.tree_files import as_tsdate, as_tsinfer, recapitate, simulate_forwards

from cxt.config.file import locate_files, merge, resolve
from cxt.config.tree_files import fill_tree_files
from cxt.config.variants import list_variants
from cxt.config.yaml import read_yaml
from cxt.data.manifest import read_manifest
from cxt.data.pair_dataset import PairDataset
from cxt.data.preprocessing import preprocess_simulation
from cxt.data.shards import open_shard, read_arrays
from cxt.data.tree_dataset import build_tree_dataset
from cxt.errors import BadRequest
from cxt.evaluation.hmm import estimate_by_hmm
from cxt.preprocess import main as preprocess
from cxt.scenarios.batches import read_batch, write_batch
from cxt.scenarios.indices import EVALUATION_START
from cxt.scenarios.registry import simulate_tree_sequence
from cxt.scenarios.tree_pieces import identify_pieces, inspect_files
from cxt.trainer.data_source import plan_simulations
from cxt.trainer.options import read_options
from cxt.workflow.jobs import check_plan, find_variant, list_batches
from cxt.workflow.lineages import batch_lineage, dataset_lineage

MINE = {"kind": "trees", "mutations": "overlay", "mutation_rate": 1e-7, "individuals": 5, "sequence_length": 10_000}
LAYOUT = {"window_size": 1000, "sequence_length": 10_000, "samples": 10, "pairs": 4, "scales": [2, 4]}


def ancestry(*, individuals=10, length=65_000, seed=1, **kwargs) -> tskit.TreeSequence:
    kwargs = {"population_size": 1e3, "recombination_rate": 1e-7} | kwargs
    return msprime.sim_ancestry(individuals, sequence_length=length, random_seed=seed, **kwargs)


def write(path, ts) -> str:
    ts.dump(path)
    return str(path)


def variant(files, **changes):
    scenario = MINE | {"batch": 100, "files": files} | changes
    fill_tree_files(scenario, at="scenarios.mine")
    (only,) = list_variants("mine", scenario)
    return only


def pedigree(individuals=12, generations=3, length=65_000) -> tskit.TreeSequence:
    """Ancestry within a pedigree, and of its founders before it."""
    rng = np.random.default_rng(1)
    builder = msprime.PedigreeBuilder(msprime.Demography.isolated_model([100]))
    parents = [builder.add_individual(time=generations) for _ in range(individuals)]
    for time in range(generations - 1, -1, -1):
        mates = [rng.choice(parents, size=2, replace=False).astype(np.int32) for _ in range(individuals)]
        parents = [builder.add_individual(time=time, parents=two, is_sample=time == 0) for two in mates]
    ts = msprime.sim_ancestry(
        initial_state=builder.finalise(length), model="fixed_pedigree", recombination_rate=1e-7, random_seed=1
    )
    assert max(tree.num_roots for tree in ts.trees()) > 1
    return msprime.sim_ancestry(initial_state=ts, population_size=100, recombination_rate=1e-7, random_seed=2)


SOURCES = {
    "msprime": (lambda: msprime.sim_mutations(ancestry(), rate=1e-7, random_seed=1), {}),
    "pedigree": (pedigree, {}),
    "recapitated": (lambda: recapitate(simulate_forwards()), {"generation_time": 1}),
    "ticks of half a generation": (lambda: recapitate(simulate_forwards()), {"generation_time": 2}),
    "tsdate": (lambda: as_tsdate(msprime.sim_mutations(ancestry(), rate=1e-7, random_seed=1)), {}),
}


@pytest.mark.parametrize("mutations", ["overlay", "keep"])
@pytest.mark.parametrize("source", SOURCES)
def test_targets_are_those_of_tskit_on_the_file(tmp_path, source, mutations):
    make, settings = SOURCES[source]
    ts = make()
    if mutations == "keep" and not ts.num_sites:
        ts = msprime.sim_mutations(ts, rate=1e-6, random_seed=3)
    mine = variant([write(tmp_path / "a.trees", ts)], mutations=mutations, **settings)
    assert mine.simulations == int(ts.sequence_length) // 10_000
    inspect_files(mine.spec)
    for index in (0, 3, mine.simulations - 1):
        piece = simulate_tree_sequence(mine.spec, index=index, seed=1)
        about, left = piece.metadata["cxt"], index * 10_000
        assert (piece.sequence_length, piece.num_samples, piece.time_units) == (10_000, 10, "generations")
        assert about["left"] == left
        assert len(set(about["nodes"])) == 10
        preprocessed = preprocess_simulation(piece, LAYOUT)
        windows = np.unique([0, *(left + 1000.0 * np.arange(11)), ts.sequence_length])
        first = int(np.searchsorted(windows, left))
        for (a, b), log_tmrca in zip(preprocessed.pairs, preprocessed.log_tmrca, strict=True):
            nodes = [about["nodes"][a]], [about["nodes"][b]]
            tmrca = ts.divergence(nodes, mode="branch", windows=windows) / 2 / settings.get("generation_time", 1)
            assert np.allclose(log_tmrca, np.log(tmrca[first : first + 10]))
        if mutations == "keep":
            assert kept_sites(piece, range(10), 0) == kept_sites(ts, about["nodes"], left)


def kept_sites(ts, nodes, left) -> list:
    """Position, from *left* on, and alleles of the nodes at each site within 10 kb at which they differ."""
    rows = [(v.site.position - left, tuple(v.states())) for v in ts.variants(samples=list(nodes))]
    return [(place, states) for place, states in rows if 0 <= place < 10_000 and len(set(states)) > 1]


def test_pieces_are_numbered_in_the_order_of_files(tmp_path):
    files = [write(tmp_path / f"{n}.trees", ancestry(seed=n, length=length)) for n, length in ((1, 25_000), (2, 31_000))]
    mine = variant(files)
    assert mine.spec["lengths"] == [25_000, 31_000]
    assert mine.simulations == 2 + 3
    found = [simulate_tree_sequence(mine.spec, index=i, seed=1).metadata["cxt"] for i in range(5)]
    assert [one["left"] for one in found] == [0, 10_000, 0, 10_000, 20_000]
    assert [one["file_sha256"] for one in found] == [mine.spec["sha256"][file] for file in (0, 0, 1, 1, 1)]
    with pytest.raises(BadRequest, match="'mine' has 5 pieces of 10,000 bp, so that there is no piece 5"):
        simulate_tree_sequence(mine.spec, index=5, seed=1)


def test_a_piece_is_a_function_of_its_seed_index_and_stretch(tmp_path):
    """Whatever its file is called, and whatever follows."""
    path = write(tmp_path / "1.trees", ancestry(seed=1))
    one = variant([path])
    two = variant([str(shutil.copy(path, tmp_path / "other.trees")), write(tmp_path / "2.trees", ancestry(seed=2))])
    a, b, c, d = (
        simulate_tree_sequence(spec, index=index, seed=seed)
        for spec, index, seed in ((one.spec, 2, 1), (two.spec, 2, 1), (one.spec, 2, 2), (one.spec, 3, 1))
    )
    assert a.tables == b.tables
    assert a.metadata["cxt"]["nodes"] != c.metadata["cxt"]["nodes"]
    assert a.sites_position.tolist() != c.sites_position.tolist()
    assert a.metadata["cxt"]["nodes"] != d.metadata["cxt"]["nodes"]
    assert identify_pieces(one.spec, start=0, count=6) == identify_pieces(two.spec, start=0, count=6)


def test_overlaid_mutations_have_the_requested_rate(tmp_path):
    ts = msprime.sim_mutations(ancestry(individuals=20, length=200_000), rate=1e-6, random_seed=1)
    mine = variant([write(tmp_path / "a.trees", ts)], individuals=20, sequence_length=200_000)
    piece = simulate_tree_sequence(mine.spec, index=0, seed=1)
    expected = 1e-7 * sum(tree.total_branch_length * tree.span for tree in ts.trees())
    assert abs(piece.num_mutations - expected) < 5 * np.sqrt(expected)
    assert piece.num_sites == piece.num_mutations
    assert np.any(piece.sites_position % 1)


def test_evaluation_uses_the_pieces_that_are_held_out(tmp_path):
    mine = variant([write(tmp_path / "a.trees", ancestry(length=250_000))])
    lefts = [simulate_tree_sequence(mine.spec, index=EVALUATION_START + k, seed=1).metadata["cxt"]["left"] for k in range(3)]
    assert lefts == [0, 100_000, 200_000]
    with pytest.raises(BadRequest, match="no piece 30"):
        simulate_tree_sequence(mine.spec, index=EVALUATION_START + 3, seed=1)


def test_compressed_files_give_the_same_pieces(tmp_path):
    ts = ancestry()
    tszip.compress(ts, tmp_path / "a.tsz")
    mine, other = variant([str(tmp_path / "a.tsz")]), variant([write(tmp_path / "a.trees", ts)])
    a, b = (simulate_tree_sequence(one.spec, index=1, seed=1) for one in (mine, other))
    assert a.tables.edges == b.tables.edges
    assert np.array_equal(a.sites_position, b.sites_position)


def test_samples_come_from_the_populations_that_are_named(tmp_path):
    ts = recapitate(simulate_forwards())
    path = write(tmp_path / "a.trees", ts)
    of = {
        "all": simulate_tree_sequence(variant([path], individuals=30, generation_time=1).spec, index=0, seed=1),
        "p2": simulate_tree_sequence(variant([path], populations=["p2"], generation_time=1).spec, index=0, seed=1),
        "1": simulate_tree_sequence(variant([path], populations=["1"], generation_time=1).spec, index=0, seed=1),
        "both": simulate_tree_sequence(
            variant([path], samples={"p2": 3, "p1": 2}, individuals=None, generation_time=1).spec, index=0, seed=1
        ),
    }
    populations = {name: ts.nodes_population[one.metadata["cxt"]["nodes"]].tolist() for name, one in of.items()}
    assert set(populations["all"]) == {0, 1}
    assert populations["p2"] == populations["1"] == [1] * 10
    assert populations["both"] == [1] * 6 + [0] * 4
    nodes = of["all"].metadata["cxt"]["nodes"]
    owners = ts.nodes_individual[nodes].reshape(-1, 2)
    assert np.array_equal(owners[:, 0], owners[:, 1])  # both haplotypes of an individual follow each other


def test_haploid_samples_are_taken_in_pairs(tmp_path):
    ts = ancestry(individuals=10, ploidy=1)
    for name, one in (("a", ts), ("b", without_individuals(ts))):
        mine = variant([write(tmp_path / f"{name}.trees", one)])
        nodes = simulate_tree_sequence(mine.spec, index=0, seed=1).metadata["cxt"]["nodes"]
        assert sorted(nodes) == list(range(10))
        assert all(a + 1 == b for a, b in zip(nodes[::2], nodes[1::2], strict=True))


def without_individuals(ts) -> tskit.TreeSequence:
    tables = ts.dump_tables()
    tables.nodes.individual = np.full(len(tables.nodes), -1, dtype=np.int32)
    tables.individuals.clear()
    return tables.tree_sequence()


def shifted(ts, **columns) -> tskit.TreeSequence:
    """The same with other columns of the node table, or units."""
    tables = ts.dump_tables()
    tables.time_units = columns.pop("time_units", tables.time_units)
    for name, values in columns.items():
        setattr(tables.nodes, name, values)
    return tables.tree_sequence()


def ancient() -> tskit.TreeSequence:
    samples = [msprime.SampleSet(10), msprime.SampleSet(1, time=50)]
    return msprime.sim_ancestry(samples, sequence_length=65_000, population_size=1e3, recombination_rate=1e-7, random_seed=1)


WRONG_FILES = {
    "uncalibrated": (lambda: as_tsinfer(ancestry()), {}, "in generations, got 'uncalibrated'.* date it first, with tsdate"),
    "ticks": (lambda: recapitate(simulate_forwards()), {}, "got 'ticks': SLiM counts in ticks: add `generation_time`"),
    "years": (lambda: shifted(ancestry(), time_units="years"), {}, "got 'years': add `generation_time` with the years"),
    "unknown": (lambda: shifted(ancestry(), time_units="unknown"), {}, "got 'unknown': convert its times to generations"),
    "generations already": (ancestry, {"generation_time": 25}, "in generations already; remove `generation_time`"),
    "not recapitated": (simulate_forwards, {"generation_time": 1}, r"roots on \[0, [0-9,]+\): .*pyslim.recapitate"),
    "a gap": (
        lambda: ancestry().delete_intervals([[22_000, 25_000]]), {},
        r"no ancestry on \[22,000, 25,000\).*ts.keep_intervals",
    ),
    "ancient samples": (ancient, {}, r"2 of 22 samples are not at time 0 \(the oldest at 50\).*simplify"),
    "too few": (lambda: ancestry(individuals=4), {}, "4 diploid individuals, but `individuals` asks for 5; lower it"),
    "too few of one": (
        lambda: recapitate(simulate_forwards()),
        {"generation_time": 1, "individuals": None, "samples": {"p1": 99}},
        "40 diploid individuals of p1, but `samples` asks for 99",
    ),
    "no such population": (
        lambda: recapitate(simulate_forwards()), {"generation_time": 1, "populations": ["p3"]},
        "no population 'p3'; choose from ancestral, p1, p2",
    ),
    "triploid": (lambda: ancestry(individuals=20, ploidy=3), {}, "individuals must all be diploid, or all haploid"),
    "shorter than a piece": (lambda: ancestry(length=9_999), {}, "9,999 bp long, shorter than one piece of 10,000 bp"),
    "no sites to keep": (ancestry, {"mutations": "keep"}, "no sites, and `mutations: keep` takes those that there are"),
    "more than there are": (ancestry, {"simulations": 7}, "7 requested, but the files have only 6 pieces of 10,000 bp"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG_FILES)
def test_files_that_cannot_be_used_are_refused(tmp_path, fault):
    make, settings, message = WRONG_FILES[fault]
    settings = {key: value for key, value in settings.items() if value is not None} | (
        {"individuals": None} if "samples" in settings else {}
    )
    path = write(tmp_path / "a.trees", make())
    with pytest.raises(BadRequest, match=message) as error:
        inspect_files(variant([path], **settings).spec)
    assert path in str(error.value) or fault == "more than there are"


def test_what_is_no_file_of_one_tree_sequence_is_refused(tmp_path):
    path = write(tmp_path / "run_1.trees", ancestry())
    copied = tmp_path / "copy.trees"
    copied.write_bytes((tmp_path / "run_1.trees").read_bytes())
    (tmp_path / "text.trees").write_text("what", encoding="utf-8")
    (tmp_path / "cut.trees").write_bytes(copied.read_bytes()[:3000])
    (tmp_path / "empty.trees").touch()
    for files, message in (
        (str(tmp_path / "run_2.trees"), "no file .*run_2.trees; did you mean 'run_1.trees'"),
        (str(tmp_path / "x*.trees"), r"no file matches .*x\*.trees"),
        ([path, path], "given twice"),
        ([path, str(copied)], "are the same; remove one"),
        (str(tmp_path / "text.trees"), "text.trees cannot be read as a tree sequence"),
        (str(tmp_path / "cut.trees"), "cut.trees cannot be read as a tree sequence"),
        (str(tmp_path / "empty.trees"), "empty.trees cannot be read as a tree sequence"),
    ):
        with pytest.raises(BadRequest, match=message):
            inspect_files(variant(files).spec)
    with open(path, "ab") as file:
        ancestry(seed=2).dump(file)
    with pytest.raises(BadRequest, match="holds more than one tree sequence"):
        inspect_files(variant(path).spec)


def test_a_file_that_changes_after_planning_is_refused(tmp_path):
    path = write(tmp_path / "a.trees", ancestry())
    mine = variant([path])
    write(path, ancestry(seed=5))
    with pytest.raises(BadRequest, match="a.trees has changed since this was planned"):
        write_batch(tmp_path / "batch", mine.spec, start=0, count=2, seed=1)
    assert not (tmp_path / "batch").exists()


def configuration(tmp_path, **changes) -> dict:
    """The tiny configuration with a scenario, a dataset and a model of tree sequences, from a file in another directory."""
    directory = tmp_path / "elsewhere"
    directory.mkdir(exist_ok=True)
    overlay = {
        "scenarios": {
            "mine": {"kind": "trees", "mutations": "overlay", "mutation_rate": 1e-7, "sequence_length": 20_000} | changes
        },
        "datasets": {"mine": {"scenarios": ["mine"], "sequence_length": 20_000, "pairs": 4}},
        "models": {"mine": {"preset": "broad", "dataset": "mine", "architecture": {"layers": 1, "heads": 2, "width": 16}}},
    }
    file = directory / "mine.yaml"
    file.write_text(json.dumps(overlay), encoding="utf-8")
    files = [REPOSITORY / "config" / "config.yaml", TINY, file]
    merged: dict = {}
    for path in files:
        merged = merge(merged, read_yaml(path))
    return resolve(locate_files(merged, files))


def test_the_workflow_plans_all_pieces_and_the_held_out_ones_for_evaluation(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for n in (1, 2):
        write(tmp_path / "elsewhere" / f"run_{n}.trees", ancestry(individuals=25, length=250_000, seed=n))
    config = configuration(tmp_path, files="run_*.trees", batch=10)
    check_plan(config)
    mine = find_variant(config, "mine")
    assert mine.simulations == 24
    assert [path.rsplit("/")[-1] for path in mine.spec["files"]] == ["run_1.trees", "run_2.trees"]
    assert list_batches(config, mine) == [(0, 10), (10, 10), (20, 4), (EVALUATION_START, 2)]  # tiny.yaml evaluates on two
    config["evaluation"]["simulations"] = 10
    assert list_batches(config, mine)[3:] == [(EVALUATION_START, 3)]
    config["evaluation"]["simulations_of"]["mine"] = 4
    with pytest.raises(BadRequest, match="mine: 4 requested, but the files of 'mine' have only 3 held-out pieces"):
        check_plan(config)
    fewer = configuration(tmp_path, files=["run_1.trees"], simulations=5, batch=10)
    assert find_variant(fewer, "mine").simulations == 5


def test_the_lineage_follows_the_content_of_the_files_of_a_batch(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    first, second = (tmp_path / "elsewhere" / f"run_{n}.trees" for n in (1, 2))
    write(first, ancestry(individuals=25, length=200_000, seed=1))
    write(second, ancestry(individuals=25, length=200_000, seed=2))

    def lineages(**changes) -> tuple[list[str], str]:
        config = configuration(tmp_path, **({"files": ["run_1.trees", "run_2.trees"], "batch": 10} | changes))
        mine = find_variant(config, "mine")
        return [batch_lineage(config, mine, *where) for where in list_batches(config, mine)], dataset_lineage(config, "mine")

    (a, b, evaluation), whole = lineages()
    assert lineages() == ([a, b, evaluation], whole)
    second.rename(second.with_name("renamed.trees"))
    assert lineages(files=["run_1.trees", "renamed.trees"]) == ([a, b, evaluation], whole)
    write(second, ancestry(individuals=25, length=200_000, seed=3))
    (same, other, _), changed = lineages()
    assert same == a
    assert other != b
    assert changed != whole
    assert lineages(files=["run_1.trees", "renamed.trees", "run_2.trees"])[0][:2] == [a, b]  # more files: more batches only
    assert lineages(mutation_rate=2e-7)[0][0] != a


def test_a_file_is_not_cut_in_two_ways(tmp_path):
    path = write(tmp_path / "a.trees", ancestry(individuals=25, length=250_000))
    base = {"scenarios": {"other": MINE | {"files": path, "individuals": 25, "sequence_length": 25_000}}}
    config = merge(read_yaml(REPOSITORY / "config" / "config.yaml"), read_yaml(TINY))
    entry = MINE | {"files": path, "individuals": 25}
    with pytest.raises(BadRequest, match="scenarios 'other' and 'mine' cut .*a.trees into different pieces"):
        resolve(merge(merge(config, base), {"scenarios": {"mine": entry}}))
    resolve(merge(merge(config, base), {"scenarios": {"mine": entry | {"sequence_length": 25_000, "mutation_rate": 2e-7}}}))


def test_the_stage_writes_an_ordinary_batch_and_its_message_reproduces_a_piece(tmp_path):
    path = write(tmp_path / "a.trees", ancestry())
    mine = variant([path])
    for name, spec in (("planned", mine.spec), ("by-hand", MINE | {"name": "mine", "files": path})):
        out = tmp_path / f"{name}.trees.batch"
        run_python("-m", "cxt.simulate", "--spec", json.dumps(spec), "--count", 3, "--out", out)
        made = list(read_batch(out, start=0, count=3, scenario="mine", seed=1))
        assert all(ts.tables == simulate_tree_sequence(mine.spec, index=i, seed=1).tables for i, ts in enumerate(made))


def test_a_dataset_is_made_without_a_workflow(tmp_path):
    """Also one of whose files the recombination rate is not known; the same pieces as in the workflow."""
    files = [write(tmp_path / f"{n}.trees", ancestry(seed=n, length=250_000)) for n in (1, 2)]
    preprocess(["dataset", "--trees", *files, *FLAGS, "--out", str(tmp_path / "dataset")])
    manifest = read_manifest(tmp_path / "dataset")
    assert manifest["splits"]["train"]["items"] == 180
    assert manifest["splits"]["test"]["simulations"] == 5
    assert manifest["ranges"]["recombination_rate"] is None
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["1.trees", "2.trees", "dataset"]
    mine = variant(files)
    expected = preprocess_simulation(simulate_tree_sequence(mine.spec | {"name": "trees"}, index=10, seed=1), LAYOUT)
    with open_shard(tmp_path / "dataset" / "test" / "trees-0.zarr.zip") as (group, _):
        arrays = read_arrays("shard", group)
    assert arrays["index"][1] == 10
    assert np.array_equal(arrays["log_tmrca"][1], expected.log_tmrca.astype(np.float32))
    rates = PairDataset(tmp_path / "dataset", "train").batch([0]).rates
    assert np.isclose(rates[0, 0], np.log(1e-7))
    assert np.isnan(rates[0, 1])
    hmm = estimate_by_hmm(expected, window_size=1000, windows=10, samples=10)
    known = dataclasses.replace(expected, recombination_rate=1e-7)
    assert np.array_equal(hmm, estimate_by_hmm(known, window_size=1000, windows=10, samples=10))


FLAGS = [
    "--mutations", "overlay", "--mutation-rate", "1e-7", "--sequence-length", "10000", "--window-size", "1000",
    "--samples", "10", "--pairs", "4",
]  # fmt: skip


@pytest.mark.slow
def test_a_checkpoint_is_trained_on_such_a_dataset(tmp_path):
    path = write(tmp_path / "a.trees", ancestry(length=250_000))
    run_python("-m", "cxt.preprocess", "dataset", "--trees", path, *FLAGS, "--out", tmp_path / "dataset")
    run_python(
        "-m", "cxt.train", "--dataset-path", tmp_path / "dataset", "--devices", 0, "--epochs", 1, "--batch-size", 8,
        "--grad-accum", 1, "--layers", 1, "--heads", 2, "--width", 16, "--out", tmp_path / "mine.ckpt", cwd=tmp_path,
    )  # fmt: skip
    assert (tmp_path / "mine.ckpt").exists()


def test_a_dataset_is_not_made_over_another_or_of_one_piece(tmp_path):
    path = write(tmp_path / "a.trees", ancestry())
    scenario = {"files": [path], "mutations": "overlay", "mutation_rate": 1e-7}
    (tmp_path / "there").mkdir()
    with pytest.raises(BadRequest, match="there exists; remove it"):
        build_tree_dataset(tmp_path / "there", scenario, LAYOUT)
    with pytest.raises(BadRequest, match="1 piece of 60,000 bp"):
        build_tree_dataset(tmp_path / "new", scenario, LAYOUT | {"sequence_length": 60_000})
    with pytest.raises(BadRequest, match="mutations must be one of overlay, keep, got 'add'"):
        build_tree_dataset(tmp_path / "new", scenario | {"mutations": "add"}, LAYOUT)
    with pytest.raises(BadRequest, match="`mutations` is missing"):
        build_tree_dataset(tmp_path / "new", {"files": [path], "mutation_rate": 1e-7}, LAYOUT)
    assert not (tmp_path / "new").exists()


def test_a_dataset_that_cannot_be_made_is_refused_before_files_are_read(tmp_path):
    scenario = {"files": [str(tmp_path / "gone.trees")], "mutations": "overlay", "mutation_rate": 1e-7}
    out = tmp_path / "new"
    with pytest.raises(BadRequest, match="46 pairs requested, but 10 samples have only 45; lower pairs to 45"):
        build_tree_dataset(out, scenario, LAYOUT | {"pairs": 46})
    with pytest.raises(BadRequest, match="10 samples requested, but 4 individuals have only 8 haplotypes"):
        build_tree_dataset(out, scenario | {"individuals": 4}, LAYOUT)
    with pytest.raises(BadRequest, match="10 samples requested, but 4 individuals have only 8 haplotypes"):
        build_tree_dataset(out, scenario | {"samples": {"a": 1, "b": 3}}, LAYOUT)
    with pytest.raises(BadRequest, match="gone.trees"):
        build_tree_dataset(out, scenario | {"individuals": 5}, LAYOUT | {"pairs": 45})


def test_they_cannot_be_simulated_on_the_fly(tmp_path):
    path = write(tmp_path / "a.trees", ancestry(individuals=25, length=250_000))
    overlay = {"scenarios": {"mine": MINE | {"files": path, "individuals": 25}}}
    (tmp_path / "mine.yaml").write_text(json.dumps(overlay), encoding="utf-8")
    words = ["--simulate", "mine", "--configfile", str(tmp_path / "mine.yaml"), "--max-steps=2", "--eval-samples=4"]
    options = read_options(words)
    with pytest.raises(BadRequest, match="'mine' is cut from files"):
        plan_simulations(options, options.training, world=1)
