"""Supervised fine-tuning: the policy learns to write the demonstrated responses."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel

from remax_lightning.functional.keyed_random import run_seed
from remax_lightning.models.language_model import load_language_model, stop_token_ids
from remax_lightning.models.lora import LoRA
from remax_lightning.models.next_token import log_probs_of, policy_gradient_of
from remax_lightning.models.parallelize import gathered
from remax_lightning.models.source import ModelLike
from remax_lightning.modules.base import TrainableModule
from remax_lightning.modules.gradients import Loss
from remax_lightning.modules.optimizers import LearningRateSchedule, sft_adamw
from remax_lightning.rollout import Responder, RolloutEngine, Sampling, TransformersEngine


class SFT(TrainableModule):
    """Supervised fine-tuning on demonstrations; the loss is the mean over all response tokens of the global batch.

    Args:
        policy: The model to train: a folder or hub name, a source, or a loaded model.
        sampling: How ``predict`` draws responses.
        engine: What draws them; the default is the embedded engine, which decodes with the policy itself.
        seed: Key of the responses that ``predict`` draws; the default is ``seed_everything``.
        optimizer: Optimizer of the policy; weight decay is left off norms and biases.

    Raises:
        ValueError: If an argument is out of its range.
    """

    loader = staticmethod(load_language_model)
    policy: PreTrainedModel
    responder: Responder

    def __init__(
        self,
        policy: ModelLike,
        sampling: Sampling = Sampling(max_new_tokens=256),
        engine: RolloutEngine | None = None,
        seed: int | None = None,
        optimizer: OptimizerCallable = sft_adamw,
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
        self.sampling, self.seed = sampling, seed
        self.engine = TransformersEngine() if engine is None else engine

    @property
    def trained_model(self) -> PreTrainedModel:
        """The policy."""
        return self.policy

    def setup(self, stage: str) -> None:
        """Refuse what cannot be right."""
        super().setup(stage)
        self.engine.check(is_sharded=self.sharding is not None)

    def configure_model(self) -> None:
        """Load or build the policy, once."""
        if "policy" not in self._modules:
            self.policy = self.load_model(self.loader, self.source)
            stops = stop_token_ids(self.policy, self.tokenizer)
            self.responder = Responder(self.engine, self.tokenizer, stops, run_seed(self.seed))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One optimizer step."""
        lengths = batch["attention_mask"].sum(dim=1)  # (B,)
        num_tokens = self.mean_count_per_rank(batch["loss_mask"].sum())

        def losses(rows: Tensor) -> Iterator[Loss]:
            longest = int(lengths[rows].max())
            ids, mask = batch["input_ids"][rows, :longest], batch["loss_mask"][rows, :longest]
            weights = torch.ones(int(mask.sum()), device=ids.device) / num_tokens
            output = policy_gradient_of(self.policy, ids, mask, weights)
            yield Loss(output.loss, metrics={"loss": -output.log_probs})

        with self.phase("update"):
            self.update(lengths, losses, num_tokens)
        self.log_training(progress=("loss",))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Negative log-likelihood of held-out demonstrations, nats per token."""
        with gathered(self.policy):
            self.eval_means.add("loss", -log_probs_of(self.policy, batch["input_ids"], batch["loss_mask"]))

    test_step = validation_step

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """A row for each prompt: the data's columns, a sampled response and the greedy one."""
        return self.responder.rows(self.policy, batch, replace(self.sampling, num_samples=1))
