"""Scores of predictive distributions against loops and numerical integrals, and the `metrics` of a training log."""

import math

import numpy as np
import pytest
import torch

from cxt.checkpoints.file import read_checkpoint
from cxt.checkpoints.training_log import COLUMNS, keep_rows, list_columns, read_log
from cxt.data.grid import Grid
from cxt.decoding.scores import CONFIDENCE_CLASSES, WindowScores, score_distributions, score_windows
from cxt.evaluation.figures import METRIC_TITLES, draw_losses
from cxt.evaluation.metrics import RANK_CLASSES, count_ranks
from cxt.trainer.train_model import train_model

GRID = Grid(2.0, 4.0, 11)


@pytest.fixture(scope="module")
def windows():
    """Distributions (pairs, windows, bins), some of them sure or with empty bins, and truths, some outside of the grid."""
    rng = np.random.default_rng(3)
    distribution = rng.dirichlet(np.full(GRID.bins, 0.4), size=(4, 6))
    distribution[0, 0] = np.eye(GRID.bins)[3]
    distribution[1, 1, :5] = 0
    distribution[1, 1] /= distribution[1, 1].sum()
    truth = rng.uniform(GRID.low - 0.3, GRID.edges[-1] + 0.3, size=(4, 6))
    truth[0, 0] = GRID.edges[3]
    return distribution, truth


def integrate_crps(probabilities, truth, points=200_001):
    """The integral of (F - step)², by the midpoint rule on a fine grid."""
    edges = GRID.edges
    x = np.linspace(edges[0], edges[-1], points)
    x = (x[1:] + x[:-1]) / 2
    cumulative = np.interp(x, edges, np.concatenate([[0], np.cumsum(probabilities)]))
    return float(((cumulative - (x >= truth)) ** 2).mean() * (edges[-1] - edges[0]))


def test_windows_against_loops(windows):
    distribution, truth = windows
    scores = score_windows(torch.from_numpy(distribution), GRID, torch.from_numpy(truth))
    for at in np.ndindex(truth.shape):
        inside = min(max(truth[at], GRID.edges[0]), GRID.edges[-1])
        true_bin = min(sum(inside >= edge for edge in GRID.edges[1:]), GRID.bins - 1)
        row = distribution[at]
        assert scores.true_probability[at] == pytest.approx(row[true_bin])
        assert scores.confidence[at] == row.max()
        assert scores.bins_away[at] == abs(int(row.argmax()) - true_bin)
        assert scores.crps[at] == pytest.approx(integrate_crps(row, inside), abs=1e-5)


def test_a_sure_and_right_distribution_scores_zero_up_to_its_bin():
    sure = torch.from_numpy(np.eye(GRID.bins)[[4]])
    middle = torch.tensor([GRID.centres[4]])
    assert score_windows(sure, GRID, middle).crps[0] == pytest.approx(GRID.step / 12)  # uniform within the bin
    assert score_windows(sure, GRID, middle + 1.0).crps[0] == pytest.approx(1.0 - GRID.step / 6, abs=GRID.step / 6)


def test_summary_against_loops(windows):
    distribution, truth = windows
    scores = score_windows(torch.from_numpy(distribution), GRID, torch.from_numpy(truth))
    found = score_distributions(scores)
    right = [away == 0 for away in scores.bins_away.ravel()]
    assert found["accuracy"] == pytest.approx(sum(right) / 24)
    assert found["within_one_bin"] == pytest.approx(sum(away <= 1 for away in scores.bins_away.ravel()) / 24)
    logs = [math.log(max(p, np.finfo(np.float32).tiny)) for p in scores.true_probability.ravel()]
    assert found["perplexity"] == pytest.approx(math.exp(-sum(logs) / 24))
    error = 0.0
    for number in range(CONFIDENCE_CLASSES):
        low, high = number / CONFIDENCE_CLASSES, (number + 1) / CONFIDENCE_CLASSES
        members = [
            (ok, sure)
            for ok, sure in zip(right, scores.confidence.ravel(), strict=True)
            if low <= sure < high or (sure == 1 and high == 1)
        ]
        if members:
            error += abs(sum(ok for ok, _ in members) - sum(sure for _, sure in members)) / 24
    assert found["ece"] == pytest.approx(error)


def test_probability_zero_is_bounded():
    scores = WindowScores(np.zeros(1), np.ones(1), np.ones(1, dtype=int), np.ones(1))
    assert math.isfinite(score_distributions(scores)["perplexity"])


def test_ranks():
    rank = np.array([0.0, 0.01, 0.5, 0.99, 1.0])
    assert count_ranks(rank) == [0.4, *[0.0] * 9, 0.2, *[0.0] * 8, 0.4]
    assert len(count_ranks(rank)) == RANK_CLASSES


def test_metrics_in_the_log_change_no_weights(dataset, tmp_path):
    settings = {
        "dataset_path": dataset, "layers": 1, "heads": 2, "width": 16, "devices": 0, "batch_size": 4, "grad_accum": 1,
        "epochs": 1, "max_steps": 6, "validate_every": 3, "objective": "marginal", "log_every": 3,
    }  # fmt: skip
    train_model(**settings, run_dir=tmp_path / "plain", out=tmp_path / "plain.ckpt")
    names = ["accuracy", "within_one_bin", "perplexity", "crps", "ece"]
    train_model(**settings, run_dir=tmp_path / "scored", out=tmp_path / "scored.ckpt", metrics=names)
    plain, scored = (read_checkpoint(tmp_path / f"{run}.ckpt").state_dict for run in ("plain", "scored"))
    assert all(torch.equal(scored[name], value) for name, value in plain.items())
    before, after = (read_log(tmp_path / run / "training_log.csv") for run in ("plain", "scored"))
    assert list(after[0]) == [*COLUMNS, *(f"val_{name}" for name in names)] == list(list_columns(metrics=names))
    assert [row["val_mse"] for row in before] == [row["val_mse"] for row in after]
    last = after[-1]
    assert 0 <= last["val_accuracy"] <= last["val_within_one_bin"] <= 1
    assert 1 < last["val_perplexity"] < 400
    assert 0 < last["val_crps"] < 5
    assert 0 <= last["val_ece"] <= 1


def test_a_continued_log_gets_the_columns_of_now(tmp_path):
    path = tmp_path / "training_log.csv"
    names = list_columns(metrics=["crps"])
    path.write_text(",".join(COLUMNS) + "\n" + "2,0,5.5,,,,0.001,1.0,10,0.1,1\n", encoding="utf-8")
    keep_rows(path, up_to=2, columns=names)
    [row] = read_log(path)
    assert row["val_crps"] is None
    assert row["train_loss"] == 5.5
    keep_rows(path, up_to=2)
    assert path.read_text(encoding="utf-8") == ",".join(COLUMNS) + "\n" + "2,0,5.5,,,,0.001,1.0,10,0.1,1\n"


def test_every_metric_has_a_panel(tmp_path):
    row = dict.fromkeys(list_columns(metrics=list(METRIC_TITLES)), 1.0) | {"step": 1, "epoch": 0}
    draw_losses([row, row | {"step": 2}], tmp_path / "a.png", title="x")
    assert (tmp_path / "a.png").stat().st_size > 10_000
