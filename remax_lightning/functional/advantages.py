"""Advantages: how much each sampled token's log-probability is pushed up or down."""

from typing import Literal, get_args

import torch
from torch import Tensor

from remax_lightning.functional._checks import require_shape
from remax_lightning.functional.log_probs import kl_k1

KLForm = Literal["full_step", "one_step"]


@torch.no_grad()
def remax_advantages(
    rewards: Tensor,
    baselines: Tensor,
    response_mask: Tensor,
    *,
    log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_form: KLForm = "full_step",
    gamma: float = 1.0,
    reward_clip: float | None = None,
) -> Tensor:
    """Reward of the sampled response minus that of the greedy one, less a KL penalty, for each token.

    With k_t = log pi(y_t) - log ref(y_t), token t's penalty is kl_coef times
        `full_step`: the sum of k_h over h >= t, which gives the exact gradient of E[reward] - kl_coef * KL(pi || ref);
        `one_step`: k_t alone, as in the official code; weaker for the same kl_coef, and not the gradient of that.

    Args:
        rewards: Reward of each sampled response, (B,).
        baselines: Reward of the greedy response to the same prompt, (B,).
        response_mask: True where the policy chose the token, the stop token included, (B, T) bool.
        log_probs: Log-probabilities of the sampled tokens under the policy, in nats, (B, T); needed if kl_coef > 0.
        ref_log_probs: The same under the reference, (B, T); needed if kl_coef > 0.
        kl_coef: Weight of the KL penalty, in reward per nat.
        kl_form: Which of the two penalties.
        gamma: Discount per token of the reward, in (0, 1]; the last token's reward part is already discounted once.
            The KL penalty is not discounted.
        reward_clip: Bound on |rewards - baselines|, in reward; None for no bound.

    Returns:
        Advantages without gradient, (B, T), float32 or float64; 0 outside the mask, whatever the inputs hold there.

    Raises:
        ValueError: If kl_form is unknown, kl_coef is negative or comes without both log-probs, gamma or reward_clip is
            out of range, or a shape does not match.

    Reference: Li et al. 2024, arXiv 2310.10505, and github.com/liziniu/ReMax at commit 536ba49.
    """
    check_remax_arguments(kl_coef, kl_form, gamma, reward_clip)
    require_shape(response_mask.shape[:1], "one value per response, (B,)", rewards=rewards, baselines=baselines)
    require_shape(
        response_mask.shape,
        "one value per token of response_mask, (B, T)",
        log_probs=log_probs,
        ref_log_probs=ref_log_probs,
    )
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    differences = rewards.to(dtype) - baselines.to(dtype)  # (B,)
    if reward_clip is not None:
        differences = differences.clamp(-reward_clip, reward_clip)
    tokens_to_go = _reverse_cumsum(response_mask.to(dtype))  # (B, T), 1 at the last response token
    advantages = differences.unsqueeze(-1) * gamma**tokens_to_go
    if kl_coef > 0:
        advantages = advantages - kl_coef * _kl_penalty(log_probs, ref_log_probs, response_mask, kl_form)
    return advantages.masked_fill(~response_mask, 0.0)


def _kl_penalty(log_probs: Tensor | None, ref_log_probs: Tensor | None, mask: Tensor, kl_form: KLForm) -> Tensor:
    """KL penalty of each token in nats, (B, T), before its coefficient."""
    if log_probs is None or ref_log_probs is None:
        missing = " and ".join(
            name for name, value in (("log_probs", log_probs), ("ref_log_probs", ref_log_probs)) if value is None
        )
        raise ValueError(
            f"kl_coef > 0 requires both log_probs and ref_log_probs, got no {missing}; pass them or set kl_coef=0."
        )
    token_kl = kl_k1(log_probs, ref_log_probs).masked_fill(~mask, 0.0)  # before the sum: padding may be NaN
    return _reverse_cumsum(token_kl) if kl_form == "full_step" else token_kl


def _reverse_cumsum(values: Tensor) -> Tensor:
    """Sum from each position to the end of its row, (B, T)."""
    return values.flip(-1).cumsum(-1).flip(-1)


def check_remax_arguments(kl_coef: float, kl_form: str, gamma: float, reward_clip: float | None) -> None:
    """Refuse options of `remax_advantages` that are out of range; a module does so before its first step.

    Raises:
        ValueError: As `remax_advantages`.
    """
    if kl_form not in get_args(KLForm):
        raise ValueError(
            f"kl_form must be one of {', '.join(get_args(KLForm))}, got {kl_form!r}; "
            "use full_step for the exact KL gradient, one_step to match the official code."
        )
    if not kl_coef >= 0:
        raise ValueError(
            f"kl_coef is the weight of a penalty and must be at least 0, got {kl_coef}; use 0 for no penalty."
        )
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma is a discount per token and must be in (0, 1], got {gamma}; use 1.0 for no discount.")
    if reward_clip is not None and not reward_clip > 0:
        raise ValueError(
            f"reward_clip bounds |rewards - baselines| and must be above 0, got {reward_clip}; use None for no bound."
        )
