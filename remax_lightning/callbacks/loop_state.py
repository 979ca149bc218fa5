"""The state of the trainer's loops after a step, such that a resumed run goes on as if it had never stopped.

What Lightning saves depends on the hook that it saves from, and some of these states do not resume exactly: the
validation that was due is skipped, an epoch ends without being counted. Here a step has one state, noted when it ends.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import Trainer


@dataclass(frozen=True)
class StepEnd:
    """Where a run stands after a step.

    Args:
        loops: State of Lightning's loops at the end of the batch, before any validation.
        data: State of the data module, its position in the rows.
        batches: Batches trained on, those of skipped steps too.
        epoch: Epochs that are complete.
        step: Optimizer steps taken.
        validation_due: A validation follows this step and has not been done yet.
    """

    loops: dict[str, Any]
    data: dict[str, Any]
    batches: int
    epoch: int
    step: int
    validation_due: bool

    @classmethod
    def of(cls, trainer: Trainer) -> "StepEnd":
        """The state, when called at the end of a training batch."""
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

    def validated(self) -> "StepEnd":
        """The state when the validation is done."""
        return replace(self, validation_due=False)

    def write_to(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Put this state into a checkpoint, in place of what the trainer's is at this moment."""
        checkpoint.update(epoch=self.epoch, global_step=self.step, loops=self.resumable_loops())
        if self.data:
            checkpoint[type(trainer.datamodule).__qualname__] = self.data  # type: ignore[attr-defined]

    def resumable_loops(self) -> dict[str, Any]:
        """State of the loops to go on from: with the validation, the next epoch or the next batch."""
        loops = deepcopy(self.loops)
        fit = loops["fit_loop"]
        batches, validation = fit["epoch_loop.batch_progress"], fit["epoch_loop.val_loop.batch_progress"]
        if self.validation_due:
            _complete(batches)
            _begin_first(validation)
        elif batches["is_last_batch"]:
            _complete(batches)
            _complete(fit["epoch_progress"])
            batches.update(current=dict.fromkeys(batches["current"], 0), is_last_batch=False)
            fit["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
        return loops


def begin_epoch_anew(trainer: Trainer) -> None:
    """Let a run that was resumed between two epochs begin the next one like any other; call when training starts."""
    epochs = trainer.fit_loop.epoch_progress.total
    if epochs.ready == epochs.completed:
        trainer.fit_loop.epoch_loop.restarting = False


def _complete(progress: dict[str, Any]) -> None:
    """Count what has begun as complete."""
    for counts in (progress["total"], progress["current"]):
        counts.update(dict.fromkeys(counts, counts["ready"]))


def _begin_first(progress: dict[str, Any]) -> None:
    """Count one batch as begun and not processed: this is what makes Lightning do the validation again."""
    _complete(progress)
    progress.update(current=dict.fromkeys(progress["current"], 0), is_last_batch=False)
    for counts in (progress["total"], progress["current"]):
        counts.update(ready=counts["ready"] + 1, started=counts["started"] + 1)
