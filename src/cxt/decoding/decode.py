"""Reading the posterior of many examples, and its summaries."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from cxt.config.learning import Reading, choose_reading
from cxt.data.examples import compute_model_input
from cxt.data.grid import Grid
from cxt.decoding.ensembles import build_ensemble_reader
from cxt.decoding.posterior import posterior_mean, posterior_quantile, posterior_rank
from cxt.decoding.reading import AUTOCAST
from cxt.decoding.scores import WindowScores, score_windows
from cxt.model.rates import find_scale
from cxt.model.transformer import CoalescenceModel


class Summaries(NamedTuple):
    """Posterior mean and ends of the central 95% interval of ln TMRCA, each (examples, windows) float64.

    If the truth was given, *rank* is the probability of a smaller ln TMRCA than the true one, and *scores* those of the
    distributions.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    rank: np.ndarray | None = None
    scores: WindowScores | None = None


def has_doubles(device) -> bool:
    """Whether a device computes in float64, which sampling and posteriors need; Apple's GPUs (`mps`) do not."""
    return torch.device(device).type != "mps"


def use_precision(precision: str, device):
    """Context in which a network uses a training precision on a GPU; on a CPU it computes in 32 bits, as in training."""
    kind = torch.device(device).type
    if kind != "cuda" or precision not in AUTOCAST:
        return contextlib.nullcontext()
    return torch.autocast(kind, dtype=AUTOCAST[precision])


def decode(
    model: CoalescenceModel | Sequence[CoalescenceModel],
    counts,
    missing,
    *,
    rates: torch.Tensor | np.ndarray | None = None,
    grid: Grid,
    replicates: int,
    batch_size: int,
    seed: int,
    device="cpu",
    reading: str | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    truth: np.ndarray | None = None,
) -> Summaries:
    """Posterior mean and central 95% interval of each window.

    They come from the marginal distribution of the window, or the average of the replicates' predictive distributions.

    Averaging predictive distributions is more accurate than averaging sampled values, because each replicate contributes its
    whole distribution for a window, not one draw. Except for rounding, the result does not depend on *batch_size*.

    Parameters
    ----------
    model : CoalescenceModel or sequence of them
        In eval mode, on *device*. Of several, with equal inputs, the distributions are averaged.
    counts : integer array (examples, 2, scales, windows, samples)
        Raw counts.
    missing : array (examples, scales, windows), optional
        Missing fractions.
    rates : float32 array (examples, 2), optional
        Ln mutation and recombination rate, NaN where unknown, for a network that reads rates; by default none is known.
        Results are in ln generations in any case.
    grid : Grid
        The model's grid of ln TMRCA.
    replicates : int
        Decoded sequences per example.
    batch_size : int
        Examples decoded together.
    seed : int
        Seed of the sampling.
    device : torch device
    reading : str, optional
        `marginal` or `sampled`; by default the one that the model was trained for, see `cxt.decoding.reading`.
    temperature, top_k : float, int
        Sampling settings, see `cxt.model.decoder.Decoder`.
    truth : array (examples, windows), optional
        True ln TMRCA, to find its rank and to score the distributions.

    Returns
    -------
    Summaries
    """
    models = [model] if isinstance(model, CoalescenceModel) else list(model)
    readings: list[Reading] = [choose_reading(one.objective, reading) for one in models]
    read = build_ensemble_reader(models, readings, replicates=replicates, seed=seed, temperature=temperature, top_k=top_k)
    parts, scores = [], []
    for start in range(0, len(counts), batch_size):
        part = slice(start, start + batch_size)
        part_missing = None if missing is None else torch.as_tensor(missing[part], dtype=torch.float32, device=device)
        x = compute_model_input(torch.as_tensor(counts[part], device=device), part_missing)
        part_rates = None if rates is None else torch.as_tensor(rates[part], dtype=torch.float32, device=device)
        scale = np.zeros((len(x), 1))
        if models[0].config.reads_rates and part_rates is not None:
            scale = find_scale(part_rates.cpu().numpy())[:, None]
        distribution, _ = read(x, part_rates, range(start, start + len(x)), None)
        quantiles = [posterior_quantile(distribution, grid, q) for q in (0.025, 0.975)]
        summaries = [summary.cpu().numpy() - scale for summary in (posterior_mean(distribution, grid), *quantiles)]
        if truth is not None:
            scaled = torch.as_tensor(truth[part] + scale, device=distribution.device)
            summaries.append(posterior_rank(distribution, grid, scaled).cpu().numpy())
            scores.append(score_windows(distribution, grid, scaled))
        parts.append(summaries)
    mean, low, high, *rank = map(np.concatenate, zip(*parts, strict=True))
    if not scores:
        return Summaries(mean, low, high)
    return Summaries(mean, low, high, rank[0], WindowScores(*map(np.concatenate, zip(*scores, strict=True))))
