"""The loop that every policy-gradient method shares: collect, advantages, losses, one optimizer step."""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remax_lightning.functional.keyed_random import run_seed
from remax_lightning.functional.log_probs import response_kl
from remax_lightning.models.language_model import load_language_model, stop_token_ids
from remax_lightning.models.lora import LoRA
from remax_lightning.models.next_token import policy_gradient_of
from remax_lightning.models.reference import Reference
from remax_lightning.models.source import ModelLike, ModelSource
from remax_lightning.models.tokenizer import have_same_vocabulary
from remax_lightning.modules.base import REMEDY, TrainableModule
from remax_lightning.modules.collapse import CollapseWatch
from remax_lightning.modules.collector import Collector
from remax_lightning.modules.evaluation import Evaluation
from remax_lightning.modules.gradients import Loss, checked_losses
from remax_lightning.modules.kl_control import KLControl, KLController
from remax_lightning.modules.optimizers import LearningRateSchedule, policy_gradient_adamw
from remax_lightning.rewards import Reward, RewardLike, as_reward
from remax_lightning.rewards.process_state import preserved_process_state
from remax_lightning.rewards.scorer import Scorer
from remax_lightning.rollout import Responder, Rollout, RolloutEngine, Sampling, TransformersEngine


class PolicyGradientModule(TrainableModule):
    """A policy that learns from the rewards of its own responses.

    A method defines :meth:`advantages`, a weight for the log-prob of each response token. It may override
    :meth:`collect` (what is sampled and scored), :meth:`losses` and :meth:`learn`.

    Args:
        policy: The model to train: a folder or hub name, a source, or a loaded model.
        reward: What a response is worth: a reward, or a function of prompts and responses.
        sampling: How responses are drawn.
        engine: What draws them; the default is the embedded engine, which decodes with the policy itself.
        seed: Key of all sampled responses: they are a function of the weights, this seed, the step and the prompt. The
            default is ``seed_everything``.
        reference: The policy that the KL penalty is measured against; the default is the policy as it starts.
        judge: A second reward that training never sees; validation and test report it.
        kl_coef: Weight of the KL penalty, reward per nat; at 0 no reference is loaded.
        kl: How the KL penalty is taken and steered.
        missing_stop_penalty: Subtracted from the reward of a response that did not end within its longest length.
        max_log_prob_drift: A step whose mean difference between the sampler's log-probs and those of training is above
            this, nats per token, is skipped and counted; null skips none.
        optimizer: Optimizer of the policy; weight decay is left off norms and biases.

    Raises:
        ValueError: If an argument is out of its range.
    """

    decodes_greedy: ClassVar[bool] = False  # a step decodes also the greedy response to each prompt
    min_samples: ClassVar[int] = 1  # fewest responses to a prompt that the method works with
    loader = staticmethod(load_language_model)
    policy: PreTrainedModel
    responder: Responder

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
        lr_schedule: LearningRateSchedule = "cosine",
        warmup_fraction: float = 0.0,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        max_grad_norm: float | None = 1.0,
        activation_checkpointing: bool = False,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__(
            source=policy,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            warmup_fraction=warmup_fraction,
            micro_batch_size=micro_batch_size,
            micro_batch_tokens=micro_batch_tokens,
            max_grad_norm=max_grad_norm,
            activation_checkpointing=activation_checkpointing,
            lora=lora,
        )
        check_samples(type(self).__name__, sampling, self.min_samples)
        check_arguments(sampling, reference, kl_coef, kl, missing_stop_penalty, max_log_prob_drift)
        self.reward, self.judge = as_reward(reward), None if judge is None else as_reward(judge)
        self.sampling, self.seed = sampling, seed
        self.engine = TransformersEngine() if engine is None else engine
        self.reference_source = None if reference is None else ModelSource.of(reference)
        check_reference(self.reference_source, self.tokenizer)
        self.reference: Reference | None = None
        self.kl_coef, self.kl, self.kl_controller = kl_coef, kl, KLController(kl_coef, kl)
        self.missing_stop_penalty, self.max_log_prob_drift = missing_stop_penalty, max_log_prob_drift
        self.collapse_watch = CollapseWatch(has_greedy_baseline=self.decodes_greedy, kl_target=kl.target)

    @property
    def trained_model(self) -> PreTrainedModel:
        """The policy."""
        return self.policy

    def setup(self, stage: str) -> None:
        """Refuse what cannot be right, before a model is loaded."""
        super().setup(stage)
        self.engine.check(is_sharded=self.sharding is not None)
        if stage != "predict":
            check_rewards(self.reward, self.judge)

    def configure_model(self) -> None:
        """Load or build the policy and, for a KL penalty, the reference, once."""
        if "policy" in self._modules:
            return
        self.policy = self.load_model(self.loader, self.source)
        stops = stop_token_ids(self.policy, self.tokenizer)
        self.responder = Responder(self.engine, self.tokenizer, stops, run_seed(self.seed))
        if self.kl_coef > 0:
            self.reference = Reference.load(self.reference_source, self.policy, self.source, self.sharding)
            self.frozen |= self.reference.samples()
        scoring = (self.sampling, Scorer(self.reward), self.missing_stop_penalty)
        self.collector = Collector(self.responder, *scoring, self.reference, self.micro_batches, self.phase)
        self.evaluation = Evaluation(self.collector, self.judge, self.is_true_on_all_ranks)

    def on_fit_start(self) -> None:
        """Load the rewards, on the device of the policy."""
        self.evaluation.place(self.device, self.sharding)

    on_validation_start = on_test_start = on_fit_start

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One rollout and one update from it."""
        start = time.perf_counter()
        num_responses = len(batch["prompt_index"]) * self.sampling.num_samples * self.trainer.world_size
        self.kl_controller.check(num_responses)
        rollout = begun_rollout(self, batch)
        self.train_means.add_all(self.metrics(rollout))
        self.skipped_steps.remedy = remedy(rollout)
        rollout = without_unscored_rows(rollout)
        advantages = checked_advantages(self.advantages(rollout), rollout)
        with self.phase("update"):
            self.learn(rollout, advantages)
        self.train_means.add("advantage_mean", advantages, rollout.response_mask)
        seconds = self.timer.seconds["step"] = time.perf_counter() - start
        self.train_means.add("tokens_per_second", rollout.lengths.sum() * self.trainer.world_size / seconds)
        if self.kl_coef > 0:
            self.train_means.add("kl_coef", torch.tensor(self.kl_controller.weight, device=self.device))
        self.end_step(self.log_training(progress=("reward", "kl")), num_responses)
        self.unfinished.end()

    def collect(self, batch: dict[str, Any]) -> Rollout:
        """Responses to a batch of prompts with rewards, baselines and what else the advantages need."""
        return self.collector.sample(self.policy, batch, self.global_step)

    @abstractmethod
    def advantages(self, rollout: Rollout) -> Tensor:
        """Weight of each response token's log-prob, (B, T)."""

    def losses(self, rollout: Rollout, advantages: Tensor, num_tokens: Tensor) -> Iterator[Loss]:
        """Yield the loss of some rows for each trained model, the policy's first.

        Args:
            rollout: The rows.
            advantages: Their advantages, (B, T).
            num_tokens: What each loss is divided by: tokens of the global batch per rank.
        """
        coefficients = advantages[rollout.response_mask] / num_tokens
        sequences, temperature = rollout.sequences(), self.sampling.temperature
        value, log_probs, entropy = policy_gradient_of(self.policy, *sequences, coefficients, temperature=temperature)
        yield Loss(value, log_probs, {"entropy": entropy})

    def learn(self, rollout: Rollout, advantages: Tensor) -> None:
        """One optimizer step on a rollout."""
        num_tokens = self.mean_count_per_rank(rollout.response_mask.sum())
        active = self.rows_with_gradient(rollout, advantages).nonzero()[:, 0]
        active = active if len(active) > 0 else active.new_zeros(1)  # every rank has to take part in a step

        def losses(index: Tensor) -> Iterator[Loss]:
            rows = rollout.rows(active[index])
            weights = advantages[active[index], : rows.response_ids.shape[1]]
            for loss in checked_losses(self.losses(rows, weights, num_tokens)):
                yield loss if loss.log_probs is None else with_drift(loss, rows)

        limit = self.max_log_prob_drift
        accept = None if limit is None else partial(is_drift_small, limit=limit, sum_over_ranks=self.sum_over_ranks)
        self.update(rollout.total_lengths[active], losses, num_tokens, accept=accept)

    def rows_with_gradient(self, rollout: Rollout, advantages: Tensor) -> Tensor:
        """Which rows contribute to the gradient, (B,) bool: by default those with an advantage that is not 0."""
        return advantages.any(dim=1)

    def end_step(self, means: dict[str, Tensor], num_responses: int) -> None:
        """Steer by the metrics of the step and its number of responses, both over all ranks."""
        numbers = as_floats(means)
        for sentence in self.collapse_watch.observe(numbers):
            rank_zero_warn(sentence)
        if (kl := numbers.get("kl")) is None:
            return
        self.kl_controller.observe(kl, num_responses)
        if self.kl_controller.exceeds_limit(kl):
            rank_zero_warn(f"training ends: the mean KL of a response is {kl:.4g} nats, above kl.limit={self.kl.limit}")
            self.trainer.should_stop = True

    def metrics(self, rollout: Rollout) -> dict[str, Tensor]:
        """Values whose mean is logged as ``train/NAME``; NaN is left out."""
        return rollout_metrics(rollout, self.trainer.world_size, self.sum_over_ranks)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score responses to held-out prompts."""
        self.evaluation.rows(self.policy, batch, self.eval_means)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Score responses to held-out prompts; the ResponseWriter callback writes the rows to a file."""
        return {"rows": self.evaluation.rows(self.policy, batch, self.eval_means)}

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """A row for each prompt: the data's columns, a sampled response and the greedy one."""
        return self.responder.rows(self.policy, batch, replace(self.sampling, num_samples=1))


def check_arguments(
    sampling: Sampling,
    reference: ModelLike | None,
    kl_coef: float,
    kl: KLControl,
    missing_stop_penalty: float,
    max_log_prob_drift: float | None,
) -> None:
    """Refuse arguments that are out of their range or without effect.

    Raises:
        ValueError: If one is.
    """
    if kl_coef < 0:
        raise ValueError(f"kl_coef must be 0 (no reference) or positive, got {kl_coef}")
    if reference is not None and kl_coef == 0:
        raise ValueError("a reference was given but kl_coef is 0, which uses none; drop it or set kl_coef")
    if kl_coef == 0 and kl != KLControl():
        raise ValueError("kl says how a KL penalty is taken, but kl_coef is 0; set kl_coef, or leave kl out")
    if max_log_prob_drift is not None and not max_log_prob_drift > 0:
        raise ValueError(f"max_log_prob_drift must be positive, or null for no limit, got {max_log_prob_drift}")
    if missing_stop_penalty < 0:
        raise ValueError(f"missing_stop_penalty is subtracted from the reward: 0 or more, got {missing_stop_penalty}")
    if sampling.is_truncated:
        rank_zero_warn(
            f"top_p={sampling.top_p}, top_k={sampling.top_k}: the responses do not come from the distribution that is "
            "differentiated, so the gradient is biased; top_p=1 and top_k=0 make it unbiased"
        )


def check_reference(source: ModelSource | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a reference that reads other tokens than the policy.

    Raises:
        ValueError: If it does.
    """
    if source is not None and not have_same_vocabulary(source.load_tokenizer(), tokenizer):
        raise ValueError("the reference's tokenizer is not the policy's; their log-probs cannot be compared")


def check_rewards(*rewards: Reward | None) -> None:
    """Refuse rewards that cannot work, before a model is loaded; see :meth:`Reward.check`."""
    for reward in filter(None, rewards):
        with preserved_process_state():
            reward.check()


def check_samples(method: str, sampling: Sampling, least: int) -> None:
    """Refuse too few responses to a prompt for a method that compares them.

    Raises:
        ValueError: If there are.
    """
    if sampling.num_samples < least:
        raise ValueError(
            f"{method} compares the responses to a prompt; model.sampling.num_samples must be at least {least}, got "
            f"{sampling.num_samples}"
        )


def begun_rollout(module: PolicyGradientModule, batch: dict[str, Any]) -> Rollout:
    """The rollout to learn from: a new one, or that of a batch which a resumed run has to finish."""
    trainer, step = module.trainer, module.global_step

    def collect() -> Rollout:
        return checked_rollout(module.collect(batch))

    return module.unfinished.begin(collect, step, trainer.global_rank, trainer.world_size, module.device)


def checked_rollout(rollout: object) -> Rollout:
    """What ``collect`` returned.

    Raises:
        TypeError: If it is no rollout, or rewards or baselines are no tensors.
        ValueError: If there is not one of them for each response.
    """
    if not isinstance(rollout, Rollout):
        raise TypeError(
            f"collect must return a Rollout with rewards and baselines, got {type(rollout).__name__}; "
            "see Collector.sample and Collector.rollout"
        )
    for name, values in (("rewards", rollout.rewards), ("baselines", rollout.baselines)):
        if not isinstance(values, Tensor):
            raise TypeError(f"collect must set rewards and baselines; {name} is {type(values).__name__}, not a tensor")
        if values.shape != rollout.truncated.shape:
            raise ValueError(
                f"collect must set one of {name} for each of {len(rollout.truncated)} responses, got the shape "
                f"{tuple(values.shape)}"
            )
    return rollout


def checked_advantages(advantages: object, rollout: Rollout) -> Tensor:
    """What ``advantages`` returned.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If there is not one for each response token.
    """
    shape = rollout.response_mask.shape
    if not isinstance(advantages, Tensor):
        raise TypeError(f"advantages must return a tensor of the shape {tuple(shape)}, got {type(advantages).__name__}")
    if advantages.shape != shape:
        raise ValueError(
            f"advantages must return a weight for each response token, {tuple(shape)}, got {tuple(advantages.shape)}; "
            "of weights of responses, (B,), make weights[:, None] * rollout.response_mask"
        )
    return advantages


def scored_rows(rollout: Rollout) -> Tensor:
    """Which rows have a finite reward and baseline, and finite log-probs of policy and reference, (B,) bool."""
    is_scored = rollout.rewards.isfinite() & rollout.baselines.isfinite()
    return is_scored & rollout.is_finite & rollout.has_finite_reference


def remedy(rollout: Rollout) -> str:
    """What is to be done about a run whose rollouts are all like this one."""
    if rollout.is_finite.any():
        return REMEDY
    return (
        "the policy's logits are not finite, so its weights are not finite or far too large: go back to an earlier "
        "checkpoint or another model, and lower the learning rate"
    )


def without_unscored_rows(rollout: Rollout) -> Rollout:
    """The rollout with the response mask False in rows that are not :func:`scored_rows`, and reward and baseline 0."""
    is_scored = scored_rows(rollout)
    return replace(
        rollout,
        response_mask=rollout.response_mask & is_scored[:, None],
        rewards=rollout.rewards.masked_fill(~is_scored, 0.0),
        baselines=rollout.baselines.masked_fill(~is_scored, 0.0),
    )


def rollout_metrics(rollout: Rollout, world_size: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """What the responses are like, and the rewards and KL of the rows that have a reward; NaN elsewhere."""
    is_scored = scored_rows(rollout)
    metrics = {
        "reward": rollout.rewards.masked_fill(~is_scored, torch.nan),
        "reward_std": reward_std(rollout.rewards[is_scored], sum_over_ranks),
        "response_length": rollout.lengths,
        "truncated": rollout.truncated,
        "rows_dropped": (~is_scored).sum() * world_size,  # a mean over ranks: the number on all of them
    }
    if rollout.ref_log_probs is not None:
        kl = response_kl(rollout.log_probs, rollout.ref_log_probs, rollout.response_mask)
        metrics["kl"] = kl.masked_fill(~is_scored, torch.nan)
    return metrics


def reward_std(rewards: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
    """Standard deviation over the rewards of all ranks, scalar, float64; NaN for fewer than two of them.

    Args:
        rewards: The finite rewards of this rank, (N,).
        sum_over_ranks: Adds values over all ranks.
    """
    values = rewards.double()
    count, total, squares = sum_over_ranks(torch.stack([torch.ones_like(values), values, values.square()]).sum(dim=1))
    variance = (squares / count - (total / count).square()).clamp(min=0)
    return torch.where(count > 1, variance, torch.nan).sqrt()


def as_floats(means: dict[str, Tensor]) -> dict[str, float]:
    """Scalars as numbers, by one copy from the device."""
    return dict(zip(means, torch.stack([value.double() for value in means.values()]).tolist(), strict=True))


def with_drift(loss: Loss, rows: Rollout) -> Loss:
    """A loss that also logs the gap between the sampler's log-probs and those of training, nats, (N,)."""
    assert loss.log_probs is not None
    drift = (loss.log_probs - rows.log_probs[rows.response_mask]).abs()
    return loss._replace(metrics={**loss.metrics, "log_prob_drift": drift})


def is_drift_small(metrics: dict[str, Tensor], *, limit: float, sum_over_ranks: Callable[[Tensor], Tensor]) -> bool:
    """Whether the sampler's log-probs are close to those of training in the mean over all tokens of all ranks.

    Args:
        metrics: ``log_prob_drift`` of each token, nats, (N,).
        limit: The largest mean, nats per token.
        sum_over_ranks: Adds a scalar over all ranks.

    Raises:
        ValueError: If the losses did not yield log-probs.
    """
    if "log_prob_drift" not in metrics:
        raise ValueError("max_log_prob_drift needs the log-probs of training: losses must yield Loss(value, log_probs)")
    drift = metrics["log_prob_drift"]
    total, count = sum_over_ranks(drift.sum()), sum_over_ranks(torch.ones_like(drift).sum())
    return bool(total <= limit * count)
