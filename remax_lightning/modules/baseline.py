"""Methods whose advantage is a response's reward less a baseline: ReMax, REINFORCE and RLOO differ in the baseline."""

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from remax_lightning.functional.advantages import KLForm, baseline_advantages, check_baseline_arguments
from remax_lightning.functional.losses import kl_penalty_loss
from remax_lightning.models.lora import LoRA
from remax_lightning.models.source import ModelLike
from remax_lightning.modules.kl_control import KLControl
from remax_lightning.modules.optimizers import LearningRateSchedule, policy_gradient_adamw
from remax_lightning.modules.policy_gradient import PolicyGradientModule, scored_rows
from remax_lightning.rewards import RewardLike
from remax_lightning.rollout import Rollout, RolloutEngine, Sampling


class BaselineModule(PolicyGradientModule):
    """A policy-gradient method with a baseline for each response; a method says which by ``collect``.

    Args:
        kl_form: ``full_step``: a token's advantage holds the KL from itself to the end, the gradient of reward minus
            kl_coef times KL. ``one_step``: its own KL alone, as in the official ReMax code.
        gamma: The k-th token from the end gets the advantage times gamma to the k, counted from 1.
        reward_clip: Bound of |reward - baseline|; the default is none. The official ReMax recipes have 5, and 1 for
            Mistral.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        policy: ModelLike,
        reward: RewardLike,
        sampling: Sampling,
        engine: RolloutEngine | None = None,
        seed: int | None = None,
        reference: ModelLike | None = None,
        judge: RewardLike | None = None,
        kl_coef: float = 0.05,
        kl: KLControl = KLControl(),
        missing_stop_penalty: float = 0.0,
        max_log_prob_drift: float | None = None,
        optimizer: OptimizerCallable = policy_gradient_adamw,
        kl_form: KLForm = "full_step",
        gamma: float = 1.0,
        reward_clip: float | None = None,
        lr_schedule: LearningRateSchedule = "cosine",
        warmup_fraction: float = 0.0,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        max_grad_norm: float | None = 1.0,
        activation_checkpointing: bool = False,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__(
            policy=policy,
            reward=reward,
            sampling=sampling,
            engine=engine,
            seed=seed,
            reference=reference,
            judge=judge,
            kl_coef=kl_coef,
            kl=kl,
            missing_stop_penalty=missing_stop_penalty,
            max_log_prob_drift=max_log_prob_drift,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            warmup_fraction=warmup_fraction,
            micro_batch_size=micro_batch_size,
            micro_batch_tokens=micro_batch_tokens,
            max_grad_norm=max_grad_norm,
            activation_checkpointing=activation_checkpointing,
            lora=lora,
        )
        check_baseline_arguments(kl_coef, kl_form, gamma, reward_clip)
        self.kl_form, self.gamma, self.reward_clip = kl_form, gamma, reward_clip

    def advantages(self, rollout: Rollout) -> Tensor:
        """Reward less baseline, and the KL penalty, at every token."""
        weight = self.kl_controller.weight
        in_loss = self.kl.in_loss and weight > 0
        advantages = baseline_advantages(
            rollout.rewards,
            rollout.baselines,
            rollout.response_mask,
            log_probs=rollout.log_probs,
            ref_log_probs=rollout.ref_log_probs,
            kl_coef=0.0 if in_loss else weight,
            kl_form=self.kl_form,
            kl_estimator=self.kl.estimator,
            gamma=self.gamma,
            reward_clip=self.reward_clip,
        )
        return advantages - weight * self._kl_gradient(rollout) if in_loss else advantages

    def metrics(self, rollout: Rollout) -> dict[str, Tensor]:
        """Also how good the baselines are."""
        rewards, baselines, is_scored = rollout.rewards, rollout.baselines, scored_rows(rollout)
        of_baselines = {
            "baseline_reward": baselines,
            "baseline_gap": rewards - baselines,
            "beats_baseline": (rewards > baselines).float(),
        }
        of_scored = {name: values.masked_fill(~is_scored, torch.nan) for name, values in of_baselines.items()}
        correlation = self._correlation(rewards[is_scored], baselines[is_scored])
        return {**super().metrics(rollout), **of_scored, "baseline_correlation": correlation}

    def _correlation(self, first: Tensor, second: Tensor) -> Tensor:
        """Pearson's correlation over the rows of all ranks; 0 if one of the two does not vary."""
        pairs = torch.stack([torch.ones_like(first), first, second]).double()
        # sums of products of 1, x and y: the count, both sums, both sums of squares and that of the products
        sums = self.sum_over_ranks(pairs @ pairs.T)
        covariance = sums[0, 0] * sums - torch.outer(sums[0], sums[0])
        correlation = covariance[1, 2] / (covariance[1, 1] * covariance[2, 2]).clamp(min=0).sqrt()
        return correlation.nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1)

    def _kl_gradient(self, rollout: Rollout) -> Tensor:
        """Gradient of the KL estimator by each token's log-prob, (B, T): known before the training forward."""
        assert rollout.ref_log_probs is not None
        with torch.enable_grad():
            log_probs = rollout.log_probs.detach().requires_grad_()
            penalty = kl_penalty_loss(
                log_probs, rollout.ref_log_probs, rollout.response_mask, estimator=self.kl.estimator, num_tokens=1
            )
        return torch.autograd.grad(penalty, log_probs)[0]
