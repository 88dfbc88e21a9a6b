"""A hidden Markov model of a pair's TMRCA, to compare checkpoints with.

It knows what a checkpoint has to infer, the mutation and recombination rates, but sees the two haplotypes of the pair only, and
assumes a constant population size, that which the sample's diversity suggests.

The states are intervals of time, the observations the differences in steps of about 100 bp. Between steps the TMRCA changes as
in the SMC' (Marjoram and Wall 2006): a recombination on one of the two branches lets the part above it coalesce anew, perhaps
with the branch that it has left, which changes nothing.
"""

import numpy as np

from cxt.data.kernels import compiled
from cxt.data.shards import PreprocessedSimulation

STATES = 64
STEP = 100
"""Base pairs of a step, about: a whole number of steps make a window."""

SHORTEST, LONGEST = 1e-3, 30.0
"""Ends of the second-last and last finite edge of the states, in units of the mean coalescence time."""


def split_time(mean: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Divide time into states, for exponential coalescence times with a *mean* in generations.

    Returns
    -------
    edges : (STATES + 1,) array
        From 0 to infinity, evenly spaced in the logarithm between.
    times : (STATES,) array
        Mean time of each state.
    prior : (STATES,) array
        Probability of each state.
    """
    edges = np.concatenate([[0.0], mean * np.geomspace(SHORTEST, LONGEST, STATES - 1), [np.inf]])
    beyond = np.exp(-edges / mean)  # probability of a longer time
    prior = beyond[:-1] - beyond[1:]
    # The integral of t exp(-t / m) / m is -(t + m) exp(-t / m).
    finite = np.where(np.isinf(edges), 0.0, edges)
    below = (finite + mean) * beyond
    return edges, (below[:-1] - below[1:]) / prior, prior


def build_transitions(edges: np.ndarray, times: np.ndarray, *, mean: float, recombination: float) -> np.ndarray:
    """Probabilities of the state of the next step, given that of this one.

    Given a recombination at a uniform time below the TMRCA s, on either branch, the lineage above it coalesces at rate 1 / m
    with each lineage that is there: two below s, of which one is its own and changes nothing, and one above. The density of a
    new time t is then (1 - exp(-2t / m)) / (2s) below s, and (1 - exp(-2s / m)) exp(-(t - s) / m) / (2s) above.

    Parameters
    ----------
    edges, times : arrays
        From `split_time`.
    mean : float
        Mean coalescence time m in generations.
    recombination : float
        Crossovers between two steps, per generation.

    Returns
    -------
    (STATES, STATES) array
        Rows sum to one.
    """
    s = times[:, None]
    low, high = edges[:-1], edges[1:]
    start, end = np.minimum(low, s), np.minimum(high, s)
    younger = (end - start) - mean / 2 * (np.exp(-2 * start / mean) - np.exp(-2 * end / mean))
    start, end = np.maximum(low, s), np.maximum(high, s)
    older = (1 - np.exp(-2 * s / mean)) * mean * (np.exp(-(start - s) / mean) - np.exp(-(end - s) / mean))
    changed = (younger + older) / (2 * s)
    changed *= 1 - np.exp(-2 * recombination * s)
    return changed + np.diag(1 - changed.sum(axis=1))


@compiled
def _multiply(vector, matrix):
    """*vector* times *matrix*, as a sum of rows, which a compiler turns into vector instructions."""
    result = np.zeros(matrix.shape[1])
    for i in range(len(vector)):
        for j in range(matrix.shape[1]):
            result[j] += vector[i] * matrix[i, j]
    return result


@compiled
def _find_posterior_means(differences, exposure, prior, transitions, rates, log_times, result):
    """Fill *result* (steps,) with the posterior mean of ln time, by the forward and the backward algorithm.

    *exposure* (steps,) is the accessible share of each step, *rates* (states,) the expected differences in a whole step.
    """
    steps, states = len(differences), len(prior)
    forward = np.empty((steps, states))
    state = prior.copy()
    emission = np.empty(states)
    for i in range(steps):
        if i > 0:
            state = _multiply(state, transitions)
        for k in range(states):
            expected = rates[k] * exposure[i]
            state[k] *= np.exp(-expected) * expected ** differences[i] if expected > 0 else 1.0
        state /= state.sum()
        forward[i] = state
    backward, back = np.ones(states), transitions.T.copy()
    for i in range(steps - 1, -1, -1):
        weights = forward[i] * backward
        result[i] = (weights * log_times).sum() / weights.sum()
        for k in range(states):
            expected = rates[k] * exposure[i]
            emission[k] = np.exp(-expected) * expected ** differences[i] if expected > 0 else 1.0
        backward = _multiply(backward * emission, back)
        backward /= backward.sum()


def estimate_by_hmm(simulation: PreprocessedSimulation, *, window_size: int, windows: int, samples: int) -> np.ndarray:
    """Estimate ln TMRCA of the pairs of a simulation by the hidden Markov model.

    Parameters
    ----------
    simulation : PreprocessedSimulation
    window_size, windows : int
        Base pairs of a window, and their number.
    samples : int
        Haplotypes of the simulation.

    Returns
    -------
    (pairs, windows) float64 array
        The logarithm of the mean over a window's steps of exp(posterior mean of ln time), because the truth is the logarithm
        of a window's mean TMRCA.
    """
    per_window = -(-window_size // STEP)
    steps, step = windows * per_window, window_size / per_window
    bits = np.unpackbits(simulation.genotypes, axis=1, bitorder="little")
    at = np.minimum((simulation.positions / step).astype(np.int64), steps - 1)
    accessible = np.ones(windows * window_size) if simulation.mask is None else (~simulation.mask[: windows * window_size])
    ends = np.concatenate([[0.0], np.cumsum(accessible)])[np.rint(np.arange(steps + 1) * step).astype(np.int64)]
    exposure = np.diff(ends) / step
    derived = bits.sum(axis=1, dtype=np.int64)
    differences = (derived * (samples - derived)).sum() / (samples * (samples - 1) / 2)  # mean over all pairs of the sample
    mean = max(differences, 0.5) / (2 * simulation.mutation_rate * max(ends[-1], 1.0))
    edges, times, prior = split_time(mean)
    # An unknown rate is taken to be that of mutations, of which it is rarely more than a few times as much or as little.
    recombination = simulation.mutation_rate if np.isnan(simulation.recombination_rate) else simulation.recombination_rate
    transitions = build_transitions(edges, times, mean=mean, recombination=recombination * step)
    rates = 2 * simulation.mutation_rate * step * times
    result = np.empty((len(simulation.pairs), windows))
    log_time = np.empty(steps)
    for row, (a, b) in enumerate(simulation.pairs):
        differences = np.bincount(at[bits[:, a] != bits[:, b]], minlength=steps)
        _find_posterior_means(differences, exposure, prior, transitions, rates, np.log(times), log_time)
        result[row] = np.log(np.exp(log_time).reshape(windows, per_window).mean(axis=1))
    return result
