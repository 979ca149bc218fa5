"""What every module shares: the optimizer, the one manual-optimization loop, means over processes."""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from remax_lightning.models.lora import LoRA, check_quantization, leave_out_frozen, with_lora
from remax_lightning.models.parallelize import Sharding, checkpoint_activations, full_tensor, sync_gradients
from remax_lightning.models.sharded_loading import Loader, gather_to_rank_0, load_sharded, peak_host_memory
from remax_lightning.models.source import ModelSource
from remax_lightning.modules.means import Means
from remax_lightning.modules.optimizers import parameter_groups
from remax_lightning.supported import check_supported

LearningRateSchedule = Literal["constant", "linear", "cosine"]
MAX_SKIPPED_STEPS = 10


class TrainableModule(LightningModule):
    """A transformers model and how it is trained.

    A subclass names the model (``trained_model``) and calls :meth:`update` from its ``training_step``.

    Args:
        optimizer: Optimizer of the model's parameters; weight decay is left off norms and biases.
        lr_schedule: Course of the learning rate from its peak to the last step: constant, linear to zero or cosine.
        warmup_fraction: Part of all steps over which the learning rate rises from zero to its peak.
        micro_batch_size: Rows (responses, pairs) for each forward and backward pass, those of like length together;
            the update does not depend on it, the memory does. The default is the whole batch.
        micro_batch_tokens: Tokens for each forward and backward pass, padding included; a longer row goes alone. With
            both limits, the one that is reached first ends a micro-batch.
        max_grad_norm: The gradient is scaled down to this norm; null leaves it as it is.
        activation_checkpointing: Keep only the input of each block for the backward pass and compute the rest again:
            far less memory, for about a third more time in the update.
        lora: Train low-rank adapters on the model instead of its weights, which are frozen.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_schedule: LearningRateSchedule = "cosine",
        warmup_fraction: float = 0.0,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        max_grad_norm: float | None = 1.0,
        activation_checkpointing: bool = False,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= warmup_fraction < 1:
            raise ValueError(f"warmup_fraction is a part of all steps, from 0 to below 1, got {warmup_fraction}")
        for name, limit in (("micro_batch_size", micro_batch_size), ("micro_batch_tokens", micro_batch_tokens)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, or null for no clipping, got {max_grad_norm}")
        self.automatic_optimization = False
        self.optimizer = optimizer
        self.lr_schedule, self.warmup_fraction = lr_schedule, warmup_fraction
        self.micro_batch_size, self.micro_batch_tokens = micro_batch_size, micro_batch_tokens
        self.max_grad_norm, self.activation_checkpointing = max_grad_norm, activation_checkpointing
        self.lora = lora
        self.strict_loading = lora is None  # a checkpoint holds only what is trained
        self.register_state_dict_post_hook(leave_out_frozen)
        self.sharding: Sharding | None = None  # set by a strategy that splits models over processes
        self.skipped_in_a_row = 0
        self.seconds: dict[str, float] = {}
        self.train_means, self.eval_means = Means(), Means()

    tokenizer: PreTrainedTokenizerBase

    @property
    @abstractmethod
    def trained_model(self) -> PreTrainedModel:
        """The model that the optimizer updates and that is exported."""

    @property
    def trained_models(self) -> dict[str, PreTrainedModel]:
        """All models that the optimizer updates, each with what its metrics are prefixed with."""
        return {"": self.trained_model}

    @property
    def updates_per_batch(self) -> int:
        """Optimizer steps that are taken on each batch."""
        return 1

    def setup(self, stage: str) -> None:
        """Refuse what this loop cannot do right."""
        check_supported(self.trainer.strategy, self.trainer.precision)

    def load(self, load: Loader, source: ModelSource) -> PreTrainedModel:
        """A model to train: with adapters, split over processes and with checkpointed activations, as configured.

        Args:
            load: Loads the model of a source.
            source: Where from.
        """
        check_quantization(source, self.lora)
        if self.sharding is not None:
            model = load_sharded(load, source, self.sharding, lora=self.lora)
            peaks = ", ".join(f"{peak:.2f}" for peak in peak_host_memory())
            rank_zero_info(f"{type(model).__name__} is loaded; peak host memory by process, GiB: {peaks}")
        else:
            model = with_lora(load(source), self.lora)
        if self.activation_checkpointing:
            checkpoint_activations(model)
        return model.train()

    @abstractmethod
    def build_on_meta(self) -> PreTrainedModel:
        """The trained model on the meta device."""

    def unsharded_model(self) -> PreTrainedModel | None:
        """The trained model in one piece, for export: if it is split over processes a copy, in process 0 alone."""
        return self.trained_model if self.sharding is None else gather_to_rank_0(self.trained_model, self.build_on_meta)

    def configure_optimizers(self) -> Any:
        """The optimizer over groups of parameters, and the schedule of its learning rate."""
        optimizer = self.optimizer(cast(Iterable[nn.Parameter], self.parameter_groups()))
        total = self._total_steps() if self.lr_schedule != "constant" or self.warmup_fraction > 0 else 0
        name = "constant_with_warmup" if self.lr_schedule == "constant" else self.lr_schedule
        scheduler = get_scheduler(name, optimizer, int(self.warmup_fraction * total), total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters of all trained models in groups, as optimizers take them."""
        return [group for model in self.trained_models.values() for group in parameter_groups(model)]

    def _total_steps(self) -> int:
        steps = self.trainer.estimated_stepping_batches
        if self.trainer.max_steps == -1:  # batches; otherwise optimizer steps
            steps *= self.updates_per_batch
        if steps == float("inf") or steps < 0:
            raise ValueError(
                f"lr_schedule={self.lr_schedule} with warmup_fraction={self.warmup_fraction} needs to know the number "
                "of steps; set trainer.max_steps or trainer.max_epochs"
            )
        return int(steps)

    def update(self, lengths: Tensor, losses: Callable[[Tensor], Iterable[Tensor]], num_terms: Tensor) -> None:
        """One optimizer step on a batch, in micro-batches: the only one in the project.

        A step with nothing to learn from or with a gradient that is not finite is skipped and counted, by all
        processes alike, since the gradient is the same in all of them; the weights stay bitwise as they were.

        Args:
            lengths: Tokens of each row of this process's batch, (B,).
            losses: From row indices to the summed loss, divided by ``num_terms``, of each of the trained models; a loss
                is computed when the backward pass of the one before it is done, except under DDP.
            num_terms: Number of :meth:`mean_count_per_rank`; 0 if every row was dropped.

        Raises:
            RuntimeError: After ten skipped steps in a row.
        """
        optimizer = cast(Optimizer, self.optimizers())
        micro_batches = self.micro_batches(lengths)
        num_passes = self._max_over_ranks(len(micro_batches))
        for number in range(num_passes):
            with self._gradient_sync(is_last=number == num_passes - 1):
                self._backward(losses(micro_batches[number]) if number < len(micro_batches) else self._no_losses())
        norms = {name: self._clip(model) for name, model in self.trained_models.items()}
        is_usable = self.accepts_step() and bool(torch.stack(list(norms.values())).isfinite().all() & (num_terms > 0))
        for name, norm in norms.items():
            self.train_means.add(f"{name}grad_norm", norm)
        self.train_means.add("steps_skipped", torch.tensor(0.0 if is_usable else 1.0, device=self.device))
        self.train_means.add("learning_rate", torch.tensor(float(optimizer.param_groups[0]["lr"]), device=self.device))
        if is_usable:
            optimizer.step()
            self.lr_schedulers().step()  # type: ignore[union-attr]
        optimizer.zero_grad()
        self._count_skipped(is_usable)

    def _backward(self, losses: Iterable[Tensor]) -> None:
        """A backward pass for each loss; under DDP, which exchanges all gradients in one, for their sum."""
        if isinstance(self.trainer.strategy, DDPStrategy):
            losses = [torch.stack(list(losses)).sum()]
        for loss in losses:
            self.manual_backward(loss)

    def _clip(self, model: PreTrainedModel) -> Tensor:
        """Scale a model's gradient down to the largest norm; its norm before."""
        max_norm = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        return full_tensor(nn.utils.clip_grad_norm_(model.parameters(), max_norm))

    def accepts_step(self) -> bool:
        """False skips the step, though its gradient is finite; all processes have to agree."""
        return True

    def micro_batches(self, lengths: Tensor) -> list[Tensor]:
        """Row indices of each micro-batch, the longest rows first."""
        order = lengths.argsort(descending=True, stable=True)
        size = len(order) if self.micro_batch_size is None else self.micro_batch_size
        if self.micro_batch_tokens is None:
            return list(order.split(size))
        micro_batches = []
        while len(order) > 0:
            fitting = self.micro_batch_tokens // max(int(lengths[order[0]]), 1)
            micro_batches.append(order[: max(min(size, fitting), 1)])
            order = order[len(micro_batches[-1]) :]
        return micro_batches

    def _gradient_sync(self, is_last: bool) -> Any:
        """Processes exchange gradients once a step, after the last micro-batch."""
        if self.sharding is not None:
            for model in self.trained_models.values():
                sync_gradients(model, self.sharding, is_last=is_last)
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) and not is_last else nullcontext()

    def _max_over_ranks(self, count: int) -> int:
        """The largest count of all processes where they have to call a sharded model equally often; else the count."""
        if self.sharding is None:
            return count
        counts = torch.tensor(count, device=self.device)
        return int(cast(Tensor, self.trainer.strategy.reduce(counts, reduce_op="max")))

    def _no_losses(self) -> Iterator[Tensor]:
        """Losses of 0 through all parameters: the part of this process in another one's micro-batch."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        for model in self.trained_models.values():
            logits = model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False).logits
            yield (logits * 0.0).sum()

    def _count_skipped(self, is_usable: bool) -> None:
        self.skipped_in_a_row = 0 if is_usable else self.skipped_in_a_row + 1
        if is_usable:
            return
        rank_zero_warn(f"step {self.global_step} is skipped: no usable row, or a gradient that is not finite")
        if self.skipped_in_a_row == MAX_SKIPPED_STEPS:
            raise RuntimeError(
                f"{MAX_SKIPPED_STEPS} steps in a row had no usable row or a gradient that is not finite; the weights "
                "are those before them: look at the rewards and the data, or lower the learning rate"
            )

    def mean_count_per_rank(self, count: Tensor) -> Tensor:
        """Terms (tokens, pairs) of all processes' batches over the number of processes.

        Strategies average gradients over processes; losses divided by this number then add up to the mean over all
        terms of the global batch, whatever their split over processes and micro-batches.
        """
        return self.sum_over_ranks(count) / self.trainer.world_size

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Values added over all processes, float64."""
        return cast(Tensor, self.trainer.strategy.reduce(values.double(), reduce_op="sum"))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the step, for ``time/*`` and for Lightning's profilers."""
        start = time.perf_counter()
        with self.trainer.profiler.profile(name):  # type: ignore[attr-defined]
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def log_training(self, progress: Iterable[str]) -> dict[str, Tensor]:
        """Log the step's means over all processes under ``train/`` and the seconds of its phases under ``time/``.

        Returns:
            The means.
        """
        means = self.train_means.compute()
        for name, value in means.items():
            self.log(f"train/{name}", value, prog_bar=name in set(progress), batch_size=1)
        for name, seconds in self.seconds.items():
            self.log(f"time/{name}", seconds, batch_size=1)
        self.seconds = {}
        return means

    def log_evaluation(self, stage: str) -> None:
        """Log the means over all batches of an evaluation."""
        for name, value in self.eval_means.compute().items():
            self.log(f"{stage}/{name}", value, prog_bar=True, batch_size=1)

    def on_validation_epoch_end(self) -> None:
        """Log what the validation found."""
        self.log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log what the test found."""
        self.log_evaluation("test")
