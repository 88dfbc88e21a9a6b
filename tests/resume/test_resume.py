"""Runs that are interrupted, and end as if they had not been.

`make test-resume` runs the whole matrix with twenty kills each; by default there are a few. With `-k "once_each"` it is one
combination of each kind of training: twenty `kill -9`, and twenty signals to all processes.
"""

import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.interruptions import (
    HEARD,
    Trainer,
    assert_equal_runs,
    command,
    finish,
    kill_at_a_random_moment,
    signal_at_a_random_moment,
)
from helpers.repository import run_python
from helpers.simulations import constant_scenario

from cxt.signals import STATUS

KILLS = int(os.environ.get("CXT_RESUME_KILLS", "0"))
"""Kills of every combination of the matrix; 0 runs three combinations with two kills."""


KINDS = (
    "plain", "adapter", "resume_adapter", "simulate", "recipe", "joint", "adaptive", "distill", "noise", "masked", "lora",
    "weights", "ema", "ema_adapter", "contrastive", "shortest", "packed", "growing", "in_order",
)  # fmt: skip


@pytest.fixture(scope="module")
def parents(dataset, dataset_n10, tmp_path_factory):
    """{kind: arguments that name its data and parent}."""
    directory = tmp_path_factory.mktemp("parents")
    plain, adapter = directory / "plain.ckpt", directory / "adapter.ckpt"
    few = ["--devices", 0, "--epochs", 1]
    finish(command("--dataset-path", dataset, *few, "--run-dir", directory / "plain", "--out", plain))
    on_plain = ["--dataset-path", dataset_n10, "--adapter", "--adapter-bottleneck", 4, "--adapter-dropout", 0.1, "--last-n", 1]
    finish(command(*on_plain, "--checkpoint", plain, *few, "--run-dir", directory / "adapter", "--out", adapter))
    shards = [dataset_n10 / f"{split}/constant-0.zarr.zip" for split in ("train", "test")]
    soft = [directory / f"soft/{split}/constant-0.npz" for split in ("train", "test")]
    for file in soft:
        file.parent.mkdir(parents=True)
    batch = ["--batch", dataset_n10 / "batch", "--start", 0, "--count", 20, "--spec", '{"replicates": 2}']
    run_python("-m", "cxt.teach", "--checkpoint", plain, "--shards", *shards, "--out", *soft, *batch)
    live = directory / "live.yaml"
    live.write_text(yaml.safe_dump({"scenarios": {"little": constant_scenario(sequence_length=10_000)}}))
    return {
        "simulate": ["--simulate", "little", "--configfile", live, "--window-size", 1000, "--eval-samples", 8],
        "plain": ["--dataset-path", dataset],
        "recipe": [
            "--dataset-path", dataset, "--objective", "marginal", "--optimizer", "muon", "--losses", "label_smoothing",
            "--reads-rates", "true",
        ],
        "joint": [
            "--dataset-path", dataset, "--objective", "joint", "--optimizer", "muon",
            "--losses", "[{name: cross_entropy}, {name: emd, final_weight: 0}]",
        ],
        "adaptive": [
            "--dataset-path", dataset, "--schedule", "adaptive", "--validate-every", 7,
            "--adaptive", "{patience_up: 1, patience_down: 1, cooldown: 0}",
        ],
        "distill": [
            "--dataset-path", dataset_n10, "--objective", "distill", "--soft-targets", directory / "soft",
            "--optimizer", "muon", "--reads-rates", "true",
        ],
        "noise": [
            "--dataset-path", dataset,
            "--noise", "{thinning: 0.2, genotype_errors: 0.01, phase_switches: 0.1, initial_factor: 0}",
        ],
        "masked": ["--dataset-path", dataset, "--objective", "masked", "--masked", "{span: 3}", "--optimizer", "muon"],
        "contrastive": [
            "--dataset-path", dataset, "--objective", "contrastive", "--contrastive", "{span: 5}", "--optimizer", "muon",
            "--reads-rates", "true",
        ],
        "weights": ["--dataset-path", dataset, "--weight-noise", 0.1, "--quantized-bits", 4],
        "lora": ["--dataset-path", dataset, "--lora-of", plain, "--lora-rank", 3, "--optimizer", "muon"],
        "ema": ["--dataset-path", dataset, "--optimizer", "muon", "--ema-decay", 0.95, "--export", "best"],
        "ema_adapter": [*on_plain, "--checkpoint", plain, "--ema-decay", 0.95],
        "shortest": [
            "--dataset-path", dataset, "--windows", 12, "--regions", "{shortest: 3}", "--weight-by-windows=true",
            "--noise", "{thinning: 0.2}",
        ],
        "packed": ["--dataset-path", dataset, "--windows", 9, "--regions", "{shortest: 3, pack: true}", "--reads-rates=true"],
        "growing": ["--dataset-path", dataset, "--regions", "{first_windows: 3}", "--weight-by-windows=true"],
        "in_order": ["--dataset-path", dataset, "--windows", 6, "--regions", "{in_order: true, carry: true}"],
        "adapter": [*on_plain, "--checkpoint", plain],
        "resume_adapter": [*on_plain, "--resume-adapter", adapter],
    }  # fmt: skip


MATRIX = [
    (kind, workers, accumulation, ranks)
    for kind in KINDS
    for workers in (0, 2)
    for accumulation in (1, 3)
    for ranks in (1, 2)
]  # fmt: skip
FEW = [
    ("plain", 0, 3, 1), ("resume_adapter", 2, 1, 1), ("adapter", 0, 1, 2), ("recipe", 0, 1, 2), ("noise", 2, 3, 1),
    ("masked", 0, 1, 2), ("lora", 0, 1, 2), ("ema", 0, 3, 1), ("shortest", 2, 3, 1), ("packed", 0, 3, 1), ("growing", 2, 1, 2),
    ("in_order", 0, 3, 1),
]  # fmt: skip
ONCE_EACH = [
    ("plain", 0, 3, 1), ("adapter", 0, 1, 1), ("resume_adapter", 2, 1, 1), ("simulate", 2, 1, 1), ("recipe", 2, 1, 1),
    ("joint", 0, 3, 1), ("adaptive", 0, 1, 1), ("distill", 2, 1, 1), ("noise", 2, 3, 1), ("masked", 0, 3, 1),
    ("lora", 2, 3, 1), ("weights", 0, 3, 1), ("ema", 0, 3, 1), ("ema_adapter", 2, 1, 1), ("contrastive", 2, 3, 1),
    ("shortest", 2, 3, 1), ("packed", 0, 3, 1), ("growing", 2, 1, 1), ("in_order", 0, 3, 1),
]  # fmt: skip


def named(combinations) -> list:
    """Parameters of a test, of which those of ONCE_EACH can be chosen by `-k once_each`; several ranks take long."""
    return [
        pytest.param(
            *each,
            id="-".join(map(str, each)) + ("-once_each" if each in ONCE_EACH else ""),
            marks=[pytest.mark.long] if each != FEW[0] else [],
        )
        for each in combinations
    ]


def arguments_of(parents, kind: str, workers: int, accumulation: int, ranks: int, *, steps: int) -> list[str]:
    devices = ["--devices", 0] if ranks == 1 else ["--accelerator", "cpu", "--devices", 2]
    epochs = math.ceil(steps / ((50 if "adapter" in kind else 100) // ranks // 4 // accumulation))
    return command(
        *parents[kind], *devices, "--workers", workers, "--grad-accum", accumulation, "--max-steps", steps,
        *([] if kind == "simulate" else ["--epochs", epochs]),
    )  # fmt: skip


def compare_and_forget(directory: Path) -> None:
    """The run `cut` and its checkpoint are equal to those of `whole`; they are removed, to be made once more."""
    assert_equal_runs(directory / "whole", directory / "cut")
    assert (directory / "whole.ckpt").read_bytes() == (directory / "cut.ckpt").read_bytes()
    shutil.rmtree(directory / "cut")
    (directory / "cut.ckpt").unlink()


@pytest.mark.parametrize(("kind", "workers", "accumulation", "ranks"), named(MATRIX if KILLS else FEW))
def test_killed_at_random_moments(parents, tmp_path, kind, workers, accumulation, ranks):
    steps = 100 * min(KILLS or 2, 5)
    arguments = arguments_of(parents, kind, workers, accumulation, ranks, steps=steps)
    directory, out = tmp_path / "cut", tmp_path / "cut.ckpt"
    finish([*arguments, "--run-dir", str(tmp_path / "whole"), "--out", str(tmp_path / "whole.ckpt")])
    cut = [*arguments, "--run-dir", str(directory), "--out", str(out)]
    rng = np.random.default_rng([KINDS.index(kind), workers, accumulation, ranks])
    kills = continued = runs = 0
    while kills < (KILLS or 2) or not runs:
        trainer = Trainer(cut, tmp_path / "said", forks=ranks == 1)
        output = kill_at_a_random_moment(trainer, directory, rng)
        continued += "continuing from" in output
        if not out.exists():
            kills += 1
            if kills < (KILLS or 2):
                continue
            output = finish(cut)
            continued += "continuing from" in output
        runs += 1
        compare_and_forget(tmp_path)
    print(
        f"{kind}, {workers} workers, accumulation {accumulation}, {ranks} ranks: {kills} kills of {runs} runs, {steps} steps "
        f"each, {continued} tries continued a save"
    )
    assert continued


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks /proc whether a trainer listens yet")
@pytest.mark.parametrize(
    ("kind", "workers", "accumulation", "ranks"),
    named(MATRIX if KILLS else [("simulate", 2, 1, 2)]),
)
def test_signals_to_all_processes(parents, tmp_path, kind, workers, accumulation, ranks):
    """As `timeout`, a scheduler or a terminal sends them: the status that is documented, a line, and nobody left behind.

    The trainer alone is killed now and then, too: what it has started ends with it.
    """
    count = KILLS or 5
    arguments = arguments_of(parents, kind, workers, accumulation, ranks, steps=100 * min(KILLS or 2, 5))
    directory, out = tmp_path / "cut", tmp_path / "cut.ckpt"
    finish([*arguments, "--run-dir", str(tmp_path / "whole"), "--out", str(tmp_path / "whole.ckpt")])
    cut = [*arguments, "--run-dir", str(directory), "--out", str(out)]
    rng = np.random.default_rng([9, KINDS.index(kind), workers, accumulation, ranks])
    sent = continued = saved = runs = 0
    while sent < count or not runs:
        number = (signal.SIGKILL, *HEARD)[sent % (1 + len(HEARD))]
        if sent < count:
            trainer = Trainer(cut, tmp_path / "said", forks=ranks == 1)
            output = signal_at_a_random_moment(trainer, directory, rng, number)
            assert "Traceback" not in output, output
            if trainer.status():
                sent += 1
                assert trainer.status() == STATUS.get(number, -number), output
                assert number == signal.SIGKILL or f"stopped by {signal.Signals(number).name}" in output, output
        else:
            output = finish(cut)
        continued += "continuing from" in output
        saved += "; the same command continues from step" in output
        if out.exists():
            runs += 1
            compare_and_forget(tmp_path)
    print(
        f"{kind}, {workers} workers, accumulation {accumulation}, {ranks} ranks: {sent} signals in {runs} runs, {saved} tries "
        f"saved, {continued} continued a save"
    )
