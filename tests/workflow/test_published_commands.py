"""The six published command lines at full size: 500 windows, the published networks, a few simulations.

Only the paths and --batch-size differ from the documentation's, --gpus is left out, and no test items are decoded: that
takes minutes on a CPU at this size, with 25 validations.
"""

import sys

import numpy as np
import pytest
import torch
from helpers.simulations import build_dataset, constant_scenario

from cxt import load_model
from cxt import train as train_stage
from cxt.checkpoints.file import read_checkpoint

PARENTS = {
    "broad_w200": "broad",
    "broad_adapter": "broad",
    "w200_wmissing": "broad_w200",
    "w200_wmissing_adapter": "broad_adapter",
}
OURS = ["--batch-size", "2", "--decode-items", "0"]
COMMANDS = {
    "narrow": "--model narrow --dataset-path {data}/processed_narrow --epochs 6",
    "broad": "--model broad --dataset-path {data}/processed --epochs 2",
    "broad_w200": "--model broad_w200 --dataset-path {data}/processed_small_window --epochs 2 --lr 3e-5 --checkpoint {parent}",
    "broad_adapter": "--model broad --dataset-path {data}/processed_n10 --epochs 3 --adapter --adapter-samples 10"
    " --checkpoint {parent}",
    "w200_wmissing": "--model w200_wmissing --dataset-path {data}/processed_small_window_missing_data --epochs 2 --lr 3e-5"
    " --checkpoint {parent}",
    "w200_wmissing_adapter": "--model w200_wmissing --dataset-path {data}/processed_small_window_missing_data_n10 --epochs 10"
    " --lr 3e-5 --adapter --adapter-samples 10 --resume-adapter {parent}",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The six datasets with three simulations each, of which two train, and one pair (two with ten samples)."""
    root = tmp_path_factory.mktemp("datasets")
    entry = constant_scenario(simulations=3, individuals=25, sequence_length=1_000_000)
    full = {
        "entry": entry,
        "samples": 50,
        "pairs": 1,
        "scales": [2, 8, 32, 64],
        "window_size": 2000,
        "sequence_length": 1_000_000,
    }
    small = full | {"window_size": 200, "sequence_length": 100_000}
    mask = np.random.default_rng(1).random(200_000) < 0.3
    build_dataset(root / "processed_narrow", **full)
    build_dataset(root / "processed", **full)
    build_dataset(root / "processed_n10", **full | {"samples": 10})
    build_dataset(root / "processed_small_window", **small)
    build_dataset(root / "processed_small_window_missing_data", **small, mask=mask)
    build_dataset(root / "processed_small_window_missing_data_n10", **small | {"samples": 10}, mask=mask)
    return root


@pytest.mark.long
def test_six_commands(data, tmp_path, monkeypatch):
    checkpoints = {}
    threads = torch.get_num_threads()
    for name, command in COMMANDS.items():
        words = command.format(data=data, parent=checkpoints.get(PARENTS.get(name))).split()
        monkeypatch.setattr(sys, "argv", ["train", *words, *OURS, "--log-dir", str(tmp_path / name)])
        train_stage.main()
        epochs = int(words[words.index("--epochs") + 1])
        directory = tmp_path / name / "lightning_logs" / "version_0"
        (checkpoints[name],) = directory.glob(f"checkpoints/*_epoch={epochs - 1}-step={epochs}.ckpt")
        assert list(directory.glob("events.out.tfevents.*"))
        record = read_checkpoint(checkpoints[name]).record
        assert record["model"]["windows"] == 500
        assert record["model"]["layers"] == (6 if name == "narrow" else 10)
        assert record["model"]["mask_singletons"] == ("wmissing" not in name)
        assert (record["adapter"] is not None) == ("adapter" in name)
    torch.set_num_threads(threads)
    model = load_model(checkpoints["w200_wmissing_adapter"])
    with torch.no_grad():
        logits = model(torch.rand(1, 2, 4, 500, 10), torch.ones(1, 501, dtype=torch.long))
    assert logits.shape == (1, 500, 326)
