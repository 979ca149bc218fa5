"""Methods whose advantage is a response's reward less a baseline: ReMax, REINFORCE and RLOO differ in the baseline."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from remax_lightning.functional.advantages import KLForm, baseline_advantages, check_baseline_arguments
from remax_lightning.functional.losses import kl_penalty_loss
from remax_lightning.modules.optimizers import policy_gradient_adamw
from remax_lightning.modules.policy_gradient import PolicyGradientModule
from remax_lightning.rollout import Rollout


class BaselineModule(PolicyGradientModule):
    """A policy-gradient method with a baseline for each response; a method says which by ``collect``.

    Args:
        kl_form: ``full_step``: a token answers for the KL from itself to the end, the gradient of reward minus
            kl_coef times KL. ``one_step``: for its own alone, as in the official ReMax code.
        gamma: The k-th token from the end gets the advantage times gamma to the k, counted from 1.
        reward_clip: Bound of |reward - baseline|; the default is none. The official ReMax recipes have 5, and 1 for
            Mistral.
        optimizer: Optimizer of the policy; weight decay is left off norms and biases.
        **kwargs: As in PolicyGradientModule.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        kl_form: KLForm = "full_step",
        gamma: float = 1.0,
        reward_clip: float | None = None,
        optimizer: OptimizerCallable = policy_gradient_adamw,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        check_baseline_arguments(self.kl_coef, kl_form, gamma, reward_clip)
        self.kl_form, self.gamma, self.reward_clip = kl_form, gamma, reward_clip

    def advantages(self, rollout: Rollout) -> Tensor:
        """Reward less baseline, and the KL penalty, at every token."""
        in_loss = self.kl.in_loss and self.kl_weight > 0
        advantages = baseline_advantages(
            rollout.rewards,
            rollout.baselines,
            rollout.response_mask,
            log_probs=rollout.log_probs,
            ref_log_probs=rollout.ref_log_probs,
            kl_coef=0.0 if in_loss else self.kl_weight,
            kl_form=self.kl_form,
            kl_estimator=self.kl.estimator,
            gamma=self.gamma,
            reward_clip=self.reward_clip,
        )
        return advantages - self.kl_weight * self._kl_gradient(rollout) if in_loss else advantages

    def mask_unscored_rows(self, rollout: Rollout) -> Rollout:
        """As PolicyGradientModule's; and note how good the baselines are."""
        rewards, baselines = rollout.rewards, rollout.baselines
        scored = rewards.isfinite() & baselines.isfinite()
        self.train_means.add("baseline_reward", baselines, scored)
        self.train_means.add("baseline_gap", rewards - baselines, scored)
        self.train_means.add("beats_baseline", rewards > baselines, scored)
        self.train_means.add("baseline_correlation", self._correlation(rewards[scored], baselines[scored]))
        return super().mask_unscored_rows(rollout)

    def _correlation(self, first: Tensor, second: Tensor) -> Tensor:
        """Pearson's correlation over the rows of all processes; 0 if one of the two does not vary."""
        pairs = torch.stack([torch.ones_like(first), first, second]).double()
        # sums of products of 1, x and y: the count, both sums, both sums of squares and that of the products
        sums = self.sum_over_ranks(pairs @ pairs.T)
        covariance = sums[0, 0] * sums - torch.outer(sums[0], sums[0])
        correlation = covariance[1, 2] / (covariance[1, 1] * covariance[2, 2]).clamp(min=0).sqrt()
        return correlation.nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1)

    def _kl_gradient(self, rollout: Rollout) -> Tensor:
        """Gradient of the KL estimator by each token's log-prob, (B, T): known before the training forward, too."""
        assert rollout.ref_log_probs is not None
        with torch.enable_grad():
            log_probs = rollout.log_probs.detach().requires_grad_()
            penalty = kl_penalty_loss(
                log_probs, rollout.ref_log_probs, rollout.response_mask, estimator=self.kl.estimator, num_tokens=1
            )
        return torch.autograd.grad(penalty, log_probs)[0]
