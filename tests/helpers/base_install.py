"""What the base install is for: features, a dataset, a checkpoint, decoding; none of it needs a package of an extra.

    python tests/helpers/base_install.py CHECKPOINT DATASET            # .ci/wheel, where those packages are not there
    python tests/helpers/base_install.py CHECKPOINT DATASET --block    # where they are, they cannot be imported

CHECKPOINT is tests/golden/published_style.ckpt. Prints the modules of extras that were imported: none.
"""

import importlib.util
import sys

import numpy as np

EXTRAS = (
    "demes", "jsonargparse", "lightning_fabric", "msprime", "pygments", "pytorch_lightning", "snakemake", "stdpopsim",
    "tensorboard",
)  # fmt: skip


class Blocked:
    """A finder that says of the packages of extras that they are not there."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(checkpoint: str, dataset: str, *words: str) -> None:
    if "--block" in words:
        sys.meta_path.insert(0, Blocked)
    else:
        installed = [name for name in EXTRAS if importlib.util.find_spec(name) is not None]
        assert not installed, f"of extras, {installed} are installed"
    import cxt

    assert cxt.__version__
    model = cxt.load_model(checkpoint)
    config = model.config
    length = config.windows * config.window_size
    rng = np.random.default_rng(1)
    positions = np.sort(rng.uniform(0, length, 2000))
    genotypes = rng.integers(0, 2, (2000, config.samples), dtype=np.int8)
    counts = cxt.pair_features(genotypes, positions, [(0, 1)], window_size=config.window_size, sequence_length=length)
    _, probabilities = model.generate(np.log1p(counts), window_size=config.window_size, replicates=1)
    assert probabilities.shape[-2:] == (config.windows, config.bins), probabilities.shape
    x, y = cxt.PairDataset(dataset, "test")[0]
    assert x.ndim == 4
    assert len(y) == x.shape[2] + 1
    try:
        cxt.train_model  # noqa: B018
    except ModuleNotFoundError as error:
        if "pip install 'cxt[train]'" not in str(error):
            raise
    else:
        sys.exit("cxt.train_model needs no extra")
    print(sorted(name for name in sys.modules if name.partition(".")[0] in EXTRAS))


if __name__ == "__main__":
    main(*sys.argv[1:])
