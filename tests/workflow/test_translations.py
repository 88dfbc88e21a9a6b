"""Translations in the workflow: what they make, what is made again after which change, and what is refused."""

import gzip
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.repository import TINY, copy_with_raised_version, run_python, snakemake
from helpers.simulations import simulate

import cxt

FIGURES = ["distribution.png", "ne.png", "pairs.png", "tracks.png"]
FILES = sorted(["ne.csv", "summary.json", "tracks.tsv.gz", "tracks.tsv.gz.tbi", "tracks.zarr", *FIGURES])
BATCH = "results/simulations/constant/0.trees.batch"
RATES = {"mutation_rate": 2e-8, "recombination_rate": 1e-8}
ENTRIES = {
    "mine": {"input": BATCH, "model": "broad_w200", "pairs": 3, "generation_time": 25, "parts": 2, **RATES},
    "vcf": {
        "input": "genotypes/my.vcf", "model": "copied.ckpt", "regions": ["1:1-5000"], "samples": "names.txt", "pairs": 2,
        "mask": "mask.bed", "mask_marks": "inaccessible", "bigwig": True, **RATES,
    },
    "shipped": {"input": BATCH, "model": "small", "pairs": 1},
}  # fmt: skip
"""By a model of the configuration, by a file beside the configuration, and by a checkpoint that comes with cxt."""

TARGETS = [f"results/translate/{name}/{file}" for name in ENTRIES for file in ("summary.json", "tracks.tsv.gz", "tracks.png")]
JOBS = {"translate_read": 1, "translate_blocks": 1, "translate": 1, "translation_figures": 1}
JOBS_OF_MINE = JOBS | {"translate_blocks": 2}


def write_overlay(path: Path, entries: dict, **sections) -> Path:
    """tests/tiny.yaml with translations, and other sections changed key by key, in a file."""
    from cxt.config.file import merge

    path.write_text(yaml.safe_dump(merge(yaml.safe_load(TINY.read_text()), {"translate": entries, **sections})))
    return path


def changed(**changes) -> dict:
    """The entries, of which *mine* has *changes*."""
    return ENTRIES | {"mine": ENTRIES["mine"] | changes}


def planned(directory, *targets, **kwargs) -> dict[str, int]:
    """{rule: jobs} of a dry run, without those that write settings."""
    done = snakemake("-n", *(targets or TARGETS), cwd=directory, **kwargs)
    text = done.stdout + done.stderr
    if "Nothing to be done" in text:
        return {}
    table = text.split("Job stats:")[1].split("total")[0]
    jobs = {rule: int(count) for rule, count in re.findall(r"^(\S+)\s+(\d+)$", table, flags=re.M)}
    jobs.pop("settings", None)
    return jobs


@pytest.fixture(scope="module")
def translated(workflow, tmp_path_factory) -> Path:
    """The finished tiny workflow with all translations; the configuration, and what it names, are in a directory beside it."""
    directory = tmp_path_factory.mktemp("translated")
    shutil.copytree(workflow, directory / "w", symlinks=True)
    user = directory / "user"
    (user / "genotypes").mkdir(parents=True)
    ts = simulate(seed=3, individuals=30, length=6000, rate=2e-7)
    with open(user / "genotypes/my.vcf", "w") as file:
        ts.write_vcf(file, position_transform=lambda x: [1 + int(p) for p in x])
    (user / "names.txt").write_text("".join(f"tsk_{i}\n" for i in range(25)))
    (user / "mask.bed").write_text("1\t2000\t2600\n")
    shutil.copy(directory / "w/results/broad_w200.ckpt", user / "copied.ckpt")
    write_overlay(user / "user.yaml", ENTRIES)
    snakemake(*TARGETS, "--show-failed-logs", cwd=directory / "w", configfile=user / "user.yaml")
    return directory


@pytest.fixture
def copy(translated, tmp_path) -> Path:
    """Translations to change; the user's files stay where they are."""
    return shutil.copytree(translated / "w", tmp_path / "w", symlinks=True)


def test_what_is_made(translated):
    for name, entry in ENTRIES.items():
        directory = translated / "w/results/translate" / name
        assert sorted(path.name for path in directory.iterdir()) == sorted(FILES + (["bigwig"] if "bigwig" in entry else []))
        summary = json.loads((directory / "summary.json").read_text())
        tracks = cxt.Tracks(directory)
        assert summary["pairs"] == entry["pairs"] == len(tracks.pair_names)
        for figure in FIGURES:
            assert (directory / figure).read_bytes().startswith(b"\x89PNG")
    assert not (translated / "w/results/translation_steps").exists()
    mine = cxt.Tracks(translated / "w/results/translate/mine").read("1")
    assert mine.mean.shape == (3, 100)
    table = gzip.decompress((translated / "w/results/translate/mine/tracks.tsv.gz").read_bytes()).decode()
    assert "\ttmrca_years\t" in table
    assert table.count("\n") == 9 + 3 * 100


def test_the_users_files(translated):
    """Paths are relative to the configuration; the region, the samples and the mask are those that it names."""
    tracks = cxt.Tracks(translated / "w/results/translate/vcf")
    contig = tracks.read("1")
    assert contig.end[-1] == 5000
    assert (contig.accessible[10:13] == 0).all()
    assert contig.accessible[:10].min() == 1
    assert {int(name.split("/")[0].removeprefix("tsk_")) for pair in tracks.pair_names for name in pair} <= set(range(25))
    summary = json.loads((translated / "w/results/translate/vcf/summary.json").read_text())
    assert summary["model"] == "copied"
    assert Path(summary["input"]) == translated / "user/genotypes/my.vcf"
    assert len(list((translated / "w/results/translate/vcf/bigwig").glob("*.bw"))) == 2


def test_by_hand(translated, tmp_path):
    """`cxt translate` with the same settings writes the same table, to the byte."""
    flags = [
        word for key, value in ENTRIES["mine"].items() if key not in ("input", "parts", "model")
        for word in (f"--{key.replace('_', '-')}", value)
    ]  # fmt: skip
    run_python("-m", "cxt", "translate", BATCH, *flags, "--model", "broad_w200", "--out", tmp_path / "x", cwd=translated / "w")
    for name in ("tracks.tsv.gz", "tracks.tsv.gz.tbi", "ne.csv"):
        assert (tmp_path / "x" / name).read_bytes() == (translated / "w/results/translate/mine" / name).read_bytes(), name
    arrays = sorted((tmp_path / "x/tracks.zarr").rglob("c/**/*"))
    assert arrays
    for path in arrays:
        if path.is_file():
            other = translated / "w/results/translate/mine" / path.relative_to(tmp_path / "x")
            assert path.read_bytes() == other.read_bytes()


def test_nothing_is_made_again(translated):
    assert planned(translated / "w", configfile=translated / "user/user.yaml") == {}


def test_a_gpu_starts_no_job(translated):
    config = write_overlay(translated / "user/neutral.yaml", changed(devices=1))
    assert planned(translated / "w", configfile=config) == {}


@pytest.mark.parametrize("change", [{"seed": 1}, {"regions": ["1:1-10000"]}, {"bigwig": True}], ids=str)
def test_changed_settings(translated, change):
    config = write_overlay(translated / "user/changed.yaml", changed(**change))
    assert planned(translated / "w", configfile=config) == JOBS_OF_MINE


def test_another_checkpoint(translated):
    """Training with other settings is followed by the translation with that model, and by no other."""
    config = write_overlay(
        translated / "user/trained.yaml", ENTRIES, models={"broad_w200": {"training": {"lr": 2e-4, "min_lr": 1e-5}}}
    )
    assert planned(translated / "w", configfile=config) == JOBS_OF_MINE | {"train": 1}


def test_a_stage_version(translated, tmp_path):
    repository = copy_with_raised_version("translate", tmp_path / "repository")
    jobs = planned(translated / "w", configfile=translated / "user/user.yaml", repository=repository)
    assert jobs == dict.fromkeys(JOBS, 3) | {"translate_blocks": 4}


def test_changed_files(translated, copy):
    """A mask with other content, and a deleted figure."""
    mask = translated / "user/mask.bed"
    before = mask.stat().st_mtime_ns, mask.read_bytes()
    mask.write_text("1\t2000\t2800\n")
    try:
        (copy / "results/translate/shipped/ne.png").unlink()
        targets = [*TARGETS, "results/translate/shipped/ne.png"]
        jobs = planned(copy, *targets, configfile=translated / "user/user.yaml")
        assert jobs == JOBS | {"translation_figures": 2}
    finally:
        mask.write_bytes(before[1])
        os.utime(mask, ns=(before[0], before[0]))


def test_a_lost_output_and_an_accident_at_the_end(translated, copy):
    """What is lost is made again; a last step that fails, or dies while it cleans up, is repaired by the next run."""
    config = translated / "user/user.yaml"
    directory = copy / "results/translate/mine"
    expected = {
        name: (directory / name).read_bytes() for name in ("tracks.tsv.gz", "tracks.tsv.gz.tbi", "ne.csv", "summary.json")
    }
    (directory / "tracks.tsv.gz").unlink()
    assert planned(copy, configfile=config) == JOBS_OF_MINE
    blocked = directory / ".tracks.tsv.gz.part"
    blocked.mkdir()
    failed = snakemake(*TARGETS, cwd=copy, configfile=config, check=False)
    assert failed.returncode == 1
    assert not (directory / "summary.json").exists()
    blocked.rmdir()
    assert planned(copy, configfile=config) == {"translate": 1, "translation_figures": 1}
    work = directory / ".work"
    (work / "request.json").unlink()
    next(work.glob("*.npz")).unlink()
    snakemake(*TARGETS, cwd=copy, configfile=config)
    assert {name: (directory / name).read_bytes() for name in expected} == expected
    assert not work.exists()
    assert planned(copy, configfile=config) == {}


REFUSED = {
    "model": (changed(model="broad_w20"), "'broad_w20' is no model of this configuration; did you mean 'broad_w200'?"),
    "checkpoint": (changed(model="other/there.ckpt"), "there is no checkpoint"),
    "file": (changed(input="there.vcf.gz"), "translate.mine: there is no file"),
    "variant": (
        changed(input="results/simulations/constent/0.trees.batch"),
        "translate.mine.input: unknown variant 'constent'; did you mean 'constant'?",
    ),
    "batch": (
        changed(input="results/simulations/constant/5.trees.batch"),
        "translate.mine.input: no simulation batch of 'constant' begins at 5; choose from 0, 10",
    ),
    "key": (changed(mutation_rates=1e-8), "mutation_rate"),
    "pairs": (changed(pairs="withn"), "translate.mine.pairs: 'withn' is no file; did you mean 'within'?"),
    "ancestral": (changed(ancestral="AA"), "translate.mine.ancestral: 'AA' is no file"),
    "mask": (changed(mask="mask.bed"), "give mask_marks, too"),
    "replicates": (changed(replicates=4), "in one pass, which samples no tracks, but replicates is 4; leave replicates out"),
}  # fmt: skip
"""{case: entries, and what the message says}."""


@pytest.mark.parametrize("case", REFUSED)
def test_refused_entries(tmp_path, case):
    entries, message = REFUSED[case]
    (tmp_path / "mask.bed").write_text("1\t0\t100\n")
    only = {"mine": entries["mine"]}
    config = write_overlay(tmp_path / "x.yaml", only)
    done = snakemake("-n", "results/translate/mine/summary.json", cwd=tmp_path, configfile=config, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(re.findall(r"^cxt: ", done.stderr, flags=re.M)) == 1
    assert not (tmp_path / "results").exists()


def test_an_unknown_translation(tmp_path):
    config = write_overlay(tmp_path / "x.yaml", {"mine": ENTRIES["mine"]})
    done = snakemake("-n", "results/translate/mien/summary.json", cwd=tmp_path, configfile=config, check=False)
    assert done.returncode == 2
    assert "unknown translation 'mien'; did you mean 'mine'?" in done.stderr


def test_a_storage_is_refused(tmp_path):
    pytest.importorskip("snakemake_storage_plugin_fs", reason="of the extra `storage`")
    config = write_overlay(tmp_path / "x.yaml", {"mine": ENTRIES["mine"]})
    stored = ["--default-storage-provider", "fs", "--default-storage-prefix", tmp_path / "stored"]
    done = snakemake("-n", "results/translate/mine/summary.json", *stored, cwd=tmp_path, configfile=config, check=False)
    assert done.returncode == 2
    assert "results in a storage cannot be translated" in done.stderr
