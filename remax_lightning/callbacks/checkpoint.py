"""Checkpoints in the run's own folder."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoint(ModelCheckpoint):
    """Saves the state of training, the newest as ``last.ckpt``.

    Args:
        dirpath: Folder; the command line gives ``<trainer.default_root_dir>/checkpoints``.
        every_n_train_steps: Steps between two saves; the default saves at the end of every epoch and of training.
        monitor: Metric by which the best checkpoints are kept, such as ``val/reward``.
        mode: Whether a larger (``max``) or a smaller (``min``) metric is better.
        save_top_k: Checkpoints to keep besides the last one; -1 keeps all.
        save_weights_only: Leave out the optimizer; training cannot be resumed from that.
    """

    def __init__(
        self,
        dirpath: str,
        every_n_train_steps: int | None = None,
        monitor: str | None = None,
        mode: str = "max",
        save_top_k: int = 1,
        save_weights_only: bool = False,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="step={step}",
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_train_steps,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=True,
            save_weights_only=save_weights_only,
            enable_version_counter=False,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, if it is not saved yet."""
        super().on_train_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
