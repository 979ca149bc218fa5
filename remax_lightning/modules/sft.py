"""Supervised fine-tuning: the policy learns to write the demonstrated responses."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from remax_lightning.models.next_token import log_probs_of, policy_gradient_of
from remax_lightning.models.parallelize import gathered
from remax_lightning.modules.optimizers import sft_adamw
from remax_lightning.modules.policy import PolicyModule
from remax_lightning.rollout import Sampling


class SFT(PolicyModule):
    """Supervised fine-tuning on demonstrations; the loss is the mean over all response tokens of the global batch.

    Args:
        sampling: How ``predict`` draws responses.
        optimizer: Optimizer of the policy; weight decay is left off norms and biases.
        **kwargs: As in PolicyModule.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        sampling: Sampling = Sampling(max_new_tokens=256),
        optimizer: OptimizerCallable = sft_adamw,
        **kwargs: Any,
    ) -> None:
        super().__init__(sampling=sampling, optimizer=optimizer, **kwargs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One optimizer step."""
        lengths = batch["attention_mask"].sum(dim=1)
        num_tokens = self.mean_count_per_rank(batch["loss_mask"].sum())

        def losses(rows: Tensor) -> Iterator[Tensor]:
            longest = int(lengths[rows].max())
            ids, mask = batch["input_ids"][rows, :longest], batch["loss_mask"][rows, :longest]
            weights = torch.ones(int(mask.sum()), device=ids.device) / num_tokens
            output = policy_gradient_of(self.policy, ids, mask, weights)
            self.train_means.add("loss", -output.log_probs)
            yield output.loss

        with self.phase("update"):
            self.update(lengths, losses, num_tokens)
        self.log_training(progress=("loss",))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Negative log-likelihood of held-out demonstrations, nats per token."""
        with gathered(self.policy):
            self.eval_means.add("loss", -log_probs_of(self.policy, batch["input_ids"], batch["loss_mask"]))

    test_step = validation_step
