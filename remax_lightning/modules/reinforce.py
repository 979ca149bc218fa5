"""REINFORCE (Williams 1992): the policy gradient with no baseline, or one that costs no further response."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from remax_lightning.modules.baseline import BaselineModule
from remax_lightning.rollout import Rollout

Baseline = Literal["none", "batch_mean", "moving_average"]


class Reinforce(BaselineModule):
    """REINFORCE: for each prompt sampled responses; the gradient of log p(y) times r(y) - b.

    Args:
        baseline: What b is. ``none``: 0. ``batch_mean``: the mean reward of the batch's other responses, over all
            processes. ``moving_average``: of the steps before.
        decay: Weight of what a moving average was before a step.
        **kwargs: As in BaselineModule.

    Raises:
        ValueError: If an argument is out of its range.
    """

    moving_average: Tensor

    def __init__(self, baseline: Baseline = "moving_average", decay: float = 0.9, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= decay < 1:
            raise ValueError(f"decay is the weight of the past in a moving average, from 0 to below 1, got {decay}")
        self.baseline, self.decay = baseline, decay
        if baseline == "moving_average":
            self.register_buffer("moving_average", torch.tensor(torch.nan))

    def collect(self, batch: dict[str, Any]) -> Rollout:
        """Sample y, score it, compare with b."""
        rollout = self.sample(batch)
        return replace(rollout, baselines=self._baselines(rollout.rewards))

    def _baselines(self, rewards: Tensor) -> Tensor:
        if self.baseline == "batch_mean":
            return self.others_mean(rewards)
        if self.baseline == "moving_average":
            return torch.zeros_like(rewards) + self.moving_average.nan_to_num(0.0)  # the first step has no past
        return torch.zeros_like(rewards)

    def end_step(self, means: dict[str, Tensor], num_responses: int) -> None:
        """Move the average on."""
        super().end_step(means, num_responses)
        if self.baseline == "moving_average" and bool(means["reward"].isfinite()):
            past = means["reward"] if bool(self.moving_average.isnan()) else self.moving_average
            self.moving_average.copy_(self.decay * past + (1 - self.decay) * means["reward"])
