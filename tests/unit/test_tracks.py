"""Tracks on disk, their tables and figures, and coalescence rates, against plain loops and simulations."""

import csv
import gzip
import math
import shutil

import msprime
import numpy as np
import pytest
from matplotlib.image import imread

import cxt
from cxt.commands.plot import main
from cxt.console import exit_on_bad_request
from cxt.errors import BadRequest
from cxt.genotypes.records import Region
from cxt.translation.layout import find_segments, lay_out, read_columns
from cxt.translation.rates import EDGES, coalescence_rates, compute_shares, extend_quantiles, write_ne
from cxt.translation.tables import name_files, write_bigwigs, write_table
from cxt.translation.tracks import Tracks, TrackWriter

SIZE = 1000
LEVELS = [0.025, 0.25, 0.5, 0.75, 0.975]


def write(path, contigs, *, haplotypes, pairs, replicates=0, size=SIZE, rows=64, **changes):
    """Tracks with given arrays; *contigs* is {name: (length, start, quantiles)}, written *rows* pairs at a time."""
    attributes = {
        "model": "small", "checkpoint_sha256": "0" * 64, "window_size": size, "units": "ln generations",
        "time_scale": "made up", "mutation_rate": 1e-8, "recombination_rate": None, "generation_time": None,
        "calibration": "none", "seed": 0, "panels": 1, "reading": "marginal", "quantile_levels": LEVELS, "min_accessible": 0.25,
        "haplotypes": haplotypes, "pairs": pairs,
    }  # fmt: skip
    writer = TrackWriter(path, attributes | changes, replicates=replicates)
    for name, (length, start, quantiles) in contigs.items():
        accessible = np.where(np.isnan(quantiles[0, :, 0]), 0.0, 0.875)
        end = np.minimum(start + size, length)
        writer.add_contig(name, length, start=start, end=end, accessible=accessible, called=np.ones(len(pairs)))
        for begin in range(0, len(pairs), rows):
            part = slice(begin, min(begin + rows, len(pairs)))
            one = quantiles[part]
            sampled = {"replicates": np.stack([one[..., k % 5] for k in range(replicates)])} if replicates else {}
            writer.write_pairs(part, mean=one.mean(axis=-1), sd=one[..., 4] - one[..., 2], quantiles=one, **sampled)
    return writer.finish()


def make(path, *, seed=1, pairs=None, populations=("A", "B"), **changes):
    """Two contigs, of which the first has two regions and missing windows, and five haplotypes of two populations."""
    rng = np.random.default_rng(seed)
    names = [
        ["a/1", populations[0]],
        ["a/2", populations[0]],
        ["b/1", populations[0]],
        ["ü", populations[1]],
        ["d,e", populations[1]],
    ]
    pairs = pairs or [[i, j] for i in range(5) for j in range(i + 1, 5)]
    contigs = {}
    for name, length, start in (
        ("chr1", 200_300, np.r_[10_000:60_000:SIZE, 150_000:200_300:SIZE]),
        ("chr2", 90_000, np.arange(0, 90_000, SIZE)),
    ):
        middle = rng.normal(9, 1, (len(pairs), len(start)))
        quantiles = (middle[:, :, None] + np.sort(rng.normal(0, 0.5, (len(pairs), len(start), 5)))).astype(np.float32)
        if name == "chr1":
            quantiles[:, 5:9] = np.nan  # inaccessible
            quantiles[0, 20:30] = np.nan  # of one pair, where it is not called
        contigs[name] = (length, start, quantiles)
    return write(path, contigs, haplotypes=names, pairs=pairs, **changes), contigs


@pytest.fixture(scope="module")
def tracks(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tracks") / "tracks.zarr", generation_time=25.0)


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_round_trip(tracks, tmp_path):
    tracks, contigs = tracks
    assert [name for name, _ in tracks.contigs] == ["chr1", "chr2"]
    assert tracks.contigs[0].length == 200_300
    assert tracks.pair_names[0] == ("a/1", "a/2")
    assert tracks.population_pairs[3] == ("A", "B")
    assert tracks.find_pair("ü", "a/1") == tracks.find_pair("a/1", "ü") == 2
    for name, (length, start, quantiles) in contigs.items():
        whole = tracks.read(name)
        np.testing.assert_array_equal(whole.start, start)
        assert whole.end[-1] == length
        np.testing.assert_array_equal(whole.quantiles, quantiles)
        np.testing.assert_array_equal(whole.tmrca, np.exp(quantiles[:, :, 2]))
        part = tracks.read(name, [7, 2], slice(3, 40))
        np.testing.assert_array_equal(part.quantiles, quantiles[[7, 2], 3:40])
        np.testing.assert_array_equal(part.end, whole.end[3:40])
        assert part.called.shape == (2,)
        assert part.replicates is None
    sampled, _ = make(tmp_path / "tracks.zarr", replicates=3)
    np.testing.assert_array_equal(
        sampled.read("chr2", slice(0, 2)).replicates, contigs["chr2"][2][:2, :, :3].transpose(2, 0, 1)
    )
    assert Tracks(tmp_path).path == tmp_path / "tracks.zarr"


def test_the_same_bytes(tracks, tmp_path):
    """Whatever the order and size of the parts that are written, and twice."""
    for number, rows in enumerate((64, 3, 64)):
        directory = tmp_path / str(number)
        one, _ = make(directory / "tracks.zarr", generation_time=25.0, rows=rows)
        write_table(one, directory / "tracks.tsv.gz")
        write_bigwigs(one, directory / "bigwig")
        write_ne(one, directory / "ne.csv")
    first = contents(tmp_path / "0")
    assert first == contents(tmp_path / "1") == contents(tmp_path / "2")
    assert {name.split("/")[0] for name in first} == {"tracks.zarr", "tracks.tsv.gz", "tracks.tsv.gz.tbi", "bigwig", "ne.csv"}


def test_rows_that_were_not_written(tmp_path):
    shape = {"start": np.array([0]), "end": np.array([9]), "accessible": np.ones(1), "called": np.ones(2)}
    writer = TrackWriter(tmp_path / "t", {"pairs": [[0, 1], [0, 2]], "quantile_levels": LEVELS})
    writer.add_contig("1", 9, **shape)
    writer.write_pairs(slice(0, 1), mean=np.ones((1, 1)), sd=np.ones((1, 1)), quantiles=np.ones((1, 1, 5)))
    with pytest.raises(ValueError, match="1 of 2 pairs of contig 1 were not written"):
        writer.finish()
    assert not (tmp_path / "t").exists()
    with pytest.raises(ValueError, match="arrays .*'sd'.* are needed"):
        writer.write_pairs(slice(1, 2), mean=np.ones((1, 1)))


def test_not_tracks(tracks, tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(BadRequest, match="holds no tracks; give the directory that `cxt translate --out` wrote"):
            Tracks(path)
    copy = tmp_path / "copy"
    shutil.copytree(tracks[0].path, copy)
    (copy / "0" / "mean" / "c" / "0" / "0").unlink()
    with pytest.raises(BadRequest, match="incomplete: 1 of 1 files of 0/mean are missing; copy it again"):
        Tracks(copy)
    (copy / "zarr.json").write_text((copy / "zarr.json").read_text().replace('"cxt_tracks": 1', '"cxt_tracks": 9'))
    with pytest.raises(BadRequest, match="holds tracks of version 9, not 1"):
        Tracks(copy)
    (copy / "zarr.json").write_text("{")
    with pytest.raises(BadRequest, match="cannot be read in Zarr format"):
        Tracks(copy)
    with pytest.raises(BadRequest, match="no contig 'chr3'; did you mean 'chr"):
        tracks[0].read("chr3")
    with pytest.raises(BadRequest, match="no haplotype 'a/3'; choose from a/1, a/2"):
        tracks[0].find_pair("a/1", "a/3")
    few, _ = make(tmp_path / "few", pairs=[[0, 1], [0, 3]])
    with pytest.raises(BadRequest, match="do not have the pair a/2,b/1; a/2 is paired with a/1"):
        few.find_pair("a/2", "b/1")


def plain_table(tracks, contigs):
    """Rows of the table by a plain loop."""
    rows = []
    for name, (length, start, quantiles) in contigs.items():
        for k, left in enumerate(start):
            for (first, second), q in zip(tracks.pair_names, quantiles[:, k].astype(float), strict=True):
                share = "0.000" if np.isnan(quantiles[0, k, 0]) else "0.875"
                mean = quantiles.mean(axis=-1)
                times = [f"{math.exp(value):.1f}" for value in (q[2], q[0], q[4])]
                row = [name, str(left), str(min(left + SIZE, length)), first, second]
                row += [
                    f"{mean[tracks.pair_names.index((first, second)), k]:.4f}",
                    f"{np.float32(q[4]) - np.float32(q[2]):.4f}",
                ]
                rows.append([*row, *times, f"{math.exp(q[2]) * 25:.0f}", share])
    return rows


def test_table(tracks, tmp_path):
    import pysam

    tracks, contigs = tracks
    path = tmp_path / "tracks.tsv.gz"
    write_table(tracks, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tracks.tsv.gz", "tracks.tsv.gz.tbi"]
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert header == lines[:9]
    assert "# generation time: 25.0 years" in header
    assert header[-1].split("\t")[-3:] == ["tmrca_97.5", "tmrca_years", "accessible"]
    expected = plain_table(tracks, contigs)
    assert [line.split("\t") for line in lines[9:]] == expected
    assert any(row[5] == "nan" for row in expected)
    with pysam.TabixFile(str(path), encoding="utf-8") as table:
        assert table.contigs == ["chr1", "chr2"]
        for region, (contig, low, high) in (
            ("chr1:1-100000", ("chr1", 0, 100_000)),
            ("chr2:2001-5000", ("chr2", 2000, 5000)),
            ("chr1:100000-120000", ("chr1", 99_999, 120_000)),
        ):
            found = [line.split("\t") for line in table.fetch(region=region)]
            assert found == [row for row in expected if row[0] == contig and int(row[1]) < high and int(row[2]) > low]
        assert not list(table.fetch(region="chr1:100000-120000"))


def test_table_in_parts(tracks, tmp_path, monkeypatch):
    """Parts in which every window is missing are written in another way, and are the same."""
    tables = []
    for size in (2**18, 1):
        monkeypatch.setattr("cxt.translation.tables.VALUES_IN_MEMORY", size)
        write_table(tracks[0], tmp_path / "tracks.tsv.gz")
        tables.append(gzip.decompress((tmp_path / "tracks.tsv.gz").read_bytes()))
    assert tables[0] == tables[1]
    assert np.isnan(tracks[0].read("chr1").mean).all(axis=0).any()


def test_table_without_years_and_far_away(tmp_path):
    """Without a generation time there are no years; positions beyond 2^29 need another index, which replaces the old one."""
    import pysam

    quantiles = np.full((1, 2, 5), 7, dtype=np.float32)
    names = [["x", None], ["y", None]]
    near = write(tmp_path / "1", {"c": (5000, np.array([0, 1000]), quantiles)}, haplotypes=names, pairs=[[0, 1]])
    far = write(tmp_path / "2", {"c": (2**32, np.array([0, 2**31]), quantiles)}, haplotypes=names, pairs=[[0, 1]])
    path = tmp_path / "out" / "tracks.tsv.gz"
    path.parent.mkdir()
    write_table(near, path)
    assert "tmrca_years" not in gzip.decompress(path.read_bytes()).decode()
    write_table(far, path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["tracks.tsv.gz", "tracks.tsv.gz.csi"]
    with pysam.TabixFile(str(path), index=f"{path}.csi") as table:
        assert [line.split("\t")[:3] for line in table.fetch("c", 2**31 + 5, 2**31 + 6)] == [
            ["c", str(2**31), str(2**31 + 1000)]
        ]
    with pytest.raises(BadRequest, match="contig c has 4,294,967,296 bp, but bigWig files need lengths up to 4,294,967,295 bp"):
        write_bigwigs(far, tmp_path / "bigwig")
    assert not (tmp_path / "bigwig").exists()


def test_bigwigs(tracks, tmp_path):
    import pyBigWig

    tracks, contigs = tracks
    (tmp_path / "bigwig").mkdir()
    (tmp_path / "bigwig" / "old.bw").touch()
    write_bigwigs(tracks, tmp_path / "bigwig")
    rows = list(csv.reader((tmp_path / "bigwig" / "files.tsv").open(), delimiter="\t"))
    assert rows[0] == ["file", "haplotype_1", "haplotype_2"]
    assert [tuple(row[1:]) for row in rows[1:]] == tracks.pair_names
    assert {path.name for path in (tmp_path / "bigwig").iterdir()} == {"files.tsv", *(row[0] for row in rows[1:])}
    for number, row in enumerate(rows[1:]):
        with pyBigWig.open(str(tmp_path / "bigwig" / row[0])) as file:
            assert file.chroms() == dict(tracks.contigs)
            for name, (length, start, quantiles) in contigs.items():
                medians = quantiles[number, :, 2]
                expected = [
                    (left, min(left + SIZE, length), np.float32(math.exp(value)))
                    for left, value in zip(start, medians, strict=True)
                    if not np.isnan(value)
                ]
                found = file.intervals(name)
                assert [one[:2] for one in found] == [one[:2] for one in expected]
                np.testing.assert_allclose([one[2] for one in found], [one[2] for one in expected], rtol=1e-6)


def test_names_of_files():
    assert name_files([("a/1", "a/2"), ("b:1", "ü x")], ".bw") == ["a_1-a_2.bw", "b_1-ü_x.bw"]
    same = name_files([("a/1", "b"), ("a_1", "b"), ("A_1", "b"), ("ü" * 300, "c")], ".bw")
    assert same[:3] == ["a_1-b.pair0.bw", "a_1-b.pair1.bw", "A_1-b.pair2.bw"]
    assert same[3].endswith(".pair3.bw")
    assert len(same[3].encode()) < 220


def test_names_of_many_files():
    """In seconds, where comparing each with each would take minutes."""
    names = name_files([(f"sample{i % 40_000}/1", "x") for i in range(80_000)], ".bw")
    assert len(set(names)) == 80_000
    assert names[1] == "sample1_1-x.pair1.bw"
    # Not those that another pair gets by its number.
    assert len(set(name_files([("a", "b"), ("a", "b.pair0"), ("A", "b")], ""))) == 3


def test_each_chunk_is_read_once_for_the_table(tmp_path, monkeypatch):
    """The table has all pairs of a window together, and the chunks on disk many windows of some pairs."""
    rng = np.random.default_rng(1)
    quantiles = np.sort(rng.normal(9, 1, (130, 2000, 5)), axis=-1).astype(np.float32)
    names = [[f"s{i}", None] for i in range(17)]
    pairs = [[i, j] for i in range(17) for j in range(i + 1, 17)][:130]
    tracks = write(tmp_path / "t", {"1": (2_000_000, np.arange(0, 2_000_000, SIZE), quantiles)}, haplotypes=names, pairs=pairs)
    read = []

    class Counting:
        def __init__(self, array):
            self.array = array

        def __getitem__(self, place):
            read.append(place)
            return self.array[place]

    monkeypatch.setattr(Tracks, "array", lambda self, contig, name, array=Tracks.array: Counting(array(self, contig, name)))
    monkeypatch.setattr("cxt.translation.tables.VALUES_IN_MEMORY", 130 * 100)
    write_table(tracks, tmp_path / "a.tsv.gz")
    assert len(read) <= 3 + 3 * 2 * 3  # start, end, accessible; mean, sd, quantiles in 2 x 3 chunks
    monkeypatch.setattr("cxt.translation.tables.VALUES_IN_FILE", 1)
    write_table(tracks, tmp_path / "b.tsv.gz")
    assert (tmp_path / "a.tsv.gz").read_bytes() == (tmp_path / "b.tsv.gz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tsv.gz", "a.tsv.gz.tbi", "b.tsv.gz", "b.tsv.gz.tbi", "t"]


def test_shares_against_a_plain_loop(tracks):
    tracks, contigs = tracks
    edges = EDGES[20:60:4]
    groups, above, mean_time = compute_shares(tracks, edges)
    assert groups == [("A", "A"), ("A", "B"), ("B", "B")]
    for g, group in enumerate(groups):
        rows = [row for row, one in enumerate(tracks.population_pairs) if one == group]
        for e, edge in enumerate(edges):
            share, time, total = 0.0, 0.0, 0.0
            for length, start, quantiles in contigs.values():
                for row in rows:
                    for k, left in enumerate(start):
                        q = quantiles[row, k].astype(float)
                        if np.isnan(q[0]):
                            continue
                        width = min(left + SIZE, length) - left
                        knots = [q[0] - 0.6 * (q[1] - q[0]), *q, q[4] + 0.6 * (q[4] - q[3])]
                        total += width
                        for low, high, mass in zip(knots[:-1], knots[1:], np.diff([0, *LEVELS, 1]), strict=True):
                            if math.log(edge) < high:
                                cut = max(low, math.log(edge))
                                share += width * mass * (high - cut) / (high - low)
                                time += width * mass * (math.exp(high) - math.exp(cut)) / (high - low)
            assert above[g, e] == pytest.approx(share / total, rel=1e-9, abs=1e-12)
            if share:
                assert mean_time[g, e] == pytest.approx(time / share, rel=1e-9)


def test_tails_have_the_mean_of_normal_ones():
    q = np.array([-1.959964, -0.674490, 0, 0.674490, 1.959964])
    knots, masses = extend_quantiles(q, LEVELS)
    assert masses.sum() == pytest.approx(1)
    assert (knots[:2].sum() / 2) == pytest.approx(-2.3378, abs=0.02)  # mean of a standard normal below its 2.5% quantile


def test_ne_csv(tracks, tmp_path):
    write_ne(tracks[0], tmp_path / "ne.csv")
    rows = list(csv.DictReader((tmp_path / "ne.csv").open()))
    assert {(row["population_1"], row["population_2"]) for row in rows} == {("A", "A"), ("A", "B"), ("B", "B")}
    one = [row for row in rows if (row["population_1"], row["population_2"]) == ("A", "B")]
    assert one[0]["time_from"] == "0"
    assert one[-1]["time_to"] == "inf"
    assert [row["time_to"] for row in one[:-1]] == [row["time_from"] for row in one[1:]]
    assert sum(float(row["share"]) for row in one) == pytest.approx(1, abs=1e-4)
    for row in one:
        if float(row["coalescence_rate"]) > 0:
            assert float(row["ne"]) == pytest.approx(0.5 / float(row["coalescence_rate"]), rel=1e-4)


def test_populations_that_are_not_known(tmp_path):
    tracks, _ = make(tmp_path / "1", populations=(None, None))
    assert {one.populations for one in coalescence_rates(tracks)} == {("all", "all")}
    tracks, _ = make(tmp_path / "2", populations=("A", None))
    assert {one.populations for one in coalescence_rates(tracks)} == {("A", "A"), ("A", "unknown"), ("unknown", "unknown")}


def test_all_missing(tmp_path):
    quantiles = np.full((1, 2, 5), np.nan, dtype=np.float32)
    tracks = write(
        tmp_path / "tracks.zarr",
        {"c": (2000, np.array([0, 1000]), quantiles)},
        haplotypes=[["x", None], ["y", None]],
        pairs=[[0, 1]],
    )
    assert coalescence_rates(tracks) == []
    write_ne(tracks, tmp_path / "ne.csv")
    assert (tmp_path / "ne.csv").read_text().count("\n") == 1
    write_bigwigs(tracks, tmp_path / "bigwig")
    write_table(tracks, tmp_path / "tracks.tsv.gz")
    with pytest.raises(BadRequest, match="all windows of these pairs are missing here"):
        main([str(tmp_path)])


def true_tracks(path, ts, pairs, *, size, posterior=None):
    """Tracks whose quantiles are all the true ln TMRCA, or those that `posterior` returns for it."""
    length = int(ts.sequence_length)
    truth = cxt.pair_log_tmrca(ts, pairs, window_size=size, sequence_length=length)
    quantiles = np.repeat(truth[:, :, None], 5, axis=2) if posterior is None else posterior(truth)
    names = [[str(i), None] for i in range(ts.num_samples)]
    contigs = {"1": (length, np.arange(0, length, size), quantiles.astype(np.float32))}
    return write(path, contigs, haplotypes=names, pairs=pairs, size=size)


@pytest.mark.slow
def test_ne_of_a_constant_population(tmp_path):
    """From the true TMRCAs of short windows, Ne is within 30% wherever 1% of the genome coalesces, and 8% on average."""
    ts = msprime.sim_ancestry(20, population_size=1e4, sequence_length=2e7, recombination_rate=1e-8, random_seed=1)
    tracks = true_tracks(tmp_path / "t", ts, [[i, i + 1] for i in range(0, 40, 2)], size=200)
    (one,) = coalescence_rates(tracks)
    enough = one.share > 0.01
    assert enough.sum() > 15
    errors = np.log(one.ne[enough] / 1e4)
    assert np.abs(errors).max() < 0.3
    assert np.abs(errors).mean() < 0.08


@pytest.mark.slow
def test_ne_of_posteriors_is_better_than_that_of_means(tmp_path):
    """With a bottleneck: the mean of the posteriors recovers Ne of the true TMRCAs, that of their means does not."""
    demography = msprime.Demography.isolated_model([2e4])
    demography.add_population_parameters_change(time=1500, initial_size=2e3)
    demography.add_population_parameters_change(time=3000, initial_size=2e4)
    ts = msprime.sim_ancestry(10, demography=demography, sequence_length=1e7, recombination_rate=1e-8, random_seed=2)
    pairs = [[i, i + 1] for i in range(0, 20, 2)]
    grid = np.linspace(3, 14, 300)
    step = grid[1] - grid[0]

    def posteriors(truth):
        """Of an observation of ln TMRCA with a standard error of 0.6, under the distribution of the truth as prior."""
        prior = np.histogram(truth, np.append(grid, grid[-1] + step) - step / 2)[0] / truth.size
        observed = truth + np.random.default_rng(1).normal(0, 0.6, truth.shape)
        table = prior * np.exp(-0.5 * ((grid[:, None] - grid) / 0.6) ** 2)  # (observed, true)
        table /= np.maximum(table.sum(axis=1, keepdims=True), 1e-300)
        return table[np.clip(np.round((observed - grid[0]) / step).astype(int), 0, len(grid) - 1)]

    def quantiles(truth):
        cumulative = posteriors(truth).cumsum(axis=-1)
        return np.stack([grid[np.minimum((cumulative < level).sum(axis=-1), len(grid) - 1)] for level in LEVELS], axis=-1)

    (true,) = coalescence_rates(true_tracks(tmp_path / "t", ts, pairs, size=2000))
    mine = true_tracks(tmp_path / "p", ts, pairs, size=2000, posterior=quantiles)
    means = true_tracks(
        tmp_path / "m",
        ts,
        pairs,
        size=2000,
        posterior=lambda truth: np.repeat((posteriors(truth) @ grid)[:, :, None], 5, axis=2),
    )
    errors = {}
    for name, tracks in (("posteriors", mine), ("means", means)):
        _, above, _ = compute_shares(tracks, true.edges[1:])
        above = np.append(1.0, above[0])
        with np.errstate(divide="ignore"):
            ne = np.diff(true.edges) / (2 * np.log(above[:-1] / above[1:]))
        enough = (true.share > 0.01)[:-1]
        errors[name] = np.abs(np.log(ne[enough] / true.ne[:-1][enough]))
    old = true.edges[:-1][enough] > 5000  # around the bottleneck, both are smoothed
    assert errors["posteriors"].mean() < 0.2
    assert errors["means"].mean() > 2 * errors["posteriors"].mean()
    assert errors["posteriors"][old].mean() < 0.1
    assert errors["means"][old].mean() > 3 * errors["posteriors"][old].mean()


def test_layout(tracks):
    tracks, contigs = tracks
    segments = find_segments(tracks)
    assert [segment.name for segment in segments] == ["chr1:10,001-60,000", "chr1:150,001-200,300", "chr2:1-90,000"]
    layout = lay_out(segments, most=30, window_size=SIZE)
    assert layout.step == 7
    assert layout.columns == [8, 8, 13]
    assert layout.edges[-1] == 50_000 + 50_300 + 90_000
    assert layout.breaks == [50_000, 100_300]
    found = read_columns(tracks, layout, [0, 5], [0.5, 0.025])
    column = 0
    for segment in segments:
        quantiles = contigs[segment.contig][2]
        for left in range(segment.first, segment.last, 7):
            values = quantiles[[0, 5], left : min(left + 7, segment.last)][:, :, [2, 0]]
            for row in range(2):
                known = [value for value in values[row] if not np.isnan(value[0])]
                expected = np.mean(known, axis=0) if known else [np.nan, np.nan]
                np.testing.assert_allclose(found[row, column], expected, rtol=1e-6)
            column += 1
    assert column == found.shape[1]
    (one,) = find_segments(tracks, Region("chr1", 151_500, 153_000))
    assert (one.start, one.end) == (151_000, 153_000)
    with pytest.raises(BadRequest, match="no windows; on chr1, the tracks have windows from 10,001 to 200,300"):
        find_segments(tracks, Region("chr1", 70_000, 80_000))


def test_plot(tracks, tmp_path, capsys):
    out = tmp_path / "figures"
    main([str(tracks[0].path), "--out", str(out), "--pairs", "d,e,a/1", "a/2,ü", "--region", "chr1:20001-60000"])
    assert "tracks.png, pairs.png" in capsys.readouterr().out
    for name in ("tracks", "pairs", "distribution", "ne"):
        image = imread(out / f"{name}.png")[:, :, :3]
        assert image.shape[1] > 800
        assert image.std() > 0.05
    for words, message in (
        (["--pairs", "a/1,a/9"], "no haplotype 'a/9'"),
        (["--pairs", "a/1"], "'a/1' must be two names of haplotypes with a comma"),
        (["--pairs", *["a/1,a/2"] * 7], "from 1 to 6 pairs can be drawn, got 7"),
        (["--region", "chr9"], "no contig 'chr9'"),
    ):
        with pytest.raises(BadRequest, match=message):
            main([str(tracks[0].path), "--out", str(tmp_path / "no"), *words])
    with pytest.raises(BadRequest, match="holds no tracks"):
        main([str(tmp_path)])


def test_plot_without_tracks(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        exit_on_bad_request(lambda: main([str(tmp_path)]))
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"cxt: {tmp_path} holds no tracks; give the directory")
