"""What README says can be done, done."""

import re
import shlex
import shutil

import pytest
import yaml
from conftest import GOLDEN, REPOSITORY, TINY, build_dataset, constant_scenario, maps_taken_as_present, run_python

from cxt.config.file import load
from cxt.trainer.options import build_parser, parse_flags

README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The code blocks in one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands(start: str, *, text: str | None = None) -> list[list[str]]:
    """The commands of the shell blocks (or of *text*) that begin with *start*, as arguments of Python."""
    text = "\n".join(blocks("sh")) if text is None else text
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.startswith(start)]
    words = [shlex.split(line, comments=True) for line in lines]
    return [["-m", *line] if line[0] == "cxt" else line[1:] for line in words]


def test_python_runs(workflow):
    (code,) = blocks("python")
    done = run_python("-c", code, cwd=workflow, env={"CXT_CHECKPOINT_CACHE": ""})
    assert "Example(scenario='constant', index=0" in done.stdout
    assert "torch.Size([1, 10, 324])" in done.stdout


def test_published_commands_parse():
    published = [words[2:] for words in commands("python -m cxt.train") if "--gpus" in words]
    assert len(published) == 6
    parser = build_parser()
    for words in published:
        assert parse_flags(words, parser).gpus == [0, 1, 2]


def test_dataset_commands(workflow, tmp_path):
    found_commands = commands("cxt dataset")
    assert len(found_commands) == 3
    for words in found_commands:
        run_python(*(str(tmp_path / word) if word == "arrays" else word for word in words), cwd=workflow)
    assert list(tmp_path.rglob("X.npy"))


def test_start_from_published_checkpoints(tmp_path):
    (block,) = [text for text in blocks("sh") if "checkpoint import" in text]
    found_commands = commands("", text=block)
    assert [words[1:4] for words in found_commands] == [
        ["cxt", "checkpoint", "import"], ["cxt.train", "--model", "broad"], ["cxt", "checkpoint", "export"],
    ]  # fmt: skip
    shutil.copy(GOLDEN / "published_style.ckpt", tmp_path / found_commands[0][4])
    entry = constant_scenario(simulations=3, individuals=5, sequence_length=50_000)
    shape = {"window_size": 100, "sequence_length": 50_000, "pairs": 2, "scales": [2, 8, 32, 64], "samples": 10}
    build_dataset(tmp_path / "data" / "mine", entry=entry, **shape)
    # The network of the small file that stands for the published one, and a batch that the small dataset has.
    smaller = ["--layers", 2, "--width", 80, "--batch-size", 2, "--devices", 0, "--threads", 1, "--decode-items", 0]
    for words in found_commands:
        done = run_python(*words, *(smaller if "cxt.train" in words else []), cwd=tmp_path)
    assert "exported to exported/model.safetensors and config.json" in done.stdout
    run_python("-c", "import cxt; cxt.load_model('broad_epoch=1-step=5280.ckpt'); cxt.load_model('exported')", cwd=tmp_path)


@pytest.mark.slow
def test_benchmarks(tmp_path):
    found_commands = commands("cxt bench")
    assert len(found_commands) == 2
    smaller = ["--layers", 1, "--heads", 2, "--width", 16, "--windows", 10, "--samples", 6, "--batch-size", 4, "--seconds", 0.1]
    for words in found_commands:
        assert "times as fast" in run_python(*words, *smaller, "--device", "cpu", "--threads", 1, cwd=tmp_path).stdout


def test_training_without_a_dataset(tmp_path):
    (command,) = [words for words in commands("python -m cxt.train") if "--simulate" in words]
    shorter = ["--max-steps", 2, "--eval-samples", 4, "--workers", 0, "--log-dir", tmp_path]
    done = run_python(*command, *shorter)
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
    found_commands = [words for words in commands("snakemake") if any("paper.yaml" in word for word in words)]
    assert len(found_commands) == 2
    environment = {"STDPOPSIM_CACHE": str(maps_taken_as_present(tmp_path / "cache"))}
    for words in found_commands:
        words = [str(tmp_path) if word == "runs/paper" else word for word in words]
        done = run_python("-m", "snakemake", "-n", *words, cwd=REPOSITORY, env=environment)
        assert "train_broad_w200" in done.stdout + done.stderr


def test_plan_commands(tmp_path):
    found_commands = commands("cxt plan")
    assert len(found_commands) == 2
    for words in found_commands:
        out = run_python(*(REPOSITORY / word if word.endswith(".yaml") else word for word in words), cwd=tmp_path)
        assert "Total:" in out.stdout
    (shown,) = blocks("text")  # what README shows is what the command prints
    assert shown.strip() in out.stdout


def test_looking_at_runs_and_checkpoints(workflow, tmp_path):
    wanted = ("cxt checkpoint", "cxt runs", "cxt find_lr", "python -m cxt.train --model broad_w200 --print")
    found_commands = [words for start in wanted for words in commands(start) if not {"import", "export"} & set(words)]
    assert len(found_commands) == 6
    outputs = {}
    for words in found_commands:
        words = [str(tmp_path / "lr.png") if word == "lr.png" else word for word in words]
        words = [str(path) for word in words for path in (sorted(workflow.glob(word)) if "*" in word else [word])]
        if "runs" in words or "verify" in words:
            words += ["--configfile", TINY]
        if "find_lr" in words:
            words += ["--devices", 0, "--batch-size", 4, "--num-steps", 30, "--threads", 1]
        outputs[tuple(words[2:4])] = run_python(*words, cwd=workflow, check="diff" not in words).stdout
    assert "mask_singletons: true" in outputs["--model", "broad_w200"]
    assert "the lineage of 'broad'" in outputs["checkpoint", "verify"]
    assert "weights are equal" in outputs["checkpoint", "diff"]
    assert (tmp_path / "lr.png").exists()


def test_layout_is_described():
    text = (REPOSITORY / "results" / "README.md").read_text()
    for word in ("simulations/", "datasets/", "runs/", "evaluation/", "logs/", "masks/", "config/"):
        assert word in text
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["license"] == "MIT"
