"""REINFORCE (Williams 1992): the policy gradient without a baseline, or with one that costs no further response."""

from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from remax_lightning.functional.advantages import KLForm, mean_of_others
from remax_lightning.models.lora import LoRA
from remax_lightning.models.source import ModelLike
from remax_lightning.modules.baseline import BaselineModule
from remax_lightning.modules.kl_control import KLControl
from remax_lightning.modules.optimizers import LearningRateSchedule, policy_gradient_adamw
from remax_lightning.rewards import RewardLike
from remax_lightning.rollout import Rollout, RolloutEngine, Sampling

Baseline = Literal["none", "batch_mean", "moving_average"]


class Reinforce(BaselineModule):
    """REINFORCE: for each prompt sampled responses; the gradient of log p(y) times r(y) - b.

    Args:
        baseline: What b is. ``none``: 0. ``batch_mean``: the mean reward of the batch's other responses, over all
            ranks. ``moving_average``: of the steps before.
        decay: Weight of the past in a moving average.

    Raises:
        ValueError: If an argument is out of its range.
    """

    moving_average: Tensor

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
        baseline: Baseline = "moving_average",
        decay: float = 0.9,
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
            kl_form=kl_form,
            gamma=gamma,
            reward_clip=reward_clip,
            lr_schedule=lr_schedule,
            warmup_fraction=warmup_fraction,
            micro_batch_size=micro_batch_size,
            micro_batch_tokens=micro_batch_tokens,
            max_grad_norm=max_grad_norm,
            activation_checkpointing=activation_checkpointing,
            lora=lora,
        )
        if not 0 <= decay < 1:
            raise ValueError(f"decay is the weight of the past in a moving average, from 0 to below 1, got {decay}")
        self.baseline, self.decay = baseline, decay
        if baseline == "moving_average":
            self.register_buffer("moving_average", torch.tensor(torch.nan))

    def collect(self, batch: dict[str, Any]) -> Rollout:
        """Sample y, score it, compare with b."""
        rollout = super().collect(batch)
        return replace(rollout, baselines=self._baselines(rollout.rewards))

    def _baselines(self, rewards: Tensor) -> Tensor:
        if self.baseline == "batch_mean":
            return mean_of_others(rewards, self.sum_over_ranks)
        if self.baseline == "moving_average":
            return torch.zeros_like(rewards) + self.moving_average.nan_to_num(0.0)  # the first step has no past
        return torch.zeros_like(rewards)

    def end_step(self, means: dict[str, Tensor], num_responses: int) -> None:
        """Update the moving average."""
        super().end_step(means, num_responses)
        if self.baseline == "moving_average" and bool(means["reward"].isfinite()):
            past = means["reward"] if bool(self.moving_average.isnan()) else self.moving_average
            self.moving_average.copy_(self.decay * past + (1 - self.decay) * means["reward"])
