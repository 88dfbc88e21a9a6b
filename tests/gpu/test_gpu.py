"""What a GPU computes against the CPU, or against the plainer way on the same GPU."""

import time

import pytest
import torch
from helpers.interruptions import TRAINING, Trainer, assert_equal_runs
from helpers.network import inputs, model_of
from helpers.repository import run_python

from cxt.config.network import AdapterConfig, ModelConfig
from cxt.config.training import TrainingConfig
from cxt.data.loaders import EpochBatchSampler, PrefetchLoader
from cxt.data.pair_dataset import PairDataset
from cxt.decoding.decode import use_precision
from cxt.decoding.reading import read_marginals
from cxt.model.decoder import Decoder
from cxt.trainer.module import build_loss_function, compile_backend
from cxt.trainer.optimizers import build_optimizer, orthogonalise

DEVICE = "cuda"
NETWORK = ModelConfig(layers=3, heads=2, width=32, windows=130, samples=10, scales=4, dropout=0.0)
"""More windows than two CUDA graphs of decoding cover."""

ADAPTED = AdapterConfig(samples=6)


@pytest.fixture(autouse=True)
def exact_products():
    """Matrix products of 32 bits in 32 bits, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch._dynamo.reset()


def batch_of(adapter=None, *, items=6, seed=1):
    """Raw counts and tokens of some examples, on the GPU."""
    x, y = inputs(NETWORK, None if adapter is None else adapter.samples, items=items, seed=seed)
    return torch.expm1(x).round().to(torch.int16).to(DEVICE), None, y.to(DEVICE)


def loss_and_gradients(model, loss, batch, *, precision="32-true"):
    """The loss of a batch, and all gradients as one vector."""
    model.zero_grad()
    with use_precision(precision, DEVICE):
        value = loss(*batch)
    value.backward()
    return float(value), torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of the difference, relative to that of *b*."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("adapter", [None, ADAPTED], ids=["plain", "adapter"])
def test_decoding_by_graphs_is_decoding_step_by_step(adapter):
    """The same kernels in the same order: equal to the bit, also when a second batch reuses the graphs."""
    model = model_of(NETWORK, adapter).to(DEVICE)
    by_graph, by_step = Decoder(model, replicates=3, seed=5), Decoder(model, replicates=3, seed=5)
    by_step.on_gpu = False
    for seed in (1, 2):
        x, _ = inputs(NETWORK, None if adapter is None else adapter.samples, items=4, seed=seed)
        tokens, probabilities = (part.clone() for part in by_graph.decode(x.to(DEVICE)))
        expected_tokens, expected = by_step.decode(x.to(DEVICE))
        assert torch.equal(tokens, expected_tokens)
        assert torch.equal(probabilities, expected)


@pytest.mark.parametrize("adapter", [None, ADAPTED], ids=["plain", "adapter"])
def test_decoding_on_gpu_is_decoding_on_cpu(adapter):
    """Fed the same tokens, since sampling may differ where a probability rounds differently."""
    model = model_of(NETWORK, adapter)
    x, _ = inputs(NETWORK, None if adapter is None else adapter.samples, items=4)
    tokens, _ = Decoder(model, replicates=2, seed=5).decode(x)
    fed = torch.cat([torch.ones_like(tokens[..., :1]), tokens], dim=-1)
    _, expected = Decoder(model, replicates=2).decode(x, tokens=fed)
    expected = expected.clone()
    _, actual = Decoder(model.to(DEVICE), replicates=2).decode(x.to(DEVICE), tokens=fed)
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("change", [{"attention": "flex"}, {"loss_path": "chunked"}, {"gradient_checkpointing": True}], ids=str)
def test_ways_to_compute_a_step(change):
    """FlexAttention, the loss in chunks and checkpointed gradients give what the default gives."""
    batch = batch_of()
    plain = model_of(NETWORK).to(DEVICE).train()
    other = model_of(NETWORK).to(DEVICE).train()
    expected = loss_and_gradients(plain, build_loss_function(plain, TrainingConfig()), batch)
    actual = loss_and_gradients(other, build_loss_function(other, TrainingConfig(**change)), batch)
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    assert relative_difference(actual[1], expected[1]) < 1e-3


@pytest.mark.parametrize("adapter", [None, ADAPTED], ids=["plain", "adapter"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("objective", ["autoregressive", "marginal", "joint"])
def test_compiled_step(adapter, precision, objective):
    """The compiled step, with the default backend of a GPU, against the eager one."""
    model = model_of(NETWORK, adapter, scale=2.0).to(DEVICE).train()
    training = TrainingConfig(objective=objective, losses=["cross_entropy", "label_smoothing", "emd", "mse", "z_loss"])
    backend = compile_backend(training, DEVICE)
    assert backend == "inductor"
    loss, batch = build_loss_function(model, training), batch_of(adapter)
    expected = loss_and_gradients(model, loss, batch, precision=precision)
    actual = loss_and_gradients(model, torch.compile(loss, backend=backend, dynamic=False), batch, precision=precision)
    tolerance = 1e-3 if precision == "32-true" else 0.05
    assert actual[0] == pytest.approx(expected[0], rel=tolerance)
    assert relative_difference(actual[1], expected[1]) < 3 * tolerance


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("objective", ["autoregressive", "marginal", "joint"])
def test_packed_rows(precision, objective):
    """A compiled step of packed rows, whose mask a GPU may give to another kernel, against an eager one on the CPU."""
    counts, _, tokens = batch_of()
    regions = (torch.arange(NETWORK.windows) // 50).expand(len(tokens), -1).to(DEVICE)
    training = TrainingConfig(objective=objective)
    model = model_of(NETWORK, scale=2.0).to(DEVICE)
    loss = torch.compile(build_loss_function(model, training), backend="inductor", dynamic=False)
    ours = loss_and_gradients(model, loss, (counts, None, tokens, None, None, regions), precision=precision)
    on_cpu = model_of(NETWORK, scale=2.0)
    batch = (counts.cpu(), None, tokens.cpu(), None, None, regions.cpu())
    expected = loss_and_gradients(on_cpu, build_loss_function(on_cpu, training), batch)
    tolerance = 1e-3 if precision == "32-true" else 0.05
    assert ours[0] == pytest.approx(expected[0], rel=tolerance)
    assert relative_difference(ours[1].cpu(), expected[1]) < 3 * tolerance


def test_mixed_precision():
    """bfloat16 has 8 bits: the loss agrees to a per cent, the gradients point the same way."""
    model = model_of(NETWORK, scale=2.0).to(DEVICE).train()
    loss, batch = build_loss_function(model, TrainingConfig()), batch_of()
    expected = loss_and_gradients(model, loss, batch)
    actual = loss_and_gradients(model, loss, batch, precision="bf16-mixed")
    assert actual[0] != expected[0]
    assert actual[0] == pytest.approx(expected[0], rel=0.02)
    assert float(torch.nn.functional.cosine_similarity(actual[1], expected[1], dim=0)) > 0.99


def test_muon_in_bfloat16():
    """A GPU orthogonalises in bfloat16: singular vectors stay, and singular values get near to one."""
    matrix = torch.randn(96, 384, generator=torch.Generator().manual_seed(1))
    expected, actual = orthogonalise(matrix), orthogonalise(matrix.to(DEVICE)).cpu()
    assert float(torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0)) > 0.99
    values = torch.linalg.svdvals(actual)
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_reading_in_one_pass_is_that_of_a_cpu():
    model = model_of(NETWORK)
    x, _ = inputs(NETWORK, items=4)
    expected = read_marginals(model, x)
    torch.testing.assert_close(read_marginals(model.to(DEVICE), x.to(DEVICE)).cpu(), expected, atol=1e-5, rtol=1e-3)


def test_fused_optimizer_with_clipping():
    """Fused AdamW after clipping, against AdamW's own loop on the CPU, for ten steps."""
    training = TrainingConfig(lr=1e-3)
    weights = {}
    for device in ("cpu", DEVICE):
        model = model_of(NETWORK, scale=2.0).to(device).train()
        optimizer = build_optimizer(model, training, fused=device == DEVICE)
        loss = build_loss_function(model, training)
        for step in range(10):
            counts, _, tokens = batch_of(seed=step)
            optimizer.zero_grad()
            loss(counts.to(device), None, tokens.to(device)).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            assert norm > 0.1
            optimizer.step()
        weights[device] = torch.cat([p.detach().cpu().flatten() for p in model.parameters()])
    start = torch.cat([p.detach().flatten() for p in model_of(NETWORK, scale=2.0).parameters()])
    moved = (weights["cpu"] - start).norm()
    assert moved > 0
    assert (weights[DEVICE] - weights["cpu"]).norm() < 0.02 * moved


def test_pinned_copies(dataset):
    """Every batch arrives as it was made, although the memory that it is copied from is filled again."""
    examples = PairDataset(dataset, "train")
    sampler = EpochBatchSampler(examples=len(examples), batch_size=4, seed=1)
    for threads in (0, 2):
        loader = PrefetchLoader(examples, sampler, batch_size=4, threads=threads, pin=DEVICE == "cuda")
        moved = []
        for batch in loader:
            assert batch.counts.is_pinned() == (DEVICE == "cuda")
            torch.cuda._sleep(10_000_000)  # the copy waits behind it, as behind a step
            moved.append([part.to(DEVICE, non_blocking=True) for part in (batch.counts, batch.tokens)])
            loader.copied(batch)
        for (counts, tokens), indices in zip(moved, sampler, strict=True):
            expected = examples.batch(list(indices))
            assert torch.equal(counts.cpu(), expected.counts)
            assert torch.equal(tokens.cpu(), expected.tokens)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_exact_resume(dataset, tmp_path, precision):
    """With `deterministic: true`, the default, a run that is killed twice ends byte for byte as one that is not."""
    network = ["--model", "broad", "--layers", 2, "--heads", 2, "--width", 16, "--dropout", 0.1, "--threads", 1]
    arguments = [str(word) for word in [
        *network, *TRAINING, "--dataset-path", dataset, "--grad-accum", 1, "--epochs", 12, "--devices", 1,
        "--precision", precision,
    ]]  # fmt: skip
    for name in ("whole", "cut"):
        words = [*arguments, "--run-dir", str(tmp_path / name), "--out", str(tmp_path / f"{name}.ckpt")]
        for number in range(2 if name == "cut" else 0):
            trainer = Trainer(words, tmp_path / f"out{number}", forks=False)
            log = tmp_path / name / "training_log.csv"
            seen = log.stat().st_mtime_ns if log.exists() else 0
            while not trainer.ended() and (not log.exists() or log.stat().st_mtime_ns == seen):
                time.sleep(0.01)
            time.sleep(0.3)
            trainer.kill()
        run_python("-m", "cxt.train", *words)
    assert (tmp_path / "whole.ckpt").read_bytes() == (tmp_path / "cut.ckpt").read_bytes()
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")
