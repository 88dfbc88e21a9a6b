"""cxt: train coalescence language models, and use them.

Names are imported when first used, so that `import cxt` is quick and using a checkpoint needs neither Lightning nor a
simulator.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cxt.checkpoints.load import load_model
    from cxt.data.features import pair_features
    from cxt.data.grid import Grid
    from cxt.data.pair_dataset import PairDataset
    from cxt.data.targets import pair_log_tmrca
    from cxt.decoding.posterior import Posterior
    from cxt.decoding.predict import predict, predict_ts
    from cxt.decoding.region_summary import RegionSummary
    from cxt.errors import BadRequest, Failed
    from cxt.model.inputs import OutsideTraining
    from cxt.trainer.find_lr import find_lr
    from cxt.trainer.train_model import train_model
    from cxt.translation.tracks import Tracks
    from cxt.translation.translate import translate

    __version__: str

_MODULES = {
    "BadRequest": "cxt.errors",
    "Failed": "cxt.errors",
    "Grid": "cxt.data.grid",
    "OutsideTraining": "cxt.model.inputs",
    "PairDataset": "cxt.data.pair_dataset",
    "Posterior": "cxt.decoding.posterior",
    "RegionSummary": "cxt.decoding.region_summary",
    "Tracks": "cxt.translation.tracks",
    "find_lr": "cxt.trainer.find_lr",
    "load_model": "cxt.checkpoints.load",
    "pair_features": "cxt.data.features",
    "pair_log_tmrca": "cxt.data.targets",
    "predict": "cxt.decoding.predict",
    "predict_ts": "cxt.decoding.predict",
    "train_model": "cxt.trainer.train_model",
    "translate": "cxt.translation.translate",
}
__all__ = [
    "BadRequest", "Failed", "Grid", "OutsideTraining", "PairDataset", "Posterior", "RegionSummary", "Tracks", "__version__",
    "find_lr", "load_model", "pair_features", "pair_log_tmrca", "predict", "predict_ts", "train_model", "translate",
]  # fmt: skip


def _version() -> str:
    """The version of the installed package; "0+unknown" for a checkout on PYTHONPATH that was not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("cxt")
    except PackageNotFoundError:
        return "0+unknown"


def __getattr__(name: str):
    if name == "__version__":
        return _version()
    if name not in _MODULES:
        raise AttributeError(f"module 'cxt' has no attribute '{name}'")
    try:
        return getattr(importlib.import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        from cxt.errors import advise_extra

        if (advice := advise_extra(error)) is None:
            raise
        raise ModuleNotFoundError(f"cxt.{name}: {advice}", name=error.name) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
