"""PPO (Schulman et al. 2017, arXiv 1707.06347) as RLHF has it: what ReMax leaves out.

Beside the policy a value model is trained, and each rollout is learned from several times.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel

from remax_lightning.functional.advantages import masked_moments, normalized
from remax_lightning.functional.losses import clipped_policy_loss, kl_penalty_loss, value_loss
from remax_lightning.functional.returns import generalized_advantages, kl_token_rewards
from remax_lightning.models.lora import LoRA
from remax_lightning.models.next_token import log_probs_of
from remax_lightning.models.scalar_model import load_reward_model, scalar_head, token_values
from remax_lightning.models.source import ModelLike, ModelSource
from remax_lightning.models.tokenizer import have_same_vocabulary
from remax_lightning.modules.gradients import Loss
from remax_lightning.modules.kl_control import KLControl
from remax_lightning.modules.optimizers import LearningRateSchedule, parameter_groups, policy_gradient_adamw
from remax_lightning.modules.policy_gradient import PolicyGradientModule
from remax_lightning.rewards import ModelReward, RewardLike
from remax_lightning.rollout import Rollout, RolloutEngine, Sampling
from remax_lightning.rollout.per_token import per_token

load_value_model = partial(load_reward_model, trained=False)


@dataclass(frozen=True)
class ValuedRollout(Rollout):
    """A rollout with what a value model said of it.

    Args:
        values: Expected return before each response token, (B, T).
        returns: What the values should have been, (B, T).
    """

    values: Tensor
    returns: Tensor


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

    Raises:
        ValueError: If an argument is out of its range.
    """

    value_model: PreTrainedModel

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
        value_model: ModelLike | None = None,
        num_epochs: int = 1,
        num_minibatches: int = 1,
        clip_range: float = 0.2,
        value_clip_range: float | None = 0.2,
        value_learning_rate: float | None = None,
        value_coef: float = 1.0,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        normalize_advantages: bool = True,
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
            lr_schedule=lr_schedule,
            warmup_fraction=warmup_fraction,
            micro_batch_size=micro_batch_size,
            micro_batch_tokens=micro_batch_tokens,
            max_grad_norm=max_grad_norm,
            activation_checkpointing=activation_checkpointing,
            lora=lora,
        )
        check_arguments(num_epochs, num_minibatches, gamma, gae_lambda)
        check_positive(
            clip_range=clip_range,
            value_clip_range=value_clip_range,
            value_learning_rate=value_learning_rate,
            value_coef=value_coef,
        )
        self.num_epochs, self.num_minibatches = num_epochs, num_minibatches
        self.clip_range, self.value_clip_range = clip_range, value_clip_range
        self.value_learning_rate, self.value_coef = value_learning_rate, value_coef
        self.gamma, self.gae_lambda, self.normalize_advantages = gamma, gae_lambda, normalize_advantages
        self.value_source = self._value_source(None if value_model is None else ModelSource.of(value_model))

    def _value_source(self, given: ModelSource | None) -> ModelSource | None:
        """Where the value model comes from; None for the policy with a head that says 0."""
        if given is None and isinstance(self.reward, ModelReward) and self.reward.label is None:
            given = replace(self.reward.source, dtype=self.source.dtype)
            return given if have_same_vocabulary(given.load_tokenizer(), self.tokenizer) else None
        if given is not None and not have_same_vocabulary(given.load_tokenizer(), self.tokenizer):
            raise ValueError("the value model's tokenizer is not the policy's, whose tokens it has to read")
        return given

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
        self.value_model = self.load_model(load_value_model, self.value_source or self.source)
        if self.value_source is None:
            with torch.no_grad():
                for parameter in scalar_head(self.value_model).parameters():
                    parameter.zero_()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of both models; the value model's may have a learning rate of their own."""
        rate = {} if self.value_learning_rate is None else {"lr": self.value_learning_rate}
        return [*parameter_groups(self.policy), *({**group, **rate} for group in parameter_groups(self.value_model))]

    def collect(self, batch: dict[str, Any]) -> Rollout:
        """Sample responses, score them, and ask the value model for the expected return before each token."""
        rollout = super().collect(batch)  # baselines of 0: PPO's baseline is the value model
        with self.phase("values"):
            values = per_token(token_values, self.value_model, rollout, self.micro_batches(rollout.total_lengths))
        _, returns = self.estimates(rollout, values)
        return ValuedRollout(**vars(rollout), values=values, returns=returns)

    def advantages(self, rollout: Rollout) -> Tensor:
        """Generalized advantages."""
        return self.estimates(rollout, valued(rollout).values)[0]

    def estimates(self, rollout: Rollout, values: Tensor) -> tuple[Tensor, Tensor]:
        """Generalized advantages of the token rewards, which hold the KL penalty, and the returns, (B, T) each."""
        token_rewards = kl_token_rewards(
            rollout.rewards,
            rollout.response_mask,
            rollout.log_probs,
            rollout.ref_log_probs,
            kl_coef=0.0 if self.kl.in_loss else self.kl_controller.weight,
            kl_estimator=self.kl.estimator,
        )
        return generalized_advantages(
            token_rewards, values, rollout.response_mask, gamma=self.gamma, gae_lambda=self.gae_lambda
        )

    def learn(self, rollout: Rollout, advantages: Tensor) -> None:
        """Several passes over a rollout in minibatches, one optimizer step for each of them."""
        mask = rollout.response_mask
        if self.normalize_advantages:
            moments = self.sum_over_ranks(masked_moments(advantages, mask))
            advantages = normalized(advantages, mask, moments)
        step = self.unfinished.step
        for epoch in range(self.num_epochs):
            for index in minibatches(len(mask), self.num_minibatches, self.responder.seed, step, epoch):
                rows = rollout.rows(index.to(self.device))
                super().learn(rows, advantages[index, : rows.response_ids.shape[1]])

    def rows_with_gradient(self, rollout: Rollout, advantages: Tensor) -> Tensor:
        """The rows with tokens: also without an advantage they train the value model, and a KL in the loss."""
        return rollout.response_mask.any(dim=1)

    def losses(self, rollout: Rollout, advantages: Tensor, num_tokens: Tensor) -> Iterator[Loss]:
        """The clipped loss of the policy, then that of the value model."""
        mask, sequences = rollout.response_mask, rollout.sequences()
        yield self.policy_loss(rollout, advantages[mask], num_tokens)
        old_values, returns = valued(rollout).values[mask], valued(rollout).returns[mask]
        values = token_values(self.value_model, *sequences)
        all_tokens = torch.ones_like(values, dtype=torch.bool)
        errors = value_loss(
            values, old_values, returns, all_tokens, clip_range=self.value_clip_range, num_tokens=num_tokens
        )
        yield Loss(self.value_coef * errors, metrics={"value_error": (values.detach() - returns).square()})

    def policy_loss(self, rollout: Rollout, advantages: Tensor, num_tokens: Tensor) -> Loss:
        """The clipped loss of N response tokens, and their KL penalty if it is taken in the loss."""
        mask = rollout.response_mask
        log_probs = log_probs_of(self.policy, *rollout.sequences(), temperature=self.sampling.temperature)
        old, all_tokens = rollout.log_probs[mask], torch.ones_like(log_probs, dtype=torch.bool)
        value, clipped = clipped_policy_loss(
            log_probs, old, advantages, all_tokens, clip_range=self.clip_range, num_tokens=num_tokens
        )
        if self.kl.in_loss:
            assert rollout.ref_log_probs is not None
            reference, estimator = rollout.ref_log_probs[mask], self.kl.estimator
            penalty = kl_penalty_loss(log_probs, reference, all_tokens, estimator=estimator, num_tokens=num_tokens)
            value = value + self.kl_controller.weight * penalty
        return Loss(value, log_probs.detach(), {"clipped": clipped})


def minibatches(num_rows: int, num_minibatches: int, seed: int, step: int, epoch: int) -> list[Tensor]:
    """Rows of each minibatch, in an order that is a function of seed, step and epoch.

    Example:
        >>> [len(rows) for rows in minibatches(5, 2, seed=0, step=3, epoch=1)]
        [3, 2]
    """
    if num_minibatches == 1:
        return [torch.arange(num_rows)]
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009 + epoch)
    return list(torch.randperm(num_rows, generator=generator).tensor_split(num_minibatches))


def valued(rollout: Rollout) -> ValuedRollout:
    """The rollout, which has values.

    Raises:
        TypeError: If it has none.
    """
    if not isinstance(rollout, ValuedRollout):
        raise TypeError(f"PPO's collect must return a ValuedRollout, got {type(rollout).__name__}")
    return rollout


def check_arguments(num_epochs: int, num_minibatches: int, gamma: float, gae_lambda: float) -> None:
    """Refuse arguments that are out of their range.

    Raises:
        ValueError: If one is.
    """
    for name, number in (("num_epochs", num_epochs), ("num_minibatches", num_minibatches)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not 0 < gamma <= 1 or not 0 <= gae_lambda <= 1:
        raise ValueError(f"gamma must be in (0, 1] and gae_lambda in [0, 1], got {gamma} and {gae_lambda}")


def check_positive(**values: float | None) -> None:
    """Refuse a value of 0 or below; None stands for no bound.

    Raises:
        ValueError: If there is one.
    """
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
