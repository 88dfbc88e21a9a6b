"""Seeds: the bound, the permutations behind msprime's and torch's, and that no two simulations have the same ancestry."""

import re

import numpy as np
import pytest
import torch
from helpers.simulations import constant_scenario

from cxt.config.configuration import Configuration
from cxt.config.training import TrainingConfig, TrainingSection
from cxt.config.type_descriptions import get_limits
from cxt.config.variants import list_variants
from cxt.data.loaders import EpochBatchSampler
from cxt.data.simulated import ON_THE_FLY_START
from cxt.errors import BadRequest
from cxt.random_seeds import GOLDEN, LARGEST_SEED, check_seed, hash_key, mix_bits, msprime_seeds, permute_words, torch_seed
from cxt.scenarios.indices import EVALUATION_START
from cxt.scenarios.registry import simulate_tree_sequence
from cxt.scenarios.seeds import LAST_INDEX, check_shared_ancestry, derive_engine_seeds

BITS = 2**64 - 1


def splitmix(state: int) -> int:
    """SplitMix64's finalizer, in Python's whole numbers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & BITS
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & BITS
    return state ^ (state >> 31)


def inverse(word: int, key: int) -> int:
    """What `permute_words` made *word* from: its rounds undone, one by one."""
    left, right = word >> 16, word & 0xFFFF
    for step in (3, 2, 1, 0):
        hashed = splitmix(key + (left + (step + 1 << 16)) * GOLDEN & BITS)
        left, right = right ^ (hashed >> 48), left
    return left << 16 | right


def spec_of(**changes) -> dict:
    return list_variants(changes.pop("name", "one"), constant_scenario(**changes))[0].spec


def test_hash():
    """SplitMix64's published first numbers for the state 0 (its finalizer at multiples of the golden ratio's word)."""
    states = np.arange(1, 4, dtype=np.uint64) * np.uint64(GOLDEN)
    assert mix_bits(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [splitmix(int(state)) for state in states] == mix_bits(states).tolist()


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1, hash_key(1, {"name": "constant"}, "ancestry")])
def test_permutation(key):
    """It can be undone, so that no two words have the same image; and it does not stay in order."""
    words = np.random.default_rng(1).integers(0, 2**32, 300).tolist()
    words += [0, 1, 2, 10**9, 2 * 10**9, 2**31 - 1, 2**31, 4 * 10**9, 2**32 - 2, 2**32 - 1]
    images = permute_words(words, key=key)
    assert images.max() < 2**32
    assert [inverse(image, key) for image in images.tolist()] == words
    assert [int(permute_words(word, key=key)) for word in words] == images.tolist()
    many = permute_words(np.arange(100_000), key=key)
    assert np.unique(many).size == many.size
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 5 / many.size**0.5
    counts, _ = np.histogram(many, bins=100, range=(0, 2**32))
    assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi-square of 99 degrees of freedom: 1e-4


def test_no_seed_of_msprime_is_0():
    """The index whose word would become 0 gets the seed that word 0 becomes, which no other index has."""
    for key in range(5):
        index = inverse(0, key) - 1
        around = np.array([i for i in range(index - 1000, index + 1000) if 0 <= i <= LAST_INDEX])
        seeds = msprime_seeds(around, key=key)
        assert int(permute_words(index + 1, key=key)) == 0
        assert int(msprime_seeds(index, key=key)) == int(permute_words(0, key=key))
        assert inverse(int(permute_words(0, key=key)), key) == 0
        assert seeds.min() >= 1
        assert seeds.max() < 2**32
        assert np.unique(seeds).size == seeds.size


def test_engine_seeds():
    """Of datasets, evaluation and simulation on the fly together; two variants, and two workflow seeds, share nothing."""
    spec = spec_of()
    ranges = [np.arange(start, start + 5_000) for start in (0, EVALUATION_START, ON_THE_FLY_START, LAST_INDEX - 4_999)]
    indices = np.concatenate(ranges)
    seeds_by_use = {}
    for seed, name in ((1, "one"), (1, "two"), (2, "one"), (2**32 + 1, "one")):
        variant = spec | {"name": name}
        for use in ("ancestry", "mutations"):
            seeds = seeds_by_use[seed, name, use] = msprime_seeds(indices, key=hash_key(seed, variant, use))
            assert np.unique(seeds).size == seeds.size
        for i in (0, 4_999, 5_000, 10_000, -1):
            pair = derive_engine_seeds(seed=seed, spec=variant, index=int(indices[i]))
            assert (pair.ancestry, pair.mutations) == (
                seeds_by_use[seed, name, "ancestry"][i],
                seeds_by_use[seed, name, "mutations"][i],
            )
    rows = list(seeds_by_use.values())
    for i in range(len(rows)):
        for j in range(i):
            assert np.intersect1d(rows[i], rows[j]).size < 6  # 0.1 are expected
            assert (rows[i] == rows[j]).sum() == 0
    for index in (-1, LAST_INDEX + 1):
        with pytest.raises(BadRequest, match=f"the index must be from 0 to 4294967294, got {index}"):
            derive_engine_seeds(seed=1, spec=spec, index=index)


def test_the_same_ancestry_under_two_names():
    """Found where only name and mutation rate differ, and the simulations that are named do have the same."""
    one, two = spec_of(), spec_of(name="two", mutation_rate=5e-8)
    many = [(0, 150_000), (EVALUATION_START, 50_000)]
    with pytest.raises(
        BadRequest, match="would have the same ancestry.*rename one of the scenarios, or change `seed`"
    ) as error:
        check_shared_ancestry([(one, many), (two, many)], seed=1)
    first, second = map(int, re.findall(r"simulation (\d+) of", str(error.value)))
    assert "of 'two' and" in str(error.value)
    a, b = simulate_tree_sequence(two, index=first, seed=1), simulate_tree_sequence(one, index=second, seed=1)
    assert a.tables.nodes.equals(b.tables.nodes)
    assert a.tables.edges.equals(b.tables.edges)
    assert not np.array_equal(a.sites_position, b.sites_position)
    check_shared_ancestry([(one, many), (two | {"population_size": 1e4}, many)], seed=1)
    check_shared_ancestry([(one, [(0, 200)]), (two, [(0, 200)])], seed=1)


def test_seeds_and_counters_of_training_do_not_add_up():
    """1_000_003 · seed + epoch was the same for (1, 1_000_003) and (2, 0), and torch's CPU takes 32 bits of a seed."""

    def order(seed, epoch):
        sampler = EpochBatchSampler(examples=64, batch_size=64, seed=seed)
        sampler.set_epoch(epoch)
        return next(iter(sampler))

    assert order(1, 1_000_003) != order(2, 0)
    assert order(1, 0) != order(2**32 + 1, 0)
    orders = {tuple(order(seed, epoch)) for seed in (0, 1, 2, LARGEST_SEED) for epoch in range(20)}
    assert len(orders) == 80
    numbers = range(3000)
    for seed, rank in ((0, 0), (1, 0), (1, 1), (1, 1009)):
        assert len({torch_seed(seed, "dropout", rank, number=n) % 2**32 for n in numbers}) == len(numbers)
    every = [torch_seed(seed, "dropout", rank, number=n) for seed in range(3) for rank in (0, 1, 1009) for n in range(300)]
    every += [torch_seed(0, "dropout", 0, number=n) for n in (1_000_003, 2_000_006)]
    assert len(set(every)) == len(every)
    assert min(every) >= 0
    assert max(every) < 2**64
    torch.manual_seed(max(every))


@pytest.mark.parametrize("seed", [-1, 2**63, 10**29, 1.0, "1", None, True + 0.5])
def test_bad_seeds(seed):
    with pytest.raises(BadRequest, match=r"the seed must be .*\b9223372036854775807, got"):
        check_seed(seed, name="the seed")


def test_one_bound_everywhere():
    for section in (Configuration, TrainingConfig):
        assert get_limits(section.model_fields["seed"]).le == LARGEST_SEED
    assert (check_seed(0), check_seed(np.int64(5)), check_seed(LARGEST_SEED)) == (0, 5, LARGEST_SEED)
    spec = spec_of(sequence_length=2000)
    assert simulate_tree_sequence(spec, index=0, seed=LARGEST_SEED).metadata["cxt"]["seed"] == LARGEST_SEED
    assert simulate_tree_sequence(spec, index=0, seed=np.int64(1)).tables.equals(
        simulate_tree_sequence(spec, index=0, seed=1).tables, ignore_provenance=True
    )
    for seed in (-1, LARGEST_SEED + 1):
        with pytest.raises(BadRequest, match="seed must be a whole number"):
            simulate_tree_sequence(spec, index=0, seed=seed)
        with pytest.raises(BadRequest, match="seed must be"):
            TrainingConfig(seed=seed)
        with pytest.raises(BadRequest, match=r"training\.seed must be"):
            TrainingSection.read({"seed": seed}, at="training")
    assert TrainingConfig(seed=LARGEST_SEED).seed == LARGEST_SEED
