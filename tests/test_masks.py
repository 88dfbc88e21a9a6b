"""Accessibility masks: both file formats, the synthetic one, and cutting."""

import gzip
import re

import numpy as np
import pytest

from cxt.errors import BadRequest
from cxt.masks import cut_mask, read_mask, synthetic_mask, write_mask

SYNTHETIC = {"length": 2_000_000, "accessible_run": 500, "inaccessible_run": 200}


def runs(mask, value):
    """Lengths of the runs of *value* in *mask*."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (mask == value).astype(int), [0]])))
    return edges[1::2] - edges[::2]


def test_bed(tmp_path):
    text = "# comment\ntrack name=x\nchr1\t2\t5\nchr1\t8\t10\nchr2\t0\t3\n"
    path = tmp_path / "m.bed"
    path.write_text(text)
    expected = np.array([1, 1, 0, 0, 0, 1, 1, 1, 0, 0], dtype=bool)
    assert np.array_equal(read_mask(path, contig="chr1"), expected)
    with gzip.open(tmp_path / "m.bed.gz", "wt") as file:
        file.write(text)
    assert np.array_equal(read_mask(tmp_path / "m.bed.gz", contig="chr1"), expected)
    for arguments, message in (
        ({}, "has 2 contigs; say which with `contig`"),
        ({"contig": "chr3"}, "has no contig 'chr3'; did you mean 'chr"),
    ):
        with pytest.raises(BadRequest, match=re.escape(message)):
            read_mask(path, **arguments)
    path.write_text("chr1\t5\n")
    with pytest.raises(BadRequest, match="line 1: expected contig, start and end"):
        read_mask(path)
    path.write_text("chr1\t5\t2\n")
    with pytest.raises(BadRequest, match="found 5 and 2"):
        read_mask(path)


def test_npz(tmp_path):
    accessible = np.array([True, False, True])
    np.savez(tmp_path / "m.npz", access_2L=accessible)
    assert np.array_equal(read_mask(tmp_path / "m.npz", key="access_2L"), ~accessible)
    with pytest.raises(BadRequest, match="no array 'access_2R'; did you mean 'access_2L'"):
        read_mask(tmp_path / "m.npz", key="access_2R")
    for damaged in (b"no zip", (tmp_path / "m.npz").read_bytes()[:-30]):
        (tmp_path / "m.npz").write_bytes(damaged)
        with pytest.raises(BadRequest, match="cannot be read"):
            read_mask(tmp_path / "m.npz")
    np.savez(tmp_path / "m.npz", accessible=np.ones((2, 3), bool))
    with pytest.raises(BadRequest, match=r"found shape \(2, 3\), expected one value per base"):
        read_mask(tmp_path / "m.npz")
    with pytest.raises(BadRequest, match=r"expected a name that ends in .npz, .bed or .bed.gz"):
        read_mask(tmp_path / "m.txt")


def test_synthetic(tmp_path):
    mask = synthetic_mask(SYNTHETIC, seed=1)
    assert len(mask) == 2_000_000
    assert mask.mean() == pytest.approx(200 / 700, rel=0.1)
    assert np.mean(runs(mask, False)) == pytest.approx(500, rel=0.1)
    assert np.mean(runs(mask, True)) == pytest.approx(200, rel=0.15)
    assert np.median(runs(mask, True)) < 100
    assert np.max(runs(mask, True)) > 2000
    assert np.array_equal(mask, synthetic_mask(SYNTHETIC, seed=1))
    assert not np.array_equal(mask, synthetic_mask(SYNTHETIC, seed=2))
    write_mask(tmp_path / "a.npz", mask)
    write_mask(tmp_path / "b.npz", mask)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert np.array_equal(read_mask(tmp_path / "a.npz"), mask)


def test_cut():
    mask = np.random.default_rng(1).random(100) < 0.5
    offsets = set()
    for seed in range(200):
        piece, offset = cut_mask(mask, length=98, rng=np.random.default_rng(seed))
        assert np.array_equal(piece, mask[offset : offset + 98])
        offsets.add(offset)
    assert offsets == {0, 1, 2}
    with pytest.raises(BadRequest, match="100 bp long, shorter than the sequence of 101 bp"):
        cut_mask(mask, length=101, rng=np.random.default_rng(1))
