"""Memory and threads that the workflow's jobs request from the scheduler."""

from cxt.config.models import build_network_config, build_training_config
from cxt.workflow.jobs import collect_variants, get_device_count


def preprocessing_memory_mb(config: dict, name: str, simulations: int, tree_bytes: float) -> int:
    """Memory to request for a shard: what is kept of all its simulations, and one tree sequence being processed.

    A target takes 4 bytes in the simulation, and again in each of two copies while the shard is written; sites take 16.
    """
    dataset = config["datasets"][name]
    windows = dataset["sequence_length"] // dataset["window_size"]
    kept = simulations * dataset["regions_per_simulation"] * (16 * dataset["pairs"] * windows + 16 * 20_000)
    return 2000 + int((1.5 * kept + 20 * tree_bytes) / 1e6)


def training_memory_mb(config: dict, name: str) -> int:
    """Memory to request for training: torch, the network and batches for each device, and the dataset once.

    Per region, as `PairDataset` holds it: about 9 bits per target, one bit per genotype (20 000 sites are many), and window
    counts.
    """
    if given := config["models"][name].get("resources", {}).get("mem_mb"):
        return given
    dataset = config["datasets"][config["models"][name]["dataset"]]
    simulations = sum(variant.simulations for variant in collect_variants(config, dataset["scenarios"]))
    windows, samples = dataset["sequence_length"] // dataset["window_size"], dataset["samples"]
    per_region = 1.2 * dataset["pairs"] * windows + 20_000 * (samples / 8 + 1) + 2 * windows * samples
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


def training_threads(config: dict, name: str) -> int:
    """CPU threads of all processes of a model's training, including those that prepare batches."""
    training = build_training_config(config, name)
    return (training.threads + training.workers) * max(1, get_device_count(config, name))


def evaluation_memory_mb(config: dict, name: str) -> int:
    """Memory to request for evaluation: torch and the network, the counts of one variant's pairs, and decoding of a batch."""
    model, evaluation = config["models"][name], config["evaluation"]
    dataset = config["datasets"][model["dataset"]]
    network = build_network_config(config, name)
    simulations = max([evaluation["simulations"], *evaluation["simulations_of"].values()])
    counts = 2 * len(dataset["scales"]) * network.windows * dataset["samples"] * 4
    decoding = evaluation["batch_size"] * evaluation["replicates"] * network.windows
    decoding *= 4 * (2 * network.layers * network.width + 2 * network.bins)
    return 4000 + int((2 * simulations * evaluation["pairs"] * counts + 1.5 * decoding) / 1e6)
