"""RLOO (Ahmadian et al. 2024, arXiv 2402.14740): REINFORCE with a prompt's other responses as the baseline."""

from dataclasses import replace
from typing import Any

from remax_lightning.functional.advantages import leave_one_out_baselines
from remax_lightning.modules.baseline import BaselineModule
from remax_lightning.rollout import Rollout


class RLOO(BaselineModule):
    """RLOO: for each prompt several sampled responses; the gradient of log p(y) times r(y) - mean reward of the others.

    Args:
        sampling: How responses are drawn; ``num_samples`` has to be at least 2.

    Raises:
        ValueError: If an argument is out of its range.
    """

    min_samples = 2

    def collect(self, batch: dict[str, Any]) -> Rollout:
        """Sample y several times and score each."""
        rollout = super().collect(batch)
        return replace(rollout, baselines=leave_one_out_baselines(rollout.rewards, self.sampling.num_samples))
