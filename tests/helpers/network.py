"""Small networks, their input, and the plain definition of what they compute."""

import torch
import torch.nn.functional as F

from cxt.checkpoints.file import write_checkpoint
from cxt.checkpoints.record import build_checkpoint_record
from cxt.config.network import ModelConfig
from cxt.model.adapter import build_model
from helpers.training import objective_record

SMALL = ModelConfig(layers=3, heads=2, width=32, windows=12, samples=10, scales=4, dropout=0.1)


def inputs(config=SMALL, samples=None, items=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 20, (items, 2, config.scales, config.windows, samples or config.samples), generator=generator)
    x = torch.log1p(x)
    y = torch.randint(2, config.vocabulary, (items, config.windows + 1), generator=generator)
    y[:, 0] = 1
    return x, y


def model_of(config=SMALL, adapter=None, scale=8.0):
    """A model in eval mode whose weights are large enough for attention to matter."""
    torch.manual_seed(1)
    model = build_model(config, adapter)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model.eval()


def write_random_checkpoint(path, config: ModelConfig, *, scales, objective="marginal", ranges=None):
    """A checkpoint with random weights, such that its estimates depend on its input and on the position; returns *path*."""
    torch.manual_seed(3)
    model = build_model(config, None)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    dataset = {"scales": list(scales), "missing": not config.mask_singletons, "ranges": ranges}
    record = build_checkpoint_record(config, None, name="x", dataset=dataset, **objective_record(objective))
    write_checkpoint(path, model.state_dict(), record)
    return path


def dense_logits(model, x, y):
    """The definition: one sequence, one boolean mask, attention written out, the head everywhere."""
    backbone, config = model.backbone, model.config
    windows = config.windows
    x = x.clone()
    if config.mask_singletons:
        x[..., 0] = 0
    embedding = backbone.source_embedding
    if config.separate_embeddings:
        h = embed_separately(embedding, x, config)
    else:
        h = F.linear(x, embedding.inner.weight, embedding.inner.bias)
        h = F.linear(F.gelu(h), embedding.outer.weight, embedding.outer.bias)
    h = 0.7 * h[:, 0] + 0.3 * h[:, 1]  # (B, S, W, D / S)
    source = torch.cat([h[:, s] for s in range(config.scales)], dim=-1)
    h = torch.cat([source, backbone.token_embedding.weight[y]], dim=1)  # (B, 2W + 1, D)
    length = h.shape[1]
    allowed = torch.tril(torch.ones(length, length, dtype=torch.bool))
    prefix = windows + config.start_token_in_prefix
    allowed[:prefix, :prefix] = True
    head_width = config.width // config.heads
    for block in backbone.blocks:
        q, k, v = block.attention.qkv(block.norm_attention(h)).split(config.width, dim=-1)
        out = []
        for head in range(config.heads):
            part = slice(head * head_width, (head + 1) * head_width)
            qh, kh = slow_rotate(q[..., part]), slow_rotate(k[..., part])
            scores = (qh @ kh.transpose(1, 2) / head_width**0.5).masked_fill(~allowed, -torch.inf)
            out.append(scores.softmax(-1) @ v[..., part])
        h = h + block.attention.out(torch.cat(out, dim=-1))
        h = h + block.mlp.down(F.gelu(block.mlp.up(block.norm_mlp(h))))
    return backbone.head(backbone.norm(h))[:, windows:-1]


def embed_separately(embedding, x, config):
    """(B, 2, S, W, n) -> (B, 2, S, W, D / S), by the rows of the weights that belong to each channel and scale."""
    hidden = config.width // config.scales
    h = x.new_empty((*x.shape[:-1], hidden))
    for channel in range(2):
        for scale in range(config.scales):
            rows = slice((channel * config.scales + scale) * hidden, (channel * config.scales + scale + 1) * hidden)
            inner = F.linear(x[:, channel, scale], embedding.inner.weight[rows], embedding.inner.bias[rows])
            h[:, channel, scale] = F.linear(F.gelu(inner), embedding.outer.weight[rows], embedding.outer.bias[rows])
    return h


def slow_rotate(x):
    result = x.clone()
    for position in range(x.shape[1]):
        for i in range(x.shape[2] // 2):
            angle = torch.tensor(position * 10_000.0 ** (-2 * i / x.shape[2]))
            a, b = x[:, position, 2 * i], x[:, position, 2 * i + 1]
            result[:, position, 2 * i] = a * angle.cos() - b * angle.sin()
            result[:, position, 2 * i + 1] = a * angle.sin() + b * angle.cos()
    return result
