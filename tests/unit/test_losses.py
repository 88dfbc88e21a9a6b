"""Loss terms against plain formulas, objectives against a dense network, and optimizers against the published rules."""

import math
from copy import deepcopy as copy_deeply

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.network import dense_logits, inputs, model_of, slow_rotate

from cxt.config.learning import LossTerm
from cxt.config.network import AdapterConfig
from cxt.config.training import TrainingConfig
from cxt.data.grid import Grid
from cxt.decoding.reading import read_marginals
from cxt.errors import BadRequest
from cxt.trainer.losses import Criterion
from cxt.trainer.objectives import build_objective
from cxt.trainer.optimizers import Lion, Muon, build_optimizer, orthogonalise

GRID = Grid(3.0, 5.75, 12)  # steps of 0.25


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(7, 14, generator=generator, requires_grad=True)


LABELS = torch.tensor([2, 13, 5, 5, 7, 9, 3])


def slow_term(name: str, logits: np.ndarray, bin_: int) -> float:
    """One window's loss, written out: *logits* (V,) float64."""
    everything = np.exp(logits) / np.exp(logits).sum()
    bins = np.exp(logits[2:]) / np.exp(logits[2:]).sum()
    centres = [3.0 + 0.25 * (b + 0.5) for b in range(12)]
    if name == "cross_entropy":
        return -math.log(everything[bin_ + 2])
    if name == "label_smoothing":
        target = [math.exp(-0.5 * ((centre - centres[bin_]) / 0.3) ** 2) for centre in centres]
        return -sum(t / sum(target) * math.log(everything[b + 2]) for b, t in enumerate(target))
    if name == "emd":
        return sum((sum(bins[: b + 1]) - (b >= bin_)) ** 2 for b in range(12)) * 0.25
    if name == "mse":
        return (sum(p * centre for p, centre in zip(bins, centres, strict=True)) - centres[bin_]) ** 2
    assert name == "z_loss"
    return math.log(np.exp(logits).sum()) ** 2


@pytest.mark.parametrize("name", ["cross_entropy", "label_smoothing", "emd", "mse", "z_loss"])
def test_terms(name, logits):
    """Values by hand, and gradients by differences."""
    criterion = Criterion([LossTerm(name=name, **({"sigma": 0.3} if name == "label_smoothing" else {}))], GRID)
    rows = logits.detach().double().numpy()
    expected = [slow_term(name, row, int(label) - 2) for row, label in zip(rows, LABELS, strict=True)]
    (mean,) = criterion(logits, LABELS)
    (total,) = criterion(logits, LABELS, reduction="sum")
    assert float(mean.detach()) == pytest.approx(np.mean(expected), rel=1e-5)
    assert float(total.detach()) == pytest.approx(np.sum(expected), rel=1e-5)
    (gradient,) = torch.autograd.grad(total, logits)
    step = 1e-5
    for row, column in ((0, 0), (0, 2), (1, 13), (4, 6), (6, 1)):
        shifted = [rows[row].copy() for _ in range(2)]
        shifted[0][column] -= step
        shifted[1][column] += step
        low, high = (slow_term(name, values, int(LABELS[row]) - 2) for values in shifted)
        assert float(gradient[row, column]) == pytest.approx((high - low) / (2 * step), abs=2e-4)


def test_a_narrow_smoothed_target_is_cross_entropy(logits):
    smoothed, plain = (
        Criterion([term], GRID)(logits, LABELS)
        for term in (LossTerm(name="label_smoothing", sigma=0.01), LossTerm(name="cross_entropy"))
    )
    torch.testing.assert_close(smoothed, plain)


def test_weights_change_along_the_run():
    terms = [
        LossTerm(name="cross_entropy", weight=2.0),
        LossTerm(name="emd", weight=0.0, final_weight=1.0),
        LossTerm(name="mse", weight=1.0, final_weight=0.01, weight_schedule="exponential"),
        LossTerm(name="z_loss", weight=1.0, final_weight=0.0, weight_schedule="cosine"),
    ]
    criterion = Criterion(terms, GRID)
    assert criterion.weights(0.0) == pytest.approx([2.0, 0.0, 1.0, 1.0])
    assert criterion.weights(0.5) == pytest.approx([2.0, 0.5, 0.1, 0.5])
    assert criterion.weights(1.0) == pytest.approx([2.0, 1.0, 0.01, 0.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": "[{name: label_smoothin}]"}, "unknown losses.0.name 'label_smoothin'; did you mean 'label_smoothing'?"),
        ({"losses": []}, "at least one loss term"),
        ({"losses": [{"name": "emd"}, {"name": "emd"}]}, "none may be named twice"),
        ({"losses": [{"name": "emd", "wieght": 1}]}, "losses.0.wieght: unknown key; did you mean 'weight'?"),
        ({"losses": [{"name": "emd", "weight": -1}]}, "losses.0.weight must be a non-negative number, got -1"),
        ({"losses": [{"name": "emd", "sigma": 1}]}, "`sigma` is a setting of label_smoothing, not of emd"),
        ({"losses": [{"name": "emd", "weight_schedule": "linear"}]}, "`weight_schedule` needs a `final_weight`"),
        ({"losses": [{"name": "emd", "final_weight": 0, "weight_schedule": "exponential"}]}, "needs a positive `weight`"),
        ({"losses": "[{"}, "not valid YAML"),
        ({"objective": "margnal"}, "unknown objective 'margnal'; did you mean 'marginal'?"),
        ({"optimizer": "moun"}, "unknown optimizer.name 'moun'; did you mean 'muon'?"),
        ({"optimizer": {"name": "adamw", "momentum": 0.5}}, "`momentum` is a setting of sgd and muon, not of adamw"),
        ({"optimizer": {"name": "muon", "other_lr": 0}}, "optimizer.other_lr must be a positive number, got 0"),
        ({"optimizer": 3}, "optimizer must be the name of an optimizer"),
    ],
)  # fmt: skip
def test_refused_settings(settings, message):
    with pytest.raises(BadRequest) as error:
        TrainingConfig(**settings)
    assert message in str(error.value)


def test_short_forms():
    short = TrainingConfig(losses="emd", optimizer="muon")
    assert short == TrainingConfig(losses=[{"name": "emd"}], optimizer={"name": "muon"})
    assert short.losses[0].weight == 1.0


# Objectives


def dense_source_logits(model, x):
    """The marginal definition: attention among the sources written out, and the head on each."""
    backbone, config = model.backbone, model.config
    h = backbone.source_embedding(x)
    head_width = config.width // config.heads
    for block in backbone.blocks:
        q, k, v = block.attention.qkv(block.norm_attention(h)).split(config.width, dim=-1)
        out = []
        for head in range(config.heads):
            part = slice(head * head_width, (head + 1) * head_width)
            scores = slow_rotate(q[..., part]) @ slow_rotate(k[..., part]).transpose(1, 2) / head_width**0.5
            out.append(scores.softmax(-1) @ v[..., part])
        h = h + block.attention.out(torch.cat(out, dim=-1))
        h = h + block.mlp.down(F.gelu(block.mlp.up(block.norm_mlp(h))))
    return backbone.head(backbone.norm(h))


def test_objectives_against_the_definition():
    model = model_of()
    x, y = inputs()
    labels = y[:, 1:].flatten()
    marginal = F.cross_entropy(dense_source_logits(model, x).flatten(0, 1), labels)
    autoregressive = F.cross_entropy(dense_logits(model, x, y).flatten(0, 1), labels)
    values = {
        name: build_objective(model, TrainingConfig(objective=name))(model, x, y)
        for name in ("autoregressive", "marginal", "joint")
    }
    torch.testing.assert_close(values["autoregressive"], autoregressive[None])
    torch.testing.assert_close(values["marginal"], marginal[None])
    torch.testing.assert_close(values["joint"], torch.stack([autoregressive, marginal]))
    joint = build_objective(model, TrainingConfig(objective="joint", joint_weight=0.25, losses=["emd", "cross_entropy"]))
    assert joint.names == ["emd", "cross_entropy", "marginal_emd", "marginal_cross_entropy"]
    assert joint.weights(0.3) == [1.0, 1.0, 0.25, 0.25]


@pytest.mark.parametrize("path", ["target", "full", "chunked"])
def test_loss_paths_with_several_terms(path):
    model = model_of()
    x, y = inputs()
    terms = ["cross_entropy", {"name": "label_smoothing", "sigma": 0.3}, "emd", "mse", "z_loss"]
    values = build_objective(model, TrainingConfig(losses=terms, loss_path=path))(model, x, y)
    expected = build_objective(model, TrainingConfig(losses=terms))(model, x, y)
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("adapter", [None, AdapterConfig(samples=6, bottleneck=4)])
def test_reading_in_one_pass(adapter):
    model = model_of(adapter=adapter)
    x, _ = inputs(samples=None if adapter is None else 6)
    with torch.no_grad():
        expected = dense_source_logits(model, x if adapter is None else model.adapter(x))[..., 2:].double().softmax(-1)
    torch.testing.assert_close(read_marginals(model, x), expected, atol=1e-6, rtol=1e-4)


# Optimizers


def test_orthogonal():
    """Singular vectors stay, and singular values get near to one."""
    generator = torch.Generator().manual_seed(1)
    for shape in ((20, 8), (8, 20), (9, 9)):
        matrix = torch.randn(*shape, generator=generator)
        result = orthogonalise(matrix)
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.5
        assert values.max() < 1.3
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inside = u.T @ result @ v.T
        torch.testing.assert_close(inside, torch.diag(inside.diagonal()), atol=1e-4, rtol=0)


def trained(build, steps=20):
    """Two matrices after some steps on a quadratic function."""
    torch.manual_seed(1)
    first, second = torch.nn.Parameter(torch.randn(24, 16)), torch.nn.Parameter(torch.randn(16, 32))
    optimizer = build([{"params": [first, second], "lr": 0.02, "weight_decay": 0.1}])
    x, target = torch.randn(50, 24), torch.randn(50, 32)
    for _ in range(steps):
        optimizer.zero_grad()
        ((x @ first @ second - target) ** 2).mean().backward()
        optimizer.step()
    return first.detach(), second.detach()


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_that_of_torch(nesterov):
    """Which computes in bfloat16."""
    ours = trained(lambda groups: Muon(groups, momentum=0.9, nesterov=nesterov))
    theirs = trained(lambda groups: torch.optim.Muon(groups, momentum=0.9, nesterov=nesterov))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=0.01, rtol=0)


def test_lion_by_hand():
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Lion([{"params": [parameter], "lr": 0.1, "weight_decay": 0.5}], betas=(0.9, 0.99))
    value, momentum = [1.0, -2.0], [0.0, 0.0]
    for gradient in ([0.3, -0.2], [-0.01, -0.4], [-2.0, 0.1]):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        for i in range(2):
            update = 0.9 * momentum[i] + 0.1 * gradient[i]
            value[i] = value[i] * (1 - 0.1 * 0.5) - 0.1 * math.copysign(1, update)
            momentum[i] = 0.99 * momentum[i] + 0.01 * gradient[i]
        assert parameter.tolist() == pytest.approx(value)


def test_muon_takes_the_matrices_of_the_blocks():
    model = model_of()
    training = TrainingConfig(optimizer={"name": "muon", "other_lr": 0.001}, lr=0.02)
    optimizer = build_optimizer(model, training, fused=False)
    muon, adamw = optimizer.parts
    matrices = {p for group in muon.param_groups for p in group["params"]}
    assert matrices == {p for name, p in model.named_parameters() if ".blocks." in name and p.ndim == 2}
    others = {p for group in adamw.param_groups for p in group["params"]}
    assert matrices | others == set(model.parameters())
    assert {group["lr"] for group in muon.param_groups} == {0.02}
    assert {group["lr"] for group in adamw.param_groups} == {0.001}
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("name", ["adamw", "muon", "adam", "sgd", "adafactor", "lion"])
@pytest.mark.parametrize("adapter", [None, AdapterConfig(samples=6, bottleneck=4)])
def test_state_of_each_optimizer(name, adapter):
    """A copy that takes over its state goes on in the same way; the schedule's learning rate holds for all parameters."""

    def prepared():
        model = model_of(adapter=adapter).train()
        training = TrainingConfig(optimizer=name, lr=1e-3, min_lr=0.0, losses=["emd"])
        optimizer = build_optimizer(model, training, fused=False)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        objective = build_objective(model, training)

        def step(seed):
            torch.manual_seed(seed)
            x, y = inputs(samples=None if adapter is None else 6, seed=seed)
            optimizer.zero_grad()
            objective(model, x, y).sum().backward()
            optimizer.step()
            schedule.step()

        return model, optimizer, schedule, step

    model, optimizer, schedule, step = prepared()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    for seed in (1, 2):
        step(seed)
    assert all(group["lr"] == pytest.approx(group["initial_lr"] / 3) for group in optimizer.param_groups)
    copy, other, its_schedule, its_step = prepared()
    copy.load_state_dict(model.state_dict())
    other.load_state_dict(copy_deeply(optimizer.state_dict()))  # torch would share the tensors
    its_schedule.load_state_dict(schedule.state_dict())
    step(3)
    its_step(3)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, start[key])]
    assert changed == [key for key, p in model.named_parameters() if p.requires_grad]
    assert all(torch.equal(value, copy.state_dict()[key]) for key, value in model.state_dict().items())
