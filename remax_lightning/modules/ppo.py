"""PPO (Schulman et al. 2017, arXiv 1707.06347) as RLHF has it: what ReMax leaves out.

Beside the policy a value model is trained, and each rollout is learned from several times.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel

from remax_lightning.functional.advantages import masked_moments, normalized
from remax_lightning.functional.losses import clipped_policy_loss, kl_penalty_loss, value_loss
from remax_lightning.functional.returns import generalized_advantages, kl_token_rewards
from remax_lightning.models.next_token import log_probs_of
from remax_lightning.models.scalar_model import load_reward_model, scalar_head, token_values
from remax_lightning.models.source import ModelSource
from remax_lightning.modules.optimizers import parameter_groups, policy_gradient_adamw
from remax_lightning.modules.policy_gradient import PolicyGradientModule
from remax_lightning.rewards import ModelReward
from remax_lightning.rollout import Rollout

load_value_model = partial(load_reward_model, trained=False)


class PPO(PolicyGradientModule):
    """PPO: advantages from a value model (GAE), a clipped ratio, several optimizer steps on each rollout.

    The KL penalty is in the rewards of the tokens. ``trainer.max_steps``, ``checkpoint.every_n_train_steps`` and the
    learning rate's schedule count optimizer steps, ``num_epochs`` times ``num_minibatches`` for each batch of prompts.

    Args:
        value_model: What the value model starts from. The default is the reward's model, if the reward is one that
            reads the policy's tokens; otherwise the policy, with a head that says 0.
        num_epochs: How often each rollout is learned from.
        num_minibatches: Optimizer steps of an epoch, each on as many of the rollout's responses.
        clip_range: Bound of |ratio - 1|.
        value_clip_range: Bound of what a value may move, in the unit of the rewards; null for none.
        value_learning_rate: Peak learning rate of the value model; the default is the policy's.
        value_coef: Weight of the value model's loss; it changes the norm at which its gradient is clipped.
        gamma: Discount of each token.
        gae_lambda: Trust in what was earned against what the value model expects.
        normalize_advantages: Bring the advantages of a rollout to mean 0 and standard deviation 1.
        optimizer: Optimizer of both models; weight decay is left off norms and biases.
        **kwargs: As in PolicyGradientModule.

    Raises:
        ValueError: If an argument is out of its range.
    """

    value_model: PreTrainedModel

    def __init__(
        self,
        value_model: ModelSource | None = None,
        num_epochs: int = 1,
        num_minibatches: int = 1,
        clip_range: float = 0.2,
        value_clip_range: float | None = 0.2,
        value_learning_rate: float | None = None,
        value_coef: float = 1.0,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        normalize_advantages: bool = True,
        optimizer: OptimizerCallable = policy_gradient_adamw,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        for name, number in (("num_epochs", num_epochs), ("num_minibatches", num_minibatches)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        for name, value in (
            ("clip_range", clip_range),
            ("value_clip_range", value_clip_range),
            ("value_learning_rate", value_learning_rate),
            ("value_coef", value_coef),
        ):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not 0 < gamma <= 1 or not 0 <= gae_lambda <= 1:
            raise ValueError(f"gamma must be in (0, 1] and gae_lambda in [0, 1], got {gamma} and {gae_lambda}")
        self.num_epochs, self.num_minibatches = num_epochs, num_minibatches
        self.clip_range, self.value_clip_range = clip_range, value_clip_range
        self.value_learning_rate, self.value_coef = value_learning_rate, value_coef
        self.gamma, self.gae_lambda, self.normalize_advantages = gamma, gae_lambda, normalize_advantages
        self.value_source = self._value_source(value_model)

    def _value_source(self, given: ModelSource | None) -> ModelSource | None:
        """Where the value model comes from; None for the policy with a head that says 0."""
        if given is None and isinstance(self.reward, ModelReward) and self.reward.label is None:
            given = replace(self.reward.source, dtype=self.policy_source.dtype)
            return given if self._reads_like_policy(given) else None
        if given is not None and not self._reads_like_policy(given):
            raise ValueError("the value model's tokenizer is not the policy's, whose tokens it has to read")
        return given

    def _reads_like_policy(self, source: ModelSource) -> bool:
        return source.load_tokenizer().get_vocab() == self.tokenizer.get_vocab()

    @property
    def trained_models(self) -> dict[str, PreTrainedModel]:
        """Policy and value model."""
        return {"": self.policy, "value_": self.value_model}

    @property
    def updates_per_batch(self) -> int:
        """Optimizer steps on each batch of prompts."""
        return self.num_epochs * self.num_minibatches

    def configure_model(self) -> None:
        """Load policy, reference and value model, once."""
        super().configure_model()
        if "value_model" in self._modules:
            return
        self.value_model = self.load(load_value_model, self.value_source or self.policy_source)
        if self.value_source is None:
            with torch.no_grad():
                for parameter in scalar_head(self.value_model).parameters():
                    parameter.zero_()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of both models; the value model's may have a learning rate of their own."""
        rate = {} if self.value_learning_rate is None else {"lr": self.value_learning_rate}
        return [*parameter_groups(self.policy), *({**group, **rate} for group in parameter_groups(self.value_model))]

    def collect(self, batch: dict[str, Any]) -> Rollout:
        """Sample responses, score them, and ask the value model what it expects before each token."""
        rollout = self.sample(batch)
        with self.phase("values"):
            values = self.of_tokens(token_values, self.value_model, rollout)
        return replace(rollout, baselines=torch.zeros_like(rollout.rewards), values=values)  # the values are

    def advantages(self, rollout: Rollout) -> Tensor:
        """Generalized advantages of the token rewards, which hold the KL penalty."""
        in_loss = self.kl.in_loss
        token_rewards = kl_token_rewards(
            rollout.rewards,
            rollout.response_mask,
            rollout.log_probs,
            rollout.ref_log_probs,
            kl_coef=0.0 if in_loss else self.kl_weight,
            kl_estimator=self.kl.estimator,
        )
        advantages, _ = generalized_advantages(
            token_rewards, rollout.values, rollout.response_mask, gamma=self.gamma, gae_lambda=self.gae_lambda
        )
        return advantages

    def learn(self, rollout: Rollout, advantages: Tensor) -> None:
        """Several passes over a rollout in minibatches, one optimizer step for each of them."""
        mask = rollout.response_mask
        rollout = replace(rollout, returns=(advantages + rollout.values).masked_fill(~mask, 0.0))
        if self.normalize_advantages:
            moments = self.sum_over_ranks(masked_moments(advantages, mask))
            advantages = normalized(advantages, mask, moments)
        step = self.global_step
        for epoch in range(self.num_epochs):
            for rows in self.minibatches(len(mask), step, epoch):
                part = rollout.rows(rows)
                super().learn(part, advantages[rows, : part.response_ids.shape[1]])

    def rows_with_gradient(self, rollout: Rollout, advantages: Tensor) -> Tensor:
        """True for the rows with tokens: also without an advantage they teach the value model, and a KL in the loss."""
        return rollout.response_mask.any(dim=1)

    def minibatches(self, num_rows: int, step: int, epoch: int) -> list[Tensor]:
        """Rows of each minibatch, in an order that is a function of seed, step and epoch."""
        if self.num_minibatches == 1:
            return [torch.arange(num_rows, device=self.device)]
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1_009 + epoch)
        order = torch.randperm(num_rows, generator=generator).to(self.device)
        return list(order.tensor_split(self.num_minibatches))

    def losses(self, rollout: Rollout, advantages: Tensor, num_tokens: Tensor) -> Iterator[Tensor]:
        """The clipped loss of the policy, then that of the value model."""
        mask, sequences = rollout.response_mask, rollout.sequences()
        log_probs = log_probs_of(self.policy, *sequences, temperature=self.sampling.temperature)
        old, weights, every = rollout.log_probs[mask], advantages[mask], mask[mask]
        loss, clipped = clipped_policy_loss(
            log_probs, old, weights, every, clip_range=self.clip_range, num_tokens=num_tokens
        )
        if self.kl.in_loss:
            assert rollout.ref_log_probs is not None
            reference, estimator = rollout.ref_log_probs[mask], self.kl.estimator
            penalty = kl_penalty_loss(log_probs, reference, every, estimator=estimator, num_tokens=num_tokens)
            loss = loss + self.kl_weight * penalty
        self.train_means.add("clipped", clipped)
        self.drift.append((log_probs.detach() - old).abs())
        yield loss
        values = token_values(self.value_model, *sequences)
        errors = value_loss(
            values,
            rollout.values[mask],
            rollout.returns[mask],
            every,
            clip_range=self.value_clip_range,
            num_tokens=num_tokens,
        )
        self.train_means.add("value_error", (values.detach() - rollout.returns[mask]).square())
        yield self.value_coef * errors
