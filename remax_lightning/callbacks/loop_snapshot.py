"""The state of the trainer's loops after a step, from which a resumed run continues as if it had never stopped.

What Lightning saves depends on the hook that it saves from, and some of these states do not resume exactly: a
validation that was due is skipped, an epoch ends without being counted. Here each step has one state, captured when
the step ends.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, cast

from lightning.pytorch import Trainer

from remax_lightning.modules.base import TrainableModule


@dataclass(frozen=True)
class LoopSnapshot:
    """The position of a run after a batch.

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
        """The state at the end of the training batch that is running, or as if it had ended.

        Updates of the batch that were still to be made are left out then.
        """
        epoch_loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        loops = trainer._checkpoint_connector._get_loops_state_dict()
        batches = loops["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (batches["total"], batches["current"]):
            counts.update(started=counts["ready"], processed=counts["ready"])
        return cls(
            loops=loops,
            data={} if trainer.datamodule is None else trainer.datamodule.state_dict(),  # type: ignore[attr-defined]
            batches=epoch_loop.batch_progress.total.ready,
            epoch=trainer.current_epoch,
            step=trainer.global_step,
            validation_due=epoch_loop._should_check_val_fx(fetcher),
        )

    def validated(self, scores: dict[str, float]) -> "LoopSnapshot":
        """The state after the validation."""
        return replace(self, validation_due=False, scores=scores)

    def with_steps(self, trainer: Trainer) -> "LoopSnapshot":
        """The same position with the optimizer steps taken since, from where the next batch is finished."""
        loops = deepcopy(self.loops)
        progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.state_dict()
        loops["fit_loop"]["epoch_loop.manual_optimization.optim_step_progress"] = progress
        return replace(self, loops=loops, step=trainer.global_step, scores={})

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


class LastState:
    """The last complete state of a fit, as it goes on.

    Without ``start``, there is none.
    """

    def __init__(self) -> None:
        self.loaded: dict[str, Any] | None = None  # the loops' state that the fit was resumed from
        self.beginning: LoopSnapshot | None = None
        self.snapshot: LoopSnapshot | None = None  # of the last finished batch
        self.step = self.batches = 0  # of the snapshot, or of the start
        self.is_training = False

    def start(self, trainer: Trainer) -> None:
        """Begin with nothing to save, when training starts."""
        self.snapshot, self.is_training = None, True
        self.step, self.batches = trainer.global_step, _batches(trainer)["ready"]
        loops = self.loaded or deepcopy(trainer._checkpoint_connector._get_loops_state_dict())
        data = {} if trainer.datamodule is None else trainer.datamodule.state_dict()  # type: ignore[attr-defined]
        self.beginning = LoopSnapshot(loops, data, self.batches, trainer.current_epoch, self.step, False)
        clear_restarting_flag(trainer)

    def capture(self, trainer: Trainer) -> LoopSnapshot:
        """The state at the end of a training batch, from where it must be called."""
        self.snapshot = LoopSnapshot.capture(trainer)
        self.step, self.batches = self.snapshot.step, self.snapshot.batches
        return self.snapshot

    def validated(self, scores: dict[str, float]) -> None:
        """The validation after the last batch has been run."""
        if self.snapshot is not None:
            self.snapshot = self.snapshot.validated(scores)

    def newest(self, trainer: Trainer) -> LoopSnapshot | None:
        """The state after the last finished optimizer step; None before there is one.

        While an update is half done that state is lost, and this still tells which one it was.
        """
        batches, module = _batches(trainer), cast(TrainableModule, trainer.lightning_module)
        if not self.is_training or module.unfinished.is_torn or batches["ready"] == self.batches:
            return self.snapshot
        has_stepped = trainer.global_step > self.step
        finished = self.snapshot or self.beginning
        if has_stepped and finished is not None and module.unfinished.can_resume:
            return finished.with_steps(trainer)
        return (
            LoopSnapshot.capture(trainer) if has_stepped or batches["processed"] == batches["ready"] else self.snapshot
        )


def _batches(trainer: Trainer) -> dict[str, int]:
    """How many batches are ready (begun) and processed, over all epochs."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.state_dict()


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
