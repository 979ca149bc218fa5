"""The checkpoints of one training in a folder: which one is the best, and which ones are kept."""

from dataclasses import dataclass
from pathlib import Path

from remax_lightning.checkpoints.manifest import Entry, best_first, manifests, of_newest_run
from remax_lightning.checkpoints.safe_checkpoint_io import SafeCheckpointIO


@dataclass
class CheckpointStore:
    """The checkpoints of one training in a folder, which others may share.

    Args:
        folder: The folder.
        monitor: The metric of the best; the default is the main one of the module.
        mode: Whether its maximum (``max``) or minimum (``min``) is the best.
        save_top_k: How many of the best are kept; -1 keeps all.
        keep_last: How many of the newest are kept.
        run: The training; before it is known, that of the newest checkpoint.
        resumed_from: The checkpoint that it was resumed from, which is kept.
    """

    folder: Path
    monitor: str | None
    mode: str
    save_top_k: int
    keep_last: int
    run: str = ""
    resumed_from: str = ""

    def entries(self) -> list[Entry]:
        """Checkpoints and manifests, the newest first."""
        entries = manifests(self.folder)
        return [entry for entry in entries if entry[1].run == self.run] if self.run else of_newest_run(entries)

    def best(self) -> Path | None:
        """The best checkpoint; None if none has a score."""
        return next(iter(best_first(self.entries(), self.monitor, self.mode)), None)

    def prune(self, io: SafeCheckpointIO) -> None:
        """Remove what is neither among the newest nor among the best, nor what the training was resumed from."""
        if self.save_top_k == -1:
            return
        entries = self.entries()
        kept = {path for path, _ in entries[: self.keep_last]} | {Path(self.resumed_from)}
        kept |= set(best_first(entries, self.monitor, self.mode)[: self.save_top_k])
        for path, _ in entries:
            if path not in kept:
                io.remove_checkpoint(path)
