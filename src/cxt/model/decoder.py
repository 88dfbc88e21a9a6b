"""Autoregressive decoding with a key-value cache.

The prefix of an example is computed once and shared by its replicates. Each step then passes one token per replicate through
the network. Everything that changes between steps is on the device, so that a GPU can record a step once as a CUDA graph and
replay it; launching its hundreds of small kernels one by one would take most of the time.

Shapes: B examples, R replicates, W windows, P = W positions of the prefix, H heads, D width, hd = D / H.
"""

import contextlib
import functools
import math
import numbers

import torch
import torch.nn.functional as F

from cxt.config.network import SPECIAL_TOKENS, START_TOKEN
from cxt.errors import BadRequest
from cxt.model.inputs import check_tokens
from cxt.model.sampling import draw_uniforms, sample_bins, top_k_filter
from cxt.random_seeds import check_seed

GRAPH_SLOTS = 64
"""Number of consecutive windows that share one CUDA graph, which reads as many slots of the cache as the last of them needs."""


@functools.cache
def get_recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which graphs of a GPU are recorded; each new stream would keep a workspace of some MB."""
    return torch.cuda.Stream(device)


def _is_whole(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


class KeyValueCache:
    """Keys and values of one block: for the prefix once per example, for decoded tokens once per replicate."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, replicates: int):
        self.prefix_k, self.prefix_v = k.contiguous(), v.contiguous()  # (B, H, P, hd)
        batch, heads, steps, width = k.shape
        self.k = k.new_zeros((batch, heads, replicates, steps, width))
        self.v = v.new_zeros((batch, heads, replicates, steps, width))

    def attend(self, q, k, v, step: torch.Tensor, slots: int, hidden: torch.Tensor | None) -> torch.Tensor:
        """Add one token per replicate at *step* (1,), and attend from it to the prefix and to the first *slots* tokens.

        q, k, v and the result are (B, H, R, hd); *hidden* (slots,) is True for tokens that are not decoded yet.
        """
        self.k.index_copy_(3, step, k.unsqueeze(3))
        self.v.index_copy_(3, step, v.unsqueeze(3))
        past_k, past_v = self.k[:, :, :, :slots], self.v[:, :, :, :slots]  # (B, H, R, t, hd)
        to_prefix = (q @ self.prefix_k.transpose(-1, -2)).float()  # (B, H, R, P)
        to_past = (past_k @ q.unsqueeze(-1)).squeeze(-1).float()  # (B, H, R, t)
        if hidden is not None:
            to_past = to_past.masked_fill(hidden, -torch.inf)
        weights = (torch.cat([to_prefix, to_past], dim=-1) / math.sqrt(q.shape[-1])).softmax(-1).type_as(v)
        prefix = to_prefix.shape[-1]
        return weights[..., :prefix] @ self.prefix_v + (weights[..., None, prefix:] @ past_v).squeeze(-2)


class Decoder:
    """Decodes batches of a fixed number of examples; special tokens are never sampled.

    The random numbers of an example depend only on *seed* and its id, so that its result does not depend on the other examples
    of the batch or on the device, except for rounding. Keys and values are stored in the precision of the network's arithmetic.
    The model's weights must not change while the decoder is in use.

    Parameters
    ----------
    model : CoalescenceModel
        In eval mode.
    replicates : int
        Decoded sequences R per example.
    temperature : float
        Divides the logits before sampling.
    top_k : int, optional
        Sample only from this many most probable bins; all by default.
    seed : int
        Seed of the random numbers, 0 to 2^63 - 1.
    slots : int, optional
        Number of slots by which a step's view of the cache grows; by default 1 on a CPU, and 64 if graphs are recorded.

    Raises
    ------
    BadRequest
        If replicates, top_k or slots are not positive whole numbers, temperature is not a positive finite number, or seed is
        out of range.
    """

    def __init__(self, model, *, replicates: int = 1, temperature: float = 1.0, top_k=None, seed: int = 0, slots=None):
        whole = {"replicates": replicates, "top_k": top_k, "slots": slots}
        for name, value in {**whole, "seed": seed}.items():
            if (value is not None or name in ("replicates", "seed")) and not _is_whole(value):
                raise BadRequest(f"{name} must be a whole number, got {value!r}")
        if not (isinstance(temperature, numbers.Real) and temperature < math.inf):
            raise BadRequest(f"temperature must be a finite number, got {temperature!r}")
        for name, value in {**whole, "temperature": temperature}.items():
            if value is not None and not value > 0:
                raise BadRequest(f"{name} must be positive, got {value}")
        self.model, self.backbone = model, model.backbone
        self.replicates, self.temperature, self.top_k, self.seed = replicates, temperature, top_k, check_seed(seed)
        self.on_gpu = self.backbone.head.weight.is_cuda
        self.slots = slots or (GRAPH_SLOTS if self.on_gpu else 1)
        self._shape = None

    @torch.no_grad()
    def decode(
        self,
        x: torch.Tensor,
        *,
        rates: torch.Tensor | None = None,
        example_ids=None,
        tokens: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode one batch; the next call overwrites the returned tensors.

        Parameters
        ----------
        x : log1p counts (B, 2, S, W, n)
        rates : ln rates (B, 2), NaN where unknown, for a network that reads rates; by default none is known
        example_ids : (B,) whole numbers that identify the examples; 0, 1, … by default
        tokens : (B, R, W + 1); if given, nothing is sampled and the network is fed these (for tests and scoring)
        start : (B, R) int64 tokens to begin with, for a network that carries bins; the start token by default

        Returns
        -------
        tokens : (B, R, W) int64, bin + 2
        probabilities : (B, R, W, bins) float32, the predictive distribution of each window before *top_k*
        """
        kind = x.device.type
        # Without autocast's cache of weights: a graph must not refer to tensors of another one.
        precision = torch.autocast(
            kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        )
        # Streams and graphs belong to torch's current GPU, which may not be the model's.
        with torch.cuda.device(x.device) if self.on_gpu else contextlib.nullcontext(), precision:
            self._start(x, rates, self._check_ids(example_ids, len(x)), self._check_fed_tokens(tokens, len(x), x.shape[3]))
            if start is not None:
                self.current.copy_(start)
            for step in range(self.uniform.shape[-1]):
                # As many slots as are needed, rounded up.
                slots = min(self.uniform.shape[-1], (step // self.slots + 1) * self.slots)
                if self.on_gpu:
                    self._graph(slots).replay()
                else:
                    self._advance(slots)
        return self.chosen, self.probabilities

    def _check_ids(self, example_ids, count: int) -> list[int]:
        """The ids of *count* examples as a list; BadRequest unless they are *count* 64-bit integers."""
        ids = list(range(count) if example_ids is None else getattr(example_ids, "tolist", lambda: example_ids)())
        if len(ids) != count or not all(_is_whole(number) and -(2**63) <= number < 2**63 for number in ids):
            raise BadRequest(f"example_ids must be {count} whole numbers, one for each example of X")
        return ids

    def _check_fed_tokens(self, tokens: torch.Tensor | None, count: int, windows: int) -> torch.Tensor | None:
        """Tokens to feed, moved to the model's device; BadRequest if they are not tokens of *count* examples."""
        if tokens is None:
            return None
        check_tokens(tokens, examples=count, windows=windows, replicates=self.replicates)
        if tokens.is_floating_point() or tokens.min() < 0 or tokens.max() >= self.model.config.vocabulary:
            raise BadRequest(f"tokens must be whole numbers from 0 to {self.model.config.vocabulary - 1}")
        return tokens.to(self.backbone.head.weight.device)

    def _start(self, x: torch.Tensor, rates: torch.Tensor | None, example_ids: list[int], tokens: torch.Tensor | None) -> None:
        """Compute the prefix and reset to the first window, reusing memory if the shape is the same as before."""
        batch, windows, device = x.shape[0], x.shape[3], x.device
        uniform = torch.from_numpy(draw_uniforms(self.seed, example_ids, replicates=self.replicates, windows=windows))
        caches = self._prefill(self.model.adapt_input(x), rates)
        shape = (batch, windows, tokens is None)
        if shape == self._shape:
            for cache, (new_keys, new_values) in zip(self.caches, caches, strict=True):
                cache.prefix_k.copy_(new_keys)
                cache.prefix_v.copy_(new_values)
            self.uniform.copy_(uniform)
            if tokens is not None:
                self.tokens.copy_(tokens)
            self.current.fill_(START_TOKEN)
            self.step.zero_()
            return
        self._shape = shape
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.on_gpu else None
        self.caches = [KeyValueCache(k, v, self.replicates) for k, v in caches]
        self.uniform = uniform.to(device)  # (B, R, W)
        self.tokens = None if tokens is None else tokens.clone()
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.current = torch.full((batch, self.replicates), START_TOKEN, device=device)
        self.chosen = torch.zeros((batch, self.replicates, windows), dtype=torch.int64, device=device)
        # Lightning's bf16-true changes torch's default type.
        self.probabilities = torch.zeros(
            (batch, self.replicates, windows, self.model.config.bins), dtype=torch.float32, device=device
        )

    def _prefill(self, x: torch.Tensor, rates: torch.Tensor | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the prefix in each block, (B, H, P, hd)."""
        h = self.backbone.embed_sources(x, rates)  # (B, W, D)
        table = self.backbone.rotary[:, : h.shape[1]]
        result = []
        for block in self.backbone.blocks:
            q, k, v = block.attention.project(block.norm_attention(h), table)
            result.append((k, v))
            if block is not self.backbone.blocks[-1]:
                h = h + block.attention.merge(F.scaled_dot_product_attention(q, k, v))
                h = h + block.mlp(block.norm_mlp(h))
        return result

    def _logits(self, slots: int) -> torch.Tensor:
        """Logits of the next window, (B, R, bins) float32, without special tokens."""
        backbone = self.backbone
        h = backbone.token_embedding(self.current)  # (B, R, D)
        position = backbone.rotary.index_select(1, self.step + self.uniform.shape[-1])
        hidden = None if self.slots == 1 else torch.arange(slots, device=h.device) > self.step
        for block, cache in zip(backbone.blocks, self.caches, strict=True):
            q, k, v = block.attention.project(block.norm_attention(h), position)  # (B, H, R, hd), same position
            h = h + block.attention.merge(cache.attend(q, k, v, self.step, slots, hidden))
            h = h + block.mlp(block.norm_mlp(h))
        return backbone.head(backbone.norm(h)).float()[..., SPECIAL_TOKENS:]

    def _advance(self, slots: int) -> None:
        """Decode one window with the first *slots* slots of the caches; modifies tensors only in place."""
        logits = self._logits(slots) / self.temperature
        probabilities = logits.softmax(-1)
        self.probabilities.index_copy_(2, self.step, probabilities.unsqueeze(2))
        if self.tokens is not None:
            token = self.tokens.index_select(2, self.step + 1).squeeze(2)
        else:
            if self.top_k is not None:
                probabilities = top_k_filter(logits, self.top_k).softmax(-1)
            token = sample_bins(probabilities, self.uniform.index_select(2, self.step).squeeze(2)) + SPECIAL_TOKENS
        self.chosen.index_copy_(2, self.step, token.unsqueeze(2))
        self.current.copy_(token)
        self.step += 1

    def _graph(self, slots: int) -> torch.cuda.CUDAGraph:
        """Return the step's CUDA graph, recorded on first use after two warm-up steps whose effects are undone."""
        if slots in self._graphs:
            return self._graphs[slots]
        step, current = self.step.clone(), self.current.clone()
        side = get_recording_stream(self.step.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._advance(slots)
                self.step.copy_(step)
                self.current.copy_(current)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Threads that prepare batches or watch other ranks continue to use the GPU.
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            self._advance(slots)
        self._graphs[slots] = graph
        return graph
