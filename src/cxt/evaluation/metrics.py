"""Figures of accuracy that training and evaluation share, so that one name means one thing."""

import numpy as np

FLAT = 1e-9
"""A range of ln TMRCA that is rounding: a pair with one tree has the same value in all windows but for that."""


def pearson_per_pair(truth: np.ndarray, estimate: np.ndarray) -> float:
    """Mean over pairs of Pearson's r along the windows; pairs without variation in either are left out.

    Parameters
    ----------
    truth, estimate : (…, windows) ln TMRCA

    Returns
    -------
    float
        NaN if no pair varies in both.
    """
    t = truth - truth.mean(axis=-1, keepdims=True)
    e = estimate - estimate.mean(axis=-1, keepdims=True)
    varies = (np.ptp(truth, axis=-1) > FLAT) & (np.ptp(estimate, axis=-1) > FLAT)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (t * e).sum(-1) / np.sqrt((t**2).sum(-1) * (e**2).sum(-1))
    r = r[varies]
    return float(r.mean()) if r.size else float("nan")


def known(value: float) -> float | None:
    """None for a figure that is NaN: a correlation where nothing varies, an error of one simulation."""
    return None if np.isnan(value) else value


def clustered_error(errors: np.ndarray) -> float:
    """Standard error of the mean of *errors* (simulations, …): simulations are independent, their pairs are not."""
    means = errors.reshape(len(errors), -1).mean(axis=1)
    return float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")


def overall(scenarios: dict) -> dict:
    """Means over scenarios, each counted once, of the MSEs of model and baselines and of coverage and, where known, r."""
    rows = list(scenarios.values())
    correlations = [row["r"] for row in rows if row["r"] is not None]
    return {
        "mse": float(np.mean([row["mse"] for row in rows])),
        "r": float(np.mean(correlations)) if correlations else None,
        "coverage95": float(np.mean([row["coverage95"] for row in rows])),
        "heterozygosity_mse": float(np.mean([row["baseline"]["heterozygosity"]["mse"] for row in rows])),
        "constant_mse": float(np.mean([row["baseline"]["constant"]["mse"] for row in rows])),
    }
