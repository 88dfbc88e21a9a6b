"""Translations of the configuration: the files that they read, their settings, and checks that they can be made."""

import os
import re

from cxt.config.ensembles import list_ensembles, list_members
from cxt.config.learning import check_replicates, choose_reading, is_readable
from cxt.config.models import build_training_config
from cxt.errors import BadRequest, suggest_nearest
from cxt.genotypes.pairs import KINDS
from cxt.lineage import RESULTS, stage_lineage
from cxt.workflow.jobs import batch_count, collect_variants, find_variant
from cxt.workflow.lineages import file_digest, model_lineage
from cxt.workflow.paths import checkpoint_path

NOT_SETTINGS = ("parts", "devices", "bigwig")
"""Keys of a translation that its tracks do not depend on."""


def find_translation_checkpoint(config: dict, name: str) -> str:
    """The checkpoint of a translation: that of a model of the configuration, or one that is there already."""
    model = config["translate"][name]["model"]
    if model in config["models"]:
        return checkpoint_path(model)
    from cxt.checkpoints.load import find_checkpoint  # imports torch

    try:
        return str(find_checkpoint(model))
    except BadRequest as error:
        if model in list_ensembles(config):
            raise BadRequest(
                f"translate.{name}.model: '{model}' is an ensemble; a translation reads one checkpoint, such as that of "
                f"{list_members(config, model)[0]}"
            ) from None
        nearest = suggest_nearest(model, config["models"])
        raise BadRequest(f"translate.{name}.model: '{model}' is no model of this configuration{nearest}; and {error}") from None


def list_translation_files(config: dict, name: str) -> list[str]:
    """The files that a translation reads, besides its checkpoint."""
    entry = config["translate"][name]
    files = [entry[key] for key in ("input", "populations", "mask") if key in entry]
    maybe = [entry.get(key) for key in ("samples", "pairs", "ancestral")]
    return files + [text for text in maybe if isinstance(text, str) and os.path.isfile(text)]


def build_translation_settings(config: dict, name: str) -> dict:
    """The settings of a translation, by the names of the flags of `cxt translate`."""
    entry = config["translate"][name]
    settings = {key: value for key, value in entry.items() if key not in NOT_SETTINGS}
    return settings | {"model": find_translation_checkpoint(config, name)}


def translation_lineage(config: dict, name: str) -> str:
    """Lineage of a translation's tracks: of its settings and its checkpoint. Its files are inputs of the job."""
    model = config["translate"][name]["model"]
    if model in config["models"]:
        checkpoint = model_lineage(config, model)
    else:
        checkpoint = file_digest(find_translation_checkpoint(config, name))
    return stage_lineage("translate", build_translation_settings(config, name), checkpoint)


def check_translations(config: dict) -> None:
    """BadRequest if a translation names a checkpoint that cannot be had or read, or a file that is not there."""
    for name, entry in config["translate"].items():
        find_translation_checkpoint(config, name)
        model = entry["model"]
        if model in config["models"]:
            objective = build_training_config(config, model).objective
            if not is_readable(objective):
                raise BadRequest(f"translate.{name}.model: '{model}' was trained with {objective}, which predicts no times")
            reading = choose_reading(objective, entry.get("reading"), name=f"translate.{name}.model: '{model}'")
            check_replicates(entry.get("replicates"), objective, reading, name=f"translate.{name}: checkpoint {model}")
        _check_words(name, entry)
        for path in list_translation_files(config, name):
            if not path.startswith(f"{RESULTS}/"):
                if not os.path.exists(path):
                    raise BadRequest(f"translate.{name}: there is no file {path}")
            elif batch := re.fullmatch(rf"{RESULTS}/simulations/([^/]+)/(\d+)\.trees\.batch", path):
                _check_batch(config, name, variant=batch[1], start=int(batch[2]))


def _check_words(name: str, entry: dict) -> None:
    """BadRequest if the pairs or the ancestral alleles are neither one of their words nor a file."""
    pairs, ancestral = str(entry["pairs"]), entry["ancestral"]
    if not (pairs in KINDS or pairs.isdecimal() or os.path.isfile(pairs)):
        raise BadRequest(f"translate.{name}.pairs: '{pairs}' is no file{suggest_nearest(pairs, KINDS)}")
    words = ("auto", "ref", "tree")
    if not (ancestral in words or ancestral.startswith("INFO/") or os.path.isfile(ancestral)):
        nearest = suggest_nearest(ancestral, [*words, "INFO/AA"])
        raise BadRequest(f"translate.{name}.ancestral: '{ancestral}' is no file{nearest}")


def _check_batch(config: dict, name: str, *, variant: str, start: int) -> None:
    """BadRequest if the configuration has no such simulation batch."""
    variants = [known.name for known in collect_variants(config, list(config["scenarios"]))]
    if variant not in variants:
        raise BadRequest(f"translate.{name}.input: unknown variant '{variant}'{suggest_nearest(variant, variants)}")
    try:
        batch_count(config, find_variant(config, variant), start)
    except BadRequest as error:
        raise BadRequest(f"translate.{name}.input: {error}") from None
