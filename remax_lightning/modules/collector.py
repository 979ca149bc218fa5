"""From a batch of prompts to a rollout: responses, their rewards and the reference's log-probs."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from remax_lightning.models.next_token import log_probs_of
from remax_lightning.models.reference import Reference
from remax_lightning.rewards.scorer import Scorer
from remax_lightning.rollout import Responder, Responses, Rollout, Samples, Sampling
from remax_lightning.rollout.per_token import per_token
from remax_lightning.rollout.responder import raw_columns


@dataclass(frozen=True)
class Collector:
    """Draws and scores the responses that a policy learns from.

    Args:
        responder: Draws the responses.
        sampling: How.
        scorer: Scores them.
        missing_stop_penalty: Subtracted from the reward of a response that did not end within its longest length.
        reference: The policy of the KL penalty; None without one.
        micro_batches: From the lengths of rows, (B,), to row indices of each forward pass of the reference.
        phase: Times a named phase.
    """

    responder: Responder
    sampling: Sampling
    scorer: Scorer
    missing_stop_penalty: float
    reference: Reference | None
    micro_batches: Callable[[Tensor], list[Tensor]]
    phase: Callable[[str], AbstractContextManager[None]]

    def sample(self, policy: PreTrainedModel, batch: dict[str, Any], step: int) -> Rollout:
        """Sampled responses with their rewards and the reference's log-probs, and baselines of 0."""
        with self.phase("rollout"):
            samples = self.responder.sample(policy, batch, self.sampling, step=step)
        (rewards,) = self.score(batch, samples)
        return self.rollout(samples, rewards, torch.zeros_like(rewards))

    def sample_and_greedy(
        self, policy: PreTrainedModel, batch: dict[str, Any], step: int, greedy_max_new_tokens: int | None = None
    ) -> tuple[Samples, Responses]:
        """Sampled responses, and the greedy one to each prompt; not scored yet."""
        with self.phase("rollout"):
            return self.responder.sample_and_greedy(
                policy, batch, self.sampling, step=step, greedy_max_new_tokens=greedy_max_new_tokens
            )

    def score(self, batch: dict[str, Any], *responses: Responses) -> list[Tensor]:
        """Rewards of lists of responses to a batch, less the penalty of those that did not end, (B,) each.

        The penalty is taken from sampled and greedy responses, or the advantage would be biased.
        """
        with self.phase("reward"):
            texts = map(self.responder.texts, responses)
            device = responses[0].response_ids.device
            rewards = self.scorer.score(raw_columns(batch), *texts, device=device)
        pairs = zip(rewards, responses, strict=True)
        return [each - self.missing_stop_penalty * of.truncated for each, of in pairs]

    def rollout(self, samples: Samples, rewards: Tensor, baselines: Tensor) -> Rollout:
        """Samples with their rewards and baselines, (B,) each, and with the reference's log-probs."""
        with self.phase("reference"):
            rollout = samples.scored(rewards, baselines, self.ref_log_probs(samples))
        if missing := int((~rollout.has_finite_reference).sum()):
            cause = "the reference's log-probs were not finite"
            sentence = f"{cause} for {missing} of {len(rewards)} responses, which are dropped"
            self.scorer.failures.count(cause, sentence, missing)
        return rollout

    def ref_log_probs(self, samples: Samples) -> Tensor | None:
        """Log-probs of the response tokens under the reference, nats, (B, T); None without one."""
        if self.reference is None:
            return None
        read = partial(log_probs_of, temperature=self.sampling.temperature)
        with self.reference.active() as model:
            return per_token(read, model, samples, self.micro_batches(samples.total_lengths))
