"""The objective `masked`: what it hides, its loss, and that its checkpoints are starting points but are not read."""

import math

import numpy as np
import pytest
import torch
from helpers.network import SMALL as NETWORK
from helpers.network import inputs, model_of
from helpers.simulations import build_dataset, constant_scenario
from helpers.training import FINE, SMALL, equal, train, weights

import cxt
from cxt.benchmark.speed import bench_training
from cxt.checkpoints.file import read_checkpoint
from cxt.checkpoints.run_directory import RunDirectory
from cxt.checkpoints.training_log import read_log
from cxt.config.learning import Masking
from cxt.config.training import TrainingConfig, drop_later_defaults
from cxt.data.examples import compute_model_input
from cxt.data.pair_dataset import PairDataset
from cxt.decoding.decode import decode
from cxt.errors import BadRequest
from cxt.model.adapter import build_model
from cxt.trainer.masked import Hidden, choose_windows
from cxt.trainer.objectives import build_objective

SCALES = (2, 8, 32, 64)


def objective_of(model, *, scales=SCALES, **masked):
    return build_objective(model, TrainingConfig(objective="masked", masked=masked), scales=scales)


def chosen(seed=1, *, examples, windows, **masked):
    torch.manual_seed(seed)
    return choose_windows(Masking(**masked), examples=examples, windows=windows, device=torch.device("cpu"))


# What is hidden


def test_shares_of_many_draws():
    hidden = chosen(examples=10_000, windows=500)
    share = hidden.chosen.double().mean()
    assert float(share) == pytest.approx(0.15, abs=0.01)
    parts = [float((part & hidden.chosen).sum() / hidden.chosen.sum()) for part in (hidden.masked, hidden.replaced)]
    assert parts == pytest.approx([0.8, 0.1], abs=0.01)
    assert not (hidden.masked & hidden.replaced).any()
    assert not ((hidden.masked | hidden.replaced) & ~hidden.chosen).any()
    assert hidden.chosen.double().mean(0).tolist() == pytest.approx([0.15] * 500, abs=0.02)  # no window is preferred
    hidden = chosen(examples=10_000, windows=500, all=True, share=0.3)
    assert float(hidden.chosen.double().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(hidden.chosen, hidden.masked)
    assert not hidden.replaced.any()


@pytest.mark.parametrize(("windows", "span"), [(100, 16), (100, 1), (7, 16), (1, 16), (16, 16), (2, 1)])
def test_whole_spans_are_chosen(windows, span):
    """Runs of one kind are whole spans long, except at the ends, and no example is without any."""
    hidden = chosen(examples=300, windows=windows, span=span, share=0.2)
    length = min(span, windows)
    kinds = (hidden.chosen.int() + hidden.masked.int() + 2 * hidden.replaced.int()).tolist()
    for row in kinds:
        assert any(row)
        changes = [w for w in range(1, windows) if row[w] != row[w - 1]]
        assert len({change % length for change in changes}) <= 1
    assert chosen(examples=300, windows=windows, span=span, share=1e-9).chosen.any(1).all()


def test_overlaps_against_a_plain_loop():
    windows, scales = 90, (8, 2, 64, 5)
    model = build_model(NETWORK.replace(windows=windows))
    objective = objective_of(model, scales=scales)
    marked = torch.rand((4, windows), generator=torch.Generator().manual_seed(1)) < 0.03
    found = objective.find_overlaps(marked)
    for example in range(4):
        predicted = {window + i for window in range(windows) if marked[example, window] for i in range(min(scales))}
        for window in range(windows):
            for scale, width in enumerate(scales):
                expected = not predicted.isdisjoint(range(window, window + width))
                assert bool(found[example, window, scale]) == expected


def counts_at_scales(counts, scales):
    """log1p counts (1, 2, S, W, n) in overlapping windows, from those of base windows (2, W, n)."""
    windows = counts.shape[1]
    sums = [[counts[:, w : w + width].sum(1) for w in range(windows)] for width in scales]
    return torch.from_numpy(np.log1p(np.array(sums, dtype=np.float32).transpose(2, 0, 1, 3)))[None]


def test_nothing_that_is_hidden_is_seen():
    """Other counts in the base windows that are to be predicted change nothing of the network's input, at any scale."""
    rng = np.random.default_rng(1)
    model = model_of(NETWORK.replace(windows=200))
    objective = objective_of(model, all=True)
    counts = rng.integers(0, 5, (2, 200, NETWORK.samples))
    hidden = chosen(examples=1, windows=200)
    hidden = Hidden(hidden.chosen, hidden.chosen, torch.zeros_like(hidden.chosen))
    predicted = sorted({w + i for w in hidden.chosen[0].nonzero().flatten().tolist() for i in range(2)} - {200})
    other = counts.copy()
    other[:, predicted] = rng.integers(0, 5, (2, len(predicted), NETWORK.samples))
    seen = [
        objective.hide(model.backbone.embed_sources(counts_at_scales(each, SCALES), None), hidden) for each in (counts, other)
    ]
    assert torch.equal(*seen)
    assert 0.02 < float((seen[0] != objective.mask_vector).float().mean()) < 0.95
    visible = counts.copy()
    visible[:, min(set(range(200)) - set(predicted))] += 1
    again = objective.hide(model.backbone.embed_sources(counts_at_scales(visible, SCALES), None), hidden)
    assert not torch.equal(seen[0], again)


def test_replaced_and_unchanged_windows():
    model = model_of(NETWORK.replace(windows=60))
    objective = objective_of(model, scales=(1, 2, 3, 4))
    source = torch.randn((5, 60, 32), generator=torch.Generator().manual_seed(2))
    hidden = chosen(examples=5, windows=60, span=2, share=0.9)
    seen = objective.hide(source, hidden)
    unchanged = hidden.chosen & ~hidden.masked & ~hidden.replaced
    assert hidden.replaced.any()
    assert unchanged.any()
    for example in range(5):
        for window in range(60):
            vector = seen[example, window]
            if hidden.replaced[example, window]:
                same = [other for other in range(60) if torch.equal(vector, source[example, other])]
                assert len(same) == 1
                assert same != [window]
            elif hidden.masked[example, window]:
                assert torch.equal(vector, objective.mask_vector)
            else:  # its own, or hidden, at each scale
                for part in range(4):
                    at = slice(8 * part, 8 * part + 8)
                    assert torch.equal(vector[at], source[example, window, at]) or torch.equal(
                        vector[at], objective.mask_vector[at]
                    )
    narrowest = seen[unchanged][:, :8]
    assert torch.equal(narrowest, source[unchanged][:, :8])  # windows of one base window share nothing with their neighbours


# The loss


def test_loss_against_a_plain_loop():
    """It is that of the hidden windows alone, at the narrowest scale, without bin 0."""
    model = model_of()
    x, y = inputs()
    objective = objective_of(model, scales=(8, 2, 32, 64), share=0.4, span=2)
    with torch.no_grad():
        objective.head.weight.mul_(20)
        torch.manual_seed(7)
        value = objective(model, x, y)
        torch.manual_seed(7)
        hidden = choose_windows(objective.masking, examples=3, windows=12, device=torch.device("cpu"))
        states = model.backbone.encode(objective.hide(model.backbone.source_embedding(x), hidden))
        outputs = objective.head(states)
    terms = []
    for example in range(3):
        for window in range(12):
            if hidden.chosen[example, window]:
                for channel in range(2):
                    for frequency in range(1, 10):
                        log_mean = float(outputs[example, window, 9 * channel + frequency - 1])
                        count = round(math.expm1(float(x[example, channel, 1, window, frequency])))
                        terms.append(math.exp(log_mean) - count * log_mean)
    assert 0 < len(terms) < 3 * 12 * 18
    assert float(value) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_gradients_come_from_hidden_windows_only():
    model = model_of()
    x, y = inputs()
    objective = objective_of(model)
    kept = []
    objective.head.register_forward_hook(lambda module, given, result: kept.append(result.retain_grad() or result))
    torch.manual_seed(3)
    objective(model, x, y).sum().backward()
    torch.manual_seed(3)
    hidden = choose_windows(objective.masking, examples=3, windows=12, device=torch.device("cpu"))
    assert torch.equal((kept[0].grad != 0).any(-1), hidden.chosen)
    assert all(p.grad is not None for p in objective.parameters())
    untrained = {name for name, p in model.named_parameters() if p.grad is None}
    assert untrained == {"backbone.token_embedding.weight", "backbone.head.weight"}


def test_own_weights_come_from_the_seed():
    model = model_of()
    first, second = objective_of(model), objective_of(model)
    assert equal(first.state_dict(), second.state_dict())
    assert first.state_dict().keys() == {"mask_vector", "head.weight", "head.bias"}
    other = build_objective(model, TrainingConfig(objective="masked", seed=2), scales=SCALES)
    assert not torch.equal(first.mask_vector, other.mask_vector)


def test_compiled_loss():
    """A compiled step draws what a plain one does."""
    model = model_of()
    x, y = inputs()
    objective = objective_of(model)
    values = []
    for compute in (objective, torch.compile(objective, backend="aot_eager", dynamic=False)):
        torch.manual_seed(5)
        values.append(compute(model, x, y))
    torch.testing.assert_close(*values)


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "maskd"}, "unknown objective 'maskd'; did you mean 'masked'?"),
        ({"masked": "{share: 0}"}, r"masked.share must be a number in \(0, 1\], got 0"),
        ({"masked": {"share": 1.5}}, r"masked.share must be a number in \(0, 1\], got 1.5"),
        ({"masked": {"span": 0}}, "masked.span must be a positive integer, got 0"),
        ({"masked": {"all": "yes"}}, "masked.all must be true or false, got 'yes'"),
        ({"masked": {"shares": 0.1}}, "masked.shares: unknown key; did you mean 'share'?"),
        ({"masked": 0.15}, "masked must be a mapping, got 0.15"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(BadRequest, match=message):
        TrainingConfig(**settings)


def test_defaults_are_in_no_lineage():
    assert "masked" not in drop_later_defaults(TrainingConfig().model_dump())
    assert "masked" in drop_later_defaults(TrainingConfig(masked={"share": 0.2}).model_dump())


# Checkpoints


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A directory with the run of a masked network, and its checkpoint."""
    directory = tmp_path_factory.mktemp("masked")
    cxt.train_model(
        model="broad", layers=1, heads=2, width=16, batch_size=8, grad_accum=2, epochs=2, threads=1, devices=0, seed=3,
        dataset_path=dataset, objective="masked", masked={"span": 4}, run_dir=directory / "run", out=directory / "masked.ckpt",
    )  # fmt: skip
    return directory


def test_published_checkpoint_has_the_tensors_of_any_other(trained):
    stored = read_checkpoint(trained / "masked.ckpt")
    assert stored.state_dict.keys() == build_model(stored.model).state_dict().keys()
    assert stored.record["training"]["objective"] == "masked"
    assert stored.record["training"]["masked"] == {"share": 0.15, "span": 4, "all": False}
    state = torch.load(RunDirectory(trained / "run").last, weights_only=True)
    own = {key for key in state["state_dict"] if not key.startswith("model.")}
    assert own == {"objective.mask_vector", "objective.head.weight", "objective.head.bias"}
    assert len(state["optimizer_states"][0]["state"]) > 0
    assert equal(read_checkpoint(RunDirectory(trained / "run").last).state_dict, stored.state_dict)
    log = read_log(trained / "run" / "training_log.csv")
    assert log[-1]["val_loss"]
    assert not log[-1].get("val_mse")  # nothing is decoded


def test_supervised_training_starts_from_it(trained, dataset, tmp_path, monkeypatch):
    arguments = [*SMALL, *FINE, "--layers", 1, "--dataset-path", dataset, "--checkpoint", trained / "masked.ckpt"]
    train(monkeypatch, *arguments, "--objective", "marginal", "--max-steps", 1, "--warmup-steps", 0, "--lr", "1e-9", "--min-lr",
          "1e-9", "--out", tmp_path / "marginal.ckpt", "--run-dir", tmp_path / "run")  # fmt: skip
    before, after = weights(trained / "masked.ckpt"), weights(tmp_path / "marginal.ckpt")
    assert all(torch.allclose(after[key], value, atol=1e-6) for key, value in before.items())
    assert cxt.load_model(tmp_path / "marginal.ckpt").objective == "marginal"


def test_it_cannot_be_read(trained):
    model = cxt.load_model(trained / "masked.ckpt")
    x, _ = inputs(model.config)
    message = "trained with the objective masked, which predicts no times, so that it cannot be read"
    with pytest.raises(BadRequest, match=message):
        model.generate(x, window_size=1000)
    with pytest.raises(BadRequest, match=message):
        cxt.predict(model, np.zeros((20, 0), dtype=np.int8), np.zeros(0), pairs=[(0, 1)], sequence_length=20_000)
    for reading in (None, "marginal", "sampled"):
        with pytest.raises(BadRequest, match=message):
            decode(model, x, None, grid=cxt.Grid(), replicates=1, batch_size=1, seed=1, reading=reading)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss-path", "full"], "loss_path full is for the objective autoregressive, not for masked"),
        (["--adapter", "--checkpoint", "PARENT"], "the objective masked cannot train an adapter"),
        (["--masked", "{share: 2}"], "masked.share must be a number in"),
    ],
)
def test_refused_on_the_command_line(flags, message, trained, dataset, dataset_n10, monkeypatch):
    data = dataset_n10 if "--adapter" in flags else dataset
    flags = [trained / "masked.ckpt" if flag == "PARENT" else flag for flag in flags]
    with pytest.raises(BadRequest, match=message):
        train(monkeypatch, *SMALL, "--layers", 1, "--dataset-path", data, "--objective", "masked", *flags)


def test_new_adapter_on_its_untrained_head(trained, dataset_n10, monkeypatch):
    flags = ["--layers", 1, "--dataset-path", dataset_n10, "--adapter", "--checkpoint", trained / "masked.ckpt"]
    with pytest.raises(BadRequest, match="does not train the head, and this adapter would leave it frozen"):
        train(monkeypatch, *SMALL, *flags)


def test_notes_on_settings_without_effect(dataset, tmp_path, monkeypatch, caplog):
    arguments = [*SMALL, *FINE, "--layers", 1, "--dataset-path", dataset, "--max-steps", 1]
    train(monkeypatch, *arguments, "--masked", "{share: 0.2}", "--run-dir", tmp_path / "one")
    assert "masked has no effect with the objective autoregressive" in caplog.text
    arguments += ["--objective", "masked", "--losses", "emd", "--decode-items", 4, "--run-dir", tmp_path / "two"]
    train(monkeypatch, *arguments)
    assert "losses has no effect with the objective masked" in caplog.text
    assert "decode_items has no effect with the objective masked" in caplog.text


def test_its_cost_can_be_measured():
    """As `cxt plan --calibrate` does for the models of a configuration."""
    training = TrainingConfig(objective="masked", batch_size=4, compile="none")
    network = NETWORK.replace(windows=20, window_size=500, mask_singletons=True)
    assert bench_training(network, None, training, device="cpu", seconds=0.1)["items_per_second"] > 0


@pytest.mark.slow
def test_hidden_counts_are_learned(tmp_path):
    """Where neighbouring windows have the same genealogy, hidden counts are predicted better than by means over examples."""
    entry = constant_scenario(
        simulations=60, batch=60, sequence_length=40_000, mutation_rate=3e-8, recombination_rate=1e-9, individuals=5
    )
    data = build_dataset(tmp_path, entry=entry, sequence_length=40_000, samples=10, pairs=10)
    masked = {"span": 4, "all": True}
    cxt.train_model(
        model="broad", layers=2, heads=2, width=32, dropout=0.0, batch_size=16, grad_accum=1, epochs=10, lr=3e-3, min_lr=3e-4,
        decay_steps=0, threads=1, devices=0, dataset_path=data, objective="masked", masked=masked, run_dir=tmp_path / "run",
    )  # fmt: skip
    model = cxt.load_model(tmp_path / "run")
    objective = objective_of(model, scales=(2, 4), **masked)
    state = torch.load(RunDirectory(tmp_path / "run").last, weights_only=True)["state_dict"]
    objective.load_state_dict({key.removeprefix("objective."): state[key] for key in state if key.startswith("objective.")})
    train_set, test_set = (PairDataset(data, split) for split in ("train", "test"))
    mean = train_set.batch(range(len(train_set))).counts[:, :, 0, :, 1:].double().mean((0, 2)).clamp(min=1e-6)[:, None]
    batch = test_set.batch(range(len(test_set)))
    by_mean = (mean - batch.counts[:, :, 0, :, 1:].double() * mean.log()).mean((1, 3))  # (B, W)
    for seed in range(8):
        torch.manual_seed(seed)
        with torch.no_grad():
            loss = float(objective(model, compute_model_input(batch.counts, None), batch.tokens))
        hidden = chosen(seed, examples=len(test_set), windows=40, **masked).chosen
        assert loss < 0.98 * float(by_mean[hidden].mean())
