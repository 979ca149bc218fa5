"""Saves each state of a run once, and tells when the save is complete."""

from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Trainer

from remax_lightning.callbacks.checkpoint_store import CheckpointStore
from remax_lightning.callbacks.loop_snapshot import LoopSnapshot
from remax_lightning.checkpoints.manifest import add_scores, unused_path
from remax_lightning.checkpoints.safe_checkpoint_io import SafeCheckpointIO, SaveOptions


class SnapshotSaver:
    """Saves snapshots of a run into a folder.

    Args:
        store: The folder.
        weights_only: Leave out the optimizer.
        in_background: Return when the tensors are copied; one save at a time.
        on_saved: Called on rank 0 with the path of each checkpoint when it is complete.
    """

    def __init__(
        self,
        store: CheckpointStore,
        weights_only: bool,
        in_background: bool,
        on_saved: Callable[[Trainer, str], None],
    ) -> None:
        self.store, self.weights_only, self.in_background, self.on_saved = store, weights_only, in_background, on_saved
        self.io = SafeCheckpointIO()
        self.path = ""  # on rank 0: the newest save, or the checkpoint that the run was resumed from
        self.saved_batches = 0
        self.late_scores: dict[str, float] = {}  # of the checkpoint that is being written in the background

    def is_unsaved(self, trainer: Trainer, snapshot: LoopSnapshot | None) -> bool:
        """Whether there is something to save; before the first optimizer step there is not."""
        if snapshot is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return False
        return snapshot.step > 0 and snapshot.batches != self.saved_batches

    def save(self, trainer: Trainer, snapshot: LoopSnapshot | None, *, alone: bool = False) -> None:
        """Save a snapshot, unless that is done; collective unless alone.

        Raises:
            OSError: If it, or an earlier save in the background, could not be written.
        """
        if snapshot is None or not self.is_unsaved(trainer, snapshot):
            return
        self.finish(trainer)
        # the strategy takes the path of rank 0
        self.path = str(unused_path(self.store.folder, snapshot.step)) if trainer.is_global_zero else ""
        options = SaveOptions(self.store.run, snapshot.scores, in_background=self.in_background)
        with trainer.profiler.profile("save_checkpoint"):  # type: ignore[attr-defined]
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.weights_only)
            trainer.strategy.save_checkpoint(checkpoint, self.path, storage_options=options)
        if not alone:
            trainer.strategy.barrier()
        self.saved_batches = snapshot.batches
        if not self.in_background:
            self._complete(trainer)

    def finish(self, trainer: Trainer) -> None:
        """Wait for the save in the background.

        Raises:
            OSError: If it could not be written.
        """
        if self.io.wait():
            self._complete(trainer)

    def _complete(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            add_scores(self.path, self.late_scores)
            self.late_scores = {}
            self.store.prune(self.io)
            self.on_saved(trainer, self.path)

    def add_scores(self, trainer: Trainer, scores: dict[str, float]) -> None:
        """Add the scores of a state that is saved already, or that the run was resumed from."""
        if self.io.is_saving:
            self.late_scores = scores
        elif trainer.is_global_zero and Path(self.path).parent == self.store.folder:
            add_scores(self.path, scores)
            self.store.prune(self.io)
