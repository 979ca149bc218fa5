"""A number for each response token, read from a model in micro-batches."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from remax_lightning.models.parallelize import gathered
from remax_lightning.rollout.types import Responses

TokenReader = Callable[[PreTrainedModel, Tensor, Tensor], Tensor]
"""From a model, sequences (B, L) and the mask of N tokens in them (B, L), a number for each of these tokens (N,)."""


@torch.no_grad()
def per_token(
    read: TokenReader, model: PreTrainedModel, responses: Responses, micro_batches: Iterable[Tensor]
) -> Tensor:
    """A number for each response token, without gradient.

    Args:
        read: What is computed, such as the log-prob of each token.
        model: The model, which is gathered once.
        responses: B responses.
        micro_batches: Row indices of each forward pass.

    Returns:
        Values, (B, T); 0 outside the response mask.
    """
    values = torch.zeros(responses.response_ids.shape, device=responses.response_ids.device)
    with gathered(model):
        for rows in micro_batches:
            chosen = responses.rows(rows)
            values[rows, : chosen.response_ids.shape[1]] = chosen.at_tokens(read(model, *chosen.sequences()))
    return values
