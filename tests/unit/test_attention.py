"""Attention without a mask against a dense one: values, gradients, every way of computing it, and compiled."""

import shutil

import pytest
import torch
from helpers.network import SMALL, dense_logits, inputs, model_of, slow_rotate

from cxt.benchmark.memory import measure_peak_memory
from cxt.benchmark.published_formulation import build_dense_mask, compute_dense_loss
from cxt.config.training import TrainingConfig
from cxt.data.examples import compute_model_input
from cxt.model import attention
from cxt.model.attention import build_rotary_table, flexible_attention, rotate, split_attention
from cxt.trainer.module import build_loss_function

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")


def dense_attention(q, k, v, prefix):
    """The definition, with scores and a mask written out, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    length = q.shape[2]
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(length):
            allowed[query, key] = key <= query or (query < prefix and key < prefix)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ v


def tensors(length, width, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, length, width, generator=generator).requires_grad_() for _ in range(3)]


# The published width of a head, 100, is no multiple of 8; 300 positions are several blocks of the kernel.
# With prefix and length both 9 there are no targets to compute alone.
SHAPES = [(5, 10, 6), (6, 10, 100), (1, 7, 4), (140, 300, 100)]


@pytest.mark.parametrize(
    ("prefix", "length", "width", "targets_only"),
    [(9, 9, 8, False), *((*shape, targets_only) for shape in SHAPES for targets_only in (False, True))],
)
@pytest.mark.parametrize("way", ["merged", "square", "fallback"])
def test_values_and_gradients(prefix, length, width, targets_only, way, monkeypatch):
    if way == "square":  # what is compiled, and what a GPU runs
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    elif way == "fallback":  # a torch without the private kernels
        monkeypatch.setattr(attention, "has_cpu_flash_kernels", lambda: False)
    else:
        assert attention.has_cpu_flash_kernels()
    parts = tensors(length, width)
    expected = dense_attention(*parts, prefix)[:, :, prefix if targets_only else 0 :]
    actual = split_attention(*parts, prefix, targets_only=targets_only)
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=1e-5)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad(expected, parts, gradient.double())
    for one, other in zip(torch.autograd.grad(actual, parts, gradient), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("missing", ["forward", "backward", "signature"])
def test_private_kernels_that_torch_has_changed(missing, monkeypatch):
    """They are tried before they are used, and the two public calls give the same to rounding."""
    name = "_scaled_dot_product_flash_attention_for_cpu" + ("_backward" if missing == "backward" else "")

    def refuse(*args, **kwargs):
        raise AttributeError(name) if missing != "signature" else TypeError("unexpected argument")

    parts = tensors(30, 20)
    expected = split_attention(*parts, 13, targets_only=False)
    monkeypatch.setattr(torch.ops.aten, name, refuse)
    attention.has_cpu_flash_kernels.cache_clear()
    try:
        assert not attention.has_cpu_flash_kernels()
        actual = split_attention(*parts, 13, targets_only=False)
    finally:
        monkeypatch.undo()
        attention.has_cpu_flash_kernels.cache_clear()
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)


def test_half_precision():
    parts = [part.detach().bfloat16() for part in tensors(30, 20)]
    actual = split_attention(*parts, 13, targets_only=False)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), dense_attention(*parts, 13), atol=0.05, rtol=0.02)


@needs_compiler
@pytest.mark.parametrize("targets_only", [False, True])
def test_flex_attention(targets_only):
    """Values only: on a CPU it has no gradients."""
    parts = [part.detach() for part in tensors(300, 100)]
    expected = dense_attention(*parts, 140)[:, :, 140 if targets_only else 0 :]
    torch.testing.assert_close(
        flexible_attention(*parts, 140, targets_only=targets_only).double(), expected, atol=2e-6, rtol=1e-5
    )


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Dynamo compiles one function a few times only, and the tests of a process share it."""
    torch._dynamo.reset()


@pytest.mark.parametrize("compiling", [False, True])
def test_rotation(compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    table = build_rotary_table(9, 6)
    torch.testing.assert_close(rotate(x, table), slow_rotate(x.detach()))
    # A rotation's gradient is the rotation back, and keeps lengths.
    gradient = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(2))
    (back,) = torch.autograd.grad(rotate(x, table), x, gradient)
    torch.testing.assert_close(back.square().sum(-1), gradient.square().sum(-1))
    torch.testing.assert_close(rotate(back, table), gradient)


def loss_and_gradients(model, loss, *batch):
    model.zero_grad()
    value = loss(*batch)
    value.backward()
    return value.detach(), [p.grad.clone() for p in model.parameters()]


def assert_same(one, other, *, loss=1e-5, gradient=1e-4):
    assert abs(float(one[0] - other[0])) < loss
    largest = max(float(g.abs().max()) for g in other[1])
    for a, b in zip(one[1], other[1], strict=True):
        assert float((a - b).abs().max()) < gradient * largest


def batch():
    x, y = inputs()
    return torch.expm1(x).round().to(torch.int16), None, y


@pytest.mark.parametrize("start_token_in_prefix", [False, True])
def test_loss_and_gradients_are_those_of_the_dense_network(start_token_in_prefix):
    """The formulation that `cxt bench` compares with, and the plain one of the tests."""
    model = model_of(SMALL.replace(start_token_in_prefix=start_token_in_prefix))
    x, y = inputs()
    x[..., 0] = 1.5  # what is masked
    one = loss_and_gradients(model, model.loss, x, y)
    assert_same(one, loss_and_gradients(model, lambda x, y: compute_dense_loss(model, x, y), x, y))

    def plain(x, y):
        return torch.nn.functional.cross_entropy(dense_logits(model, x, y).flatten(0, 1), y[:, 1:].flatten())

    assert_same(one, loss_and_gradients(model, plain, x, y))


def test_dense_mask_of_the_published_model():
    mask = build_dense_mask(500, 501, "cpu")
    assert mask.shape == (1001, 1001)
    assert float(mask.float().mean()) == pytest.approx(0.625, abs=0.001)


@pytest.mark.parametrize("path", ["full", "chunked"])
def test_paths_to_the_loss(path):
    model = model_of()
    default = loss_and_gradients(model, build_loss_function(model, TrainingConfig()), *batch())
    assert_same(loss_and_gradients(model, build_loss_function(model, TrainingConfig(loss_path=path)), *batch()), default)


@pytest.mark.parametrize("path", ["target", "full", "chunked"])
def test_the_loss_of_a_network_in_half_precision_is_exact(path):
    """Its sum is made in 32 bits, on whichever path: a bfloat16 has no more than three digits."""
    model = model_of().to(torch.bfloat16)
    counts, missing, y = batch()
    with torch.no_grad():
        actual = build_loss_function(model, TrainingConfig(loss_path=path))(counts, missing, y)
        logits = model(compute_model_input(counts, missing), y).flatten(0, 1).double()
        exact = torch.nn.functional.cross_entropy(logits, y[:, 1:].flatten())
    assert actual.dtype == torch.float32
    assert abs(float(actual) - float(exact)) < 1e-3


def test_a_loss_in_chunks_takes_less_memory():
    model = model_of(SMALL.replace(windows=250, bins=1000))
    x, y = inputs(items=8, config=model.config)

    def peak(path):
        return measure_peak_memory(lambda: model.loss(x, y, path=path).backward(), "cpu")

    assert peak("chunked") < 0.7 * peak("target") < 0.7 * peak("full")


def test_gradient_checkpointing_changes_no_bit():
    model = model_of().train()
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(4)  # dropout
        loss = build_loss_function(model, TrainingConfig(gradient_checkpointing=checkpointing))
        results.append(loss_and_gradients(model, loss, *batch()))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.long])])
@pytest.mark.parametrize("path", ["target", "full", "chunked"])
def test_compiled(backend, path):
    model = model_of()
    loss = build_loss_function(model, TrainingConfig(loss_path=path))
    compiled = torch.compile(loss, backend=backend, dynamic=False, fullgraph=True)  # fails where the graph would break
    assert_same(loss_and_gradients(model, compiled, *batch()), loss_and_gradients(model, loss, *batch()), loss=1e-4)
    assert not any("_orig_mod" in key for key in model.state_dict())


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "AVX2",
    reason="torch 2.13's FlexAttention gives NaN without AVX-512",
)
@needs_compiler
def test_compiled_flex_attention():
    """In one graph as well; values only, as above."""
    model = model_of()
    with torch.no_grad():
        expected = float(build_loss_function(model, TrainingConfig())(*batch()))
        loss = build_loss_function(model, TrainingConfig(attention="flex"))
        assert abs(float(loss(*batch())) - expected) < 1e-5  # a validation's
        compiled = torch.compile(loss, backend="aot_eager", dynamic=False, fullgraph=True)
        assert abs(float(compiled(*batch())) - expected) < 1e-5


def test_compiled_with_missingness():
    model = model_of(SMALL.replace(mask_singletons=False))
    counts, _, y = batch()
    missing = torch.rand(len(y), SMALL.scales, SMALL.windows, generator=torch.Generator().manual_seed(1))
    loss = build_loss_function(model, TrainingConfig())
    compiled = torch.compile(loss, backend="aot_eager", dynamic=False, fullgraph=True)
    expected = loss_and_gradients(model, loss, counts, missing, y)
    assert_same(loss_and_gradients(model, compiled, counts, missing, y), expected, loss=1e-4)
    assert abs(float(loss(counts, 1 - missing, y)) - float(expected[0])) > 1e-4  # it is read


def test_compiled_dropout_is_repeatable():
    model = model_of().train()
    compiled = torch.compile(build_loss_function(model, TrainingConfig()), backend="aot_eager", dynamic=False)
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        results.append(loss_and_gradients(model, compiled, *batch()))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
