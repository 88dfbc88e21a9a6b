"""The two ways to read a network: in one pass over the sources, or by sampling sequences.

A network that was trained with the objective `marginal` gives the distribution of each window in one pass. One that was
trained with `autoregressive` predicts a window from those before it, so that sequences are sampled and their distributions
averaged. One that was trained with `joint` can be read both ways.
"""

from collections.abc import Callable, Sequence

import torch

from cxt.config.learning import Reading
from cxt.config.network import SPECIAL_TOKENS
from cxt.model.decoder import Decoder
from cxt.model.transformer import CoalescenceModel

AUTOCAST = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}
"""Type in which a GPU computes matrix products, by training precision."""

Reader = Callable[[torch.Tensor, torch.Tensor | None, Sequence[int], torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
"""Reads a batch.

It is given the network's input (B, 2, S, W, n), ln rates (B, 2) or None, the ids of the examples, and the bins (B, R)
of the windows before the first ones, or None; only networks that carry bins read these. It returns distributions (B, W, bins)
float64, and the bins of the sampled sequences, (B, R, W) int64, with R = 0 if nothing is sampled.
"""


def build_reader(
    model: CoalescenceModel,
    reading: Reading,
    *,
    replicates: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Reader:
    """A function that gives the distribution of each window of a batch.

    Parameters
    ----------
    model : CoalescenceModel
        In eval mode.
    reading : str
        `marginal` or `sampled`, from `choose_reading`.
    replicates, seed, temperature, top_k
        Settings of `sampled`, see `cxt.model.decoder.Decoder`.

    Returns
    -------
    Reader
    """
    if reading == "marginal":

        def read(x, rates, example_ids, previous=None):
            return read_marginals(model, x, rates), torch.empty((len(x), 0, x.shape[3]), dtype=torch.int64)

    else:
        decoder = Decoder(model, replicates=replicates, seed=seed, temperature=temperature, top_k=top_k)

        def read(x, rates, example_ids, previous=None):
            start = previous + SPECIAL_TOKENS if model.carries_bin and previous is not None else None
            return sample_replicates(decoder, x, rates, example_ids=example_ids, start=start)

    return read


@torch.no_grad()
def read_marginals(model: CoalescenceModel, x: torch.Tensor, rates: torch.Tensor | None = None) -> torch.Tensor:
    """The distribution of each window given the sources, in one pass: (B, W, bins) float64."""
    logits = model.marginal_logits(x, rates)[..., SPECIAL_TOKENS:]
    return logits.double().softmax(-1)


def sample_replicates(
    decoder: Decoder,
    x: torch.Tensor,
    rates: torch.Tensor | None = None,
    *,
    example_ids: Sequence[int],
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode a batch, beginning with the tokens *start* (examples, replicates) if given; also give what was sampled.

    Returns
    -------
    distribution : float64 (examples, windows, bins)
        The mean over the replicates of each window's distribution.
    bins : int64 (examples, replicates, windows)
        The bins of the sampled sequences.
    """
    tokens, probabilities = decoder.decode(x, rates=rates, example_ids=example_ids, start=start)
    return probabilities.mean(dim=1, dtype=torch.float64), tokens - SPECIAL_TOKENS
