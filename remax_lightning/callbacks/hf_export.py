"""The trained model as a Hugging Face folder."""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from remax_lightning.callbacks.checkpoint import Checkpoint
from remax_lightning.callbacks.checkpoint_store import CheckpointStore
from remax_lightning.checkpoints.manifest import rating, read_manifest
from remax_lightning.models.export import export
from remax_lightning.modules.base import TrainableModule

RECORD_FILE = "training.json"


@dataclass(frozen=True)
class TrainingRecord:
    """Which state of a training a Hugging Face folder contains, as ``training.json`` in it.

    Args:
        method: Class of the module.
        step: Optimizer steps taken.
        checkpoint: Name of the checkpoint with the same weights; None if there is none.
        is_last: They are the weights of the newest checkpoint, or those at the end of fit.
        is_best: They are those of the best checkpoint; None if no checkpoint has a score.
        best_by: The metric that tells the best.
        scores: Metrics of the validation after this step, if there was one.
    """

    method: str
    step: int
    checkpoint: str | None = None
    is_last: bool = True
    is_best: bool | None = None
    best_by: str | None = None
    scores: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        roles = [self.checkpoint or "no checkpoint", *["the last"] * self.is_last]
        roles += [f"the best by {self.best_by}"] * bool(self.is_best)
        return f"step {self.step} ({', '.join(roles)})"


class HFExport(Callback):
    """Writes the trained model to ``<trainer.default_root_dir>/hf`` at the end of fit, for ``from_pretrained``.

    It is the model after the last step; ``training.json`` in the folder tells the step and the checkpoint. For the best
    one: ``python cli.py export --ckpt_path best``.

    Args:
        output_dir: Another folder.
        enabled: False writes nothing.
    """

    def __init__(self, output_dir: str | None = None, enabled: bool = True) -> None:
        self.output_dir, self.enabled = output_dir, enabled

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder on rank 0; a sharded model is gathered there."""
        if not self.enabled or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, TrainableModule)
        output_dir = self.output_dir or os.path.join(trainer.default_root_dir, "hf")
        record = TrainingRecord(type(pl_module).__name__, trainer.global_step)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoint):
                record = replace(recorded(record, callback.last_model_path, callback.store), is_last=True)
        export_module(pl_module, output_dir, record, write=trainer.is_global_zero)
        rank_zero_info(f"exported {record} to {output_dir}")


def recorded(record: TrainingRecord, path: str | Path, store: CheckpointStore) -> TrainingRecord:
    """A record with what the manifests know of a checkpoint; unchanged if it is of another step.

    Args:
        record: With the step.
        path: The checkpoint.
        store: The checkpoints of the run; for a checkpoint in another folder, its metric counts.
    """
    path, manifest = Path(os.path.realpath(path)), read_manifest(path)
    if manifest is None or manifest.step != record.step:
        return record
    store = replace(store, folder=path.parent, run=manifest.run)
    entries, best = store.entries(), store.best()
    return replace(
        record,
        checkpoint=path.name,
        is_last=bool(entries) and entries[0][0] == path,
        is_best=None if best is None else best == path,
        best_by=rating(entries, store.monitor, store.mode)[0],
        scores=manifest.scores,
    )


def export_module(module: TrainableModule, output_dir: str, record: TrainingRecord, *, write: bool = True) -> None:
    """Write the Hugging Face folder of a module's trained model; collective if the model is sharded.

    Args:
        module: The module.
        output_dir: Folder to write.
        record: What ``training.json`` will say.
        write: False only takes part in gathering the model.
    """
    model = module.unsharded_model()
    if write:
        assert model is not None
        export(model, module.tokenizer, output_dir, merge=module.lora is None or module.lora.merge)
        text = json.dumps(asdict(record), indent=1) + "\n"
        (Path(output_dir) / RECORD_FILE).write_text(text, encoding="utf-8")
