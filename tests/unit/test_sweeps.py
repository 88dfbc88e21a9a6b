"""Sweeps: the file, the settings of trials, the study, and what is refused."""

import csv
import json
import math
import statistics
from typing import get_args

import pytest
import yaml

from cxt.commands import sweep as sweep_command
from cxt.config.learning import Objective
from cxt.config.network import ModelConfig
from cxt.config.training import TrainingConfig, list_loss_terms
from cxt.errors import BadRequest
from cxt.model.adapter import build_model
from cxt.sweeps.report import complete_trials, write_csv
from cxt.sweeps.settings import check_trial, put, read_fixed, settings_of_trial
from cxt.sweeps.space import MAX_GRID, Parameter, read_sweep
from cxt.sweeps.study import Study, draw
from cxt.sweeps.trials import metric_at_end
from cxt.trainer.objectives import build_objective

LR = {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}
TWO = json.dumps([{"name": "cross_entropy"}, {"name": "emd", "weight": 0.5}])


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return str(path)


def make(tmp_path, parameters=None, **changes):
    """A sweep of *parameters*, as it is read from a file."""
    content = {
        "method": "bayes",
        "metric": {"name": "val_loss"},
        "parameters": {"lr": LR} if parameters is None else parameters,
    } | changes
    return read_sweep(write(tmp_path / "sweep.yaml", content))[0]


def only(tmp_path, about) -> Parameter:
    (parameter,) = make(tmp_path, {"lr": about}).parameters
    return parameter


@pytest.mark.parametrize(
    ("about", "low", "high", "step", "is_integer", "is_log"),
    [
        ({"min": 1, "max": 8}, 1, 8, 1, True, False),
        ({"min": 0.5, "max": 8}, 0.5, 8.0, None, False, False),
        ({"distribution": "uniform", "min": 0, "max": 1}, 0.0, 1.0, None, False, False),
        ({"distribution": "int_uniform", "min": -3, "max": 3}, -3, 3, 1, True, False),
        ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25}, 0.0, 1.0, 0.25, False, False),
        ({"distribution": "q_uniform", "min": 0.1, "max": 1, "q": 0.4}, 0.1, 0.9, 0.4, False, False),
        ({"distribution": "q_uniform", "min": 16, "max": 70, "q": 16}, 16, 64, 16, True, False),
        ({"min": 16, "max": 70, "q": 16}, 16, 64, 16, True, False),
        ({"distribution": "log_uniform_values", "min": "1e-4", "max": 1e-2}, 1e-4, 1e-2, None, False, True),
        ({"distribution": "log_uniform", "min": math.log(1e-4), "max": math.log(1e-2)}, 1e-4, 1e-2, None, False, True),
    ],
)
def test_ranges_by_hand(tmp_path, about, low, high, step, is_integer, is_log):
    parameter = only(tmp_path, about)
    assert (parameter.low, parameter.high) == pytest.approx((low, high), rel=1e-12)
    assert (parameter.step, parameter.is_integer, parameter.is_log) == (step, is_integer, is_log)
    distribution = parameter.distribution()
    assert (distribution.low, distribution.high) == pytest.approx((low, high), rel=1e-12)


def test_normal_distributions_are_those_of_their_quantiles(tmp_path):
    plain = only(tmp_path, {"distribution": "normal", "mu": 2, "sigma": 0.5})
    assert plain.decode(0.5) == pytest.approx(2)
    assert plain.decode(0.975) == pytest.approx(2 + 0.5 * 1.959964, rel=1e-6)
    logarithmic = only(tmp_path, {"distribution": "log_normal", "mu": math.log(1e-3), "sigma": 1})
    assert logarithmic.decode(0.5) == pytest.approx(1e-3)
    assert logarithmic.decode(0.841344746) == pytest.approx(1e-3 * math.e, rel=1e-6)
    drawn = [
        plain.decode(draw(make(tmp_path, {"lr": {"mu": 2, "sigma": 0.5}}, method="random"), seed, [])["lr"])
        for seed in range(60)
    ]
    assert statistics.mean(drawn) == pytest.approx(2, abs=0.2)


def test_values_lists_and_nested_names(tmp_path):
    terms = [{"name": "cross_entropy"}, {"name": "emd", "weight": 0.5}]
    sweep = make(
        tmp_path,
        {
            "lr": {"values": ["1e-3", 0.01]},
            "losses": {"values": ["cross_entropy", terms]},
            "optimizer": {"parameters": {"name": {"values": ["sgd", "muon"]}, "momentum": {"value": 0.8}}},
            "grad_clip": {"value": "1e0"},
        },
        method="grid",
    )
    assert [parameter.name for parameter in sweep.parameters] == ["lr", "losses", "optimizer.name"]
    assert sweep.constants == {"optimizer.momentum": 0.8, "grad_clip": 1.0}
    points = [sweep.decode(raw) for raw in sweep.grid()]
    assert len(points) == sweep.grid_size == 8
    assert points[0] == {"lr": 0.001, "losses": "cross_entropy", "optimizer.name": "sgd"}
    assert points[3] == {"lr": 0.001, "losses": terms, "optimizer.name": "muon"}


def test_grid_draws_each_combination_once(tmp_path):
    sweep = make(tmp_path, {"heads": {"values": [1, 2]}, "layers": {"min": 1, "max": 3}}, method="grid")
    drawn = [draw(sweep, 1, [None] * number) for number in range(7)]
    assert drawn[-1] is None
    pairs = [(raw["heads"], raw["layers"]) for raw in drawn[:-1]]
    assert sorted(pairs) == [(heads, layers) for heads in (1, 2) for layers in (1, 2, 3)]
    assert pairs != sorted(pairs)


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_draws_are_a_function_of_seed_and_number(tmp_path, method):
    sweep = make(tmp_path, method=method)
    assert draw(sweep, 1, []) == draw(sweep, 1, [])
    assert draw(sweep, 1, []) != draw(sweep, 2, [])


def test_values_are_put_into_settings():
    settings = {"optimizer": {"name": "adamw"}, "losses": [{"name": "cross_entropy"}, {"name": "emd", "weight": 1.0}], "lr": 1}
    put(settings, "optimizer.name", "sgd")
    put(settings, "losses.1.weight", 0.5)
    put(settings, "noise.thinning", 0.1)
    assert settings == {
        "optimizer": {"name": "sgd"}, "losses": [{"name": "cross_entropy"}, {"name": "emd", "weight": 0.5}], "lr": 1,
        "noise": {"thinning": 0.1},
    }  # fmt: skip
    for name, message in [("losses.2.weight", "a number from 0 to 1, got 2"), ("lr.x", "lr is 1, which has no settings")]:
        with pytest.raises(BadRequest, match=message):
            put(settings, name, 1)


def test_settings_of_a_trial(tmp_path, dataset):
    sweep = make(tmp_path, {"lr": LR, "optimizer.momentum": {"values": [0.5, 0.9]}, "heads": {"value": 4}})
    flags = ["--model", "broad", "--layers", "1", "--width", "16", "--epochs", "1", "--batch-size", "8", "--devices", "0"]
    fixed = read_fixed([*flags, "--dataset-path", str(dataset), "--min-lr", "0"], sweep)
    settings = settings_of_trial(fixed, {"lr": 1e-3, "optimizer.momentum": 0.5})
    assert settings["heads"] == 4
    assert settings["optimizer"] == {"name": "adamw", "momentum": 0.5}
    with pytest.raises(BadRequest, match="`momentum` is a setting of sgd and muon, not of adamw"):
        check_trial(settings)
    request = check_trial(settings_of_trial(fixed, {"lr": 1e-3, "optimizer": {"name": "sgd", "momentum": 0.5}}))
    assert (request.network.heads, request.training.lr) == (4, 1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"method": "bayesian"}, "`method` 'bayesian' is unknown.*bayes"),
        ({"method": None}, "`method` is missing; choose from bayes, grid, random"),
        ({"metod": "bayes"}, "unknown key 'metod'; did you mean 'method'"),
        ({"metric": None}, "`metric` must be a mapping"),
        ({"metric": {"name": "val_loss", "goal": "minimise"}}, "metric.goal: 'minimise' is unknown; did you mean 'minimize'"),
        ({"parameters": {}}, "`parameters` must be a mapping"),
        ({"parameters": {"lr": 1}}, "parameters.lr must be a mapping with `value`"),
        ({"parameters": {"lr": {"value": 1}}}, "only constants"),
        ({"parameters": {"lr": {"values": []}}}, "parameters.lr: `values` must be a list with at least one value, got \\[\\]"),
        ({"parameters": {"lr": {"values": [1, 1.0]}}}, "1.0 is twice in `values`"),
        ({"parameters": {"lr": {"min": 2, "max": 2}}}, "parameters.lr: `min` must be below `max`, got min 2 and max 2"),
        ({"parameters": {"lr": {"min": 2}}}, "parameters.lr: `value`, `values`, or both `min` and `max` are needed"),
        ({"parameters": {"lr": {"min": 0, "max": 1, "distribution": "log_uniform_values"}}}, "must be positive, got 0"),
        ({"parameters": {"lr": {"min": 0, "max": 1, "distribution": "log_unifrom_values"}}}, "mean 'log_uniform_values'"),
        ({"parameters": {"lr": {"distribution": "beta", "a": 1}}},
          "beta cannot be expressed here; use uniform, which is the nearest of constant, categorical, uniform, int_uniform, "),
        ({"parameters": {"lr": {"valuess": [1, 2]}}}, "parameters.lr: unknown key 'valuess'; did you mean 'values'"),
        ({"parameters": {"optimizer": {"parameter": {"name": {"values": ["adamw", "muon"]}}}}},
          "parameters.optimizer: unknown key 'parameter'; did you mean 'parameters'"),
        ({"parameters": {"lr": {"distribution": "normal", "sigma": 0}}}, "`sigma` must be positive, got 0"),
        ({"parameters": {"lr": {"distribution": "uniform", "min": 0, "max": ".inf"}}}, "`max` must be a finite number"),
        ({"parameters": {"lr": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 2}}}, "`q` must be positive and at most"),
        ({"parameters": {"lr": {"distribution": "int_uniform", "min": 0.5, "max": 1}}}, "must be integers, got 0.5 and 1"),
        ({"parameters": {"lr": {"distribution": "uniform", "min": 0, "maxx": 1}}}, "`maxx` is no key of the distribution"),
        ({"parameters": {"lr": {"values": [1, 2], "probabilities": [0.1, 0.9]}}}, "`probabilities` cannot be expressed"),
        ({"method": "grid"}, "parameters.lr: a grid needs `values`"),
        ({"method": "grid", "parameters": {"lr": {"min": 1, "max": MAX_GRID + 1}}}, "100001 values in a grid, more than"),
        ({"early_terminate": {"type": "envelope"}}, "`early_terminate` must be a mapping with `type: median`"),
        ({"early_terminate": {"type": "hyperband", "s": 2}}, "early_terminate.s has no meaning for median pruning"),
        ({"early_terminate": {"type": "median", "min_iter": 0}}, "early_terminate.min_iter must be a positive integer, got 0"),
        ({"run_cap": 0}, "run_cap must be a positive integer, got 0"),
        ({"command": ["python"]}, "`command` cannot be used"),
    ],
)  # fmt: skip
def test_bad_sweep_files(tmp_path, content, message):
    with pytest.raises(BadRequest, match=message) as caught:
        make(tmp_path, **content)
    assert str(caught.value).startswith(str(tmp_path / "sweep.yaml"))


def test_sweep_file_that_is_not_yaml(tmp_path):
    (tmp_path / "sweep.yaml").write_text("method: random\nmetric: {name: val_loss\nparameters:\n", encoding="utf-8")
    with pytest.raises(BadRequest) as caught:
        read_sweep(tmp_path / "sweep.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'sweep.yaml'}: it is not valid YAML: ")
    assert str(caught.value).count(str(tmp_path)) == 1
    assert "line 3, column 11" in str(caught.value)
    assert "unicode string" not in str(caught.value)


def test_help_and_flags_of_the_command(capsys):
    with pytest.raises(SystemExit):
        sweep_command.main(["--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: cxt sweep --sweep FILE.yaml --out DIRECTORY")
    assert "cxt.train" not in said.partition("options:")[0]
    own, others = sweep_command.split_flags(["--log-level", "warning", "-q", "--count=2", "--lr", "1e-3", "--log-level=error"])
    assert (own, others) == (["--log-level", "warning", "-q", "--count=2", "--log-level=error"], ["--lr", "1e-3"])


def test_keys_of_wandb_are_noted(tmp_path):
    content = {"program": "train.py", "name": "mine", "method": "random", "metric": {"name": "val_loss"},
               "parameters": {"lr": LR}, "early_terminate": {"type": "hyperband", "min_iter": 3}, "run_cap": 7}  # fmt: skip
    sweep, notes = read_sweep(write(tmp_path / "sweep.yaml", content))
    assert [note.split()[0] for note in notes] == ["program", "name", "early_terminate:"]
    assert (sweep.early.min_iter, sweep.early.min_trials, sweep.run_cap) == (3, 5, 7)


@pytest.mark.parametrize(
    ("parameters", "flags", "message"),
    [
        ({"lrr": LR}, [], "parameters.lrr is no setting of the trainer"),
        ({"learning": LR}, [], "parameters.learning is no setting of the trainer"),
        ({"epoch": {"values": [1, 2]}}, [], "parameters.epoch is no setting of the trainer; did you mean 'epochs'"),
        ({"run_dir": {"values": ["a", "b"]}}, [], "parameters.run_dir cannot be in a sweep"),
        ({"out": {"value": "a"}, "lr": LR}, [], "parameters.out cannot be in a sweep"),
        ({"dataset_path": {"values": ["a", "b"]}}, [], "parameters.dataset_path must be the same in all trials"),
        ({"lr.warmup": LR}, [], "parameters.lr.warmup: lr has no settings inside it"),
        ({"optimizer.name": {"values": ["sgd"]}, "optimizer": {"values": ["sgd"]}}, [], "one contains the other"),
        ({"lr": LR}, ["--lr", "1"], "lr is in the sweep file and among the flags; remove one"),
        ({"lr": LR}, ["--run-dir", "x"], "--run-dir cannot be used with a sweep"),
        ({"lr": LR}, ["--nodes", "2"], "--nodes must be 1 in a sweep, got 2"),
        ({"lr": LR}, ["--epohcs", "2"], "unknown flag --epohcs; did you mean '--epochs'"),
        ({"lr": LR}, ["--epochs", "0"], "epochs must be a positive integer, got 0"),
    ],
)
def test_bad_parameters_and_flags(tmp_path, parameters, flags, message):
    with pytest.raises(BadRequest, match=message):
        read_fixed(["--model", "broad", *flags], make(tmp_path, parameters))


@pytest.mark.parametrize(
    ("metric", "flags", "message"),
    [
        ("val_los", [], "the metric 'val_los' is not in training_log.csv; did you mean 'val_loss'"),
        ("accuracy", [], "is not in training_log.csv; did you mean 'val_accuracy'"),
        ("val_crps", [], "only in training_log.csv if it is asked for; add --metrics crps"),
        ("val_loss/emdd", [], "did you mean 'val_loss/emd'"),
        ("val_mse", ["--decode-items", "0"], "the metric val_mse needs decoded test examples"),
        ("val_r", ["--objective", "masked"], "the objective masked predicts no times"),
        ("val_loss/emd", [], "not in training_log.csv with the objective autoregressive: its loss has one term only"),
        ("val_loss/cross_entropy", [], "its loss has one term only; choose val_loss or train_loss"),
        ("val_loss/mse", ["--losses", TWO], "with the objective autoregressive: its terms are cross_entropy, emd"),
        ("train_loss/marginal_emd", ["--losses", TWO], "its terms are cross_entropy, emd"),
        ("val_loss/distillation", ["--objective", "joint"], "its terms are cross_entropy, marginal_cross_entropy"),
        ("val_loss/poisson", ["--objective", "masked"], "with the objective masked: its loss has one term only"),
    ],
)
def test_metrics_that_the_log_does_not_have(tmp_path, metric, flags, message):
    with pytest.raises(BadRequest, match=message):
        read_fixed(flags, make(tmp_path, metric={"name": metric}))


@pytest.mark.parametrize(
    ("metric", "parameters", "message"),
    [
        ("val_loss/emd", {"losses": {"values": ["cross_entropy", json.loads(TWO)]}}, r"in trials with losses: cross_entropy"),
        ("val_loss/emd", {"losses": {"values": [json.loads(TWO), [{"name": "emd"}, {"name": "z_loss"}]]}}, None),
        ("val_loss/emd", {"losses.1.name": {"values": ["emd", "mse"]}}, r"in trials with losses.1.name: mse"),
        ("val_loss/emd", {"losses.1.weight": {"min": 0.1, "max": 1.0}}, None),
        ("val_loss/marginal_emd", {"objective": {"values": ["joint", "marginal"]}}, r"trials with objective: marginal\)"),
        ("val_loss/emd", {"objective": {"values": ["joint", "marginal"]}}, None),
        ("val_mse", {"objective": {"values": ["autoregressive", "masked"]}}, "masked predicts no times"),
        ("val_loss", {"losses.1.weight": {"min": 0.1, "max": 1.0}}, "cannot be compared between trials with different losses;"),
        ("train_loss", {"regions.shortest": {"values": [2, 9]}}, "cannot be compared between trials with different regions;"),
        ("train_loss/emd", {"noise.thinning": {"values": [0, 0.5]}}, "cannot be compared between trials with different noise;"),
        ("val_loss", {"regions.shortest": {"values": [2, 9]}}, None),
        ("train_loss", {"joint_weight": {"values": [1, 2]}}, "trials with different joint_weight; choose val_mse"),
        ("val_loss", {"objective": {"values": ["joint", "marginal"]}, "lr": LR}, "trials with different objective"),
        ("val_mse", {"losses.1.weight": {"min": 0.1, "max": 1.0}}, None),
    ],
)  # fmt: skip
def test_metrics_of_all_trials(tmp_path, metric, parameters, message):
    """What a parameter changes about the loss, before the first trial."""
    sweep = make(tmp_path, parameters, metric={"name": metric})
    flags = [] if "losses" in parameters else ["--losses", TWO]
    if message is None:
        read_fixed(flags, sweep)
        return
    with pytest.raises(BadRequest, match=message):
        read_fixed(flags, sweep)


@pytest.mark.parametrize("objective", get_args(Objective))
def test_terms_are_those_of_the_objectives(objective):
    training = TrainingConfig(objective=objective, losses=json.loads(TWO))
    network = ModelConfig(layers=1, heads=2, width=16, windows=10, samples=10, scales=2)
    model = build_model(network, None)
    assert list_loss_terms(training) == list(build_objective(model, training, scales=[2, 4]).names)


def test_batches_of_validation_are_refused_with_another_batch_size(tmp_path):
    sweep = make(tmp_path, {"batch_size": {"values": [4, 8]}})
    flags = ["--simulate", "constant", "--window-size", "2000", "--max-steps", "3"]
    with pytest.raises(BadRequest, match="--eval-max-batches is a number of batches, .*--eval-samples instead"):
        read_fixed([*flags, "--eval-max-batches", "2"], sweep)
    read_fixed([*flags, "--eval-samples", "8"], sweep)
    read_fixed([*flags, "--eval-max-batches", "2"], make(tmp_path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--sweep and --out must be given"),
        (["--sweep", "S", "--out", "o", "--count", "0"], "--count must be a positive integer, got 0"),
        (["--sweep", "S", "--out", "o", "--sampler-seed", "-1"], "--sampler-seed must be"),
        (["--sweep", "S", "--out", "o"], "--count must be given"),
        (["--sweep", "S", "--out", "o", "--count", "2", "--resume"], "--resume cannot be used with a sweep"),
        (["--sweep", "S", "--out", "o", "--count", "2"], "none of 50 combinations .* the first: either --dataset-path"),
        (["--sweep=missing.yaml", "--out=o", "--count=2"], "missing.yaml cannot be read"),
    ],
)
def test_bad_commands(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cxt.sweeps.worker.listen", lambda handler: None)
    write(tmp_path / "S", {"method": "random", "metric": {"name": "val_loss"}, "parameters": {"lr": LR}})
    with pytest.raises(BadRequest, match=message):
        sweep_command.main(words)
    assert not (tmp_path / "o" / "study.db").exists()


def test_metric_of_the_published_weights():
    rows = [
        {"step": 1, "val_loss": 3.0, "val_mse": 0.5}, {"step": 2, "val_loss": 2.0, "val_mse": 0.7},
        {"step": 3, "val_loss": None, "val_mse": None}, {"step": 4, "val_loss": 2.5, "val_mse": 0.6},
    ]  # fmt: skip
    assert metric_at_end(rows, "val_mse", export="last") == 0.6
    assert metric_at_end(rows, "val_mse", export="best") == 0.7
    assert metric_at_end([], "val_mse", export="last") is None
    assert metric_at_end(rows[:3], "val_mse", export="last") is None


@pytest.mark.slow
def test_study(tmp_path):
    """Trials are taken one by one, continued after an interruption, pruned below the median, and counted once."""
    early = {"type": "median", "min_iter": 2, "min_trials": 2}
    sweep = make(tmp_path, early_terminate=early)
    out = tmp_path / "out"
    study = Study(out, sweep, seed=1, identity={"--epochs": 2})
    for value in (1.0, 3.0):
        claim = study.take(4)
        study.report(claim, 1, value)
        study.report(claim, 2, value)
        assert not study.should_prune(claim)
        study.finish(claim, "COMPLETE", value=value, about={"steps": 5, "seconds": 1.0, "reason": ""})
    third = study.take(4)
    study.report(third, 1, 9.0)
    assert not study.should_prune(third)  # before min_iter
    other = Study(out, sweep, seed=1, identity={"--epochs": 2})
    fourth = other.take(4)  # as another process would, beside the third
    assert (third.number, fourth.number, third.continues, fourth.continues) == (2, 3, False, False)
    assert other.take(4) is None
    assert other.running_elsewhere() == 2
    third.lock.close()  # as if its process had been killed
    again = other.take(4)
    assert (again.number, again.continues, again.values) == (2, True, third.values)
    other.report(again, 1, 8.0)  # reported before: not changed
    assert other.trials()[2].intermediate_values == {1: 9.0}
    other.report(again, 2, 9.0)
    assert other.should_prune(again)  # above 2, the median of 1 and 3
    other.finish(again, "PRUNED", value=None, about={"steps": 4, "seconds": 1.0, "reason": "worse"})
    other.finish(fourth, "FAIL", value=None, about={"steps": 0, "seconds": 0.0, "reason": "not finite"})
    assert study.take(4) is None
    assert [trial.number for trial in complete_trials(study)] == [0, 1]
    write_csv(study, out / "sweep.csv")
    with open(out / "sweep.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["complete", "complete", "pruned", "failed"]
    assert [row["reason"] for row in rows] == ["", "", "worse", "not finite"]
    assert float(rows[0]["lr"]) == study.trials()[0].params["lr"]
    changed = make(tmp_path, {"lr": LR | {"max": 0.5}}, early_terminate=early)
    with pytest.raises(BadRequest, match=r"holds another sweep, of .*--epochs 2 instead of 3"):
        Study(out, sweep, seed=1, identity={"--epochs": 3})
    with pytest.raises(BadRequest, match=r"--sampler-seed 1 instead of 2"):
        Study(out, sweep, seed=2, identity={"--epochs": 2})
    assert changed.about != sweep.about
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "study.db").write_text("no database, but text that is long enough to be read as one" * 99)
    with pytest.raises(BadRequest, match="is no study of a sweep, or damaged"):
        Study(tmp_path / "damaged", sweep, seed=1, identity={})
