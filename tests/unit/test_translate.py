"""`cxt translate` from a file to tracks: the same whatever the format, region, batch, order or interruption."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc

import msprime
import numpy as np
import pysam
import pytest
import tskit
import tszip
from bio2zarr import vcf as vcf2zarr
from helpers.network import write_random_checkpoint
from helpers.repository import run_python

import cxt
from cxt.commands.translate import main
from cxt.config.network import ModelConfig
from cxt.translation import estimates, job
from cxt.translation.directory import hold_directory

SIZE, WINDOWS = 500, 40
LENGTH = 100_250  # 201 windows, the last of half a width


def save_model(path, *, ranges=None, **changes):
    """A network with random weights, such that its estimates depend on its input and on the position."""
    settings = {
        "layers": 2,
        "heads": 2,
        "width": 16,
        "windows": WINDOWS,
        "samples": 12,
        "scales": 4,
        "bins": 40,
        "window_size": SIZE,
    }
    config = ModelConfig(**settings | {"mask_singletons": False, "reads_rates": True} | changes)
    return write_random_checkpoint(path, config, scales=[2, 4, 8, 16], ranges=ranges)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A directory with a checkpoint and the genotypes of ten diploids as `.trees`, and as arrays."""
    directory = tmp_path_factory.mktemp("translate")
    save_model(directory / "tiny.ckpt")
    ts = msprime.sim_ancestry(10, population_size=1e4, sequence_length=LENGTH, recombination_rate=1e-8, random_seed=1)
    ts = msprime.sim_mutations(ts, rate=1e-7, random_seed=1)
    ts.dump(directory / "genotypes.trees")
    genotypes = ts.genotype_matrix().reshape(ts.num_sites, 10, 2)
    np.savez(
        directory / "genotypes.npz", genotypes=genotypes, positions=ts.sites_position.astype(np.int64), sequence_length=LENGTH
    )
    return directory


def translate(here, out, *, input="genotypes.npz", **settings):
    return cxt.translate(here / input, model=here / "tiny.ckpt", out=out, **{"mutation_rate": 1e-7} | settings)


def arrays(tracks, name="1"):
    return tracks.read(name)


def all_bytes(directory):
    """{path: bytes} of everything below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(here):
    return arrays(translate(here, here / "whole", pairs="within-individual"))


def test_what_is_written(here, whole):
    assert sorted(p.name for p in (here / "whole").iterdir()) == [
        "ne.csv", "summary.json", "tracks.tsv.gz", "tracks.tsv.gz.tbi", "tracks.zarr",
    ]  # fmt: skip
    summary = json.loads((here / "whole/summary.json").read_text())
    assert summary["pairs"] == 10
    assert summary["contigs"]["1"]["windows"] == 201
    assert whole.mean.shape == (10, 201)
    assert np.isfinite(whole.mean).all()
    assert (whole.quantiles[..., 0] < whole.quantiles[..., -1]).all()
    assert whole.end[-1] == LENGTH


@pytest.fixture(scope="module")
def formats(here):
    """Writes the genotypes in all formats."""
    ts = tskit.load(here / "genotypes.trees")
    vcf = here / "genotypes.vcf"
    text = ts.as_vcf(position_transform=lambda x: 1 + np.floor(x))
    vcf.write_text(text.replace(f"length={LENGTH + 1}", f"length={LENGTH}"))  # tskit transforms the length as well
    pysam.tabix_compress(str(vcf), str(here / "plain.vcf.gz"))
    pysam.tabix_compress(str(vcf), str(here / "indexed.vcf.gz"))
    pysam.tabix_index(str(here / "indexed.vcf.gz"), preset="vcf")
    with (
        pysam.VariantFile(str(vcf)) as records,
        pysam.VariantFile(str(here / "genotypes.bcf"), "wb", header=records.header) as out,
    ):
        for record in records:
            out.write(record)
    vcf2zarr.convert([str(here / "indexed.vcf.gz")], str(here / "genotypes.vcz"), worker_processes=0)
    tszip.compress(ts, here / "genotypes.tsz")


FORMATS = (
    "genotypes.trees",
    "genotypes.tsz",
    "genotypes.vcf",
    "plain.vcf.gz",
    "indexed.vcf.gz",
    "genotypes.bcf",
    "genotypes.vcz",
)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_agree(here, whole, formats, name):
    """To the byte; only the summary names the file, its format and what is particular to it."""
    translate(here, here / f"from {name}", input=name, pairs="within-individual")
    files, others = all_bytes(here / "whole"), all_bytes(here / f"from {name}")
    assert files.keys() == others.keys()
    assert {path for path in files if files[path] != others[path]} <= {"summary.json"}


def test_estimates_are_those_of_predict(here, whole):
    """In the middle of the first block, which begins where the contig does."""
    model = cxt.load_model(here / "tiny.ckpt")
    with np.load(here / "genotypes.npz") as data:
        genotypes, positions = data["genotypes"].reshape(-1, 20), data["positions"]
    keep = positions < WINDOWS * SIZE
    panel = translate(here, here / "twelve", samples=[f"tsk_{i}" for i in range(6)], pairs="within-individual")
    posterior = cxt.predict(
        model, genotypes[keep][:, :12], positions[keep], [(2, 3)], sequence_length=WINDOWS * SIZE, mutation_rate=1e-7,
        mask=np.zeros(WINDOWS * SIZE, dtype=bool),
    )  # fmt: skip
    found = arrays(panel)
    assert found.mean[1, :24] == pytest.approx(posterior.log_tmrca[0, :24], abs=1e-5)
    assert found.quantiles[1, :24, 2] == pytest.approx(posterior.quantile(0.5)[0, :24], abs=1e-5)


def test_regions_do_not_change_estimates(here, whole):
    tracks = translate(here, here / "regions", regions=["1:20001-50000", "1:70001-70500"], pairs="within-individual")
    found = arrays(tracks)
    assert found.start.tolist() == [*range(20_000, 50_000, SIZE), 70_000]
    for key in ("mean", "sd", "quantiles"):
        assert np.array_equal(getattr(found, key), getattr(whole, key)[:, [*range(40, 100), 140]])


def test_neither_batch_nor_order_of_pairs_matter(here, whole, tmp_path):
    one = arrays(translate(here, tmp_path / "one", batch_size=1, pairs="within-individual"))
    (tmp_path / "pairs.txt").write_text("".join(f"tsk_{i}/2 tsk_{i}/1\n" for i in (7, 2, 4)))  # in any order
    some = arrays(translate(here, tmp_path / "some", pairs=str(tmp_path / "pairs.txt"), batch_size=5))
    for key in ("mean", "sd", "quantiles"):
        assert np.array_equal(getattr(one, key), getattr(whole, key))
        assert np.array_equal(getattr(some, key), getattr(whole, key)[[2, 4, 7]])


def test_a_wrong_rate_moves_a_track_and_nothing_else(here, tmp_path):
    for number, (settings, model) in enumerate((({}, {}), ({"calibration": "diversity"}, {"reads_rates": False}))):
        save_model(tmp_path / f"{number}.ckpt", **model)
        first, second = (
            arrays(
                cxt.translate(
                    here / "genotypes.npz", model=tmp_path / f"{number}.ckpt", out=tmp_path / f"{number}{rate}",
                    mutation_rate=rate, **settings,
                )
            )
            for rate in (1e-7, 2.5e-7)
        )  # fmt: skip
        assert first.mean - second.mean == pytest.approx(np.log(2.5), abs=1e-5)
        assert first.quantiles - second.quantiles == pytest.approx(np.log(2.5), abs=1e-5)
        assert np.array_equal(first.sd, second.sd)


def test_calibration_implies_the_observed_differences(here, tmp_path):
    translate(here, tmp_path / "x", calibration="diversity")
    contig = json.loads((tmp_path / "x/summary.json").read_text())["contigs"]["1"]
    for key in ("min", "mean", "max"):
        assert contig["implied_differences"][key] == pytest.approx(contig["observed_differences"][key], rel=1e-4)


def test_a_masked_stretch_is_missing(here, whole, tmp_path):
    (tmp_path / "mask.bed").write_text("1\t40000\t55000\n")
    found = translate(here, tmp_path / "masked", mask=tmp_path / "mask.bed", mask_marks="inaccessible")
    masked = arrays(found)
    inside = slice(80, 110)
    assert np.isnan(masked.mean[:, inside]).all()
    assert np.isnan(masked.mean).sum() == 10 * 30
    assert (masked.accessible[inside] == 0).all()
    # With and without variants inside the mask.
    with np.load(here / "genotypes.npz") as data:
        outside = (data["positions"] < 40_000) | (data["positions"] >= 55_000)
        np.savez(
            tmp_path / "without.npz", genotypes=data["genotypes"][outside], positions=data["positions"][outside],
            sequence_length=LENGTH,
        )  # fmt: skip
    without = cxt.translate(
        tmp_path / "without.npz", model=here / "tiny.ckpt", out=tmp_path / "without", mutation_rate=1e-7,
        mask=tmp_path / "mask.bed", mask_marks="inaccessible",
    )  # fmt: skip
    for key in ("mean", "sd", "quantiles"):
        assert np.array_equal(getattr(arrays(without), key), getattr(masked, key), equal_nan=True)
    # Also without a mask, because so long a stretch without variants is none by chance.
    gap = cxt.translate(tmp_path / "without.npz", model=here / "tiny.ckpt", out=tmp_path / "gap", mutation_rate=1e-7)
    assert np.isnan(arrays(gap).mean[:, 81:109]).all()
    every = cxt.translate(
        tmp_path / "without.npz", model=here / "tiny.ckpt", out=tmp_path / "every", mutation_rate=1e-7, max_gap=0
    )
    assert np.isfinite(arrays(every).mean).all()


def test_genotypes_missing_for_one_pair(here, whole, tmp_path):
    """They make its windows missing where all are, and change no other pair by more than the frequencies do."""
    with np.load(here / "genotypes.npz") as data:
        genotypes = data["genotypes"].copy()
        inside = (data["positions"] >= 40_000) & (data["positions"] < 55_000)
        genotypes[inside, 3] = -1
        np.savez(tmp_path / "x.npz", genotypes=genotypes, positions=data["positions"], sequence_length=LENGTH)
    found = arrays(cxt.translate(tmp_path / "x.npz", model=here / "tiny.ckpt", out=tmp_path / "x", mutation_rate=1e-7))
    assert np.isnan(found.mean[3, 80:110]).all()
    assert np.isfinite(np.delete(found.mean, 3, axis=0)).all()
    assert found.called[3] < found.called[2] == 1


def test_panels_are_averaged(here, tmp_path):
    panels = [arrays(translate(here, tmp_path / f"{n}", panels=n)).mean for n in (1, 2, 8)]
    assert not np.array_equal(panels[0], panels[1])
    spread = [np.abs(mean - panels[2]).mean() for mean in panels[:2]]
    assert spread[1] < spread[0]


COMMAND = """
import sys, time
import cxt.translation.job as job
from cxt.commands.translate import main
from cxt.console import exit_on_bad_request
read = job.read_block
def slowly(*args, **kwargs):
    time.sleep(0.1)
    return read(*args, **kwargs)
job.read_block = slowly
exit_on_bad_request(lambda: main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_interrupted_and_resumed(here, tmp_path):
    """Killed and signalled after new blocks were done each time."""
    files = [str(here / "genotypes.npz"), "--model", str(here / "tiny.ckpt"), "--out", str(tmp_path / "x")]
    arguments = [*files, "--mutation-rate", "1e-7", "--flank", "15"]  # 21 blocks
    rng, kills, wanted = np.random.default_rng(1), 0, int(os.environ.get("CXT_RESUME_KILLS", "4"))
    while True:
        before = count_done(tmp_path / "x")
        process = subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while count_done(tmp_path / "x") <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.1))
        number = signal.SIGKILL if kills % 2 else signal.SIGTERM
        if kills < wanted:
            process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode in (0, -number), err
        if process.returncode == 0:
            break
        kills += 1
        assert not (tmp_path / "x/summary.json").exists()
    assert kills == wanted
    translate(here, tmp_path / "whole", flank=15)
    assert all_bytes(tmp_path / "x") == all_bytes(tmp_path / "whole")


def count_done(directory) -> int:
    """Blocks that are done."""
    return len(list(directory.glob(".work/*.npz")))


def test_one_warning_of_each_kind(here, tmp_path, capsys):
    """Their numbers differ from block to block; a chromosome must not give a warning for each."""
    save_model(tmp_path / "narrow.ckpt", ranges={"diversity": [1e-7, 1e-6], "missingness": [0, 0]})
    cxt.translate(here / "genotypes.npz", model=tmp_path / "narrow.ckpt", out=tmp_path / "x", batch_size=3, mutation_rate=1e-7)
    (text, blocks), *others = json.loads((tmp_path / "x/summary.json").read_text())["warnings"].items()
    assert not others
    assert "diversity" in text
    assert blocks == 9
    assert capsys.readouterr().err.count("outside the range") == 2  # when it is met, and at the end


def test_warnings_do_not_depend_on_batches(here, tmp_path):
    """Their numbers are those of all pairs of a block."""
    save_model(tmp_path / "narrow.ckpt", ranges={"diversity": [1e-7, 2e-4], "missingness": [0, 0]})
    found = []
    for size in (1, 3, 8):
        out = tmp_path / f"{size}"
        cxt.translate(here / "genotypes.npz", model=tmp_path / "narrow.ckpt", out=out, batch_size=size, mutation_rate=1e-7)
        found.append((out / "summary.json").read_text())
    assert found[0] == found[1] == found[2]
    (text,) = json.loads(found[0])["warnings"]
    assert re.search(r"diversity [\d.]+ in \d+ of 10 examples", text)


def test_wide_intervals_are_counted(here, whole, capsys):
    """In the summary, against the tracks."""
    found = json.loads((here / "whole/summary.json").read_text())["contigs"]["1"]["wide_intervals"]
    wide = whole.quantiles[..., -1] - whole.quantiles[..., 0] > 5
    assert found["longer_than"] == 5
    assert found["windows"] == wide.sum()
    assert found["share_of_windows"] == pytest.approx(wide.mean())
    assert 0 <= found["share_of_mean_tmrca"] <= 1
    assert (found["share_of_mean_tmrca"] > 0) == (wide.sum() > 0)


def test_memory_does_not_grow_with_panels(here, tmp_path):
    """The input of all pairs and panels of a block would be 4 x 60 x 15 kB."""
    peaks = []
    for panels in (2, 60):
        tracemalloc.start()
        translate(here, tmp_path / f"{panels}", regions="1:1-10000", pairs=4, panels=panels, batch_size=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1e6


def test_bigwig_of_a_contig_that_is_too_long(here, tmp_path, capsys):
    """Refused before the genotypes are read, or as soon as the length is known."""
    np.savez(
        tmp_path / "long.npz",
        genotypes=np.zeros((1, 10, 2), dtype=np.int8),
        positions=np.array([2**32]),
        sequence_length=2**32 + 9,
    )
    common = "--model", here / "tiny.ckpt", "--out", tmp_path / "x", "--bigwig"
    found = refusal(capsys, tmp_path / "long.npz", *common)
    assert "contig 1 has 4,294,967,305 bp, but bigWig files need lengths up to 4,294,967,295 bp; leave out --bigwig" in found
    assert "records" not in found
    assert not (tmp_path / "x").exists()


def refusal(capsys, *arguments):
    """The message with which the command refuses its arguments."""
    from cxt.console import exit_on_bad_request

    with pytest.raises(SystemExit) as caught:
        exit_on_bad_request(lambda: main([str(a) for a in arguments]))
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_bad_input(here, whole, tmp_path, capsys):
    common = ("--model", here / "tiny.ckpt", "--out", tmp_path / "x")
    data = here / "genotypes.npz"
    everything = tmp_path / "everything.bed"
    everything.write_text(f"1\t0\t{LENGTH}\n")
    for arguments, message in (
        ((data, "--model", here / "tiny.ckpt", "--out", here / "whole"), "holds a finished translation"),
        ((data, "--model", here / "tiny.ckpt", "--out", here), "is not empty and holds no translation"),
        ((data, *common, "--mutation-rate", "0"), "mutation_rate must be"),
        ((data, *common, "--generation-time", "25"), "give mutation_rate"),
        ((data, *common, "--calibration", "gamma"), "needs the mutation rate"),
        ((data, *common, "--calibration", "diversty"), "calibration"),
        ((data, *common, "--mask", "x.bed"), "give mask_marks"),
        ((data, *common, "--flank", "20"), "flank must be from 0 to 19 windows"),
        ((data, *common, "--samples", "tsk_1", "tsk_22"), "tsk_22"),
        ((data, *common, "--samples", "tsk_1", "tsk_2"), "reads 12 haplotypes, but contig 1 has 4"),
        ((data, *common, "--regions", "2"), "2"),
        ((data, *common, "--regions", "1:200001-300000"), "1"),
        ((data, *common, "--part", "3"), "--part must be K/N"),
        ((tmp_path / "nothing.vcf", *common), "there is no file"),
        # What is wrong whatever the file holds, before a long file is read.
        ((tmp_path / "nothing.vcf", *common, "--pairs", "whithin"), "did you mean 'within'?"),
        ((tmp_path / "nothing.vcf", *common, "--pairs", "0"), "choose at least one pair"),
        ((tmp_path / "nothing.vcf", *common, "--flank", "20"), "flank must be from 0 to 19 windows"),
        ((tmp_path / "nothing.vcf", *common, "--batch-size", "0"), "batch_size must be a positive whole number"),
        ((data, "--model", here / "tiny.ckpt", "--out", data), "is a file; --out must be a directory"),
        ((data, *common, "--mask", everything, "--mask-marks", "inaccessible"), "does --mask-marks say what"),
        ((data, "--model", "smal", "--out", tmp_path / "x"), "no checkpoint 'smal'"),
        (("--out", tmp_path / "x"), "a file of genotypes must be given"),
    ):
        found = refusal(capsys, *arguments)
        assert message in found, (arguments, found)
        assert "Traceback" not in found
        assert not (tmp_path / "x/summary.json").exists()
        assert not (tmp_path / "x/tracks.zarr").exists()


def test_other_settings_need_force(here, tmp_path):
    out = tmp_path / "x"
    translate(here, out, regions="1:1-20000")
    with pytest.raises(cxt.BadRequest, match="finished translation"):
        translate(here, out, regions="1:1-20000")
    first = arrays(translate(here, out, regions="1:1-20000", seed=1, force=True))
    assert first.mean.shape == (10, 40)


def test_steps_and_parts(here, whole, tmp_path):
    """What the workflow runs as jobs of their own."""
    (tmp_path / "settings.yaml").write_text(
        f"input: {here / 'genotypes.npz'}\nmodel: {here / 'tiny.ckpt'}\nmutation_rate: 1.0e-7\nassume_phased: false\n"
    )
    common = ["-m", "cxt.commands.translate", "--config", "settings.yaml", "--out", "x"]
    run_python(*common, "--step", "read", "--force", cwd=tmp_path)
    failed = run_python(*common, "--step", "finish", cwd=tmp_path, check=False)
    assert failed.returncode == 1
    assert "9 of 9 blocks of x are not translated yet" in failed.stderr
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [".work"]
    for part in ("2/3", "1/3", "3/3"):
        run_python(*common, "--step", "blocks", "--part", part, cwd=tmp_path)
    run_python(*common, "--step", "finish", cwd=tmp_path)
    assert all_bytes(tmp_path / "x") == all_bytes(here / "whole")


def test_a_region_of_an_accessible_contig_is_accessible(here, tmp_path, capsys):
    """What was not read beside the region is no reason for a warning, and a mask is."""
    model = save_model(tmp_path / "reads_no_missing_data.ckpt", mask_singletons=True)
    (tmp_path / "mask.bed").write_text("1\t2000\t6000\n")
    words = [str(here / "genotypes.npz"), "--model", str(model), "--regions", "1:1-10000", "--pairs", "1"]
    main([*words, "--out", str(tmp_path / "x")])
    assert "inaccessible" not in "".join(capsys.readouterr())
    main([*words, "--out", str(tmp_path / "y"), "--mask", str(tmp_path / "mask.bed"), "--mask-marks", "inaccessible"])
    assert "40.0% of the bases are inaccessible" in "".join(capsys.readouterr())


def test_pairs_are_checked_before_there_are_parts(here, tmp_path):
    """The step `read` refuses what the steps after it would refuse."""
    words = ["--input", here / "genotypes.npz", "--model", here / "tiny.ckpt", "--out", tmp_path / "x", "--pairs", "wihtin"]
    done = run_python("-m", "cxt.commands.translate", *words, "--step", "read", check=False)
    assert done.returncode == 2
    assert "did you mean 'within'" in done.stderr
    assert not (tmp_path / "x").exists()


FULL = """
import resource, sys
from cxt.commands.translate import main
from cxt.console import exit_on_bad_request
exit_on_bad_request(lambda: (resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500)), main(sys.argv[1:])))
"""


def test_a_full_disk(here, tmp_path):
    """A limit on the size of files stands for it. Afterwards the translation can be finished."""
    arguments = [here / "genotypes.npz", "--model", here / "tiny.ckpt", "--out", "x", "--mutation-rate", "1e-7"]
    failed = run_python("-c", FULL, *arguments, cwd=tmp_path, check=False)
    assert failed.returncode == 1
    assert "x cannot be written: File too large; make room, and repeat the command" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [".work"]
    translate(here, tmp_path / "x")
    assert (tmp_path / "x/summary.json").is_file()


def test_help_lists_what_a_setting_may_be(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--mask-marks {accessible,inaccessible}" in text
    assert "--calibration {auto,none,diversity,gamma}" in text
    assert "Default: small." in text


def test_regions_beside_a_gap(here, tmp_path):
    (tmp_path / "mask.bed").write_text("1\t40000\t55000\n")
    mask = {"mask": tmp_path / "mask.bed", "mask_marks": "inaccessible"}
    whole = arrays(translate(here, tmp_path / "whole", **mask))
    for number, (low, high) in enumerate(((55_000, 70_000), (36_000, 39_000), (50_000, 60_000))):
        part = arrays(translate(here, tmp_path / f"{number}", regions=f"1:{low + 1:,}-{high:,}", **mask))
        assert np.array_equal(part.mean, whole.mean[:, low // SIZE : high // SIZE], equal_nan=True)


def test_a_haplotype_that_is_never_called(here, tmp_path):
    with np.load(here / "genotypes.npz") as data:
        genotypes, positions = data["genotypes"].copy(), data["positions"]
    genotypes[:, 3, 1] = -1
    sparse = (positions // 5000) % 3 != 1  # windows without sites
    np.savez(tmp_path / "x.npz", genotypes=genotypes[sparse], positions=positions[sparse], sequence_length=LENGTH)
    found = arrays(cxt.translate(tmp_path / "x.npz", model=here / "tiny.ckpt", out=tmp_path / "x", max_gap=0))
    assert found.called[3] == 0
    assert np.isnan(found.mean[3]).all()
    assert np.isfinite(np.delete(found.mean, 3, axis=0)).all()


def test_unknown_ancestral_alleles_lower_the_mutation_rate(here, tmp_path, formats):
    """As those sites are not there: at a rate that is lower by their share, the others give the same track."""
    lines = (here / "genotypes.vcf").read_text().splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("#CHROM"))
    info = '##INFO=<ID=AA,Number=1,Type=String,Description="Ancestral allele">'
    known, total, polarised, others = 0, 0, [*lines[:first], info, lines[first]], lines[: first + 1]
    for k, line in enumerate(lines[first + 1 :]):
        fields = line.split("\t")
        if len(fields[4]) > 1 or len(set("".join(field.replace("|", "") for field in fields[9:]))) == 1:
            continue
        total += 1
        fields[7] = f"AA={fields[3] if k % 4 else '.'}"
        polarised.append("\t".join(fields))
        if k % 4:
            known += 1
            others.append(line)
    (tmp_path / "aa.vcf").write_text("\n".join(polarised) + "\n")
    (tmp_path / "others.vcf").write_text("\n".join(others) + "\n")
    model = here / "tiny.ckpt"
    first_track = arrays(cxt.translate(tmp_path / "aa.vcf", model=model, out=tmp_path / "aa", mutation_rate=1e-7))
    second = cxt.translate(tmp_path / "others.vcf", model=model, out=tmp_path / "others", mutation_rate=1e-7 * known / total)
    assert first_track.mean == pytest.approx(arrays(second).mean, abs=1e-5)


def test_a_directory_in_use_or_of_something_else(here, tmp_path):
    out = tmp_path / "x"
    with hold_directory(out, "another request", force=False, lock=True) as work:
        (work / "0-0-0.npz").write_bytes(b"")
        files = here / "genotypes.npz", "--model", here / "tiny.ckpt", "--out", out, "--force"
        refused = run_python("-m", "cxt.commands.translate", *files, check=False)
        assert "is in use by process" in refused.stderr
        assert (work / "0-0-0.npz").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/summary.json").write_text("{}")
    with pytest.raises(cxt.BadRequest, match="holds no translation"):
        translate(here, tmp_path / "mine", force=True)
    assert (tmp_path / "mine/summary.json").read_text() == "{}"


@pytest.fixture
def calls(monkeypatch):
    """Numbers of the first windows of the blocks that are read, not taken from others like them."""
    first = []
    read = job.read_block

    def read_block(*args, **settings):
        first.append(args[3].first)
        return read(*args, **settings)

    monkeypatch.setattr(job, "read_block", read_block)
    return first


def test_blocks_without_sites(here, tmp_path, calls, monkeypatch):
    """They are read once; the output is that of reading each."""
    long = 30 * LENGTH
    (tmp_path / "mask.bed").write_text(f"1\t{10 * LENGTH}\t{10 * LENGTH + 333}\n")
    with np.load(here / "genotypes.npz") as data:
        np.savez(tmp_path / "x.npz", genotypes=data["genotypes"], positions=data["positions"] + LENGTH, sequence_length=long)
    settings = {"model": here / "tiny.ckpt", "max_gap": 0, "mask": tmp_path / "mask.bed", "mask_marks": "inaccessible"}
    cxt.translate(tmp_path / "x.npz", out=tmp_path / "once", **settings)
    once = len(calls)
    del calls[:]
    monkeypatch.setattr(job, "identify_empty", lambda *_, **__: None)
    cxt.translate(tmp_path / "x.npz", out=tmp_path / "each", **settings)
    assert len(calls) == 251
    assert once < 20
    assert all_bytes(tmp_path / "once") == all_bytes(tmp_path / "each")


def test_pairs_without_data_need_no_network(here, tmp_path, monkeypatch):
    with np.load(here / "genotypes.npz") as data:
        genotypes = data["genotypes"].copy()
        genotypes[:, 3, 1] = -1
        np.savez(tmp_path / "x.npz", genotypes=genotypes, positions=data["positions"], sequence_length=LENGTH)
    (tmp_path / "pairs").write_text("tsk_3/1 tsk_3/2\ntsk_1/1 tsk_1/2\n")
    settings = {"model": here / "tiny.ckpt", "pairs": str(tmp_path / "pairs"), "mutation_rate": 1e-7, "batch_size": 1}
    read = []
    build = estimates.build_reader

    def count(*args, **settings):
        reader = build(*args, **settings)
        return lambda x, *others: read.append(len(x)) or reader(x, *others)

    monkeypatch.setattr(estimates, "build_reader", count)
    tracks = arrays(cxt.translate(tmp_path / "x.npz", out=tmp_path / "x", **settings))
    assert read == [1] * 9  # of the other pair
    assert np.isnan(tracks.mean[1]).all()
    assert np.isfinite(tracks.mean[0]).all()


def test_a_damaged_block(here, whole, tmp_path, capsys):
    """Cut off by a crash of the machine: made again. With other bytes: one message."""
    settings = {"pairs": "within-individual"}
    words = ["--model", here / "tiny.ckpt", "--mutation-rate", "1e-7", "--out", tmp_path / "x"]
    command = [str(word) for word in (here / "genotypes.npz", *words)]
    main([*command, "--step", "read"])
    main([*command, "--step", "blocks"])
    first, second, third, *_ = sorted((tmp_path / "x/.work").glob("*.npz"))
    data = third.read_bytes()
    first.write_bytes(first.read_bytes()[:-100])
    second.write_bytes(b"")
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 255
    third.write_bytes(damaged)
    capsys.readouterr()
    with pytest.raises(cxt.Failed, match=f"{third.name}, a part of this translation, is missing or damaged .*; delete it"):
        translate(here, tmp_path / "x", **settings)
    assert capsys.readouterr().err.count("is damaged: that block is translated again") == 2
    third.unlink()
    translate(here, tmp_path / "x", **settings)
    assert all_bytes(tmp_path / "x") == all_bytes(here / "whole")


def test_a_region_of_a_contig_of_unknown_length(here, whole, tmp_path, formats, capsys):
    """Its end is a limit that the user knows; without an end, the contig ends with the last record."""
    text = (here / "genotypes.vcf").read_text().replace(f",length={LENGTH}", "")
    (tmp_path / "x.vcf").write_text(text)
    pysam.tabix_compress(str(tmp_path / "x.vcf"), str(tmp_path / "y.vcf.gz"))
    pysam.tabix_index(str(tmp_path / "y.vcf.gz"), preset="vcf")
    last = max(int(line.split("\t")[1]) for line in text.splitlines() if line[0] != "#")
    for name in ("x.vcf", "y.vcf.gz"):
        settings = {"model": here / "tiny.ckpt", "mutation_rate": 1e-7}
        part = cxt.translate(tmp_path / name, out=tmp_path / f"part {name}", regions="1:20001-50000", **settings)
        assert arrays(part).start.tolist() == list(range(20_000, 50_000, SIZE))
        assert np.array_equal(arrays(part).mean, whole.mean[:, 40:100])
        rest = cxt.translate(tmp_path / name, out=tmp_path / f"rest {name}", regions="1:60001-", **settings)
        assert rest.contigs[0].length == arrays(rest).end[-1] == last
        full = cxt.translate(tmp_path / name, out=tmp_path / f"full {name}", regions=f"1:60001-{LENGTH}", **settings)
        assert full.contigs[0].length == arrays(full).end[-1] == LENGTH
        assert np.array_equal(arrays(full).mean, whole.mean[:, 120:])
        words = (tmp_path / name, "--model", here / "tiny.ckpt", "--out", tmp_path / "none")
        message = refusal(capsys, *words, "--regions", f"1:{last + 1}-")
        assert "begins past the end of contig 1: the file does not say how long it is, and it is taken to end" in message
        assert "there are no records in" in refusal(capsys, *words, "--regions", "1:500001-600000")
        assert not (tmp_path / "none").exists()


def test_order_of_contigs_and_masks(here, tmp_path, formats, capsys):
    """Several regions of a file whose records are not in the order of its header: the same bytes with an index and without."""
    lines = (here / "genotypes.vcf").read_text().splitlines()
    header = [line for line in lines if line[0] == "#"]
    place = next(k for k, line in enumerate(header) if line.startswith("##contig"))
    header[place : place + 1] = [f"##contig=<ID={name},length={LENGTH}>" for name in ("b", "a", "empty")]
    records = [line[1:] for line in lines if line[0] != "#"]
    text = "\n".join([*header, *(f"{name}{line}" for name in "ab" for line in records)]) + "\n"
    (tmp_path / "x.vcf").write_text(text)
    pysam.tabix_compress(str(tmp_path / "x.vcf"), str(tmp_path / "y.vcf.gz"))
    pysam.tabix_index(str(tmp_path / "y.vcf.gz"), preset="vcf")
    (tmp_path / "mask.bed").write_text("a\t40000\t55000\n")
    settings = {"model": here / "tiny.ckpt", "mutation_rate": 1e-7, "mask": tmp_path / "mask.bed"}
    results = []
    for name in ("x.vcf", "y.vcf.gz"):
        out = tmp_path / f"out {name}"
        regions = ["a:1-60000", "b:30001-60000"]
        tracks = cxt.translate(tmp_path / name, out=out, regions=regions, mask_marks="inaccessible", **settings)
        assert [contig.name for contig in tracks.contigs] == ["b", "a"]
        assert np.isnan(tracks.read("a").mean).sum() == 10 * 30
        assert np.isfinite(tracks.read("b").mean).all()  # not named by the mask
        summary = json.loads((out / "summary.json").read_text())
        outside = summary["read"]["total"].pop("outside")
        assert (outside is None) == (name == "y.vcf.gz")
        for counts in summary["read"]["counts"].values():
            counts.pop("outside")
        (rule,) = summary["contigs"]["a"]["gap_rules"]
        assert (rule["start"], rule["end"]) == (0, 80_000)
        assert rule["spacing"] < 100
        files = {path: data for path, data in all_bytes(out).items() if path != "summary.json"}
        results.append((files, {key: value for key, value in summary.items() if key != "input"}))
    assert results[0] == results[1]
    assert "has no intervals on b: as its intervals mark what is inaccessible" in capsys.readouterr().out
    # Of accessible intervals, what the mask does not name is inaccessible.
    (tmp_path / "mask.bed").write_text(f"a\t0\t{LENGTH}\n")
    tracks = cxt.translate(tmp_path / "x.vcf", out=tmp_path / "accessible", mask_marks="accessible", **settings)
    assert [contig.name for contig in tracks.contigs] == ["a"]
    assert "has no intervals on b, empty: as its intervals mark what is accessible" in capsys.readouterr().err
