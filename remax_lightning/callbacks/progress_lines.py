"""Progress of a run: a bar over its steps in a terminal, plain lines elsewhere, and which limit ended it."""

import math
import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_info

from remax_lightning.modules.base import TrainableModule


def total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of a run, by whichever of ``max_steps`` and ``max_epochs`` is sooner; None without a limit."""
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    batches = trainer.num_training_batches
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and math.isfinite(batches):
        module = trainer.lightning_module
        per_batch = module.updates_per_batch if isinstance(module, TrainableModule) else 1
        limits.append(trainer.max_epochs * int(batches) * per_batch)
    return min(limits, default=None)


class StepBar(RichProgressBar):
    """Lightning's progress bar, over all steps where ``max_steps`` ends the run; else over the batches of an epoch."""

    @property
    def counts_steps(self) -> bool:
        """Whether ``max_steps`` ends the run."""
        return self.trainer.max_steps > 0 and total_steps(self.trainer) == self.trainer.max_steps

    @property
    def total_train_batches(self) -> int | float:
        """Where the bar ends."""
        return self.trainer.max_steps if self.counts_steps else super().total_train_batches

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a bar; one over all steps goes on over epochs."""
        if self.counts_steps and self.train_progress_bar_id is not None:
            return
        super().on_train_epoch_start(trainer, pl_module)
        if self.counts_steps and self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description="Step")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        done = trainer.global_step - 1 if self.counts_steps else batch_idx
        super().on_train_batch_end(trainer, pl_module, outputs, batch, done)


class ProgressLines(Callback):
    """Prints a line with the step, the metrics of the progress bar and the time, where no bar can be shown.

    The last step has a line too, and so has each validation.

    Args:
        every_n_steps: Steps between two lines; 0 prints none.
        every_n_seconds: Seconds after which a line is printed at the next step, however few steps there were.
    """

    def __init__(self, every_n_steps: int = 20, every_n_seconds: float = 30.0) -> None:
        if every_n_steps < 0:
            raise ValueError(f"every_n_steps must be 0 (no lines) or positive, got {every_n_steps}")
        if not every_n_seconds > 0:
            raise ValueError(f"every_n_seconds must be positive, got {every_n_seconds}")
        self.every_n_steps, self.every_n_seconds = every_n_steps, every_n_seconds
        self.start = self.printed_at = time.monotonic()
        self.first_step = self.printed_step = 0
        self.has_validated = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.start = self.printed_at = time.monotonic()
        self.first_step = self.printed_step = trainer.global_step
        self.has_validated = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Print a line when it is time."""
        if self.every_n_steps == 0:
            return
        passed = trainer.global_step // self.every_n_steps > self.printed_step // self.every_n_steps
        if passed or time.monotonic() - self.printed_at >= self.every_n_seconds:
            self._print(trainer, is_validation=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of a validation during a fit, once."""
        if trainer.training or trainer.state.fn == "fit":
            self.has_validated = True
            self._print(trainer, is_validation=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the last step, and what the run did not come to."""
        step, epochs = trainer.global_step, trainer.max_epochs
        if self.printed_step != step:
            self._print(trainer, is_validation=False)
        if trainer.max_steps > step and epochs is not None and 0 <= epochs <= trainer.current_epoch:
            rank_zero_info(
                f"the run ended at step {step} of trainer.max_steps={trainer.max_steps}, since trainer.max_epochs="
                f"{epochs}; set trainer.max_epochs to -1 to take all steps"
            )
        if not self.has_validated and step > self.first_step and sum(trainer.num_val_batches) > 0:
            rank_zero_info(
                f"the run ended at step {step} before its first validation; lower trainer.val_check_interval (now "
                f"{trainer.val_check_interval})"
            )

    def _print(self, trainer: Trainer, is_validation: bool) -> None:
        """Print a line: metrics of the step, or of the validation that has just ended."""
        step, now = trainer.global_step, time.monotonic()
        if not is_validation:
            self.printed_at, self.printed_step = now, step
        if self.every_n_steps == 0 or not trainer.is_global_zero or sys.stdout.isatty():
            return
        total = total_steps(trainer)
        values = sorted(trainer.progress_bar_metrics.items())
        shown = [(name, value) for name, value in values if name.startswith("val/") == is_validation]
        metrics = "  ".join(f"{name} {float(value):.3f}" for name, value in shown)
        left = self._time_left(now, step, total)
        print(
            f"step {step}{'' if total is None else f'/{total}'}  {metrics}  {clock(now - self.start)}{left}", flush=True
        )

    def _time_left(self, now: float, step: int, total: int | None) -> str:
        if total is None or not self.first_step < step < total:
            return ""
        return f", {clock((now - self.start) / (step - self.first_step) * (total - step))} left"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, such as 0:01:23."""
    return str(timedelta(seconds=round(seconds)))
