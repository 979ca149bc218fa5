"""What predict and test found, row by row, in a file."""

import json
import os
from collections.abc import Iterable
from typing import Any, Literal, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

Row = dict[str, Any]


class ResponseWriter(Callback):
    """Writes the rows of ``predict`` and ``test`` as they come.

    Args:
        path: File to write; the default is ``predictions.jsonl`` or ``responses.jsonl`` (test) in
            ``trainer.default_root_dir``. With several processes each one writes its own, with its rank before the
            suffix.
        format: ``rows``: JSON lines with all columns. ``alpaca_eval``: the model outputs that AlpacaEval reads, a JSON
            list with ``instruction``, ``output`` (the sampled response) and ``generator``; for ``predict``.
        generator: Name of the model in AlpacaEval's format.
    """

    def __init__(
        self,
        path: str | None = None,
        format: Literal["rows", "alpaca_eval"] = "rows",
        generator: str = "remax",
    ) -> None:
        self.path, self.format, self.generator = path, format, generator
        self.file: TextIO | None = None
        self.num_rows = 0

    def _open(self, trainer: Trainer, name: str) -> None:
        path = self.path or os.path.join(trainer.default_root_dir, name)
        if trainer.world_size > 1:
            stem, suffix = os.path.splitext(path)
            path = f"{stem}.{trainer.global_rank}{suffix}"
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        self.file, self.num_rows = open(path, "w", encoding="utf-8"), 0  # noqa: SIM115 (closed by _close)
        if self.format == "alpaca_eval":
            self.file.write("[")

    def _write(self, rows: Iterable[Row]) -> None:
        assert self.file is not None
        for row in rows:
            if self.format == "alpaca_eval":
                text = ("," if self.num_rows else "") + "\n" + json.dumps(self._alpaca_eval(row), ensure_ascii=False)
            else:
                text = json.dumps(row, ensure_ascii=False) + "\n"
            self.file.write(text)
            self.num_rows += 1
        self.file.flush()

    def _alpaca_eval(self, row: Row) -> Row:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        kept = {name: row[name] for name in ("dataset",) if name in row}
        return {"instruction": prompt, "output": row["response"], "generator": self.generator, **kept}

    def _close(self) -> None:
        if self.file is not None:
            if self.format == "alpaca_eval":
                self.file.write("\n]\n")
            self.file.close()
            rank_zero_info(f"wrote {self.num_rows} rows to {self.file.name}")
            self.file = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file."""
        self._open(trainer, "predictions.jsonl" if self.format == "rows" else "predictions.json")

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
