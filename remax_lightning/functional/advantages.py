"""Advantages: how much each sampled token's log-probability is pushed up or down."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from remax_lightning.functional._checks import require_gamma, require_kl_coef, require_shape
from remax_lightning.functional.log_probs import KLEstimator
from remax_lightning.functional.returns import token_kl

KLForm = Literal["full_step", "one_step"]


@torch.no_grad()
def baseline_advantages(
    rewards: Tensor,
    baselines: Tensor,
    response_mask: Tensor,
    *,
    log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_form: KLForm = "full_step",
    kl_estimator: KLEstimator = "k1",
    gamma: float = 1.0,
    reward_clip: float | None = None,
) -> Tensor:
    """Reward of the sampled response minus its baseline, less a KL penalty, for each token.

    Any baseline that does not look at the response leaves the expected gradient as it is: the reward of the greedy
    response (ReMax), the mean of the prompt's other responses (`leave_one_out_baselines`), a running mean (REINFORCE).

    With k_t = log pi(y_t) - log ref(y_t), token t's penalty is kl_coef times
        `full_step`: the sum of k_h over h >= t, which gives the exact gradient of E[reward] - kl_coef * KL(pi || ref);
        `one_step`: k_t alone, as in the official ReMax code; weaker for the same kl_coef, and not the gradient of that.

    Args:
        rewards: Reward of each sampled response, (B,).
        baselines: What each response's reward is compared with, (B,); for ReMax the reward of the greedy response to
            the same prompt.
        response_mask: True where the policy chose the token, the stop token included, (B, T) bool.
        log_probs: Log-probabilities of the sampled tokens under the policy, in nats, (B, T); needed if kl_coef > 0.
        ref_log_probs: The same under the reference, (B, T); needed if kl_coef > 0.
        kl_coef: Weight of the KL penalty, in reward per nat.
        kl_form: Which of the two penalties.
        kl_estimator: What k_h is: k1 as above; with k2 and k3 neither form is the exact gradient.
        gamma: Discount per token of the reward, in (0, 1]; the last token's reward part is already discounted once.
            The KL penalty is not discounted.
        reward_clip: Bound on |rewards - baselines|, in reward; None for no bound.

    Returns:
        Advantages without gradient, (B, T), float32 or float64; 0 outside the mask, whatever the inputs hold there.

    Raises:
        ValueError: If kl_form is unknown, kl_coef is negative or comes without both log-probs, gamma or reward_clip is
            out of range, or a shape does not match.

    Reference: Williams 1992, doi 10.1007/BF00992696; as ReMax, Li et al. 2024, arXiv 2310.10505, and
        github.com/liziniu/ReMax at commit 536ba49.
    """
    check_baseline_arguments(kl_coef, kl_form, gamma, reward_clip)
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
        penalties = token_kl(log_probs, ref_log_probs, response_mask, kl_estimator)
        advantages = advantages - kl_coef * (_reverse_cumsum(penalties) if kl_form == "full_step" else penalties)
    return advantages.masked_fill(~response_mask, 0.0)


def _reverse_cumsum(values: Tensor) -> Tensor:
    """Sum from each position to the end of its row, (B, T)."""
    return values.flip(-1).cumsum(-1).flip(-1)


def check_baseline_arguments(kl_coef: float, kl_form: str, gamma: float, reward_clip: float | None) -> None:
    """Refuse options of `baseline_advantages` that are out of range; a module does so before its first step.

    Raises:
        ValueError: As `baseline_advantages`.
    """
    if kl_form not in get_args(KLForm):
        raise ValueError(
            f"kl_form must be one of {', '.join(get_args(KLForm))}, got {kl_form!r}; "
            "use full_step for the exact KL gradient, one_step to match the official code."
        )
    require_kl_coef(kl_coef)
    require_gamma(gamma)
    if reward_clip is not None and not reward_clip > 0:
        raise ValueError(
            f"reward_clip bounds |rewards - baselines| and must be above 0, got {reward_clip}; use None for no bound."
        )


# ReMax: the baselines are the rewards of the greedy responses.
remax_advantages = baseline_advantages


@torch.no_grad()
def leave_one_out_baselines(rewards: Tensor, num_samples: int) -> Tensor:
    """Mean reward of the prompt's other responses, those without a finite reward left out.

    Args:
        rewards: Reward of each response, (B * num_samples,); a prompt's responses are adjacent.
        num_samples: Responses drawn for each prompt.

    Returns:
        Baselines without gradient, same shape, float32 or float64; NaN where no other reward of the prompt is finite.

    Raises:
        ValueError: If num_samples is below 2 or does not divide the number of rewards.

    Reference: Ahmadian et al. 2024, arXiv 2402.14740; Kool et al. 2019, openreview.net/forum?id=r1lgTGL5DE.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2 for a leave-one-out baseline, got {num_samples}")
    require_shape(rewards.shape[:1], "one value per response, (B * num_samples,)", rewards=rewards)
    if len(rewards) % num_samples:
        raise ValueError(
            f"rewards must hold num_samples = {num_samples} adjacent rewards for each prompt, got {len(rewards)} in all"
        )
    by_prompt = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).view(-1, 1, num_samples)
    is_self = torch.eye(num_samples, dtype=torch.bool, device=rewards.device)
    counts = by_prompt.isfinite() & ~is_self  # (prompts, num_samples, num_samples): which rewards count for which row
    # Not the prompt's sum less the own reward, which would lose small rewards beside a large one.
    sums = torch.where(counts, by_prompt, 0.0).sum(-1)
    return (sums / counts.sum(-1)).view(-1)  # 0 / 0 = NaN


@torch.no_grad()
def mean_of_others(rewards: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of all other finite rewards of the global batch.

    Args:
        rewards: Reward of each response of this rank, (B,).
        sum_over_ranks: Adds a scalar over all ranks, in float64.

    Returns:
        Baselines without gradient, same shape and type; NaN where no other reward is finite.

    Example:
        >>> mean_of_others(torch.tensor([1.0, 2.0, 4.0]), lambda value: value.double())
        tensor([3.0000, 2.5000, 1.5000])
    """
    is_known = rewards.isfinite()
    finite = torch.where(is_known, rewards, 0.0)
    total, count = sum_over_ranks(finite.sum()), sum_over_ranks(is_known.sum())
    return ((total - finite) / (count - is_known.double())).to(rewards.dtype)


@torch.no_grad()
def leave_one_out(rewards: Tensor, num_samples: int) -> Tensor:
    """Advantages with the mean reward of a prompt's other responses as the baseline.

    A response without a finite reward is dropped: its advantage is NaN and it counts for no other response. So is one
    whose prompt has no other finite reward: there is nothing to compare it with.

    Args:
        rewards: Reward of each response, (B * num_samples,); a prompt's responses are adjacent.
        num_samples: Responses drawn for each prompt.

    Returns:
        Advantages without gradient, same shape, float32 or float64; but for NaN they sum to zero over each prompt.

    Raises:
        ValueError: If num_samples is below 2 or does not divide the number of rewards.

    Example:
        >>> leave_one_out(torch.tensor([1.0, 2.0, 6.0, 5.0, torch.nan, 3.0]), num_samples=3).tolist()
        [-3.0, -1.5, 4.5, 2.0, nan, -2.0]

    Reference: Ahmadian et al. 2024, arXiv 2402.14740; Kool et al. 2019, openreview.net/forum?id=r1lgTGL5DE.
    """
    advantages = rewards - leave_one_out_baselines(rewards, num_samples)
    return advantages.masked_fill(~rewards.isfinite(), torch.nan)


@torch.no_grad()
def masked_moments(values: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of the values in the mask; those of several processes or batches add up.

    Args:
        values: Any shape; may be NaN or infinite outside the mask.
        mask: True at the values that count, same shape, bool.

    Returns:
        The three numbers, (3,) float64: in float32 a variance far below the squared mean would be lost.

    Raises:
        ValueError: If the shapes differ.
    """
    require_shape(values.shape, "one claim per value, the shape of values", mask=mask)
    chosen = values[mask].double()
    return torch.stack([mask.sum().double(), chosen.sum(), chosen.square().sum()])


@torch.no_grad()
def normalized(values: Tensor, mask: Tensor, moments: Tensor) -> Tensor:
    """Values less their mean, divided by their standard deviation; the mean is not added back.

    Args:
        values: Any shape, such as advantages, (B, T).
        mask: True at the values that count, same shape, bool.
        moments: Count, sum and sum of squares of all values that share mean and deviation, (3,), as of
            `masked_moments`, added over the processes.

    Returns:
        Same shape, without gradient, float32 or float64; 0 outside the mask. Values that are all equal give 0: 1e-8 is
        added to the variance.

    Raises:
        ValueError: If a shape does not match.
    """
    require_shape(values.shape, "one claim per value, the shape of values", mask=mask)
    require_shape((3,), "count, sum and sum of squares", moments=moments)
    count, total, squares = moments.double()
    mean = total / count
    variance = (squares / count - mean**2).clamp(min=0)  # equal values may round below 0
    scores = (values.double() - mean) / (variance + 1e-8).sqrt()
    return scores.masked_fill(~mask, 0.0).to(torch.promote_types(values.dtype, torch.float32))
