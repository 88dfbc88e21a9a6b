"""stdpopsim scenarios: genetic maps (with a map made here), their cache, and what is recorded."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import msprime
import numpy as np
import pytest
import stdpopsim
from helpers.repository import REPOSITORY, TINY, run_python
from helpers.simulations import check_genealogies

from cxt import simulate
from cxt.config.file import load
from cxt.errors import BadRequest
from cxt.scenarios import genetic_maps
from cxt.scenarios import stdpopsim_models as catalogue
from cxt.scenarios.genetic_maps import check_map_available, fetch_genetic_map, get_genetic_map, read_genetic_map
from cxt.scenarios.registry import check_variant, simulate_tree_sequence
from cxt.scenarios.seeds import EngineSeeds, derive_engine_seeds
from cxt.scenarios.stdpopsim_catalogue import describe_other_recombination
from cxt.scenarios.stdpopsim_models import simulate_contig
from cxt.workflow.costs import Costs
from cxt.workflow.estimates import estimate_costs, format_estimate

SPEC = {
    "name": "aratha_map", "kind": "stdpopsim", "species": "AraTha", "models": [], "population_size": 1000,
    "genetic_map": "SalomeAveraged_TAIR10", "individuals": 5, "sequence_length": 1_000_000,
}  # fmt: skip
# Chromosome 1 (30.4 Mb): no rate below 5 Mb, 5 cM/Mb up to 10 Mb, 1 up to 25 Mb, then 0.
HAPMAP = """Chromosome\tPosition(bp)\tRate(cM/Mb)\tMap(cM)
chr1\t5000000\t5.0\t0.0
chr1\t10000000\t1.0\t25.0
chr1\t25000000\t0.0\t40.0
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty stdpopsim cache, also for processes that the test starts."""
    monkeypatch.setenv("STDPOPSIM_CACHE", str(tmp_path / "cache"))
    stdpopsim.set_cache_dir(tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    catalogue.read_chromosome_map.cache_clear()
    genetic_maps._check_url.cache_clear()
    yield tmp_path / "cache"
    stdpopsim.set_cache_dir()
    catalogue.read_chromosome_map.cache_clear()
    genetic_maps._check_url.cache_clear()


def cached_file() -> Path:
    """The file by which stdpopsim knows that the map is in its cache."""
    genetic_map = get_genetic_map(SPEC)
    return (
        stdpopsim.get_cache_dir() / "genetic_maps" / "AraTha" / genetic_map.id / f"{genetic_map.url.rsplit('/', 1)[1]}.sha256"
    )


def put_map_into(cache) -> None:
    """What a finished download leaves: the files, and the checksum that stdpopsim looks at."""
    genetic_map = get_genetic_map(SPEC)
    path = genetic_map.map_cache_dir / genetic_map.file_pattern.format(id="1")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HAPMAP)
    cached_file().write_text(genetic_map.sha256 + "\n")
    catalogue.read_chromosome_map.cache_clear()


def test_map_is_used(cache):
    put_map_into(cache)
    assert get_genetic_map(SPEC).is_cached()
    rates = catalogue.read_chromosome_map("AraTha", SPEC["genetic_map"], "1")
    assert np.isnan(rates.rate[0])
    for index in range(10):
        ts = simulate_tree_sequence(SPEC, index=index, seed=1)
        check_genealogies(ts)
        about = ts.metadata["cxt"]
        assert about["chromosome"] == "1"  # the only one that the map covers
        assert about["left"] >= 5_000_000  # never where it has no rate
        assert ts.sequence_length == 1_000_000
        assert about["stdpopsim"] == stdpopsim.__version__
    lefts = {i: simulate_tree_sequence(SPEC, index=i, seed=1).metadata["cxt"]["left"] for i in range(40)}
    where = {
        fast: next(i for i in lefts if (lefts[i] < 9_000_000 if fast else lefts[i] >= 10_000_000)) for fast in (True, False)
    }
    fast, slow = (
        simulate_tree_sequence(SPEC, index=where[True], seed=1),
        simulate_tree_sequence(SPEC, index=where[False], seed=1),
    )
    assert fast.num_trees > slow.num_trees + 2 * np.sqrt(slow.num_trees)
    assert simulate_tree_sequence(SPEC | {"ancestry_model": "smc_prime"}, index=where[True], seed=1).num_trees > slow.num_trees


def test_segments_by_hand(cache):
    """Segments lie where the map has rates, looked up base by base, and nowhere else would do."""
    put_map_into(cache)
    rng = np.random.default_rng(1)
    rates = catalogue.read_chromosome_map("AraTha", SPEC["genetic_map"], "1")
    for _ in range(200):
        _, left, segment_rates = catalogue.draw_segment(SPEC, rng)
        assert segment_rates is rates
        assert not np.isnan(rates.get_rate(np.linspace(left, left + 999_999, 50))).any()


def test_read_map(tmp_path):
    """As msprime reads it, but without a rate where the file has no data: at its ends, and beyond."""
    path = tmp_path / "map.txt"
    rows = [(100, 0), (200, 0.5), (400, 0), (600, 2), (900, 0), (950, 0)]
    path.write_text("\n".join(["Chromosome\tPosition\tRate\tMap", *(f"1\t{at}\t{rate}\t0" for at, rate in rows)]) + "\n")
    msprime_map = msprime.RateMap.read_hapmap(path, rate_col=2)
    for length in (2000, 950, 900, 700):
        genetic_map = read_genetic_map(path, length=length)
        assert genetic_map.sequence_length == length
        for at in np.arange(length) + 0.5:
            expected = msprime_map.get_rate(at) if 200 <= at < 900 else np.nan
            np.testing.assert_allclose(genetic_map.get_rate(at), expected, rtol=1e-9)
    path.write_text("header\n1 0 1.0 0\n1 500 0 0\n")
    assert read_genetic_map(path, length=500).rate.tolist() == [1e-8]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "must have at least 2 lines with a position, got 0"),
        (b"header\n", "must have at least 2 lines with a position, got 0"),
        (b"header\nchr1 5 0.0 0.0\n", "must have at least 2 lines with a position, got 1"),
        (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n", "is not a table of numbers"),
        (b"header\n1 5\n1 6\n", "is not a table of numbers"),
        (b"header\nchr1 5 NA 0.0\nchr1 9 0 0\n", "is not a table of numbers"),
        (b"header\n\xff\xfe 5 1.0 0\n", "is not a table of numbers"),
        (b"header\nchr1 5 nan 0.0\nchr1 9 0 0\n", "holds NaN or infinite numbers"),
        (b"header\nchr1 5 1.0 0\nchr1 4 1.0 0\nchr1 9 0 0\n", "has positions that are negative or not in rising order"),
        (b"header\nchr1 5 1.0 0\nchr1 5 1.0 0\nchr1 9 0 0\n", "has positions that are negative or not in rising order"),
        (b"header\nchr1 -5 1.0 0\nchr1 9 0 0\n", "has positions that are negative or not in rising order"),
        (b"header\nchr1 5 -1.0 0\nchr1 9 0 0\n", "holds a negative rate, -1 cM/Mb"),
        (
            b"header\nchr1 5 1.0 0\nchr1 9 2.5 0\n",
            "has a rate of 2.5 cM/Mb in its last line, which has no end; it may be truncated",
        ),
        (b"header\nchr1 5 0 0\nchr1 9 0 0\n", "has no rate above 0 within the 30427671 bp of the chromosome"),
        (b"header\nchr1 40000000 1.0 0\nchr1 50000000 0 0\n", "has no rate above 0 within the 30427671 bp of the chromosome"),
    ],
)
def test_damaged_maps(cache, content, reason):
    put_map_into(cache)
    genetic_map = get_genetic_map(SPEC)
    path = genetic_map.map_cache_dir / genetic_map.file_pattern.format(id="1")
    path.write_bytes(content)
    catalogue.read_chromosome_map.cache_clear()
    with pytest.raises(BadRequest) as error:
        simulate_tree_sequence(SPEC, index=0, seed=1)
    assert f"genetic map {path} {reason}" in str(error.value)
    assert f"Delete {genetic_map.map_cache_dir}, so that the workflow fetches the map again" in str(error.value)


def test_recombination_rate_of_a_segment(cache):
    """Recorded as the mean over the segment, by hand: 5 cM/Mb up to 10 Mb, 1 beyond."""
    put_map_into(cache)
    for index in range(12):
        about = simulate_tree_sequence(
            SPEC | {"sequence_length": 5_000_000, "population_size": 10}, index=index, seed=1
        ).metadata["cxt"]
        assert 5_000_000 <= about["left"] <= 20_000_000
        fast = max(0, 10_000_000 - about["left"]) / 5_000_000
        assert about["recombination_rate"] == pytest.approx((5 * fast + 1 - fast) * 1e-8)
        assert "model_recombination_rate" not in about


def test_other_recombination_rate_than_the_models(tmp_path, monkeypatch, capsys):
    """BosTau's models were inferred with 3.66e-9 to 1e-8, its chromosomes have 9.26e-9: recorded, and said."""
    spec = {"name": "cattle", "kind": "stdpopsim", "species": "BosTau", "models": ["Jersey_1B16"], "individuals": 3,
            "sequence_length": 5000}  # fmt: skip
    about = simulate_tree_sequence(spec, index=0, seed=1).metadata["cxt"]
    assert (about["recombination_rate"], about["model_recombination_rate"]) == (pytest.approx(9.26e-9), 4.58e-9)
    note = (
        "scenario 'cattle' recombines at the rates of the chromosomes (9.26e-09 per bp and generation), but "
        "these catalogue models were inferred with different rates: Jersey_1B16 4.58e-09"
    )
    assert describe_other_recombination(spec) == note
    assert describe_other_recombination(spec | {"models": []}) == ""
    assert describe_other_recombination(spec | {"species": "HomSap", "models": ["OutOfAfrica_3G09"]}) == ""
    words = ["cxt.simulate", "--spec", json.dumps(spec), "--count", "1", "--out", str(tmp_path / "x.trees.batch")]
    monkeypatch.setattr("sys.argv", words)
    simulate.main()
    assert note in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*words, "--seed", "1" + 29 * "0"])
    with pytest.raises(BadRequest, match="--seed must be a whole number from 0 to 9223372036854775807, got 10+"):
        simulate.main()
    config = load([])
    config["scenarios"]["cattle"] = spec | {"simulations": 10, "batch": 10, "models": ["Jersey_1B16"]}
    costs = Costs([])
    assert format_estimate(config, estimate_costs(config, costs), costs).count(f"Note: {note}.") == 1


def test_no_gene_conversion_that_would_be_left_out():
    """`simulate_contig` knows none; no contig of chromosomes that scenarios may draw has any."""
    for species in stdpopsim.all_species():
        try:
            chromosome = catalogue.list_autosomes({"name": "x", "species": species.id, "sequence_length": 1000})[0]
        except BadRequest:
            continue
        contig = species.get_contig(chromosome.id, left=0, right=1000)
        assert (contig.bacterial_recombination, contig.gene_conversion_fraction, contig.ploidy) == (False, None, 2)


def test_map_without_a_segment(cache):
    put_map_into(cache)
    longest = SPEC | {"sequence_length": 20_000_000}
    assert catalogue.draw_segment(longest, np.random.default_rng(1))[:2] == ("1", 5_000_000)
    with pytest.raises(BadRequest, match="covers no interval of 20000001 bp; the longest, on chromosome 1, has 20000000 bp"):
        simulate_tree_sequence(SPEC | {"sequence_length": 20_000_001}, index=0, seed=1)


def test_map_that_is_not_cached(cache):
    with pytest.raises(BadRequest, match="'aratha_map' needs the genetic map SalomeAveraged_TAIR10 of AraTha, which is not in"):
        simulate_tree_sequence(SPEC, index=0, seed=1)


def test_map_is_fetched(cache, tmp_path, monkeypatch):
    """From a tar file with the catalogue's layout, by a file: address in the place of the catalogue's."""
    genetic_map = get_genetic_map(SPEC)
    source = tmp_path / "TAIR10_lifted_chr1.txt"
    source.write_text(HAPMAP)
    archive = tmp_path / "salome2012_liftover_maps.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, arcname=genetic_map.file_pattern.format(id="1"))
    monkeypatch.setattr(genetic_map, "url", archive.as_uri())
    monkeypatch.setattr(genetic_map._cache, "url", archive.as_uri())
    monkeypatch.setattr(genetic_map._cache, "sha256", stdpopsim.utils.sha256(archive))
    check_map_available(SPEC)
    assert not cached_file().exists()  # asking fetches nothing
    fetch_genetic_map(SPEC)
    assert cached_file().exists()
    assert simulate_tree_sequence(SPEC, index=0, seed=1).metadata["cxt"]["chromosome"] == "1"

    monkeypatch.setattr(genetic_map._cache, "sha256", "0" * 64)  # a file that is not the catalogue's
    with pytest.raises(BadRequest, match="could not be fetched.*Expected SHA256"):
        fetch_genetic_map(SPEC)


def test_map_that_cannot_be_fetched(cache, monkeypatch):
    genetic_map = get_genetic_map(SPEC)
    for url in ("file:///no/such/map.tar.gz", "http://127.0.0.1:9/map.tar.gz"):
        monkeypatch.setattr(genetic_map, "url", url)
        monkeypatch.setattr(genetic_map._cache, "url", url)
        genetic_maps._check_url.cache_clear()
        for attempt in (check_map_available, fetch_genetic_map):
            with pytest.raises(BadRequest) as error:
                attempt(SPEC)
            could = "could not be fetched" if attempt is fetch_genetic_map else "cannot be fetched"
            alone = ("{aratha_map: {genetic_map: null}}", "{aratha_map: null}", "cxt catalogue --species AraTha")
            for part in ("scenario 'aratha_map'", could, *alone):
                assert part in str(error.value)


def test_map_fetched_before_but_gone(cache, tmp_path, monkeypatch):
    archive = tmp_path / "map.tar.gz"
    archive.write_bytes(b"")
    monkeypatch.setattr(get_genetic_map(SPEC), "url", archive.as_uri())
    record = tmp_path / "record.json"
    check_map_available(SPEC, fetched=record)
    record.write_text("{}")
    with pytest.raises(BadRequest, match="record.json says that it was fetched: delete that file"):
        check_map_available(SPEC, fetched=record)


def test_constant_size_beside_catalogue_models():
    with pytest.raises(
        BadRequest, match="population_size is for a constant size, but HomSap has catalogue models; add `models"
    ):
        check_variant({"name": "x", "kind": "stdpopsim", "species": "HomSap", "population_size": 10, "sequence_length": 1000})
    check_variant({"name": "x", "kind": "stdpopsim", "species": "AedAeg", "population_size": 10, "sequence_length": 1000})


def test_no_sex_chromosomes():
    for species, sex in (("AnoCar", "LGb"), ("GasAcu", "19"), ("HelMel", "21"), ("DroSec", "X"), ("AnaPla", "Z")):
        names = [c.id for c in catalogue.list_autosomes({"name": "x", "species": species, "sequence_length": 1_000_000})]
        assert names
        assert sex not in names
        assert sex in [c.id for c in stdpopsim.get_species(species).genome.chromosomes]
    with pytest.raises(BadRequest, match="EscCol has no diploid chromosome"):
        catalogue.list_autosomes({"name": "x", "species": "EscCol", "sequence_length": 1000})


def test_catalogue_is_in_the_lineage(monkeypatch):
    """Another version of stdpopsim, or another file behind a map, makes simulations stale; parametric ones it does not."""

    from cxt.config.file import load
    from cxt.config.variants import Variant
    from cxt.workflow.jobs import find_variant
    from cxt.workflow.lineages import batch_lineage

    config = load([])
    mapped = Variant("aratha_map", SPEC, 10, 10)
    used = [find_variant(config, "constant"), find_variant(config, "stdpopsim_homsap"), mapped]
    before = [batch_lineage(config, variant, 0, 10) for variant in used]
    monkeypatch.setattr(get_genetic_map(SPEC), "sha256", "0" * 64)
    after = [batch_lineage(config, variant, 0, 10) for variant in used]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False]
    monkeypatch.setattr(genetic_maps, "_get_stdpopsim_version", lambda: "9.9")
    after = [batch_lineage(config, variant, 0, 10) for variant in used]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]


def test_unknown_map():
    with pytest.raises(BadRequest, match="AraTha has no genetic map 'SalomeAveraged'; did you mean 'SalomeAveraged_TAIR10'"):
        check_variant(SPEC | {"genetic_map": "SalomeAveraged"})


OVERLAY = """
scenarios:
  stdpopsim_papanu: null
  mapped: {kind: stdpopsim, species: AraTha, models: [], population_size: 1000, genetic_map: SalomeAveraged_TAIR10,
           simulations: 10, batch: 10, sequence_length: 20000}
scenario_sets: {high_ne: [mapped]}
datasets:
  processed: {scenarios: [constant]}
  processed_n10: {scenarios: [constant]}
  processed_small_window: {scenarios: high_ne}
  processed_small_window_missing_data: {scenarios: high_ne}
  processed_small_window_missing_data_n10: {scenarios: high_ne}
"""

OFFLINE = """
import stdpopsim
for found in stdpopsim.get_species("AraTha").genetic_maps:
    found.url = found._cache.url = "file:///no/such/map.tar.gz"
"""


@pytest.mark.long
@pytest.mark.slow
def test_workflow_with_a_map(cache, tmp_path):
    """Without the map: one message, exit 2, before anything runs, and only if it is needed. With it: it runs."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(OFFLINE)
    overlay = tmp_path / "mapped.yaml"
    overlay.write_text(OVERLAY)

    def snake(*arguments, check=True, cache=cache):
        return run_python(
            "-m", "snakemake", "--snakefile", REPOSITORY / "Snakefile", "--directory", tmp_path / "work", "--cores", "2",
            *arguments, "--configfile", TINY, overlay, check=check,
            env={"PYTHONPATH": os.pathsep.join([str(site), str(REPOSITORY / "src")]), "STDPOPSIM_CACHE": str(cache)},
        )  # fmt: skip

    target = "results/simulations/mapped/0.trees.batch"
    for dry in (["-n"], []):
        refused = snake(*dry, target, check=False)
        assert refused.returncode == 2
        message = [line for line in refused.stderr.splitlines() if line.startswith("cxt:")]
        assert len(message) == 1
        assert "scenario 'mapped' needs the genetic map SalomeAveraged_TAIR10" in message[0]
        assert "Traceback" not in refused.stderr
    assert not list((tmp_path / "work").glob("results/simulations/*"))
    assert "simulate" in snake("-n", "results/simulations/constant/0.trees.batch").stdout  # needs no map
    put_map_into(cache)
    snake(target)
    assert (tmp_path / "work" / target).exists()
    assert json.loads((tmp_path / "work/results/maps/AraTha-SalomeAveraged_TAIR10.json").read_text())["species"] == "AraTha"
    before = cached_file().stat().st_mtime_ns
    snake("--forceall", target)
    assert cached_file().stat().st_mtime_ns == before  # nothing was fetched again
    # Another place for the cache changes no result; without the map nothing that is there is missed.
    moved = shutil.copytree(cache, tmp_path / "moved")
    for place in (moved, tmp_path / "empty"):
        assert "Nothing to be done" in snake("-n", target, cache=place).stdout
    (tmp_path / "work" / target).unlink()
    refused = snake("-n", target, cache=tmp_path / "empty", check=False)
    assert refused.returncode == 2
    assert "cannot be fetched" in refused.stderr


@pytest.mark.long
def test_workflow_fetches_a_map(cache, tmp_path):
    """A local rule fetches it, once, before the simulations that need it."""
    genetic_map = get_genetic_map(SPEC)
    source = tmp_path / "map.txt"
    source.write_text(HAPMAP)
    archive = tmp_path / genetic_map._cache._basename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, arcname=genetic_map.file_pattern.format(id="1"))
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        OFFLINE.replace("file:///no/such/map.tar.gz", archive.as_uri())
        + f"    found._cache.sha256 = found.sha256 = {stdpopsim.utils.sha256(archive)!r}\n"
    )
    overlay = tmp_path / "mapped.yaml"
    overlay.write_text(OVERLAY)
    done = run_python(
        "-m", "snakemake", "--snakefile", REPOSITORY / "Snakefile", "--directory", tmp_path / "work", "--cores", "2",
        "--show-failed-logs", "results/simulations/mapped/0.trees.batch", "--configfile", TINY, overlay,
        env={"PYTHONPATH": os.pathsep.join([str(site), str(REPOSITORY / "src")])},
    )  # fmt: skip
    assert "rule genetic_map" in done.stdout + done.stderr
    assert (tmp_path / "work/results/simulations/mapped/0.trees.batch").exists()


def test_sizes_and_rates_are_the_catalogues():
    """With one model and a flat map: the segment's rates are the catalogue's, by a direct call of stdpopsim's engine."""
    spec = {"name": "p", "kind": "stdpopsim", "species": "PonAbe", "models": ["TwoSpecies_2L11"], "individuals": 4,
            "sequence_length": 50_000}  # fmt: skip
    ts = simulate_tree_sequence(spec, index=1, seed=1)
    about = ts.metadata["cxt"]
    species = stdpopsim.get_species("PonAbe")
    model = species.get_demographic_model("TwoSpecies_2L11")
    contig = species.get_contig(
        about["chromosome"], left=about["left"], right=about["left"] + 50_000, mutation_rate=model.mutation_rate
    )
    assert about["mutation_rate"] == contig.mutation_rate
    assert about["recombination_rate"] == pytest.approx(species.genome.get_chromosome(about["chromosome"]).recombination_rate)
    # The engine draws two seeds from its one; with these, ours makes the same.
    seeds = EngineSeeds(*np.random.default_rng(7).integers(1, 2**31 - 1, size=2))
    direct = stdpopsim.get_engine("msprime").simulate(model, contig, about["samples"], seed=7)
    assert direct.tables.equals(simulate_contig(model, contig, about["samples"], seeds).tables, ignore_provenance=True)
    seeds = derive_engine_seeds(seed=1, spec=spec, index=1)
    again = simulate_contig(model, contig, about["samples"], seeds).trim()
    assert again.tables.equals(ts.tables, ignore_provenance=True, ignore_ts_metadata=True)
    assert sum(about["samples"].values()) == 4
