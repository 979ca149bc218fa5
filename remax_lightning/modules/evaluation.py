"""A policy's responses to held-out prompts, scored, beside those of its reference."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from remax_lightning.functional.log_probs import response_kl
from remax_lightning.models.parallelize import Sharding
from remax_lightning.models.reference import Reference
from remax_lightning.modules.collector import Collector
from remax_lightning.modules.means import Means
from remax_lightning.rewards import Reward
from remax_lightning.rewards.process_state import preserved_process_state
from remax_lightning.rewards.scorer import Scorer
from remax_lightning.rollout.responder import as_rows, raw_columns

Row = dict[str, Any]


@dataclass
class Evaluation:
    """Scores a policy, and compares it with its reference on the same prompts.

    A prompt has the same random numbers in every evaluation, so two of them differ by the weights alone, and the
    reference's rows are computed once.

    Args:
        collector: Draws and scores the responses, one to each prompt.
        judge: A second reward; where there is one, it decides who wins.
        agree: Whether a condition is true on all ranks.
    """

    collector: Collector
    judge: Reward | None
    agree: Callable[[bool], bool]
    reference_rows: dict[tuple[int, ...], Row] = field(default_factory=dict)
    placed_on: torch.device | None = None

    def __post_init__(self) -> None:
        self.judge_scorer = None if self.judge is None else Scorer(self.judge, "judge")

    def place(self, device: torch.device, sharding: Sharding | None) -> None:
        """Load the rewards and move the reference, once for a device.

        Args:
            device: Where the policy computes.
            sharding: How models are sharded over ranks; None where each rank has full models.
        """
        if self.placed_on == device:
            return
        for reward in filter(None, (self.collector.scorer.reward, self.judge)):
            with preserved_process_state():
                reward.setup(device, sharding)
        if self.collector.reference is not None:
            self.collector.reference.to(device)
        self.placed_on = device

    def rows(self, policy: PreTrainedModel, batch: dict[str, Any], means: Means) -> list[Row]:
        """A row for each prompt: the data's columns, the policy's response and the reference's, and who wins.

        Args:
            policy: The policy.
            batch: Prompts.
            means: Gets the mean of each number.
        """
        rows = self.scored_rows(policy, batch)
        if self.collector.reference is not None:
            score = "reward" if self.judge is None else "judge_reward"
            for row, other in zip(rows, self._reference_rows(self.collector.reference, batch), strict=True):
                are_equal = row["response"] == other["response"]
                row["win_rate"] = win(row[score], other[score], are_equal=are_equal)
                row.update({f"reference_{name}": value for name, value in other.items() if name != "kl"})
        for name in rows[0]:
            if not name.startswith("reference_") and name != "response":
                values = torch.tensor([float(row[name]) for row in rows], device=policy.device)
                means.add(name, values, values.isfinite())
        return [{**raw, **row} for raw, row in zip(as_rows(raw_columns(batch)), rows, strict=True)]

    def scored_rows(self, policy: PreTrainedModel, batch: dict[str, Any]) -> list[Row]:
        """A row for each prompt: a policy's sampled response, its rewards, length and KL to the reference."""
        responder, columns, device = self.collector.responder, raw_columns(batch), policy.device
        samples, greedy = responder.sample_and_greedy(policy, batch, replace(self.collector.sampling, num_samples=1))
        texts, greedy_texts = responder.texts(samples), responder.texts(greedy)
        rewards, baselines = self.collector.scorer.score(columns, texts, greedy_texts, device=device)
        values: dict[str, Any] = {
            "response": texts,
            "reward": rewards.tolist(),
            "baseline_reward": baselines.tolist(),
            "response_length": samples.lengths.tolist(),
            "truncated": samples.truncated.tolist(),
        }
        if self.judge_scorer is not None:
            values["judge_reward"] = self.judge_scorer.score(columns, texts, device=device)[0].tolist()
        ref_log_probs = self.collector.ref_log_probs(samples)
        if ref_log_probs is not None:
            kl = response_kl(samples.log_probs, ref_log_probs, samples.response_mask)
            values["kl"] = kl.masked_fill(~samples.is_finite, torch.nan).tolist()
        return as_rows(values)

    def _reference_rows(self, reference: Reference, batch: dict[str, Tensor]) -> list[Row]:
        prompts = zip(batch["prompt_index"].tolist(), batch["prompt_ids"], batch["prompt_mask"], strict=True)
        keys = [(index, *ids[mask].tolist()) for index, ids, mask in prompts]
        if not self.agree(all(key in self.reference_rows for key in keys)):
            with reference.active() as model:
                self.reference_rows.update(zip(keys, self.scored_rows(model, batch), strict=True))
        return [self.reference_rows[key] for key in keys]


def win(score: float, other: float, *, are_equal: bool) -> float:
    """Whether a response beats another one: 1 for a win, one half for a tie, NaN where one has no score.

    Args:
        score: Score of the response.
        other: Score of the other one.
        are_equal: Both say the same, and tie: the last bits of a model's score depend on the other rows of its batch.

    Example:
        >>> win(0.25, 0.5, are_equal=False), win(0.25, 0.25000003, are_equal=True)
        (0.0, 0.5)
    """
    if math.isnan(score) or math.isnan(other):
        return math.nan
    return 0.5 if are_equal else float(score > other) + 0.5 * float(score == other)
