"""The manifest beside each checkpoint: whether it is complete, which one is the newest, which one is the best."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX as SHARD_SUFFIX

from remax_lightning.checkpoints.plain_file import check_plain_file
from remax_lightning.checkpoints.synced_file import size_and_digest, sync_folder, write_synced

SUFFIX, MANIFEST_SUFFIX, PARTIAL_SUFFIX = ".ckpt", ".json", ".partial"
METADATA_FILE = ".metadata"  # torch gives it this name when all shards of a folder are written and synced
# the metric of each kind of module that says how good its model is, and whether more or less of it is better;
# the first one that is logged counts
MAIN_METRICS = {"val/reward": "max", "val/accuracy": "max", "val/loss": "min"}
Files = dict[str, tuple[int, str]]


class UnusableCheckpoint(ValueError):
    """A checkpoint that cannot be used: incomplete, corrupt, or of another model."""


class DamagedCheckpoint(UnusableCheckpoint):
    """A checkpoint that nobody can use; an earlier one of the run may be better."""


@dataclass(frozen=True)
class Manifest:
    """What is recorded of a checkpoint, as JSON beside it; the checkpoint is complete only if it agrees.

    Args:
        size: Length of the file, or of all files of the folder, bytes.
        sha256: Digest of the file, hexadecimal; of a sharded folder see :func:`folder_digest`.
        step: Optimizer steps taken.
        number: One more than the largest of the folder when the checkpoint was written: the order of the checkpoints,
            which no clock can change. Manifests of earlier versions have none; they come before all others, by steps.
        run: Which training it belongs to; the same after each resumption.
        scores: Metrics of the validation after this step, by name.
    """

    size: int
    sha256: str
    step: int
    number: int = 0
    run: str = ""
    scores: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what was not written by this project.

        Raises:
            TypeError: If a value has another type.
        """
        kinds = {"size": int, "sha256": str, "step": int, "number": int, "run": str, "scores": dict}
        wrong = [name for name, kind in kinds.items() if type(getattr(self, name)) is not kind]
        if wrong or any(type(score) not in (int, float) for score in self.scores.values()):
            raise TypeError(f"a manifest has another type of value in {', '.join(wrong) or 'scores'}")


Entry = tuple[Path, Manifest]


def manifest_path(path: str | Path) -> Path:
    """Where the manifest of a checkpoint is."""
    return Path(f"{path}{MANIFEST_SUFFIX}")


def partial_path(path: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def write_manifest(path: str | Path, manifest: Manifest) -> None:
    """Write or replace the manifest of a checkpoint."""
    target = manifest_path(path)
    partial = partial_path(target)
    write_synced(partial, lambda file: file.write(json.dumps(asdict(manifest)).encode()))
    os.replace(partial, target)
    sync_folder(target.parent)


def read_manifest(path: str | Path) -> Manifest | None:
    """The manifest of a checkpoint; None if there is none that can be read."""
    file = manifest_path(path)
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        values.pop("saved_at", None)  # of earlier versions
        return Manifest(**values)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def manifests(folder: str | Path) -> list[Entry]:
    """Checkpoints of a folder that have a manifest, the newest first; their content is not read."""
    pairs = [(path, read_manifest(path)) for path in Path(folder).glob(f"*{SUFFIX}")]
    entries = [(path, manifest) for path, manifest in pairs if manifest is not None]
    return sorted(entries, key=lambda entry: (entry[1].number, entry[1].step), reverse=True)


def of_newest_run(entries: list[Entry]) -> list[Entry]:
    """Those of the training that the first one belongs to."""
    return [entry for entry in entries if entry[1].run == entries[0][1].run]


def next_number(folder: Path) -> int:
    """The number of the next checkpoint of a folder."""
    return 1 + max((manifest.number for _, manifest in manifests(folder)), default=0)


def add_scores(path: str | Path, scores: Mapping[str, float]) -> None:
    """Add metrics of a checkpoint to its manifest; nothing happens if it has none."""
    manifest = read_manifest(path)
    if manifest is not None and scores:
        write_manifest(path, replace(manifest, scores={**manifest.scores, **scores}))


def rating(entries: list[Entry], monitor: str | None, mode: str) -> tuple[str | None, str]:
    """The metric by which checkpoints are compared, and whether its maximum (``max``) or minimum is the best.

    Args:
        entries: The checkpoints.
        monitor: A metric; the default is the first of the main metrics that any of them has.
        mode: Of the monitor.
    """
    if monitor is not None:
        return monitor, mode
    return next(
        ((name, best) for name, best in MAIN_METRICS.items() if any(name in each.scores for _, each in entries)),
        (None, mode),
    )


def best_first(entries: list[Entry], monitor: str | None, mode: str) -> list[Path]:
    """Checkpoints that have a score, the best first; see :func:`rating`. Those whose score is NaN are left out."""
    metric, mode = rating(entries, monitor, mode)
    scores = [(manifest.scores[metric], path) for path, manifest in entries if metric in manifest.scores]
    scores = [(score, path) for score, path in scores if score == score]
    return [path for _, path in sorted(scores, key=lambda each: each[0], reverse=mode == "max")]


def folder_digest(files: Files) -> tuple[int, str]:
    """Size in bytes and digest of a sharded folder.

    Shards count with their names and sizes, so that no checkpoint is read back after it is written, or read twice when
    it is loaded. A flipped bit in a shard is thus not seen here, but when the folder is loaded, by the checksums of
    torch's format (see ``PlainReader``).

    Args:
        files: Of each shard the size, twice; of the other files size and digest.
    """
    lines = "".join(f"{name} {digest}\n" for name, (_, digest) in sorted(files.items()))
    return sum(size for size, _ in files.values()), hashlib.sha256(lines.encode()).hexdigest()


def folder_files(folder: Path, *, read_shards: bool) -> Files:
    """The files of a folder, as :func:`folder_digest` takes them.

    Args:
        folder: The checkpoint.
        read_shards: Shards count with the digest of their content, as they did before manifests had a number.
    """
    return {
        path.name: (path.stat().st_size, str(path.stat().st_size))
        if path.suffix == SHARD_SUFFIX and not read_shards
        else size_and_digest(path)
        for path in folder.iterdir()
    }


def integrity_error(path: Path, manifest: Manifest) -> str | None:
    """How a checkpoint differs from its manifest; None if it is complete."""
    try:
        return _difference(path, manifest)
    except (OSError, ValueError) as error:
        return str(error)


def _difference(path: Path, manifest: Manifest) -> str | None:
    files = path.iterdir() if path.is_dir() else [path.resolve()]
    size = sum(map(check_plain_file, files))
    if size != manifest.size:
        return f"it has {size} bytes, not the {manifest.size} that were written"
    if path.is_dir():
        _, digest = folder_digest(folder_files(path, read_shards=manifest.number == 0))
    else:
        _, digest = size_and_digest(path)
    return None if digest == manifest.sha256 else "its content is not what was written"


def unused_path(folder: Path, step: int) -> Path:
    """A name for a checkpoint that no complete one has: nothing that could be needed is ever replaced."""
    number, path = 1, folder / f"step={step}{SUFFIX}"
    while (manifest := read_manifest(path)) is not None and path.exists() and integrity_error(path, manifest) is None:
        number += 1
        path = folder / f"step={step}-{number}{SUFFIX}"
    return path
