"""Selecting the devices of a run and the precision of its arithmetic, with advice if they are not available."""

from cxt.console import counted, get_logger
from cxt.errors import BadRequest
from cxt.trainer.options import TrainingOptions

logger = get_logger(__name__)


def choose_devices(options: TrainingOptions) -> tuple[str, int | list[int]]:
    """The devices of each machine.

    Returns
    -------
    tuple of str and (int or list of int)
        Accelerator (`cpu`, `gpu` or `mps`), and number of devices or indices of GPUs, in Lightning's format.

    Raises
    ------
    BadRequest
        If requested GPUs are not available, or two flags contradict each other.
    """
    import torch

    return select_devices(options, gpus_present=torch.cuda.device_count(), has_mps=torch.backends.mps.is_available())


def select_devices(options: TrainingOptions, *, gpus_present: int, has_mps: bool) -> tuple[str, int | list[int]]:
    """As `choose_devices`, on a machine with *gpus_present* GPUs of NVIDIA or AMD, or an Apple GPU if *has_mps*."""
    gpus, devices, accelerator = options.gpus, options.devices, options.accelerator
    if gpus is not None and devices is not None:
        raise BadRequest("--gpus and --devices cannot be used together")
    if gpus is not None and len(set(gpus)) < len(gpus):
        raise BadRequest(f"--gpus {' '.join(map(str, gpus))}: an index is repeated")
    if accelerator == "mps":
        return _select_mps(options, has_mps=has_mps)
    if accelerator == "cpu" and devices == "all":
        raise BadRequest("--devices all means all GPUs; with --accelerator cpu, say how many processes, --devices N")
    if accelerator == "cpu" or devices == 0:
        if gpus is not None:
            raise BadRequest("--gpus and --accelerator cpu cannot be used together")
        if accelerator == "gpu":
            raise BadRequest("--accelerator gpu and --devices 0 cannot be used together")
        return "cpu", int(devices or 1)
    if gpus is not None:
        if max(gpus) >= gpus_present or min(gpus) < 0:
            flag = f"--gpus {' '.join(map(str, gpus))}"
            raise BadRequest(_missing_gpus(options, flag, wanted=len(gpus), present=gpus_present))
        return "gpu", list(gpus)
    if devices == "all":
        if not gpus_present:
            raise BadRequest("--devices all, but torch sees no GPU; use --devices 0 to train on the CPU")
        return "gpu", gpus_present
    if devices is not None:
        wanted = int(devices)
        if wanted > gpus_present:
            raise BadRequest(_missing_gpus(options, f"--devices {wanted}", wanted=wanted, present=gpus_present))
        return "gpu", wanted
    if gpus_present:
        return "gpu", 1
    if accelerator == "gpu":
        raise BadRequest("--accelerator gpu, but torch sees no GPU")
    hint = "; --accelerator mps uses the GPU of this computer" if has_mps else ""
    logger.warning(f"no GPU found: training on the CPU{hint}")
    return "cpu", 1


def _select_mps(options: TrainingOptions, *, has_mps: bool) -> tuple[str, int]:
    """The one GPU of an Apple computer."""
    if not has_mps:
        raise BadRequest("--accelerator mps, but torch sees no Apple GPU; omit it to use another GPU, or the CPU")
    if options.gpus is not None or options.devices not in (None, 1, "all") or options.nodes > 1:
        raise BadRequest("--accelerator mps is one GPU of one machine; omit --gpus, --devices and --nodes")
    return "mps", 1


def has_bfloat16(accelerator: str) -> bool:
    """Whether the devices of an *accelerator* compute in bfloat16; torch would emulate it slowly on GPUs that do not."""
    import torch

    return accelerator == "gpu" and torch.cuda.is_bf16_supported(including_emulation=False)


def choose_precision(wanted: str, accelerator: str, *, has_bfloat16: bool) -> str:
    """The precision to train in: the one *wanted*, if the devices have it.

    A CPU and an Apple GPU use 32-true. A GPU without bfloat16 (NVIDIA: before Ampere) uses 16-mixed instead of bf16-mixed.

    Raises
    ------
    BadRequest
        For bf16-true on a GPU without bfloat16: weights in float16 would not train.
    """
    if accelerator != "gpu":
        return "32-true"
    if has_bfloat16 or not wanted.startswith("bf16"):
        return wanted
    if wanted == "bf16-true":
        raise BadRequest("precision bf16-true needs a GPU with bfloat16, which this one is not; use 16-mixed or 32-true")
    return "16-mixed"


def _missing_gpus(options: TrainingOptions, flag: str, *, wanted: int, present: int) -> str:
    """Describe which GPUs of *flag* are missing, and what to use instead, with the same effective batch if possible."""
    problem = f"{flag}, but torch sees {counted(present, 'GPU')}"
    if wanted <= present:
        return f"{problem}; their indices are 0 to {present - 1}"
    accumulation = options.training.grad_accum * wanted / max(1, present)
    keep = f" with --grad-accum {accumulation:g}, which keeps the effective batch" if accumulation.is_integer() else ""
    return (
        f"{problem}; use --devices {present}{keep}{'' if present else ', to train on the CPU'}; in the workflow these are "
        "`devices` and `grad_accum` of `training:`"
    )
