"""The loop that every policy-gradient method shares: collect, advantages, loss, one optimizer step."""

import time
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from remax_lightning.functional.returns import adapted_kl_coef
from remax_lightning.models.next_token import policy_gradient_of
from remax_lightning.modules.kl_control import KLControl
from remax_lightning.modules.scored_policy import ScoredPolicyModule, response_kl
from remax_lightning.rollout import Rollout


class PolicyGradientModule(ScoredPolicyModule):
    """A policy that learns from the rewards of its own responses.

    A method overrides ``collect`` (what is sampled and scored), ``advantages`` (a number for each response token) and
    at most ``losses`` and ``learn``.

    Args:
        kl: How the KL penalty is taken and steered.
        missing_stop_penalty: Taken from the reward of a response that did not end within its longest length.
        max_log_prob_drift: A step whose mean difference between the sampler's log-probs and those of training is above
            this, nats per token, is skipped and counted; null skips none.
        **kwargs: As in ScoredPolicyModule.

    Raises:
        ValueError: If an argument is out of its range.
    """

    decodes_greedy: ClassVar[bool] = False

    def __init__(
        self,
        kl: KLControl = KLControl(),
        missing_stop_penalty: float = 0.0,
        max_log_prob_drift: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.kl_coef == 0 and kl != KLControl():
            raise ValueError("kl says how a KL penalty is taken, but kl_coef is 0; set kl_coef, or leave kl out")
        if max_log_prob_drift is not None and not max_log_prob_drift > 0:
            raise ValueError(f"max_log_prob_drift must be positive, or null for no limit, got {max_log_prob_drift}")
        if missing_stop_penalty < 0:
            raise ValueError(f"missing_stop_penalty is taken from the reward: 0 or more, got {missing_stop_penalty}")
        self.missing_stop_penalty, self.max_log_prob_drift = missing_stop_penalty, max_log_prob_drift
        self.drift: list[Tensor] = []
        self.kl = kl
        if kl.target is not None:
            self.register_buffer("adapted_kl_coef", torch.tensor(self.kl_coef, dtype=torch.float64))

    adapted_kl_coef: Tensor

    @property
    def kl_weight(self) -> float:
        """Weight of the KL penalty at this step, reward per nat."""
        return self.kl_coef if self.kl.target is None else float(self.adapted_kl_coef)

    @abstractmethod
    def collect(self, batch: dict[str, Any]) -> Rollout:
        """Responses to a batch of prompts with rewards, baselines and what else the advantages need."""

    @abstractmethod
    def advantages(self, rollout: Rollout) -> Tensor:
        """Weight of each response token's log-prob, (B, T)."""

    def losses(self, rollout: Rollout, advantages: Tensor, num_tokens: Tensor) -> Iterator[Tensor]:
        """Loss of some rows with their advantages, (B, T), divided by the number of tokens of the global batch."""
        coefficients = advantages[rollout.response_mask] / num_tokens
        sequences, temperature = rollout.sequences(), self.sampling.temperature
        loss, log_probs, entropy = policy_gradient_of(self.policy, *sequences, coefficients, temperature=temperature)
        self.train_means.add("entropy", entropy)
        self.drift.append((log_probs - rollout.log_probs[rollout.response_mask]).abs())
        yield loss

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One rollout and what is learned from it."""
        start = time.perf_counter()
        num_responses = len(batch["prompt_index"]) * self.sampling.num_samples * self.trainer.world_size
        self._check_horizon(num_responses)
        rollout = self.mask_unscored_rows(self.collect(batch))
        advantages = self.advantages(rollout)
        with self.phase("update"):
            self.learn(rollout, advantages)
        self.train_means.add("advantage_mean", advantages, rollout.response_mask)
        self.seconds["step"] = time.perf_counter() - start
        self.train_means.add(
            "tokens_per_second", rollout.lengths.sum() * self.trainer.world_size / self.seconds["step"]
        )
        if self.kl_coef > 0:
            self.train_means.add("kl_coef", torch.tensor(self.kl_weight, device=self.device))
        means = self.log_training(progress=("reward", "kl"))
        self.end_step(means, num_responses)

    def rows_with_gradient(self, rollout: Rollout, advantages: Tensor) -> Tensor:
        """True for the rows that have a gradient, (B,): those with an advantage."""
        return advantages.any(dim=1)

    def end_step(self, means: dict[str, Tensor], num_responses: int) -> None:
        """Steer by what the step has found.

        Args:
            means: Metrics of the step, over all processes.
            num_responses: Responses of the step, of all processes.
        """
        if "kl" not in means:
            return
        kl = float(means["kl"])
        if self.kl.target is not None:
            adapted = adapted_kl_coef(
                self.kl_weight, kl, self.kl.target, horizon=self.kl.horizon, num_samples=num_responses
            )
            self.adapted_kl_coef.fill_(adapted)
        if self.kl.limit is not None and kl > self.kl.limit:
            rank_zero_warn(f"training ends: the mean KL of a response is {kl:.4g} nats, above kl.limit={self.kl.limit}")
            self.trainer.should_stop = True

    def _check_horizon(self, num_responses: int) -> None:
        if self.kl.target is not None and num_responses > self.kl.horizon:
            raise ValueError(
                f"kl.horizon must be at least the {num_responses} responses of a step, got {self.kl.horizon}: a "
                "shorter one would make kl_coef swing"
            )

    def learn(self, rollout: Rollout, advantages: Tensor) -> None:
        """One optimizer step on a rollout."""
        num_tokens = self.mean_count_per_rank(rollout.response_mask.sum())
        active = self.rows_with_gradient(rollout, advantages).nonzero()[:, 0]
        active = active if len(active) > 0 else active.new_zeros(1)  # every process has to take part in a step

        def losses(index: Tensor) -> Iterator[Tensor]:
            rows = active[index]
            part = rollout.rows(rows)
            return self.losses(part, advantages[rows, : part.response_ids.shape[1]], num_tokens)

        self.update(rollout.total_lengths[active], losses, num_tokens)

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

    def sample(self, batch: dict[str, Any]) -> Rollout:
        """Sampled responses with their rewards and the reference's log-probs, and nothing to compare them with yet."""
        sampled, _ = self.generate(batch, greedy=False)
        (rewards,) = self.score(batch, sampled)
        with self.phase("reference"):
            ref_log_probs = self.reference_log_probs(sampled)
        return replace(sampled, rewards=rewards, ref_log_probs=ref_log_probs)

    def others_mean(self, rewards: Tensor) -> Tensor:
        """Mean of all other finite rewards of the batch, over all processes, (B,)."""
        known = rewards.isfinite()
        own = torch.where(known, rewards, 0.0)
        total, count = (self.sum_over_ranks(each.sum()) for each in (own, known))
        return ((total - own) / (count - known.double())).to(rewards.dtype)

    def accepts_step(self) -> bool:
        """Whether the sampler's log-probs are close enough to those of training; notes how close."""
        drift = torch.cat(self.drift)
        self.drift = []
        self.train_means.add("log_prob_drift", drift)
        if self.max_log_prob_drift is None:
            return True
        total, count = (self.mean_count_per_rank(each.sum()) for each in (drift, torch.ones_like(drift)))
        return bool(total <= self.max_log_prob_drift * count)

    def score(self, batch: dict[str, Any], *rollouts: Rollout) -> list[Tensor]:
        """Rewards of the responses to a batch, less the penalty of those that did not end."""
        with self.phase("reward"):
            rewards = self.rewards_of(self.reward, batch, *map(self.texts, rollouts))
        pairs = zip(rewards, rollouts, strict=True)
        return [each - self.missing_stop_penalty * rollout.truncated for each, rollout in pairs]

    def mask_unscored_rows(self, rollout: Rollout) -> Rollout:
        """Drop the rows whose reward or baseline is not finite: no token of theirs counts; and note the metrics."""
        scored = torch.isfinite(rollout.rewards) & torch.isfinite(rollout.baselines)
        means = self.train_means
        means.add("reward", rollout.rewards, scored)
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
