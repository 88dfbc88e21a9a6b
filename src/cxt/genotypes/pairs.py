"""Which pairs of haplotypes to translate."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cxt.console import counted
from cxt.errors import BadRequest, suggest_nearest
from cxt.genotypes.records import Haplotype
from cxt.random_seeds import check_seed, hash_key, mix_bits

KINDS = ("all", "within", "between", "within-individual")
"""Pairs that have a name; a number and a file are the other possibilities."""

MAX_PAIRS = 1_000_000
MAX_LISTED_SAMPLES = 5


def choose_pairs(
    haplotypes: Sequence[Haplotype],
    spec: str | int,
    *,
    seed: int = 0,
    unphased: Mapping[str, int] | None = None,
    assume_phased: bool = False,
) -> np.ndarray:
    """Choose pairs of haplotypes.

    Parameters
    ----------
    haplotypes : sequence of Haplotype
    spec : str or int
        `all`; `within` or `between` populations; `within-individual`, the copies of each individual; a number N of random
        pairs of all, without replacement; or the path of a file with two columns, each the name of a haplotype (`NA12878/1`) or
        of a sample, which stands for all of its haplotypes.
    seed : int
        Seed of the random pairs.
    unphased : mapping, optional
        {sample: number of heterozygous genotypes without phase}.
    assume_phased : bool
        Whether to take the haplotypes of unphased genotypes as the file has them.

    Returns
    -------
    int64 array, (pairs, 2)
        Indices of haplotypes; the first of a pair is the lower one, and the rows ascend.

    Raises
    ------
    BadRequest
        For another *spec*; if there are no such pairs, or more than `MAX_PAIRS`; if a pair needs the phase of unphased
        genotypes; if a file has an unknown name, a pair of a haplotype with itself, or a pair twice.
    """
    check_pairs(spec)
    spec = str(spec)
    if spec in KINDS:
        pairs = _named_pairs(haplotypes, spec)
    elif spec.isdecimal():
        pairs = _random_pairs(len(haplotypes), int(spec), seed=check_seed(seed))
    else:
        pairs = _read_pairs(Path(spec), haplotypes)
    if not assume_phased:
        _check_phase(haplotypes, pairs, unphased or {})
    return pairs


def check_pairs(spec: str | int) -> None:
    """BadRequest if *spec* cannot be pairs, whatever the haplotypes are; see `choose_pairs`."""
    spec = str(spec)
    if spec.isdecimal():
        if int(spec) < 1:
            raise BadRequest(f"--pairs {spec}: choose at least one pair")
    elif spec not in KINDS and not Path(spec).is_file():
        raise BadRequest(
            f"--pairs '{spec}' is neither the name of a set of pairs, nor a number, nor a file{suggest_nearest(spec, KINDS)}"
        )


def _check_number(number: int) -> None:
    if number > MAX_PAIRS:
        raise BadRequest(
            f"these are {number:,} pairs, more than {MAX_PAIRS:,}; choose fewer, for example 1000 at random: --pairs 1000"
        )


def _upper_triangle(size: int) -> np.ndarray:
    _check_number(size * (size - 1) // 2)
    return np.column_stack(np.triu_indices(size, 1)).astype(np.int64)


def _named_pairs(haplotypes: Sequence[Haplotype], spec: str) -> np.ndarray:
    """The pairs of one of `KINDS`."""
    if spec == "all":
        if len(haplotypes) < 2:
            raise BadRequest(f"--pairs all: a pair needs two haplotypes, and there is {len(haplotypes)}")
        return _upper_triangle(len(haplotypes))
    groups = defaultdict(list)
    for index, haplotype in enumerate(haplotypes):
        group = haplotype.sample if spec == "within-individual" else haplotype.population
        if group is not None:
            groups[group].append(index)
    if spec != "within-individual" and not groups:
        raise BadRequest(f"--pairs {spec}: no sample has a population; give --populations FILE")
    members = [np.array(group, dtype=np.int64) for group in groups.values()]
    sizes = [len(group) for group in members]
    if spec == "between":
        if len(members) < 2:
            raise BadRequest(f"--pairs between: all samples are of one population, {next(iter(groups))}")
        _check_number((sum(sizes) ** 2 - sum(size**2 for size in sizes)) // 2)
        parts = [
            np.stack(np.meshgrid(first, second, indexing="ij"), axis=-1).reshape(-1, 2)
            for first, second in itertools.combinations(members, 2)
        ]
    else:
        _check_number(sum(size * (size - 1) // 2 for size in sizes))
        parts = [group[_upper_triangle(len(group))] for group in members]
    pairs = _in_order(np.concatenate(parts))
    if not len(pairs):
        what = "individual" if spec == "within-individual" else "population"
        raise BadRequest(f"--pairs {spec}: no {what} has two haplotypes")
    return pairs


def _in_order(pairs: np.ndarray) -> np.ndarray:
    pairs = np.sort(pairs, axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _random_pairs(haplotypes: int, number: int, *, seed: int) -> np.ndarray:
    """*number* different pairs; the same for a seed with any version of numpy."""
    total = haplotypes * (haplotypes - 1) // 2
    if number > total:
        only = counted(total, "pair")
        raise BadRequest(f"--pairs {number}: {haplotypes} haplotypes have {only} only; use --pairs all")
    _check_number(number)
    chosen = _draw_distinct(total, number, key=hash_key("pairs", seed))
    row_starts = np.cumsum(np.arange(haplotypes - 1, 0, -1)) - np.arange(haplotypes - 1, 0, -1)  # of the upper triangle
    first = np.searchsorted(row_starts, chosen, side="right") - 1
    return np.column_stack([first, chosen - row_starts[first] + first + 1])


def _draw_distinct(total: int, number: int, *, key: int) -> np.ndarray:
    """*number* different whole numbers below *total*, ascending."""
    if number > total // 2:  # draw those to leave out
        left_out = _draw_distinct(total, total - number, key=key)
        return np.setdiff1d(np.arange(total, dtype=np.int64), left_out, assume_unique=True)
    chosen = np.zeros(0, dtype=np.int64)
    counter = 0
    while len(chosen) < number:
        wanted = number - len(chosen)
        with np.errstate(over="ignore"):
            words = np.arange(counter, counter + wanted, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        chosen = np.union1d(chosen, (mix_bits(words) % np.uint64(total)).astype(np.int64))
        counter += wanted
    return chosen


def _read_pairs(path: Path, haplotypes: Sequence[Haplotype]) -> np.ndarray:
    """The pairs that a file names."""
    places = defaultdict(list)
    for index, haplotype in enumerate(haplotypes):
        places[haplotype.name].append(index)
    for index, haplotype in enumerate(haplotypes):
        if haplotype.copies > 1:
            places[haplotype.sample].append(index)
    line_of: dict[tuple[int, int], int] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise BadRequest(f"pairs {path} cannot be read as text in UTF-8") from None
    for number, line in enumerate(lines, 1):
        where = f"pairs {path}, line {number}"
        fields = [field.strip() for field in line.strip().split("\t")] if "\t" in line.strip() else line.split()
        if not fields or (fields[0].startswith("#") and fields[0] not in places):
            continue
        if len(fields) != 2:
            raise BadRequest(f"{where}: expected two columns, the names of two haplotypes or samples, got {len(fields)}")
        for name in fields:
            if name not in places:
                raise BadRequest(f"{where}: there is no haplotype or sample '{name}'{suggest_nearest(name, places)}")
        first, second = (places[name] for name in fields)
        if fields[0] == fields[1]:
            if len(first) == 1:
                raise BadRequest(f"{where}: a pair needs two different haplotypes, got '{fields[0]}' twice")
            pairs = list(itertools.combinations(first, 2))
        else:
            pairs = [tuple(sorted(pair)) for pair in itertools.product(first, second)]
        for pair in pairs:
            names = " and ".join(haplotypes[index].name for index in pair)
            if pair[0] == pair[1]:
                raise BadRequest(f"{where}: a pair needs two different haplotypes, got {names}")
            if pair in line_of:
                raise BadRequest(f"{where}: the pair of {names} is in line {line_of[pair]} too")
            line_of[pair] = number
        _check_number(len(line_of))
    if not line_of:
        raise BadRequest(f"pairs {path}: the file has no pairs; expected two columns, the names of two haplotypes or samples")
    return _in_order(np.array(list(line_of), dtype=np.int64))


def _check_phase(haplotypes: Sequence[Haplotype], pairs: np.ndarray, unphased: Mapping[str, int]) -> None:
    """Refuse pairs that need the phase of unphased genotypes: all but the two copies of a diploid."""
    is_unphased = np.array([unphased.get(haplotype.sample, 0) > 0 for haplotype in haplotypes])
    if not is_unphased.any():
        return
    number_of = {sample: number for number, sample in enumerate({haplotype.sample: None for haplotype in haplotypes})}
    sample = np.array([number_of[haplotype.sample] for haplotype in haplotypes])
    is_diploid = np.array([haplotype.copies == 2 for haplotype in haplotypes])
    first, second = pairs.T
    is_free = (sample[first] == sample[second]) & is_diploid[first]
    needed = np.unique(pairs[~is_free])
    samples = list(dict.fromkeys(haplotypes[index].sample for index in needed if is_unphased[index]))
    if not samples:
        return
    names = ", ".join(samples[:MAX_LISTED_SAMPLES]) + (
        f" and {len(samples) - MAX_LISTED_SAMPLES} more" if len(samples) > MAX_LISTED_SAMPLES else ""
    )
    count = sum(unphased[name] for name in samples)
    what = f"1 heterozygous genotype of {names} is" if count == 1 else f"{count:,} heterozygous genotypes of {names} are"
    if (sample[first] == sample[second]).all():
        advice = "leave out individuals with more than two copies (--samples), who need phase for this, too"
    else:
        advice = "choose --pairs within-individual, which needs no phase for diploids"
    raise BadRequest(
        f"{what} unphased (0/1, not 0|1), so that the haplotypes are not known; phase the file, or {advice}; or take them "
        "as they are: --assume-phased"
    )
