"""Finding a checkpoint by its name or path, and loading its model."""

import os
from pathlib import Path

import torch

from cxt.checkpoints.file import Checkpoint, build_checkpoint_model, stored_dtype
from cxt.checkpoints.lora import read_merged_checkpoint
from cxt.checkpoints.run_directory import RunDirectory
from cxt.checkpoints.safetensors import CONFIG, WEIGHTS, is_export
from cxt.config.shipped import checkpoint_directory
from cxt.console import get_logger
from cxt.errors import BadRequest, first_line, suggest_nearest
from cxt.model.transformer import CoalescenceModel

logger = get_logger(__name__)


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    best: bool = False,
    dtype: str | torch.dtype = "float32",
    windows: int | None = None,
) -> CoalescenceModel:
    """Load a trained model, in eval mode.

    Parameters
    ----------
    name_or_path : str or path-like
        A name such as "broad", which is looked up as `broad.ckpt` in `$CXT_CHECKPOINT_CACHE`, `results/`,
        `~/.cache/cxt/checkpoints` and among the checkpoints that come with cxt, such as "small"; or the path of a `.ckpt` file
        (also of the original package), a run directory, or an exported directory. A LoRA is merged into its base, which is
        looked for beside it and in the same directories.
    device : str or torch device
        Where to put it.
    best : bool
        For a run directory, load the weights of the lowest validation loss instead of the last ones.
    dtype : str or torch dtype
        Type of the weights: `float32`, `bfloat16`, or `stored`, that of the file (bfloat16 after training in bf16-true).
    windows : int, optional
        Windows of a region that it reads at once; by default, those that it was trained with. No weights depend on their
        number, but the accuracy does: reading others causes a warning, `cxt.OutsideTraining`.

    Returns
    -------
    CoalescenceModel
        ``forward(X, y)`` takes log1p counts (B, 2, scales, windows, samples) and tokens (B, windows + 1) and returns
        logits (B, windows, vocabulary); ``generate(X, window_size=…)`` decodes. Its ``trained_on`` holds the ranges of its
        training data, if the file has them; for a fine-tuned model, those of its own dataset.

    Raises
    ------
    BadRequest
        If there is no such checkpoint, it is damaged or has non-finite weights, the base of a LoRA is missing or another one,
        torch cannot use *device*, or *windows* is no number of windows.
    """
    device = _parse_device(device)
    if windows is not None and (isinstance(windows, bool) or not isinstance(windows, int) or not 1 <= windows <= 10**7):
        raise BadRequest(f"windows must be a whole number from 1 to 10 000 000, got {windows!r}")
    path = find_checkpoint(name_or_path, best=best)
    checkpoint = read_usable_checkpoint(path)
    chosen = _choose_dtype(dtype, checkpoint, path)
    model = build_checkpoint_model(checkpoint, name=path, windows=windows).eval()
    if bad := [key for key, value in model.state_dict().items() if not torch.isfinite(value).all()]:
        raise BadRequest(f"checkpoint {path} has weights that are not finite: {bad[0]}; train it again, or get another copy")
    try:
        return model.to(device) if chosen is torch.float32 else model.to(device, dtype=chosen)
    except (RuntimeError, AssertionError) as error:  # torch was built without it
        raise BadRequest(f"device {device}: {first_line(error)}") from None


def _choose_dtype(wanted: str | torch.dtype, checkpoint: Checkpoint, path: Path) -> torch.dtype:
    """The type of weights that is *wanted*; BadRequest if it is no such type, or the network cannot be used in it."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "stored": stored_dtype(checkpoint)}
    name = str(wanted).removeprefix("torch.")
    if name not in dtypes:
        raise BadRequest(f"unknown dtype {name!r}{suggest_nearest(name, dtypes)}")
    if dtypes[name] is torch.bfloat16 and checkpoint.model.reads_rates:
        raise BadRequest(f"{path} reads rates, which bfloat16 would round; load it in float32")
    return dtypes[name] if dtypes[name] is torch.bfloat16 else torch.float32


def _parse_device(device: str | torch.device) -> torch.device:
    """A torch device by its name; BadRequest if there is no such device."""
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BadRequest(f"device {device!r}: {first_line(error)}") from None
    gpus = torch.cuda.device_count()
    if parsed.type == "cuda" and (parsed.index or 0) >= gpus:
        seen = f"torch sees {gpus} GPU{'' if gpus == 1 else 's'}"
        raise BadRequest(f"device {parsed}, but {seen}; omit device to use the CPU")
    return parsed


def checkpoint_directories() -> list[Path]:
    """Directories in which `load_model` looks for a name, in order."""
    directories = [Path("results"), Path.home() / ".cache" / "cxt" / "checkpoints", checkpoint_directory()]
    if os.environ.get("CXT_CHECKPOINT_CACHE"):
        directories.insert(0, Path(os.environ["CXT_CHECKPOINT_CACHE"]))
    return directories


def read_usable_checkpoint(path) -> Checkpoint:
    """Read a checkpoint with all weights of its network: a LoRA is merged into its base.

    Raises
    ------
    BadRequest
        If it cannot be read, or the base of a LoRA is neither beside it nor in `checkpoint_directories`.
    """
    return read_merged_checkpoint(path, checkpoint_directories())


def _find_run_checkpoint(path: Path, *, best: bool) -> Path:
    """The last weights of a run directory; with *best*, the best ones if there are any."""
    run = RunDirectory(path)
    if best and run.best.is_file():
        return run.best
    finished = run.finished_checkpoint()
    if finished is None and (run.read_record() or {}).get("finished"):
        logger.warning(f"note: the finished checkpoint of {path} is missing or damaged, using the last training state")
    for file in (finished, run.last):
        if file is not None and file.is_file():
            if best:
                logger.warning(f"note: {path} has no best weights yet, using {file.name}")
            return file
    raise BadRequest(f"{path} holds no checkpoint or training state yet")


def _check_path(name_or_path) -> Path:
    """A name or path as a Path; BadRequest if it can be neither."""
    if not isinstance(name_or_path, str | os.PathLike) or not os.fspath(name_or_path):
        raise BadRequest(f"a checkpoint must be given by its name or path, got {name_or_path!r}")
    path = Path(name_or_path)
    try:
        os.stat(path)
    except (OSError, ValueError) as error:  # the path need not exist, but must be valid
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            shortened = str(path) if len(str(path)) <= 60 else f"{str(path)[:57]}…"
            raise BadRequest(f"there is no checkpoint {shortened!r}: {getattr(error, 'strerror', None) or error}") from None
    return path


def find_checkpoint(name_or_path, *, best: bool = False) -> Path:
    """The file of a checkpoint that is given by its name, path, run directory or exported directory.

    For a run directory, this is the finished checkpoint or else the last training state; with *best*, the weights of the lowest
    validation loss. For an exported directory, it is config.json, which contains the digest of the weights. A name is looked up
    as `<name>.ckpt` in $CXT_CHECKPOINT_CACHE, then `results/`, then `~/.cache/cxt/checkpoints`, and last among those
    that come with cxt.

    Raises
    ------
    BadRequest
        If there is none; the message says where it was searched and what is available.
    """
    path = _check_path(name_or_path)
    if (path / "run.json").is_file():
        return _find_run_checkpoint(path, best=best)
    directory = path.parent if path.name == WEIGHTS else path
    if is_export(directory):
        return directory / CONFIG
    if path.suffix == ".ckpt" or len(path.parts) > 1:
        if path.is_file():
            return path
        there = [str(file) for file in sorted(path.parent.glob("*.ckpt"))]
        raise BadRequest(f"there is no checkpoint {path.absolute()}{suggest_nearest(str(path), there) if there else ''}")
    directories = checkpoint_directories()
    for directory in directories:
        if (directory / f"{path}.ckpt").is_file():
            return directory / f"{path}.ckpt"
    available = {file.stem for directory in directories for file in directory.glob("*.ckpt")}
    raise BadRequest(f"no checkpoint '{path}' in {', '.join(map(str, directories))}{suggest_nearest(str(path), available)}")
