"""Repeats: models that differ in the seed of their training, their names, lineages, and their mean and spread in the table."""

import json

import numpy as np
import pytest
import yaml
from helpers.repository import TINY
from helpers.training import equal, weights

from cxt import train as train_stage
from cxt.config.file import load, merge
from cxt.config.models import build_training_settings
from cxt.config.repeats import list_repeats
from cxt.errors import BadRequest, Failed
from cxt.evaluation.table import COLUMNS, format_accuracy_table
from cxt.logs import read_runs
from cxt.trainer.options import read_options
from cxt.trainer.repeats import list_repeat_options
from cxt.workflow.jobs import list_evaluations
from cxt.workflow.lineages import evaluation_lineage, model_lineage, table_lineage
from cxt.workflow.settings import write_settings


@pytest.fixture
def configuration(tmp_path):
    """Resolves tests/tiny.yaml with overlays, one after another."""

    def resolved(*overlays: dict) -> dict:
        paths = [TINY]
        for number, overlay in enumerate(overlays):
            paths.append(tmp_path / f"{number}.yaml")
            paths[-1].write_text(yaml.safe_dump(overlay), encoding="utf-8")
        return load(paths)

    return resolved


def repeated(name="narrow", **keys) -> dict:
    return {"models": {name: {"repeats": 3} | keys}}


def test_repeats_differ_in_name_and_seed_only(configuration):
    once = configuration()
    config = configuration(repeated(training={"seed": 7, "lr": 1e-3, "min_lr": 1e-4}))
    names = ["narrow.r0", "narrow.r1", "narrow.r2"]
    assert list(config["models"]) == [*names, *list(once["models"])[1:]]
    assert list_repeats(config, "narrow") == names
    settings = [build_training_settings(config, name) for name in names]
    assert [one.pop("seed") for one in settings] == [7, 8, 9]
    assert [one.pop("name") for one in settings] == names
    assert settings[0] == settings[1] == settings[2]
    expected = build_training_settings(
        configuration({"models": {"narrow": {"training": {"lr": 1e-3, "min_lr": 1e-4}}}}), "narrow"
    )
    assert settings[0] == {key: value for key, value in expected.items() if key not in ("seed", "name")}


def test_seeds_count_from_that_of_the_section_training(configuration):
    config = configuration(repeated(), {"training": {"seed": 5}})
    assert [build_training_settings(config, f"narrow.r{number}")["seed"] for number in range(3)] == [5, 6, 7]


def test_nothing_changes_without_repeats(configuration):
    once, removed = (
        configuration(),
        configuration(repeated(ensemble=True), {"models": {"narrow": {"repeats": None, "ensemble": None}}}),
    )
    assert removed == once
    assert not {"repeated", "ensembles"} & once.keys()
    assert configuration({"models": {"narrow": {"ensemble": False}}}) == once
    assert table_lineage(removed) == table_lineage(once)
    config = configuration(repeated())
    for other in ("broad", "broad_w200", "w200_wmissing_adapter"):
        assert model_lineage(config, other) == model_lineage(once, other)
        assert write_settings(config, "models", other) == write_settings(once, "models", other)
        assert write_settings(config, "evaluations", other) == write_settings(once, "evaluations", other)


def test_more_repeats_change_none_that_are_there(configuration):
    one, three, five = (configuration(repeated(repeats=count, ensemble=count > 1)) for count in (1, 3, 5))
    assert next(iter(one["models"])) == "narrow.r0"
    lineages = [model_lineage(five, f"narrow.r{number}") for number in range(5)]
    assert len(set(lineages)) == 5
    assert model_lineage(one, "narrow.r0") == lineages[0]
    assert [model_lineage(three, f"narrow.r{number}") for number in range(3)] == lineages[:3]
    assert evaluation_lineage(three, "narrow.r2") == evaluation_lineage(five, "narrow.r2")
    assert evaluation_lineage(three, "narrow.ensemble") != evaluation_lineage(five, "narrow.ensemble")


def test_children_name_one_repeat(configuration):
    other = configuration(
        repeated("broad"), {"models": {"broad_w200": {"checkpoint": "broad.r1"}, "broad_adapter": {"checkpoint": "broad.r0"}}}
    )
    assert model_lineage(other, "broad_w200") != model_lineage(configuration(), "broad_w200")
    with pytest.raises(BadRequest) as error:
        configuration(repeated("broad"))
    for child in ("broad_w200", "broad_adapter"):
        problem = f"models.{child}.checkpoint: 'broad' is repeated; name one of its repeats, such as 'broad.r0'"
        expected = f"{problem} (broad.r0, broad.r1, broad.r2)"
        assert expected in str(error.value)


def test_repeated_children_are_refused_once(configuration):
    with pytest.raises(BadRequest) as error:
        configuration(
            repeated("broad"),
            repeated("broad_w200"),
            {"models": dict.fromkeys(("broad_adapter", "w200_wmissing", "w200_wmissing_adapter"))},
        )
    assert str(error.value).startswith("models.broad_w200.checkpoint: 'broad' is repeated")
    assert str(error.value).count("is repeated") == 1


MINE = {"preset": "narrow", "dataset": "processed_narrow"}


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        (repeated(repeats=0), "models.narrow.repeats must be an integer from 1 to 1000, got 0"),
        (repeated(repeats=1.5), "models.narrow.repeats must be an integer from 1 to 1000, got 1.5"),
        (repeated(repeats=True), "models.narrow.repeats must be an integer from 1 to 1000, got True"),
        (repeated(ensemble="yes"), "models.narrow.ensemble must be true or false, got 'yes'"),
        ({"models": {"narrow": {"ensemble": True}}}, "models.narrow.ensemble: an ensemble is the mean of repeats"),
        (repeated(repeats=1, ensemble=True), "add `repeats`, of 2 or more"),
        (merge(repeated(), {"models": {"narrow.r1": MINE}}), "its repeats need the name 'narrow.r1', which another entry has"),
        (merge(repeated(ensemble=True), {"models": {"narrow.ensemble": MINE}}), "need the name 'narrow.ensemble'"),
        (merge(repeated(), {"models": {"Narrow.r1": MINE}}), "models 'narrow.r1' and 'Narrow.r1' differ in case only"),
        (repeated(training={"seed": 2**63 - 2}), "the seeds of 3 repeats, from 9223372036854775806, exceed"),
        ({"models": {"x" * 98: MINE | {"repeats": 2}}}, "is longer than 100 characters; shorten it"),
        ({"models": {"student": MINE | {"teacher": "narrow", "training": {"objective": "distill"}}, "narrow": {"repeats": 2}}},
         "models.student.teacher: 'narrow' is repeated; name one of its repeats, such as 'narrow.r0'"),
        (merge(repeated(), {"translate": {"x": {"input": "x.vcf", "model": "narrow"}}}),
         "translate.x.model: 'narrow' is repeated"),
        (repeated(training={"beta1": 2}), "models.narrow.training.beta1 must be"),
    ],
)  # fmt: skip
def test_what_is_refused(configuration, overlay, message):
    with pytest.raises(BadRequest) as error:
        configuration(overlay)
    assert message in str(error.value)


def test_a_problem_of_all_repeats_is_said_once(configuration):
    with pytest.raises(BadRequest) as error:
        configuration(repeated(dataset="processd_narrow"))
    assert str(error.value).count("processd_narrow") == 1


# The table


def made_up_result(name: str, rng: np.random.Generator, scenarios=("constant", "island"), **settings) -> dict:
    """An evaluation with random metrics."""

    def scores() -> dict:
        keys = ("mse", "mse_se", "r", "bias", "coverage95")
        return dict(zip(keys, rng.random(5), strict=True)) | {
            "site": {"r": rng.random()},
            "distribution": {"crps": rng.random()},
            "baseline": {name: {"mse": rng.random(), "r": rng.random()} for name in ("heterozygosity", "constant", "hmm")},
        }

    overall = {key: rng.random() for key in ("mse", "r", "coverage95", "heterozygosity_mse", "hmm_mse", "constant_mse")}
    recent = {key: rng.random() for key in ("mse", "bias", "coverage95")}
    return {
        "checkpoint": name,
        "settings": {"pairs": 2} | settings,
        "scenarios": {scenario: scores() for scenario in scenarios},
        "overall": overall | {"site": {"r": rng.random()}, "distribution": {"crps": rng.random()}, "recent": recent},
    }


def read_table(text: str) -> dict[tuple[str, str], dict[str, str]]:
    """{(checkpoint, scenario): {title: cell}} of the table."""
    header, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return {(line[0], line[1]): dict(zip(header[2:], line[2:], strict=True)) for line in lines}


def test_the_table_has_mean_and_standard_deviation():
    rng = np.random.default_rng(1)
    results = [made_up_result(name, rng) for name in ("other", "m.r0", "m.r1", "m.r2", "m.ensemble")]
    table = read_table(format_accuracy_table(results))
    assert list(dict.fromkeys(name for name, _ in table)) == ["other", "m.r0", "m.r1", "m.r2", "m (3 repeats)", "m.ensemble"]
    group = results[1:4]
    for scenario in ("constant", "island"):
        for title, path in {
            "MSE": ["mse"], "±": ["mse_se"], "r": ["r"], "r per site": ["site", "r"], "CRPS": ["distribution", "crps"],
            "best window MSE": ["baseline", "heterozygosity", "mse"], "HMM MSE": ["baseline", "hmm", "mse"],
        }.items():  # fmt: skip
            values = []
            for result in group:
                value = result["scenarios"][scenario]
                for key in path:
                    value = value[key]
                values.append(value)
            assert table["m (3 repeats)", scenario][title] == f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
        bias = [result["scenarios"][scenario]["bias"] for result in group]
        assert table["m (3 repeats)", scenario]["bias"] == f"{np.mean(bias):+.3f} ± {np.std(bias, ddof=1):.3f}"
        cover = [result["scenarios"][scenario]["coverage95"] for result in group]
        assert table["m (3 repeats)", scenario]["cover 95%"] == f"{np.mean(cover):.1%} ± {np.std(cover, ddof=1):.1%}"
    overall = [result["overall"]["mse"] for result in group]
    assert table["m (3 repeats)", "mean"]["MSE"] == f"{np.mean(overall):.3f} ± {np.std(overall, ddof=1):.3f}"
    assert table["m (3 repeats)", "mean"]["±"] == ""
    assert set(table["m.r0", "constant"]) == set(COLUMNS)


def test_only_repeats_that_can_be_compared_have_a_mean():
    rng = np.random.default_rng(1)

    def summarised(*results: dict) -> list[str]:
        return [name for name, _ in read_table(format_accuracy_table(list(results))) if "repeats" in name]

    first, second = made_up_result("m.r0", rng), made_up_result("m.r1", rng)
    assert summarised(first) == []
    assert summarised(first, made_up_result("m.r1", rng, pairs=3)) == []
    assert summarised(first, made_up_result("m.r1", rng, scenarios=["constant"])) == []
    assert summarised(first, made_up_result("m.r0", rng)) == []  # the same repeat twice
    assert summarised(first, made_up_result("other", rng), second) == ["m (2 repeats)"] * 4
    undefined = made_up_result("m.r1", rng)
    undefined["scenarios"]["constant"]["r"] = None
    table = read_table(format_accuracy_table([first, undefined]))
    assert table["m (2 repeats)", "constant"]["r"] == "-"
    # Rows of other readings, where all repeats have them.
    both = [one | {"sampled": {key: one[key] for key in ("scenarios", "overall")}} for one in (first, second)]
    assert set(summarised(*both)) == {"m (2 repeats)", "m (2 repeats), sampled"}
    assert set(summarised(first, both[1])) == {"m (2 repeats)"}


def test_evaluations_of_repeats(configuration):
    config = configuration(repeated(ensemble=True))
    assert list_evaluations(config) == [*config["models"], "narrow.ensemble"]
    spec = yaml.safe_load(write_settings(config, "evaluations", "narrow.ensemble"))
    assert json.dumps(spec) == json.dumps(yaml.safe_load(write_settings(config, "evaluations", "narrow.r0")))


# `cxt train --repeats`


def test_options_of_repeats():
    words = [
        "--dataset-path",
        "data",
        "--run-dir",
        "runs/x",
        "--seed",
        "4",
        "--out",
        "made/x.y.ckpt",
        "--log-out",
        "made/x.csv",
    ]
    options = read_options(words)
    repeats = list_repeat_options(options, 3)
    assert [one.training.seed for one in repeats] == [4, 5, 6]
    assert [one.name for one in repeats] == ["broad.r0", "broad.r1", "broad.r2"]
    assert [one.run_dir for one in repeats] == ["runs/x/r0", "runs/x/r1", "runs/x/r2"]
    assert (repeats[2].out, repeats[2].log_out) == ("made/x.y.r2.ckpt", "made/x.r2.csv")
    changed = {"name", "seed", "run_dir", "out", "log_out"}
    kept = [{key: value for key, value in one.flatten().items() if key not in changed} for one in (options, *repeats)]
    assert all(one == kept[0] for one in kept)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--repeats needs --run-dir DIRECTORY; the repeats are trained in DIRECTORY/r0"),
        (["--run-dir", "x", "--resume", "x/r1"], "--resume x/r1 cannot be used with --repeats"),
        (["--run-dir", "x", "--nodes", "2"], "--nodes cannot be used with --repeats"),
        (["--run-dir", "x", "--lineage", "abc", "--prolong", "y"], "--prolong, --lineage cannot be used with --repeats"),
        (["--run-dir", "x", "--name", "n" * 98], "the name of a repeat has at most 100 characters"),
    ],
)
def test_flags_that_do_not_go_with_repeats(words, message):
    with pytest.raises(BadRequest, match=message):
        train_stage.main(["--dataset-path", "data", "--repeats", "3", *words])


TINY_RUN = [
    "--layers", "1", "--heads", "2", "--width", "16", "--batch-size", "8", "--max-steps", "1", "--threads", "1",
    "--devices", "0",
]  # fmt: skip


@pytest.mark.slow
def test_training_repeats_by_hand(dataset, tmp_path):
    flags = ["--dataset-path", str(dataset), *TINY_RUN]
    published = ["--run-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "x.ckpt")]
    train_stage.main([*flags, "--seed", "3", *published, "--repeats", "2"])
    first, second = (weights(tmp_path / f"x.r{number}.ckpt") for number in range(2))
    assert not equal(first, second)
    # One of them by itself.
    alone = ["--name", "broad.r1", "--run-dir", str(tmp_path / "alone"), "--out", str(tmp_path / "alone.ckpt")]
    train_stage.main([*flags, "--seed", "4", *alone])
    assert equal(weights(tmp_path / "alone.ckpt"), second)
    assert {(row["model"], row["repeat"]) for row in read_runs(tmp_path / "runs").rows} == {("broad", 0), ("broad", 1)}


@pytest.mark.long
def test_continuing_repeats_and_failing_fast(dataset, tmp_path, capfd):
    flags = ["--dataset-path", str(dataset), *TINY_RUN]
    train_stage.main([*flags, "--run-dir", str(tmp_path / "runs"), "--repeats", "1"])
    capfd.readouterr()
    train_stage.main([*flags, "--run-dir", str(tmp_path / "runs"), "--repeats", "2", "--resume"])
    printed = capfd.readouterr()
    assert (printed.out + printed.err).count("is finished: publishing its checkpoint again") == 1
    assert (tmp_path / "runs" / "r1" / "run.json").is_file()
    with pytest.raises(Failed, match="broad.r0 ended with status 2, see above") as failed:
        train_stage.main([*flags, "--run-dir", str(tmp_path / "wrong"), "--repeats", "2", "--checkpoint", "no-such-file.ckpt"])
    assert failed.value.status == 2
    assert not (tmp_path / "wrong" / "r1").exists()
    train_stage.main([*flags, "--run-dir", str(tmp_path / "profiled"), "--repeats", "2", "--profiler", "simple"])
    assert [path.name for path in sorted((tmp_path / "profiled").iterdir()) if path.is_dir()] == ["r0"]
