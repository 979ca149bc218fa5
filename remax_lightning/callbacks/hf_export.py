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
        """Write the folder, by one process; the others hand it their parts of the model."""
        if not self.enabled or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, TrainableModule)
        output_dir = self.output_dir or os.path.join(trainer.default_root_dir, "hf")
        export_module(pl_module, output_dir, write=trainer.is_global_zero)
        rank_zero_info(f"exported to {output_dir}")


def export_module(module: TrainableModule, output_dir: str, *, write: bool = True) -> None:
    """Write the Hugging Face folder of what a module trains; collective if its model is split over processes.

    Args:
        module: The module.
        output_dir: Folder to write.
        write: False takes part only.
    """
    model = module.unsharded_model()
    if write:
        assert model is not None
        export(model, module.tokenizer, output_dir, merge=module.lora is None or module.lora.merge)
