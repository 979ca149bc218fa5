"""When checkpoints are saved, and which ones are kept."""

import os
import uuid
from pathlib import Path
from typing import Any, cast
from weakref import proxy

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.optim import Optimizer

from remax_lightning.callbacks.checkpoint_store import CheckpointStore
from remax_lightning.callbacks.loop_snapshot import LastState
from remax_lightning.callbacks.rendezvous import Rendezvous
from remax_lightning.callbacks.resume_check import check_resumed, trainer_settings
from remax_lightning.callbacks.run_lock import RunLock
from remax_lightning.callbacks.signal_guard import Deferral, GuardedSignals, SignalGuard, end_children
from remax_lightning.callbacks.snapshot_saver import SnapshotSaver, is_sharded
from remax_lightning.checkpoints.find_checkpoint import check_ranks_agree, find_checkpoint
from remax_lightning.checkpoints.manifest import MAIN_METRICS
from remax_lightning.checkpoints.safe_checkpoint_io import SafeCheckpointIO, remove_partial, safe_checkpoint_io
from remax_lightning.modules.base import TooManySkippedSteps, TrainableModule
from remax_lightning.modules.fingerprint import check_model, fingerprint


class Checkpoint(ModelCheckpoint):
    """Saves the state of training as ``step=N.ckpt``, with a manifest beside it that tells whether it is complete.

    The newest and the best are kept. When training ends by SIGINT (Ctrl-C), SIGTERM, SIGHUP or an error, at any moment,
    the state after the last finished optimizer step is saved; within a batch with its rollout, so that a resumed run
    makes the batch's other updates. Under fsdp2, whose ranks can only save together, a signal waits up to 15 seconds
    for the end of the batch; then, and after an error, the state is saved if all ranks come together within 10 seconds.
    Weights that are not finite are never saved. While a run goes on, no other one can use the folder.

    Args:
        dirpath: Folder; the command line sets ``<trainer.default_root_dir>/checkpoints``.
        every_n_train_steps: Steps between two saves; the default saves after every validation and epoch, and at the end
            of training.
        monitor: Metric of the best checkpoints, one of the validation's, such as ``val/reward``. With it, every
            validation is followed by a save. The default compares the main metric of the module, ``val/reward``,
            ``val/accuracy`` or ``val/loss``, among the checkpoints that are saved anyway.
        mode: Whether a larger (``max``) or a smaller (``min``) monitor is better.
        save_top_k: Checkpoints with the best metric to keep; -1 keeps all checkpoints.
        keep_last: Newest checkpoints to keep. With 2, there is another one to resume from if the newest is damaged.
        save_weights_only: Leave out the optimizer; training cannot be resumed from that.
        async_save: Train on while the shards of a checkpoint are written; for ``--trainer.strategy fsdp2``, and takes
            host memory for a copy of them. A save is complete before the next one starts and before training ends; an
            error in it ends training then. A kill during a save leaves the earlier checkpoints.

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
        async_save: bool = False,
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
        self.interval = every_n_train_steps
        self.store = CheckpointStore(Path(str(self.dirpath)), monitor, mode, save_top_k, keep_last)
        self.saver = SnapshotSaver(self.store, save_weights_only, async_save, self._on_saved)
        self.guard = SignalGuard()
        self.lock = RunLock(self.store.folder)
        self.configuration: dict[str, Any] = {}
        self.requested_path: str | None = None
        self.is_new_run = False  # set by the command line; else it is known when training starts
        self.state = LastState()

    @property
    def state_key(self) -> str:
        """The same, however the callback is configured."""
        return "Checkpoint"

    @property
    def best_model_path(self) -> str:
        """The best checkpoint of this training, as the manifests say; empty if none has a score."""
        return str(self.store.best() or "")

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        """Lightning sets it to an empty string."""

    def state_dict(self) -> dict[str, Any]:
        """Which training this is; everything else is in the manifests."""
        return {"run": self.store.run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a training."""
        self.store.run = state_dict["run"]

    def find(self, given: str, *, is_fit: bool) -> str | None:
        """The path that ``--ckpt_path`` means; see :func:`find_checkpoint`."""
        self.store.check_last(given)
        self.requested_path = find_checkpoint(given, self.store.folder, self.monitor, self.mode, is_fit=is_fit)
        return self.requested_path

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """What Lightning reads for ``ckpt_path="last"``."""
        path = self.find("last", is_fit=trainer.state.fn == "fit")
        return set() if path is None else {path}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the trainer write and read checkpoints safely, and end by signals; refuse a folder that is in use."""
        assert isinstance(pl_module, TrainableModule)
        safe_checkpoint_io(trainer.strategy.checkpoint_io)
        _check_sharded(trainer.strategy, needed=self.saver.in_background)
        check_ranks_agree(self.requested_path)
        io = SafeCheckpointIO(check=lambda checkpoint: check_model(checkpoint, pl_module, is_fit=stage == "fit"))
        trainer.strategy.checkpoint_io = self.saver.io = io
        trainer._signal_connector, self.state = GuardedSignals(trainer, self.guard), LastState()
        if stage == "fit":
            pl_module.unfinished.load_state_dict(None)
            self.store.run, self.store.resumed_from = uuid.uuid4().hex, ""
            _take(self.lock, self.store, trainer, is_new_run=self.is_new_run)
            self.saver.path = self.last_model_path = ""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let other runs use the folder, after the export."""
        self.lock.release()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make it the state after the last finished step, and add what a resumed run is compared with."""
        assert isinstance(pl_module, TrainableModule)
        checkpoint.update(fingerprint=fingerprint(pl_module), configuration=self.configuration)
        checkpoint["trainer_settings"] = trainer_settings(trainer, pl_module.sharding)
        checkpoint["unfinished_batch"] = pl_module.unfinished.state_dict()
        if not pl_module.unfinished.is_torn and (snapshot := self.state.newest(trainer)) is not None:
            snapshot.write_to(checkpoint, trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare the configurations, and go on where the checkpoint was saved."""
        path = os.path.realpath(checkpoint["read_from"])
        self.store.resumed_from = self.saver.path = self.last_model_path = path
        if trainer.state.fn == "fit":
            assert isinstance(pl_module, TrainableModule)
            pl_module.unfinished.load_state_dict(checkpoint.get("unfinished_batch"))
            self.state.loaded = checkpoint.get("loops")
            check_resumed(checkpoint, self.configuration, trainer_settings(trainer, pl_module.sharding))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with nothing to save. What another run has left in the folder stays, and is told of."""
        _check_monitor(self.monitor, trainer)
        self.state.start(trainer)
        self.saver.saved = (0, 0)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            remove_partial(self.store.folder)
            self.store.note_start()
        self.guard.at_once = _saves_alone(trainer)
        self.saver.rendezvous = None if self.guard.at_once else Rendezvous()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let nothing interrupt the update."""
        self.guard.defer(Deferral.ALWAYS)
        cast(TrainableModule, pl_module).unfinished.is_torn = True

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The update is complete. Signals wait for the batch's end, unless a resumed run can make its other updates."""
        self.guard.defer(Deferral.NONE if _can_go_on(cast(TrainableModule, pl_module)) else Deferral.BATCH)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Capture the state, and save it when it is time."""
        with self.guard.deferred():
            before, snapshot = self.state.step, self.state.capture(trainer)
            # a batch may have taken several steps
            if self.interval is not None and snapshot.step // self.interval > before // self.interval:
                self.saver.save(trainer, snapshot)
        if not self.guard.at_once and (signum := self.guard.of_any_rank(trainer)):
            with self.guard.deferred():
                self.saver.save(trainer, snapshot)
                self.saver.finish(trainer)
            self.guard.interrupt(signum)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the scores, and save."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        with self.guard.deferred():
            scores = _scores(trainer, self.monitor)
            is_unsaved = self.saver.is_unsaved(trainer, self.state.snapshot)
            self.state.validated(scores)
            if not is_unsaved:
                self.saver.add_scores(trainer, scores)
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless a validation has just done so."""
        if self.interval is None or self.monitor is not None:
            with self.guard.deferred():
                self.saver.save(trainer, self.state.snapshot)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, if it is not saved yet."""
        with self.guard.deferred():
            self.saver.save(trainer, self.state.snapshot)
            self.saver.finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the state after the last finished optimizer step, if it is not saved yet."""
        self.guard.end(exception)
        self.saver.save_after_error(trainer, self.state, exception)
        if isinstance(exception, TooManySkippedSteps):
            exception.checkpoint = self.store.before(trainer.global_step)
        self.lock.release()
        end_children(trainer)

    def _on_saved(self, trainer: Trainer, path: str) -> None:
        self.last_model_path = self._last_checkpoint_saved = path
        for logger in trainer.loggers:
            logger.after_save_checkpoint(proxy(self))


def _can_go_on(module: TrainableModule) -> bool:
    """Whether a run that is resumed now could make the other updates of the batch."""
    return module.unfinished.can_wait(module.updates_per_batch)


def _saves_alone(trainer: Trainer) -> bool:
    """Whether rank 0 has the state of all ranks, and can save it without them."""
    return trainer.world_size == 1 or isinstance(trainer.strategy, DDPStrategy)


def _take(lock: RunLock, store: CheckpointStore, trainer: Trainer, *, is_new_run: bool) -> None:
    """Take the lock on rank 0, or raise on all ranks."""
    is_needed = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
    if (refusal := trainer.strategy.broadcast(lock.take() if is_needed else None)) is not None:
        raise RuntimeError(refusal)
    if is_needed and is_new_run and trainer._checkpoint_connector._hpc_resume_path is None:
        store.note_start()


def _check_sharded(strategy: Strategy, *, needed: bool) -> None:
    if needed and not is_sharded(strategy):
        raise ValueError(
            "checkpoint.async_save writes the shards of --trainer.strategy fsdp2 with save_sharded in the background, "
            f"but here ({type(strategy).__name__}) a checkpoint is one file; set checkpoint.async_save to false"
        )


def _check_monitor(monitor: str | None, trainer: Trainer) -> None:
    if monitor is not None and not trainer.enable_validation:
        raise ValueError(
            f"checkpoint.monitor must be a metric of the validation, got {monitor}, but this fit does not validate; "
            "set data.validation to some rows, or leave checkpoint.monitor out"
        )


def _scores(trainer: Trainer, monitor: str | None) -> dict[str, float]:
    """The metrics that checkpoints can be compared by, of the validation that ends; older ones are of other weights."""
    metrics = trainer._logger_connector.metrics["callback"]
    if monitor is not None and monitor not in metrics:
        raise ValueError(
            f"checkpoint.monitor must be a metric that the validation logs, got {monitor}; there are "
            f"{', '.join(sorted(metrics))}"
        )
    return {name: float(value) for name, value in metrics.items() if name in (monitor, *MAIN_METRICS)}
