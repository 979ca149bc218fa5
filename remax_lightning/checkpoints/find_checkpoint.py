"""Which checkpoint ``--ckpt_path`` means, and whether it is complete.

Every rank looks up the same path, which takes a few small JSON files. Only rank 0 verifies it, when it is loaded and
the ranks can talk to each other: that reads a single-file checkpoint once, however many ranks there are.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from remax_lightning.checkpoints.manifest import (
    MAIN_METRICS,
    METADATA_FILE,
    SUFFIX,
    DamagedCheckpoint,
    UnusableCheckpoint,
    best_first,
    integrity_error,
    manifests,
    of_newest_run,
    read_manifest,
)

Content = TypeVar("Content")


def checkpoint_folder(root: str | None) -> str:
    """Where a run with this ``trainer.default_root_dir`` has its checkpoints."""
    return os.path.join(os.path.abspath(root or "."), "checkpoints")


def find_checkpoint(
    given: str, folder: str | Path, monitor: str | None = None, mode: str = "max", *, is_fit: bool
) -> str | None:
    """The path that ``--ckpt_path`` means; nothing but manifests is read.

    Args:
        given: ``last`` for the newest complete checkpoint, ``best`` for the one with the best score, or a path.
        folder: Where the run has its checkpoints.
        monitor: The metric that ``best`` compares; the default is the main one of the module: ``val/reward``,
            ``val/accuracy`` or ``val/loss``.
        mode: Whether the largest (``max``) or the smallest (``min``) score of the monitor is the best.
        is_fit: With ``last``, a fit may start without a checkpoint.

    Returns:
        The path; for ``last`` the folder itself, whose newest complete checkpoint :func:`verified` finds, or None if
        a fit starts from the beginning.

    Raises:
        ValueError: If it is a remote address, or no checkpoint has a score.
        FileNotFoundError: If there is no checkpoint.
    """
    if "://" in given or given.startswith("registry"):
        raise ValueError(f"--ckpt_path takes a local path, last or best, got {given}; copy it to this machine first")
    if given not in ("last", "best"):
        if not Path(given).exists():
            raise FileNotFoundError(
                f"there is no checkpoint {given}; give an existing one, last for the newest or best for the one with "
                "the best score"
            )
        return given
    if not any(Path(folder).glob(f"*{SUFFIX}")):
        if given == "last" and is_fit:
            return None
        raise FileNotFoundError(
            f"--ckpt_path {given}: there is no checkpoint in {folder}; run fit first, or name a file"
        )
    return str(folder) if given == "last" else str(_best(folder, monitor, mode))


def _best(folder: str | Path, monitor: str | None, mode: str) -> Path:
    """The best of the training that the newest checkpoint belongs to."""
    entries = of_newest_run(manifests(folder))
    paths = best_first(entries, monitor, mode)
    if not paths:
        raise ValueError(
            f"--ckpt_path best: no checkpoint in {folder} has a score of {monitor or ' or '.join(MAIN_METRICS)}; "
            "validate during fit (data.validation, trainer.val_check_interval), or give last"
        )
    return paths[0]


def newest_complete(folder: str | Path, skipped: dict[Path, str] | None = None) -> Path | None:
    """The newest complete checkpoint of a folder, after a warning for each newer one that is not.

    Args:
        folder: The folder.
        skipped: Checkpoints that cannot be used, with the reason; those that are found here are added.

    Returns:
        Its path; None if the folder has no checkpoints at all.

    Raises:
        UnusableCheckpoint: If there are checkpoints, but no complete one.
    """
    skipped, entries = {} if skipped is None else skipped, manifests(folder)
    described = {path for path, _ in entries}
    for path in sorted(Path(folder).glob(f"*{SUFFIX}")):
        if path not in described:
            _skip(path, "it has no manifest that can be read", skipped)
    for path, manifest in entries:
        if path in skipped:
            continue
        if (reason := integrity_error(path, manifest)) is None:
            return path
        _skip(path, reason, skipped)
    if skipped:
        reasons = "; ".join(sorted(f"{path.name}: {reason}" for path, reason in skipped.items()))
        raise UnusableCheckpoint(
            f"{folder} has no complete checkpoint ({reasons}); name a file to use it as it is, or empty the folder to "
            "start from the beginning"
        )
    return None


def _skip(path: Path, reason: str, skipped: dict[Path, str]) -> None:
    if path not in skipped:
        rank_zero_warn(f"the checkpoint {path} is skipped: {reason}")
    skipped[path] = reason


def verified(path: str | Path, skipped: dict[Path, str] | None = None) -> Path:
    """A checkpoint that is what its manifest says; one without a manifest is left to the reader.

    Args:
        path: A checkpoint, or a folder of checkpoints for the newest complete one.
        skipped: As in :func:`newest_complete`.

    Raises:
        FileNotFoundError: If there is none.
        UnusableCheckpoint: If it is corrupt.
    """
    path = Path(path)
    if path.is_dir() and path.suffix != SUFFIX and not (path / METADATA_FILE).exists():
        newest = newest_complete(path, skipped)
        if newest is None:
            raise FileNotFoundError(f"there is no checkpoint in {path}; give another folder, or a checkpoint")
        rank_zero_info(f"the newest complete checkpoint in {path} is {newest.name}")
        return newest
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}; give an existing one, or last for the newest")
    manifest = read_manifest(path)
    if manifest is not None and (reason := integrity_error(path, manifest)) is not None:
        raise UnusableCheckpoint(
            f"the checkpoint {path} is corrupt: {reason}; give another one, or last for the newest complete one"
        )
    return path


def check_ranks_agree(path: str | None) -> None:
    """Refuse on all ranks that one of them would read another checkpoint; collective.

    Raises:
        ValueError: If the paths differ.
    """
    if not _is_distributed():
        return
    paths: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(paths, path)
    for rank, other in enumerate(paths):
        if other != paths[0]:
            raise ValueError(
                f"all ranks must read the same checkpoint, but rank 0 would read {paths[0]} and rank {rank} {other}; "
                "put trainer.default_root_dir where all machines see it, or name a file"
            )


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def read_usable(path: str | Path, read: Callable[[Path], Content], *, alone: bool = False) -> Content:
    """Read a checkpoint; of a folder of checkpoints the newest complete one that can be read.

    That takes a look at the content: a folder's shards, say, are only seen to be damaged when they are read. Collective
    unless alone.

    Args:
        path: A checkpoint, or a folder of checkpoints.
        read: Reads a verified checkpoint.
        alone: This rank reads without the others.

    Raises:
        FileNotFoundError: If there is none.
        UnusableCheckpoint: If it is damaged on any rank, or does not fit; of a folder, if all are damaged.
    """
    skipped: dict[Path, str] = {}
    while True:
        found = verified(path, skipped) if alone else verified_on_rank_0(path, skipped)
        content, failure = None, None
        try:
            content = read(found)
        except Exception as error:
            failure = error
        failure = failure if alone else _of_all_ranks(failure)
        if failure is None:
            return cast(Content, content)
        if not isinstance(failure, DamagedCheckpoint) or found == Path(path):
            raise failure
        _skip(found, str(failure), skipped)


def _of_all_ranks(failure: Exception | None) -> Exception | None:
    """This rank's failure, or the first of another rank; collective."""
    if not _is_distributed():
        return failure
    told: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
    own = None if failure is None else (isinstance(failure, DamagedCheckpoint), str(failure))
    dist.all_gather_object(told, own)
    others = [each for each in told if each is not None]
    is_damaged = all(damaged for damaged, _ in others)
    if failure is not None and isinstance(failure, DamagedCheckpoint) == is_damaged:
        return failure
    return (DamagedCheckpoint if is_damaged else UnusableCheckpoint)(others[0][1]) if others else None


def verified_on_rank_0(path: str | Path, skipped: dict[Path, str] | None = None) -> Path:
    """As :func:`verified`, but rank 0 alone reads, and all ranks get its result or its error; collective."""
    if not _is_distributed():
        return verified(path, skipped)
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            result = [verified(path, skipped)]
        except (ValueError, OSError) as error:
            result = [error]
    dist.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0]
    return Path(result[0])
