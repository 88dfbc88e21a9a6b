"""Metrics of accuracy, shared by training and evaluation, and the baselines to compare with.

The baselines use the same pairs and windows: heterozygosity in the best fixed window, and the best constant.
"""

import math

import numpy as np

from cxt.data.features import find_first_sites
from cxt.data.shards import PreprocessedSimulation
from cxt.evaluation.hmm import estimate_by_hmm

MIN_VARIATION = 1e-9
"""Range of ln TMRCA below which windows differ by rounding only, as those of a pair with a single tree do."""


def pearson_per_pair(truth: np.ndarray, estimate: np.ndarray) -> float:
    """Mean over pairs of Pearson's r along the windows; pairs without variation in either are excluded.

    Parameters
    ----------
    truth, estimate : arrays (…, windows)
        ln TMRCA.

    Returns
    -------
    float
        NaN if no pair varies in both.
    """
    t = truth - truth.mean(axis=-1, keepdims=True)
    e = estimate - estimate.mean(axis=-1, keepdims=True)
    varies = (np.ptp(truth, axis=-1) > MIN_VARIATION) & (np.ptp(estimate, axis=-1) > MIN_VARIATION)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (t * e).sum(-1) / np.sqrt((t**2).sum(-1) * (e**2).sum(-1))
    r = r[varies]
    return float(r.mean()) if r.size else float("nan")


def score_sites(estimate: np.ndarray, means: np.ndarray, variances: np.ndarray) -> dict:
    """Score an estimate of windows at every base pair: the mean over pairs of Pearson's r along the base pairs.

    The truth is ln TMRCA at each base pair, which varies within windows; the estimate is that of its window. With the
    estimates e and true means m of windows of one size, and the variance v of the truth over base pairs,
    r = cov(e, m) / sqrt(var(e) · v). It is at most sqrt(var(m) / v), where the estimate is the mean of each window.

    Parameters
    ----------
    estimate, means : arrays (…, windows)
        Estimated ln TMRCA, and the mean of the true ln TMRCA over the base pairs of each window.
    variances : array (…)
        Variance of the true ln TMRCA over all base pairs of each pair.

    Returns
    -------
    dict
        `r`, and `r_limit`, the largest r of any estimate that is constant in windows, over the same pairs; both None if no
        pair varies. Pairs without variation in either are excluded.
    """
    t, e = (values - values.mean(axis=-1, keepdims=True) for values in (means, estimate))
    varies = (np.ptp(estimate, axis=-1) > MIN_VARIATION) & (variances > MIN_VARIATION)
    if not varies.any():
        return {"r": None, "r_limit": None}
    t, e, deviation = t[varies], e[varies], np.sqrt(variances[varies])
    r = (t * e).mean(-1) / (np.sqrt((e**2).mean(-1)) * deviation)
    return {"r": float(r.mean()), "r_limit": float((np.sqrt((t**2).mean(-1)) / deviation).mean())}


def none_if_nan(value: float) -> float | None:
    """Convert NaN to None, for undefined metrics: a correlation without variation, a standard error of one simulation."""
    return None if np.isnan(value) else value


def clustered_standard_error(errors: np.ndarray) -> float:
    """Standard error of the mean of *errors* (simulations, …), because simulations are independent but their pairs are not."""
    means = errors.reshape(len(errors), -1).mean(axis=1)
    return float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")


def average_scenarios(scenarios: dict) -> dict:
    """Average metrics over scenarios, with equal weights: MSEs of model and baselines, coverage, and r where it is defined."""
    rows = list(scenarios.values())
    correlations = [row["r"] for row in rows if row["r"] is not None]
    at_sites = [row["site"] for row in rows if row["site"]["r"] is not None]
    return {
        "mse": float(np.mean([row["mse"] for row in rows])),
        "r": float(np.mean(correlations)) if correlations else None,
        "site": {key: float(np.mean([row[key] for row in at_sites])) if at_sites else None for key in ("r", "r_limit")},
        "coverage95": float(np.mean([row["coverage95"] for row in rows])),
        "hmm_mse": float(np.mean([row["baseline"]["hmm"]["mse"] for row in rows])),
        "heterozygosity_mse": float(np.mean([row["baseline"]["heterozygosity"]["mse"] for row in rows])),
        "constant_mse": float(np.mean([row["baseline"]["constant"]["mse"] for row in rows])),
        "recent": combine_recent(scenarios),
        "distribution": {key: float(np.mean([row["distribution"][key] for row in rows])) for key in rows[0]["distribution"]},
    }


LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Levels of the central intervals whose coverage is measured."""

BASELINE_WIDTHS = (1, 3, 5, 9, 15, 25, 41, 65, 101, 161, 257, 401)
"""Odd widths in base windows, centred, from which the heterozygosity baseline selects its best."""


def count_differences(simulation: PreprocessedSimulation, *, window_size: int, windows: int) -> np.ndarray:
    """Number of sites per base window at which each pair differs: (pairs, windows) int64."""
    window = np.repeat(
        np.arange(windows), np.diff(find_first_sites(simulation.positions, window_size=window_size, windows=windows))
    )
    result = np.empty((len(simulation.pairs), windows), dtype=np.int64)
    bits = np.unpackbits(simulation.genotypes, axis=1, bitorder="little")
    for row, (a, b) in enumerate(simulation.pairs):
        result[row] = np.bincount(window[bits[:, a] != bits[:, b]], minlength=windows)
    return result


def count_accessible_bases(simulation: PreprocessedSimulation, *, window_size: int, windows: int) -> np.ndarray:
    """Accessible bases per base window: (windows,) float64."""
    if simulation.mask is None:
        return np.full(windows, float(window_size))
    return (~simulation.mask).reshape(windows, window_size).sum(axis=1).astype(np.float64)


def estimate_from_heterozygosity(
    simulation: PreprocessedSimulation, width: int, *, window_size: int, windows: int, constant: float
) -> np.ndarray:
    """ln((d + 1/2) / (2 mu (l + l0))) for d differences on l accessible bases in *width* windows around each: (pairs, windows).

    Windows are cut at the ends. Half a difference is added so that windows without differences have a logarithm, together with
    the l0 bases on which half a difference is expected, l0 = 1/2 / (2 mu exp(*constant*)). Windows with few bases are thus
    pulled towards *constant*, the estimate of ln TMRCA without any data.
    """
    half_width = width // 2
    left = np.maximum(np.arange(windows) - half_width, 0)
    right = np.minimum(np.arange(windows) + half_width + 1, windows)

    def sum_around(values):
        cumulative = np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)], axis=-1)
        return cumulative[..., right] - cumulative[..., left]

    differences = sum_around(count_differences(simulation, window_size=window_size, windows=windows))
    bases = sum_around(count_accessible_bases(simulation, window_size=window_size, windows=windows))
    return np.log((differences + 0.5) / (2 * simulation.mutation_rate * bases + 0.5 * np.exp(-constant)))


def score_heterozygosity(simulations: list[PreprocessedSimulation], *, window_size: int, windows: int) -> dict:
    """Score the heterozygosity baseline at its best: the smallest MSE and the largest r over all widths, chosen separately.

    For windows with few bases, the baseline also uses the best constant, the mean true ln TMRCA of these pairs.
    """
    truth = np.concatenate([simulation.log_tmrca for simulation in simulations])
    constant = float(truth.mean())
    result = {"mse": np.inf, "mse_width": None, "r": None, "r_width": None}
    for width in (w for w in BASELINE_WIDTHS if w == 1 or w // 2 < windows):
        estimate = np.concatenate(
            [
                estimate_from_heterozygosity(simulation, width, window_size=window_size, windows=windows, constant=constant)
                for simulation in simulations
            ]
        )
        mse, r = float(((estimate - truth) ** 2).mean()), none_if_nan(pearson_per_pair(truth, estimate))
        if mse < result["mse"]:
            result |= {"mse": mse, "mse_width": width * window_size}
        if r is not None and (result["r"] is None or r > result["r"]):
            result |= {"r": r, "r_width": width * window_size}
    return result


RECENT = math.log(1000)
"""ln generations below which the windows of `score_recent` are."""


def score_recent(truth: np.ndarray, mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict:
    """Score the windows whose true TMRCA is below 1000 generations; arrays as in `score_variant`.

    Returns
    -------
    dict
        Number of such windows, and their MSE, bias and coverage of the 95% interval, None if there are none.
    """
    recent = truth < RECENT
    error = (mean - truth)[recent]
    if not error.size:
        return {"windows": 0, "mse": None, "bias": None, "coverage95": None}
    covered = ((truth >= low) & (truth <= high))[recent]
    return {
        "windows": int(error.size), "mse": float((error**2).mean()), "bias": float(error.mean()),
        "coverage95": float(covered.mean()),
    }  # fmt: skip


def combine_recent(scenarios: dict) -> dict:
    """Average the scores of recent windows over all windows of all scenarios."""
    rows = [row["recent"] for row in scenarios.values() if row["recent"]["windows"]]
    windows = sum(row["windows"] for row in rows)
    if not windows:
        return {"windows": 0, "mse": None, "bias": None, "coverage95": None}
    means = {key: sum(row[key] * row["windows"] for row in rows) / windows for key in ("mse", "bias", "coverage95")}
    return {"windows": windows} | means


def measure_coverage(rank: np.ndarray) -> dict[str, float]:
    """Share of windows whose truth is inside the central interval of each of `LEVELS`, from the ranks of the truth."""
    return {f"{level:g}": float((np.abs(2 * rank - 1) <= level).mean()) for level in LEVELS}


RANK_CLASSES = 20
"""Classes of equal width of the rank of the truth in its distribution."""


def count_ranks(rank: np.ndarray) -> list[float]:
    """Share of windows in each of `RANK_CLASSES` classes of the rank of the truth; a calibrated posterior has equal shares."""
    counts, _ = np.histogram(rank, bins=RANK_CLASSES, range=(0, 1))
    return (counts / rank.size).tolist()


def score_hmm(
    truth: np.ndarray, simulations: list[PreprocessedSimulation], *, window_size: int, windows: int, samples: int
) -> dict:
    """Score the hidden Markov model of `cxt.evaluation.hmm` on the same pairs and windows: its MSE and r."""
    estimates = [estimate_by_hmm(one, window_size=window_size, windows=windows, samples=samples) for one in simulations]
    estimate = np.stack(estimates)
    return {"mse": float(((estimate - truth) ** 2).mean()), "r": none_if_nan(pearson_per_pair(truth, estimate))}


def score_variant(truth, mean, low, high, rank, simulations, *, window_size: int, windows: int, samples: int) -> dict:
    """All metrics of one variant.

    Parameters
    ----------
    truth, mean, low, high : arrays (simulations, pairs, windows)
        ln TMRCA: the truth, its posterior mean, and the ends of the 95% interval.
    rank : array (simulations, pairs, windows)
        Posterior probability of a smaller value than the truth.
    simulations : list of PreprocessedSimulation
    window_size, windows : int
        Base pairs of a window, and their number.
    samples : int
        Haplotypes of a simulation.

    Returns
    -------
    dict
        Metrics that are not defined are None: `mse_se` of one simulation, `r` where no pair varies.
    """
    squared = (mean - truth) ** 2
    constant = (truth - truth.mean()) ** 2
    return {
        "simulations": len(simulations),
        "pairs": int(truth.shape[0] * truth.shape[1]),
        "mse": float(squared.mean()),
        "mse_se": none_if_nan(clustered_standard_error(squared)),
        "r": none_if_nan(pearson_per_pair(truth, mean)),
        "bias": float((mean - truth).mean()),
        "coverage95": float(((truth >= low) & (truth <= high)).mean()),
        "coverage": measure_coverage(rank),
        "ranks": count_ranks(rank),
        "recent": score_recent(truth, mean, low, high),
        "baseline": {
            "heterozygosity": score_heterozygosity(simulations, window_size=window_size, windows=windows),
            "hmm": score_hmm(truth, simulations, window_size=window_size, windows=windows, samples=samples),
            "constant": {"mse": float(constant.mean()), "value": float(truth.mean())},
        },
    }
