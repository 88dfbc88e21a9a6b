"""The edges of the command line: values out of range, names, devices and precision, and an evaluation without preparation."""

import argparse
import json
import logging
import shlex

import numpy as np
import pytest
import torch
import yaml
from helpers.repository import REPOSITORY, run_python
from helpers.simulations import build_dataset, simulate
from helpers.training import SMALL, equal, weights

import cxt
from cxt import evaluate as evaluate_stage
from cxt import train as train_stage
from cxt.benchmark.memory import measure_peak_memory
from cxt.checkpoints.file import read_checkpoint, write_checkpoint
from cxt.checkpoints.inspection import describe_checkpoint
from cxt.checkpoints.run_directory import RunDirectory
from cxt.checkpoints.training_log import read_log
from cxt.config.file import load
from cxt.config.network import PRESETS, AdapterConfig, ModelConfig
from cxt.config.training import TrainingConfig
from cxt.config.type_descriptions import get_limits, list_choices, split_type
from cxt.config.variants import list_variants
from cxt.console import add_verbosity_flags, get_logger, set_verbosity
from cxt.decoding.decode import has_doubles
from cxt.errors import NAMES_ELSEWHERE, BadRequest, suggest_nearest
from cxt.evaluation.protocol import evaluate
from cxt.model.adapter import build_model, freeze_backbone
from cxt.model.memory import activation_bytes, count_parameters, count_trained_parameters
from cxt.scenarios.batches import write_batch
from cxt.scenarios.indices import EVALUATION_START
from cxt.trainer.devices import choose_precision, select_devices
from cxt.trainer.fit import build_data
from cxt.trainer.flag_values import FLAG_VALUES, _pair_words
from cxt.trainer.module import build_loss_function
from cxt.trainer.options import OPTIONS, TRAINING_SETTINGS, build_parser, parse_flags, read_options
from cxt.trainer.request import build_request
from cxt.workflow.lineages import model_lineage

PARSER = build_parser()
DEFAULTS = {action.dest: action.default for action in PARSER._actions}
FINE_TRAINING = [*SMALL, "--epochs", "1"]


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """The run directory of a small finished network."""
    directory = tmp_path_factory.mktemp("edges") / "run"
    train_stage.main([*FINE_TRAINING, "--dataset-path", str(dataset), "--run-dir", str(directory)])
    return RunDirectory(directory)


# Ranges


def wrong_values(name: str) -> list[str]:
    """Values that a flag must refuse: out of range at either end, of another type, and null where there is no such default."""
    kind = FLAG_VALUES[name]
    found = ["abc", *([] if DEFAULTS[name] is None else ["null"])]
    bare, _ = split_type(kind)
    if list_choices(kind) or bare is bool:
        return [*found, "-7"]
    limits = get_limits(kind)
    below = limits.ge if limits.gt is None else limits.gt
    above = limits.le if limits.lt is None else limits.lt
    found += [".nan", ".inf", "1e400"]
    if below is not None:
        found.append(repr(below - 1 if limits.gt is None else below))
    if above is not None:
        found.append(repr(above + 1 if limits.lt is None else above))
    return found + (["2.5"] if bare is int else [])


@pytest.mark.parametrize("name", sorted(FLAG_VALUES))
def test_every_range_on_the_command_line(name, tmp_path):
    """One line, which names the flag; the same for a key of a file, where null is the default."""
    flag = f"--{name.replace('_', '-')}"
    for value in wrong_values(name):
        with pytest.raises(BadRequest) as refused:
            parse_flags([f"{flag}={value}"], PARSER)
        assert str(refused.value).startswith((f"{flag} must be", f"unknown {flag} ")), value
        assert "\n" not in str(refused.value)
        if value != "null":
            (tmp_path / "x.yaml").write_text(f"{name}: {value}\n", encoding="utf-8")
            with pytest.raises(BadRequest, match=f"x.yaml: {name}"):
                parse_flags(["--config", str(tmp_path / "x.yaml")], PARSER)


def test_all_numbers_are_checked():
    """Every flag whose type is a number, a choice, or true or false, so that none can be forgotten."""
    texts = {"help", "config", "model", "name", "dataset_path", "soft_targets", "simulate", "configfile", "checkpoint"}
    texts |= {"resume_adapter", "lora_of", "resume", "log_dir", "run_dir", "out", "log_out", "scratch"}
    texts |= {"simulate_specs", "mlflow", "wandb", "prolong", "parent_sha256"}
    texts |= {name for name in DEFAULTS if name.endswith("lineage")}
    sections = {"distill", "masked", "contrastive", "noise", "losses", "optimizer", "adaptive", "callbacks", "metrics"}
    sections |= {"regions"}
    assert DEFAULTS.keys() - FLAG_VALUES.keys() == texts | sections


def test_flags_of_one_letter_are_no_values():
    """`-q` after a flag whose values are checked, as any command may have it; a negative number is a value."""
    assert list(_pair_words(["--epochs", "3", "-q", "--lr", "-1e-3"])) == [("epochs", "3"), ("lr", "-1e-3")]


def test_all_wrong_values_at_once():
    with pytest.raises(BadRequest, match=r"--beta1 must be a number in \[0, 1\), got 1.5\n  --patience must .*, got null"):
        read_options(["--beta1", "1.5", "--patience", "null"])
    for words in (["--lr"], ["--lr", "1e-3", "0.1"], ["--simulate"]):
        with pytest.raises(BadRequest) as refused:
            read_options(words)
        assert "\n" not in str(refused.value)


def test_a_command_exits_with_2_and_one_line():
    done = run_python("-m", "cxt", "train", "--adapter-dropout", 2, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cxt: --adapter-dropout must be a number in [0, 1), got 2\n"


def test_suggestions_only_when_near():
    names = [action.option_strings[-1] for action in PARSER._actions if action.option_strings]
    assert suggest_nearest("--optimiser", names) == "; did you mean '--optimizer'?"
    assert suggest_nearest("--xyzzy", names) == f"; none of {len(names)} is similar"
    assert "--compile" not in suggest_nearest("--optimize-everything", names)


def test_names_of_other_systems(tmp_path):
    """As flags, as keys of a file, as keys of a configuration, and in Python."""
    for word, name in (
        ("learning_rate", "lr"),
        ("max_epochs", "epochs"),
        ("gradient_clip_val", "grad_clip"),
        ("n_embd", "width"),
    ):
        with pytest.raises(
            BadRequest, match=f"unknown flag --{word.replace('_', '-')}; here it is called '--{name.replace('_', '-')}'"
        ):
            read_options([f"--{word.replace('_', '-')}", "1"])
        (tmp_path / "settings.yaml").write_text(f"{word}: 1\n", encoding="utf-8")
        with pytest.raises(BadRequest, match=f"unknown key '{word}'; here it is called '{name}'"):
            read_options(["--config", str(tmp_path / "settings.yaml")])
        with pytest.raises(BadRequest, match=f"unknown option {word}; here it is called '{name}'"):
            cxt.train_model(**{word: 1})
    (tmp_path / "mine.yaml").write_text("training: {learning_rate: 0.1}\n", encoding="utf-8")
    with pytest.raises(BadRequest, match="training.learning_rate: unknown key; here it is called 'lr'"):
        load([tmp_path / "mine.yaml"])
    assert NAMES_ELSEWHERE.keys() <= {*OPTIONS, *TRAINING_SETTINGS}
    words = [word for several in NAMES_ELSEWHERE.values() for word in several]
    assert len(words) == len({*words} - {*OPTIONS, *TRAINING_SETTINGS})


# Settings in a file


def test_a_file_as_the_first_argument(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("epochs: 3\nlog_level: error\npatience: null\n", encoding="utf-8")
    train_stage.main([str(tmp_path / "x.yaml"), "--lr", "1e-3", "--print-config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["epochs"], printed["lr"], printed["patience"]) == (3, 1e-3, 0)
    assert "log_level" not in printed
    for word in ("x.yml", "broad"):
        with pytest.raises(BadRequest, match="x.yml cannot be read" if word == "x.yml" else "a YAML file of settings"):
            read_options([word])


@pytest.mark.parametrize(("words", "level"), [
    ([], "INFO"), (["-q"], "WARNING"), (["--log-level", "error"], "ERROR"), (["--log-level", "warning", "-v"], "WARNING"),
])  # fmt: skip
def test_log_level(words, level, capsys):
    parser = argparse.ArgumentParser()
    add_verbosity_flags(parser)
    try:
        set_verbosity(parser.parse_args(words))
        assert logging.getLevelName(get_logger("cxt").level) == level
        get_logger("cxt").warning("a note")
        assert ("a note" in capsys.readouterr().err) == (level != "ERROR")
        with pytest.raises(BadRequest, match="unknown log level 'eror'; did you mean 'error'"):
            set_verbosity(parser.parse_args(["--log-level", "eror"]))
    finally:
        set_verbosity(parser.parse_args([]))


@pytest.mark.parametrize(
    ("word", "name"), [("bf16", "bf16-mixed"), ("fp16", "16-mixed"), ("no", "32-true"), ("16", "16-mixed")]
)
def test_precision_words_in_the_workflow(word, name, tmp_path):
    configs = []
    for written in (word, name):
        (tmp_path / "x.yaml").write_text(f"training: {{precision: {written}}}\n", encoding="utf-8")
        configs.append(load([tmp_path / "x.yaml"]))
    assert configs[0]["training"]["precision"] == name
    assert model_lineage(configs[0], "broad") == model_lineage(configs[1], "broad")


# What a run is made of


def test_published_commands_hand_on_their_checkpoints(tmp_path, monkeypatch):
    """Those of docs/howto/published.md as they are written, on small data: without GPUs, and with a smaller network."""
    shape = {"window_size": 1000, "sequence_length": 20_000, "samples": 20, "pairs": 3}
    windows = {"window_size": 500, "sequence_length": 10_000}
    mask = np.random.default_rng(1).random(50_000) < 0.3
    for name, change in {
        "processed_narrow": {}, "processed": {}, "processed_n10": {"samples": 10}, "processed_small_window": windows,
        "processed_small_window_missing_data": windows | {"mask": mask},
        "processed_small_window_missing_data_n10": windows | {"mask": mask, "samples": 10},
    }.items():  # fmt: skip
        build_dataset(tmp_path / "data" / name, **(shape | change))
    text = (REPOSITORY / "docs/howto/published.md").read_text(encoding="utf-8")
    block = text.split("```sh\n")[1].split("```")[0].replace("\\\n", " ")
    monkeypatch.chdir(tmp_path)
    smaller = ["--layers", "2", "--heads", "2", "--width", "16", "--batch-size", "4", "--grad-accum", "1", "--devices", "0"]
    names = []
    for line in block.strip().splitlines():
        words = shlex.split(line.replace("--gpus 0 1 2", ""))[3:]
        train_stage.main([*words, *smaller, "--threads", "1", "--max-steps", "2", "--decode-items", "0"])
        logs = sorted((tmp_path / "lightning_logs").glob("version_?"))
        names += [path.name.partition("_epoch=")[0] for path in (logs[-1] / "checkpoints").glob("*_epoch=*.ckpt")]
    assert names == ["narrow", "broad", "broad_w200", "broad_adapter", "w200_wmissing", "w200_wmissing_adapter"]
    assert read_checkpoint("broad_adapter.ckpt").record["name"] == "broad_adapter"


@pytest.mark.parametrize(
    ("held_out", "more", "noted"), [(1500, [], True), (999, [], False), (1500, ["--validation-items", "500"], False),
                                    (1500, ["--max-steps", "20"], False)]
)  # fmt: skip
def test_long_validations_of_short_runs_are_noted(capsys, held_out, more, noted):
    """The second `--max-steps` counts: 20 steps of 8 examples are more than a tenth of 1500."""
    words = ["--simulate", "constant", "--window-size", "2000", "--eval-samples", str(held_out), "--max-steps", "2"]
    build_request(read_options([*words, "--layers=1", "--heads=2", "--width=16", "--batch-size=8", "--grad-accum=1", *more]))
    note = "note: each validation reads 1,500 test examples, and the whole training only 16; validation_items: 500 takes fewer"
    assert (note in capsys.readouterr().err) == noted


def test_workers_are_capped(dataset, capsys, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2})
    request = build_request(read_options([*FINE_TRAINING, "--dataset-path", str(dataset), "--workers", "64"]))
    assert "note: 64 workers, but this process may use only 3 cores: using 3 workers" in capsys.readouterr().err
    assert build_data(request).workers == 3
    assert request.settings["workers"] == 64


def test_batch_size_eval(dataset, run, tmp_path):
    """Other batches of validation change no weight, and losses by rounding only; it is no part of the run's identity."""
    arguments = [*FINE_TRAINING, "--dataset-path", str(dataset), "--run-dir", str(tmp_path / "run")]
    train_stage.main([*arguments, "--batch-size-eval", "5"])
    other = RunDirectory(tmp_path / "run")
    assert equal(weights(run.finished_checkpoint()), weights(other.finished_checkpoint()))
    assert run.read_record()["identity"] == other.read_record()["identity"]
    for key in ("val_loss", "val_mse"):
        one, two = ([row[key] for row in read_log(which.log) if row[key] is not None] for which in (run, other))
        assert one
        assert one == pytest.approx(two, rel=1e-4)
    assert "batch_size_eval" not in read_checkpoint(run.finished_checkpoint()).record["training"]
    with pytest.raises(BadRequest, match="contrastive compares the examples of a batch, but batch_size_eval is 1"):
        build_request(read_options([*arguments, "--objective", "contrastive", "--batch-size-eval", "1"]))


def test_find_lr_from_python(dataset, tmp_path):
    settings = {"layers": 1, "heads": 2, "width": 16, "batch_size": 4, "grad_accum": 1, "devices": 0, "threads": 1}
    found = cxt.find_lr(dataset_path=dataset, num_steps=25, plot=tmp_path / "lr.png", **settings)
    assert 1e-6 <= found.suggestion <= 1e-2
    assert (found.rates[0], found.rates[-1]) == pytest.approx((1e-6, 1e-2))
    assert len(found.rates) == len(found.losses) == 25
    assert (tmp_path / "lr.png").is_file()
    with pytest.raises(BadRequest, match="--num-steps must be a whole number from 20"):
        cxt.find_lr(dataset_path=dataset, num_steps=3)
    with pytest.raises(BadRequest, match="unknown option learning_rate"):
        cxt.find_lr(dataset_path=dataset, learning_rate=1)


# Devices and precision


@pytest.mark.parametrize(("words", "gpus", "mps", "chosen"), [
    ([], 0, False, ("cpu", 1)), ([], 2, False, ("gpu", 1)), ([], 0, True, ("cpu", 1)),
    (["--devices", "all"], 3, False, ("gpu", 3)), (["--devices", "2"], 3, False, ("gpu", 2)),
    (["--gpus", "1"], 2, False, ("gpu", [1])), (["--devices", "0"], 2, True, ("cpu", 1)),
    (["--accelerator", "cpu", "--devices", "2"], 2, False, ("cpu", 2)),
    (["--accelerator", "mps"], 0, True, ("mps", 1)), (["--accelerator", "mps", "--devices", "all"], 0, True, ("mps", 1)),
])  # fmt: skip
def test_choice_of_devices(words, gpus, mps, chosen, capsys):
    assert select_devices(read_options(words), gpus_present=gpus, has_mps=mps) == chosen
    assert ("--accelerator mps uses the GPU of this computer" in capsys.readouterr().err) == (not words and mps)


@pytest.mark.parametrize(("words", "gpus", "message"), [
    (["--devices", "all"], 0, "--devices all, but torch sees no GPU; use --devices 0"),
    (["--accelerator", "mps"], 1, "torch sees no Apple GPU"),
    (["--accelerator", "cpu", "--devices", "all"], 1, "--devices all means all GPUs"),
    (["--devices", "all", "--gpus", "0"], 1, "cannot be used together"),
])  # fmt: skip
def test_refused_devices(words, gpus, message):
    with pytest.raises(BadRequest, match=message):
        select_devices(read_options(words), gpus_present=gpus, has_mps=False)
    if "mps" in words:
        for more in (["--gpus", "0"], ["--devices", "2"], ["--nodes", "2"]):
            with pytest.raises(BadRequest, match="one GPU of one machine"):
                select_devices(read_options([*words, *more]), gpus_present=2, has_mps=True)


def test_choice_of_precision():
    assert choose_precision("bf16-mixed", "gpu", has_bfloat16=True) == "bf16-mixed"
    assert choose_precision("bf16-mixed", "gpu", has_bfloat16=False) == "16-mixed"
    assert choose_precision("16-mixed", "gpu", has_bfloat16=False) == "16-mixed"
    assert choose_precision("32-true", "gpu", has_bfloat16=False) == "32-true"
    assert {choose_precision("bf16-mixed", kind, has_bfloat16=False) for kind in ("cpu", "mps")} == {"32-true"}
    with pytest.raises(BadRequest, match="bf16-true needs a GPU with bfloat16"):
        choose_precision("bf16-true", "gpu", has_bfloat16=False)
    assert (has_doubles("cpu"), has_doubles("cuda:0"), has_doubles("mps")) == (True, True, False)


def test_bfloat16_checkpoints(run, tmp_path):
    """Loaded in 32 bits by default, in their own type when asked; they say which it is, and can be used in it."""
    stored = read_checkpoint(run.finished_checkpoint())
    halves = {name: value.bfloat16() for name, value in stored.state_dict.items()}
    write_checkpoint(tmp_path / "half.ckpt", halves, stored.record)
    assert "parameters in bfloat16" in describe_checkpoint(tmp_path / "half.ckpt")
    assert "parameters in" not in describe_checkpoint(run.finished_checkpoint())
    full, half = cxt.load_model(tmp_path / "half.ckpt"), cxt.load_model(tmp_path / "half.ckpt", dtype="stored")
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in cxt.load_model(run.path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in cxt.load_model(run.path, dtype="stored").parameters()} == {torch.float32}
    ts = simulate(seed=1, length=20_000, individuals=10)
    options = {"pairs": [(0, 1), (2, 9)], "replicates": 2, "seed": 1}
    with pytest.warns(cxt.OutsideTraining):
        one, other = (cxt.predict_ts(model, ts, **options) for model in (full, half))
    assert np.abs(one.log_tmrca - other.log_tmrca).max() < 0.1
    with pytest.raises(BadRequest, match="unknown dtype 'float16'; did you mean 'bfloat16'"):
        cxt.load_model(run.path, dtype="float16")


# Memory


@pytest.mark.parametrize(("sizes", "settings", "adapted"), [
    ({}, {}, False), ({"dropout": 0.0}, {"objective": "marginal"}, False), ({}, {"gradient_checkpointing": True}, False),
    ({"dropout": 0.0}, {"loss_path": "full"}, False), ({}, {"loss_path": "chunked"}, False), ({}, {}, True),
])  # fmt: skip
def test_activation_memory_is_what_is_measured(sizes, settings, adapted):
    network = ModelConfig(**({"layers": 3, "heads": 2, "width": 64, "windows": 60, "samples": 20, "scales": 4} | sizes))
    training, adapter = TrainingConfig(batch_size=6, **settings), AdapterConfig(samples=8) if adapted else None
    model = build_model(network, adapter).train()
    if adapted:
        freeze_backbone(model)
    loss = build_loss_function(model, training, scales=[2, 4, 8, 16])
    counts = torch.randint(0, 9, (6, 2, 4, 60, 8 if adapted else 20), dtype=torch.int16)
    tokens = torch.randint(2, network.vocabulary, (6, 61))
    loss(counts, None, tokens).backward()  # allocates the gradients
    measured = measure_peak_memory(lambda: loss(counts, None, tokens).backward(), "cpu")
    assert activation_bytes(network, training, adapter, precision="32-true", on_gpu=False) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("strategy", [None, "none", "ln", "lastN", "ln_lastN", "all"])
def test_parameters_are_those_of_the_network(strategy):
    network = PRESETS["broad"].replace(reads_rates=strategy is None, separate_embeddings=strategy == "all")
    adapter = None if strategy is None else AdapterConfig(samples=10, unfreeze_strategy=strategy)
    with torch.device("meta"):
        model = build_model(network, adapter)
        if adapter is not None:
            freeze_backbone(model)
    assert sum(count_parameters(network).values()) == sum(p.numel() for p in model.backbone.parameters())
    trained = sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)
    assert count_trained_parameters(network, adapter, None) == trained


# Evaluation on scenarios


def test_evaluate_on_scenarios(run, tmp_path, capsys):
    """For a run directory, without anything that was made before: the same as on a batch that is simulated by hand."""
    settings = ["--simulations", "3", "--pairs", "4", "--replicates", "2", "--threads", "1", "--seed", "5"]
    evaluate_stage.main([str(run.path), "--scenarios", "constant", "island", *settings, "--out", str(tmp_path / "out")])
    table = capsys.readouterr().out
    assert [line.split("|")[2].strip() for line in table.splitlines()[2:]] == ["constant", "island", "mean", "below 1000 gen."]
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "evaluation-calibration.png", "evaluation-scatter.png", "evaluation-tracks.png",
    ]  # fmt: skip
    config = load()
    shape = {"window_size": 1000, "sequence_length": 20_000, "samples": 20, "scales": [2, 4]}
    (variant,) = list_variants("constant", config["scenarios"]["constant"] | {"sequence_length": 20_000})
    write_batch(tmp_path / "batch", variant.spec, start=EVALUATION_START, count=3, seed=5)
    batch = {"path": tmp_path / "batch", "scenario": "constant", "start": EVALUATION_START, "count": 3}
    spec = shape | {"pairs": 4, "replicates": 2, "batch_size": config["evaluation"]["batch_size"], "seed": 5}
    by_hand, _ = evaluate(run.path, spec, [batch], threads=1, progress=lambda _: None)
    assert json.loads(json.dumps(by_hand["scenarios"]["constant"])) == result["scenarios"]["constant"]


EVALUATIONS = [
    (["--scenarios", "constnt"], "unknown scenario 'constnt'; did you mean 'constant'"),
    (["--scenarios", "constant", "--simulations", "0"], "--simulations must be a positive integer, got 0"),
    (["--scenarios", "constant", "--simulations", "few"], "--simulations must be a positive integer, got 'few'"),
    (["--scenarios", "constant", "--pairs", "-1"], "--pairs must be a positive integer, got -1"),
    (["--scenarios", "constant", "--pairs", "500"], "--pairs 500, but the 20 samples .* have only 190"),
    (["--scenarios", "constant", "--reading", "sampld"], "unknown --reading 'sampld'; did you mean 'sampled'"),
    (["--scenarios", "constant", "--spec", "{}"], "--spec cannot be used with --scenarios"),
    (["--pairs", "3"], "--pairs cannot be used without --scenarios"),
    ([], "--spec, --batches, --out, --figures must be given, unless --table or --scenarios is"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), EVALUATIONS, ids=[" ".join(words) for words, _ in EVALUATIONS])
def test_refused_evaluations(words, message, run):
    with pytest.raises(BadRequest, match=message):
        evaluate_stage.main([str(run.finished_checkpoint()), *words])


@pytest.mark.slow
def test_a_shipped_checkpoint_is_evaluated_by_its_name(capsys):
    """With a synthetic mask, which it needs."""
    small = ["--simulations", "1", "--pairs", "2", "--threads", "1"]
    evaluate_stage.main(["small_n10", "--scenarios", "constant", *small])
    captured = capsys.readouterr()
    assert "rates inferred | constant" in captured.out
    assert "a synthetic mask makes" in captured.err
    with pytest.raises(BadRequest, match="no checkpoint 'smal'"):
        evaluate_stage.main(["smal", "--scenarios", "constant", *small])
