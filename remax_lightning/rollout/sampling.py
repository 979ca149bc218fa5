"""Choose the next token of each row."""

import torch
from torch import Tensor

from remax_lightning.rollout.types import Sampling


def sample_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw a token for each row by the inverse of the cumulative distribution.

    Args:
        logits: Next-token logits, (R, V).
        uniforms: One number in (0, 1) for each row, (R,).
        sampling: Temperature, top-k and top-p.

    Returns:
        Tokens, (R,), and their log-probs at that temperature over the whole vocabulary, nats, (R,): NaN in a row whose
        logits are not finite, where the token is any of the vocabulary.
    """
    scaled = logits.float()
    if sampling.temperature != 1:
        scaled = scaled / sampling.temperature
    largest = scaled.amax(dim=-1, keepdim=True)
    weights = (scaled - largest).exp_()
    log_total = largest[:, 0] + weights.sum(dim=-1).log()
    if sampling.top_k > 0 or sampling.top_p < 1:
        kept = _nucleus(_top(scaled, sampling.top_k), sampling.top_p)
        weights.masked_fill_(kept == float("-inf"), 0.0)
    cumulated = weights.cumsum(dim=-1)
    tokens = torch.searchsorted(cumulated, uniforms[:, None] * cumulated[:, -1:], right=True)[:, 0]
    tokens = tokens.clamp(max=logits.shape[-1] - 1)  # a search for NaN ends behind the last token
    return tokens, scaled.gather(1, tokens[:, None])[:, 0] - log_total


def _top(logits: Tensor, top_k: int) -> Tensor:
    """Logits below the k-th largest at minus infinity; all of them for ``top_k`` 0."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    smallest = logits.topk(top_k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest, float("-inf"))


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits outside the smallest set with probability ``top_p`` at minus infinity; none for ``top_p`` 1."""
    if top_p == 1:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True)
    before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, index, before >= top_p)
    return logits.masked_fill(outside, float("-inf"))
