"""The objective `contrastive`: two views of the same genealogy, and the loss of telling which belong together."""

import math

import numpy as np
import pytest
import torch
from helpers.network import SMALL as NETWORK
from helpers.network import inputs, model_of
from helpers.simulations import build_dataset, constant_scenario, simulate
from helpers.training import FINE, SMALL, equal, train

import cxt
from cxt.benchmark.speed import bench_training
from cxt.checkpoints.file import read_checkpoint
from cxt.checkpoints.run_directory import RunDirectory
from cxt.checkpoints.training_log import read_log
from cxt.config.training import TrainingConfig, drop_later_defaults
from cxt.data.examples import compute_model_input
from cxt.data.pair_dataset import PairDataset
from cxt.errors import BadRequest
from cxt.model.adapter import build_model
from cxt.model.flops import training_flops
from cxt.trainer.contrastive import compute_info_nce, count_in_windows, draw_views, find_base_counts
from cxt.trainer.module import build_loss_function
from cxt.trainer.objectives import build_objective

SCALES = (2, 8, 32, 64)


def objective_of(model, *, scales=SCALES, losses="cross_entropy", **contrastive):
    training = TrainingConfig(objective="contrastive", contrastive=contrastive, losses=losses)
    return build_objective(model, training, scales=scales)


def examples(config=NETWORK, *, items=3, scales=SCALES, seed=1):
    """log1p of counts that are consistent between scales, and tokens."""
    rng = np.random.default_rng(seed)
    base = torch.from_numpy(rng.poisson(2.0, (items, 2, config.windows, config.samples))).int()
    base[..., 0] = 0
    return torch.log1p(count_in_windows(base, scales).float()), inputs(config, items=items)[1]


def counts_of(x):
    return torch.expm1(x.double()).round().long()


# The two views


@pytest.mark.parametrize("windows", [1, 2, 3, 7, 64, 90])
@pytest.mark.parametrize("width", [1, 2, 3, 8, 64])
def test_counts_in_base_windows_and_in_wider_ones(windows, width):
    rng = np.random.default_rng(windows)
    base = rng.integers(0, 9, (2, windows, 5))
    scales = [width, 5, 1]
    wide = np.stack([[base[:, w : w + each].sum(1) for w in range(windows)] for each in scales])  # (S, W, 2, n)
    expected = torch.from_numpy(wide.transpose(2, 0, 1, 3))
    assert torch.equal(count_in_windows(torch.from_numpy(base), scales), expected)
    assert torch.equal(find_base_counts(expected[:, 0], width), torch.from_numpy(base))


@pytest.mark.parametrize("scales", [(2, 8, 32, 64), (8, 2), (3,)])
def test_views_partition_the_sites(scales):
    """Sites can be assigned to the views such that the features of either's genotypes are those of the view, exactly."""
    ts = simulate(seed=3, individuals=5, discrete=False, rate=3e-8)
    genotypes, positions = ts.genotype_matrix(), ts.sites_position  # (sites, haplotypes)
    windows, size, (a, b) = 100, 1000, (1, 6)
    shape = {"pairs": [(a, b)], "window_size": size, "sequence_length": windows * size, "scales": scales}
    whole = cxt.pair_features(genotypes, positions, **shape)
    torch.manual_seed(4)
    views = counts_of(draw_views(torch.from_numpy(np.log1p(whole)), scales))  # (2, 1, 2, S, W, n)
    assert np.array_equal(views.sum(0).numpy(), np.round(whole))

    narrowest = scales.index(min(scales))
    left = find_base_counts(views[0, 0, :, narrowest], min(scales)).numpy()  # (2, W, n), how many go to the first view
    assert (left >= 0).all()
    in_first = np.zeros(len(positions), bool)
    for site, position in enumerate(positions):
        cell = (int(genotypes[site, a] == genotypes[site, b]), int(position // size), int(genotypes[site].sum()))
        if left[cell]:
            in_first[site] = True
            left[cell] -= 1
    assert not left.any()
    assert 0.4 < in_first.mean() < 0.6
    for view, sites in zip(views, (in_first, ~in_first), strict=True):
        found = cxt.pair_features(genotypes[sites], positions[sites], **shape)
        assert np.array_equal(view.numpy(), np.round(found))


def test_views_of_a_poisson_process_are_two_independent_ones():
    """Of Poisson numbers of sites with mean 3, each view has Poisson numbers with mean 3/2, whatever the other one has."""
    rng = np.random.default_rng(1)
    base = torch.from_numpy(rng.poisson(3.0, (200, 2, 50, 20))).int()
    torch.manual_seed(2)
    first, second = counts_of(draw_views(torch.log1p(count_in_windows(base, [1]).float()), [1])).flatten(1).numpy()
    number = len(first)
    for view in (first, second):
        expected = [math.exp(-1.5) * 1.5**k / math.factorial(k) for k in range(8)]
        assert np.bincount(view)[:8] / number == pytest.approx(expected, abs=5 * 0.5 / math.sqrt(number))
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(number)
    for k in range(4):  # not only uncorrelated
        assert second[first == k].mean() == pytest.approx(1.5, abs=5 * math.sqrt(1.5 / (first == k).sum()))


def test_views_without_sites():
    x = torch.zeros(2, 2, 4, 12, 10)
    assert torch.equal(draw_views(x, SCALES), torch.zeros(2, *x.shape))


# The loss


def test_info_nce_against_a_hand_formula():
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn((2, 5, 3), generator=generator)

    def cosine(a, b):
        dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b))

    terms = []
    for i in range(5):
        together = cosine(first[i], second[i]) / 0.2
        terms.append(math.log(sum(math.exp(cosine(first[i], second[j]) / 0.2) for j in range(5))) - together)
        terms.append(math.log(sum(math.exp(cosine(first[j], second[i]) / 0.2) for j in range(5))) - together)
    value = compute_info_nce(first, second, temperature=0.2)
    assert float(value) == pytest.approx(sum(terms) / 10, rel=1e-5)
    assert float(compute_info_nce(7 * second, first, temperature=0.2)) == pytest.approx(float(value), rel=1e-5)
    same = torch.ones(5, 3)
    assert float(compute_info_nce(same, same, temperature=0.2)) == pytest.approx(math.log(5), rel=1e-5)
    assert float(compute_info_nce(torch.eye(5), torch.eye(5), temperature=0.01)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("span", [1, 5, 12, 16])
def test_loss_against_a_plain_loop(span):
    model = model_of()
    x, y = examples()
    objective = objective_of(model, span=span, temperature=0.3, weight=2, losses=["cross_entropy", "z_loss"])
    with torch.no_grad():
        torch.manual_seed(7)
        values = objective(model, x, y)
        torch.manual_seed(7)
        views = draw_views(x, SCALES)
        vectors = []
        for view in views:
            spans = []
            for example in view:
                states = model.backbone.source_states(example[None])[0]
                for begin in range(0, 12, span):
                    spans.append(objective.projection.weight @ states[begin : begin + span].mean(0))
            vectors.append(torch.stack(spans))
    assert vectors[0].shape == (3 * math.ceil(12 / span), 32)
    assert float(values[0]) == pytest.approx(float(compute_info_nce(*vectors, temperature=0.3)), rel=1e-4)
    marginal = build_objective(model, TrainingConfig(objective="marginal", losses=["cross_entropy", "z_loss"]))
    assert torch.equal(values[1:], marginal(model, x, y))  # in eval mode, there is no dropout
    assert objective.names == ["info_nce", "cross_entropy", "z_loss"]
    assert objective.weights(0.5) == [2, 1, 1]


def test_gradients():
    """InfoNCE trains the projection and all but head and tokens; the losses of times train the head as well."""
    model = model_of()
    x, y = examples()
    objective = objective_of(model)
    first, second = objective.embed_views(model, x)
    compute_info_nce(first, second, temperature=0.1).backward()
    assert objective.projection.weight.grad.abs().sum() > 0
    outside = {"backbone.token_embedding.weight", "backbone.head.weight"}
    assert {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()} == outside
    objective(model, x, y).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"backbone.token_embedding.weight"}


def test_gradient_against_finite_differences():
    first, second = torch.randn((2, 4, 3), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: compute_info_nce(f, second, temperature=0.5), (first,))


def test_views_are_given_no_rates():
    config = NETWORK.replace(reads_rates=True)
    model = model_of(config)
    with torch.no_grad():
        model.backbone.rate_embedding.weight.normal_()
    x, y = examples()
    objective = objective_of(model)
    values = []
    for rates in ([1e-8, 1e-8], [1e-8, 1e-7]):
        torch.manual_seed(1)
        values.append(objective(model, x, y, torch.tensor(rates).log().expand(3, 2)))
    assert torch.equal(values[0][0], values[1][0])
    assert not torch.equal(values[0][1], values[1][1])


def test_own_weights_come_from_the_seed():
    model = model_of()
    first, second = objective_of(model), objective_of(model)
    assert equal(first.state_dict(), second.state_dict())
    assert first.state_dict().keys() == {"projection.weight"}
    other = build_objective(model, TrainingConfig(objective="contrastive", seed=2), scales=SCALES)
    assert not torch.equal(first.projection.weight, other.projection.weight)


def test_compiled_loss():
    """A compiled step draws what a plain one does."""
    model = model_of()
    x, y = examples()
    objective = objective_of(model)
    values = []
    for compute in (objective, torch.compile(objective, backend="aot_eager", dynamic=False)):
        torch.manual_seed(5)
        values.append(compute(model, x, y))
    torch.testing.assert_close(*values)


def test_loss_of_a_batch(dataset):
    """Counts of a dataset, with and without noise, are those that views can be drawn from."""
    data = PairDataset(dataset, "train")
    model = build_model(NETWORK.replace(windows=20, samples=20, scales=2))
    training = TrainingConfig(objective="contrastive", contrastive={"weight": 3.0})
    loss = build_loss_function(model.eval(), training, scales=data.scales)
    batch = data.batch(range(6))
    torch.manual_seed(1)
    value = loss(*batch).item()
    objective = build_objective(model, training, scales=data.scales)
    torch.manual_seed(1)
    parts = objective(model, compute_model_input(batch.counts, None), batch.tokens).tolist()
    assert value == pytest.approx(3 * parts[0] + parts[1])


def test_cost():
    """Three passes over the sources, one of them with the head."""
    marginal, contrastive = (training_flops(NETWORK, objective=name) for name in ("marginal", "contrastive"))
    head = 3 * 2 * NETWORK.windows * NETWORK.width * NETWORK.vocabulary
    assert contrastive == pytest.approx(3 * marginal - 2 * head)
    training = TrainingConfig(objective="contrastive", batch_size=4, compile="none")
    network = NETWORK.replace(windows=20, window_size=500)
    assert bench_training(network, None, training, device="cpu", seconds=0.1)["items_per_second"] > 0


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "contrastiv"}, "unknown objective 'contrastiv'; did you mean 'contrastive'?"),
        ({"contrastive": "{weight: 0}"}, "contrastive.weight must be a positive number, got 0"),
        ({"contrastive": {"temperature": 0}}, "contrastive.temperature must be a positive number, got 0"),
        ({"contrastive": {"temperature": math.inf}}, "contrastive.temperature must be .*, got inf"),
        ({"contrastive": {"span": 0}}, "contrastive.span must be a positive integer, got 0"),
        ({"contrastive": {"temprature": 0.1}}, "contrastive.temprature: unknown key; did you mean 'temperature'?"),
        ({"contrastive": 0.1}, "contrastive must be a mapping, got 0.1"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(BadRequest, match=message):
        TrainingConfig(**settings)


def test_defaults_are_in_no_lineage():
    assert "contrastive" not in drop_later_defaults(TrainingConfig().model_dump())
    assert "contrastive" in drop_later_defaults(TrainingConfig(contrastive={"span": 4}).model_dump())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", 1], "compares the examples of a batch, but batch_size is 1; set it to 2 or more"),
        (["--loss-path", "full"], "loss_path full is for the objective autoregressive, not for contrastive"),
        (["--ema-decay", 0.9], "ema_decay cannot be used with the objective contrastive"),
        (["--losses", "[{name: emd, weight: 0}]"], "all weights in losses are 0"),
        (["--dataset-path", "MASKED", "--model", "w200_wmissing"], "cannot train on a dataset with a mask"),
        (["--contrastive", "{weight: 0}"], "contrastive.weight must be a positive number"),
    ],
)
def test_refused_on_the_command_line(flags, message, dataset, masked_dataset, monkeypatch):
    flags = [masked_dataset if flag == "MASKED" else flag for flag in flags]
    with pytest.raises(BadRequest, match=message):
        train(monkeypatch, *SMALL, "--dataset-path", dataset, "--objective", "contrastive", *flags)


def test_note_on_settings_without_effect(dataset, tmp_path, monkeypatch, caplog):
    arguments = [*SMALL, *FINE, "--layers", 1, "--dataset-path", dataset, "--max-steps", 1]
    train(monkeypatch, *arguments, "--contrastive", "{span: 2}", "--run-dir", tmp_path / "one")
    assert "contrastive has no effect with the objective autoregressive" in caplog.text


# Checkpoints


def test_checkpoint(dataset, dataset_n10, tmp_path, monkeypatch):
    """It has the tensors of any other, is read in one pass, and an adapter can be trained from it, also with the objective."""
    settings = ["--layers", 1, "--objective", "contrastive", "--contrastive", "{span: 4}", "--decode-items", 4]
    arguments = [*SMALL, *FINE, *settings]
    train(monkeypatch, *arguments, "--dataset-path", dataset, "--run-dir", tmp_path / "run", "--out", tmp_path / "own.ckpt")
    stored = read_checkpoint(tmp_path / "own.ckpt")
    assert stored.state_dict.keys() == build_model(stored.model).state_dict().keys()
    assert stored.record["training"]["contrastive"] == {"weight": 0.1, "temperature": 0.1, "span": 4}
    state = torch.load(RunDirectory(tmp_path / "run").last, weights_only=True)
    assert {key for key in state["state_dict"] if not key.startswith("model.")} == {"objective.projection.weight"}
    log = read_log(tmp_path / "run" / "training_log.csv")
    row = {key: float(log[-1][key]) for key in ("val_loss", "val_loss/info_nce", "val_loss/cross_entropy", "val_mse")}
    assert row["val_loss"] == pytest.approx(0.1 * row["val_loss/info_nce"] + row["val_loss/cross_entropy"], rel=1e-5)

    model = cxt.load_model(tmp_path / "own.ckpt")
    genotypes = np.random.default_rng(1).integers(0, 2, (30, 20), dtype=np.int8)
    region = {"pairs": [(0, 1)], "sequence_length": 20_000}
    posterior = cxt.predict(model, genotypes, np.linspace(1, 19_999, 30), **region)
    assert np.isfinite(posterior.log_tmrca).all()
    with pytest.raises(BadRequest, match="objective contrastive, so that reading must be marginal"):
        cxt.predict(model, genotypes, np.linspace(1, 19_999, 30), reading="sampled", **region)

    adapter = ["--adapter", "--checkpoint", tmp_path / "own.ckpt", "--adapter-bottleneck", 4, "--max-steps", 2]
    data = ["--dataset-path", dataset_n10, "--run-dir", tmp_path / "adapter", "--out", tmp_path / "adapter.ckpt"]
    train(monkeypatch, *arguments, *adapter, *data)
    assert cxt.load_model(tmp_path / "adapter.ckpt").objective == "contrastive"


@pytest.mark.slow
def test_views_that_belong_together_are_found(tmp_path):
    """After some steps, held-out views are found much more often than by chance, also among the spans of their example."""
    entry = constant_scenario(
        simulations=100, batch=100, sequence_length=40_000, mutation_rate=6e-8, recombination_rate=1e-8, individuals=5
    )
    data = build_dataset(tmp_path, entry=entry, sequence_length=40_000, samples=10, pairs=10)
    contrastive = {"span": 8, "weight": 1.0}
    cxt.train_model(
        model="broad", layers=2, heads=2, width=32, dropout=0.0, batch_size=16, grad_accum=1, epochs=6, lr=3e-3, min_lr=3e-4,
        decay_steps=0, threads=1, devices=0, dataset_path=data, objective="contrastive", contrastive=contrastive,
        decode_items=0, run_dir=tmp_path / "run",
    )  # fmt: skip
    model = cxt.load_model(tmp_path / "run")
    objective = objective_of(model, scales=(2, 4), **contrastive)
    state = torch.load(RunDirectory(tmp_path / "run").last, weights_only=True)["state_dict"]
    objective.load_state_dict({key.removeprefix("objective."): state[key] for key in state if key.startswith("objective.")})
    test_set = PairDataset(data, "test")
    chosen = [10 * simulation for simulation in range(10)]  # one pair of each simulation
    torch.manual_seed(1)
    with torch.no_grad():
        x = compute_model_input(test_set.batch(chosen).counts, None)
        first, second = torch.nn.functional.normalize(objective.embed_views(model, x), dim=-1)
    spans, nearest = 5, (first @ second.T).argmax(1)
    found = float((nearest == torch.arange(10 * spans)).float().mean())
    within = torch.einsum("bsd,btd->bst", first.unflatten(0, (10, spans)), second.unflatten(0, (10, spans))).argmax(-1)
    found_within = float((within == torch.arange(spans)).float().mean())
    print(f"found {found:.0%} among 50, {found_within:.0%} among 5")
    assert found > 5 / 50
    assert found_within > 2 / 5
