"""The blocks of a contig put together by stretches of windows: against a plain array, and in bounded memory."""

import tracemalloc

import numpy as np
import pytest

from cxt.errors import Failed
from cxt.translation.accessibility import Windows
from cxt.translation.blocks import Block
from cxt.translation.contigs import ContigPlan
from cxt.translation.estimates import COLUMNS
from cxt.translation.gathering import WIDE, add_up, group_units, iterate_stretches
from cxt.translation.job import Unit

PAIRS = 70


def make_units(work, *, regions, blocks, rng, values=None):
    """Units of one contig with random estimates in their files, and all of them in one array."""
    plan = ContigPlan("1", 0, 0, regions, Windows(np.zeros(0), np.zeros(0), []), np.ones(PAIRS), np.arange(4), [], [])
    kept = plan.kept
    whole = np.full((PAIRS, len(kept), len(COLUMNS)), np.nan, dtype=np.float32)
    bins = np.zeros((PAIRS, 2, len(kept)), dtype=np.uint16)
    sums = np.zeros((2, PAIRS))
    units = []
    for low, high in blocks:
        for begin, end in ((0, 64), (64, PAIRS)):
            unit = Unit(plan, Block(0, low, low, high), begin, end)
            one = rng.normal(9, 1, (end - begin, high - low, len(COLUMNS))).astype(np.float32)
            one[:, :, 3:] = np.sort(one[:, :, 3:] * 3, axis=-1)
            one[rng.random(one.shape[:2]) < 0.1] = np.nan
            sequences = rng.integers(0, 300, (end - begin, 2, high - low)).astype(np.uint16)
            differences, bases = rng.integers(0, 9, one.shape[:2]), rng.random(one.shape[:2]).astype(np.float32)
            np.savez(
                work / unit.file_name, values=one, differences=differences, bases=bases, warnings=np.array([], dtype=str),
                bins=sequences,
            )  # fmt: skip
            left = int(np.searchsorted(kept, low))
            whole[begin:end, left : left + high - low] = one
            bins[begin:end, :, left : left + high - low] = sequences
            known = ~np.isnan(one[:, :, 0])
            sums[0, begin:end] += np.where(known, differences, 0).sum(axis=1)
            sums[1, begin:end] += np.where(known, 2e-8 * np.exp(one[:, :, 2].astype(float)) * bases, 0).sum(axis=1)
            units.append(unit)
    return units, kept, whole, bins, sums


def test_stretches_and_sums(tmp_path, monkeypatch):
    regions = [(3, 60), (100, 175)]
    blocks = [(3, 30), (30, 41), (100, 120), (140, 175)]  # 41 to 60 and 120 to 140 have no estimates
    units, kept, whole, bins, sums = make_units(tmp_path, regions=regions, blocks=blocks, rng=np.random.default_rng(1))
    for size in (8, 50, 1024):
        monkeypatch.setattr("cxt.translation.gathering.CHUNK_WINDOWS", size)
        groups = group_units(units)
        assert list(groups) == [(0, 0), (0, 64)]
        for (_, begin), chunk in groups.items():
            rows = slice(begin, chunk[0].to_pair)
            parts = list(iterate_stretches(chunk, kept, work=tmp_path, replicates=2))
            assert [part.windows.start for part in parts] == list(range(0, len(kept), size))
            np.testing.assert_array_equal(np.concatenate([part.values for part in parts], axis=1), whole[rows])
            np.testing.assert_array_equal(np.concatenate([part.bins for part in parts], axis=2), bins[rows])
            total = add_up(chunk, work=tmp_path, mutation_rate=1e-8, warnings={})
            np.testing.assert_array_equal(total.diversity.observed, sums[0, rows])
            np.testing.assert_allclose(total.diversity.implied, sums[1, rows])
            inside = whole[rows][:, np.isin(kept, np.concatenate([np.arange(*block) for block in blocks]))]
            assert total.missing == np.isnan(inside[..., 0]).sum()
            assert total.wide == sum(one[-1] - one[3] > WIDE for row in inside for one in row)
            assert 0 < total.wide_time < total.mean_time
    (tmp_path / units[2].file_name).unlink()
    with pytest.raises(Failed, match="is missing or damaged"):
        list(iterate_stretches(groups[0, 0], kept, work=tmp_path, replicates=2))


def test_memory_does_not_grow_with_the_contig(tmp_path):
    """Ten times the windows; an array of all of them would be 64 pairs x 20,000 windows x 8 values x 4 bytes = 41 MB."""
    peaks = []
    for number, windows in enumerate((2000, 20_000)):
        work = tmp_path / str(number)
        work.mkdir()
        blocks = [(low, low + 200) for low in range(0, windows, 200)]
        units, kept, *_ = make_units(work, regions=[(0, windows)], blocks=blocks, rng=np.random.default_rng(1))
        chunk = group_units(units)[0, 0]
        tracemalloc.start()
        add_up(chunk, work=work, mutation_rate=1e-8, warnings={})
        for _ in iterate_stretches(chunk, kept, work=work, replicates=0):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1e6
    assert peaks[1] < 12e6
