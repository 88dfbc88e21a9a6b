"""What the base install is for: features, a dataset, a checkpoint, prediction; none of it needs a package of an extra.

    python tests/helpers/base_install.py CHECKPOINT DATASET TREES            # .ci/wheel, where those packages are not there
    python tests/helpers/base_install.py CHECKPOINT DATASET TREES --block    # where they are, they cannot be imported

CHECKPOINT is tests/golden/published_style.ckpt, TREES a tree sequence of 1 Mb and 10 samples. Writes posterior.png. Prints the
modules of extras that were imported: none.
"""

import importlib.util
import sys

import numpy as np
import tskit

EXTRAS = (
    "demes", "jsonargparse", "lightning_fabric", "msprime", "optuna", "pygments", "pytorch_lightning", "snakemake", "stdpopsim",
    "tensorboard",
)  # fmt: skip


class Blocked:
    """A finder that says of the packages of extras that they are not there."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def predict(checkpoint: str, trees: str) -> None:
    """The posterior and its plot, from a tree sequence and from a genotype matrix in chromosome coordinates."""
    import cxt

    model = cxt.load_model(checkpoint)
    ts = tskit.load(trees)
    posterior = cxt.predict_ts(model, ts, [(0, 1)], replicates=2)
    axes = posterior.plot(truth=cxt.pair_log_tmrca(ts, [(0, 1)], window_size=2000, sequence_length=1_000_000)[0])
    axes.figure.savefig("posterior.png")

    genotypes, positions = ts.genotype_matrix(), ts.sites_position + 5_000_000
    same = cxt.predict(model, genotypes, positions, [(0, 1)], start=5_000_000, sequence_length=1_000_000, replicates=2)
    np.testing.assert_array_equal(same.distribution, posterior.distribution)
    assert same.edges[0] == 5_000_000
    assert (same.interval(0.5)[0] <= same.interval(0.5)[1]).all()


def main(checkpoint: str, dataset: str, trees: str, *words: str) -> None:
    if "--block" in words:
        sys.meta_path.insert(0, Blocked)
    else:
        installed = [name for name in EXTRAS if importlib.util.find_spec(name) is not None]
        assert not installed, f"of extras, {installed} are installed"
    import cxt

    assert cxt.__version__
    predict(checkpoint, trees)
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
