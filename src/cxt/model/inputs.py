"""Checks of a network's input X: its shape, its values, and whether they are in the range of the training data.

A network answers to any numbers. Input that cannot be right is refused. Input outside the range of the training data, for
which the accuracy of an estimate is not known, raises a warning.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch

from cxt.errors import BadRequest

RANGE_FACTOR = 1.5
"""Diversity and rates may be this factor below or above the range of the training data without a warning."""

MISSING_MARGIN = 0.05
"""Missing fractions may be this much below or above the range of the training data without a warning."""

PRECISION = 2.0**-8
"""Relative error of a logarithm that was rounded to bfloat16."""


class OutsideTraining(UserWarning):
    """X is not like the data that the network was trained on."""


class TrainedOn(NamedTuple):
    """What a checkpoint says of its training data.

    scales : window widths in base windows
    ranges : smallest and largest value over the training simulations, by name: `diversity` (pairwise differences per
        accessible bp), `mutation_rate` and `recombination_rate` (per bp and generation), `missingness` (share of the
        region); those that are not known are left out or None
    """

    scales: tuple[int, ...]
    ranges: dict[str, list[float] | None]


def convert_input(model, x) -> torch.Tensor:
    """*x*, an array or tensor of any floating-point type, as a tensor on the model's device; BadRequest if it is none."""
    try:
        x = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadRequest(f"X is no array of numbers: {error}") from None
    if not x.is_floating_point():
        raise BadRequest(f"X holds {str(x.dtype).removeprefix('torch.')}, expected floating-point log1p of counts")
    return x.to(model.backbone.head.weight.device)


def check_shape(model, x) -> None:
    """BadRequest unless *x* is a tensor (B, 2, scales, windows, samples) as *model* reads them."""
    if not isinstance(x, torch.Tensor):
        raise BadRequest(f"X is a {type(x).__name__}, expected a tensor: torch.as_tensor(X)")
    config = model.config
    expected = (2, config.scales, config.windows, model.samples)
    if tuple(x.shape[1:]) == expected:
        return
    shape = tuple(x.shape)
    message = (
        f"X has shape {shape}, expected (examples, 2, {', '.join(map(str, expected[1:]))}): this model reads {config.windows} "
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
        details += "; a checkpoint with an adapter reads another number of haplotypes than one without"
    raise BadRequest(details)


def check_tokens(model, y, *, examples: int, replicates: int | None = None) -> None:
    """BadRequest unless *y* is a tensor of tokens (examples, windows + 1), or (examples, replicates, windows + 1)."""
    expected = (examples, model.config.windows + 1) if replicates is None else (examples, replicates, model.config.windows + 1)
    if not isinstance(y, torch.Tensor) or tuple(y.shape) != expected:
        description = f"has shape {tuple(y.shape)}" if isinstance(y, torch.Tensor) else f"is a {type(y).__name__}"
        raise BadRequest(
            f"the tokens are {expected} for X and this model: a start token and one of each window; y {description}"
        )


def check_input(model, x: torch.Tensor, *, window_size, mutation_rate=None, recombination_rate=None) -> None:
    """Check X, made with windows of *window_size* bp, against what *model* was trained for.

    Raises
    ------
    BadRequest
        For another window size, numbers that are not log1p of counts, or missingness that is not there.

    Warns
    -----
    OutsideTraining
        Once, of everything that lies outside the ranges of the training data, and of windows of other scales.
    """
    check_shape(model, x)
    _check_window_size(model, window_size)
    rates = {"mutation_rate": mutation_rate, "recombination_rate": recombination_rate}
    for name, rate in rates.items():
        if rate is not None and not (_is_number(rate) and 0 <= rate < math.inf):
            raise BadRequest(f"{name} is {rate!r}, expected a number per bp and generation")
    if not len(x):
        raise BadRequest("X holds no example")
    counts = _recover_counts(x)
    missing = _recover_missing(model, x)  # (B, scales, windows) or None
    if model.trained_on is None:
        return
    scales, ranges = model.trained_on
    spectra = [counts[:, :, i, ::scale].sum(dim=(1, 2), dtype=torch.float64) for i, scale in enumerate(scales)]  # (B, n)
    inaccessible = _mean_missing(missing, scales[0]) if missing is not None else torch.zeros(len(x), device=x.device)
    measured = {
        "diversity": _compute_diversity(spectra[0], inaccessible, bases=x.shape[3] * model.config.window_size).tolist(),
        "missingness": inaccessible.tolist(),
    }
    measured |= {name: [float(rate)] for name, rate in rates.items() if rate is not None}
    outside = [
        description for name, values in measured.items() if (description := _describe_outside(name, values, ranges.get(name)))
    ]
    if not _hold_same_sites(spectra):
        outside.append(f"its windows do not hold the same sites at each of the scales {', '.join(map(str, scales))}")
    if outside:
        warnings.warn(
            f"X is not like the data that this model was trained on: {'; '.join(outside)}. How good its estimates are there is "
            "not known",
            OutsideTraining,
            stacklevel=3,  # whoever has called `generate`
        )


def _is_number(value) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _check_window_size(model, window_size) -> None:
    if not _is_number(window_size):
        raise BadRequest(f"window_size is {window_size!r}, expected the base pairs of a window of X")
    if window_size != model.config.window_size:
        raise BadRequest(
            f"this model reads windows of {model.config.window_size} bp, these counts were made with {window_size:g}; make "
            "them with the model's, or train a model for them"
        )


def _recover_counts(x: torch.Tensor) -> torch.Tensor:
    """Recover the counts of X (B, 2, S, W, n), without bin 0, as float32; BadRequest if they are not whole numbers."""
    x = x[..., 1:].float()
    if not torch.isfinite(x).all():
        raise BadRequest("X holds numbers that are not finite")
    counts = torch.expm1(x).round_()
    wrong = (x - torch.log1p(counts)).abs() > PRECISION * x.abs()
    if wrong.any():
        value = float(x[wrong][0])
        raise BadRequest(
            f"X holds {value:.4g}, which is log1p of no count, but of {math.expm1(value):.4g}: pass the natural logarithm of "
            "1 + count, such as torch.log1p(torch.from_numpy(cxt.pair_features(…)))"
        )
    return counts


def _recover_missing(model, x: torch.Tensor) -> torch.Tensor | None:
    """Recover missing fractions f (B, S, W) from bin 0 of X, ln(1 + e^f) and ln(1 + e^(1-f)); None if it holds none."""
    is_read = not (model.config.mask_singletons if model.adapter is None else model.adapter.overwrites_bin0)
    bin0 = x[..., 0].float()  # (B, 2, S, W)
    fraction = torch.log(torch.expm1(bin0))
    f, other = fraction[:, 0], 1 - fraction[:, 1]
    margin = 4 * PRECISION
    is_missingness = bool(((f - other).abs() <= 2 * margin).all() and (f >= -margin).all() and (f <= 1 + margin).all())
    if is_missingness:
        return f.clamp(0, 1)
    if is_read:
        raise BadRequest(
            "this model reads the missing fraction of each window from frequency bin 0, and that of X holds something else; "
            "give cxt.pair_features a mask (all False if nothing is missing)"
        )
    return None


def _mean_missing(missing: torch.Tensor, scale: int) -> torch.Tensor:
    """Missing share of the region (B,), from the windows of the first scale that lie side by side, by their widths."""
    windows = missing.shape[2]
    starts = torch.arange(0, windows, scale, device=missing.device)
    widths = (windows - starts).clamp(max=scale).float()
    return missing[:, 0, ::scale] @ widths / windows


def _hold_same_sites(spectra: list[torch.Tensor]) -> bool:
    """Whether the windows of each scale that lie side by side hold the same sites, as far as rounding allows."""
    totals = torch.stack([spectrum.sum(-1) for spectrum in spectra])  # (scales, B)
    return not bool(((totals.amax(0) - totals.amin(0)) > 0.25 * totals.amax(0) + 1).any())


def _compute_diversity(spectrum: torch.Tensor, inaccessible: torch.Tensor, *, bases: int) -> torch.Tensor:
    """Mean pairwise differences per accessible bp (B,), of site frequency spectra (B, n - 1): bins 1 to n - 1."""
    samples = spectrum.shape[-1] + 1
    derived = torch.arange(1, samples, dtype=torch.float64, device=spectrum.device)
    pairs_that_differ = derived * (samples - derived) / (samples * (samples - 1) / 2)
    return spectrum @ pairs_that_differ / ((1 - inaccessible.double()) * bases).clamp(min=1)


def _describe_outside(name: str, values: list[float], limits) -> str | None:
    """Describe how values lie outside the limits; None if they do not, or if the limits are not known."""
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
