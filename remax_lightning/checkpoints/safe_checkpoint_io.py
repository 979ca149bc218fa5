"""Checkpoints that are complete or not there: written under another name, synced, described by a manifest."""

import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from remax_lightning.checkpoints.checkpoint_folder import (
    describe_folder,
    read_folder,
    sharded_tensors,
    write_non_tensors,
    written_files,
)
from remax_lightning.checkpoints.find_checkpoint import read_usable
from remax_lightning.checkpoints.manifest import (
    PARTIAL_SUFFIX,
    DamagedCheckpoint,
    Files,
    Manifest,
    UnusableCheckpoint,
    folder_digest,
    manifest_path,
    next_number,
    partial_path,
    write_manifest,
)
from remax_lightning.checkpoints.plain_file import load_plain
from remax_lightning.checkpoints.synced_file import (
    raise_on_all_ranks,
    remove,
    sync_folder,
    write_error,
    write_synced,
)
from remax_lightning.models.finite import non_finite


@dataclass(frozen=True)
class SaveOptions:
    """What accompanies a checkpoint on its way through Lightning, as its ``storage_options``.

    Args:
        run: Which training it belongs to.
        scores: Metrics of the validation after its step.
        in_background: Return when the tensors are copied; only for sharded folders.
        group: Ranks that write a sharded folder, which is not saved in the background then; the default is all of
            them, by the default backend.
    """

    run: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    in_background: bool = False
    group: dist.ProcessGroup | None = None


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints so that an interruption at any time leaves complete ones only; reads plain types only.

    Args:
        check: Called with every checkpoint that is read, to refuse one that does not fit.
    """

    def __init__(self, check: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.check = check
        self._pending: Future[None] | None = None
        self._background_group: dist.ProcessGroup | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: SaveOptions | None = None
    ) -> None:
        """Write a checkpoint file and its manifest, complete or not at all.

        Raises:
            OSError: If it could not be written; the earlier checkpoints are intact.
        """
        path, manifest = Path(path), _manifest(checkpoint, storage_options)
        partial = partial_path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            size, sha256 = write_synced(partial, lambda file: torch.save(checkpoint, cast(Any, file)))
            _put_in_place(path, replace(manifest, size=size, sha256=sha256))
        except BaseException as error:
            with suppress(OSError):  # what could not be written cannot always be removed
                remove(partial)
            if isinstance(error, OSError):
                raise write_error(path, error) from error
            raise

    def save_sharded(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: SaveOptions | None = None
    ) -> None:
        """Write a checkpoint of which each rank has its shards, as a folder, and its manifest; collective.

        In the background it is complete when :meth:`wait` returns. One save at a time: a second waits for the first.

        Raises:
            OSError: On all ranks, if one of them could not write; the earlier checkpoints are intact.
        """
        self.wait()
        path, manifest, files = Path(path), _manifest(checkpoint, storage_options), {}
        folder = partial_path(path)
        group = None if storage_options is None else storage_options.group
        with raise_on_all_ranks(path, folder, group):
            if dist.get_rank() == 0:
                remove(folder)
                folder.mkdir(parents=True)
                files = write_non_tensors(checkpoint, folder)
        tensors = sharded_tensors(checkpoint)
        if storage_options is None or not storage_options.in_background:
            write = partial(dcp.save, tensors, checkpoint_id=str(folder), process_group=group)
            _finish_folder(write, path, manifest, files, group)
            return
        if self._background_group is None:
            # of its own, since its messages cross those of the training; on a CPU, where the copies are
            self._background_group = dist.new_group(backend="gloo")
        written = dcp.async_save(tensors, checkpoint_id=str(folder), process_group=self._background_group)
        finish = partial(_finish_folder, cast(Any, written).result, path, manifest, files, self._background_group)
        executor = ThreadPoolExecutor(1)
        self._pending = executor.submit(finish)
        executor.shutdown(wait=False)

    @property
    def is_saving(self) -> bool:
        """Whether a save in the background has to be waited for."""
        return self._pending is not None

    def wait(self) -> bool:
        """Wait for the save in the background.

        Returns:
            Whether there was one.

        Raises:
            OSError: On all ranks, if one of them could not write; the earlier checkpoints are intact.
        """
        if self._pending is None:
            return False
        pending, self._pending = self._pending, None
        pending.result()
        return True

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint of plain types, whatever the caller asks for; rank 0 verifies it for all; collective.

        Args:
            path: A checkpoint, or a folder of checkpoints for the newest complete one.
            map_location: Not used.
            weights_only: Not used.

        Raises:
            UnusableCheckpoint: If it is corrupt, cannot be read, or does not fit.
        """
        return read_usable(path, self.read)

    def read(self, path: Path, *, shards: bool = True) -> dict[str, Any]:
        """Read a verified checkpoint; ``read_from`` in it is its path.

        Args:
            path: The checkpoint.
            shards: False leaves the tensors of a folder to the caller.

        Raises:
            UnusableCheckpoint: If it cannot be read, or does not fit.
        """
        checkpoint = read_checkpoint(path) if shards else _read(path, describe_folder)
        if self.check is not None:
            self.check(checkpoint)
        return {**checkpoint, "read_from": str(path)}

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint and then its manifest."""
        remove(Path(path))
        manifest_path(path).unlink(missing_ok=True)


def safe_checkpoint_io(plugin: CheckpointIO) -> SafeCheckpointIO:
    """The strategy's plugin, or one in place of Lightning's default.

    Raises:
        ValueError: If it is a plugin of the user's, which would write checkpoints without these guarantees.
    """
    if isinstance(plugin, SafeCheckpointIO):
        return plugin
    if type(plugin) is not TorchCheckpointIO:
        raise ValueError(
            f"the checkpoint plugin {type(plugin).__name__} cannot be used: checkpoints are written by "
            "SafeCheckpointIO, so that an interrupted save leaves the earlier ones intact; remove it from "
            "trainer.plugins (to train on while fsdp2 saves, set checkpoint.async_save)"
        )
    return SafeCheckpointIO()


def _manifest(checkpoint: dict[str, Any], options: SaveOptions | None) -> Manifest:
    """The manifest of a checkpoint that is not written yet."""
    options = options or SaveOptions()
    step = int(checkpoint.get("global_step", 0))
    return Manifest(size=0, sha256="", step=step, run=options.run, scores=options.scores)


def _finish_folder(
    write: Callable[[], dcp.Metadata],
    path: Path,
    manifest: Manifest,
    files: Files,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Complete a sharded checkpoint; collective, for the background in a thread of each rank.

    Args:
        write: Writes the shards of this rank, or waits until they are written.
        path: The checkpoint.
        manifest: Its manifest, without size and digest.
        files: The files that rank 0 has written already.
        group: The ranks that take part; the default is all of them, by the default backend.
    """
    folder = partial_path(path)
    with raise_on_all_ranks(path, folder, group):
        metadata = write()
        sync_folder(folder)
    with raise_on_all_ranks(path, folder, group):
        if dist.get_rank() == 0:
            size, sha256 = folder_digest({**files, **written_files(metadata, folder)})
            _put_in_place(path, replace(manifest, size=size, sha256=sha256))


def _put_in_place(path: Path, manifest: Manifest) -> None:
    """Write the manifest and give what was written its name."""
    write_manifest(path, replace(manifest, number=next_number(path.parent)))
    partial = partial_path(path)
    if path.is_dir() or partial.is_dir():  # os.replace is for two files
        remove(path)  # it is incomplete, see unused_path
    os.replace(partial, path)
    sync_folder(path.parent)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file or folder: tensors and plain types, every weight finite.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedCheckpoint: If it cannot be read as such, or a weight is not finite.
        UnusableCheckpoint: If it holds an object of a package that is not imported.
    """
    return _read(path, read_folder if Path(path).is_dir() else load_plain)


def read_verified(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, or of the newest one of a folder that can be read; ``read_from`` in it is its path.

    Raises:
        FileNotFoundError: If there is none.
        UnusableCheckpoint: If it is damaged.
    """
    return read_usable(path, SafeCheckpointIO().read, alone=True)


def check_finite(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not finite, which no step brings back.

    Args:
        path: The checkpoint, for the message.
        state: Its weights, or this rank's shards of them.

    Raises:
        DamagedCheckpoint: If one is not.
    """
    if names := non_finite(state):
        raise DamagedCheckpoint(
            f"the checkpoint {path} has weights that are not finite ({names}); give one from before they were lost"
        )


def _read(path: str | Path, read: Callable[[str | Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        checkpoint = read(path)
        check_finite(path, checkpoint["state_dict"])
    except (FileNotFoundError, UnusableCheckpoint):
        raise
    except Exception as error:  # of whatever kind: the content may be anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        if (unknown := re.search(r"Unsupported global: GLOBAL (\S+)", str(error))) is not None:
            raise UnusableCheckpoint(
                f"the checkpoint {path} contains a {unknown[1]}, whose package this run does not import; if it belongs "
                "to an optimizer, configure that optimizer as in the run that wrote it"
            ) from error
        raise DamagedCheckpoint(
            f"the checkpoint {path} cannot be read as tensors and plain types ({reason}); it is corrupt or not a "
            "checkpoint of this project: give another one, or last for the newest"
        ) from error
    return checkpoint


def remove_partial(folder: str | Path) -> None:
    """Remove what an interrupted save left behind."""
    for path in Path(folder).glob(f"*{PARTIAL_SUFFIX}"):
        remove(path)
