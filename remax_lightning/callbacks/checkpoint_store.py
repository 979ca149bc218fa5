"""The checkpoints of one training in a folder: which one is the best, and which ones are kept."""

from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from remax_lightning.checkpoints.manifest import Entry, best_first, manifests, of_newest_run
from remax_lightning.checkpoints.safe_checkpoint_io import SafeCheckpointIO

UNSAVED_FILE = "unsaved_run"
"""In a folder with checkpoints of an earlier run: the run that was started last, until it has saved."""


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

    def note_start(self) -> None:
        """Note which run was started last, and tell of the checkpoints that another one has left."""
        note, (newest, manifest) = self.folder / UNSAVED_FILE, next(iter(manifests(self.folder)), (None, None))
        if manifest is None or manifest.run == self.run:
            self.note_saved()
            return
        if not self.resumed_from and not (note.exists() and note.read_text(encoding="utf-8") == self.run):
            rank_zero_warn(
                f"{self.folder} has checkpoints of an earlier run, the newest {newest}; this run starts from the "
                "beginning, saves beside them, and exports its model in place of that run's; to go on with that one, "
                "end this one and give --ckpt_path with that path"
            )
        note.write_text(self.run, encoding="utf-8")

    def note_saved(self) -> None:
        """Note that the newest checkpoint is of the run that was started last."""
        (self.folder / UNSAVED_FILE).unlink(missing_ok=True)

    def check_last(self, given: str) -> None:
        """Refuse that ``last`` is a checkpoint of another run than the one that was started last.

        Raises:
            ValueError: If that one has saved nothing, and there are checkpoints of another one.
        """
        note, entries = self.folder / UNSAVED_FILE, manifests(self.folder)
        if given == "last" and note.exists() and entries and entries[0][1].run != note.read_text(encoding="utf-8"):
            raise ValueError(
                f"--ckpt_path last: the run that was started last in {self.folder} has ended before its first "
                f"checkpoint, and the newest one is of another run; give its path, {entries[0][0]}, to go on with that "
                "run, or leave out --ckpt_path to start again"
            )

    def newest(self) -> Path | None:
        """The newest checkpoint of the training; None if there is none."""
        return next((path for path, _ in self.entries()), None)

    def before(self, step: int) -> Path | None:
        """The newest checkpoint from before a step: weights that had a finite gradient. None if there is none."""
        return next((path for path, manifest in self.entries() if manifest.step < step), None)

    def prune(self, io: SafeCheckpointIO) -> None:
        """Remove what is neither among the newest nor among the best, nor what the training was resumed from.

        Of checkpoints of the same step, whose weights are the same, the newest counts: later ones come of skipped
        steps, and must not push out the weights from before.
        """
        if self.save_top_k == -1:
            return
        entries = self.entries()
        newest_of_steps: dict[int, Path] = {}
        for path, manifest in entries:
            newest_of_steps.setdefault(manifest.step, path)
        kept = {*list(newest_of_steps.values())[: self.keep_last], Path(self.resumed_from)}
        kept |= set(best_first(entries, self.monitor, self.mode)[: self.save_top_k])
        for path, _ in entries:
            if path not in kept:
                io.remove_checkpoint(path)
