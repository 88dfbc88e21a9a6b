"""Merging, defaults, and one clear message for everything that is wrong."""

import json
import math
import re

import jsonschema
import pytest
import yaml
from helpers.repository import REPOSITORY, TINY

from cxt.config import scenarios
from cxt.config.file import load, locate_files, merge, resolve, without_nulls
from cxt.config.models import build_adapter_config, build_network_config, build_training_settings
from cxt.config.network import PRESETS, Adapter, AdapterConfig, Architecture, ModelConfig
from cxt.config.reference import TITLES, json_schema, render_reference
from cxt.config.section import Settings
from cxt.config.training import TrainingConfig, TrainingOverrides, TrainingSection, steps_per_epoch
from cxt.config.yaml import read_yaml
from cxt.errors import BadRequest, suggest_nearest
from cxt.scenarios.registry import SIMULATORS
from cxt.workflow.lineages import model_lineage
from cxt.workflow.settings import write_settings


def with_changes(**sections) -> dict:
    """The default configuration with changes merged in, resolved."""
    return resolve(merge(read_yaml(REPOSITORY / "config" / "config.yaml"), sections))


def test_default_and_overlays_are_valid():
    assert list(load()["models"]) == [
        "narrow", "broad", "broad_w200", "broad_adapter", "w200_wmissing", "w200_wmissing_adapter",
    ]  # fmt: skip
    assert "sawtooth" not in load([TINY])["scenarios"]
    load([REPOSITORY / "config" / "paper.yaml"])


def test_paper_has_the_published_recipe():
    config = load([REPOSITORY / "config" / "paper.yaml"])
    epochs = {"narrow": 6, "broad": 2, "broad_w200": 2, "broad_adapter": 3, "w200_wmissing": 2, "w200_wmissing_adapter": 10}
    fine_tuned = ("broad_w200", "w200_wmissing", "w200_wmissing_adapter")
    for name in config["models"]:
        settings = build_training_settings(config, name)
        published = TrainingConfig().model_dump() | {
            "epochs": epochs[name], "lr": 3e-5 if name in fine_tuned else 3e-4,
            "threads": 4, "save_every": 50,
        }  # fmt: skip
        if build_adapter_config(config, name) is None:
            del published["backbone_lr_factor"]  # of adapters only
        assert {key: settings.get(key) for key in published} == published
        assert ("backbone_lr_factor" in settings) == ("adapter" in name)
        preset = PRESETS[config["models"][name]["preset"]]
        assert build_network_config(config, name) == preset
        assert settings["layers"] == (6 if name == "narrow" else 10)
        assert settings["width"] == 400
        assert config["training"]["devices"] == 3
    assert build_adapter_config(config, "w200_wmissing_adapter") == AdapterConfig()


@pytest.mark.parametrize(
    ("simulations", "pairs", "epochs", "steps"),
    [
        (9000, 200, 6, (14064, 7032, 4692)), (30409, 200, 2, (15838, 7920, 5280)), (5434, 200, 2, (2830, 1416, 944)),
        (30409, 20, 3, (2376, 1188, 792)), (5434, 20, 10, (1420, 710, 480)),
    ],
)  # fmt: skip
def test_published_step_counts(simulations, pairs, epochs, steps):
    for world, expected in enumerate(steps, 1):
        examples = simulations * pairs
        assert epochs * steps_per_epoch(examples=examples, batch_size=128, grad_accum=6, world=world) == expected


def test_sections_have_the_published_defaults():
    training = TrainingSection().resolved()
    assert {key: value for key, value in training.items() if key not in ("devices", "nodes")} == TrainingConfig().model_dump(
        exclude_none=True
    )
    adapter = AdapterConfig().model_dump()
    assert Adapter().resolved() == {key: value for key, value in adapter.items() if key != "samples"}
    assert Architecture().resolved() == TrainingOverrides().resolved() == {}
    assert scenarios.KIND_SECTIONS.keys() == SIMULATORS.keys()


def test_every_key_is_described_and_documented():
    text = (REPOSITORY / "config" / "README.md").read_text()
    assert text == render_reference(), "run: cxt schema > config/README.md"
    for section in (*TITLES.values(), ModelConfig, AdapterConfig, TrainingConfig):
        assert section.__doc__
        for name, field in section.model_fields.items():
            assert field.description, (section, name)
            assert f"`{name}`" in text or issubclass(section, Settings), (section, name)


def test_editors_are_told_the_same():
    """The JSON Schema is current, and takes all files that come with cxt."""
    path = REPOSITORY / "config" / "config.schema.json"
    assert path.read_text() == json_schema(), "run: cxt schema --json > config/config.schema.json"
    validator = jsonschema.Draft202012Validator(json.loads(path.read_text()))
    files = [file for file in path.parent.rglob("*.yaml") if not file.name.endswith(".demes.yaml")]
    assert len(files) >= 5
    for file in files:
        first_line = file.read_text().splitlines()[0]
        assert first_line.startswith("# yaml-language-server: $schema="), file
        assert (file.parent / first_line.partition("=")[2]).resolve() == path
        validator.validate(yaml.safe_load(file.read_text()))
    for wrong in (
        {"training": {"lr": -1}},
        {"trainning": {}},
        {"scenarios": {"x": {"kind": "constnat"}}},
        {"datasets": {"a-b": {}}},
    ):
        assert not validator.is_valid(wrong), wrong
    assert validator.is_valid({"scenarios": {"constant": None}, "models": {"broad": {"adapter": None}}})


def test_merge_is_snakemakes():
    from copy import deepcopy

    from snakemake.utils import update_config

    base = read_yaml(REPOSITORY / "config" / "config.yaml")
    for overlay in (read_yaml(TINY), read_yaml(REPOSITORY / "config" / "paper.yaml")):
        expected = deepcopy(base)
        update_config(expected, deepcopy(overlay))
        assert merge(base, overlay) == expected


def test_null_removes_keys_and_entries():
    assert without_nulls({"a": None, "b": {"c": None, "d": 1}, "e": [None]}) == {"b": {"d": 1}, "e": [None]}


def test_children_inherit_sizes_but_not_masking():
    config = load()
    assert build_network_config(config, "w200_wmissing_adapter") == ModelConfig(
        layers=4,
        width=128,
        dropout=0.0,
        windows=100,
        window_size=200,
        mask_singletons=False,
        reads_rates=True,
        separate_embeddings=True,
    )
    assert build_adapter_config(config, "w200_wmissing_adapter").samples == 10
    assert build_adapter_config(config, "broad_w200") is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"training": {"windows": 5}}, r"training\.windows: unknown key; it belongs beside `training`, not in"),
        ({"regions": {"shortest": 5}}, r"models\.broad\.regions: unknown key; it is a key of `training`"),
        ({"lr": 1}, r"models\.broad\.lr: unknown key; it is a key of `training`"),
        ({"training": {"reads_rates": True}}, r"reads_rates: unknown key; it is a key of `architecture`, beside `training`"),
        ({"dropout": 0.1}, r"models\.broad\.dropout: unknown key; it is a key of `adapter` and `architecture`"),
        ({"training": {"window": 5}}, r"training\.window: unknown key; "),
    ],
)
def test_a_key_of_another_section(model, message):
    with pytest.raises(BadRequest, match=message):
        with_changes(models={"broad": model})


def test_children_may_read_other_numbers_of_windows():
    config = with_changes(datasets={"processed_small_window": {"sequence_length": 10_000}})
    assert build_network_config(config, "broad").windows == 100
    assert build_network_config(config, "broad_w200").windows == 50


SMALL = {"sequence_length": 20_000, "simulations": 20}

LORA = {"preset": "broad", "dataset": "processed", "lora_of": "broad", "lora": {}}

BAD = [
    ({"scenarios": {"constant": {"simulation": 3}}}, "scenarios.constant.simulation: unknown key; did you mean 'simulations'"),
    ({"scenarios": {"constant": {"kind": "constnat"}}}, "unknown kind 'constnat'; did you mean 'constant'"),
    ({"scenarios": {"x": {"kind": "constant"}}}, "scenarios.x: `simulations` is missing"),
    ({"scenarios": {"x": {"simulations": 3}}}, "scenarios.x: `kind` must be one of constant, demes"),
    ({"scenarios": {"a-b": {"kind": "constant", "simulations": 3}}}, "a name must start with"),
    ({"scenarios": {"constant": {"mutation_rate": "fast"}}}, r"must be a number in \(0, 0.5\], or a list .*, got 'fast'"),
    ({"scenarios": {"constant": {"batch": 15}}}, r"batch must be a multiple of 10 \(at least 10\), got 15"),
    ({"datasets": {"processed": {"scenarios": ["constnat"]}}}, "unknown scenario 'constnat'; did you mean 'constant'"),
    ({"datasets": {"processed": {"window_size": 3000}}}, "200000 is not a multiple of window_size 3000"),
    ({"datasets": {"processed": {"sequence_length": 400000}}}, "'constant' simulates only 200000 bp"),
    ({"datasets": {"processed_n10": {"pairs": 46}}}, "46 pairs requested, but 10 samples have only 45"),
    ({"datasets": {"processed": {"samples": 60}}}, "samples only 25 individuals .50 haplotypes."),
    ({"datasets": {"processed_small_window_missing_data": {"mask": {"path": "no.bed"}}}}, "there is no file no.bed"),
    ({"datasets": {"processed_small_window_missing_data": {"mask": {"length": 100}}}}, "100 bp is shorter than"),
    ({"evaluation": {"pairs": 46}}, "46 pairs requested, but the 10 samples of models.broad_adapter have only 45"),
    ({"models": {"broad": {"preset": "brood"}}}, "preset must be one of narrow, broad, .*, got 'brood'"),
    ({"models": {"broad": {"dataset": "procesed"}}}, "unknown dataset 'procesed'; did you mean 'processed'"),
    ({"models": {"broad_w200": {"checkpoint": "brod"}}}, "unknown parent 'brod'; did you mean 'broad'"),
    ({"models": {"broad": {"checkpoint": "broad_w200"}}}, "a cycle of parents: broad <- broad_w200 <- broad"),
    ({"models": {"broad": {"checkpoint": "broad"}}}, "a cycle of parents: broad <- broad"),
    ({"models": {"w200_wmissing": {"checkpoint": "broad_adapter"}}}, "is an adapter model; use `resume_adapter: broad_adapter`"),  # noqa: E501
    ({"models": {"w200_wmissing_adapter": {"resume_adapter": "broad"}}}, "has no adapter; use `checkpoint: broad`"),
    ({"models": {"broad_w200": {"resume_adapter": "broad_adapter"}}}, "cannot be used together"),
    ({"models": {"narrow": {"adapter": {}}}}, "an adapter needs a trained backbone"),
    ({"models": {"broad_w200": {"architecture": {"layers": 3}}}}, "layers is 3, but its parent 'broad' has 4"),
    ({"models": {"broad": {"architecture": {"width": 130}}}}, "width 130 is not a multiple of the number of scales"),
    ({"models": {"broad": {"architecture": {"width": 132}}}}, "width 132 is not a multiple of 8"),
    ({"models": {"broad_w200": {"dataset": "processed_n10"}}}, "has 10 samples, but its parent 'broad' takes 50; use an adapter"),  # noqa: E501
    ({"datasets": {"processed_small_window": {"scales": [1, 4, 16, 32]}}}, r"scales \[1, 4, 16, 32\], but its parent 'broad' has \[2, 8"),  # noqa: E501
    ({"datasets": {"processed_n10": {"samples": 50}}}, "fewer samples than its backbone's 50"),
    ({"datasets": {"processed_small_window": {"mask": {}}}}, "carries missingness in bin 0, which this model masks"),
    ({"models": {"w200_wmissing": {"dataset": "processed_small_window"}}}, "dataset 'processed_small_window' has none"),
    ({"training": {"min_lr": 1.0}}, "lr 0.02 is below min_lr 1"),
    ({"training": {"epoch": 3}}, "training.epoch: unknown key; did you mean 'epochs'"),
    ({"evaluation": {"simulations_of": {"constnat": 3}}}, "unknown scenario 'constnat'"),
    ({"models": {"broad": {"evaluation": ["sawtoth"]}}}, "unknown scenario 'sawtoth'; did you mean 'sawtooth'"),
    ({"training": {"threads": 100000}}, "threads must be an integer from 1 to 1024, got 100000"),
    ({"training": {"workers": 257}}, "workers must be an integer from 0 to 256, got 257"),
    ({"training": {"devices": 1025}}, "devices must be an integer from 0 to 1024, got 1025"),
    ({"training": {"lr": float("nan")}}, "lr must be a finite positive number, got nan"),
    ({"training": {"epochs": 10**30}}, "training.epochs must be an integer from 1 to 1000000000, got 1000"),
    ({"training": {"min_lr": 1.0}}, "^training, of models.narrow: lr 0.02 is below"),
    ({"models": {"broad_w200": {"training": {"lr": 1e-9}}}}, "^models.broad_w200.training: lr 1e-09 is below min_lr"),
    ({"models": {"broad": {"architecture": {"width": 130}}}}, "^models.broad.architecture: width 130 is not a multiple"),
    ({"models": {"broad": {"training": {"backbone_lr_factor": 0.1}}}}, "^models.broad.training: backbone_lr_factor cannot"),
    ({"scenarios": {False: {"kind": "constant", "simulations": 3}}}, "the name False must be text.*put the name in quotes"),
    ({"scenarios": {2024: {"kind": "constant", "simulations": 3}}}, "the name 2024 must be text.*put the name in quotes"),
    ({"scenarios": {"": {"kind": "constant", "simulations": 3}}}, "scenarios: '': a name must start with"),
    ({"scenarios": {"x\n": {"kind": "constant", "simulations": 3}}}, r"scenarios: 'x\\n': a name must start with"),
    ({"models": {"x" * 101: {"preset": "broad", "dataset": "processed"}}}, "models: 'x.*a name must start with .*at most 100"),
    ({"datasets": {"processed": {"scenarios": [False]}}}, "scenarios must be the name .*, got .False. .*in quotes"),
    ({"models": {"broad": {"dataset": 2024}}}, "dataset must be text, got 2024 .*put the name in quotes"),
    ({"evaluation": {"simulations_of": {False: 3}}}, "the name False must be text.*put the name in quotes"),
    ({"training": {True: 3}}, "training.True: unknown key .*put the name in quotes"),
    ({"training": {"lr": "1_0"}}, "lr must be a positive number, got '1_0'"),
    ({"scenarios": {"y" * 100: {"kind": "constant", "simulations": 3, "mutation_rate": [1.2345678901234567e-8, 2e-8],
                                "population_size": [12345.678901234567, 2], "individuals": 20,
                                "recombination_rate": [1.2345678901234567e-8, 2e-8]}}}, "a name of 2[0-9]{2} characters"),
    ({"training": {"objective": "maskd"}}, "training.objective .*'maskd'.*did you mean 'masked'"),
    ({"training": {"schedule": "cosin"}}, "training.schedule .*'cosin'.*did you mean 'cosine'"),
    ({"models": {"broad": {"training": {"losses": "z_los"}}}}, "losses.0.name 'z_los'; did you mean 'z_loss'"),
    ({"models": {"broad": {"training": {"optimizer": "moun"}}}}, "optimizer.name 'moun'; did you mean 'muon'"),
    ({"training": {"masked": {"shar": 0.1}}}, "training.masked.shar: unknown key; did you mean 'share'"),
    ({"models": {"broad": {"training": {"objective": "marginal", "loss_path": "full"}}}}, "^models.broad: loss_path full is for the objective autoregressive, not for marginal"),  # noqa: E501
    ({"models": {"narrow": {"training": {"objective": "joint"}, "architecture": {"start_token_in_prefix": True}}}}, "^models.narrow: the objective joint needs sources"),  # noqa: E501
    ({"models": {"narrow": {"training": {"precision": "bf16-true"}, "architecture": {"reads_rates": True}}}}, "^models.narrow: precision bf16-true would round the rates"),  # noqa: E501
    ({"models": {"narrow": {"training": {"attention": "flex"}}}}, "^models.narrow: attention flex trains on GPUs only"),
    ({"models": {"broad_adapter": {"training": {"objective": "masked"}}}}, "^models.broad_adapter: the objective masked cannot train an adapter"),  # noqa: E501
    ({"models": {"broad": {"training": {"objective": "masked"}}, "broad_adapter": {"adapter": {"unfreeze_strategy": "ln"}}}}, "^models.broad_adapter: .* does not train the head"),  # noqa: E501
    ({"models": {"narrow": {"training": {"objective": "masked", "ema_decay": 0.9}}}}, "^models.narrow: ema_decay cannot be used"),  # noqa: E501
    ({"training": {"objective": "contrastiv"}}, "training.objective .*'contrastiv'.*did you mean 'contrastive'"),
    ({"training": {"contrastive": {"spn": 8}}}, "training.contrastive.spn: unknown key; did you mean 'span'"),
    ({"models": {"narrow": {"training": {"objective": "contrastive", "batch_size": 1}}}}, "^models.narrow: the objective contrastive compares the examples of a batch, but batch_size is 1"),  # noqa: E501
    ({"models": {"w200_wmissing": {"training": {"objective": "contrastive"}}}}, "^models.w200_wmissing: the objective contrastive cannot train on a dataset with a mask"),  # noqa: E501
    ({"models": {"narrow": {"training": {"objective": "masked"}, "evaluation": ["constant"]}}}, "^models.narrow: `evaluation` cannot be used with the objective masked"),  # noqa: E501
    ({"models": {"narrow": {"training": {"objective": "autoregressive"}}}, "evaluation": {"reading": "marginal"}}, "^evaluation.reading: models.narrow was trained with the objective autoregressive"),  # noqa: E501
    ({"models": {"lora": LORA | {"lora_of": None}}}, "^models.lora.lora: LoRA needs a trained base; name one with `lora_of`"),
    ({"models": {"lora": LORA | {"lora": None}}}, "^models.lora.lora_of: it needs `lora`; add `lora: {}`"),
    ({"models": {"lora": LORA | {"checkpoint": "broad"}}}, "models.lora: `checkpoint` and `lora_of` cannot be used together"),
    ({"models": {"lora": LORA | {"adapter": {}}}}, "models.lora: `adapter` and `lora` cannot be used together"),
    ({"models": {"lora": LORA | {"lora_of": "brod"}}}, "models.lora: unknown parent 'brod'; did you mean 'broad'"),
    ({"models": {"lora": LORA | {"lora_of": "broad_adapter", "dataset": "processed_n10"}}}, "'broad_adapter' is an adapter model"),  # noqa: E501
    ({"models": {"lora": LORA, "of_lora": LORA | {"lora_of": "lora"}}}, "'lora' is itself a LoRA of 'broad'; use `lora_of: broad`"),  # noqa: E501
    ({"models": {"lora": LORA, "x": {"preset": "broad", "dataset": "processed", "resume_adapter": "lora"}}}, "'lora' has no adapter"),  # noqa: E501
    ({"models": {"lora": LORA | {"lora": {"rank": 128}}}}, "^models.lora: the rank of LoRA must be below the width .* 128, got 128"),  # noqa: E501
    ({"models": {"lora": LORA | {"lora": {"rank": 0}}}}, "models.lora.lora.rank must be an integer from 1"),
    ({"models": {"lora": LORA | {"lora": {"targets": "heads"}}}}, "targets must be one of attention, mlp, all, got 'heads'"),
    ({"models": {"lora": LORA | {"lora": {"alhpa": 2}}}}, "models.lora.lora.alhpa: unknown key; did you mean 'alpha'"),
    ({"models": {"lora": LORA | {"architecture": {"start_token_in_prefix": True}}}}, "start_token_in_prefix is True, but the base"),  # noqa: E501
    ({"models": {"lora": LORA | {"dataset": "processed_n10"}}}, "has 10 samples, but its parent 'broad' takes 50"),
    ({"models": {"lora": LORA | {"training": {"quantized_bits": 8}}}}, "^models.lora: quantized_bits cannot be used with"),
    ({"models": {"broad_adapter": {"training": {"weight_noise": 0.1}}}}, "^models.broad_adapter: weight_noise cannot"),
    ({"models": {"lora": LORA}, "training": {"quantized_bits": 8}}, "^models.lora: quantized_bits cannot be used"),
    ({"training": {"quantized_bits": 1}}, "quantized_bits must be 0 .off. or from 2 to 8, got 1"),
    ({"training": {"quantized_bits": 9}}, "quantized_bits must be an integer from 0 to 8, got 9"),
    ({"training": {"weight_noise": -1}}, "weight_noise must be a non-negative number, got -1"),
    ({"trainning": {}}, "trainning: unknown key; did you mean 'training'"),
]  # fmt: skip


def test_a_lora_in_the_configuration():
    plain, config = load(), with_changes(models={"lora": LORA, "other": LORA | {"lora": {"rank": 2}}})
    settings = yaml.safe_load(write_settings(config, "models", "lora"))
    assert {key: value for key, value in settings.items() if "lora" in key} == {
        "lora_rank": 8, "lora_alpha": 16.0, "lora_targets": "all",
    }  # fmt: skip
    assert settings["parent_lineage"] == model_lineage(config, "broad") == model_lineage(plain, "broad")
    lineages = {model_lineage(config, name) for name in ("broad", "lora", "other")}
    assert len(lineages) == 3
    assert model_lineage(with_changes(models={"lora": LORA | {"lora": {"rank": 8}}}), "lora") == model_lineage(config, "lora")


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_configurations(change, message):
    with pytest.raises(BadRequest) as caught:
        with_changes(**change)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_text_that_is_a_number_is_one():
    """So `1e-8`, which YAML reads as text, and everything in `--config 'training={devices: 2}'`, are what they say."""
    changes = {
        "training": {"devices": "2", "lr": "2e-3", "deterministic": "False"},
        "scenarios": {"constant": {"mutation_rate": ["1e-8", "2.5e-8"], "population_size": "1e4"}},
        "models": {"w200_wmissing_adapter": {"adapter": {"last_n": "2"}}},
    }
    config = with_changes(**changes)
    assert config["training"] | {"devices": 2, "lr": 2e-3, "deterministic": False} == config["training"]
    assert config["scenarios"]["constant"]["mutation_rate"] == [1e-8, 2.5e-8]
    assert config["scenarios"]["constant"]["population_size"] == 1e4
    assert config["models"]["w200_wmissing_adapter"]["adapter"]["last_n"] == 2


def test_a_file_of_comments_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert load([tmp_path / "empty.yaml"]) == load()


def nested_anchors(first: str, level: str) -> str:
    """25 levels, each of twice the one before: half a kilobyte that stands for more than 30 million values."""
    return f"a0: &a0 {first}\n" + "".join(f"a{i}: &a{i} {level.format(b=f'*a{i - 1}')}\n" for i in range(1, 26))


@pytest.mark.parametrize(
    ("first", "level"), [("{x: 1}", "{{l: {b}, r: {b}}}"), ("[1]", "[{b}, {b}]"), ("{x: 1}", "{{<<: [{b}, {b}]}}")]
)
def test_nested_anchors_are_refused_before_they_grow(first, level, tmp_path):
    for text, message in (
        (nested_anchors(first, level), "anchors expand to more than 200000 values"),
        ("a: &a [*a]\n", "an anchor that contains itself"),
        ("[" * 5000, "not valid YAML"),
    ):
        (tmp_path / "overlay.yaml").write_text(text)
        with pytest.raises(BadRequest, match=f"overlay.yaml.*{message}"):
            read_yaml(tmp_path / "overlay.yaml")
    few = "a: &a {x: 1}\nb: &b {<<: *a, y: [*a, *a]}\nc: {<<: *b, x: 2}\n"
    (tmp_path / "overlay.yaml").write_text(few)
    assert read_yaml(tmp_path / "overlay.yaml")["b"] == {"x": 1, "y": [{"x": 1}, {"x": 1}]}


@pytest.mark.parametrize("settings", [TrainingConfig, ModelConfig, AdapterConfig])
def test_no_setting_takes_what_is_no_number(settings):
    for name, field in settings.model_fields.items():
        if field.annotation in (int, float):
            for value in (math.nan, math.inf, -math.inf, -1e300, "2", True, [1]):
                with pytest.raises(BadRequest, match=f"{name} must be .*, got"):
                    settings(**{name: value})


def test_suggestions_are_near():
    assert suggest_nearest("sawtoth", ["sawtooth", "island"]) == "; did you mean 'sawtooth'?"
    assert suggest_nearest("--batch_size", ["--batch-size", "--resume"]) == "; did you mean '--batch-size'?"
    assert suggest_nearest("rate-of-learning", ["start-token-in-prefix", "lr"]) == "; choose from lr, start-token-in-prefix"
    many = suggest_nearest("banana", [f"scenario_{i}" for i in range(500)])
    assert many == "; none of 500 is similar"
    many = suggest_nearest("scenaro", [f"scenario_{i}_of_many" for i in range(500)])
    assert many.startswith("; the most similar of 500 are scenario_")
    assert many.count(",") == 4
    assert suggest_nearest("x", []) == "; none are available"


def test_what_means_nothing_makes_no_model_stale():
    """A plain model's lineage knows nothing of adapters, an adapter's nothing of blocks that nobody asked to train."""
    base = read_yaml(REPOSITORY / "config" / "config.yaml")
    changed = merge(base, {"training": {"backbone_lr_factor": 0.7, "min_delta": 0.1}})
    assert model_lineage(resolve(base), "broad") == model_lineage(resolve(changed), "broad")
    assert "backbone_lr_factor" not in build_training_settings(resolve(changed), "broad")
    frozen = [{"broad_adapter": {"adapter": {"unfreeze_strategy": "none", "last_n": n}}} for n in (3, 4)]
    first, second = (model_lineage(with_changes(models=change), "broad_adapter") for change in frozen)
    assert first == second != model_lineage(resolve(base), "broad_adapter")


def test_problems_in_a_list_of_sections():
    history = [{"time": 0, "population_siz": 3}, {"tim": 0, "population_size": -1}, 5]
    scenario = {"kind": "msprime", "simulations": 10, "mutation_rate": 1e-8, "recombination_rate": 1e-8, "history": history}
    with pytest.raises(BadRequest) as error:
        with_changes(scenarios={"mine": scenario})
    for message in (
        "scenarios.mine.history.0: `population_size` is missing",
        "scenarios.mine.history.0.population_siz: unknown key; did you mean 'population_size'?",
        "scenarios.mine.history.1: `time` is missing",
        "scenarios.mine.history.1.population_size must be a positive number, got -1",
        "scenarios.mine.history.2 must be a mapping, got 5",
    ):
        assert message in str(error.value)


def test_all_errors_at_once():
    with pytest.raises(BadRequest) as caught:
        with_changes(training={"epoch": 3, "lr": "fast"}, evaluation={"pair": 1})
    assert all(word in str(caught.value) for word in ("training.epoch", "training.lr", "evaluation.pair"))


def test_paths_are_relative_to_the_file_that_names_them(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "m.npz").touch()
    (tmp_path / "m.bed").touch()
    (tmp_path / "a" / "x.yaml").write_text("datasets: {processed_small_window_missing_data: {mask: {path: m.npz}}}\n")
    (tmp_path / "b" / "y.yaml").write_text("datasets: {processed_small_window_missing_data_n10: {mask: {path: ../m.bed}}}\n")
    monkeypatch.chdir(tmp_path / "a")
    datasets = load([tmp_path / "a" / "x.yaml", "../b/y.yaml"])["datasets"]
    assert datasets["processed_small_window_missing_data"]["mask"]["path"] == "m.npz"  # in the working directory
    assert datasets["processed_small_window_missing_data_n10"]["mask"]["path"] == str(tmp_path / "m.bed")
    given = {
        "datasets": {"processed_small_window_missing_data": {"mask": {"path": "other.npz"}}}
    }  # as by --config, on the command line
    assert locate_files(given, [tmp_path / "a" / "x.yaml"]) == given
