"""ReMax (Li et al. 2024, arXiv 2310.10505): REINFORCE with the reward of the greedy response as the baseline.

There is no value model, no ratio of probabilities, no clipping of one and no whitening of advantages.
"""

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from remax_lightning.modules.baseline import BaselineModule
from remax_lightning.rollout import Rollout


class ReMax(BaselineModule):
    """ReMax: for each prompt a sampled response y and the greedy one g; the gradient of log p(y) times r(y) - r(g).

    Of several samples of a prompt (``sampling.num_samples``) each has the one greedy response as its baseline.

    Args:
        greedy_max_new_tokens: Longest greedy response. The paper's fast variant has half of ``max_new_tokens``: the
            baseline stays valid, since it still does not depend on the sample.
        **kwargs: As in BaselineModule.

    Raises:
        ValueError: If an argument is out of its range.
    """

    decodes_greedy: ClassVar[bool] = True

    def __init__(self, greedy_max_new_tokens: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if greedy_max_new_tokens is not None and greedy_max_new_tokens < 1:
            raise ValueError(f"greedy_max_new_tokens must be at least 1, got {greedy_max_new_tokens}")
        self.greedy_max_new_tokens = greedy_max_new_tokens

    def collect(self, batch: dict[str, Any]) -> Rollout:
        """Sample y, decode g, score both: r(g) is the baseline of r(y)."""
        sampled, greedy = self.generate(batch, greedy=True, greedy_max_new_tokens=self.greedy_max_new_tokens)
        assert greedy is not None
        rewards, baselines = self.score(batch, sampled, greedy)
        num_samples = self.sampling.num_samples
        self.train_means.add("identical_pairs", identical_rows(sampled, greedy, num_samples))
        with self.phase("reference"):
            ref_log_probs = self.reference_log_probs(sampled)
        return replace(
            sampled,
            rewards=rewards,
            baselines=baselines.repeat_interleave(num_samples),
            ref_log_probs=ref_log_probs,
        )


def identical_rows(sampled: Rollout, greedy: Rollout, num_samples: int) -> Tensor:
    """True where a sampled response is the greedy one, token for token: it teaches nothing, (B * num_samples,)."""
    width = max(sampled.response_ids.shape[1], greedy.response_ids.shape[1])
    tokens = [
        F.pad(
            rollout.response_ids.masked_fill(~rollout.response_mask, -1),
            (0, width - rollout.response_ids.shape[1]),
            value=-1,
        )
        for rollout in (sampled, greedy)
    ]
    return (tokens[0] == tokens[1].repeat_interleave(num_samples, dim=0)).all(dim=1)
