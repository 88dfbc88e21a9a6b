"""Errors of real data, added to the genotypes of training examples.

In this order, each independent of the others:

1. `thinning`: a site is lost.
2. `mispolarised`: the ancestral and the derived allele of a site are exchanged.
3. `genotype_errors`: an allele of a haplotype is flipped.
4. `missing_genotypes`: an allele of a haplotype is missing, and read as 0, the ancestral allele.
5. `phase_switches`: at a site at which the haplotypes 2i and 2i + 1 differ, they are exchanged from this site on.

Sites at which all haplotypes then agree are dropped, and derived alleles are counted anew. Targets do not change. The noise of
an example is a function of (seed, epoch, example), so that it does not depend on batches, ranks, or where a run was resumed.
"""

import dataclasses
import math

import numpy as np

from cxt.config.learning import NOISE_RATES, Noise
from cxt.data.kernels import allocate_sums, compiled, count_all_sites, count_bits, count_pair
from cxt.random_seeds import hash_key


@compiled
def _draw_gap(rng, log_keep):
    """Number of places before the next event, if *log_keep* is ln(1 - its probability): geometric, by inversion."""
    return np.int64(min(np.log1p(-rng.random()) / log_keep, 2.0**62))


@compiled
def _draw_sites(rng, probability, sites, chosen):
    """Set the bit of each of *sites* with a *probability* in *chosen* (words,)."""
    if probability == 0:
        return
    log_keep = np.log1p(-probability)
    site = _draw_gap(rng, log_keep)
    while site < sites:
        chosen[site >> 6] |= np.uint64(1) << np.uint64(site & 63)
        site += 1 + _draw_gap(rng, log_keep)


@compiled
def _change_genotypes(rng, probability, sites, flip, words):
    """With a *probability* each, *flip* the bits of all haplotypes and sites, or set them to 0."""
    if probability == 0:
        return
    log_keep = np.log1p(-probability)
    place = _draw_gap(rng, log_keep)
    while place < len(words) * sites:
        haplotype, site = place // sites, place % sites
        bit = np.uint64(1) << np.uint64(site & 63)
        if flip:
            words[haplotype, site >> 6] ^= bit
        else:
            words[haplotype, site >> 6] &= ~bit
        place += 1 + _draw_gap(rng, log_keep)


@compiled
def _switch_phases(rng, probability, lost, words):
    """Exchange haplotypes 2i and 2i + 1 from a site on, with a *probability* for each site at which they differ."""
    if probability == 0:
        return
    log_keep = np.log1p(-probability)
    for first in range(0, len(words) - 1, 2):
        before, exchanged = _draw_gap(rng, log_keep), np.uint64(0)  # sites before the next switch; all bits set, or none
        for w in range(words.shape[1]):
            differ = words[first, w] ^ words[first + 1, w]
            exchange, left = exchanged, differ & ~lost[w]
            number = count_bits(left)
            while number > before:
                for _ in range(before):
                    left &= left - np.uint64(1)
                number -= before + 1
                lowest = left & (~left + np.uint64(1))
                left ^= lowest
                exchange ^= ~(lowest - np.uint64(1))
                exchanged = ~exchanged
                before = _draw_gap(rng, log_keep)
            before -= number
            words[first, w] ^= differ & exchange
            words[first + 1, w] ^= differ & exchange


@compiled
def _count_derived(lost, words, derived):
    """Fill *derived* (sites,), with 0 for sites that are lost or do not segregate, whose bits are set to 0 in *words*."""
    length = 1  # of a count of all haplotypes in binary digits
    while len(words) >> length:
        length += 1
    digits = np.empty(length, np.uint64)  # each has the bits of 64 sites
    for w in range(words.shape[1]):
        digits[:] = 0
        for h in range(len(words)):
            carry, place = words[h, w] & ~lost[w], 0
            while carry:
                digits[place], carry = digits[place] ^ carry, digits[place] & carry
                place += 1
        segregating = np.uint64(0)
        for site in range(64 * w, min(64 * w + 64, len(derived))):
            bit, count = np.uint64(site & 63), 0
            for place in range(length):
                count += np.int64((digits[place] >> bit) & np.uint64(1)) << place
            derived[site] = count if count < len(words) else 0
            segregating |= np.uint64(derived[site] > 0) << bit
        for h in range(len(words)):
            words[h, w] &= segregating


@compiled
def add_noise(words, rates, rng, derived):
    """Add noise to the genotypes of a simulation in place.

    Parameters
    ----------
    words : uint64 array (samples, ceil(sites / 64))
        From `cxt.data.kernels.pack_haplotype_words`. All bits of sites that are dropped are set to 0.
    rates : tuple of float
        Probabilities, in the order of `NOISE_RATES`.
    rng : numpy.random.Generator
    derived : integer array (sites,)
        Filled with the number of derived alleles at each site, 0 at those that are dropped.
    """
    thinning, mispolarised, genotype_errors, missing_genotypes, phase_switches = rates
    sites = len(derived)
    lost, exchanged = np.zeros(words.shape[1], np.uint64), np.zeros(words.shape[1], np.uint64)
    _draw_sites(rng, thinning, sites, lost)
    _draw_sites(rng, mispolarised, sites, exchanged)
    for h in range(len(words)):
        for w in range(words.shape[1]):
            words[h, w] ^= exchanged[w]
    _change_genotypes(rng, genotype_errors, sites, True, words)
    _change_genotypes(rng, missing_genotypes, sites, False, words)
    _switch_phases(rng, phase_switches, lost, words)
    _count_derived(lost, words, derived)


@compiled
def _count_noisy_pair(words, first_site, a, b, scales, rates, rng, start, windows, first, out):
    samples = out.shape[3]
    words, derived = words.copy(), np.empty(first_site[len(first_site) - 1], np.int32)
    add_noise(words, rates, rng, derived)
    sites = first_site[start : start + windows + 1]
    total = np.zeros(windows * samples, out.dtype)
    count_all_sites(derived, sites, samples, total)
    for k in range(0, len(total), samples):  # dropped sites
        total[k] = 0
    differ, agree = allocate_sums(total, scales, samples), allocate_sums(total, scales, samples)
    count_pair(words, derived, sites, total, a, b, scales, differ, agree, first, out)


@dataclasses.dataclass(frozen=True)
class BatchNoise:
    """The noise of the examples of a batch.

    Attributes
    ----------
    rates : tuple of float
        Probabilities, in the order of `NOISE_RATES`.
    key : int
        Key of the random numbers.
    """

    rates: tuple[float, ...]
    key: int

    def generator(self, example: int) -> np.random.Generator:
        """The random numbers of the noise of *example*, an index from 0."""
        return np.random.default_rng([self.key, example])

    def count_pair(
        self, words, first_site, pair, *, scales, example: int, out, start: int = 0, windows: int | None = None, first: int = 0
    ) -> None:
        """Fill *out* with the counts of a pair after noise, in all windows, or in a region of them.

        The noise is that of the whole example: two regions of it have the same errors where they overlap.

        Parameters
        ----------
        words : uint64 array (samples, ceil(sites / 64))
            Genotypes of the simulation, which are not changed.
        first_site : int32 array (windows + 1,)
            From `cxt.data.features.find_first_sites`.
        pair : two haplotype indices
        scales : int64 array
            Widths in base windows, at most the number of windows.
        example : int
            Index of the example.
        out : array (2, scales, windows, samples)
            Of a type that holds the number of sites of any window.
        start, windows : int
            First window of the region, and their number; all by default.
        first : int
            The region's first window in *out*.
        """
        a, b = map(int, pair)
        windows = len(first_site) - 1 if windows is None else windows
        rng = self.generator(example)
        _count_noisy_pair(words, first_site, a, b, scales, self.rates, rng, start, windows, first, out)


def build_noise(noise: Noise, *, seed: int, epoch: int = 0, progress: float = 1.0) -> BatchNoise:
    """The noise of a batch.

    Parameters
    ----------
    noise : Noise
        Its settings.
    seed, epoch : int
        Each seed and epoch has its own random numbers.
    progress : float
        Fraction of the optimizer steps that are done. Above 1, as for batches that are prepared in advance after the last step,
        it counts as 1.

    Returns
    -------
    BatchNoise
    """
    progress = min(progress, 1.0)
    share = 0.5 * (1 - math.cos(math.pi * progress)) if noise.factor_schedule == "cosine" else progress
    factor = noise.initial_factor + (noise.final_factor - noise.initial_factor) * share
    return BatchNoise(tuple(factor * float(getattr(noise, name)) for name in NOISE_RATES), hash_key(seed, "noise", epoch))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The noise of each batch of a run.

    Attributes
    ----------
    noise : Noise
        Its settings.
    seed : int
        Seed of the run.
    grad_accum : int
        Batches of an optimizer step; fewer in the last step of an epoch.
    steps_per_epoch, total_steps : int
        Optimizer steps of an epoch, and of the run.
    """

    noise: Noise
    seed: int
    grad_accum: int
    steps_per_epoch: int
    total_steps: int

    def at(self, epoch: int, batch: int) -> BatchNoise:
        """The noise of a batch of an epoch, both counted from 0."""
        step = epoch * self.steps_per_epoch + batch // self.grad_accum
        return build_noise(self.noise, seed=self.seed, epoch=epoch, progress=step / max(1, self.total_steps - 1))
