"""Losses: policy gradient, and Bradley-Terry of reward models."""

from torch import Tensor
from torch.nn import functional as F

from remax_lightning.functional._checks import require_shape


def policy_gradient_loss(
    log_probs: Tensor, advantages: Tensor, response_mask: Tensor, *, num_tokens: float | Tensor | None = None
) -> Tensor:
    """Loss whose negative gradient is sum(advantage * grad log pi) / num_tokens.

    Args:
        log_probs: Log-probabilities of the sampled tokens, in nats, with gradient, (B, T).
        advantages: Weight of each token, (B, T); treated as a constant.
        response_mask: True at the tokens that count, (B, T) bool.
        num_tokens: Divisor, above 0: the token count over all micro-batches and ranks makes their losses add up to that
            of the whole batch. None takes this mask's count, at least 1.

    Returns:
        Scalar; padding adds nothing to it or to its gradient, even where it is NaN or infinite.

    Raises:
        ValueError: If the shapes differ.
    """
    require_shape(
        log_probs.shape,
        "one value per token of log_probs, (B, T)",
        advantages=advantages,
        response_mask=response_mask,
    )
    # Both factors are filled: a NaN left in either would reach the gradient of the other.
    weights = advantages.detach().masked_fill(~response_mask, 0.0)
    total = (weights * log_probs.masked_fill(~response_mask, 0.0)).sum()
    return -total / (response_mask.sum().clamp(min=1) if num_tokens is None else num_tokens)


def bradley_terry_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Negative log-likelihood that the chosen response beats the rejected one, with odds exp(chosen - rejected).

    Args:
        chosen_scores: Scores of the preferred responses, (B,).
        rejected_scores: Scores of the other response to the same prompts, (B,).

    Returns:
        Mean over the pairs, scalar, in nats; log 2 for equal scores.

    Raises:
        ValueError: If the shapes differ.

    Reference: Bradley and Terry 1952; as a reward-model loss, Ouyang et al. 2022, arXiv 2203.02155.
    """
    require_shape(chosen_scores.shape, "one score per chosen response, (B,)", rejected_scores=rejected_scores)
    return -F.logsigmoid(chosen_scores - rejected_scores).mean()
