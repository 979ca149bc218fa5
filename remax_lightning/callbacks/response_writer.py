"""What predict and test found, row by row, in a file."""

import json
import os
from collections.abc import Iterable
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info


class ResponseWriter(Callback):
    """Writes the rows of ``predict`` and ``test`` as JSON lines, as they come.

    Args:
        path: File to write; the default is ``predictions.jsonl`` or ``responses.jsonl`` (test) in
            ``trainer.default_root_dir``. With several processes each one writes its own, with its rank before the
            suffix.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.file: TextIO | None = None

    def _open(self, trainer: Trainer, name: str) -> None:
        path = self.path or os.path.join(trainer.default_root_dir, name)
        if trainer.world_size > 1:
            stem, suffix = os.path.splitext(path)
            path = f"{stem}.{trainer.global_rank}{suffix}"
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        self.file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed by _close)

    def _write(self, rows: Iterable[dict[str, Any]]) -> None:
        assert self.file is not None
        self.file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.file.flush()

    def _close(self) -> None:
        if self.file is not None:
            self.file.close()
            rank_zero_info(f"wrote {self.file.name}")
            self.file = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file."""
        self._open(trainer, "predictions.jsonl")

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Write a batch."""
        self._write(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the file."""
        self._close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file."""
        self._open(trainer, "responses.jsonl")

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Write a batch, if the module's test gives rows."""
        if isinstance(outputs, dict) and "rows" in outputs:
            self._write(outputs["rows"])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the file."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep what was written so far."""
        self._close()
