"""Memory, threads, GPUs and machines that the workflow's jobs request from the scheduler."""

from cxt.config.ensembles import list_members
from cxt.config.models import build_network_config, build_training_config
from cxt.config.yaml import read_yaml
from cxt.data.soft_targets import LEVELS
from cxt.errors import BadRequest
from cxt.workflow.jobs import collect_variants, get_device_count, get_machine_count


def preprocessing_memory_mb(config: dict, name: str, simulations: int, tree_bytes: float) -> int:
    """Memory to request for a shard: what is kept of all its simulations, and one tree sequence being processed.

    A target takes 4 bytes in the simulation, and again in each of two copies while the shard is written; sites take 16.
    """
    dataset = config["datasets"][name]
    windows = dataset["sequence_length"] // dataset["window_size"]
    kept = simulations * dataset["regions_per_simulation"] * (16 * dataset["pairs"] * windows + 16 * 20_000)
    return 2000 + int((1.5 * kept + 20 * tree_bytes) / 1e6)


def teaching_memory_mb(config: dict, name: str, simulations: int) -> int:
    """Memory to request for soft targets: torch and the teacher, one tree sequence, and a shard's quantiles three times."""
    dataset = config["datasets"][config["models"][name]["dataset"]]
    windows = dataset["sequence_length"] // dataset["window_size"]
    examples = simulations * dataset["regions_per_simulation"] * dataset["pairs"]
    return 4000 + int(examples * windows * len(LEVELS) * 3 * 8 / 1e6)


def training_memory_mb(config: dict, name: str) -> int:
    """Memory to request for training: torch, the network and batches for each device, and the dataset once.

    Per region, as `PairDataset` holds it: about 9 bits per target, one bit per genotype (20 000 sites are many), window
    counts, and a teacher's quantiles.
    """
    if given := config["models"][name].get("resources", {}).get("mem_mb"):
        return given
    dataset = config["datasets"][config["models"][name]["dataset"]]
    simulations = sum(variant.simulations for variant in collect_variants(config, dataset["scenarios"]))
    windows, samples = dataset["sequence_length"] // dataset["window_size"], dataset["samples"]
    per_region = 1.2 * dataset["pairs"] * windows + 20_000 * (samples / 8 + 1) + 2 * windows * samples
    if "teacher" in config["models"][name]:
        per_region += 2 * dataset["pairs"] * windows * len(LEVELS)
    return 4000 * max(1, get_device_count(config, name)) + int(
        1.2 * simulations * dataset["regions_per_simulation"] * per_region / 1e6
    )


def training_minutes(config: dict, name: str) -> int:
    """Minutes to request for one try of a model's training."""
    return config["models"][name].get("resources", {}).get("runtime", config["cluster"]["runtime"])


def request_gpus(config: dict, count: int) -> dict[str, int | str]:
    """The resources with which a job requests *count* GPUs, by the names that the Slurm executor knows.

    The names are those of every job's resources, also without GPUs; only the values differ.
    """
    cluster = config["cluster"]
    model = cluster.get("gpu_model")
    if cluster["gpu_request"] == "gres":
        gpus: dict[str, int | str] = {"gres": ":".join(filter(None, ["gpu", model, str(count)])) if count else ""}
    elif model:
        gpus = {"gpu": count, "gpu_model": model if count else ""}
    else:
        gpus = {"gpu": count}
    return gpus | ({"constraint": cluster["constraint"] if count else ""} if "constraint" in cluster else {})


def request_machines(config: dict, name: str) -> dict[str, int | str]:
    """The resources with which a model's training requests several machines from Slurm, with its GPUs on each.

    `--gpus` would count those of all machines, so that the GPUs are requested as `gres`, which counts those of each.
    """
    machines, devices = get_machine_count(config, name), get_device_count(config, name)
    per_machine = request_gpus(config | {"cluster": config["cluster"] | {"gpu_request": "gres"}}, devices)
    return per_machine | {"gpu": 0, "mpi": "srun", "nodes": machines, "tasks": machines, "tasks_per_gpu": 0}


def launch_command(config: dict, name: str) -> list[str]:
    """The command that starts one process of the trainer on each machine of an allocation."""
    machines, devices = get_machine_count(config, name), get_device_count(config, name)
    gpus = [f"--gres={request_machines(config, name)['gres']}"] if devices else []
    threads = f"--cpus-per-task={training_threads(config, name)}"
    return ["srun", f"--nodes={machines}", f"--ntasks={machines}", "--ntasks-per-node=1", threads, "--cpu-bind=q", *gpus]


def check_placement(config: dict, name: str, *, gpus: int | None, executor: str, partitions: str | None) -> None:
    """Check that the machines and GPUs that a model is configured to train on can be had.

    Parameters
    ----------
    config, name : dict, str
        Configuration and model.
    gpus : int, optional
        Limit of Snakemake's resource `gpu`, if there is one.
    executor : str
        Snakemake's executor: `local`, `slurm`, `dryrun`, which may stand for any, or another one, which is not checked.
    partitions : str, optional
        The file with the limits of Slurm's partitions, if there is one.

    Raises
    ------
    BadRequest
        If they cannot be had, with settings that train on what there is with the same effective batch if possible.
    """
    machines, devices = get_machine_count(config, name), get_device_count(config, name)
    if executor == "local" and machines > 1:
        raise BadRequest(
            f"models.{name}: training.nodes is {machines}, but this run uses one machine. Run on a Slurm cluster "
            f"(--profile workflow/profiles/slurm), or train on one machine: {_same_batch(config, name, machines * devices)}"
        )
    if executor in ("local", "dryrun") and gpus is not None and devices > gpus:
        raise BadRequest(
            f"models.{name}: training.devices is {devices}, but this run may use {_count_gpus(gpus)}: `gpu` of "
            f"--resources, or of the profile. Raise it if the machine has more, or train with {_same_batch(config, name, gpus)}"
        )
    if executor == "slurm" and partitions is not None:
        limits = read_yaml(partitions).get("partitions", {})
        most = max((limit.get("max_gpu", 0) for limit in limits.values()), default=0)
        if devices > most:
            raise BadRequest(
                f"models.{name}: training.devices is {devices}, but no partition in {partitions} gives a job more than "
                f"{_count_gpus(most)} (max_gpu). Correct that file, or train with {_same_batch(config, name, most)}"
            )


def _count_gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count or 'no'} GPUs"


def _same_batch(config: dict, name: str, devices: int) -> str:
    """Settings for *devices* GPUs on one machine, with the same effective batch if there is a whole number for it."""
    training = build_training_config(config, name)
    world = max(1, get_device_count(config, name)) * get_machine_count(config, name)
    accumulation = training.grad_accum * world / max(1, devices)
    keep = f", grad_accum: {accumulation:g}" if accumulation.is_integer() else ""
    cpu = "" if devices else " (on the CPU)"
    return f"`training: {{nodes: 1, devices: {devices}{keep}}}`{cpu}"


def training_threads(config: dict, name: str) -> int:
    """CPU threads of all processes of a model's training, including those that prepare batches."""
    training = build_training_config(config, name)
    return (training.threads + training.workers) * max(1, get_device_count(config, name))


def evaluation_memory_mb(config: dict, name: str) -> int:
    """Memory to request for evaluating a model or an ensemble.

    It holds torch and a network, the counts of one variant's pairs, the decoding of a batch, and the weights of more members.
    """
    (name, *others), evaluation = list_members(config, name), config["evaluation"]
    dataset = config["datasets"][config["models"][name]["dataset"]]
    network = build_network_config(config, name)
    simulations = max([evaluation["simulations"], *evaluation["simulations_of"].values()])
    counts = 2 * len(dataset["scales"]) * network.windows * dataset["samples"] * 4
    decoding = evaluation["batch_size"] * evaluation["replicates"] * network.windows
    decoding *= 4 * (2 * network.layers * network.width + 2 * network.bins)
    weights = sum(4 * 12 * one.layers * one.width**2 for one in (build_network_config(config, other) for other in others))
    return 4000 + int((2 * simulations * evaluation["pairs"] * counts + 1.5 * decoding + weights) / 1e6)
