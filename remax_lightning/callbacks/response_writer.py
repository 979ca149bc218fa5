"""What predict and test found, row by row, in a file."""

import contextlib
import os
from collections.abc import Iterable
from typing import Any, Literal, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from remax_lightning.rollout.plain_rows import json_line

Row = dict[str, Any]

PARTIAL = ".partial"  # suffix of a file that lacks rows


class ResponseWriter(Callback):
    """Writes the rows of ``predict`` and ``test`` as they come.

    They go to a file with the suffix ``.partial``, which takes its own name, and the place of an older one, when it is
    complete. What an interrupted run has written stays there until the next one has rows.

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
        self.target = ""  # of the run that is under way; empty without one
        self.file: TextIO | None = None  # opened for the first rows: a run that fails before them destroys nothing
        self.end = 0  # of the rows in it
        self.num_rows = 0

    def _start(self, trainer: Trainer, name: str) -> None:
        path = self.path or os.path.join(trainer.default_root_dir, name)
        if trainer.world_size > 1:
            stem, suffix = os.path.splitext(path)
            path = f"{stem}.{trainer.global_rank}{suffix}"
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        self.target, self.file, self.num_rows = path, None, 0

    def _write(self, rows: Iterable[Row]) -> None:
        """Add rows; the file is valid after each batch."""
        is_list = self.format == "alpaca_eval"
        if self.file is None:
            self.file = open(self.target + PARTIAL, "w", encoding="utf-8")  # noqa: SIM115 (closed by _close)
            self.file.write("[" if is_list else "")
            self.end = self.file.tell()
        self.file.seek(self.end)
        count = self.num_rows
        for row in rows:
            separator = ",\n" if count else "\n"
            count += 1
            self.file.write(separator + json_line(self._alpaca_eval(row)) if is_list else json_line(row) + "\n")
        self.end = self.file.tell()
        self.file.write("\n]\n" if is_list else "")
        self.file.flush()
        self.num_rows = count

    def _alpaca_eval(self, row: Row) -> Row:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        kept = {name: row[name] for name in ("dataset",) if name in row}
        return {"instruction": prompt, "output": row["response"], "generator": self.generator, **kept}

    def _finish(self) -> None:
        """Give the file its name."""
        if self.file is not None:
            self.file.close()
            os.replace(self.target + PARTIAL, self.target)
            rank_zero_info(f"wrote {self.num_rows} rows to {self.target}")
        self.target, self.file = "", None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the file."""
        self._start(trainer, "predictions.jsonl" if self.format == "rows" else "predictions.json")

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Write a batch."""
        self._write(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its name."""
        self._finish()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the file."""
        self._start(trainer, "responses.jsonl")

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Write a batch, if the module's test gives rows."""
        if isinstance(outputs, dict) and "rows" in outputs:
            self._write(outputs["rows"])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its name."""
        self._finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave what was written so far in the partial file, and say so."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # a full disk, which is what ended the run
                self.file.close()
            rank_zero_warn(
                f"{self.target} is not complete: the {self.num_rows} rows so far are in {self.target}{PARTIAL}, until "
                "the next run"
            )
        self.target, self.file = "", None
