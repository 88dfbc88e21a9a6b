"""Selecting the devices of a run, with advice if they are not available."""

from cxt.console import get_logger
from cxt.errors import BadRequest
from cxt.trainer.options import TrainingOptions

logger = get_logger(__name__)


def choose_devices(options: TrainingOptions) -> tuple[str, int | list[int]]:
    """The devices of each machine.

    Returns
    -------
    tuple of str and (int or list of int)
        Accelerator (`cpu` or `gpu`), and number of devices or indices of GPUs, in Lightning's format.

    Raises
    ------
    BadRequest
        If requested GPUs are not available, or two flags contradict each other.
    """
    import torch

    present = torch.cuda.device_count()
    gpus, devices, accelerator = options.gpus, options.devices, options.accelerator
    if gpus is not None and devices is not None:
        raise BadRequest("--gpus and --devices cannot be used together")
    if gpus is not None and len(set(gpus)) < len(gpus):
        raise BadRequest(f"--gpus {' '.join(map(str, gpus))}: an index is repeated")
    if accelerator == "cpu" or devices == 0:
        if gpus is not None:
            raise BadRequest("--gpus and --accelerator cpu cannot be used together")
        if accelerator == "gpu":
            raise BadRequest("--accelerator gpu and --devices 0 cannot be used together")
        return "cpu", devices or 1
    if gpus is not None:
        if max(gpus) >= present or min(gpus) < 0:
            raise BadRequest(_missing_gpus(options, f"--gpus {' '.join(map(str, gpus))}", wanted=len(gpus), present=present))
        return "gpu", list(gpus)
    if devices is not None:
        if devices > present:
            raise BadRequest(_missing_gpus(options, f"--devices {devices}", wanted=devices, present=present))
        return "gpu", devices
    if present:
        return "gpu", 1
    if accelerator == "gpu":
        raise BadRequest("--accelerator gpu, but torch sees no GPU")
    logger.warning("no GPU found: training on the CPU")
    return "cpu", 1


def _missing_gpus(options: TrainingOptions, flag: str, *, wanted: int, present: int) -> str:
    """Describe which GPUs of *flag* are missing, and what to use instead, with the same effective batch if possible."""
    problem = f"{flag}, but torch sees {present} GPU{'' if present == 1 else 's'}"
    if wanted <= present:
        return f"{problem}; their indices are 0 to {present - 1}"
    accumulation = options.training.grad_accum * wanted / max(1, present)
    keep = f" with --grad-accum {accumulation:g}, which keeps the effective batch" if accumulation.is_integer() else ""
    return (
        f"{problem}; use --devices {present}{keep}{'' if present else ', to train on the CPU'}; in the workflow these are "
        "`devices` and `grad_accum` of `training:`"
    )
