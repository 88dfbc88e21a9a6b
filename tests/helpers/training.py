"""Training in this process, and comparing weights."""

import sys

import torch

from cxt import train as train_stage
from cxt.checkpoints.file import read_checkpoint

SMALL = [
    "--model",
    "broad",
    "--layers",
    "3",
    "--heads",
    "2",
    "--width",
    "16",
    "--batch-size",
    "8",
    "--grad-accum",
    "2",
    "--epochs",
    "2",
    "--threads",
    "1",
    "--devices",
    "0",
]

FINE = ["--lr", "1e-3", "--min-lr", "1e-4", "--decay-steps", "0", "--warmup-steps", "2"]


def train(monkeypatch, *arguments):
    """`python -m cxt.train …` in this process; returns nothing, raises what it raises."""
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    train_stage.main()


def weights(path):
    return read_checkpoint(path).state_dict


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def objective_record(objective: str) -> dict:
    """Entries of a checkpoint's record that say it was trained with *objective*."""
    training = {"batch_size": 4, "grad_accum": 1, "epochs": 1, "lr": 1e-3, "seed": 1, "objective": objective}
    return {"training": training, "accelerator": "cpu", "devices": 1, "precision": "32-true", "threads": 1}
