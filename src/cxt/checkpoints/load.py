"""TODO cxt.checkpoints.load"""

import torch

from cxt.checkpoints.file import model_of, read_checkpoint
from cxt.checkpoints.find import find_checkpoint
from cxt.errors import BadRequest, first_line
from cxt.model.transformer import CoalescenceModel


def load_model(name_or_path, *, device="cpu", best: bool = False) -> CoalescenceModel:
    """A trained model, in eval mode.

    Parameters
    ----------
    name_or_path : name such as "broad", looked up as `find_checkpoint` says, or path of a `.ckpt` file (one of the original
        package, too), a run directory, or an exported directory
    device : torch device to put it on
    best : of a run directory, the weights of the lowest validation loss instead of the last

    Returns
    -------
    CoalescenceModel
        ``forward(X, y)`` takes log1p counts (B, 2, scales, windows, samples) and tokens (B, windows + 1) and returns
        logits (B, windows, vocabulary); ``generate(X, window_size=…)`` decodes. Its ``trained_on`` holds the ranges of the
        data that it was trained on, where its file has them; of a fine-tuned model, those of its own dataset.

    Raises
    ------
    BadRequest
        If there is no such checkpoint, it is damaged or has weights that are not finite, or torch cannot use *device*.
    """
    device = _device_of(device)
    path = find_checkpoint(name_or_path, best=best)
    model = model_of(read_checkpoint(path), source=path).eval()
    if bad := [key for key, value in model.state_dict().items() if not torch.isfinite(value).all()]:
        raise BadRequest(f"checkpoint {path} has weights that are not finite: {bad[0]}; train it again, or get another copy")
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # a torch without it
        raise BadRequest(f"device {device}: {first_line(error)}") from None


def _device_of(device) -> torch.device:
    """A torch device by its name; BadRequest if there is none, or no such GPU."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BadRequest(f"device {device!r}: {first_line(error)}") from None
    present = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= present:
        has = f"torch sees {present} GPU{'' if present == 1 else 's'}"
        raise BadRequest(f"device {found}, but {has}; leave device out to use the CPU")
    return found
