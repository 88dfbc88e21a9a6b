"""Measuring how fast this machine trains and decodes, on real examples and with the code of training.

The peak rate is the largest rate of a matrix product that the device reaches in the same run.
"""

import contextlib
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from cxt.benchmark.memory import measure_peak_memory
from cxt.benchmark.published_formulation import compute_dense_loss
from cxt.config.network import START_TOKEN, AdapterConfig, ModelConfig, count_pairs
from cxt.config.training import TrainingConfig
from cxt.data.examples import Batch, compute_model_input
from cxt.data.features import SCALES
from cxt.data.grid import Grid
from cxt.data.loaders import EpochBatchSampler, PrefetchLoader
from cxt.data.pair_dataset import PairDataset
from cxt.decoding.decode import use_precision
from cxt.errors import BadRequest
from cxt.model.adapter import build_model
from cxt.model.decoder import Decoder
from cxt.model.flops import decoding_flops, training_flops
from cxt.trainer.module import build_loss_function, compile_backend
from cxt.trainer.optimizers import build_optimizer

SIMULATIONS, PAIRS = 20, 200


def detect_device() -> str:
    """`cuda` or `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe_device(device: str) -> str:
    """Describe the device, with its name or number of threads."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}, torch {torch.__version__}"


def synchronize(device: str) -> None:
    """Wait until the device has finished all work."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def simulate_examples(network: ModelConfig, adapter: AdapterConfig | None, *, batch_size: int):
    """Training examples of the network's shape: pairs of constant-size simulations, in a temporary directory."""
    from cxt.config.variants import list_variants
    from cxt.data.manifest import write_manifest
    from cxt.data.preprocessing import preprocess_batch
    from cxt.scenarios.batches import write_batch
    from cxt.scenarios.indices import SPLITS

    samples = network.samples if adapter is None else adapter.samples
    length = network.windows * network.window_size
    scenario = {
        "kind": "constant", "simulations": SIMULATIONS, "batch": SIMULATIONS, "individuals": -(-samples // 2),
        "sequence_length": length, "mutation_rate": 1.29e-8, "recombination_rate": 1.28e-8, "population_size": 20_000,
    }  # fmt: skip
    spec = {
        "window_size": network.window_size, "sequence_length": length, "samples": samples,
        "pairs": min(PAIRS, count_pairs(samples)), "scales": list(SCALES[: network.scales]),
    }  # fmt: skip
    mask = None if network.mask_singletons else torch.rand(2 * length, generator=torch.Generator().manual_seed(1)).numpy() < 0.3
    with tempfile.TemporaryDirectory(prefix="cxt-bench-") as directory:
        variant = list_variants("constant", scenario)[0]
        batch = Path(directory) / "batch"
        write_batch(batch, variant.spec, start=0, count=SIMULATIONS, seed=1)
        shards = {split: f"{split}/constant-0.zarr.zip" for split in SPLITS}
        outs = {split: Path(directory) / shard for split, shard in shards.items()}
        preprocess_batch(outs, batch, spec, start=0, count=SIMULATIONS, mask=mask)
        write_manifest(directory, {split: [shard] for split, shard in shards.items()})
        dataset = PairDataset(directory, "train", grid=Grid(network.grid_low, network.grid_high, network.bins))
        if len(dataset) < batch_size:
            raise BadRequest(f"--batch-size must be at most {len(dataset)}, the number of examples, got {batch_size}")
        yield dataset


class Loader:
    """An endless iterator over batches of a dataset, moved to the device as in training."""

    def __init__(self, dataset, *, batch_size: int, workers: int, device: str):
        self.device = device
        self.batch_size = batch_size
        self.sampler = EpochBatchSampler(examples=len(dataset), batch_size=batch_size, seed=1)
        self.loader = PrefetchLoader(dataset, self.sampler, batch_size=batch_size, threads=workers, pin=device == "cuda")
        self._batches = self._iterate_batches()

    def _iterate_batches(self):
        while True:
            for batch in self.loader:
                moved = Batch(*(None if part is None else part.to(self.device, non_blocking=True) for part in batch))
                if self.device == "cuda":
                    self.loader.copied(batch)
                yield moved
            self.sampler.epoch += 1

    def __next__(self) -> Batch:
        return next(self._batches)

    @property
    def waited(self) -> float:
        """Seconds spent waiting for batches."""
        return self.loader.waited


def build_dense_loss(model):
    """A function of the parts of a batch that gives the loss by the published formulation, which reads the first three."""
    return lambda counts, missing, tokens, *others: compute_dense_loss(model, compute_model_input(counts, missing), tokens)


class Steps:
    """Runs optimizer steps of one model with *loss*, a function of a batch."""

    def __init__(self, model, training: TrainingConfig, loss, optimizer, loader: Loader, *, precision: str):
        self.model, self.loss, self.optimizer, self.loader, self.precision = model, loss, optimizer, loader, precision

    def __call__(self, count: int) -> None:
        """Run *count* optimizer steps."""
        for _ in range(count):
            with use_precision(self.precision, self.loader.device):
                loss = self.loss(*next(self.loader))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def timed(self, count: int) -> float:
        """Seconds per step, averaged over *count* steps."""
        synchronize(self.loader.device)
        began = time.perf_counter()
        self(count)
        synchronize(self.loader.device)
        return (time.perf_counter() - began) / count


def measure_matrix_rate(device: str, precision: str) -> float:
    """FLOP/s of a large square matrix product, the best of several: the peak rate of the device in this precision."""
    dtype = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}.get(precision, torch.float32)
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn((size, size), dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    best = 0.0
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        repeats = 10 if device == "cuda" else 1
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        synchronize(device)
        best = max(best, 2 * size**3 * repeats / (time.perf_counter() - began))
    return best


def limit_batch(batch: int, flops: float, device: str) -> int:
    """*batch*, or on a CPU as much of it as takes half a teraFLOP (some seconds)."""
    return batch if device == "cuda" else max(1, min(batch, int(5e11 / flops)))


def list_attention_kernels(network: ModelConfig, precision: str, device: str) -> str:
    """Names of torch's attention kernels that support this network on this device."""
    if device == "cpu":
        return "flash (CPU)"
    backends = torch.backends.cuda
    dtype = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}.get(precision, torch.float32)
    q = torch.empty((1, network.heads, 128, network.width // network.heads), dtype=dtype, device=device, requires_grad=True)
    asked = backends.SDPAParams(q, q, q, None, 0.0, True, False)
    usable = {
        "flash": backends.can_use_flash_attention(asked),
        "memory-efficient": backends.can_use_efficient_attention(asked),
        "cuDNN": backends.can_use_cudnn_attention(asked),
    }
    return ", ".join(name for name, is_usable in usable.items() if is_usable) or "none: torch would write out all scores"


def bench_training(
    network: ModelConfig, adapter: AdapterConfig | None, training: TrainingConfig, *, device: str, seconds: float, compare=None
) -> dict:
    """Measure optimizer steps of a network on this machine, including loading, without accumulation or logging.

    Parameters
    ----------
    training : batch_size, precision, compile, attention, loss_path, gradient_checkpointing, workers and rates are used
    seconds : approximate measuring time
    compare : "dense" also measures the published formulation, in turns, with the same weights and examples

    Returns
    -------
    dict
        items_per_second, windows_per_second, flops_per_second, peak_flops_per_second, memory_bytes (see
        `measure_peak_memory`), waiting (fraction of time); with *compare*, ratio (of examples per second, median of the
        turns), ratios, dense_items_per_second, dense_memory_bytes, loss_difference, and gradient_difference, relative to
        the largest gradient.
    """
    precision = training.precision if device == "cuda" else "32-true"
    if training.objective == "distill":  # the same pass; there is no teacher here, and its part of a step is small
        training = training.replace(objective="marginal")
    torch.manual_seed(1)
    model = build_model(network, adapter).to(device).train()
    autocast = precision
    if precision == "bf16-true":
        model.to(torch.bfloat16)
        autocast = "32-true"  # no autocast, because the network itself is in 16 bits
    loss = plain = build_loss_function(model, training, scales=SCALES[: network.scales])
    optimizer = build_optimizer(model, training, fused=device == "cuda" and precision != "16-mixed")
    backend = compile_backend(training, device)
    if backend is not None:
        loss = torch.compile(loss, backend=backend, dynamic=False)
    result = {
        "batch": training.batch_size,
        "precision": precision,
        "compile": backend or "none",
        "adapter": adapter is not None,
    }
    with simulate_examples(network, adapter, batch_size=training.batch_size) as dataset:
        loader = Loader(dataset, batch_size=training.batch_size, workers=training.workers, device=device)
        formulations = {"": Steps(model, training, loss, optimizer, loader, precision=autocast)}
        if compare == "dense":
            dense = build_dense_loss(model)
            formulations["dense_"] = Steps(model, training, dense, optimizer, loader, precision=autocast)
            result |= compare_losses(model, plain, dense, next(loader), precision=autocast, device=device)
        for name, steps in formulations.items():
            steps(2)  # compiles, and fills the caches
            result[f"{name}memory_bytes"] = measure_peak_memory(lambda steps=steps: steps(1), device)
        each = {name: steps.timed(1) for name, steps in formulations.items()}
        count = max(1, int(1.0 / each[""]))  # steps per turn, which takes about a second
        turns = max(3, int(seconds / (count * sum(each.values()))))
        times: dict[str, list[float]] = {name: [] for name in formulations}
        waited, spent = loader.waited, 0.0
        for _ in range(turns):
            for name, steps in formulations.items():
                before = loader.waited
                times[name].append(steps.timed(count))
                if name:
                    waited += loader.waited - before  # not counted
                else:
                    spent += times[name][-1] * count
        result["waiting"] = (loader.waited - waited) / spent
    for name, seconds_each in times.items():
        result[f"{name}items_per_second"] = training.batch_size / statistics.median(seconds_each)
    rate = result["items_per_second"]
    result |= {
        "windows_per_second": rate * network.windows,
        "flops_per_second": rate * training_flops(network, adapter, objective=training.objective),
        "peak_flops_per_second": measure_matrix_rate(device, precision),
        "attention_kernels": "FlexAttention"
        if training.attention == "flex"
        else list_attention_kernels(network, precision, device),
    }
    if compare == "dense":
        result["ratios"] = [b / a for a, b in zip(times[""], times["dense_"], strict=True)]
        result["ratio"] = statistics.median(result["ratios"])
    return result


def compare_losses(model, fused, dense, batch: Batch, *, precision: str, device: str) -> dict:
    """Compare loss and gradients of two formulations on one batch, without dropout."""
    model.eval()
    losses_and_gradients = []
    for loss in (fused, dense):
        model.zero_grad()
        with use_precision(precision, device):
            value = loss(*batch)
        value.backward()
        losses_and_gradients.append(
            (float(value.detach()), [p.grad.detach().clone() for p in model.parameters() if p.grad is not None])
        )
    model.zero_grad()
    model.train()
    (first, gradients), (second, others) = losses_and_gradients
    largest = max(float(g.abs().max()) for g in others)
    worst = max(float((a - b).abs().max()) for a, b in zip(gradients, others, strict=True))
    return {"loss_difference": abs(first - second), "gradient_difference": worst / largest}


@torch.no_grad()
def decode_uncached(model, x: torch.Tensor, *, replicates: int, every: int = 1) -> float:
    """Seconds that decoding takes if everything is recomputed for each window; only every *every*-th window is timed."""
    x = x.repeat_interleave(replicates, dim=0)
    windows = x.shape[3]
    tokens = torch.full((len(x), windows + 1), START_TOKEN, device=x.device)
    began = time.perf_counter()
    timed = range(0, windows, every)
    for step in timed:
        distribution = model(x, tokens)[:, step, 2:].float().softmax(-1)
        tokens[:, step + 1] = torch.multinomial(distribution, 1)[:, 0] + 2
    synchronize(x.device.type)
    return (time.perf_counter() - began) / len(timed) * windows


def bench_decoding(
    network: ModelConfig, *, device: str, precision: str, batch: int, pairs: int | None, replicates: int, seconds: float,
    compare=None,
) -> dict:  # fmt: skip
    """Measure decoding on this machine, including the prefix.

    Parameters
    ----------
    batch : pairs decoded together
    pairs : pairs to decode once; None repeats one batch for about *seconds*
    compare : "uncached" also measures decoding without a cache, on one pair of each batch

    Returns
    -------
    dict
        pairs, seconds, pairs_per_second, windows_per_second (of all replicates), flops_per_second, peak_flops_per_second,
        memory_bytes; with *compare*, ratio of pairs per second.
    """
    precision = precision if device == "cuda" else "32-true"
    torch.manual_seed(1)
    model = build_model(network).to(device).eval()
    result = {"batch": batch, "replicates": replicates, "precision": precision, "adapter": False}
    with simulate_examples(network, None, batch_size=batch) as dataset, use_precision(precision, device), torch.no_grad():
        loader = Loader(dataset, batch_size=batch, workers=0, device=device)
        first = next(loader)
        x = compute_model_input(first.counts, first.missing)
        decoder = Decoder(model, replicates=replicates, seed=1)
        result["memory_bytes"] = measure_peak_memory(lambda: decoder.decode(x), device)
        synchronize(device)
        began, done = time.perf_counter(), 0
        while done < (pairs or 1) or (pairs is None and time.perf_counter() - began < seconds):
            decoder.decode(x, example_ids=range(done, done + batch))
            synchronize(device)
            done += batch
        spent = time.perf_counter() - began
        rate = done / spent
        if compare == "uncached":
            few = max(1, batch // 8)
            every = max(1, network.windows // 50)
            result["uncached_pairs_per_second"] = few / decode_uncached(model, x[:few], replicates=replicates, every=every)
            result["ratio"] = rate / result["uncached_pairs_per_second"]
    return result | {
        "pairs": done,
        "seconds": spent,
        "pairs_per_second": rate,
        "windows_per_second": rate * replicates * network.windows,
        "flops_per_second": rate * decoding_flops(network, replicates=replicates),
        "peak_flops_per_second": measure_matrix_rate(device, precision),
    }


def measure(networks: dict[str, tuple], *, seconds: float = 10.0, progress=print) -> dict:
    """Rates of several networks {name: (ModelConfig, AdapterConfig | None, TrainingConfig)} on this machine's device."""
    device = detect_device()
    result: dict = {"device": describe_device(device), "threads": torch.get_num_threads(), "training": {}, "decoding": {}}
    for name, (network, adapter, training) in networks.items():
        batch_size = limit_batch(training.batch_size, training_flops(network, adapter, objective=training.objective), device)
        chosen = training.replace(batch_size=batch_size)
        rate = result["training"][name] = bench_training(network, adapter, chosen, device=device, seconds=seconds)
        progress(f"{name}: training {rate['items_per_second']:.1f} examples/s, {rate['flops_per_second'] / 1e12:.3g} TFLOP/s")
        if adapter is None:
            replicates = 15 if device == "cuda" else 12
            pairs = limit_batch(64 if device == "cuda" else 40, decoding_flops(network, replicates=replicates), device)
            rate = result["decoding"][name] = bench_decoding(
                network, device=device, precision=training.precision, batch=pairs, pairs=None, replicates=replicates,
                seconds=seconds,
            )  # fmt: skip
            progress(f"{name}: decoding {rate['pairs_per_second']:.2f} pairs/s with {replicates} replicates")
    return result
