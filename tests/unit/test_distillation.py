"""A teacher's distributions: as quantiles, in batches, in the loss, and refused where they do not belong."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from helpers.network import model_of
from helpers.simulations import build_dataset
from helpers.training import train

import cxt
from cxt import teach
from cxt.checkpoints.file import read_checkpoint, write_checkpoint
from cxt.checkpoints.load import load_model
from cxt.checkpoints.record import build_checkpoint_record
from cxt.config.file import load
from cxt.config.models import list_needed
from cxt.config.network import ModelConfig
from cxt.data.examples import compute_model_input
from cxt.data.grid import Grid
from cxt.data.shards import read_shard
from cxt.data.soft_targets import LEVELS, UNIT, read_soft_targets, write_soft_targets
from cxt.decoding.posterior import posterior_quantile, posterior_quantiles
from cxt.errors import BadRequest
from cxt.model.rates import find_shift
from cxt.scenarios.batches import read_batch
from cxt.trainer.losses import compute_distillation_loss, spread_over_bins
from cxt.workflow.costs import Costs
from cxt.workflow.estimates import estimate_costs
from cxt.workflow.lineages import model_lineage, soft_targets_lineage
from cxt.workflow.paths import soft_target_paths

GRID = Grid()
NETWORK = ModelConfig(layers=2, heads=2, width=16, windows=20, samples=20, scales=2, window_size=1000, dropout=0.0)
FLAGS = [
    "--model", "broad", "--layers", 2, "--heads", 2, "--width", 16, "--batch-size", 4, "--grad-accum", 1, "--epochs", 1,
    "--threads", 1, "--devices", 0, "--lr", 1e-2, "--min-lr", 1e-3, "--decay-steps", 0, "--objective", "distill",
]  # fmt: skip


def distributions(number: int = 40) -> torch.Tensor:
    """Mixtures of two normal densities over the bins of the published grid, one of them at the grid's end."""
    rng = np.random.default_rng(1)
    means = rng.uniform(6, 13, (number, 1)) + rng.uniform(-0.5, 0.5, (number, 2))
    widths = np.exp(rng.uniform(-1.5, 0.3, (number, 2)))
    means[0] = 16.9
    density = np.exp(-0.5 * ((GRID.centres[None, :, None] - means[:, None]) / widths[:, None]) ** 2) / widths[:, None]
    density = density @ np.array([0.7, 0.3])
    return torch.from_numpy(density / density.sum(1, keepdims=True))


def test_quantiles_at_once():
    given = distributions()
    expected = torch.stack([posterior_quantile(given, GRID, level) for level in LEVELS], dim=-1)
    torch.testing.assert_close(posterior_quantiles(given, GRID, LEVELS.tolist()), expected)
    one = torch.zeros(1, 324, dtype=torch.float64)
    one[0, 7] = 1  # all in one bin
    assert posterior_quantiles(one, GRID, [0.5]).item() == pytest.approx(GRID.centres[7])


def test_spread_over_bins():
    """Against numpy's interpolation of the cumulative distribution, and close to the distribution that the quantiles are of."""
    given = distributions()
    quantiles = posterior_quantiles(given, GRID, LEVELS.tolist())
    spread = spread_over_bins(quantiles.float(), GRID)
    levels = (LEVELS - LEVELS[0]) / (LEVELS[-1] - LEVELS[0])
    for row, actual in zip(quantiles.numpy(), spread.numpy(), strict=True):
        cumulative = np.interp(GRID.edges, row, levels, left=0.0, right=1.0)
        cumulative[0], cumulative[-1] = 0.0, 1.0
        np.testing.assert_allclose(actual, np.diff(cumulative), atol=1e-5)
    divergence = (torch.xlogy(given, given) - torch.xlogy(given, spread.double().clamp(min=1e-12))).sum(1)
    assert divergence.max() < 0.02
    # Quantiles beyond the grid, as after a shift by a rate, are in its last bin.
    assert spread_over_bins(quantiles.float() + 30, GRID)[:, -1].tolist() == pytest.approx([1.0] * len(quantiles))
    assert spread_over_bins(quantiles.float() - 30, GRID)[:, 0].tolist() == pytest.approx([1.0] * len(quantiles))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss(temperature):
    """By hand, with gradients by differences; zero, and without a gradient, where student and teacher agree."""
    grid_bins = 5
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, grid_bins + 2, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.0], [1.0, 0, 0, 0, 0], [0.2] * 5], dtype=torch.float64)

    def by_hand(rows) -> float:
        total = 0.0
        for row, p in zip(rows, target.tolist(), strict=True):
            p = [value ** (1 / temperature) for value in p]
            p = [value / sum(p) for value in p]
            q = [math.exp(value / temperature) for value in row[2:]]
            q = [value / sum(q) for value in q]
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)
        return temperature**2 * total / len(rows)

    value = compute_distillation_loss(logits, target, temperature=temperature)
    assert value.item() == pytest.approx(by_hand(logits.tolist()))
    (gradient,) = torch.autograd.grad(value, logits)
    for i, j in ((0, 2), (1, 4), (2, 0), (2, 6)):
        moved = logits.detach().clone()
        moved[i, j] += 1e-6
        difference = (by_hand(moved.tolist()) - by_hand(logits.tolist())) / 1e-6
        assert float(gradient[i, j]) == pytest.approx(difference, abs=1e-5)
    agree = torch.cat([torch.zeros(1, 2), distributions(1).float().clamp(min=1e-20).log()], dim=1).requires_grad_()
    value = compute_distillation_loss(agree, distributions(1).float(), temperature=temperature)
    assert value.item() == pytest.approx(0, abs=1e-5)
    assert torch.autograd.grad(value, agree)[0].abs().max() < 1e-6


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A checkpoint that reads 20 haplotypes and their rates in one pass, with weights at which all input matters."""
    torch.manual_seed(1)
    model = model_of(NETWORK.replace(reads_rates=True), scale=4.0)
    with torch.no_grad():
        model.backbone.rate_embedding.weight.normal_()
    dataset = {"scales": [2, 4], "missing": False, "window_size": 1000, "sequence_length": 20_000, "samples": 20}
    training = {"batch_size": 4, "grad_accum": 1, "epochs": 1, "lr": 1e-3, "seed": 1, "objective": "marginal"}
    record = build_checkpoint_record(
        model.config, None, name="teacher", preset="broad", training=training, lineage=None, dataset=dataset, parent=None,
        accelerator="cpu", devices=1, precision="32-true", threads=1, processor="", versions={}, step=1, epoch=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("teacher") / "teacher.ckpt"
    write_checkpoint(path, model.state_dict(), record)
    return path


def run_teach(teacher, dataset, out, *more) -> None:
    shards = [dataset / f"{split}/constant-0.zarr.zip" for split in ("train", "test")]
    targets = [out / f"{split}/constant-0.npz" for split in ("train", "test")]
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    teach.main(["--checkpoint", *map(str, [teacher, "--shards", *shards, "--out", *targets, *more])])


WITH_BATCH = ["--start", 0, "--count", 20]


@pytest.fixture(scope="module")
def soft_targets(teacher, dataset_n10, tmp_path_factory):
    """Soft targets of a dataset of 10 haplotypes, by a teacher that reads all 20 of the same simulations."""
    out = tmp_path_factory.mktemp("soft")
    run_teach(teacher, dataset_n10, out, "--batch", dataset_n10 / "batch", *WITH_BATCH)
    return out


def test_teacher_reads_more_haplotypes_of_the_same_pairs(teacher, dataset_n10, soft_targets):
    """Against `cxt.predict_ts` on the simulation."""
    shard, _ = read_shard(dataset_n10 / "train/constant-0.zarr.zip")
    sha256 = cxt.PairDataset(dataset_n10, "train").manifest["splits"]["train"]["shards"][0]["sha256"]
    stored = read_soft_targets(soft_targets / "train/constant-0.npz", shard=sha256, shape=shard["log_tmrca"].shape) * UNIT
    simulations = {ts.metadata["cxt"]["index"]: ts for ts in read_batch(dataset_n10 / "batch", start=0, count=20)}
    for row in (0, 7, 17):
        ts = simulations[int(shard["index"][row])]
        rates = {name: float(shard[name][row]) for name in ("mutation_rate", "recombination_rate")}
        expected = cxt.predict_ts(load_model(teacher), ts, shard["pairs"][row].astype(int), **rates)
        np.testing.assert_allclose(stored[row], np.moveaxis(expected.quantile(LEVELS), 0, -1), atol=UNIT)


def test_teacher_with_the_same_haplotypes(teacher, dataset, tmp_path):
    """It reads the shards themselves, to the same result as from the simulations."""
    run_teach(teacher, dataset, tmp_path)
    with np.load(tmp_path / "train/constant-0.npz") as arrays:
        quantiles, about = arrays["quantiles"], json.loads(str(arrays["about"]))
    assert about["teacher"]["name"] == "teacher"
    shard, _ = read_shard(dataset / "train/constant-0.zarr.zip")
    (ts,) = [ts for ts in read_batch(dataset / "batch", start=0, count=20) if ts.metadata["cxt"]["index"] == shard["index"][3]]
    rates = {name: float(shard[name][3]) for name in ("mutation_rate", "recombination_rate")}
    expected = cxt.predict_ts(load_model(teacher), ts, shard["pairs"][3].astype(int), **rates)
    np.testing.assert_allclose(quantiles[3] * UNIT, np.moveaxis(expected.quantile(LEVELS), 0, -1), atol=UNIT)


def test_batches_hold_the_soft_targets_of_their_examples(dataset_n10, soft_targets):
    items = cxt.PairDataset(dataset_n10, "train", soft_targets=soft_targets)
    with np.load(soft_targets / "train/constant-0.npz") as arrays:
        expected = arrays["quantiles"].reshape(len(items), 20, len(LEVELS))
    chosen = [107, 0, 33, 33]
    assert np.array_equal(items.batch(chosen).soft_targets.numpy(), expected[chosen])
    assert np.array_equal(cxt.PairDataset.shared(items.handle()).batch([5]).soft_targets.numpy(), expected[[5]])
    assert cxt.PairDataset(dataset_n10, "train").batch([0]).soft_targets is None


def test_student_comes_close_to_its_teacher(teacher, dataset_n10, soft_targets, tmp_path, monkeypatch):
    """With the divergence alone, a student that reads half of the haplotypes learns what no true bin could have told it."""
    divergences = []
    for weight, name in ((1.0, "student"), (0.0, "other")):
        out = tmp_path / f"{name}.ckpt"
        train(monkeypatch, *FLAGS, "--dataset-path", dataset_n10, "--soft-targets", soft_targets, "--out", out, "--run-dir",
              tmp_path / name, "--epochs", 6, "--distill", json.dumps({"weight": weight}), "--reads-rates", "true",
              "--losses", json.dumps([{"name": "cross_entropy", "weight": 1 - weight}]))  # fmt: skip
        assert read_checkpoint(out).record["teacher"]["name"] == "teacher"
        model, items = load_model(out), cxt.PairDataset(dataset_n10, "test", soft_targets=soft_targets)
        assert model.objective == "distill"
        batch = items.batch(range(len(items)))
        with torch.no_grad():
            logits = model.marginal_logits(compute_model_input(batch.counts, None), batch.rates).flatten(0, 1)
        quantiles = batch.soft_targets.float() * UNIT + find_shift(batch.rates).view(-1, 1, 1)
        target = spread_over_bins(quantiles.flatten(0, 1), items.grid)
        divergences.append(float(compute_distillation_loss(logits, target, temperature=1.0)))
    assert divergences[0] < 0.7 * divergences[1]


def test_bad_requests_of_training(teacher, dataset, dataset_n10, soft_targets, tmp_path, monkeypatch):
    def fit(*flags):
        train(monkeypatch, *FLAGS, "--out", tmp_path / "x.ckpt", "--run-dir", tmp_path / "run", *flags)

    data = ["--dataset-path", dataset_n10]
    with pytest.raises(BadRequest, match="distill needs a teacher: pass the directory of its soft targets"):
        fit(*data)
    with pytest.raises(BadRequest, match="soft-targets is for the objective distill, not for marginal"):
        fit(*data, "--objective", "marginal", "--soft-targets", soft_targets)
    with pytest.raises(BadRequest, match="there are no soft targets .*train/constant-0.npz"):
        fit(*data, "--soft-targets", tmp_path)
    with pytest.raises(BadRequest, match="belong to another shard"):
        fit("--dataset-path", dataset, "--soft-targets", soft_targets)
    with pytest.raises(BadRequest, match="the soft targets .* is not the planned one"):
        fit(*data, "--soft-targets", soft_targets, "--soft-targets-lineage", "0123")
    damaged = shutil.copytree(soft_targets, tmp_path / "damaged")
    file = damaged / "test/constant-0.npz"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(BadRequest, match="are damaged or truncated"):
        fit(*data, "--soft-targets", damaged)
    with np.load(soft_targets / "test/constant-0.npz") as arrays:
        quantiles, about = arrays["quantiles"], json.loads(str(arrays["about"]))
    write_soft_targets(file, quantiles * UNIT, about | {"grid": [3.0, 17.0, 100]})
    with pytest.raises(BadRequest, match=r"the teacher has the grid \[3.0, 17.0, 100\], but this network has"):
        fit(*data, "--soft-targets", damaged)
    write_soft_targets(file, quantiles * UNIT, about | {"teacher": about["teacher"] | {"name": "b"}})
    with pytest.raises(BadRequest, match="several teachers"):
        fit(*data, "--soft-targets", damaged)
    assert not (tmp_path / "run").exists()


def test_bad_requests_of_teaching(teacher, dataset, dataset_n10, masked_dataset, tmp_path):
    with pytest.raises(BadRequest, match="reads 20 haplotypes, but the shards hold 10; pass the simulation batch"):
        run_teach(teacher, dataset_n10, tmp_path)
    with pytest.raises(BadRequest, match="missingness True instead of False"):
        run_teach(teacher, masked_dataset, tmp_path)
    with pytest.raises(BadRequest, match="--batch needs --start and --count"):
        run_teach(teacher, dataset_n10, tmp_path, "--batch", dataset_n10 / "batch")
    with pytest.raises(BadRequest, match="unknown keys reeding"):
        run_teach(teacher, dataset, tmp_path, "--spec", '{"reeding": "auto"}')
    with pytest.raises(BadRequest, match="replicates must be"):
        run_teach(teacher, dataset, tmp_path, "--spec", '{"replicates": 0}')
    narrow = build_dataset(tmp_path / "narrow", sequence_length=10_000)
    with pytest.raises(BadRequest, match="windows 10 instead of 20"):
        run_teach(teacher, narrow, tmp_path)
    assert not list(tmp_path.glob("*/*.npz"))


def overlay(**changes) -> dict:
    return {"models": {"broad_adapter": {"teacher": "broad", "training": {"objective": "distill"}} | changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "models.broad_adapter: the objective distill needs a teacher"),
        ({"teacher": "brod"}, "models.broad_adapter.teacher: unknown model 'brod'.*broad"),
        ({"training": {"objective": "marginal"}}, "a teacher is for the objective distill, not for marginal"),
        ({"teacher": "broad_adapter"}, "a cycle of parents and teachers: broad_adapter <- broad_adapter"),
        (
            {"teacher": "w200_wmissing_adapter"},
            "cycle of .* teachers: broad_adapter <- w200_wmissing_adapter <- broad",
        ),
        ({"teacher": "broad_w200"}, "'broad_w200' was trained with window_size 200, but dataset 'processed_n10' has 2000"),
    ],
)
def test_bad_configurations(tmp_path, changes, message):
    path = tmp_path / "overlay.yaml"
    path.write_text(json.dumps(overlay(**changes)))
    with pytest.raises(BadRequest, match=message):
        load([path])


def test_teacher_without_times(tmp_path):
    path = tmp_path / "overlay.yaml"
    path.write_text(json.dumps({"models": overlay()["models"] | {"broad": {"training": {"objective": "masked"}}}}))
    with pytest.raises(BadRequest, match="'broad' cannot teach, because its objective masked predicts no times"):
        load([path])


def test_teacher_with_fewer_haplotypes(tmp_path):
    path = tmp_path / "overlay.yaml"
    student = {"preset": "broad", "dataset": "processed", "teacher": "broad_adapter", "training": {"objective": "distill"}}
    path.write_text(json.dumps({"models": {"student": student}}))
    with pytest.raises(BadRequest, match="reads 10 haplotypes, fewer than the 50 of dataset 'processed'"):
        load([path])


def test_the_plan_counts_the_teachers_reading(tmp_path):
    path = tmp_path / "overlay.yaml"
    path.write_text(json.dumps(overlay()))
    costs = Costs()
    with_teacher, without = (estimate_costs(load(files), costs)["models"]["broad_adapter"] for files in ([path], []))
    assert with_teacher["flops"] == without["flops"]
    assert with_teacher["hours"] == without["hours"]
    assert 1.1 < with_teacher["core_hours"] / without["core_hours"] < 3


def test_the_workflow_plans_a_teacher(tmp_path):
    """A change of the teacher makes soft targets and student stale; without a teacher nothing differs."""
    path = tmp_path / "overlay.yaml"
    path.write_text(json.dumps(overlay()))
    config, plain = load([path]), load([])
    assert list_needed(config["models"]["broad_adapter"]) == ["broad", "broad"]
    assert model_lineage(config, "broad") == model_lineage(plain, "broad")
    assert model_lineage(config, "broad_adapter") != model_lineage(plain, "broad_adapter")
    assert len(soft_target_paths(config, "broad_adapter")) == 32
    assert soft_target_paths(config, "broad") == []
    path.write_text(json.dumps(overlay() | {"models": overlay()["models"] | {"broad": {"training": {"seed": 2}}}}))
    assert soft_targets_lineage(load([path]), "broad_adapter") != soft_targets_lineage(config, "broad_adapter")
