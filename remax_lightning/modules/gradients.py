"""Gradients of a batch in micro-batches, on one or more ranks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from transformers import PreTrainedModel

from remax_lightning.models.parallelize import Sharding, full_tensor, sync_gradients


class Loss(NamedTuple):
    """Loss of some rows, and what is logged of it.

    Args:
        value: Sum over the rows' terms, divided by the number of terms of the global batch; scalar with gradient.
        log_probs: Log-probs of the rows' response tokens in training, nats, (N,), without gradient; where a loss has
            them, they are compared with the sampler's.
        metrics: Values whose mean over all rows, micro-batches and ranks is logged as ``train/NAME``, (N,) each.
    """

    value: Tensor
    log_probs: Tensor | None = None
    metrics: Mapping[str, Tensor] = MappingProxyType({})


Losses = Callable[[Tensor], Iterable[Loss]]
"""From row indices to a loss for each trained model."""


@dataclass(frozen=True)
class GradientAccumulation:
    """Backward passes of all micro-batches of a step.

    Args:
        models: The trained models.
        backward: Runs a backward pass from a loss.
        strategy: How ranks exchange gradients: once a step, after the last micro-batch.
        sharding: How the models are sharded; None where each rank has full models.
    """

    models: list[PreTrainedModel]
    backward: Callable[[Tensor], None]
    strategy: Strategy
    sharding: Sharding | None

    def run(self, micro_batches: list[Tensor], losses: Losses) -> dict[str, Tensor]:
        """Accumulate the gradients.

        Args:
            micro_batches: Row indices of each.
            losses: A model's loss is computed when the backward pass of the one before it is done, except under DDP.

        Returns:
            The losses' metrics of all rows, (N,) each.

        Raises:
            TypeError: If ``losses`` yields something else.
        """
        metrics: dict[str, list[Tensor]] = {}
        num_passes = self._max_over_ranks(len(micro_batches))
        for number in range(num_passes):
            with self._gradient_sync(is_last=number == num_passes - 1):
                has_rows = number < len(micro_batches)
                of_models = checked_losses(losses(micro_batches[number])) if has_rows else self._zero_losses()
                if isinstance(self.strategy, DDPStrategy):
                    of_models = iter([sum_of_losses(of_models)])  # DDP exchanges all gradients in one backward pass
                for loss in of_models:
                    self.backward(loss.value)
                    for name, values in loss.metrics.items():
                        metrics.setdefault(name, []).append(values.detach())
        return {name: torch.cat(values) for name, values in metrics.items()}

    def _gradient_sync(self, is_last: bool) -> AbstractContextManager[Any]:
        if self.sharding is not None:
            for model in self.models:
                sync_gradients(model, self.sharding, is_last=is_last)
        is_waiting = isinstance(self.strategy, DDPStrategy) and not is_last
        return cast(DDPStrategy, self.strategy).block_backward_sync() if is_waiting else nullcontext()

    def _max_over_ranks(self, count: int) -> int:
        """The largest count where all ranks have to call a sharded model equally often; else the count itself."""
        if self.sharding is None:
            return count
        counts = torch.tensor(count, device=self.sharding.device)
        return int(cast(Tensor, self.strategy.reduce(counts, reduce_op="max")))

    def _zero_losses(self) -> Iterator[Loss]:
        """Losses of 0 through all parameters: what a rank without rows does during another one's micro-batch."""
        for model in self.models:
            token = torch.zeros(1, 1, dtype=torch.long, device=cast(Sharding, self.sharding).device)
            logits = model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False).logits
            yield Loss((logits * 0.0).sum())


def clip_gradient(model: nn.Module, max_norm: float | None) -> Tensor:
    """Scale a model's gradient down to the largest norm; None does not. Returns its norm before, over all ranks."""
    limit = float("inf") if max_norm is None else max_norm
    return full_tensor(nn.utils.clip_grad_norm_(model.parameters(), limit))


def checked_losses(losses: object) -> Iterator[Loss]:
    """Losses one after the other, as they are computed.

    Raises:
        TypeError: If it is no iterable of losses.
    """
    if isinstance(losses, Tensor | Loss) or not isinstance(losses, Iterable):
        raise TypeError(
            f"losses must yield a Loss for each trained model, got {type(losses).__name__}; write yield Loss(value)"
        )
    for loss in losses:
        if not isinstance(loss, Loss):
            raise TypeError(f"losses must yield Loss(value, log_probs, metrics), got {type(loss).__name__}")
        yield loss


def sum_of_losses(losses: Iterable[Loss]) -> Loss:
    """All losses as one, with the metrics of all."""
    of_models = list(losses)
    metrics = {name: values for loss in of_models for name, values in loss.metrics.items()}
    return Loss(torch.stack([loss.value for loss in of_models]).sum(), metrics=metrics)
