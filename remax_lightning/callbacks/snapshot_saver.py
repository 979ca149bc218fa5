"""Saves each state of a run once, and tells when the save is complete."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from remax_lightning.callbacks.checkpoint_store import CheckpointStore
from remax_lightning.callbacks.finite_weights import NonFiniteWeights
from remax_lightning.callbacks.loop_snapshot import LastState, LoopSnapshot
from remax_lightning.callbacks.rendezvous import Claim, Rendezvous
from remax_lightning.checkpoints.manifest import add_scores, unused_path
from remax_lightning.checkpoints.safe_checkpoint_io import SafeCheckpointIO, SaveOptions
from remax_lightning.models.finite import non_finite_trained
from remax_lightning.modules.base import TrainableModule


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
        self.saved = (0, 0)  # batches and optimizer steps of the newest save
        self.rendezvous: Rendezvous | None = None  # of ranks that can only save together
        self.late_scores: dict[str, float] = {}  # of the checkpoint that is being written in the background

    def is_unsaved(self, trainer: Trainer, snapshot: LoopSnapshot | None) -> bool:
        """Whether there is something to save; before the first optimizer step there is not."""
        if snapshot is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return False
        return snapshot.step > 0 and (snapshot.batches, snapshot.step) != self.saved

    def save(self, trainer: Trainer, snapshot: LoopSnapshot | None, *, alone: bool = False) -> None:
        """Save a snapshot, unless that is done; collective unless alone.

        Raises:
            OSError: If it, or an earlier save in the background, could not be written.
            NonFiniteWeights: If the weights are not finite.
        """
        if snapshot is None or not self.is_unsaved(trainer, snapshot):
            return
        self.finish(trainer)
        self._check_weights(trainer, snapshot, alone=alone)
        # the strategy takes the path of rank 0
        path = str(unused_path(self.store.folder, snapshot.step)) if trainer.is_global_zero else ""
        options = SaveOptions(self.store.run, snapshot.scores, in_background=self.in_background)
        with trainer.profiler.profile("save_checkpoint"):  # type: ignore[attr-defined]
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.weights_only)
            trainer.strategy.save_checkpoint(checkpoint, path, storage_options=options)
        if not alone:
            trainer.strategy.barrier()
        self.path, self.saved = path, (snapshot.batches, snapshot.step)
        if not self.in_background:
            self._complete(trainer)

    def save_after_error(self, trainer: Trainer, state: LastState, exception: BaseException) -> None:
        """Save the last complete state, or say that it is lost."""
        try:
            self.finish(trainer)
            snapshot = state.newest(trainer)
            if snapshot is None or not self.is_unsaved(trainer, snapshot):
                return
            is_torn = cast(TrainableModule, trainer.lightning_module).unfinished.is_torn
            if self.rendezvous is not None:
                self._save_together(trainer, snapshot, self.rendezvous, is_torn=is_torn)
            elif is_torn:
                raise RuntimeError("the update was interrupted half way")
            else:  # by rank 0, if it can: the others may be anywhere
                self.save(trainer, snapshot, alone=True)
            rank_zero_info(f"{type(exception).__name__}: the state is saved as {self.path}")
        except Exception as error:
            newest = self.store.newest()
            left = "there is no checkpoint" if newest is None else f"the newest checkpoint is {newest}"
            rank_zero_warn(f"the state after the last finished step could not be saved: {error}; {left}")

    def _save_together(
        self, trainer: Trainer, snapshot: LoopSnapshot, rendezvous: Rendezvous, *, is_torn: bool
    ) -> None:
        is_complete = not is_torn and not non_finite_trained(trainer.lightning_module)
        claim = Claim(snapshot.batches, snapshot.step, is_complete and is_sharded(trainer.strategy))
        path = rendezvous.meet(claim, str(unused_path(self.store.folder, snapshot.step)))
        if path is None:
            raise RuntimeError(
                "the ranks can only save together, and not all of them have come here with the same complete state"
            )
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.weights_only)
        self.io.save_sharded(checkpoint, path, SaveOptions(self.store.run, snapshot.scores, group=rendezvous.group))
        self.path, self.saved = path, (snapshot.batches, snapshot.step)
        self._complete(trainer)

    def _check_weights(self, trainer: Trainer, snapshot: LoopSnapshot, *, alone: bool) -> None:
        names = non_finite_trained(trainer.lightning_module)
        if not (not names if alone else trainer.strategy.reduce_boolean_decision(not names, all=True)):
            raise NonFiniteWeights(names or "some of another rank's", snapshot.step, self.store.newest())

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
            self.store.note_saved()
            self.on_saved(trainer, self.path)

    def add_scores(self, trainer: Trainer, scores: dict[str, float]) -> None:
        """Add the scores of a state that is saved already, or that the run was resumed from."""
        if self.io.is_saving:
            self.late_scores = scores
        elif trainer.is_global_zero and Path(self.path).parent == self.store.folder:
            add_scores(self.path, scores)
            self.store.prune(self.io)


def is_sharded(strategy: Strategy) -> bool:
    """Whether each rank writes its shards."""
    return isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint
