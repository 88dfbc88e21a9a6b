"""cxt: train coalescence language models, and use them.

Names are imported when first used, so that `import cxt` is quick and what does not train needs no Lightning.
"""

import importlib

_HOME = {
    "pair_features": "cxt.data.features",
    "pair_log_tmrca": "cxt.data.targets",
    "PairDataset": "cxt.data.pair_dataset",
    "load_model": "cxt.checkpoints.load",
    "train_model": "cxt.train",
}
__all__ = ["PairDataset", "load_model", "pair_features", "pair_log_tmrca", "train_model"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'cxt' has no attribute '{name}'")
