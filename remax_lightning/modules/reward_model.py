"""A reward model: a language model with a scalar head that learns which of two responses is preferred."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel

from remax_lightning.functional.losses import bradley_terry_loss
from remax_lightning.models.lora import LoRA
from remax_lightning.models.parallelize import gathered
from remax_lightning.models.scalar_model import load_reward_model, sequence_scores
from remax_lightning.models.source import ModelLike
from remax_lightning.modules.base import TrainableModule
from remax_lightning.modules.gradients import Loss
from remax_lightning.modules.optimizers import LearningRateSchedule, reward_model_adamw

load_untrained = partial(load_reward_model, trained=False)


class RewardModel(TrainableModule):
    """A reward model trained on pairs of responses by the Bradley-Terry loss, the mean over all pairs.

    The score is read at the last token of the conversation. ``fit`` exports a Hugging Face sequence-classification
    folder with one label, as ModelReward reads it.

    Args:
        model: A causal language model to put a new scalar head on, a reward model to train further, or a configuration:
            a folder or hub name, a source, or a loaded model.
        optimizer: Optimizer of the model; weight decay is left off norms and biases.

    Raises:
        ValueError: If an argument is out of its range.
    """

    loader = staticmethod(load_untrained)
    model: PreTrainedModel

    def __init__(
        self,
        model: ModelLike,
        optimizer: OptimizerCallable = reward_model_adamw,
        lr_schedule: LearningRateSchedule = "cosine",
        warmup_fraction: float = 0.0,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        max_grad_norm: float | None = 1.0,
        activation_checkpointing: bool = False,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__(
            source=model,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            warmup_fraction=warmup_fraction,
            micro_batch_size=micro_batch_size,
            micro_batch_tokens=micro_batch_tokens,
            max_grad_norm=max_grad_norm,
            activation_checkpointing=activation_checkpointing,
            lora=lora,
        )

    @property
    def trained_model(self) -> PreTrainedModel:
        """The reward model."""
        return self.model

    def configure_model(self) -> None:
        """Load or build the reward model, once."""
        if "model" not in self._modules:
            self.model = self.load_model(self.loader, self.source)

    def scores(self, batch: dict[str, Tensor], pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the chosen and of the rejected responses of some pairs, (N,) each; those of equal tokens are equal.

        Without that, equal rows would not tie: the last bits of a score depend on the row in the batch.
        """
        num_pairs = len(batch["input_ids"]) // 2
        rows = torch.cat([pairs, pairs + num_pairs])  # the chosen responses come first
        mask = batch["attention_mask"][rows]
        longest = int(mask.sum(dim=1).max())
        ids, mask = batch["input_ids"][rows, :longest], mask[:, :longest]
        chosen, rejected = sequence_scores(self.model, ids, mask).chunk(2)
        tokens = ids.masked_fill(~mask.bool(), -1)
        are_equal = (tokens[: len(pairs)] == tokens[len(pairs) :]).all(dim=1)
        return chosen, torch.where(are_equal, chosen, rejected)

    def all_scores(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Scores of all pairs of a batch."""
        with gathered(self.model):
            return self.scores(batch, torch.arange(len(batch["input_ids"]) // 2, device=self.device))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One optimizer step."""
        lengths = torch.maximum(*batch["attention_mask"].sum(dim=1).chunk(2))  # of the longer response of each pair
        num_pairs = self.mean_count_per_rank(torch.tensor(len(lengths), device=self.device))

        def losses(pairs: Tensor) -> Iterator[Loss]:
            chosen, rejected = self.scores(batch, pairs)
            value = bradley_terry_loss(chosen, rejected)
            metrics = {"loss": value.expand(len(pairs)), "accuracy": accuracy(chosen, rejected)}
            yield Loss(value * len(pairs) / num_pairs, metrics=metrics)

        with self.phase("update"):
            self.update(2 * lengths, losses, num_pairs)
        self.log_training(progress=("loss", "accuracy"))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """How often held-out preferences are ranked right, and by how much."""
        chosen, rejected = self.all_scores(batch)
        self.eval_means.add("loss", bradley_terry_loss(chosen, rejected).expand(len(chosen)))
        self.eval_means.add("accuracy", accuracy(chosen, rejected))
        self.eval_means.add("margin", chosen - rejected)

    test_step = validation_step

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """A row for each pair with its two scores."""
        chosen, rejected = self.all_scores(batch)
        pairs = zip(chosen.tolist(), rejected.tolist(), strict=True)
        return [{"chosen_score": score, "rejected_score": other} for score, other in pairs]


def accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen response scores higher, one half for a tie, (B,)."""
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
