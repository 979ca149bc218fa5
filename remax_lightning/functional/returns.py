"""Rewards of single tokens and what they add up to: returns and generalized advantages.

Only the tokens of the mask exist here: whatever lies between two of them is passed over, without discount or reward.
"""

import math

import torch
from torch import Tensor

from remax_lightning.functional._checks import require_gamma, require_kl_coef, require_shape
from remax_lightning.functional.log_probs import KL_ESTIMATORS, KLEstimator

PER_TOKEN = "one value per token of response_mask, (B, T)"


@torch.no_grad()
def kl_token_rewards(
    rewards: Tensor,
    response_mask: Tensor,
    log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k1",
) -> Tensor:
    """The response's reward at its last token, less a KL penalty at every token.

    Their sum over a response is in expectation E[reward] - kl_coef * KL(pi || ref), and their undiscounted returns are
    the weights of its exact gradient.

    Args:
        rewards: Reward of each response, (B,).
        response_mask: True where the policy chose the token, the stop token included, (B, T) bool.
        log_probs: Log-probabilities of the sampled tokens under the policy, in nats, (B, T); needed if kl_coef > 0.
        ref_log_probs: The same under the reference, (B, T); needed if kl_coef > 0.
        kl_coef: Weight of the KL penalty, in reward per nat.
        kl_estimator: Of a token's KL; with k2 and k3 the weights are not those of the exact gradient.

    Returns:
        Rewards without gradient, (B, T), float32 or float64; 0 outside the mask, whatever the inputs hold there.

    Raises:
        ValueError: If kl_coef is negative or comes without both log-probs, or a shape does not match.

    Reference: Ouyang et al. 2022, arXiv 2203.02155; Ziegler et al. 2019, arXiv 1909.08593.
    """
    require_kl_coef(kl_coef)
    require_shape(response_mask.shape[:1], "one value per response, (B,)", rewards=rewards)
    require_shape(response_mask.shape, PER_TOKEN, log_probs=log_probs, ref_log_probs=ref_log_probs)
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    is_last = response_mask & (response_mask.flip(-1).cumsum(-1).flip(-1) == 1)
    token_rewards = rewards.to(dtype).unsqueeze(-1).expand(is_last.shape).masked_fill(~is_last, 0.0)
    if kl_coef > 0:
        token_rewards = token_rewards - kl_coef * token_kl(log_probs, ref_log_probs, response_mask, kl_estimator)
    return token_rewards


def token_kl(
    log_probs: Tensor | None, ref_log_probs: Tensor | None, mask: Tensor, estimator: KLEstimator = "k1"
) -> Tensor:
    """An estimate of each token's KL in nats, (B, T), 0 outside the mask, for a penalty that cannot do without it.

    Raises:
        ValueError: If one of the log-probabilities is missing.
    """
    if log_probs is None or ref_log_probs is None:
        missing = " and ".join(
            name for name, value in (("log_probs", log_probs), ("ref_log_probs", ref_log_probs)) if value is None
        )
        raise ValueError(
            f"kl_coef > 0 requires both log_probs and ref_log_probs, got no {missing}; pass them or set kl_coef=0."
        )
    return KL_ESTIMATORS[estimator](log_probs, ref_log_probs).masked_fill(~mask, 0.0)  # padding may be NaN


@torch.no_grad()
def discounted_returns(token_rewards: Tensor, response_mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """What each token and those after it earn.

    The reward of the token itself is not discounted, that of the k-th token after it by gamma to the k. (The discount
    of `baseline_advantages` follows the official ReMax code and has one factor more.)

    Args:
        token_rewards: Reward of each token, (B, T).
        response_mask: True where the policy chose the token, (B, T) bool.
        gamma: Discount per token, in (0, 1].

    Returns:
        Returns without gradient, (B, T), in the unit of the rewards, float32 or float64; 0 outside the mask.

    Raises:
        ValueError: If gamma is out of range or the shapes differ.
    """
    require_gamma(gamma)
    require_shape(response_mask.shape, PER_TOKEN, token_rewards=token_rewards)
    returns = _discounted_sums(_wide(token_rewards), response_mask, gamma)
    return returns.masked_fill(~response_mask, 0.0)


@torch.no_grad()
def generalized_advantages(
    token_rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (GAE): temporal-difference errors, summed with discount gamma * gae_lambda.

    With gae_lambda=1 a token's advantage is its return less its value, unbiased for any values that do not look at the
    token; with gae_lambda=0 its temporal-difference error, of lower variance, biased unless the values are right.

    Args:
        token_rewards: Reward of each token, (B, T).
        values: Expected return before the token is chosen, (B, T): `values[:, t]` has seen the prompt and the response
            tokens before t. After the last token of the mask the value is 0, for a truncated response too.
        response_mask: True where the policy chose the token, (B, T) bool.
        gamma: Discount per token, in (0, 1].
        gae_lambda: Trust in what was earned against what the values expect, in [0, 1].

    Returns:
        Advantages and returns without gradient, (B, T) each, in the unit of the rewards, float32 or float64; the
        returns are advantages + values, what the values should have been; both 0 outside the mask.

    Raises:
        ValueError: If gamma or gae_lambda is out of range or the shapes differ.

    Reference: Schulman et al. 2016, arXiv 1506.02438.
    """
    require_gamma(gamma)
    if not 0 <= gae_lambda <= 1:
        raise ValueError(f"gae_lambda must be in [0, 1], got {gae_lambda}; use 1.0 for returns less values.")
    require_shape(response_mask.shape, PER_TOKEN, token_rewards=token_rewards, values=values)
    values = _wide(values).masked_fill(~response_mask, 0.0)
    # Without carry-over a sum is the token's own value, and outside the mask that of the next token.
    next_values = _discounted_sums(values, response_mask, 0.0).roll(-1, dims=-1)
    next_values[:, -1:] = 0.0
    errors = _wide(token_rewards) + gamma * next_values - values
    advantages = _discounted_sums(errors, response_mask, gamma * gae_lambda).masked_fill(~response_mask, 0.0)
    return advantages, advantages + values


def _discounted_sums(values: Tensor, mask: Tensor, discount: float) -> Tensor:
    """Each token's value plus `discount` times the next token's sum, (B, T), in log T steps.

    Outside the mask stands the sum of the next token, 0 behind the last one.
    """
    sums = values.masked_fill(~mask, 0.0)
    factors = torch.ones_like(sums).masked_fill(mask, discount)
    span = 1  # a sum reaches over `span` positions, a factor is the discount over them
    while span < mask.shape[-1]:
        sums = torch.cat([sums[:, :-span] + factors[:, :-span] * sums[:, span:], sums[:, -span:]], -1)
        factors = torch.cat([factors[:, :-span] * factors[:, span:], factors[:, -span:]], -1)
        span *= 2
    return sums


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def adapted_kl_coef(
    kl_coef: float, observed_kl: float, target_kl: float, *, horizon: float, num_samples: float
) -> float:
    """The weight of the KL penalty for the next batch: larger if the KL was above its target, smaller if below.

    A proportional controller in log space; the relative error is clipped to 20 %.

    Args:
        kl_coef: Weight of the batch that was observed, in reward per nat.
        observed_kl: Mean KL(policy || reference) of a response of that batch, over all processes, in nats; NaN, as of
            a batch without a row, leaves the weight as it is.
        target_kl: KL of a response to hold, in nats, above 0.
        horizon: Responses in which an error of 20 % changes the weight by about 20 %; at least num_samples. With
            num_samples = horizon / 10 it is the controller of the paper.
        num_samples: Responses in the batch, over all processes.

    Returns:
        The new weight, between 0.8 and 1.2 times the old one.

    Raises:
        ValueError: If target_kl is not above 0, or num_samples is negative or above horizon.

    Reference: Ziegler et al. 2019, arXiv 1909.08593, section 2.2.
    """
    if not target_kl > 0:
        raise ValueError(f"target_kl is a KL in nats to hold and must be above 0, got {target_kl}.")
    if not 0 <= num_samples <= horizon or horizon == 0:
        raise ValueError(
            f"horizon must be at least num_samples, the responses of one batch, got {horizon} and {num_samples}; "
            "a shorter one would make the weight swing."
        )
    if math.isnan(observed_kl):
        return kl_coef
    error = min(max(observed_kl / target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_samples / horizon)
