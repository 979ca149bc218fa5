"""The loop that every policy-gradient method shares: collect, advantages, loss, one optimizer step."""

import time
from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from remax_lightning.models.next_token import policy_gradient_of
from remax_lightning.modules.scored_policy import ScoredPolicyModule, response_kl
from remax_lightning.rollout import Rollout


class PolicyGradientModule(ScoredPolicyModule):
    """A policy that learns from the rewards of its own responses.

    A method overrides ``collect`` (what is sampled and scored), ``advantages`` (a number for each response token) and
    at most ``loss``.

    Args:
        missing_stop_penalty: Taken from the reward of a response that did not end within its longest length.
        max_log_prob_drift: A step whose mean difference between the sampler's log-probs and those of training is above
            this, nats per token, is skipped and counted; null skips none.
        **kwargs: As in ScoredPolicyModule.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self, missing_stop_penalty: float = 0.0, max_log_prob_drift: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if max_log_prob_drift is not None and not max_log_prob_drift > 0:
            raise ValueError(f"max_log_prob_drift must be positive, or null for no limit, got {max_log_prob_drift}")
        if missing_stop_penalty < 0:
            raise ValueError(f"missing_stop_penalty is taken from the reward: 0 or more, got {missing_stop_penalty}")
        self.missing_stop_penalty, self.max_log_prob_drift = missing_stop_penalty, max_log_prob_drift
        self.drift: list[Tensor] = []

    @abstractmethod
    def collect(self, batch: dict[str, Any]) -> Rollout:
        """Responses to a batch of prompts with rewards, baselines and what else the advantages need."""

    @abstractmethod
    def advantages(self, rollout: Rollout) -> Tensor:
        """Weight of each response token's log-prob, (B, T)."""

    def loss(self, rollout: Rollout, advantages: Tensor, num_tokens: Tensor) -> Tensor:
        """Loss of some rows with their advantages, (B, T), divided by the number of tokens of the global batch."""
        coefficients = advantages[rollout.response_mask] / num_tokens
        sequences, temperature = rollout.sequences(), self.sampling.temperature
        loss, log_probs, entropy = policy_gradient_of(self.policy, *sequences, coefficients, temperature=temperature)
        self.train_means.add("entropy", entropy)
        self.drift.append((log_probs - rollout.log_probs[rollout.response_mask]).abs())
        return loss

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One rollout and one optimizer step."""
        start = time.perf_counter()
        rollout = self.keep_scored(self.collect(batch))
        advantages = self.advantages(rollout)
        num_tokens = self.terms_per_process(rollout.response_mask.sum())

        # a row without advantage has no gradient; one is kept, as every process has to take part in a step
        taught = advantages.any(dim=1).nonzero()[:, 0]
        taught = taught if len(taught) > 0 else taught.new_zeros(1)

        def loss(index: Tensor) -> Tensor:
            rows = taught[index]
            part = rollout.rows(rows)
            return self.loss(part, advantages[rows, : part.response_ids.shape[1]], num_tokens)

        with self.phase("update"):
            self.update(rollout.total_lengths[taught], loss, num_tokens)
        self.train_means.add("advantage_mean", advantages, rollout.response_mask)
        self.seconds["step"] = time.perf_counter() - start
        self.train_means.add("tokens_per_second", num_tokens * self.trainer.world_size / self.seconds["step"])
        self.log_training(progress=("reward", "kl"))

    def generate(
        self, batch: dict[str, Any], *, greedy: bool, greedy_max_new_tokens: int | None = None
    ) -> tuple[Rollout, Rollout | None]:
        """Responses of the policy at this step."""
        with self.phase("rollout"):
            return self.respond(
                self.policy,
                batch,
                self.sampling,
                step=self.global_step,
                greedy=greedy,
                greedy_max_new_tokens=greedy_max_new_tokens,
            )

    def accepts_step(self) -> bool:
        """Whether the sampler's log-probs are close enough to those of training; notes how close."""
        drift = torch.cat(self.drift)
        self.drift = []
        self.train_means.add("log_prob_drift", drift)
        if self.max_log_prob_drift is None:
            return True
        total, count = (self.terms_per_process(each.sum()) for each in (drift, torch.ones_like(drift)))
        return bool(total <= self.max_log_prob_drift * count)

    def score(self, batch: dict[str, Any], *rollouts: Rollout) -> list[Tensor]:
        """Rewards of the responses to a batch, less the penalty of those that did not end."""
        with self.phase("reward"):
            rewards = self.rewards_of(self.reward, batch, *map(self.texts, rollouts))
        pairs = zip(rewards, rollouts, strict=True)
        return [each - self.missing_stop_penalty * rollout.truncated for each, rollout in pairs]

    def keep_scored(self, rollout: Rollout) -> Rollout:
        """Drop the rows whose reward or baseline is not finite: no token of theirs counts; and note the metrics."""
        scored = torch.isfinite(rollout.rewards) & torch.isfinite(rollout.baselines)
        means = self.train_means
        means.add("reward", rollout.rewards, scored)
        means.add("baseline_reward", rollout.baselines, scored)
        means.add("response_length", rollout.lengths)
        means.add("truncated", rollout.truncated)
        means.add("rows_dropped", (~scored).sum() * self.trainer.world_size)
        if rollout.ref_log_probs is not None:
            means.add("kl", response_kl(rollout), scored)
        return replace(
            rollout,
            response_mask=rollout.response_mask & scored[:, None],
            rewards=rollout.rewards.masked_fill(~scored, 0.0),
            baselines=rollout.baselines.masked_fill(~scored, 0.0),
        )
