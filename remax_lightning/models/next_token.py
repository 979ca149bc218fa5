"""Log-probs of tokens under a language model, and the policy gradient through them.

With a plain head the logits of all tokens never exist at once; a model that caps or scales its logits computes them
itself.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from remax_lightning.functional.fused_head import HeadOutput, fused_log_probs, fused_policy_gradient
from remax_lightning.functional.log_probs import entropy, token_log_probs
from remax_lightning.functional.losses import policy_gradient_loss
from remax_lightning.models.head import plain_head, without_head


def log_probs_of(model: PreTrainedModel, ids: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probs of the tokens where the mask is True, given all tokens before them; with gradient.

    Args:
        model: Causal language model.
        ids: Right-padded sequences, (B, L). Padding behind a sequence is never attended to, so no mask of it is needed.
        mask: True at N tokens, none of them the first of its row, (B, L) bool.
        temperature: Sampling temperature, above 0.

    Returns:
        Log-probs in nats, row by row, (N,).
    """
    head, tokens = plain_head(model), ids[mask]
    if head is None:
        return token_log_probs(_states(model, ids, mask), tokens, temperature=temperature)
    with without_head(head):
        hidden = _states(model, ids, mask)
    return fused_log_probs(hidden, head.weight, tokens, bias=head.bias, temperature=temperature)


def policy_gradient_of(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, coefficients: Tensor, *, temperature: float = 1.0
) -> HeadOutput:
    """Minus the sum of coefficient times log-prob over the tokens where the mask is True.

    Args:
        model: Causal language model.
        ids: Right-padded sequences, (B, L).
        mask: True at N tokens, none of them the first of its row, (B, L) bool.
        coefficients: Weight of each token's log-prob, row by row, (N,).
        temperature: Sampling temperature, above 0.

    Returns:
        Loss, scalar with gradient; log-probs and entropy without, nats, (N,) each.
    """
    head, tokens = plain_head(model), ids[mask]
    if head is not None:
        with without_head(head):
            hidden = _states(model, ids, mask)
        return fused_policy_gradient(hidden, head.weight, tokens, coefficients, bias=head.bias, temperature=temperature)
    logits = _states(model, ids, mask)
    log_probs = token_log_probs(logits, tokens, temperature=temperature)
    loss = policy_gradient_loss(log_probs, coefficients, torch.ones_like(tokens, dtype=torch.bool), num_tokens=1)
    with torch.no_grad():
        return HeadOutput(loss, log_probs.detach(), entropy(logits, temperature=temperature))


def _states(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """What the model returns at the positions that predict the tokens of the mask, (N, V); without its head, (N, H)."""
    length = ids.shape[1]
    first = int(mask.any(dim=0).int().argmax()) if bool(mask.any()) else length
    ones = torch.ones_like(ids)  # some models warn without a mask
    outputs = model(input_ids=ids, attention_mask=ones, logits_to_keep=length - first + 1, use_cache=False).logits
    return outputs[:, :-1][mask[:, first:]]
