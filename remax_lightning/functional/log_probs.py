"""Log-probabilities of tokens and what is built from them: entropy, KL estimators, masked means.

Everything is in nats. Half-precision logits are taken to float32 first; float64 stays float64.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from remax_lightning.functional._checks import require_shape


def token_log_probs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token under softmax(logits / temperature).

    `logits[:, t]` must be the prediction of `tokens[:, t]`: the caller shifts by one. The log-sum-exp form keeps one
    scaled (B, T, V) tensor for the backward pass, and no log-softmax beside it.

    Args:
        logits: Unnormalized scores, (B, T, V).
        tokens: Token ids, (B, T) long.
        temperature: Sampling temperature, above 0.

    Returns:
        Log-probabilities in nats, (B, T), float32 or float64.

    Raises:
        ValueError: If the temperature is not above 0, or tokens is not (B, T).
    """
    require_shape(logits.shape[:-1], "one id per position of logits, (B, T)", tokens=tokens)
    scores = _scale(logits, temperature)
    chosen = scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)  # (B, T)
    return chosen - scores.logsumexp(-1)


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature) at each position.

    A logit of -inf counts as probability 0: it adds nothing to the value and gets no gradient.

    Args:
        logits: Unnormalized scores, (B, T, V).
        temperature: Sampling temperature, above 0.

    Returns:
        Entropy in nats, (B, T), between 0 and log V.

    Raises:
        ValueError: If the temperature is not above 0.
    """
    log_probs = _scale(logits, temperature).log_softmax(-1)
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)  # 0 * -inf would be NaN
    return -(log_probs.exp() * finite).sum(-1)


def _scale(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(
            f"temperature divides the logits and must be above 0, got {temperature}; "
            "for greedy decoding take the argmax of the logits instead."
        )
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return scores if temperature == 1.0 else scores / temperature


def kl_k1(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Estimator k1 of KL(policy || reference) at tokens drawn from the policy: unbiased, either sign.

    Args:
        log_probs: Log-probabilities under the policy, in nats, (B, T).
        ref_log_probs: Log-probabilities of the same tokens under the reference, (B, T).

    Returns:
        log pi - log ref, in nats, (B, T).

    Reference: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    """
    return log_probs - ref_log_probs


def kl_k2(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Estimator k2 of KL(policy || reference): biased, never negative; its expected gradient is the KL's.

    Args:
        log_probs: Log-probabilities under the policy, in nats, (B, T).
        ref_log_probs: Log-probabilities of the same tokens under the reference, (B, T).

    Returns:
        Half the squared log-ratio, (B, T).

    Reference: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    """
    return 0.5 * (log_probs - ref_log_probs) ** 2


def kl_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Estimator k3 of KL(policy || reference) at tokens drawn from the policy: unbiased, never negative.

    Args:
        log_probs: Log-probabilities under the policy, in nats, (B, T).
        ref_log_probs: Log-probabilities of the same tokens under the reference, (B, T).

    Returns:
        ref / pi - 1 - log(ref / pi), in nats, (B, T).

    Reference: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    """
    log_ratio = ref_log_probs - log_probs
    return torch.expm1(log_ratio) - log_ratio


def response_kl(log_probs: Tensor, ref_log_probs: Tensor, response_mask: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) by each response: the sum of k1 over its tokens; unbiased.

    Args:
        log_probs: Log-probabilities under the policy, in nats, (B, T).
        ref_log_probs: Log-probabilities of the same tokens under the reference, (B, T).
        response_mask: True where the policy chose the token, (B, T) bool.

    Returns:
        KL in nats, (B,).
    """
    return kl_k1(log_probs, ref_log_probs).masked_fill(~response_mask, 0.0).sum(dim=1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values where the mask is True.

    Args:
        values: Any shape; may be NaN or infinite outside the mask.
        mask: Same shape, bool.

    Returns:
        Scalar in the unit of the values; 0 for an empty mask.
    """
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


KLEstimator = Literal["k1", "k2", "k3"]
KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
