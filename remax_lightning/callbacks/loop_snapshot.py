"""The state of the trainer's loops after a step, from which a resumed run continues as if it had never stopped.

What Lightning saves depends on the hook that it saves from, and some of these states do not resume exactly: a
validation that was due is skipped, an epoch ends without being counted. Here each step has one state, captured when
the step ends.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch import Trainer


@dataclass(frozen=True)
class LoopSnapshot:
    """The position of a run after a step.

    Args:
        loops: State of Lightning's loops at the end of the batch, before any validation.
        data: State of the data module: its position in the rows.
        batches: Batches trained on, including those of skipped steps.
        epoch: Epochs that are complete.
        step: Optimizer steps taken.
        validation_due: A validation follows this step and has not been run yet.
        scores: Metrics of that validation, if it has been run.
    """

    loops: dict[str, Any]
    data: dict[str, Any]
    batches: int
    epoch: int
    step: int
    validation_due: bool
    scores: dict[str, float] = field(default_factory=dict)

    @classmethod
    def capture(cls, trainer: Trainer) -> "LoopSnapshot":
        """The state at the end of a training batch, from where it must be called."""
        epoch_loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        return cls(
            loops=trainer._checkpoint_connector._get_loops_state_dict(),
            data={} if trainer.datamodule is None else trainer.datamodule.state_dict(),  # type: ignore[attr-defined]
            batches=epoch_loop.batch_progress.total.ready,
            epoch=trainer.current_epoch,
            step=trainer.global_step,
            validation_due=epoch_loop._should_check_val_fx(fetcher),
        )

    def validated(self, scores: dict[str, float]) -> "LoopSnapshot":
        """The state after the validation."""
        return replace(self, validation_due=False, scores=scores)

    def write_to(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Replace the loops' current state in a checkpoint by this one."""
        checkpoint.update(epoch=self.epoch, global_step=self.step, loops=self.resumable_loops())
        if self.data:
            checkpoint[type(trainer.datamodule).__qualname__] = self.data  # type: ignore[attr-defined]

    def resumable_loops(self) -> dict[str, Any]:
        """The loops' state to resume from: at the validation, the next epoch or the next batch."""
        loops = deepcopy(self.loops)
        fit = loops["fit_loop"]
        batches, validation = fit["epoch_loop.batch_progress"], fit["epoch_loop.val_loop.batch_progress"]
        if self.validation_due:
            _complete(batches)
            _mark_validation_pending(validation)
        elif batches["is_last_batch"]:
            _complete(batches)
            _complete(fit["epoch_progress"])
            batches.update(current=dict.fromkeys(batches["current"], 0), is_last_batch=False)
            fit["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
        return loops


def clear_restarting_flag(trainer: Trainer) -> None:
    """Let a run that was resumed between two epochs start the next one normally; call when training starts."""
    epochs = trainer.fit_loop.epoch_progress.total
    if epochs.ready == epochs.completed:
        trainer.fit_loop.epoch_loop.restarting = False


def _complete(progress: dict[str, Any]) -> None:
    """Count what has started as complete."""
    for counts in (progress["total"], progress["current"]):
        counts.update(dict.fromkeys(counts, counts["ready"]))


def _mark_validation_pending(progress: dict[str, Any]) -> None:
    """Count one batch as started and not processed: this makes Lightning run the validation again."""
    _complete(progress)
    progress.update(current=dict.fromkeys(progress["current"], 0), is_last_batch=False)
    for counts in (progress["total"], progress["current"]):
        counts.update(ready=counts["ready"] + 1, started=counts["started"] + 1)
