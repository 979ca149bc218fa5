"""Losses: policy gradient with and without a clip, values, KL penalty, and Bradley-Terry of reward models."""

import torch
from torch import Tensor
from torch.nn import functional as F

from remax_lightning.functional._checks import require_clip_range, require_shape
from remax_lightning.functional.log_probs import KL_ESTIMATORS, KLEstimator

PER_TOKEN = "one value per token of log_probs, (B, T)"


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
    require_shape(log_probs.shape, PER_TOKEN, advantages=advantages, response_mask=response_mask)
    # Both factors are filled: a NaN left in either would reach the gradient of the other.
    weights = advantages.detach().masked_fill(~response_mask, 0.0)
    total = (weights * log_probs.masked_fill(~response_mask, 0.0)).sum()
    return -total / _divisor(response_mask, num_tokens)


def clipped_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_range: float,
    num_tokens: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's loss: -min(ratio * advantage, clip(ratio) * advantage), with ratio = pi / pi_old of the token.

    Where the ratio has left [1 - clip_range, 1 + clip_range] to the side that the advantage favours, the token has no
    gradient any more; where it is outside on the other side, it has, and is pushed back. At ratio 1 the gradient is
    that of `policy_gradient_loss`.

    Args:
        log_probs: Log-probabilities of the sampled tokens under the policy, in nats, with gradient, (B, T) or flat.
        old_log_probs: The same under the policy that is compared with, a constant, same shape.
        advantages: Weight of each token, same shape; treated as a constant.
        response_mask: True at the tokens that count, same shape, bool.
        clip_range: Bound on |ratio - 1|, above 0.
        num_tokens: Divisor, as in `policy_gradient_loss`.

    Returns:
        Loss, scalar; padding adds nothing to it or to its gradient, even where it is NaN or infinite. And where the
        clip is active, same shape, bool; False outside the mask.

    Raises:
        ValueError: If the shapes differ or clip_range is not above 0.

    Reference: Schulman et al. 2017, arXiv 1707.06347, equation 7.
    """
    require_clip_range(clip_range, "|ratio - 1|")
    require_shape(
        log_probs.shape, PER_TOKEN, old_log_probs=old_log_probs, advantages=advantages, response_mask=response_mask
    )
    log_ratio = log_probs - old_log_probs.detach()
    weights = advantages.detach().masked_fill(~response_mask, 0.0)
    bound = 1 + clip_range * weights.sign()  # on the side that the advantage favours
    ratio = log_ratio.detach().exp()
    clipped = ((weights > 0) & (ratio > bound)) | ((weights < 0) & (ratio < bound))
    # Filled before exp: 0 times an exp that overflows, or times its gradient, would be NaN.
    ratio = log_ratio.masked_fill(clipped | (weights == 0), 0.0).exp()
    terms = weights * torch.where(clipped, bound, ratio)
    return -terms.sum() / _divisor(response_mask, num_tokens), clipped


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    clip_range: float | None = None,
    num_tokens: float | Tensor | None = None,
) -> Tensor:
    """Half the squared error of the values; with a clip range that of the values kept near the old ones, if larger.

    So a value that has moved by more than clip_range towards its return has no gradient any more, as long as it is
    nearer to it than the one kept near; one that has moved away from it has.

    Args:
        values: Values of the tokens, with gradient, (B, T) or flat.
        old_values: Those that the advantages were made of, a constant, same shape; for the clip only.
        returns: What the values should be, a constant, same shape.
        response_mask: True at the tokens that count, same shape, bool.
        clip_range: Bound on |values - old_values|, above 0, in the unit of the rewards; None for no clip.
        num_tokens: Divisor, as in `policy_gradient_loss`.

    Returns:
        Scalar, in reward squared; padding adds nothing to it or to its gradient, even where it is NaN or infinite.

    Raises:
        ValueError: If the shapes differ or clip_range is not above 0.

    Reference: Schulman et al. 2017, arXiv 1707.06347; the clip is of the authors' code, github.com/openai/baselines.
    """
    require_shape(
        values.shape,
        "one value per token of values, (B, T)",
        old_values=old_values,
        returns=returns,
        response_mask=response_mask,
    )
    values, old_values, returns = (
        each.to(torch.promote_types(each.dtype, torch.float32)).masked_fill(~response_mask, 0.0)
        for each in (values, old_values.detach(), returns.detach())
    )
    errors = (values - returns).square()
    if clip_range is not None:
        require_clip_range(clip_range, "|values - old_values|")
        kept_near = old_values + (values - old_values).clamp(-clip_range, clip_range)
        errors = torch.maximum(errors, (kept_near - returns).square())
    return 0.5 * errors.sum() / _divisor(response_mask, num_tokens)


def kl_penalty_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    response_mask: Tensor,
    *,
    estimator: KLEstimator,
    num_tokens: float | Tensor | None = None,
) -> Tensor:
    """Sum of a KL estimator over the tokens, with its own gradient, for a penalty in the loss instead of the rewards.

    A good estimate of the KL need not have its gradient. With tokens drawn from the policy itself, the expected
    gradient at a token is
        `k1`: 0, though the value is KL(policy || reference) in expectation;
        `k2`: that of KL(policy || reference), though the value is biased;
        `k3`: that of KL(reference || policy), though the value is KL(policy || reference) in expectation;
    where the KL is that of the token's own distribution, after the tokens before it as they were drawn. A token does
    not answer for the KL of the later ones: k2 has the expected gradient of `baseline_advantages` with kl_form
    `one_step`, and for the gradient of the whole response's KL the penalty has to be in the rewards (`full_step`,
    `kl_token_rewards`). With tokens of an older policy none of this holds exactly.

    Args:
        log_probs: Log-probabilities of the sampled tokens under the policy, in nats, with gradient, (B, T) or flat.
        ref_log_probs: The same under the reference, a constant, same shape.
        response_mask: True at the tokens that count, same shape, bool.
        estimator: Which of `kl_k1`, `kl_k2` and `kl_k3`.
        num_tokens: Divisor, as in `policy_gradient_loss`.

    Returns:
        Scalar, in nats per token; padding adds nothing to it or to its gradient, even where it is NaN or infinite.

    Raises:
        ValueError: If the shapes differ or the estimator is unknown.

    Reference: Schulman 2020, joschu.net/blog/kl-approx.html, for the values; Tang and Munos 2025, arXiv 2506.09477, for
        the gradients.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(
            f"estimator must be one of {', '.join(KL_ESTIMATORS)}, got {estimator!r}; "
            "use k2 for the gradient of the KL."
        )
    require_shape(log_probs.shape, PER_TOKEN, ref_log_probs=ref_log_probs, response_mask=response_mask)
    # Filled before the estimator: the gradient of the exp of a padding of infinity would be NaN.
    pair = (each.masked_fill(~response_mask, 0.0) for each in (log_probs, ref_log_probs.detach()))
    return KL_ESTIMATORS[estimator](*pair).sum() / _divisor(response_mask, num_tokens)


def _divisor(response_mask: Tensor, num_tokens: float | Tensor | None) -> float | Tensor:
    return response_mask.sum().clamp(min=1) if num_tokens is None else num_tokens


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
