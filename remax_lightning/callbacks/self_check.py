"""Before the first step: does everything that a policy learns from fit together?"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from remax_lightning.functional.log_probs import token_log_probs
from remax_lightning.models.language_model import context_length, evaluating, response_logits, vocabulary_size
from remax_lightning.models.next_token import log_probs_of
from remax_lightning.modules.policy_gradient import PolicyGradientModule
from remax_lightning.rewards import ModelReward
from remax_lightning.rewards.scorer import checked_rewards
from remax_lightning.rollout import Responses, Samples
from remax_lightning.rollout.responder import first_rows, raw_columns
from remax_lightning.rollout.types import are_finite

UNREACHABLE_LOG_PROB = -20.0
"""A log-prob, in nats, that no run is long enough to draw."""


class SelfCheck(Callback):
    """Draws a few responses before the first training step and refuses to train on what cannot be right.

    The checks, by name: ``context`` (the longest prompt and response fit the model), ``logits`` (those of the policy
    and the log-probs of the reference are finite), ``padding`` (padding changes no
    log-prob), ``sampler`` (the sampler's log-probs are those of training), ``reference`` (a reference that is the
    policy's own start has KL 0), ``stop_token`` (the policy can end a response), ``double_bos`` (the reward model's
    text does not begin twice), ``rewards`` (they are finite), ``equal_rewards`` (they are not all the same, from which
    nothing is learned).

    Args:
        enabled: False checks nothing.
        skip: Names of checks to leave out, such as ``[equal_rewards]`` for a reward that is rare at first.
        num_prompts: Prompts to draw responses for.
        max_new_tokens: Tokens of those responses, at most.
    """

    def __init__(
        self, enabled: bool = True, skip: list[str] | None = None, num_prompts: int = 8, max_new_tokens: int = 32
    ) -> None:
        if unknown := set(skip or []) - set(CHECKS):
            raise ValueError(f"skip takes names of checks, {', '.join(CHECKS)}; got {', '.join(sorted(unknown))}")
        self.enabled, self.skip = enabled, set(skip or [])
        self.num_prompts, self.max_new_tokens = num_prompts, max_new_tokens

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check a policy that learns from rewards; the first sentence of what is wrong is raised on all ranks.

        Raises:
            ValueError: If a check fails.
        """
        if not self.enabled or not isinstance(pl_module, PolicyGradientModule):
            return
        with trainer.precision_plugin.forward_context(), evaluating(pl_module.policy):
            for problem in self._problems(trainer, pl_module):
                # after each check, since a check may need all ranks
                if not trainer.strategy.reduce_boolean_decision(problem is None, all=True):
                    raise ValueError(f"self-check: {problem or 'a check failed on another rank'}")

    def _problems(self, trainer: Trainer, module: PolicyGradientModule) -> Iterator[str | None]:
        if "context" not in self.skip:
            yield context_problem(trainer, module)
        batch = self._sampled_batch(trainer, module)
        for name, check in CHECKS.items():
            if name not in self.skip and check is not None:
                yield check(batch)

    def _sampled_batch(self, trainer: Trainer, module: PolicyGradientModule) -> "SampledBatch":
        assert trainer.train_dataloader is not None
        batch = first_rows(next(iter(trainer.train_dataloader)), self.num_prompts)
        batch = {name: c.to(module.device) if isinstance(c, Tensor) else c for name, c in batch.items()}
        length = min(self.max_new_tokens, module.sampling.max_new_tokens)
        sampling = replace(module.sampling, max_new_tokens=length, num_samples=1)
        sampled, greedy = module.responder.sample_and_greedy(module.policy, batch, sampling)
        return SampledBatch(trainer, module, batch, sampled, greedy)


class SampledBatch:
    """A few responses, and what the checks ask of them.

    Args:
        trainer: The trainer.
        module: The module under check.
        batch: Prompts.
        sampled: A sampled response to each.
        greedy: The greedy response to each.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: PolicyGradientModule,
        batch: dict[str, Any],
        sampled: Samples,
        greedy: Responses,
    ) -> None:
        self.trainer, self.module, self.batch, self.sampled, self.greedy = trainer, module, batch, sampled, greedy
        temperature = module.sampling.temperature
        self.log_probs = sampled.at_tokens(
            log_probs_of(module.policy, *sampled.sequences(), temperature=temperature)
        )  # as training computes them
        dtype = module.policy.dtype if module.sharding is None else module.sharding.compute_dtype
        is_half = "16" in str(trainer.precision) or dtype != torch.float32
        self.tolerance = 0.1 if is_half else 1e-3

    def logits(self, padding: int) -> Tensor:
        """Logits of the sampled tokens, (B, T, V), with so much more padding on the left, as in a rollout's prompts."""
        sampled = self.sampled
        prompt_ids, prompt_mask = (F.pad(each, (padding, 0)) for each in (sampled.prompt_ids, sampled.prompt_mask))
        return response_logits(self.module.policy, prompt_ids, prompt_mask, sampled.response_ids, sampled.response_mask)

    @cached_property
    def ref_log_probs(self) -> Tensor | None:
        """Log-probs of the sampled tokens under the reference, nats, (B, T); None without one."""
        return self.module.collector.ref_log_probs(self.sampled)

    @cached_property
    def rewards(self) -> Tensor:
        """Rewards of the sampled and greedy responses; what the reward raises, it raises here."""
        module, columns = self.module, raw_columns(self.batch)
        texts = [[text or "" for text in module.responder.texts(each)] for each in (self.sampled, self.greedy)]
        return torch.cat([checked_rewards(module.reward, columns, each) for each in texts]).to(module.device)

    @cached_property
    def finite_rewards(self) -> tuple[int, int, float, float]:
        """Over all ranks: how many rewards there are, how many of them are finite, the lowest and the highest."""
        values = self.rewards.double()
        finite = values.isfinite()
        found = [
            self.trainer.strategy.reduce(value, reduce_op=operation)
            for value, operation in (
                (torch.ones_like(values).sum(), "sum"),
                (finite.double().sum(), "sum"),
                (values.masked_fill(~finite, float("inf")).amin(), "min"),
                (values.masked_fill(~finite, float("-inf")).amax(), "max"),
            )
        ]
        count, num_finite, lowest, highest = (float(cast(Tensor, each)) for each in found)
        return int(count), int(num_finite), lowest, highest

    def difference(self, log_probs: Tensor) -> float:
        """Mean absolute difference from the training log-probs over response tokens, nats."""
        return float((log_probs - self.log_probs).abs()[self.sampled.response_mask].mean())


def context_problem(trainer: Trainer, module: PolicyGradientModule) -> str | None:
    """The longest prompt and response against the model's positions."""
    limit = context_length(module.policy)
    longest = trainer.datamodule.max_prompt_length  # type: ignore[attr-defined]
    total = longest + module.sampling.max_new_tokens
    if limit is None or total <= limit:
        return None
    return (
        f"the model has {limit} positions, but data.max_prompt_length={longest} and "
        f"sampling.max_new_tokens={module.sampling.max_new_tokens} make {total}; lower one of them"
    )


def logits_problem(batch: SampledBatch) -> str | None:
    """Whether policy and reference say numbers."""
    both = torch.cat([batch.sampled.is_finite, batch.greedy.is_finite])
    if missing := int((~both).sum()):
        return (
            f"the policy's logits are not finite for {missing} of {len(both)} responses; its weights are not finite or "
            "far too large: name another folder by model.policy, or an earlier checkpoint"
        )
    if batch.ref_log_probs is None or are_finite(batch.ref_log_probs, batch.sampled.response_mask).all():
        return None
    return "the reference's log-probs are not finite; name another model by model.reference"


def padding_problem(batch: SampledBatch) -> str | None:
    """Prompts padded on the left, as in a rollout, against none, as in training."""
    temperature = batch.module.sampling.temperature
    log_probs = token_log_probs(batch.logits(padding=3), batch.sampled.response_ids, temperature=temperature)
    difference = batch.difference(log_probs)
    if difference <= batch.tolerance:
        return None
    return (
        f"padding changes the log-probs by {difference:.3g} nats a token; the architecture ignores the attention "
        "mask or position_ids: try policy.attn_implementation=eager, or use another model"
    )


def sampler_problem(batch: SampledBatch) -> str | None:
    """The sampler's log-probs against those of training."""
    difference = batch.difference(batch.sampled.log_probs)
    if difference <= batch.tolerance:
        return None
    return (
        f"the sampler's log-probs differ from those of training by {difference:.3g} nats a token; the rollout engine "
        "does not decode with the weights, the temperature or the numeric type that are trained"
    )


def reference_problem(batch: SampledBatch) -> str | None:
    """KL to a reference that is the policy as it starts."""
    module = batch.module
    if module.reference is None or module.reference_source is not None or batch.trainer.global_step > 0:
        return None
    assert batch.ref_log_probs is not None
    difference = batch.difference(batch.ref_log_probs)
    if difference <= batch.tolerance:
        return None
    return (
        f"the reference differs from the policy by {difference:.3g} nats a token before the first step; the policy was "
        "changed after it was loaded: name the reference by model.reference"
    )


def stop_token_problem(batch: SampledBatch) -> str | None:
    """Whether the policy could ever draw one of its stop tokens."""
    module, stops = batch.module, batch.module.responder.stop_token_ids
    size = vocabulary_size(module.policy)
    if all(stop >= size for stop in stops):
        return f"the stop tokens {stops} are beyond the model's vocabulary of {size}; set the tokenizer's eos_token"
    log_probs = batch.logits(padding=0).float().log_softmax(-1)
    known = [stop for stop in stops if stop < size]
    best = float(log_probs[..., known].max(-1).values[batch.sampled.response_mask].max())
    if best > UNREACHABLE_LOG_PROB:
        return None
    return (
        f"no stop token of {stops} has a log-prob above {best:.3g} nats, so no response would end; fine-tune the "
        "policy on responses that end with the tokenizer's eos_token, or set that token right"
    )


def double_bos_problem(batch: SampledBatch) -> str | None:
    """Whether a reward model's conversations begin with two BOS tokens."""
    for reward in (batch.module.reward, batch.module.judge):
        if isinstance(reward, ModelReward):
            ids = reward.encode(batch.batch["prompt"][0], "")
            bos = reward.loaded_tokenizer.bos_token_id
            if bos is not None and ids[:2] == [bos, bos]:
                return (
                    f"the conversations that {reward.source.path} scores begin with two BOS tokens; take the BOS out "
                    "of its chat_template or out of the prompts"
                )
    return None


def rewards_problem(batch: SampledBatch) -> str | None:
    """Whether there is a reward to learn from; a few rows without one are dropped in training, too."""
    count, num_finite, *_ = batch.finite_rewards
    if num_finite == 0:
        return f"none of {count} rewards is finite; fix the reward"
    if num_finite < count:
        rank_zero_warn(f"self-check: {count - num_finite} of {count} rewards are not finite; such rows are dropped")
    return None


def equal_rewards_problem(batch: SampledBatch) -> str | None:
    """Whether rewards tell responses apart."""
    _, num_finite, lowest, highest = batch.finite_rewards
    # the last bits of equal scores differ by the row in the batch
    if num_finite == 0 or highest - lowest > 1e-6 * max(abs(highest), 1.0):
        return None
    return (
        f"all {num_finite} rewards are {lowest:.4g}, from which nothing is learned; look at the reward, or leave this "
        "check out by self_check.skip=[equal_rewards] if a difference is rare at first"
    )


CHECKS: dict[str, Callable[[SampledBatch], str | None] | None] = {
    "context": None,
    "logits": logits_problem,
    "padding": padding_problem,
    "sampler": sampler_problem,
    "reference": reference_problem,
    "stop_token": stop_token_problem,
    "double_bos": double_bos_problem,
    "rewards": rewards_problem,
    "equal_rewards": equal_rewards_problem,
}
