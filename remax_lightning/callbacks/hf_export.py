"""The trained model as a Hugging Face folder, at the end of fit."""

import os

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from remax_lightning.models.export import export
from remax_lightning.modules.base import TrainableModule


class HFExport(Callback):
    """Writes the trained model to ``<trainer.default_root_dir>/hf`` at the end of fit, for ``from_pretrained``.

    Args:
        output_dir: Another folder.
        enabled: False writes nothing.
    """

    def __init__(self, output_dir: str | None = None, enabled: bool = True) -> None:
        self.output_dir, self.enabled = output_dir, enabled

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder, by one process."""
        if not self.enabled or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, TrainableModule)
        output_dir = self.output_dir or os.path.join(trainer.default_root_dir, "hf")
        export(pl_module.trained_model, pl_module.tokenizer, output_dir)
        rank_zero_info(f"exported to {output_dir}")
