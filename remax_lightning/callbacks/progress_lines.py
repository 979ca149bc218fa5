"""Progress as plain lines, for logs that are no terminal."""

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ProgressLines(Callback):
    """Prints a line with the step, the metrics of the progress bar and the seconds so far, where no bar can be shown.

    Args:
        every_n_steps: Steps between two lines; 0 prints none.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        if every_n_steps < 0:
            raise ValueError(f"every_n_steps must be 0 (no lines) or positive, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.start = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.start = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Print a line when it is time."""
        step = trainer.global_step
        is_time = self.every_n_steps > 0 and (step % self.every_n_steps == 0 or step == trainer.max_steps)
        if not is_time or not trainer.is_global_zero or sys.stdout.isatty():
            return
        total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        values = sorted(trainer.progress_bar_metrics.items())
        metrics = "  ".join(f"{name} {float(value):.3f}" for name, value in values)
        print(f"step {step}{total}  {metrics}  {time.monotonic() - self.start:.0f} s", flush=True)
