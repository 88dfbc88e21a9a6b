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
