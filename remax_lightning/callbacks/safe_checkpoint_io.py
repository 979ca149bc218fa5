"""Checkpoint files that are whole or not there: written under another name, synced, described by a manifest."""

import json
import os
import pickle
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from remax_lightning.callbacks.checkpoint_folder import (
    describe_folder,
    folder_size_and_digest,
    read_folder,
    together,
    write_part,
)
from remax_lightning.callbacks.synced_file import (
    raise_on_all_ranks,
    remove,
    size_and_digest,
    sync_folder,
    write_error,
    write_synced,
)

SUFFIX, MANIFEST_SUFFIX, PARTIAL_SUFFIX = ".ckpt", ".json", ".partial"


class UnusableCheckpoint(ValueError):
    """A checkpoint that cannot be used: incomplete, corrupt, or of another model."""


@dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint file, kept beside it as JSON; the file is complete only if it agrees.

    Args:
        size: Length of the file, bytes.
        sha256: Digest of the file, hexadecimal.
        step: Optimizer steps taken.
        saved_at: When it was written, nanoseconds since 1970; orders the files of a folder.
        run: Which training it belongs to, through all its resumptions.
        scores: Metrics that the callback monitors, by name.
    """

    size: int
    sha256: str
    step: int
    saved_at: int
    run: str = ""
    scores: dict[str, float] = field(default_factory=dict)


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints so that an interruption at any time leaves complete files only; reads plain types only.

    Args:
        check: Called with every checkpoint that is read, to refuse one that does not fit.
    """

    def __init__(self, check: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.check = check
        self.run = ""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint and its manifest, whole or not at all.

        Raises:
            OSError: If the file could not be written, with what was there before intact.
        """
        path = Path(path)
        partial = path.with_name(path.name + PARTIAL_SUFFIX)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            size, sha256 = write_synced(partial, lambda file: torch.save(checkpoint, cast(Any, file)))
            self._put_in_place(checkpoint, size, sha256, partial, path)
        except BaseException as error:
            remove(partial)
            if isinstance(error, OSError):
                raise write_error(path, error) from error
            raise

    def save_sharded(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Write a checkpoint of which each process has a part, as a folder, and its manifest; collective.

        Raises:
            OSError: In all processes, if one of them could not write its part.
        """
        path = Path(path)
        partial = path.with_name(path.name + PARTIAL_SUFFIX)
        is_first = dist.get_rank() == 0
        try:
            with raise_on_all_ranks(path):
                if is_first:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    remove(partial)
            with raise_on_all_ranks(path):
                files = write_part(checkpoint, partial)
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, files)
            with raise_on_all_ranks(path):
                if is_first:
                    size, sha256 = together({name: value for part in parts for name, value in part.items()})
                    self._put_in_place(checkpoint, size, sha256, partial, path)
        except OSError:
            if is_first:
                with suppress(OSError):
                    remove(partial)
            raise

    def _put_in_place(self, checkpoint: dict[str, Any], size: int, sha256: str, partial: Path, path: Path) -> None:
        """Write the manifest and give what was written its name."""
        step = int(checkpoint.get("global_step", 0))
        write_manifest(path, Manifest(size, sha256, step, saved_at=time.time_ns(), run=self.run))
        if path.is_dir():
            remove(path)  # it is of no use, see unused_path
        os.replace(partial, path)
        sync_folder(path.parent)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint of plain types, whatever the caller asks for.

        Raises:
            UnusableCheckpoint: If it cannot be read, or does not fit.
        """
        checkpoint = read_checkpoint(path)
        if self.check is not None:
            self.check(checkpoint)
        return checkpoint

    def describe(self, path: str | Path) -> dict[str, Any]:
        """What a folder holds beside the values of its tensors.

        Raises:
            UnusableCheckpoint: If it cannot be read, or does not fit.
        """
        checkpoint = _read(path, describe_folder)
        if self.check is not None:
            self.check(checkpoint)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint and then its manifest."""
        remove(Path(path))
        manifest_path(path).unlink(missing_ok=True)


def manifest_path(path: str | Path) -> Path:
    """Where the manifest of a checkpoint file is."""
    return Path(f"{path}{MANIFEST_SUFFIX}")


def write_manifest(path: str | Path, manifest: Manifest) -> None:
    """Write or replace the manifest of a checkpoint file."""
    target = manifest_path(path)
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    write_synced(partial, lambda file: file.write(json.dumps(asdict(manifest)).encode()))
    os.replace(partial, target)
    sync_folder(target.parent)


def read_manifest(path: str | Path) -> Manifest | None:
    """The manifest of a checkpoint file; None if there is none that can be read."""
    try:
        return Manifest(**json.loads(manifest_path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def unused_path(folder: Path, step: int) -> Path:
    """A name for a checkpoint that no complete one has: nothing that could be needed is ever replaced."""
    number, path = 1, folder / f"step={step}{SUFFIX}"
    while (manifest := read_manifest(path)) is not None and path.exists() and fault(path, manifest) is None:
        number += 1
        path = folder / f"step={step}-{number}{SUFFIX}"
    return path


def add_score(path: str | Path, name: str, value: float) -> None:
    """Note a metric of a checkpoint in its manifest."""
    manifest = read_manifest(path)
    if manifest is not None:
        write_manifest(path, replace(manifest, scores={**manifest.scores, name: value}))


def manifests(folder: str | Path) -> list[tuple[Path, Manifest]]:
    """Checkpoint files of a folder that have a manifest, the newest first; their content is not looked at."""
    found = [(path, read_manifest(path)) for path in Path(folder).glob(f"*{SUFFIX}")]
    known = [(path, manifest) for path, manifest in found if manifest is not None]
    return sorted(known, key=lambda each: (each[1].saved_at, each[1].step), reverse=True)


def fault(path: Path, manifest: Manifest) -> str | None:
    """What is wrong with a checkpoint file according to its manifest; None if it is complete."""
    size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    if size != manifest.size:
        return f"it has {size} bytes, not the {manifest.size} that were written"
    _, digest = (folder_size_and_digest if path.is_dir() else size_and_digest)(path)
    return None if digest == manifest.sha256 else "its content is not what was written"


def newest_complete(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a folder, after a warning for each newer one that is not.

    Returns:
        Its path; None if the folder has no checkpoints at all.

    Raises:
        UnusableCheckpoint: If there are checkpoints, but no complete one.
    """
    faults = []
    for path, manifest in manifests(folder):
        if (reason := fault(path, manifest)) is None:
            return path
        faults.append(f"{path.name}: {reason}")
        rank_zero_warn(f"the checkpoint {path} is skipped: {reason}")
    faults += [f"{path.name}: no manifest" for path in Path(folder).glob(f"*{SUFFIX}") if read_manifest(path) is None]
    if faults:
        raise UnusableCheckpoint(
            f"{folder} has no complete checkpoint ({'; '.join(sorted(faults))}); name a file to use it as it is, or "
            "empty the folder to start anew"
        )
    return None


def check_complete(path: str | Path) -> None:
    """Refuse a checkpoint file that is not what its manifest says; one without a manifest is left to the reader.

    Raises:
        FileNotFoundError: If there is no such file.
        UnusableCheckpoint: If it is corrupt.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no checkpoint {path}; give an existing one, or last for the newest")
    manifest = read_manifest(path)
    reason = None if manifest is None else fault(Path(path), manifest)
    if reason is not None:
        raise UnusableCheckpoint(
            f"the checkpoint {path} is corrupt: {reason}; give another one, or last for the newest"
        )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file or folder: tensors and plain types.

    Raises:
        FileNotFoundError: If there is no such file.
        UnusableCheckpoint: If it cannot be read as such.
    """
    return _read(path, read_folder if Path(path).is_dir() else _load_file)


def _load_file(path: str | Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read(path: str | Path, read: Callable[[str | Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        return read(path)
    except FileNotFoundError:
        raise
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        if (unknown := re.search(r"Unsupported global: GLOBAL (\S+)", str(error))) is not None:
            raise UnusableCheckpoint(
                f"the checkpoint {path} holds a {unknown[1]}, whose package this run does not import; if it is of an "
                "optimizer, configure that optimizer as the run did that wrote it"
            ) from error
        raise UnusableCheckpoint(
            f"the checkpoint {path} cannot be read as tensors and plain types ({reason}); it is corrupt or not a "
            "checkpoint of this project: give another one, or last for the newest"
        ) from error


def remove_partial(folder: str | Path) -> None:
    """Remove what an interrupted save left behind."""
    for path in Path(folder).glob(f"*{PARTIAL_SUFFIX}"):
        remove(path)
