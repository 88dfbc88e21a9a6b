"""The network: a prefix language model over windows.

The source embedding turns the counts of each window into one vector. These vectors are the prefix, and see each other freely.
They are followed by the start token and the bins predicted so far; each sees the whole prefix and the tokens before it.
The loss that training minimises is `CoalescenceModel.loss`.

Shapes: B examples, W windows, P = W sources, T = 2W positions, H heads, D width, S scales, n samples, V vocabulary,
R replicates.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cxt.config.learning import choose_reading
from cxt.config.network import START_TOKEN, ModelConfig, log_rates
from cxt.model.attention import build_rotary_table
from cxt.model.decoder import Decoder
from cxt.model.inputs import check_input, check_shape, check_tokens, convert_input
from cxt.model.layers import Block, LayerNorm, SourceEmbedding
from cxt.model.packing import Packing, describe_packing
from cxt.model.rates import RateEmbedding

CHUNKS = 8
"""Number of parts of a loss that is computed in chunks."""


class Backbone(nn.Module):
    """The network without an adapter."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.source_embedding = SourceEmbedding(config)
        self.rate_embedding = RateEmbedding(config.width) if config.reads_rates else None
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.gradient_checkpointing = False
        self.register_buffer("rotary", self._rotary_table(), persistent=False)
        self.apply(self._initialise)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers))
        if self.rate_embedding is not None:
            nn.init.zeros_(self.rate_embedding.weight)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def _rotary_table(self, device=None) -> torch.Tensor:
        return build_rotary_table(2 * self.config.windows + 1, self.config.width // self.config.heads, device=device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.rotary.dtype != torch.float32:  # half precision is not sufficient for angles of up to 2W radians
            self.rotary = self._rotary_table(self.rotary.device)
        return self

    def _block(
        self, block: Block, h: torch.Tensor, prefix: int, *, targets_only: bool = False, packing: Packing | None = None
    ) -> torch.Tensor:
        length, visible = h.shape[1], None
        if packing is None:
            table = self.rotary[:, :length]
        else:
            table = self.rotary[:, packing.positions[:, :length]].unsqueeze(2)  # (2, B, 1, L, hd / 2)
            visible = packing.visible[:, :, :length, :length]
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, table, prefix, targets_only=targets_only, visible=visible, use_reentrant=False)
        return block(h, table, prefix, targets_only=targets_only, visible=visible)

    def describe_packing(self, regions: torch.Tensor | None) -> Packing | None:
        """What the blocks need to know of packed rows, given their regions (B, W); None for rows of one region."""
        if regions is None:
            return None
        return describe_packing(regions, start_token_in_prefix=self.config.start_token_in_prefix)

    def embed_sources(self, x: torch.Tensor, rates: torch.Tensor | None) -> torch.Tensor:
        """The prefix, (B, W, D), given log1p counts (B, 2, S, W, n) and ln rates; None if no rate is known.

        Rates are (B, 2), or (B, W, 2) for packed rows.
        """
        source = self.source_embedding(x)  # (B, W, D)
        if self.rate_embedding is not None:
            unknown = torch.full((1, 2), torch.nan, device=x.device)
            source = source + self.rate_embedding(unknown if rates is None else rates)
        return source

    def states(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        rates: torch.Tensor | None = None,
        *,
        regions: torch.Tensor | None = None,
        all_positions: bool = False,
    ) -> torch.Tensor:
        """The input of the head, (B, W, D), given log1p counts (B, 2, S, W, n), tokens (B, W + 1) and ln rates (B, 2).

        The last token is not read, because nothing is predicted after it. With *all_positions*, all positions (B, 2W, D). For
        packed rows, *regions* is (B, W) as for `describe_packing` and rates are (B, W, 2).
        """
        packing = self.describe_packing(regions)
        source = self.embed_sources(x, rates)  # (B, W, D)
        tokens = y[:, :-1] if packing is None else y[:, :-1].masked_fill(packing.begins, START_TOKEN)
        target = self.token_embedding(tokens)  # (B, W, D)
        h = self.dropout(torch.cat([source, target], dim=1))  # (B, 2W, D)
        windows = source.shape[1]
        prefix = windows + int(self.config.start_token_in_prefix)
        for block in self.blocks[:-1]:
            h = self._block(block, h, prefix, packing=packing)
        # The last states of the sources are not used.
        if prefix == windows and not all_positions:
            return self.norm(self._block(self.blocks[-1], h, prefix, targets_only=True, packing=packing))
        h = self._block(self.blocks[-1], h, prefix, packing=packing)
        return self.norm(h if all_positions else h[:, windows:])

    def source_states(
        self, x: torch.Tensor, rates: torch.Tensor | None = None, *, regions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The input of the head at the sources, (B, W, D), given counts (B, 2, S, W, n) and ln rates: no token is read."""
        return self.encode(self.embed_sources(x, rates), regions=regions)

    def encode(self, source: torch.Tensor, *, regions: torch.Tensor | None = None) -> torch.Tensor:
        """The states of embedded sources, from `embed_sources`, that see each other and no token: (B, W, D) -> (B, W, D)."""
        packing = self.describe_packing(regions)
        h = self.dropout(source)
        for block in self.blocks:
            h = self._block(block, h, h.shape[1], packing=packing)
        return self.norm(h)

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        rates: torch.Tensor | None = None,
        *,
        regions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (B, W, V) for windows 1..W."""
        return self.head(self.states(x, y, rates, regions=regions))


class CoalescenceModel(nn.Module):
    """A backbone, with or without a sample-size adapter in front of it.

    ``forward(X, y)`` takes log1p counts (B, 2, scales, windows, samples) and tokens (B, windows + 1), and returns logits
    (B, windows, vocabulary); ``logits[:, k]`` predicts ``y[:, k + 1]``. ``generate(X, window_size=…)`` decodes.

    *trained_on*, a `cxt.model.inputs.TrainedOn`, describes the training data of its checkpoint; None for a new network.
    *precision* is the one in which it was trained, and in which `cxt.predict` and evaluation decode on a GPU. *objective* is
    what it was trained to predict, and determines how it can be read. With *carries_bin*, a region that continues another one
    begins with the bin of the window before it, in place of the start token.
    """

    def __init__(self, config: ModelConfig, adapter: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.adapter = adapter
        self.backbone = Backbone(config)
        self.trained_on = None
        self.precision = "32-true"
        self.objective = "autoregressive"
        self.carries_bin = False

    @property
    def shortest_region(self) -> int:
        """Smallest number of windows of a region that it is meant to read: that of its training, or all of its windows."""
        windows = None if self.trained_on is None else self.trained_on.windows
        return self.config.windows if windows is None else min(windows[0], self.config.windows)

    @property
    def samples(self) -> int:
        """Number of haplotypes of its input."""
        return self.config.samples if self.adapter is None else self.adapter.config.samples

    def train(self, mode: bool = True) -> "CoalescenceModel":
        """Set training mode as usual, except that an adapter's backbone stays in eval mode, to train without dropout."""
        super().train(mode)
        if self.adapter is not None:
            self.backbone.eval()
        return self

    def adapt_input(self, x: torch.Tensor, *, regions: torch.Tensor | None = None) -> torch.Tensor:
        """Check the shape of X, and pass it through the adapter if there is one; *regions* are those of packed rows."""
        check_shape(self, x, packed=regions is not None)
        x = x.to(self.backbone.head.weight.dtype)  # counts are float32; the network may be in bfloat16
        return x if self.adapter is None else self.adapter(x, regions=regions)

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        rates: torch.Tensor | None = None,
        *,
        regions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict each window's bin from X and the bins of the windows before it.

        Parameters
        ----------
        x : tensor (B, 2, S, W, n)
            log1p of the counts that `cxt.pair_features` makes, of at most as many windows as the network was built for.
        y : int64 tensor (B, W + 1)
            Start token and the token of each window, bin + 2; the last one is not read.
        rates : float32 tensor (B, 2), optional
            From `cxt.config.network.log_rates`, for a network that reads rates; by default none is known. Tokens are those of
            scaled times, see `cxt.model.rates`.
        regions : int64 tensor (B, W), optional
            For rows that hold several regions: the number of each window's region, see `cxt.model.packing`. Every region
            begins with a start token, whatever y holds there, and rates are (B, W, 2).

        Returns
        -------
        tensor (B, W, V)
            Logits; ``logits[:, k]`` predicts ``y[:, k + 1]``.

        Raises
        ------
        BadRequest
            If X or y is not a tensor of that shape.
        """
        source = self.adapt_input(x, regions=regions)
        check_tokens(y, examples=len(source), windows=source.shape[3])
        return self.backbone(source, y, rates, regions=regions)

    def loss(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        rates: torch.Tensor | None = None,
        *,
        regions: torch.Tensor | None = None,
        path: str = "target",
        criterion: Callable[..., torch.Tensor] = F.cross_entropy,
    ) -> torch.Tensor:
        """Mean loss of predicting each window from the sources and the windows before it, over all windows of all examples.

        It is the same for every *path*: `target` applies the head to the positions that predict windows, `full` to all, as
        published, and `chunked` to an eighth of the predicting positions at a time, recomputing logits in the backward pass.
        *criterion* is called as ``criterion(logits, labels, reduction="mean" or "sum")`` with (N, V) and (N,). *regions* are
        those of packed rows, as for `forward`.
        """
        x = self.adapt_input(x, regions=regions)
        check_tokens(y, examples=len(x), windows=x.shape[3])
        labels = y[:, 1:].flatten()
        if path == "chunked":
            states = self.backbone.states(x, y, rates, regions=regions).flatten(0, 1)  # (B·W, D)
            parts = zip(states.chunk(CHUNKS), labels.chunk(CHUNKS), strict=True)
            partial = [checkpoint(self._compute_partial_loss, criterion, *part, use_reentrant=False) for part in parts]
            return sum(partial) / len(labels)
        if path == "full":
            states = self.backbone.states(x, y, rates, regions=regions, all_positions=True)  # (B, 2W, D)
            logits = self.backbone.head(states)[:, x.shape[3] :]
        else:
            logits = self.backbone(x, y, rates, regions=regions)  # (B, W, V)
        return criterion(logits.flatten(0, 1).float(), labels, reduction="mean")

    def _compute_partial_loss(
        self, criterion, states: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:  # (N, D), (N,) -> ()
        return criterion(self.backbone.head(states).float(), labels, reduction="sum")

    def marginal_logits(
        self, x: torch.Tensor, rates: torch.Tensor | None = None, *, regions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (B, W, V) of each window given the sources alone, in one pass; X, rates and regions as in `forward`."""
        return self.backbone.head(self.backbone.source_states(self.adapt_input(x, regions=regions), rates, regions=regions))

    def joint_logits(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        rates: torch.Tensor | None = None,
        *,
        regions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of `marginal_logits` and of `forward`, each (B, W, V), from one pass."""
        source = self.adapt_input(x, regions=regions)
        windows = source.shape[3]
        check_tokens(y, examples=len(source), windows=windows)
        logits = self.backbone.head(self.backbone.states(source, y, rates, regions=regions, all_positions=True))
        return logits[:, :windows], logits[:, windows:]

    def use_flex_attention(self) -> None:
        """Use FlexAttention from now on, which has gradients on GPUs only."""
        for block in self.backbone.blocks:
            block.attention.flexible = True

    def repeat_rates(
        self, mutation_rate: float | None, recombination_rate: float | None, *, examples: int
    ) -> torch.Tensor | None:
        """The rates of one species as input of the network, (examples, 2); None if it does not read rates."""
        if not self.config.reads_rates:
            return None
        rates = torch.tensor(log_rates(mutation_rate, recombination_rate), device=self.backbone.head.weight.device)
        return rates.expand(examples, 2)

    def generate(
        self,
        x: torch.Tensor | np.ndarray,
        *,
        window_size: int,
        mutation_rate: float | None = None,
        recombination_rate: float | None = None,
        replicates: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        example_ids: Sequence[int] | torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
        slots: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode one batch, after checking that X is valid input of this network.

        Parameters
        ----------
        x : log1p of counts from `cxt.pair_features`, tensor or array (B, 2, scales, windows, samples)
        window_size : base pairs per window of X; must equal the model's
        mutation_rate, recombination_rate : rates per bp and generation of the species of X, if known, to compare with those of
            the training data; a network that reads rates uses them, and its bins are then those of ln(TMRCA · µ / 1e-8), see
            `cxt.model.rates`
        replicates, temperature, top_k, seed, slots : sampling settings, see `cxt.model.decoder.Decoder`
        example_ids : (B,) whole numbers that identify the examples; 0, 1, … by default
        tokens : (B, replicates, windows + 1); if given, nothing is sampled and the network is fed these

        Returns
        -------
        tokens : (B, replicates, windows) int64, bin + 2
        probabilities : (B, replicates, windows, bins) float32, the predictive distribution of each window

        Raises
        ------
        BadRequest
            If the model was trained with the objective `marginal`, so that it cannot be sampled; X has the wrong shape or
            window size, is not log1p of counts, or lacks missingness that the model reads; or a setting is not valid.

        Warns
        -----
        cxt.model.inputs.OutsideTraining
            If diversity, missingness or a given rate is outside the range of the training data, which is stored in the
            checkpoint: diversity and rates by more than a factor of 1.5, missingness by more than 0.05.
        """
        choose_reading(self.objective, "sampled")
        x = convert_input(self, x)
        check_input(self, x, window_size=window_size, mutation_rate=mutation_rate, recombination_rate=recombination_rate)
        was_training = self.training
        self.eval()
        try:
            decoder = Decoder(self, replicates=replicates, temperature=temperature, top_k=top_k, seed=seed, slots=slots)
            rates = self.repeat_rates(mutation_rate, recombination_rate, examples=len(x))
            return decoder.decode(x, rates=rates, example_ids=example_ids, tokens=tokens)
        finally:
            self.train(was_training)
