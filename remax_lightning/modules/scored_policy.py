"""A policy with a reward and a reference: what it takes to evaluate it, and what training is built on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from remax_lightning.functional.log_probs import kl_k1
from remax_lightning.models.language_model import freeze, frozen_copy, load_language_model
from remax_lightning.models.lora import without_adapters
from remax_lightning.models.next_token import log_probs_of
from remax_lightning.models.parallelize import gathered
from remax_lightning.models.sharded_loading import load_sharded, sharded_frozen_copy
from remax_lightning.models.source import ModelSource
from remax_lightning.modules.policy import PolicyModule, raw_columns, rows_of
from remax_lightning.rewards import Reward
from remax_lightning.rollout import Rollout

LARGEST_REWARD = 1e6
"""A reward beyond this size is an error, not a judgement: its row is dropped like one without a finite reward."""


class ScoredPolicyModule(PolicyModule):
    """A policy whose responses are scored, and compared with those of a reference policy.

    Args:
        reward: What a response is worth.
        reference: The policy that the KL penalty holds on to; the default is the policy as it starts.
        judge: A second reward that training never sees; validation and test report it.
        kl_coef: Weight of the KL penalty, reward per nat; at 0 no reference is loaded.
        **kwargs: As in PolicyModule.
    """

    reference: PreTrainedModel | None

    def __init__(
        self,
        reward: Reward,
        reference: ModelSource | None = None,
        judge: Reward | None = None,
        kl_coef: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        sampling = self.sampling
        if kl_coef < 0:
            raise ValueError(f"kl_coef must be 0 (no reference) or positive, got {kl_coef}")
        if reference is not None and kl_coef == 0:
            raise ValueError("a reference was given but kl_coef is 0, which uses none; drop it or set kl_coef")
        if sampling.top_p < 1 or sampling.top_k > 0:
            rank_zero_warn(
                f"top_p={sampling.top_p}, top_k={sampling.top_k}: the responses do not come from the distribution "
                "that is differentiated, so the gradient is biased; top_p=1 and top_k=0 make it unbiased"
            )
        if reference is not None and reference.load_tokenizer().get_vocab() != self.tokenizer.get_vocab():
            raise ValueError("the reference's tokenizer is not the policy's; their log-probs cannot be compared")
        self.reward, self.judge, self.kl_coef, self.reference_source = reward, judge, kl_coef, reference
        # frozen models stand outside the module tree: no optimizer, checkpoint or strategy has to know them
        self.__dict__["reference"] = None
        self._frozen_on: torch.device | None = None
        self._reference_rows: dict[tuple[int, ...], dict[str, Any]] = {}

    def configure_model(self) -> None:
        """Load or build the policy and, for a KL penalty, the reference, once."""
        super().configure_model()
        if self.kl_coef > 0 and self.reference is None:
            self.__dict__["reference"] = self._load_reference()

    def _load_reference(self) -> PreTrainedModel:
        if self.reference_source is not None:
            if self.sharding is None:
                return freeze(load_language_model(self.reference_source))
            return freeze(load_sharded(load_language_model, self.reference_source, self.sharding, frozen=True))
        if self.lora is not None:
            return self.policy  # without its adapters, see as_reference
        if self.sharding is None:
            return frozen_copy(self.policy)
        return sharded_frozen_copy(self.policy, load_language_model, self.policy_source, self.sharding)

    @contextmanager
    def as_reference(self) -> Iterator[PreTrainedModel]:
        """The reference; one that is the policy without its adapters is so inside the context only."""
        assert self.reference is not None
        is_policy = self.reference is self.policy
        with without_adapters(cast(PeftModel, self.policy)) if is_policy else nullcontext():
            yield self.reference

    def on_fit_start(self) -> None:
        """Load the rewards, on the device of the policy."""
        self._place_frozen()

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def _place_frozen(self) -> None:
        if self._frozen_on == self.device:
            return
        for reward in (self.reward, self.judge):
            if reward is not None:
                reward.setup(self.device, self.sharding)
        if self.reference is not None and self.sharding is None:
            self.reference.to(self.device)  # type: ignore[arg-type]
        self._frozen_on = self.device

    def rewards_of(self, reward: Reward, batch: dict[str, Any], *responses: list[str]) -> list[Tensor]:
        """A reward's scores of lists of responses to a batch of prompts, in one call that has each response once.

        Args:
            reward: The reward.
            batch: Columns of B prompts.
            *responses: Lists of a multiple of B responses, those of a prompt adjacent.

        Returns:
            Rewards for each list; not-a-number where there is no usable score, everywhere if the reward raises.
        """
        num_prompts = len(batch["prompt_ids"])
        keys = [(index * num_prompts // len(texts), text) for texts in responses for index, text in enumerate(texts)]
        number = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        columns = {name: [column[prompt] for prompt, _ in number] for name, column in raw_columns(batch).items()}
        try:
            rewards = reward(columns.pop("prompt"), [text for _, text in number], **columns).to(self.device)
        except Exception as error:
            # one failure of a reward must not end a run of days; the rows are dropped and counted, and a reward that
            # always fails ends it after MAX_SKIPPED_STEPS
            failure = f"{type(error).__name__}: {error}"
            rank_zero_warn(f"the reward failed for {len(number)} responses, their rows are dropped: {failure}")
            rewards = torch.full((len(number),), float("nan"), device=self.device)
        rewards = rewards.masked_fill(rewards.abs() > LARGEST_REWARD, float("nan"))
        return list(rewards[[number[key] for key in keys]].split([len(texts) for texts in responses]))

    def reference_log_probs(self, rollout: Rollout) -> Tensor | None:
        """Log-probs of the response tokens under the reference, nats, (B, T); None without one."""
        if self.reference is None:
            return None
        with self.as_reference() as reference:
            return self.of_tokens(partial(log_probs_of, temperature=self.sampling.temperature), reference, rollout)

    @torch.no_grad()
    def of_tokens(
        self, read: Callable[[PreTrainedModel, Tensor, Tensor], Tensor], model: PreTrainedModel, rollout: Rollout
    ) -> Tensor:
        """What a model says of each response token, in micro-batches, (B, T); 0 elsewhere.

        Args:
            read: From the model, sequences (B, L) and where N response tokens are in them (B, L) to a number for each.
            model: The model, which is gathered once.
            rollout: The responses.
        """
        values = torch.zeros(rollout.response_ids.shape, device=self.device)
        with gathered(model):
            for rows in self.micro_batches(rollout.total_lengths):
                part = rollout.rows(rows)
                values[rows, : part.response_ids.shape[1]] = part.at_tokens(read(model, *part.sequences()))
        return values

    def scored_rows(self, policy: PreTrainedModel, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """A row for each prompt: a policy's sampled response, its rewards, length and KL to the reference."""
        sampled, greedy = self.respond(policy, batch, replace(self.sampling, num_samples=1))
        assert greedy is not None
        responses = self.texts(sampled)
        rewards, baselines = self.rewards_of(self.reward, batch, responses, self.texts(greedy))
        columns: dict[str, Any] = {
            "response": responses,
            "reward": rewards.tolist(),
            "baseline_reward": baselines.tolist(),
            "response_length": sampled.lengths.tolist(),
            "truncated": sampled.truncated.tolist(),
        }
        if self.judge is not None:
            columns["judge_reward"] = self.rewards_of(self.judge, batch, responses)[0].tolist()
        ref_log_probs = self.reference_log_probs(sampled)
        if ref_log_probs is not None:
            columns["kl"] = response_kl(replace(sampled, ref_log_probs=ref_log_probs)).tolist()
        return rows_of(columns)

    def evaluated_rows(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The policy's scored rows, with the reference's beside them and who wins; their means are noted.

        The same prompt gets the same random numbers at every evaluation, so two of them differ by the weights alone,
        and the reference's rows are computed once.
        """
        rows = self.scored_rows(self.policy, batch)
        if self.reference is not None:
            score = "reward" if self.judge is None else "judge_reward"
            for row, other in zip(rows, self._rows_of_reference(batch), strict=True):
                is_same = row["response"] == other["response"]  # its scores may differ in the last bits
                row["win_rate"] = _win(other[score] if is_same else row[score], other[score])
                row.update({f"reference_{name}": value for name, value in other.items() if name != "kl"})
        for name in rows[0]:
            if not name.startswith("reference_") and name != "response":
                values = torch.tensor([float(row[name]) for row in rows], device=self.device)
                self.eval_means.add(name, values, values.isfinite())
        return [{**raw, **row} for raw, row in zip(rows_of(raw_columns(batch)), rows, strict=True)]

    def _rows_of_reference(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        prompts = zip(batch["prompt_index"].tolist(), batch["prompt_ids"], batch["prompt_mask"], strict=True)
        keys = [(index, *ids[mask].tolist()) for index, ids, mask in prompts]
        are_known = all(key in self._reference_rows for key in keys)
        if not self.trainer.strategy.reduce_boolean_decision(are_known, all=True):
            with self.as_reference() as reference:
                self._reference_rows.update(zip(keys, self.scored_rows(reference, batch), strict=True))
        return [self._reference_rows[key] for key in keys]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score responses to held-out prompts."""
        self.evaluated_rows(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Score responses to held-out prompts; the rows are written down by the ResponseWriter callback."""
        return {"rows": self.evaluated_rows(batch)}


def response_kl(rollout: Rollout) -> Tensor:
    """Estimate of KL(policy || reference) by each response, nats, (B,): the sum of k1 over its tokens."""
    assert rollout.ref_log_probs is not None
    return kl_k1(rollout.log_probs, rollout.ref_log_probs).masked_fill(~rollout.response_mask, 0.0).sum(dim=1)


def _win(score: float, other: float) -> float:
    """1 for a win, one half for a tie, not-a-number where either has no score."""
    if score != score or other != other:
        return float("nan")
    return float(score > other) + 0.5 * float(score == other)
