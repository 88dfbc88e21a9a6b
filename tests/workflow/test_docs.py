"""Every code block of README and docs, run: Python as it is, commands at a smaller size or as a dry run."""

import re
import shlex
import shutil
import tomllib
from functools import cache
from typing import NamedTuple

import msprime
import numpy as np
import pysam
import pytest
import yaml
from helpers.published import write_published
from helpers.repository import GOLDEN, REPOSITORY, TINY, run_python
from helpers.simulations import build_dataset, constant_scenario, maps_taken_as_present, simulate
from helpers.tree_files import write_own_trees

from cxt.checkpoints.parents import read_parent_file
from cxt.cli import COMMANDS
from cxt.config.file import load
from cxt.config.models import build_network_config
from cxt.config.network import ModelConfig
from cxt.data.manifest import read_manifest
from cxt.trainer.options import build_parser, parse_flags, read_options

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


class Block(NamedTuple):
    """A fenced code block: its page, its language and its text, without the indentation of a list."""

    page: str
    language: str
    text: str


@cache
def blocks() -> list[Block]:
    """All code blocks of all pages."""
    found = []
    for page in PAGES:
        for indent, language, text in re.findall(r"^( *)```(\w+)\n(.*?)^ *```", page.read_text(), flags=re.M | re.S):
            lines = [line.removeprefix(indent) for line in text.splitlines()]
            found.append(Block(str(page.relative_to(REPOSITORY)), language, "\n".join(lines) + "\n"))
    return found


def commands() -> dict[str, str]:
    """{command: the first page that has it}, comments removed and continued lines joined."""
    found: dict[str, str] = {}
    for block in blocks():
        if block.language == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    found.setdefault(shlex.join(words), block.page)
    return found


def commands_of(*start: str) -> list[list[str]]:
    """The arguments of Python of all commands that begin with these words."""
    found = [shlex.split(command) for command in commands()]
    return [["-m", *words] if words[0] == "cxt" else words[1:] for words in found if words[: len(start)] == list(start)]


def test_blocks_are_of_languages_that_are_run():
    # test_module.py runs those of Snakemake.
    assert {block.language for block in blocks()} == {"sh", "python", "yaml", "text", "snakemake"}


@pytest.fixture(scope="module")
def here(workflow, tmp_path_factory):
    """The finished tiny workflow, with the files that the pages take as given: a sample as genotypes and as a tree sequence."""
    directory = shutil.copytree(workflow, tmp_path_factory.mktemp("docs") / "here", symlinks=True)
    ts = simulate(seed=3, individuals=25, length=400_000, rate=2e-8, discrete=False)
    ts.dump(directory / "sample.trees")
    np.savez(directory / "genotypes.npz", genotypes=ts.genotype_matrix(), positions=ts.sites_position + 5_000_000)
    write_genomes(directory)
    for number in range(3):  # the repeats of the pages
        shutil.copy(directory / "results" / "broad.ckpt", directory / "results" / f"mine.r{number}.ckpt")
    # `tracks` of the pages: what their first command makes, of the short contig.
    run_python(*commands_of("cxt", "translate")[0], "--regions", "chr1", "--threads", 1, cwd=directory)
    return directory


CONTIGS = {"chr1": (150_000, 150_000), "chr2": (3_000_000, 1_100_000)}
"""{contig of my.vcf.gz: (length, where its last record is at most)}; the pages read chr2 beyond its first million."""


def write_genomes(directory) -> None:
    """What the pages call my.vcf.gz, of thirty individuals, and the files beside it."""
    samples = ["NA12878", "NA12891", *(f"HG{number:05d}" for number in range(96, 124))]
    header = ["##fileformat=VCFv4.2", '##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">']
    header += [f"##contig=<ID={name},length={length}>" for name, (length, _) in CONTIGS.items()]
    lines = [*header, "\t".join(["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", *samples])]
    for seed, (name, (_, end)) in enumerate(CONTIGS.items(), 1):
        demography = msprime.Demography.island_model([5e3, 5e3], 1e-4)
        ts = msprime.sim_ancestry(
            {0: 15, 1: 15}, demography=demography, sequence_length=end, recombination_rate=1e-8, random_seed=seed
        )
        ts = msprime.sim_mutations(ts, rate=1.25e-8, random_seed=seed, model="binary")
        for site in ts.variants():
            calls = [f"{a}|{b}" for a, b in site.genotypes.reshape(-1, 2)]
            lines.append("\t".join([name, str(int(site.site.position) + 1), ".", "A", "C", ".", "PASS", ".", "GT", *calls]))
    (directory / "my.vcf").write_text("\n".join(lines) + "\n")
    pysam.tabix_index(str(directory / "my.vcf"), preset="vcf", force=True)
    populations = [f"{name}\t{'one' if number < 15 else 'two'}\n" for number, name in enumerate(samples)]
    (directory / "populations.tsv").write_text("sample\tpopulation\n" + "".join(populations))
    (directory / "unrelated.txt").write_text("".join(f"{name}\n" for name in samples[:25]))
    (directory / "pairs.tsv").write_text("NA12878\tNA12891\n")
    with pysam.BGZFile(str(directory / "accessible.bed.gz"), "w") as file:
        for name, (_, end) in CONTIGS.items():
            file.write("".join(f"{name}\t{at}\t{at + 9000}\n" for at in range(0, end, 10_000)).encode())


PYTHON = [block for block in blocks() if block.language == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=[f"{block.page}-{i}" for i, block in enumerate(PYTHON)])
def test_python(block, here):
    if 'device="cuda"' in block.text:
        pytest.skip("needs a GPU")
    run_python("-c", block.text, cwd=here, env={"CXT_CHECKPOINT_CACHE": "", "MPLBACKEND": "agg"})


def test_yaml_is_a_configuration(tmp_path):
    found = [block for block in blocks() if block.language == "yaml" and not block.text.startswith("method:")]
    assert len({block.text for block in found}) >= 2
    for block in found:
        (tmp_path / "mine.yaml").write_text(block.text)
        write_published(tmp_path / PUBLISHED, STAND_IN)
        config = load([tmp_path / "mine.yaml"], read_parent=read_parent_file)
        assert set(yaml.safe_load(block.text).get("models", {})) <= {*config["models"], *config.get("repeated", {})}


PUBLISHED = "broad_epoch=1-step=5280.ckpt"
"""The published file of the pages, for which a small one stands."""

STAND_IN = ModelConfig(layers=2, heads=2, width=80)


def test_example_of_a_published_file(tmp_path):
    shutil.copy(REPOSITORY / "config" / "examples" / "published.yaml", tmp_path)
    write_published(tmp_path / PUBLISHED, STAND_IN)
    config = load([tmp_path / "published.yaml"], read_parent=read_parent_file)
    (block,) = [block for block in blocks() if block.language == "yaml" and PUBLISHED in block.text]
    written = yaml.safe_load((tmp_path / "published.yaml").read_text(encoding="utf-8"))
    assert written == yaml.safe_load(block.text)
    assert build_network_config(config, "my_cattle").layers == 2


@pytest.mark.long
def test_sweep(here, tmp_path):
    """Two trials, and the best one once more."""
    (block,) = [block for block in blocks() if block.language == "yaml" and block.text.startswith("method:")]
    (here / "sweep.yaml").write_text(block.text)
    (words,) = commands_of("cxt", "sweep")
    run_python(*words, "--count", 2, "--batch-size", 4, "--threads", 1, cwd=here)
    (words,) = [words for words in commands_of("python", "-m", "cxt.train") if "sweep/best.yaml" in words]
    run_python(*words, cwd=here)
    assert (here / "best.ckpt").is_file()


CONTAINERS = ("docker", "podman", "apptainer")


def test_commands_are_known():
    """Each begins like one of those that the tests below, or the gate, run."""
    makefile = (REPOSITORY / "Makefile").read_text()
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in commands():
        words = shlex.split(command)
        if re.match("[A-Z_]+=", words[0]) and words[1] != "make":
            words = words[1:]
        if words[0] in ("CORES=8", "make"):
            assert re.search(rf"^{words[-1]}:", makefile, flags=re.M), command
        elif words[:2] == ["pip", "install"]:
            for extra in re.findall(r"\[(.*)\]", words[-1]):
                assert set(extra.split(",")) <= set(extras), command
        elif words[0] == "cxt":
            assert words[1] in COMMANDS, command
        elif words[0] == "python":
            assert words[1:3] == ["-m", "cxt.train"] or (REPOSITORY / words[1]).is_file(), command
        elif words[0] in CONTAINERS:
            files = [word for word in words if word.startswith("envs/")]
            assert files or "snakemake" in words, command
            assert all((REPOSITORY / name).is_file() for name in files), command
        else:
            assert words[0] in ("snakemake", ".", "srun", "git", "tabix"), command


def dry_runs() -> list[str]:
    """Commands of Snakemake that plan something; test_storage.py runs those with a storage provider."""
    skipped = ("--unlock", "--default-storage-provider", "--software-deployment-method")  # conda and Apptainer are not here
    return [
        command for command in commands() if command.startswith("snakemake") and not any(word in command for word in skipped)
    ]


@pytest.mark.parametrize(
    "command", [command for command in commands() if command.startswith(CONTAINERS) and " snakemake " in command]
)
def test_commands_in_containers_are_planned(command, tmp_path):
    """Outside, with another directory in place of the one that is mounted."""
    words = command.partition(" snakemake ")[2].replace("/work", str(tmp_path)).replace(f"{tmp_path}flow", "workflow").split()
    (tmp_path / "mine.yaml").write_text(next(block.text for block in blocks() if "my_cattle" in block.text))
    done = run_python("-m", "snakemake", "-n", *words, cwd=REPOSITORY)
    assert "This was a dry-run" in done.stdout + done.stderr


@pytest.mark.parametrize("command", [command for command in dry_runs() if "paper.yaml" not in command])
def test_workflow_commands_are_planned(command, tmp_path):
    page = commands()[command]
    named = [name for name in re.findall(r"--configfile (\S+)", page_text(page)) if not name.startswith("config/")]
    names = list(dict.fromkeys(named))
    overlays = [block.text for block in blocks() if block.language == "yaml" and block.page == page]
    if len(names) != len(overlays):  # several stand for one file
        names = names[:1] * len(overlays)
    for name, text in zip(names, overlays, strict=False):
        (tmp_path / name).write_text(text)
    shutil.copytree(REPOSITORY / "config", tmp_path / "config")
    write_published(tmp_path / PUBLISHED, STAND_IN)
    write_own_trees(tmp_path)
    words = shlex.split(command)[1:]
    at = ["-s", REPOSITORY / "Snakefile", "--directory", tmp_path]
    done = run_python("-m", "snakemake", *at, *({"-n"} - set(words)), *words, cwd=tmp_path)
    assert "This was a dry-run" in done.stdout + done.stderr


def page_text(page: str) -> str:
    """The shell blocks of a page that name an overlay of the reader's own."""
    return "\n".join(block.text for block in blocks() if block.page == page and block.language == "sh")


@pytest.mark.long
@pytest.mark.parametrize("command", [command for command in dry_runs() if "paper.yaml" in command])
def test_paper_commands_are_planned(command, tmp_path):
    environment = {"STDPOPSIM_CACHE": str(maps_taken_as_present(tmp_path / "cache"))}
    words = [str(tmp_path) if word == "runs/paper" else word for word in shlex.split(command)[1:]]
    done = run_python("-m", "snakemake", "-n", *words, cwd=REPOSITORY, env=environment)
    assert "output: results/broad_w200.ckpt" in done.stdout + done.stderr


def test_plans(tmp_path):
    found = [words for words in commands_of("cxt", "plan") if "--calibrate" not in words]
    assert len(found) == 2
    outputs = []
    for words in found:
        out = run_python(*(REPOSITORY / word if word.endswith(".yaml") else word for word in words), cwd=tmp_path)
        assert "Total:" in out.stdout
        outputs.append(out.stdout)
    (shown,) = (block for block in blocks() if block.page == "docs/howto/scale.md" and block.language == "text")
    assert any(shown.text.strip() in output for output in outputs)


@pytest.mark.long
def test_calibration(tmp_path):
    (words,) = [words for words in commands_of("cxt", "plan") if "--calibrate" in words]
    shutil.copytree(REPOSITORY / "config", tmp_path / "config")
    assert "Total:" in run_python(*words, "--seconds", 0.1, cwd=tmp_path).stdout


def test_published_commands_are_understood():
    published = [words[2:] for words in commands_of("python", "-m", "cxt.train") if "--gpus" in words]
    assert len(published) == 6
    parser = build_parser()
    for words in published:
        assert parse_flags(words, parser).gpus == [0, 1, 2]


def test_datasets(here, tmp_path):
    found = commands_of("cxt", "dataset")
    assert len(found) == 3
    for words in found:
        run_python(*(tmp_path / word if word == "arrays" else word for word in words), cwd=here)
    assert list(tmp_path.rglob("X.npy"))


def test_trees_of_ones_own(tmp_path):
    """The commands of the page on own species, at a tenth of the size; those of Snakemake are planned above."""
    (simulate_words,), (dataset_words,) = commands_of("cxt", "simulate"), commands_of("cxt", "preprocess")
    (tmp_path / "results" / "trees").mkdir(parents=True)
    run_python(*(word.replace("10000000", "1000000") for word in simulate_words), cwd=tmp_path)
    run_python(*dataset_words, cwd=tmp_path)
    (train_words,) = [words for words in commands_of("python", "-m", "cxt.train") if "my_dataset" in words]
    assert read_options(train_words[2:]).dataset_path == "my_dataset"
    assert read_manifest(tmp_path / "my_dataset")["splits"]["train"]["simulations"] == 4


SMALLER = {"chr2:1000001-3000000": "chr2:1000001-1100000"}


@pytest.mark.parametrize("words", commands_of("cxt", "translate"), ids=" ".join)
def test_translations(here, tmp_path, words):
    """Of a part of the region; without one, of the short contig."""
    words = [tmp_path / "x" if word == "tracks" else SMALLER.get(word, word) for word in words]
    words += [] if "--regions" in words else ["--regions", "chr1"]
    run_python(*words, "--threads", 1, cwd=here)
    assert (tmp_path / "x/summary.json").is_file()


def test_figures_of_tracks(here, tmp_path):
    found = commands_of("cxt", "plot")
    assert found
    for words in found:
        run_python(*words, "--out", tmp_path, cwd=here)
    assert {path.name for path in tmp_path.iterdir()} == {"tracks.png", "pairs.png", "distribution.png", "ne.png"}


def test_tabix(here):
    """By the same library."""
    found = [shlex.split(command) for command in commands() if command.startswith("tabix ")]
    assert found
    for *_, path, region in found:
        with pysam.TabixFile(str(here / path)) as table:
            assert list(table.header)[-1].startswith("#chrom\tstart\tend")
            rows = [row.split("\t") for row in table.fetch(region=region)]
        assert {row[0] for row in rows} == {region.partition(":")[0]}


def test_one_tree_sequence(here, tmp_path):
    ((*words, out),) = commands_of("cxt", "trees")
    words = ["7" if word == "17" else word for word in words]  # batches are smaller here
    run_python(*words, tmp_path / out, cwd=here)
    assert (tmp_path / out).is_file()


@pytest.mark.long
def test_runs_checkpoints_and_settings(here, tmp_path):
    outputs = {}
    for words in [*commands_of("cxt", "checkpoint"), *commands_of("cxt", "runs")]:
        if not {"import", "export", "merge"} & set(words):
            # Of the shipped checkpoint, which takes hours, the page's command is run on another one.
            words = ["results/broad.ckpt" if word == "runs/small/results/small.ckpt" else word for word in words]
            made = ("broad-int8.ckpt", "small.ckpt", "both.png", "runs.csv")
            words = [str(tmp_path / word) if word in made else word for word in words]
            two = dict(zip(("results/runs/A", "results/runs/B"), sorted(map(str, here.glob("results/runs/*/"))), strict=False))
            words = [two.get(word, word) for word in words]
            words = [path for word in words for path in (sorted(here.glob(word)) if "*" in word else [word])]
            is_of_workflow = {"runs", "verify"} & set(words) and not {"compare", "table"} & set(words)
            words += ["--configfile", TINY] if is_of_workflow else []
            outputs[tuple(words[2:4])] = run_python(*words, cwd=here, check="diff" not in words).stdout
    assert "the lineage of 'broad'" in outputs["checkpoint", "verify"]
    assert "tensors differ, most of all" in outputs["checkpoint", "diff"]
    assert "diversity" in outputs["checkpoint", "show"]
    assert "matrices rounded to 8 bits" in outputs["checkpoint", "quantize"]
    for words in commands_of("python", "-m", "cxt.train"):
        if "--print-config" in words:
            assert "mask_singletons: true" in run_python(*words, cwd=here).stdout
    (words,) = commands_of("cxt", "find_lr")
    words = [tmp_path / word if word == "lr.png" else word for word in words]
    run_python(*words, "--devices", 0, "--batch-size", 4, "--num-steps", 30, "--threads", 1, cwd=here)
    assert (tmp_path / "lr.png").exists()


@pytest.mark.long
def test_start_from_published_checkpoints(tmp_path):
    (block,) = [block for block in blocks() if "checkpoint import" in block.text and block.language == "sh"]
    found = [shlex.split(line, comments=True) for line in block.text.splitlines()]
    shutil.copy(GOLDEN / "published_style.ckpt", tmp_path / found[0][3])
    entry = constant_scenario(simulations=3, individuals=5, sequence_length=50_000)
    shape = {"window_size": 100, "sequence_length": 50_000, "pairs": 2, "scales": [2, 8, 32, 64], "samples": 10}
    build_dataset(tmp_path / "data" / "mine", entry=entry, **shape)
    # The network of the small file that stands for the published one, and a batch that the small dataset has.
    smaller = ["--layers", 2, "--width", 80, "--batch-size", 2, "--devices", 0, "--threads", 1, "--decode-items", 0]
    for words in found:
        words = ["-m", *words] if words[0] == "cxt" else [*words[1:], *smaller]
        done = run_python(*words, cwd=tmp_path)
    assert "exported to exported/model.safetensors and config.json" in done.stdout
    run_python("-c", "import cxt; cxt.load_model('broad_epoch=1-step=5280.ckpt'); cxt.load_model('exported')", cwd=tmp_path)


def test_training_without_a_dataset(tmp_path):
    (words,) = [words for words in commands_of("python", "-m", "cxt.train") if "--simulate" in words]
    done = run_python(*words, "--max-steps", 2, "--eval-samples", 4, "--workers", 0, "--log-dir", tmp_path)
    assert "step 2/2" in done.stdout


@pytest.mark.long
def test_benchmarks(tmp_path):
    found = commands_of("cxt", "bench")
    assert len(found) == 4
    smaller = ["--layers", 1, "--heads", 2, "--width", 16, "--windows", 10, "--samples", 6, "--batch-size", 4, "--seconds", 0.1]
    for words in found:
        done = run_python(*words, *smaller, "--device", "cpu", "--threads", 1, cwd=tmp_path)
        assert ("times as fast" in done.stdout) == ("--compare" in words)


def test_layout_is_described():
    text = (REPOSITORY / "results" / "README.md").read_text()
    for word in ("simulations/", "datasets/", "runs/", "evaluation/", "logs/", "masks/", "settings/", "report/", "translate/"):
        assert word in text
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["license"] == "MIT"


def test_readme_is_short_and_its_links_exist():
    readme = (REPOSITORY / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    for link in re.findall(r"\]\((?!http)([^)#]+)", readme):
        assert (REPOSITORY / link).exists(), link


@pytest.mark.slow
def test_evaluation_on_scenarios(here, tmp_path):
    (words,) = [words for words in commands_of("cxt", "evaluate") if "--scenarios" in words and "--ensemble" not in words]
    words = [tmp_path / word if word == "accuracy" else word for word in words]
    assert "| island " in run_python(*words, "--threads", 1, cwd=here).stdout
    assert (tmp_path / "accuracy" / "evaluation.json").is_file()


@pytest.mark.slow
def test_evaluation_of_an_ensemble(here, tmp_path):
    (words,) = [words for words in commands_of("cxt", "evaluate") if "--ensemble" in words]
    words = [tmp_path / word if word == "ensemble" else word for word in words]
    assert "| mine_mean " in run_python(*words, "--pairs", 2, "--threads", 1, cwd=here).stdout
    assert (tmp_path / "ensemble" / "evaluation.json").is_file()


@pytest.mark.slow
def test_evaluations_of_another_checkpoint(here):
    """With names of the tiny workflow in place of those of the example."""
    found = [words for words in commands_of("cxt", "evaluate") if "--scenarios" not in words and "mine" not in " ".join(words)]
    assert len(found) == 2
    for words in found:
        words = [word.replace("two_islands", "narrow") if "/" in word else word for word in words]
        words = ["narrow" if word == "broad" else word for word in words]
        done = run_python(*words, cwd=here)
    assert done.stdout.count("| narrow ") == 6  # two evaluations of one scenario, each with its mean and recent windows
