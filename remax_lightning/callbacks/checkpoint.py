"""Checkpoints in the run's own folder."""

import os
import uuid
from pathlib import Path
from typing import Any
from weakref import proxy

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from remax_lightning.callbacks.loop_state import StepEnd, begin_epoch_anew
from remax_lightning.callbacks.resume_check import check_configuration, check_model, fingerprint
from remax_lightning.callbacks.safe_checkpoint_io import (
    SafeCheckpointIO,
    add_score,
    manifests,
    newest_complete,
    remove_partial,
    unused_path,
)
from remax_lightning.callbacks.termination import Terminated, Termination, end_children
from remax_lightning.modules.base import TrainableModule


class Checkpoint(ModelCheckpoint):
    """Saves the state of training as ``step=N.ckpt``, each with a manifest beside it that tells whether it is complete.

    The newest are kept, and the best. When training ends by SIGTERM or an error, at whatever moment, the state after
    the last finished step is saved. Under fsdp2, whose processes can only save together, SIGTERM waits for the end of
    the step, and after an error there are the checkpoints written before it.

    Args:
        dirpath: Folder; the command line gives ``<trainer.default_root_dir>/checkpoints``.
        every_n_train_steps: Steps between two saves; the default saves after every validation and epoch, and at the end
            of training.
        monitor: Metric by which the best checkpoints are kept, such as ``val/reward``. With it, every validation is
            followed by a save.
        mode: Whether a larger (``max``) or a smaller (``min``) metric is better.
        save_top_k: Checkpoints with the best metric to keep; -1 keeps all checkpoints.
        keep_last: Newest checkpoints to keep. With 2, there is another to go on from if the newest is damaged.
        save_weights_only: Leave out the optimizer; training cannot be resumed from that.

    Raises:
        ValueError: If ``keep_last`` is below 1.
    """

    def __init__(
        self,
        dirpath: str,
        every_n_train_steps: int | None = None,
        monitor: str | None = None,
        mode: str = "max",
        save_top_k: int = 1,
        keep_last: int = 2,
        save_weights_only: bool = False,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, the checkpoint just written, got {keep_last}")
        super().__init__(
            dirpath=dirpath,
            every_n_train_steps=every_n_train_steps,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_weights_only=save_weights_only,
        )
        self.folder = Path(str(self.dirpath))
        self.saves_by_step = every_n_train_steps is not None
        self.keep_last = keep_last
        self.configuration: dict[str, Any] = {}
        self.io = SafeCheckpointIO()
        self.termination = Termination()
        self.end: StepEnd | None = None
        self.is_whole = True
        self.saved_batches = 0
        self.begun_at = 0  # the step that this process began with

    @property
    def state_key(self) -> str:
        """The same, however the callback is configured."""
        return "Checkpoint"

    def state_dict(self) -> dict[str, Any]:
        """Which training this is; all else is in the manifests."""
        return {"run": self.io.run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a training."""
        self.io.run = state_dict["run"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the trainer write and read checkpoints safely."""
        assert isinstance(pl_module, TrainableModule)
        self.io = SafeCheckpointIO(check=lambda checkpoint: check_model(checkpoint, pl_module, is_fit=stage == "fit"))
        self.io.run = uuid.uuid4().hex
        trainer.strategy.checkpoint_io = self.io
        self._check_ranks_agree(trainer)

    def _check_ranks_agree(self, trainer: Trainer) -> None:
        first = trainer.strategy.broadcast(trainer.ckpt_path)
        if first != trainer.ckpt_path:
            raise ValueError(
                f"process {trainer.global_rank} would read {trainer.ckpt_path}, process 0 {first}: all need the same "
                "checkpoint; let them see the same folder, or name a file"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make it the state after the last finished step, and add what a resumed run is compared with."""
        assert isinstance(pl_module, TrainableModule)
        checkpoint.update(fingerprint=fingerprint(pl_module), configuration=self.configuration)
        if self.end is not None:
            self.end.write_to(checkpoint, trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare the configurations."""
        old = checkpoint.get("configuration")
        if trainer.state.fn == "fit" and old and self.configuration:
            check_configuration(old, self.configuration)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with nothing to save; from here on SIGTERM is heard."""
        self.end, self.is_whole, self.saved_batches, self.begun_at = None, True, 0, trainer.global_step
        begin_epoch_anew(trainer)
        if trainer.is_global_zero:
            remove_partial(self.folder)
        self.termination.start(trainer, at_once=self._saves_alone(trainer))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let nothing come between the update and the end of the step."""
        self.termination.forbid()
        self.is_whole = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note the state, and save it when it is time."""
        with self.termination.waiting():
            before = self.begun_at if self.end is None else self.end.step
            self.end, self.is_whole = StepEnd.of(trainer), True
            # a batch may have taken several steps
            if self.saves_by_step and self.end.step // self._every_n_train_steps > before // self._every_n_train_steps:
                self._save(trainer)
        self._end_if_any_is_told_to(trainer)

    def _end_if_any_is_told_to(self, trainer: Trainer) -> None:
        """Save after this step if SIGTERM has come to any of the processes, which can only save together."""
        told = self.termination.is_requested
        if not self.termination.at_once and trainer.strategy.reduce_boolean_decision(told, all=False):
            self._save(trainer)
            raise Terminated

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that it is done, and save."""
        if trainer.sanity_checking or self.end is None or trainer.state.fn != "fit":
            return
        with self.termination.waiting():
            self.end = self.end.validated()
            self._save_unless_by_step(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, if no validation has just done so."""
        with self.termination.waiting():
            self._save_unless_by_step(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, if it is not saved yet."""
        with self.termination.waiting():
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the last finished step, by process 0 alone: the others may be anywhere."""
        self.termination.forbid()
        if self.is_whole and self._is_unsaved(trainer) and self._saves_alone(trainer):
            try:
                checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
                path = self._free_path()
                trainer.strategy.save_checkpoint(checkpoint, path)
                self._after_save(trainer, path)
                rank_zero_info(f"{type(exception).__name__}: the state is saved as {path}")
            except Exception as error:
                rank_zero_warn(f"the state after the last finished step could not be saved: {error}")
        end_children(trainer)

    @staticmethod
    def _saves_alone(trainer: Trainer) -> bool:
        """Process 0 holds all the state, and needs no other to save it."""
        return trainer.world_size == 1 or isinstance(trainer.strategy, DDPStrategy)

    def _free_path(self) -> str:
        assert self.end is not None
        return str(unused_path(self.folder, self.end.step))

    def _is_unsaved(self, trainer: Trainer) -> bool:
        """Whether there is something to save; before the first optimizer step there is not."""
        if self.end is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return False
        return self.end.step > 0 and self.end.batches != self.saved_batches

    def _save_unless_by_step(self, trainer: Trainer) -> None:
        """Save, where saves are not set by the step alone; and rate what is saved."""
        if not self.saves_by_step or self.monitor is not None:
            self._save(trainer)
            self._rate(trainer)

    def _save(self, trainer: Trainer) -> None:
        if self._is_unsaved(trainer):
            path = trainer.strategy.broadcast(self._free_path())
            trainer.save_checkpoint(path, self.save_weights_only)
            self._after_save(trainer, path)

    def _after_save(self, trainer: Trainer, path: str) -> None:
        assert self.end is not None
        self.saved_batches = self.end.batches
        self.last_model_path = self._last_checkpoint_saved = path
        if trainer.is_global_zero:
            self._prune(trainer)
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _rate(self, trainer: Trainer) -> None:
        """Note the monitored metric of the checkpoint just saved."""
        if self.monitor is None or self.saved_batches == 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.monitor not in trainer.callback_metrics:
            names = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(
                f"checkpoint.monitor must be a metric that is logged, got {self.monitor}; there are {names}"
            )
        if trainer.is_global_zero:
            add_score(self.last_model_path, self.monitor, float(trainer.callback_metrics[self.monitor]))
            self._prune(trainer)

    def _prune(self, trainer: Trainer) -> None:
        """Remove what is neither among the newest nor among the best of this training, nor what it was resumed from."""
        if self.save_top_k == -1:
            return
        own = [(path, manifest) for path, manifest in manifests(self.folder) if manifest.run == self.io.run]
        kept = {path for path, _ in own[: self.keep_last]} | set(self._best(own))
        if trainer.ckpt_path is not None:
            kept.add(Path(os.path.realpath(trainer.ckpt_path)))
        for path, _ in own:
            if path not in kept:
                self.io.remove_checkpoint(path)

    def _best(self, own: list[tuple[Path, Any]]) -> list[Path]:
        sign = 1 if self.mode == "max" else -1
        rated = [
            (sign * manifest.scores[self.monitor], path) for path, manifest in own if self.monitor in manifest.scores
        ]
        best = sorted((each for each in rated if each[0] == each[0]), key=lambda each: each[0], reverse=True)
        if best:
            self.best_model_path = str(best[0][1])
        return [path for _, path in best[: self.save_top_k]]

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """What Lightning reads for ``ckpt_path="last"``."""
        path = newest_complete(self.folder)
        return set() if path is None else {str(path)}
