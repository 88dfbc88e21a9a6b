"""Accessibility masks: both file formats, the synthetic one, and cutting."""

import gzip
import io
import re
import tracemalloc
import zipfile

import numpy as np
import pytest

from cxt.config.datasets import Mask
from cxt.data.features import compute_missing_fraction
from cxt.data.masks import cut_mask, describe_mask, draw_synthetic_mask, read_mask, write_mask
from cxt.errors import BadRequest

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
        ({}, "has 2 contigs; set `contig`"),
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
    with pytest.raises(BadRequest, match=r"must have one value per base, got shape \(2, 3\)"):
        read_mask(tmp_path / "m.npz")
    with pytest.raises(BadRequest, match=r"the file name must end in .npz, .bed, .bed.gz or .bed.bgz"):
        read_mask(tmp_path / "m.txt")


def test_synthetic(tmp_path):
    mask = draw_synthetic_mask(SYNTHETIC, seed=1)
    assert len(mask) == 2_000_000
    assert mask.mean() == pytest.approx(200 / 700, rel=0.1)
    assert np.mean(runs(mask, False)) == pytest.approx(500, rel=0.1)
    assert np.mean(runs(mask, True)) == pytest.approx(200, rel=0.15)
    assert np.median(runs(mask, True)) < 100
    assert np.max(runs(mask, True)) > 2000
    assert np.array_equal(mask, draw_synthetic_mask(SYNTHETIC, seed=1))
    assert not np.array_equal(mask, draw_synthetic_mask(SYNTHETIC, seed=2))
    write_mask(tmp_path / "a.npz", mask)
    write_mask(tmp_path / "b.npz", mask)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert np.array_equal(read_mask(tmp_path / "a.npz"), mask)


def test_synthetic_parts():
    """Equal parts with runs of their own: open, with short gaps, with long ones."""
    spec = {"length": 3_000_000, "accessible_run": [1, 500, 5000], "inaccessible_run": [0, 200, 5000]}
    mask = draw_synthetic_mask(spec, seed=1)
    first, second, third = mask.reshape(3, -1)
    assert not first.any()
    assert second.mean() == pytest.approx(200 / 700, rel=0.1)
    assert third.mean() == pytest.approx(0.5, rel=0.3)
    assert np.mean(runs(second, True)) == pytest.approx(200, rel=0.15)
    assert np.mean(runs(third, True)) > 3000


def test_parts_of_different_numbers():
    message = "`accessible_run` and `inaccessible_run` must be two numbers, or two lists of the same length"
    for values in ({"accessible_run": [1, 2]}, {"accessible_run": [1, 2], "inaccessible_run": [1]}):
        with pytest.raises(BadRequest, match=message):
            Mask.read(values)


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


def bed(tmp_path, content, name="m.bed"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


PLAIN = "chr1\t2\t5\nchr1\t8\t10\n"
COMPRESSED = gzip.compress(PLAIN.encode(), mtime=0)
ACCESSIBLE = np.array([1, 1, 0, 0, 0, 1, 1, 1, 0, 0], dtype=bool)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.BED", PLAIN), ("m.bed.bgz", COMPRESSED), ("m.bed", COMPRESSED),
        ("m.bed", "\ufeff" + PLAIN), ("m.bed", PLAIN.replace("\n", "\r\n")), ("m.bed", PLAIN.replace("\t", " ")),
        ("m.bed", "chrom\tchromStart\tchromEnd\n" + PLAIN),
        ("m.bed", "browser position chr1:1-9\ntrack name=x\n#c\n\n" + PLAIN),
        ("m.bed", "chr1\t2\t5\ta\nchr1\t8\t10\tb\n"), ("m.bed", "chr1\t2\t4\ta\nchr1\t3\t5\ta\nchr1\t8\t10\tb\n"),
    ],
)  # fmt: skip
def test_beds_that_say_the_same(tmp_path, name, content):
    path = bed(tmp_path, content, name)
    assert np.array_equal(read_mask(path), ACCESSIBLE)
    assert np.array_equal(read_mask(path, marks="inaccessible"), ~ACCESSIBLE)
    assert describe_mask(path, ACCESSIBLE) == f"mask {path}: 50.0% of 10 bp accessible"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.bed", "", "has no intervals"), ("m.bed", "# nothing\ntrack x\n", "has no intervals"),
        ("m.bed", "chr1\t5\t5\n", "all intervals of 'chr1' are empty"),
        ("m.bed", "chr1\t0\t100000000000000\n", "line 1: the end must be at most .*, got 100000000000000"),
        ("m.bed", "chr1\t-1\t5\n", "line 1: expected contig, start and end"),
        ("m.bed", "chr1\t0.5\t5\n", "line 1: expected"), ("m.bed", "chr1\t1_0\t50\n", "line 1: expected"),
        ("m.bed", "chr1\t1\t\u0665\n", "line 1: expected"), ("m.bed", PLAIN + "chrom\tstart\tend\n", "line 3: expected"),
        ("m.bed", bytes(range(256)), "cannot be read"), ("m.bed.gz", COMPRESSED[:-9], "cannot be read"),
        ("m.bed", "chr1\t0\t9\tNA12878\nchr1\t5\t9\tNA12891\n", "intervals of 'NA12891' and 'NA12878' overlap at 5"),
        ("m.bed", "chr1\t0\t90\ta\nchr1\t1\t2\ta\nchr1\t95\t99\tb\nchr1\t96\t97\tc\n", "'c' and 'b' overlap at 96"),
        ("m.bed", "chr1\t2\t5\n\tchr1\t8\t10\n", "line 2: expected contig"),
        ("m.bed", "chr1\t0\t90\ta\nchr1\t1\t20\ta\nchr1\t30\t35\tb\n", "'b' and 'a' overlap at 30"),
    ],
)  # fmt: skip
def test_beds_that_are_refused(tmp_path, name, content, message):
    path = bed(tmp_path, content, name)
    with pytest.raises(BadRequest, match=f"{re.escape(str(path))}.*{message}"):
        read_mask(path)


def test_damaged_gz(tmp_path):
    whole = gzip.compress(PLAIN.encode() * 1000)
    for at in range(12, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 16
        with pytest.raises(BadRequest, match=r"cannot be read|, line \d+: expected"):
            read_mask(bed(tmp_path, bytes(damaged), "m.bed.gz"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array(["yes", "no"]), "values of type <U3"), (np.array([0.0, np.nan]), "values of type float64"),
        (np.array([0, -1]), "got the value -1"), (np.array([0, 1, 5000]), "got the value 5000"),
        (np.array([], bool), "is empty"), (np.array([{}], dtype=object), "cannot be read: .*pickle"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_mask(tmp_path, values, message):
    np.savez(tmp_path / "m.npz", accessible=values)
    with pytest.raises(BadRequest, match=message):
        read_mask(tmp_path / "m.npz")


def test_arrays_of_0_and_1(tmp_path):
    for dtype in (np.uint8, np.int64, bool):
        np.savez_compressed(tmp_path / "m.npz", accessible=(~ACCESSIBLE).astype(dtype))
        assert np.array_equal(read_mask(tmp_path / "m.npz"), ACCESSIBLE)


def test_reading_takes_little_more_than_a_byte_a_base(tmp_path):
    length = 20_000_000
    path = bed(tmp_path, "".join(f"1\t{at}\t{at + 700}\n" for at in range(0, length, 1000)) + f"1\t{length - 9}\t{length}\n")
    np.savez_compressed(tmp_path / "m.npz", accessible=np.ones(length, bool))
    for file in (path, tmp_path / "m.npz"):
        tracemalloc.start()
        mask = read_mask(file)
        whole = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        compute_missing_fraction(mask, window_size=2000, sequence_length=length)
        more = tracemalloc.get_traced_memory()[1] - tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert whole < 1.5 * length
        assert more < 0.2 * length


def test_missing_fraction_is_that_of_a_sum_for_every_base():
    mask = np.random.default_rng(1).random(10_050) < 0.3
    for length in (10_000, 9_950):
        covered = np.concatenate([[0], np.cumsum(mask[:length])])
        left = np.arange(-(-length // 100)) * 100
        for scale, fraction in zip(
            (2, 7), compute_missing_fraction(mask, window_size=100, sequence_length=length, scales=(2, 7)), strict=True
        ):
            right = np.minimum(left + scale * 100, length)
            assert np.array_equal(fraction, (covered[right] - covered[left]) / (right - left))


def test_a_header_that_is_none(tmp_path):
    """numpy takes the header of an array apart as Python."""
    out = io.BytesIO()
    np.save(out, np.zeros(30, dtype=bool))
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr("accessible.npy", out.getvalue().replace(b"(30,)", b"((30,"))
    with pytest.raises(BadRequest, match="cannot be read"):
        read_mask(tmp_path / "m.npz")
