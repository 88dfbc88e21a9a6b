"""What README says can be done, done."""

import re
import shlex
import shutil

import pytest
import yaml
from conftest import GOLDEN, REPOSITORY, TINY, build_dataset, constant_scenario, maps_taken_as_present, run_python

from cxt.configfile import load
from cxt.flags import build_parser, parse_flags

README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The code blocks in one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_python_runs(workflow):
    (code,) = blocks("python")
    done = run_python("-c", code, cwd=workflow, env={"CXT_CHECKPOINT_CACHE": ""})
    assert "Item(scenario='constant', index=0" in done.stdout
    assert "torch.Size([1, 10, 324])" in done.stdout


def test_published_commands_parse():
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.startswith("python -m cxt.train") and "--gpus" in line]
    assert len(commands) == 6
    parser = build_parser()
    for command in commands:
        words = shlex.split(command)[3:]
        assert parse_flags(words, parser).gpus == [0, 1, 2]


def test_dataset_commands(workflow, tmp_path):
    lines = [line for line in "\n".join(blocks("sh")).splitlines() if line.startswith("python -m cxt.dataset")]
    assert len(lines) == 3
    for line in lines:
        words = [str(tmp_path / word) if word == "arrays" else word for word in shlex.split(line)[1:]]
        run_python(*words, cwd=workflow)
    assert list(tmp_path.rglob("X.npy"))


def test_start_from_published_checkpoints(tmp_path):
    (block,) = [text for text in blocks("sh") if "checkpoint import" in text]
    commands = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert [words[1:3] for words in commands] == [
        ["cxt.checkpoint", "import"], ["cxt.train", "--model"], ["cxt.checkpoint", "export"],
    ]  # fmt: skip
    shutil.copy(GOLDEN / "published_style.ckpt", tmp_path / commands[0][3])
    entry = constant_scenario(simulations=3, individuals=5, sequence_length=50_000)
    shape = {"window_size": 100, "sequence_length": 50_000, "pairs": 2, "scales": [2, 8, 32, 64], "samples": 10}
    build_dataset(tmp_path / "data" / "mine", entry=entry, **shape)
    # The network of the small file that stands for the published one, and a batch that the small dataset has.
    smaller = ["--layers", 2, "--width", 80, "--batch-size", 2, "--devices", 0, "--threads", 1, "--decode-items", 0]
    for words in commands:
        done = run_python(*words, *(smaller if "cxt.train" in words else []), cwd=tmp_path)
    assert "exported to exported/model.safetensors and config.json" in done.stdout
    run_python("-c", "import cxt; cxt.load_model('broad_epoch=1-step=5280.ckpt'); cxt.load_model('exported')", cwd=tmp_path)


@pytest.mark.slow
def test_benchmarks(tmp_path):
    lines = [line for line in "\n".join(blocks("sh")).splitlines() if line.startswith("python -m cxt.bench")]
    assert len(lines) == 2
    smaller = ["--layers", 1, "--heads", 2, "--width", 16, "--windows", 10, "--samples", 6, "--batch-size", 4, "--seconds", 0.1]
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        assert "times as fast" in run_python(*words, *smaller, "--device", "cpu", "--threads", 1, cwd=tmp_path).stdout


def test_training_without_a_dataset(tmp_path):
    (command,) = [line for line in "\n".join(blocks("sh")).replace("\\\n", " ").splitlines() if "--simulate" in line]
    shorter = ["--max-steps", 2, "--eval-samples", 4, "--workers", 0, "--log-dir", tmp_path]
    done = run_python(*shlex.split(command)[1:], *shorter)
    assert "step 2/2" in done.stdout


def test_a_checkpoint_of_ones_own_is_planned(tmp_path):
    (text,) = blocks("yaml")
    (tmp_path / "mine.yaml").write_text(text)
    assert "my_cattle" in load([tmp_path / "mine.yaml"])["models"]
    (command,) = [line for line in "\n".join(blocks("sh")).splitlines() if "mine.yaml" in line]
    words = shlex.split(command)[1:]
    done = run_python("-m", "snakemake", "-n", "-s", REPOSITORY / "Snakefile", "--directory", tmp_path, *words, cwd=tmp_path)
    assert "train_my_cattle" in done.stdout + done.stderr
    assert "train_narrow" not in done.stdout + done.stderr


@pytest.mark.slow
def test_paper_commands_are_planned(tmp_path):
    commands = [line for line in "\n".join(blocks("sh")).splitlines() if line.startswith("snakemake") and "paper.yaml" in line]
    assert len(commands) == 2
    environment = {"STDPOPSIM_CACHE": str(maps_taken_as_present(tmp_path / "cache"))}
    for command in commands:
        words = [str(tmp_path) if word == "runs/paper" else word for word in shlex.split(command)[1:]]
        done = run_python("-m", "snakemake", "-n", *words, cwd=REPOSITORY, env=environment)
        assert "train_broad_w200" in done.stdout + done.stderr


def test_plan_commands(tmp_path):
    commands = [
        shlex.split(line, comments=True) for line in "\n".join(blocks("sh")).splitlines() if line.startswith("cxt plan")
    ]
    assert len(commands) == 2
    for words in commands:
        out = run_python(
            "-m", "cxt.plan", *(REPOSITORY / word if word.endswith(".yaml") else word for word in words[2:]), cwd=tmp_path
        )
        assert "In all:" in out.stdout
    (shown,) = blocks("text")  # what README shows is what the command prints
    assert shown.strip() in out.stdout


def test_looking_at_runs_and_checkpoints(workflow, tmp_path):
    lines = "\n".join(blocks("sh")).splitlines()
    wanted = ("python -m cxt.checkpoint", "cxt runs", "python -m cxt.find_lr", "python -m cxt.train --model broad_w200 --print")
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith(wanted)]
    commands = [words for words in commands if not {"import", "export"} & set(words)]
    assert len(commands) == 6
    said = {}
    for words in commands:
        words = ["-m", "cxt.runs", *words[2:]] if words[0] == "cxt" else words[1:]
        words = [str(tmp_path / "lr.png") if word == "lr.png" else word for word in words]
        words = [str(path) for word in words for path in (sorted(workflow.glob(word)) if "*" in word else [word])]
        if words[1] == "cxt.runs" or "verify" in words:
            words += ["--configfile", TINY]
        if words[1] == "cxt.find_lr":
            words += ["--devices", 0, "--batch-size", 4, "--num-steps", 30, "--threads", 1]
        said[words[1], words[2] if len(words) > 2 else ""] = run_python(*words, cwd=workflow, check="diff" not in words).stdout
    assert "mask_singletons: true" in said["cxt.train", "--model"]
    assert "the lineage of 'broad'" in said["cxt.checkpoint", "verify"]
    assert "weights are equal" in said["cxt.checkpoint", "diff"]
    assert (tmp_path / "lr.png").exists()


def test_layout_is_described():
    text = (REPOSITORY / "results" / "README.md").read_text()
    for word in ("simulations/", "datasets/", "runs/", "evaluation/", "logs/", "masks/", "config/"):
        assert word in text
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["license"] == "MIT"
