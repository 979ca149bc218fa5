"""What every module shares: the model, the optimizer, the one manual-optimization step, means over ranks."""

import difflib
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from remax_lightning.checkpoints.safe_checkpoint_io import read_verified
from remax_lightning.functional.micro_batches import micro_batches
from remax_lightning.models.lora import LoRA, base_samples, leave_out_frozen
from remax_lightning.models.parallelize import Sharding
from remax_lightning.models.sharded_loading import (
    Loader,
    build_on_meta,
    gather_to_rank_0,
    load_trainable,
    peak_host_memory,
)
from remax_lightning.models.source import ModelLike, ModelSource
from remax_lightning.modules.fingerprint import check_model
from remax_lightning.modules.gradients import GradientAccumulation, Losses, clip_gradient
from remax_lightning.modules.hyperparameters import as_plain, constructor_arguments, restored
from remax_lightning.modules.means import Means
from remax_lightning.modules.optimizers import LearningRateSchedule, configured_schedule, parameter_groups
from remax_lightning.modules.timing import PhaseTimer
from remax_lightning.modules.unfinished_batch import UnfinishedBatch
from remax_lightning.supported import check_supported

ModuleType = TypeVar("ModuleType", bound="TrainableModule")
MAX_SKIPPED_STEPS = 10
"""A run whose steps are all skipped learns nothing; ten in a row are no accident."""
REMEDY = "look at the rewards and the data, or lower the learning rate"


class TooManySkippedSteps(RuntimeError):
    """A run whose steps are all skipped.

    ``checkpoint`` is set by who knows: the newest one from before the last step that was taken, whose weights had a
    finite gradient.
    """

    checkpoint: Path | None = None

    def __str__(self) -> str:
        if self.checkpoint is None:
            return super().__str__()
        return f"{super().__str__()}; the newest checkpoint whose gradient was finite is {self.checkpoint}"


class SkippedSteps:
    """Counts the steps that are skipped in a row; ``remedy`` is what is to be done when they are too many."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self.remedy = REMEDY

    def count(self, *, is_usable: bool, step: int) -> None:
        """Count a step.

        Raises:
            TooManySkippedSteps: After ten skipped steps in a row.
        """
        self.in_a_row = 0 if is_usable else self.in_a_row + 1
        if is_usable:
            return
        rank_zero_warn(f"step {step} is skipped ({self.in_a_row} in a row): no usable row, or a non-finite gradient")
        if self.in_a_row == MAX_SKIPPED_STEPS:
            raise TooManySkippedSteps(
                f"{MAX_SKIPPED_STEPS} steps in a row had no usable row or a gradient that is not finite; the weights "
                f"are those before them: {self.remedy}"
            )


class TrainableModule(LightningModule):
    """A transformers model and how it is trained.

    A subclass names the model (``trained_model``), loads it in ``configure_model`` and calls :meth:`update` from its
    ``training_step``.

    Args:
        source: Where the trained model comes from.
        optimizer: Optimizer of the model's parameters; weight decay is left off norms and biases.
        lr_schedule: Course of the learning rate from its peak to the last step: constant, linear to zero or cosine.
        warmup_fraction: Fraction of all steps over which the learning rate rises from zero to its peak.
        micro_batch_size: Rows (responses, pairs) of each forward and backward pass, those of similar length together;
            the update does not depend on it, the memory does. The default is the full batch.
        micro_batch_tokens: Tokens of each forward and backward pass, padding included; a longer row is a micro-batch of
            its own. With both limits, the one that is reached first ends a micro-batch.
        max_grad_norm: The gradient is scaled down to this norm; null does not clip.
        activation_checkpointing: Store only the input of each block for the backward pass and recompute the rest:
            far less memory, for about a third more time in the update.
        lora: Train low-rank adapters on the model instead of its weights, which are frozen.

    Raises:
        ValueError: If an argument is out of its range.
    """

    loader: ClassVar[Loader]  # loads the trained model of a source

    def __new__(cls, *args: Any, **arguments: Any) -> "TrainableModule":
        """Refuse an unknown argument with the nearest known one."""
        check_names(cls, arguments)
        return super().__new__(cls)

    def __init__(
        self,
        source: ModelLike,
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
        check_arguments(warmup_fraction, micro_batch_size, micro_batch_tokens, max_grad_norm)
        self.save_hyperparameters(as_plain(constructor_arguments(inspect.currentframe())))
        self.source = ModelSource.of(source)
        self.tokenizer = self.source.load_tokenizer()
        self.optimizer, self.lora = optimizer, lora
        self.lr_schedule, self.warmup_fraction = lr_schedule, warmup_fraction
        self.micro_batch_size, self.micro_batch_tokens = micro_batch_size, micro_batch_tokens
        self.max_grad_norm, self.activation_checkpointing = max_grad_norm, activation_checkpointing
        self.automatic_optimization, self.strict_loading = False, lora is None  # of a checkpoint: only what is trained
        self.register_state_dict_post_hook(leave_out_frozen)
        self.sharding: Sharding | None = None  # set by a strategy that shards models
        self.frozen: dict[str, dict[str, Any]] = {}  # samples of weights that no checkpoint holds, see weight_sample
        self.skipped_steps = SkippedSteps()
        self.unfinished = UnfinishedBatch()
        self.timer, self.train_means, self.eval_means = PhaseTimer(), Means(), Means()

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls: type[ModuleType], checkpoint_path: Any, **arguments: Any
    ) -> ModuleType:
        """A module with the arguments and weights of a checkpoint; see :func:`load_module`."""
        return load_module(cls, checkpoint_path, arguments)

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

    def load_model(self, loader: Loader, source: ModelSource) -> PreTrainedModel:
        """A model of a source to train: with adapters, sharded and with checkpointed activations, as configured."""
        model = load_trainable(
            loader, source, self.lora, self.sharding, activation_checkpointing=self.activation_checkpointing
        )
        if self.sharding is not None:
            rank_zero_info(f"{type(model).__name__} is loaded; peak host memory by rank, GiB: {peak_host_memory()}")
        self.frozen |= base_samples(model)
        return model

    def unsharded_model(self) -> PreTrainedModel | None:
        """The trained model for export; of a sharded one a full copy on rank 0, None on the others."""
        if self.sharding is None:
            return self.trained_model
        return gather_to_rank_0(self.trained_model, lambda: build_on_meta(self.loader, self.source, self.lora))

    def configure_optimizers(self) -> Any:
        """The optimizer over groups of parameters, and the schedule of its learning rate."""
        optimizer = self.optimizer(cast(Iterable[nn.Parameter], self.parameter_groups()))
        schedule = configured_schedule(
            optimizer, self.lr_schedule, self.warmup_fraction, self.trainer, self.updates_per_batch
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters of all trained models in groups, as optimizers take them."""
        return [group for model in self.trained_models.values() for group in parameter_groups(model)]

    def update(
        self,
        lengths: Tensor,
        losses: Losses,
        num_terms: Tensor,
        *,
        accept: Callable[[dict[str, Tensor]], bool] | None = None,
    ) -> None:
        """One optimizer step on a batch, in micro-batches: the only one in the project.

        A step with nothing to learn from or with a gradient that is not finite is skipped and counted. All ranks decide
        the same, since the gradient is the same on all of them; the weights stay bitwise as they were.

        Args:
            lengths: Tokens of each row of this rank's batch, (B,).
            losses: From row indices to the loss of each of the trained models, divided by ``num_terms``.
            num_terms: Number of terms by :meth:`mean_count_per_rank`; 0 if every row was dropped.
            accept: From the metrics of all rows, (N,) each, to whether the step is taken; all ranks have to agree.

        Raises:
            TooManySkippedSteps: After ten skipped steps in a row.
            TypeError: If ``losses`` yields something else.
        """
        if self.unfinished.skips():
            return
        optimizer = cast(Optimizer, self.optimizers())
        models = list(self.trained_models.values())
        accumulation = GradientAccumulation(models, self.manual_backward, self.trainer.strategy, self.sharding)
        metrics = accumulation.run(self.micro_batches(lengths), losses)
        norms = {name: clip_gradient(model, self.max_grad_norm) for name, model in self.trained_models.items()}
        is_accepted = accept is None or accept(metrics)
        is_usable = is_accepted and bool(torch.stack(list(norms.values())).isfinite().all() & (num_terms > 0))
        metrics |= {f"{name}grad_norm": norm for name, norm in norms.items()}
        metrics["steps_skipped"] = torch.tensor(float(not is_usable), device=self.device)
        metrics["learning_rate"] = torch.tensor(float(optimizer.param_groups[0]["lr"]), device=self.device)
        self.train_means.add_all(metrics)
        if is_usable:
            optimizer.step()
            self.lr_schedulers().step()  # type: ignore[union-attr]
        call_before_zero_grad(self, optimizer)
        optimizer.zero_grad()
        self.skipped_steps.count(is_usable=is_usable, step=self.global_step)

    def micro_batches(self, lengths: Tensor) -> list[Tensor]:
        """Row indices of each micro-batch, the longest rows first."""
        return micro_batches(lengths, size=self.micro_batch_size, tokens=self.micro_batch_tokens)

    def mean_count_per_rank(self, count: Tensor) -> Tensor:
        """Number of terms (tokens, pairs) of the global batch divided by the number of ranks.

        Strategies average gradients over ranks: losses divided by it add up to the mean over the global batch.
        """
        return self.sum_over_ranks(count) / self.trainer.world_size

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Values added over all ranks, float64."""
        return cast(Tensor, self.trainer.strategy.reduce(values.double(), reduce_op="sum"))

    def is_true_on_all_ranks(self, claim: bool) -> bool:
        """Whether a claim is true on all ranks; collective."""
        return self.trainer.strategy.reduce_boolean_decision(claim, all=True)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a phase of the step, for ``time/*`` and for Lightning's profilers."""
        return self.timer.phase(name, self.trainer.profiler)  # type: ignore[attr-defined]

    def log_training(self, progress: Iterable[str]) -> dict[str, Tensor]:
        """Log the step's means over all ranks under ``train/`` and the seconds of its phases under ``time/``.

        Returns:
            The means.
        """
        means = self.train_means.compute(self.device)
        for name, value in means.items():
            self.log(f"train/{name}", value, prog_bar=name in set(progress), batch_size=1)
        for name, seconds in self.timer.take().items():
            self.log(f"time/{name}", seconds, batch_size=1)
        return means

    def log_evaluation(self) -> None:
        """Log the means over all batches of a validation or test."""
        stage = "test" if self.trainer.testing else "val"
        for name, value in self.eval_means.compute(self.device).items():
            self.log(f"{stage}/{name}", value, prog_bar=True, batch_size=1)

    on_validation_epoch_end = on_test_epoch_end = log_evaluation


def call_before_zero_grad(module: TrainableModule, optimizer: Optimizer) -> None:
    """Tell the callbacks that an update is complete, or skipped; Lightning leaves this hook to manual optimization."""
    module.unfinished.end_update()
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        callback.on_before_zero_grad(module.trainer, module, optimizer)


def load_module(cls: type[ModuleType], path: Any, arguments: dict[str, Any]) -> ModuleType:
    """A module with the weights of a checkpoint, built by the arguments that were saved in it.

    Args:
        cls: Its class.
        path: A checkpoint file or folder, or a folder of checkpoints for the newest of them.
        arguments: Arguments of the constructor that replace the saved ones.

    Raises:
        ValueError: If an argument cannot be restored and is not given, or it is the checkpoint of another method.
    """
    checkpoint = read_verified(path)
    module = cls(**restored(cls, checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}), arguments))
    module.configure_model()
    check_model(checkpoint, module, is_fit=True)
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    return module


def check_names(cls: type, arguments: Iterable[str]) -> None:
    """Refuse an unknown argument of a constructor with the nearest known one.

    Raises:
        TypeError: If there is one.
    """
    known = list(inspect.signature(cls.__init__).parameters)[1:]  # type: ignore[misc]
    for name in arguments:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(known)}"
            raise TypeError(f"{cls.__name__} has no argument {name}; {hint}")


def check_arguments(
    warmup_fraction: float, micro_batch_size: int | None, micro_batch_tokens: int | None, max_grad_norm: float | None
) -> None:
    """Refuse arguments that are out of their range.

    Raises:
        ValueError: If one is.
    """
    if not 0 <= warmup_fraction < 1:
        raise ValueError(f"warmup_fraction is a fraction of all steps, from 0 to below 1, got {warmup_fraction}")
    for name, limit in (("micro_batch_size", micro_batch_size), ("micro_batch_tokens", micro_batch_tokens)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} must be at least 1, got {limit}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive, or null for no clipping, got {max_grad_norm}")
