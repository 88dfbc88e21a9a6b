"""Training on regions: from the request to the checkpoint, where it continues, what it refuses, and what the workflow plans."""

import itertools
import json

import msprime
import numpy as np
import pytest
import torch
from helpers.repository import TINY
from helpers.training import SMALL, equal, train, weights

from cxt import evaluate as evaluate_stage
from cxt.checkpoints.file import read_checkpoint
from cxt.checkpoints.training_log import read_log
from cxt.config.file import load
from cxt.config.models import build_network_config
from cxt.config.regions import RegionPlan, Regions
from cxt.config.training import TrainingConfig
from cxt.data.loaders import EpochBatchSampler, RegionDataset
from cxt.data.pair_dataset import PairDataset
from cxt.data.tree_dataset import build_tree_dataset
from cxt.errors import BadRequest, Failed
from cxt.trainer.fit import build_region_schedule, build_starting_model
from cxt.trainer.module import build_loss_function, compile_backend
from cxt.trainer.options import read_options
from cxt.trainer.request import RunRequest, build_request
from cxt.workflow.costs import Costs
from cxt.workflow.estimates import estimate_costs
from cxt.workflow.jobs import evaluation_spec
from cxt.workflow.lineages import model_lineage
from cxt.workflow.settings import write_settings

KINDS = {
    "windows": ["--windows", 8],
    "shortest": ["--windows", 12, "--regions", "{shortest: 3}", "--weight-by-windows=true"],
    "packed": ["--windows", 9, "--regions", "{shortest: 3, pack: true}"],
    "growing": ["--regions", "{first_windows: 3}"],
    "in_order": ["--windows", 6, "--regions", "{in_order: true, carry: true}"],
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def request_of(dataset, *flags) -> RunRequest:
    return build_request(read_options([str(flag) for flag in (*SMALL, "--dataset-path", dataset, *flags)]))


@pytest.mark.parametrize("kind", [kind if kind == "packed" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def test_an_interrupted_run_continues_exactly(dataset, tmp_path, monkeypatch, kind):
    """Stopped after each of its first optimizer steps, in the middle of an epoch."""
    steps = 9
    arguments = [
        *SMALL, "--dataset-path", dataset, *KINDS[kind], "--batch-size", 4, "--max-steps", steps, "--log-every", 1,
        "--decode-items", 2, "--workers", 2,
    ]  # fmt: skip
    train(monkeypatch, *arguments, "--run-dir", tmp_path / "whole", "--out", tmp_path / "whole.ckpt")
    cut = [*arguments, "--run-dir", tmp_path / "cut", "--out", tmp_path / "cut.ckpt"]
    for _ in range(3):
        with pytest.raises(Failed, match="out of time"):
            train(monkeypatch, *cut, "--max-minutes", 1e-6)
    train(monkeypatch, *cut)
    assert (tmp_path / "whole.ckpt").read_bytes() == (tmp_path / "cut.ckpt").read_bytes()
    logs = [read_log(tmp_path / name / "training_log.csv") for name in ("whole", "cut")]
    losses = [[float(row["train_loss"]) for row in log] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == steps


def test_what_a_run_says_of_its_regions(dataset, tmp_path, monkeypatch, capsys):
    run, out = tmp_path / "run", tmp_path / "x.ckpt"
    train(monkeypatch, *SMALL, "--dataset-path", dataset, *KINDS["packed"], "--epochs", 1, "--run-dir", run, "--out", out)
    said = capsys.readouterr().out
    assert "3 regions of 3 to 9 windows of the 20 of each example in each row of 20, which they fill to 100%" in said
    assert "effective batch 48 (8 x 3 x 2 x 1), 2 steps" in said
    about = json.loads((run / "model_summary.json").read_text(encoding="utf-8"))["regions"]
    assert about == {
        "dataset_windows": 20, "windows": [3, 9], "mean_windows": 6.67, "per_row": 3, "row_windows": 20, "fill": 1.0,
    }  # fmt: skip
    record = read_checkpoint(out).record
    assert record["model"]["windows"] == 9
    assert record["training"]["regions"]["shortest"] == 3


def test_a_note_on_regions_that_are_never_as_long(dataset, capsys):
    """Rows of 20 windows have room for 17 beside the shortest other region."""
    flags = ["--regions", "{shortest: 3, pack: true}"]
    request_of(dataset, "--windows", 18, *flags)
    said = capsys.readouterr().err
    assert "note: the network reads 18 windows, but no region of its training is longer than 17" in said
    assert "windows: 17 reads no more" in said
    request_of(dataset, "--windows", 17, *flags)
    assert "no region" not in capsys.readouterr().err


@pytest.mark.slow
def test_off_is_as_before(dataset, tmp_path, monkeypatch):
    plain, given = request_of(dataset), request_of(dataset, "--windows", 20, "--regions", "{}", "--weight-by-windows=false")
    assert plain.identity == given.identity
    assert plain.region_plan.is_off
    assert not {"windows", "regions", "weight_by_windows"} & plain.identity["settings"].keys()
    assert request_of(dataset, "--windows", 19).identity["settings"]["windows"] == 19
    for name, flags in {"plain": [], "given": ["--windows", 20, "--regions", "{growth: 0.2}"]}.items():
        out = tmp_path / f"{name}.ckpt"
        train(monkeypatch, *SMALL, "--dataset-path", dataset, *flags, "--epochs", 1, "--run-dir", tmp_path / name, "--out", out)
    assert equal(weights(tmp_path / "plain.ckpt"), weights(tmp_path / "given.ckpt"))
    assert not {"regions", "weight_by_windows"} & read_checkpoint(tmp_path / "plain.ckpt").record["training"].keys()


SGD = [
    "--optimizer", "sgd", "--lr", 1, "--min-lr", 1, "--warmup-steps", 0, "--schedule", "constant", "--weight-decay", 0,
    "--dropout", 0, "--decode-items", 0,
]  # fmt: skip


def test_accumulated_gradients_are_those_of_one_batch(dataset, tmp_path, monkeypatch):
    """Epochs of one optimizer step: of one batch, and of nine of sixteen, which published code would give 9/16 of it."""
    runs = {
        "one": (108, 1, 2, "true"), "short": (12, 16, 2, "true"),
        "once": (108, 1, 1, "true"), "published": (12, 16, 1, "false"),
    }  # fmt: skip
    moved, losses = {}, {}
    start = build_starting_model(request_of(dataset, *SGD)).state_dict()
    for name, (batch_size, accumulation, epochs, weighted) in runs.items():
        out = tmp_path / f"{name}.ckpt"
        train(
            monkeypatch, *SMALL, *SGD, "--dataset-path", dataset, "--batch-size", batch_size, "--grad-accum", accumulation,
            "--epochs", epochs, "--weight-by-windows", weighted, "--run-dir", tmp_path / name, "--out", out,
        )  # fmt: skip
        moved[name] = torch.cat([(value - start[key]).flatten() for key, value in weights(out).items() if key in start])
        losses[name] = float(read_log(tmp_path / name / "training_log.csv")[-1]["train_loss"])
    assert torch.allclose(moved["short"], moved["one"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(moved["published"], moved["once"] * 9 / 16, rtol=1e-4, atol=1e-6)
    assert losses["short"] == pytest.approx(losses["one"], rel=1e-5)  # the loss in the log has no such weight
    assert losses["published"] == pytest.approx(losses["once"], rel=1e-5)


def test_gradients_of_different_lengths(dataset, tmp_path, monkeypatch):
    """A step of micro-batches of different lengths is one in which every window counts the same."""
    flags = [
        *SGD, "--batch-size", 4, "--grad-accum", 5, "--windows", 12, "--regions", "{shortest: 2}", "--weight-by-windows=true",
        "--max-steps", 1,
    ]  # fmt: skip
    request = request_of(dataset, *flags)
    model, schedule = build_starting_model(request), build_region_schedule(request)
    sampler = EpochBatchSampler(examples=108, batch_size=4, seed=1, regions=schedule)
    items = RegionDataset(PairDataset(dataset, "train"), schedule.plan, noisy=False)
    batches = [items.batch(wanted) for wanted in itertools.islice(sampler, 5)]
    lengths = [batch.counts.shape[3] for batch in batches]
    assert len(set(lengths)) > 2
    loss = build_loss_function(model, request.training)
    sum(length / sum(lengths) * loss(*batch) for length, batch in zip(lengths, batches, strict=True)).backward()
    out = tmp_path / "x.ckpt"
    train(monkeypatch, *SMALL, "--dataset-path", dataset, *flags, "--run-dir", tmp_path / "run", "--out", out)
    trained = weights(out)
    for name, parameter in model.named_parameters():
        assert torch.allclose(trained[name], parameter - parameter.grad, rtol=1e-4, atol=1e-6), name


REFUSED = [
    (["--windows", 21], "windows is 21, but the examples of the dataset have only 20"),
    (["--regions", "{shortest: 21}"], "regions.shortest is 21, above the 20 windows"),
    (["--windows", 5, "--regions", "{first_windows: 6}"], "regions.first_windows is 6, above the 5"),
    (["--regions", "{pack: true}"], "pack needs regions of different lengths; set shortest"),
    (["--regions", "{pack: true, shortest: 11}"], "two regions of 11 or more windows do not fit into a row of 20"),
    (["--regions", "{first_windows: 3, shortest: 2}"], "first_windows and shortest cannot be used together"),
    (["--regions", "{in_order: true}"], "an example of 20 windows is no more than one region of 20"),
    (["--windows", 5, "--regions", "{in_order: true, first_windows: 2}"], "in_order and first_windows cannot"),
    (["--windows", 5, "--regions", "{carry: true, shortest: 2, pack: true}"], "carry and pack cannot be used together"),
    (["--regions", "{carry: true}"], "a region of all 20 windows of an example has no window before it"),
    (["--windows", 5, "--regions", "{carry: true}", "--objective", "marginal"], "the objective marginal does not"),
    (["--windows", 5, "--regions", "{carry: true}", "--start-token-in-prefix=true"], "where sources see the start token"),
    (["--regions", "{shortest: 2}", "--objective", "masked"], "regions cannot be used with the objective masked"),
    (["--regions", "{shortest: 2}", "--compile", "eager"], "would compile the training step anew for every number of windows"),
    (["--regions", "{shortst: 2}"], "regions.shortst: unknown key; did you mean 'shortest'"),
    (["--regions", "{growth: 0}"], "growth must be"),
    (["--windows", 5, "--regions", "{shortest: 2, pack: true}", "--batch-size", 64], "one batch of 64 rows of 6 regions"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refused(dataset, flags, message):
    with pytest.raises(BadRequest, match=message) as refused:
        request_of(dataset, *flags)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("flags", [["--windows", 5], ["--regions", "{shortest: 5}"]])
def test_refused_for_simulations_on_the_fly(flags):
    with pytest.raises(BadRequest, match=f"{flags[0]} cannot be used with --simulate, which simulates no longer sequences"):
        build_request(read_options([*map(str, [*flags, "--simulate", "constant", "--max-steps", 5, "--eval-samples", 2])]))


@pytest.mark.slow
def test_a_checkpoint_of_regions_is_evaluated_on_pieces_of_files(tmp_path, monkeypatch, capsys):
    """On the first part of the pieces that its dataset held out; pieces of its own length might have been trained on."""
    ts = msprime.sim_ancestry(10, population_size=1e3, recombination_rate=1e-7, sequence_length=250_000, random_seed=1)
    ts.dump(tmp_path / "a.trees")
    scenario = {"files": [str(tmp_path / "a.trees")], "mutations": "overlay", "mutation_rate": 1e-7}
    layout = {"window_size": 1000, "sequence_length": 10_000, "samples": 10, "pairs": 4, "scales": [2, 4]}
    build_tree_dataset(tmp_path / "dataset", scenario, layout)
    out = tmp_path / "mine.ckpt"
    train(
        monkeypatch, *SMALL, "--dataset-path", tmp_path / "dataset", "--windows", 4, "--epochs", 1, "--out", out,
        "--run-dir", tmp_path / "run",
    )  # fmt: skip
    assert read_checkpoint(out).record["dataset"]["sequence_length"] == 10_000
    for length in (10_000, 4000):
        overlay = {"scenarios": {"mine": scenario | {"kind": "trees", "individuals": 5, "sequence_length": length}}}
        (tmp_path / f"{length}.yaml").write_text(json.dumps(overlay), encoding="utf-8")
    flags = ["--scenarios", "mine", "--pairs", "2", "--replicates", "2", "--threads", "1", "--simulations", "9"]
    evaluate_stage.main([str(out), *flags, "--configfile", str(tmp_path / "10000.yaml"), "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert result["settings"]["sequence_length"] == 4000
    with pytest.raises(BadRequest, match="pieces of 4,000 bp, but the checkpoint was trained on examples of 10,000 bp"):
        evaluate_stage.main([str(out), *flags, "--configfile", str(tmp_path / "4000.yaml"), "--out", str(tmp_path / "no")])


@pytest.mark.parametrize(
    ("settings", "backend"),
    [({"shortest": 3}, None), ({"first_windows": 3}, None), ({"shortest": 3, "pack": True}, "inductor")],
)
def test_only_one_length_is_compiled(settings, backend):
    training = TrainingConfig(regions=settings)
    assert (compile_backend(training, "cuda"), compile_backend(training, "cpu")) == (backend, None)


# The workflow


def planned(tmp_path, models: dict, **others) -> dict:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(json.dumps({"models": models} | others), encoding="utf-8")
    return load([TINY, overlay])


def test_a_model_with_windows(tmp_path):
    """Its network, settings, evaluation and costs; as many windows as the dataset has are the same as none."""
    plain = load([TINY])
    whole, part = (planned(tmp_path, {"broad": {"windows": windows}}) for windows in (10, 4))
    assert build_network_config(part, "broad").windows == 4
    assert "windows: 4\n" in write_settings(part, "models", "broad")
    assert write_settings(whole, "models", "broad") == write_settings(plain, "models", "broad")
    assert evaluation_spec(whole, "broad") == evaluation_spec(plain, "broad")
    assert model_lineage(whole, "broad") == model_lineage(plain, "broad") != model_lineage(part, "broad")
    assert evaluation_spec(part, "broad") == evaluation_spec(plain, "broad") | {"sequence_length": 8000}
    costs = Costs()
    one, other = (estimate_costs(config, costs)["models"]["broad"] for config in (plain, part))
    assert other["steps"] == one["steps"]
    assert other["flops"] < one["flops"]
    assert other["memory_bytes"]["activations"] < one["memory_bytes"]["activations"]


def test_plans_count_regions(tmp_path):
    plain = load([TINY])
    changes = {"training": {"regions": {"shortest": 2, "pack": True}}, "windows": 4}
    packed = planned(tmp_path, {"broad": changes})
    in_order = planned(tmp_path, {"broad": {"training": {"regions": {"in_order": True}}, "windows": 2}})
    costs = Costs()
    one, rows, chunks = (estimate_costs(config, costs)["models"]["broad"] for config in (plain, packed, in_order))
    assert rows["effective_batch"] == 3 * one["effective_batch"]
    assert rows["steps"] < one["steps"] < chunks["steps"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"windows": 11}, "models.broad: windows is 11, but the examples of the dataset have only 10"),
        ({"training": {"regions": {"shortest": 11}}}, "models.broad: regions.shortest is 11, above the 10"),
        ({"training": {"regions": {"pack": True}}}, "models.broad.training.*: pack needs regions of different lengths"),
        ({"windows": 0}, "models.broad.windows must be a positive integer"),
    ],
)  # fmt: skip
def test_refused_when_planned(tmp_path, model, message):
    with pytest.raises(BadRequest, match=message):
        planned(tmp_path, {"broad": model})


def test_a_model_that_simulates_has_no_windows(tmp_path):
    live = {"preset": "broad", "simulate": ["constant"], "eval_samples": 4, "training": {"max_steps": 3, "objective": "joint"}}
    planned(tmp_path, {"live": live})
    with pytest.raises(BadRequest, match=r"models.live: `windows` cannot be used with `simulate`"):
        planned(tmp_path, {"live": live | {"windows": 4}})
    with pytest.raises(BadRequest, match=r"models.live: `regions` cannot be used with `simulate`"):
        planned(tmp_path, {"live": live | {"training": live["training"] | {"regions": {"shortest": 4}}}})


def test_a_teacher_reads_whole_examples(tmp_path):
    student = {"preset": "broad", "dataset": "processed", "teacher": "broad", "training": {"objective": "distill"}}
    planned(tmp_path, {"student": student | {"windows": 4}})
    with pytest.raises(BadRequest, match="'broad' reads regions of 4 windows, but must read whole examples"):
        planned(tmp_path, {"student": student, "broad": {"windows": 4}})


def test_mean_lengths():
    assert RegionPlan(20, 12, Regions(shortest=4)).mean_windows == 8
    assert RegionPlan(20, 12, Regions(first_windows=4, growth=0.5)).mean_windows == 10
    plan = RegionPlan(20, 9, Regions(shortest=3, pack=True))
    assert plan.mean_windows * plan.per_row == plan.row_windows == 20
    assert np.isclose(plan.longest, 9)
    assert RegionPlan(20, 20, Regions(shortest=8, pack=True)).longest == 12
