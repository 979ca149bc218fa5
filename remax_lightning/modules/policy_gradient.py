"""The loop that every policy-gradient method shares: collect, advantages, loss, one optimizer step."""

import time
from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from remax_lightning.functional.log_probs import entropy, token_log_probs
from remax_lightning.functional.losses import policy_gradient_loss
from remax_lightning.modules.policy import logits_of
from remax_lightning.modules.scored_policy import ScoredPolicyModule, response_kl
from remax_lightning.rollout import Rollout


class PolicyGradientModule(ScoredPolicyModule):
    """A policy that learns from the rewards of its own responses.

    A method overrides ``collect`` (what is sampled and scored), ``advantages`` (a number for each response token) and
    at most ``loss``.

    Args:
        missing_stop_penalty: Taken from the reward of a response that did not end within its longest length.
        **kwargs: As in ScoredPolicyModule.
    """

    def __init__(self, missing_stop_penalty: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if missing_stop_penalty < 0:
            raise ValueError(f"missing_stop_penalty is taken from the reward: 0 or more, got {missing_stop_penalty}")
        self.missing_stop_penalty = missing_stop_penalty

    @abstractmethod
    def collect(self, batch: dict[str, Any]) -> Rollout:
        """Responses to a batch of prompts with rewards, baselines and what else the advantages need."""

    @abstractmethod
    def advantages(self, rollout: Rollout) -> Tensor:
        """Weight of each response token's log-prob, (B, T)."""

    def loss(self, log_probs: Tensor, advantages: Tensor, rollout: Rollout, num_tokens: Tensor) -> Tensor:
        """Loss of some rows, (B, T) inputs, divided by the number of tokens of the global batch."""
        return policy_gradient_loss(log_probs, advantages, rollout.response_mask, num_tokens=num_tokens)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One rollout and one optimizer step."""
        start = time.perf_counter()
        rollout = self.keep_scored(self.collect(batch))
        advantages = self.advantages(rollout)
        num_tokens = self.terms_per_process(rollout.response_mask.sum())

        def loss(rows: Tensor) -> Tensor:
            part = rollout.rows(rows)
            log_probs = self.training_log_probs(part)
            return self.loss(log_probs, advantages[rows, : log_probs.shape[1]], part, num_tokens)

        with self.phase("update"):
            self.update(len(advantages), loss, num_tokens)
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

    def score(self, batch: dict[str, Any], rollout: Rollout) -> Tensor:
        """Rewards of the responses to a batch, less the penalty of those that did not end."""
        with self.phase("reward"):
            rewards = self.rewards_of(self.reward, batch, self.texts(rollout))
        return rewards - self.missing_stop_penalty * rollout.truncated

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

    def training_log_probs(self, rollout: Rollout) -> Tensor:
        """Log-probs of the response tokens with gradient, (B, T); notes entropy and the drift from the sampler's."""
        logits = logits_of(self.policy, rollout)
        log_probs = token_log_probs(logits, rollout.response_ids, temperature=self.sampling.temperature)
        with torch.no_grad():
            values = entropy(logits, temperature=self.sampling.temperature)
            self.train_means.add("entropy", values, rollout.response_mask)
            drift = (log_probs - rollout.log_probs).abs()
            self.train_means.add("log_prob_drift", drift, rollout.response_mask)
        return log_probs
