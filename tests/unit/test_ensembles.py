"""Ensembles: their distributions are the plain mean of their members', in prediction and evaluation."""

import numpy as np
import pytest
import torch
import yaml
from helpers.repository import TINY
from helpers.simulations import constant_scenario, simulate
from helpers.training import objective_record

import cxt
from cxt import evaluate as evaluate_stage
from cxt.checkpoints.file import write_checkpoint
from cxt.checkpoints.record import build_checkpoint_record
from cxt.config.file import load
from cxt.config.network import ModelConfig
from cxt.config.variants import list_variants
from cxt.errors import BadRequest
from cxt.evaluation.finished import finished_directory
from cxt.evaluation.protocol import evaluate
from cxt.model.adapter import build_model
from cxt.scenarios.batches import write_batch
from cxt.scenarios.indices import EVALUATION_START
from cxt.workflow.lineages import evaluation_lineage
from cxt.workflow.translations import find_translation_checkpoint

WINDOW, WINDOWS = 1000, 20
LENGTH = WINDOW * WINDOWS
SIZES = {
    "layers": 1,
    "heads": 2,
    "width": 16,
    "windows": WINDOWS,
    "window_size": WINDOW,
    "samples": 10,
    "scales": 2,
    "bins": 24,
}


def save(path, *, seed, objective="marginal", scales=(2, 4), missing=False, **changes):
    """A checkpoint with random weights, such that predictions depend on the input."""
    config = ModelConfig(**SIZES | changes)
    torch.manual_seed(seed)
    model = build_model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    dataset = {"scales": list(scales), "missing": missing}
    record = build_checkpoint_record(
        config, None, name=path.stem, lineage=f"lineage of {path.stem}", dataset=dataset, **objective_record(objective)
    )
    write_checkpoint(path, model.state_dict(), record)
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Three members, of which two are read in one pass and one by sampling."""
    directory = tmp_path_factory.mktemp("members")
    objectives = ("marginal", "autoregressive", "marginal")
    return [save(directory / f"m.r{seed}.ckpt", seed=seed, objective=one) for seed, one in enumerate(objectives)]


@pytest.fixture(scope="module")
def ts():
    return simulate(seed=1, length=3 * LENGTH)


def test_the_distribution_is_the_mean_of_the_members(paths, ts):
    models = [cxt.load_model(path) for path in paths]
    pairs, settings = [(0, 1), (7, 2), (3, 4)], {"replicates": 3, "seed": 5}
    together = cxt.predict_ts(models, ts, pairs, **settings)
    alone = [cxt.predict_ts(model, ts, pairs, **settings) for model in models]
    total = np.zeros_like(alone[0].distribution, dtype=float)
    for one in alone:
        total += one.distribution
    np.testing.assert_allclose(together.distribution, total / 3, atol=1e-6)
    np.testing.assert_allclose(together.distribution.sum(-1), 1, atol=1e-5)
    assert max(np.abs(one.distribution - together.distribution).max() for one in alone) > 0.01
    assert together.grid == alone[0].grid
    np.testing.assert_array_equal(together.edges, alone[0].edges)
    genotypes = ts.genotype_matrix()
    by_arrays = cxt.predict(
        tuple(models), genotypes, ts.sites_position, pairs, sequence_length=3 * LENGTH, batch_size=2, **settings
    )
    np.testing.assert_allclose(by_arrays.distribution, together.distribution, atol=1e-5)
    # A list of one is that one, and the order changes rounding only.
    np.testing.assert_array_equal(cxt.predict_ts(models[:1], ts, pairs, **settings).distribution, alone[0].distribution)
    np.testing.assert_allclose(
        cxt.predict_ts(models[::-1], ts, pairs, **settings).distribution, together.distribution, atol=1e-6
    )
    assert not any(model.training for model in models)


def test_members_that_read_rates_share_a_shifted_grid(tmp_path, ts):
    models = [cxt.load_model(save(tmp_path / f"{seed}.ckpt", seed=seed, reads_rates=True)) for seed in (1, 2)]
    rates = {"mutation_rate": 2e-7, "recombination_rate": 1e-8}
    together = cxt.predict_ts(models, ts, [(0, 1)], **rates)
    alone = [cxt.predict_ts(model, ts, [(0, 1)], **rates) for model in models]
    np.testing.assert_allclose(together.distribution, np.mean([one.distribution for one in alone], axis=0), atol=1e-6)
    assert together.grid == alone[0].grid == alone[1].grid
    assert together.grid.low != models[0].config.grid_low


def test_training_mode_is_restored(paths, ts):
    models = [cxt.load_model(path) for path in paths[:2]]
    models[1].train()
    cxt.predict_ts(models, ts, [(0, 1)], replicates=1)
    assert [model.training for model in models] == [False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": 10}, r"model 1 cannot be averaged with model 0, because it reads another input: windows 10 instead of 20"),
        ({"window_size": 500}, "window size 500 instead of 1000"),
        ({"samples": 8}, "samples 8 instead of 10"),
        ({"scales": (2, 8)}, r"scales \[2, 8\] instead of \[2, 4\]"),
        ({"bins": 30}, r"bins of ln TMRCA \(30, .*\) instead of \(24, .*\)"),
        ({"reads_rates": True}, "reads_rates True instead of False"),
        ({"mask_singletons": False, "missing": True}, "missing data True instead of False"),
    ],
)
def test_members_with_another_input_are_refused(changes, message, tmp_path, paths, ts):
    other = save(tmp_path / "other.ckpt", seed=1, **changes)
    with pytest.raises(BadRequest, match=message):
        cxt.predict_ts([cxt.load_model(paths[0]), cxt.load_model(other)], ts, [(0, 1)])


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "model is an empty list; pass one or more models"),
        (["small"], "model must be a loaded model, got 'small'"),
        ("small", "model must be a loaded model, got 'small'"),
        (None, "model must be a loaded model, got None"),
    ],
)
def test_what_is_no_model(models, message, ts):
    with pytest.raises(BadRequest, match=message):
        cxt.predict_ts(models, ts, [(0, 1)])


def test_members_that_cannot_be_read_in_one_way(paths, ts):
    models = [cxt.load_model(path) for path in paths]
    with pytest.raises(BadRequest, match="objective autoregressive, so that reading must be sampled, got 'marginal'"):
        cxt.predict_ts(models, ts, [(0, 1)], reading="marginal")


# Evaluation

SPEC = {
    "window_size": WINDOW, "sequence_length": LENGTH, "samples": 10, "pairs": 5, "scales": [2, 4], "replicates": 2,
    "batch_size": 4, "seed": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    path = tmp_path_factory.mktemp("batch") / "b.trees.batch"
    write_batch(path, list_variants("constant", constant_scenario())[0].spec, start=EVALUATION_START, count=3, seed=1)
    return [{"path": str(path), "scenario": "constant", "start": EVALUATION_START, "count": 3}]


def quietly(*arguments, **more):
    return evaluate(*arguments, progress=lambda _: None, **more)


def test_evaluating_an_ensemble(paths, batches):
    together, tracks = quietly(paths, SPEC, batches, ensemble="both")
    alone = [quietly(path, SPEC, batches) for path in paths]
    means = [of_one["constant"][1] for _, of_one in alone]
    np.testing.assert_allclose(tracks["constant"][1], np.mean(means, axis=0), atol=1e-6)
    np.testing.assert_array_equal(tracks["constant"][0], alone[0][1]["constant"][0])
    # Squared error is convex.
    assert together["overall"]["mse"] < np.mean([result["overall"]["mse"] for result, _ in alone])
    assert together["checkpoint"] == "both"
    assert together["members"] == ["m.r0", "m.r1", "m.r2"]
    assert together["checkpoint_lineage"] == ["lineage of m.r0", "lineage of m.r1", "lineage of m.r2"]
    assert together["settings"]["reading"] == "as trained"
    assert together["estimate"].endswith("averaged over 3 members")
    same, _ = quietly([paths[0], paths[2]], SPEC, batches, ensemble="same")
    assert same["settings"]["reading"] == "marginal"
    assert "members" not in alone[0][0]
    with pytest.raises(BadRequest, match="ensemble 'm.r1': one of its members has this name; choose another name"):
        quietly(paths, SPEC, batches, ensemble="m.r1")


def test_readings_that_all_members_have(tmp_path, paths, batches):
    joint = [save(tmp_path / f"{seed}.ckpt", seed=seed, objective="joint") for seed in (1, 2)]
    both, _ = quietly(joint, SPEC, batches, ensemble="both")
    sampled, _ = quietly(joint, SPEC | {"reading": "sampled"}, batches, ensemble="both")
    assert both["sampled"]["scenarios"] == sampled["scenarios"]
    mixed, _ = quietly([joint[0], paths[0]], SPEC, batches, ensemble="mixed")
    assert "sampled" not in mixed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["{0}", "{1}"],
            "2 checkpoints: .*; name their ensemble with --ensemble NAME to evaluate the mean of their distributions",
        ),
        (["{0}", "--ensemble", "x"], "ensemble 'x': an ensemble has two or more members, got .*m.r0.ckpt"),
        (["{0}", "{0}", "--ensemble", "x"], "ensemble 'x': .*m.r0.ckpt is given more than once"),
        (["{0}", "{1}", "--ensemble", "a/b"], "--ensemble 'a/b': a name must start with a letter or digit"),
        (
            ["{0}", "{other}", "--ensemble", "x"],
            "other.ckpt cannot be averaged with .*m.r0.ckpt, .*: window_size 500 instead of 1000",
        ),
        (["{0}", "--checkpoint", "{1}", "--ensemble", "x"], "checkpoints were given twice"),
    ],
)
def test_commands_that_are_refused(words, message, paths, tmp_path):
    other = save(tmp_path / "other.ckpt", seed=1, window_size=500)
    arguments = [word.format(*paths, other=other) for word in words]
    with pytest.raises(BadRequest, match=message):
        evaluate_stage.main([*arguments, "--scenarios", "constant", "--simulations", "1"])


def test_evaluating_on_scenarios(paths, tmp_path, capsys):
    names = [str(path) for path in paths[::2]]
    settings = ["--scenarios", "constant", "--simulations", "1", "--pairs", "2", "--out", str(tmp_path / "out")]
    evaluate_stage.main([*names, "--ensemble", "mine", *settings])
    assert "| mine       | constant " in capsys.readouterr().out
    assert (tmp_path / "out" / "evaluation-tracks.png").is_file()


def test_lineages_that_are_checked(paths, batches):
    lineages = [f"lineage of m.r{number}" for number in range(3)]
    quietly(paths, SPEC, batches, ensemble="x", checkpoint_lineage=lineages)
    with pytest.raises(BadRequest, match="m.r1.ckpt is not the planned one"):
        quietly(paths, SPEC, batches, ensemble="x", checkpoint_lineage=[lineages[0], "another", lineages[2]])
    with pytest.raises(BadRequest, match="3 checkpoints, but 2 lineages"):
        quietly(paths, SPEC, batches, ensemble="x", checkpoint_lineage=lineages[:2])


def test_finished_evaluations_of_ensembles(paths, tmp_path):
    def place(checkpoints, ensemble=None):
        return finished_directory(tmp_path, lineage="l", checkpoints=checkpoints, device="cpu", ensemble=ensemble)

    assert place(paths[:1]).name.startswith("m.r0-")
    assert place(paths, "x").name.startswith("x-")
    assert len({place(paths[:1]), place(paths[:2], "x"), place(paths, "x"), place(paths[::-1], "x")}) == 4


# The configuration


def resolved(path, **sections) -> dict:
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return load([TINY, path])


def test_ensembles_of_a_configuration(tmp_path):
    again = {"preset": "narrow", "dataset": "processed_narrow", "architecture": {"reads_rates": True}}
    models = {"narrow": {"repeats": 2, "ensemble": True}, "again": again}
    config = resolved(tmp_path / "o.yaml", models=models, ensembles={"all": ["narrow", "again"], "two": ["again", "narrow.r1"]})
    assert config["ensembles"] == {
        "narrow.ensemble": ["narrow.r0", "narrow.r1"],
        "all": ["narrow.r0", "narrow.r1", "again"],
        "two": ["again", "narrow.r1"],
    }
    lineages = {name: evaluation_lineage(config, name) for name in (*config["ensembles"], "narrow.r0", "again")}
    assert len(set(lineages.values())) == 5
    again["training"] = {"lr": 1e-3, "min_lr": 1e-4}
    other = resolved(tmp_path / "o.yaml", models=models, ensembles={"all": ["narrow", "again"], "two": None})
    assert list(other["ensembles"]) == ["narrow.ensemble", "all"]
    assert evaluation_lineage(other, "narrow.ensemble") == lineages["narrow.ensemble"]
    assert evaluation_lineage(other, "all") != lineages["all"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["narrow", "brod"], "ensembles.x: unknown model 'brod'; did you mean 'broad'"),
        (["narrow"], r"ensembles.x: an ensemble has two or more members, got \['narrow'\]"),
        ([], r"ensembles.x: an ensemble has two or more members, got \[\]"),
        (["narrow", "narrow"], "ensembles.x: narrow is listed more than once"),
        (["broad", "broad_w200"], "'broad_w200' reads another input than 'broad'.*: window_size 200 instead of 2000"),
        (["broad", "broad_adapter"], "samples 10 instead of 50"),
        (["w200_wmissing", "broad_w200"], "missingness False instead of True"),
        ("narrow", "ensembles.x must be a list of names of models, got 'narrow'"),
    ],
)
def test_ensembles_that_are_refused(members, message, tmp_path):
    with pytest.raises(BadRequest, match=message):
        resolved(tmp_path / "o.yaml", ensembles={"x": members})


def test_names_of_ensembles(tmp_path):
    with pytest.raises(BadRequest, match="ensembles.Narrow: the model 'narrow' has this name; rename one of them"):
        resolved(tmp_path / "o.yaml", ensembles={"Narrow": ["narrow", "broad"]})
    with pytest.raises(BadRequest, match="ensembles: 'a/b': a name must start with a letter or digit"):
        resolved(tmp_path / "o.yaml", ensembles={"a/b": ["narrow", "broad"]})
    masked = {"preset": "narrow", "dataset": "processed_narrow", "training": {"objective": "masked"}}
    with pytest.raises(BadRequest, match="'c' cannot be a member, because its objective masked predicts no times"):
        resolved(tmp_path / "o.yaml", models={"c": masked}, ensembles={"x": ["narrow", "c"]})


def test_an_ensemble_is_no_parent_member_or_checkpoint(tmp_path):
    ensembles = {"pair": ["narrow", "broad"]}
    child = {"preset": "narrow", "dataset": "processed_narrow", "checkpoint": "pair"}
    with pytest.raises(BadRequest, match=r"models.child: unknown parent 'pair', which is an ensemble and has no checkpoint"):
        resolved(tmp_path / "o.yaml", models={"child": child}, ensembles=ensembles)
    with pytest.raises(BadRequest, match=r"ensembles.more: unknown model 'pair', which is an ensemble; list its members"):
        resolved(tmp_path / "o.yaml", ensembles=ensembles | {"more": ["pair", "narrow"]})
    config = resolved(tmp_path / "o.yaml", ensembles=ensembles, translate={"x": {"input": "x.vcf", "model": "pair"}})
    with pytest.raises(BadRequest, match=r"translate.x.model: 'pair' is an ensemble; .* such as that of narrow"):
        find_translation_checkpoint(config, "x")


def test_a_parent_that_is_unknown_is_not_the_child_itself(tmp_path):
    child = {"preset": "narrow", "dataset": "processed_narrow", "checkpoint": "small"}
    with pytest.raises(BadRequest) as caught:
        resolved(tmp_path / "o.yaml", models={"child": child})
    message = str(caught.value)
    assert "child," not in message
    assert message.endswith("a checkpoint file is given by its path, such as ./small.ckpt")
