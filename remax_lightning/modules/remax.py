"""ReMax (Li et al. 2024, arXiv 2310.10505): REINFORCE with the reward of the greedy response as the baseline.

There is no value model, no ratio of probabilities, no clipping of one and no whitening of advantages.
"""

from typing import Any, ClassVar

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from remax_lightning.functional.advantages import KLForm
from remax_lightning.models.lora import LoRA
from remax_lightning.models.source import ModelLike
from remax_lightning.modules.baseline import BaselineModule
from remax_lightning.modules.kl_control import KLControl
from remax_lightning.modules.optimizers import LearningRateSchedule, policy_gradient_adamw
from remax_lightning.rewards import RewardLike
from remax_lightning.rollout import Responses, Rollout, RolloutEngine, Sampling


class ReMax(BaselineModule):
    """ReMax: for each prompt a sampled response y and the greedy one g; the gradient of log p(y) times r(y) - r(g).

    Of several samples of a prompt (``sampling.num_samples``) each has the one greedy response as its baseline.

    Args:
        greedy_max_new_tokens: Longest greedy response. The paper's fast variant has half of ``max_new_tokens``: the
            baseline stays valid, since it still does not depend on the sample.

    Raises:
        ValueError: If an argument is out of its range.
    """

    decodes_greedy: ClassVar[bool] = True

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
        greedy_max_new_tokens: int | None = None,
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
        if greedy_max_new_tokens is not None and greedy_max_new_tokens < 1:
            raise ValueError(f"greedy_max_new_tokens must be at least 1, got {greedy_max_new_tokens}")
        self.greedy_max_new_tokens = greedy_max_new_tokens

    def collect(self, batch: dict[str, Any]) -> Rollout:
        """Sample y, decode g, score both: r(g) is the baseline of r(y)."""
        samples, greedy = self.collector.sample_and_greedy(
            self.policy, batch, self.global_step, self.greedy_max_new_tokens
        )
        rewards, baselines = self.collector.score(batch, samples, greedy)
        num_samples = self.sampling.num_samples
        self.train_means.add("identical_pairs", identical_rows(samples, greedy, num_samples))
        return self.collector.rollout(samples, rewards, baselines.repeat_interleave(num_samples))


def identical_rows(sampled: Responses, greedy: Responses, num_samples: int) -> Tensor:
    """Where a sampled response is the greedy one, token for token, so that its advantage is 0, (B * num_samples,)."""
    width = max(sampled.response_ids.shape[1], greedy.response_ids.shape[1])
    tokens = [
        F.pad(
            responses.response_ids.masked_fill(~responses.response_mask, -1),
            (0, width - responses.response_ids.shape[1]),
            value=-1,
        )
        for responses in (sampled, greedy)
    ]
    return (tokens[0] == tokens[1].repeat_interleave(num_samples, dim=0)).all(dim=1)
