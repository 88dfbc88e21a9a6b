"""Checks of a network's input X: its shape, its values, and whether they are in the range of the training data.

A network gives an output for any numbers. Input that cannot be right is refused. Input outside the range of the training data,
where the accuracy of estimates is unknown, causes a warning.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from cxt.errors import BadRequest

RANGE_FACTOR = 1.5
"""Diversity and rates may be this factor below or above the range of the training data without a warning."""

MISSING_MARGIN = 0.05
"""Missing fractions may be this much below or above the range of the training data without a warning."""

PLAUSIBLE_MUTATION_RATES = (1e-11, 1e-6)
"""Mutation rates per base pair and generation that a network that reads rates is given without a warning."""

PRECISION = 2.0**-8
"""Relative error of a logarithm rounded to bfloat16."""


class OutsideTraining(UserWarning):
    """The input is outside the range of the data that the network was trained on."""


class TrainedOn(NamedTuple):
    """Description of training data in a checkpoint.

    scales : window widths in base windows
    ranges : smallest and largest value over the training simulations, by name: `diversity` (pairwise differences per
        accessible bp), `mutation_rate` and `recombination_rate` (per bp and generation), `missingness` (fraction of the
        region); unknown ranges are missing or None
    windows : smallest and largest number of windows of a region; None if that is not known
    """

    scales: tuple[int, ...]
    ranges: dict[str, list[float] | None]
    windows: tuple[int, int] | None = None


def reads_missingness(model) -> bool:
    """Whether the network reads missing fractions from frequency bin 0 of X."""
    return not (model.config.mask_singletons if model.adapter is None else model.adapter.overwrites_bin0)


def convert_input(model, x) -> torch.Tensor:
    """Convert *x*, a floating-point array or tensor, to a tensor on the model's device; BadRequest for anything else."""
    try:
        x = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadRequest(f"X must be an array of numbers: {error}") from None
    if not x.is_floating_point():
        raise BadRequest(f"X must be floating-point log1p of counts, got {str(x.dtype).removeprefix('torch.')}")
    return x.to(model.backbone.head.weight.device)


def check_shape(model, x, *, shortest: int = 1, packed: bool = False) -> None:
    """BadRequest unless *x* is a tensor (B, 2, scales, windows, samples) with the sizes of *model*.

    It may have fewer windows than the model was built for, but at least *shortest*; *packed* rows of several regions may have
    any number.
    """
    if not isinstance(x, torch.Tensor):
        raise BadRequest(f"X must be a tensor, as from torch.as_tensor(X), got {type(x).__name__}")
    config = model.config
    expected = (2, config.scales, config.windows, model.samples)
    if x.ndim == 5 and x.shape[3] and (packed or shortest <= x.shape[3] <= config.windows):
        expected = (2, config.scales, x.shape[3], model.samples)
    if tuple(x.shape[1:]) == expected:
        return
    shape = tuple(x.shape)
    message = (
        f"X must have shape (examples, 2, {', '.join(map(str, expected[1:]))}), got {shape}: this model reads {config.windows} "
        f"windows of {model.samples} haplotypes at {config.scales} scales"
    )
    if shape == expected:
        raise BadRequest(f"{message}; for one example, pass X[None]")
    if len(shape) != 5 or shape[1] != 2:
        raise BadRequest(f"{message}; cxt.pair_features makes such counts")
    differing = [
        f"{size} {name}"
        for name, size, expected_size in zip(("scales", "windows", "haplotypes"), shape[2:], expected[1:], strict=True)
        if size != expected_size
    ]
    details = f"{message}; X has {', '.join(differing)}"
    if shape[4] != expected[3]:
        details += "; a checkpoint with an adapter reads a different number of haplotypes than one without"
    raise BadRequest(details)


def check_tokens(y, *, examples: int, windows: int, replicates: int | None = None) -> None:
    """BadRequest unless *y* is a tensor of tokens (examples, windows + 1), or (examples, replicates, windows + 1)."""
    expected = (examples, windows + 1) if replicates is None else (examples, replicates, windows + 1)
    if not isinstance(y, torch.Tensor) or tuple(y.shape) != expected:
        description = f"has shape {tuple(y.shape)}" if isinstance(y, torch.Tensor) else f"is a {type(y).__name__}"
        raise BadRequest(
            f"the tokens must have shape {expected}, a start token and one token per window for each example of X; y "
            f"{description}"
        )


def check_input(model, x: torch.Tensor, *, window_size, mutation_rate=None, recombination_rate=None) -> None:
    """Check that X, computed with windows of *window_size* bp, is valid input of *model*.

    Raises
    ------
    BadRequest
        For a wrong window size, numbers that are not log1p of counts, or lack of missingness that the model reads.

    Warns
    -----
    OutsideTraining
        Once, about everything that is outside the ranges of the training data, and about windows of other scales.
    """
    measures = measure_input(
        model, x, window_size=window_size, mutation_rate=mutation_rate, recombination_rate=recombination_rate
    )
    text = describe_outside(model, [measures], mutation_rate=mutation_rate, recombination_rate=recombination_rate)
    if text is not None:
        warnings.warn(text, OutsideTraining, stacklevel=3)  # the caller of `generate`


class Measures(NamedTuple):
    """What is measured of a batch of input, to compare it with the training data.

    diversity : pairwise differences per accessible bp, of each example
    missingness : inaccessible share of the region, of each example
    same_sites : whether the windows of each scale contain the same sites
    """

    diversity: list[float]
    missingness: list[float]
    same_sites: bool


def measure_input(model, x: torch.Tensor, *, window_size, mutation_rate=None, recombination_rate=None) -> Measures:
    """Measure X, after the checks of `check_input` that refuse it; see there."""
    check_shape(model, x, shortest=model.shortest_region)
    _check_window_size(model, window_size)
    for name, rate in {"mutation_rate": mutation_rate, "recombination_rate": recombination_rate}.items():
        if rate is not None and not (_is_number(rate) and 0 <= rate < math.inf):
            raise BadRequest(f"{name} must be a number per bp and generation, got {rate!r}")
    if not len(x):
        raise BadRequest("X has no examples")
    counts = _recover_counts(x)
    missing = _recover_missing(model, x)  # (B, scales, windows) or None
    if model.trained_on is None:
        return Measures([], [], True)
    scales = model.trained_on.scales
    spectra = [counts[:, :, i, ::scale].sum(dim=(1, 2), dtype=torch.float64) for i, scale in enumerate(scales)]  # (B, n)
    inaccessible = _mean_missing(missing, scales[0]) if missing is not None else torch.zeros(len(x), device=x.device)
    diversity = _compute_diversity(spectra[0], inaccessible, bases=x.shape[3] * model.config.window_size)
    return Measures(diversity.tolist(), inaccessible.tolist(), _hold_same_sites(spectra))


def describe_outside(model, parts: Sequence[Measures], *, mutation_rate=None, recombination_rate=None) -> str | None:
    """Describe what is outside the ranges of the training data in all batches together; None if nothing is."""
    if model.trained_on is None:
        return None
    scales, ranges, windows = model.trained_on
    rates = {"mutation_rate": mutation_rate, "recombination_rate": recombination_rate}
    outside: list[str] = []
    if model.config.reads_rates and mutation_rate:
        # Such a network depends on their ratio only, see `cxt.model.rates`.
        if not PLAUSIBLE_MUTATION_RATES[0] <= mutation_rate <= PLAUSIBLE_MUTATION_RATES[1]:
            outside.append(f"mutation rate {mutation_rate:.3g}, which is no usual rate per base pair and generation")
        rates = {"recombination_per_mutation": None if recombination_rate is None else recombination_rate / mutation_rate}
        ranges = ranges | {"recombination_per_mutation": _divide_ranges(ranges)}
    measured = {
        "diversity": [value for part in parts for value in part.diversity],
        "missingness": [value for part in parts for value in part.missingness],
    } | {name: [float(rate)] for name, rate in rates.items() if rate is not None}
    outside += [
        description for name, values in measured.items() if (description := _describe_outside(name, values, ranges.get(name)))
    ]
    if windows is not None and not windows[0] <= model.config.windows <= windows[1]:
        outside.append(f"regions of {model.config.windows} windows, trained on {_describe_span(*windows)}")
    if not all(part.same_sites for part in parts):
        outside.append(f"its windows do not contain the same sites at each of the scales {', '.join(map(str, scales))}")
    if not outside:
        return None
    return (
        f"the input is outside the range of the training data of this model: {'; '.join(outside)}. The accuracy of estimates "
        "there is unknown"
    )


def _describe_span(low: int, high: int) -> str:
    return str(high) if low == high else f"{low} to {high}"


def _is_number(value) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _check_window_size(model, window_size) -> None:
    if not _is_number(window_size):
        raise BadRequest(f"window_size must be the base pairs per window of X, got {window_size!r}")
    if window_size != model.config.window_size:
        raise BadRequest(
            f"this model reads windows of {model.config.window_size} bp, but the counts were computed with {window_size:g} bp; "
            "compute them with the model's window size, or train a model with theirs"
        )


def _recover_counts(x: torch.Tensor) -> torch.Tensor:
    """Recover the counts of X (B, 2, S, W, n), without bin 0, as float32; BadRequest if they are not whole numbers."""
    x = x[..., 1:].float()
    if not torch.isfinite(x).all():
        raise BadRequest("X must be finite")
    counts = torch.expm1(x).round_()
    wrong = (x - torch.log1p(counts)).abs() > PRECISION * x.abs()
    if wrong.any():
        value = float(x[wrong][0])
        raise BadRequest(
            f"X has the value {value:.4g}, which is log1p of {math.expm1(value):.4g} and not of a count: pass the natural "
            "logarithm of 1 + count, such as torch.log1p(torch.from_numpy(cxt.pair_features(…)))"
        )
    return counts


def _recover_missing(model, x: torch.Tensor) -> torch.Tensor | None:
    """Recover missing fractions f (B, S, W) from bin 0 of X, ln(1 + e^f) and ln(1 + e^(1-f)); None if there are none."""
    bin0 = x[..., 0].float()  # (B, 2, S, W)
    fraction = torch.log(torch.expm1(bin0))
    f, other = fraction[:, 0], 1 - fraction[:, 1]
    margin = 4 * PRECISION
    is_missingness = bool(((f - other).abs() <= 2 * margin).all() and (f >= -margin).all() and (f <= 1 + margin).all())
    if is_missingness:
        return f.clamp(0, 1)
    if reads_missingness(model):
        raise BadRequest(
            "this model reads the missing fraction of each window from frequency bin 0, but that of X holds something else; "
            "pass cxt.pair_features a mask (all False if nothing is missing)"
        )
    return None


def _mean_missing(missing: torch.Tensor, scale: int) -> torch.Tensor:
    """Missing fraction of the region (B,), from adjacent windows of the first scale, weighted by their widths."""
    windows = missing.shape[2]
    starts = torch.arange(0, windows, scale, device=missing.device)
    widths = (windows - starts).clamp(max=scale).float()
    return missing[:, 0, ::scale] @ widths / windows


def _hold_same_sites(spectra: list[torch.Tensor]) -> bool:
    """Whether the adjacent windows of each scale contain the same sites, up to rounding."""
    totals = torch.stack([spectrum.sum(-1) for spectrum in spectra])  # (scales, B)
    return not bool(((totals.amax(0) - totals.amin(0)) > 0.25 * totals.amax(0) + 1).any())


def _compute_diversity(spectrum: torch.Tensor, inaccessible: torch.Tensor, *, bases: int) -> torch.Tensor:
    """Mean pairwise differences per accessible bp (B,), from site frequency spectra (B, n - 1) of bins 1 to n - 1."""
    samples = spectrum.shape[-1] + 1
    derived = torch.arange(1, samples, dtype=torch.float64, device=spectrum.device)
    pairs_that_differ = derived * (samples - derived) / (samples * (samples - 1) / 2)
    return spectrum @ pairs_that_differ / ((1 - inaccessible.double()) * bases).clamp(min=1)


def _divide_ranges(ranges) -> list[float] | None:
    """The range of the ratio of recombination rate to mutation rate, if each is in its range; None if that is not known."""
    recombination, mutation = ranges.get("recombination_rate"), ranges.get("mutation_rate")
    if recombination is None or mutation is None or not mutation[0]:
        return None
    return [recombination[0] / mutation[1], recombination[1] / mutation[0]]


def _describe_outside(name: str, values: list[float], limits) -> str | None:
    """Describe how values are outside the limits; None if they are not, or the limits are unknown."""
    if limits is None:
        return None
    low, high = limits
    bounds = (
        (low - MISSING_MARGIN, high + MISSING_MARGIN) if name == "missingness" else (low / RANGE_FACTOR, high * RANGE_FACTOR)
    )
    beyond = [value for value in values if not bounds[0] <= value <= bounds[1]]
    if not beyond:
        return None
    worst = max(beyond, key=lambda value: max(value - bounds[1], bounds[0] - value))
    many = f" in {len(beyond)} of {len(values)} examples" if len(values) > 1 else ""
    return f"{name.replace('_', ' ')} {worst:.3g}{many}, trained on {low:.3g} to {high:.3g}"
