"""Supervised fine-tuning: the policy learns to write the demonstrated responses."""

from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW

from remax_lightning.functional.log_probs import token_log_probs
from remax_lightning.functional.losses import next_token_loss
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
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(sampling=sampling, optimizer=optimizer, **kwargs)

    def log_probs(self, batch: dict[str, Tensor]) -> Tensor:
        """Log-prob of each token but the first, given those before it, nats, (B, L - 1)."""
        ids = batch["input_ids"]
        logits = self.policy(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits
        return token_log_probs(logits[:, :-1], ids[:, 1:])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One optimizer step."""
        num_tokens = self.terms_per_process(batch["loss_mask"][:, 1:].sum())

        def loss(rows: Tensor) -> Tensor:
            part = {name: column[rows] for name, column in batch.items()}
            log_probs, mask = self.log_probs(part), part["loss_mask"][:, 1:]
            self.train_means.add("loss", -log_probs, mask)
            return next_token_loss(log_probs, mask, num_tokens=num_tokens)

        with self.phase("update"):
            self.update(len(batch["input_ids"]), loss, num_tokens)
        self.log_training(progress=("loss",))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Negative log-likelihood of held-out demonstrations, nats per token."""
        self.eval_means.add("loss", -self.log_probs(batch), batch["loss_mask"][:, 1:])

    test_step = validation_step
