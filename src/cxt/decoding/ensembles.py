"""Ensembles: the mean of the predictive distributions of several models for the same input.

Each member is read as it was trained, in one pass or by sampling, and its probabilities are averaged with those of the others,
bin by bin of ln TMRCA. Of squared error, the posterior mean of an ensemble has at most what its members have on average.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cxt.config.learning import Reading
from cxt.data.features import SCALES
from cxt.decoding.reading import AUTOCAST, Reader, build_reader
from cxt.errors import BadRequest
from cxt.model.inputs import reads_missingness
from cxt.model.transformer import CoalescenceModel


def list_models(model: CoalescenceModel | Sequence[CoalescenceModel]) -> list[CoalescenceModel]:
    """The members of an ensemble, or the one model.

    Raises
    ------
    BadRequest
        If one of them is no loaded model, there is none, or they read different inputs or are on different devices.
    """
    given = list(model) if isinstance(model, Sequence) and not isinstance(model, str) else [model]
    if not given:
        raise BadRequest("model is an empty list; pass one or more models from cxt.load_model")
    models = [one for one in given if isinstance(one, CoalescenceModel)]
    if wrong := [one for one in given if not isinstance(one, CoalescenceModel)]:
        raise BadRequest(f"model must be a loaded model, got {wrong[0]!r}; load one with cxt.load_model")
    if len(models) > 1:
        compare_inputs({f"model {number}": describe_input(one) for number, one in enumerate(models)})
    return models


def describe_input(model: CoalescenceModel) -> dict[str, Any]:
    """What must be equal for the members of an ensemble: input and grid of a model, and its device."""
    config = model.config
    return {
        "windows": config.windows,
        "window size": config.window_size,
        "samples": model.samples,
        "scales": list(SCALES if model.trained_on is None else model.trained_on.scales),
        "bins of ln TMRCA": (config.bins, config.grid_low, config.grid_high),
        "reads_rates": config.reads_rates,
        "missing data": reads_missingness(model),
        "device": str(model.backbone.head.weight.device),
    }


def compare_inputs(inputs: Mapping[str, Mapping[str, Any]]) -> None:
    """BadRequest, naming everything that differs, unless the members of an ensemble, by their names, have equal inputs."""
    (first_name, first), *others = inputs.items()
    for name, other in others:
        if differences := [f"{key} {other[key]} instead of {first[key]}" for key in first if other[key] != first[key]]:
            raise BadRequest(
                f"{name} cannot be averaged with {first_name}, because it reads another input: {', '.join(differences)}; the "
                "members of an ensemble have the same windows, samples, scales, grid and missing data"
            )


def build_ensemble_reader(models: Sequence[CoalescenceModel], readings: Sequence[Reading], **settings: Any) -> Reader:
    """A function that gives the mean of the members' distributions for each window of a batch.

    Parameters
    ----------
    models : sequence of CoalescenceModel
        In eval mode, with equal inputs.
    readings : sequence of str
        `marginal` or `sampled`, for each model.
    settings
        Those of `build_reader`, the same for all. With one seed, a member samples the same sequences as without the others.

    Returns
    -------
    Reader
        For one model, its own. The bins are those of the sampled sequences of all members, one member after the other.
    """
    readers = [build_reader(model, reading, **settings) for model, reading in zip(models, readings, strict=True)]
    if len(readers) == 1:
        return readers[0]
    sizes = [settings.get("replicates", 1) if reading == "sampled" else 0 for reading in readings]

    def read(x: torch.Tensor, rates: torch.Tensor | None, example_ids: Sequence[int], previous: torch.Tensor | None = None):
        total, bins = torch.zeros(()), []
        before = len(readers) * [None] if previous is None else previous.split(sizes, dim=1)
        for model, reader, own in zip(models, readers, before, strict=True):
            with _use_own_precision(model, x.device):
                distribution, sampled = reader(x, rates, example_ids, own)
            total = total.to(distribution.device) + distribution
            bins.append(sampled.to(distribution.device).clone())  # a decoder overwrites it
        return total / len(readers), torch.cat(bins, dim=1)

    return read


def _use_own_precision(model: CoalescenceModel, device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which a member computes in the precision of its training on a GPU, whatever that of the others is."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    dtype = AUTOCAST.get(model.precision)
    return torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None)
