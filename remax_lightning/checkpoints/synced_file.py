"""Files that are on the disk once the call returns, and what identifies their content."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException


class HashedFile:
    """The methods of a file that torch.save needs; records length, digest and the first error, which torch replaces."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write and update the digest."""
        try:
            self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Flush the buffer to the operating system."""
        self.file.flush()


def write_synced(path: Path, write: Callable[[HashedFile], Any]) -> tuple[int, str]:
    """Write a file and wait until it is on the disk.

    Returns:
        Its size in bytes and its SHA-256 digest.
    """
    with open(path, "wb") as raw:
        file = HashedFile(raw)
        try:
            write(file)
        except Exception:
            if file.error is not None:
                raise file.error from None
            raise
        raw.flush()
        os.fsync(raw.fileno())
    return file.size, file.digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Wait until the names of a folder's files are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_and_digest(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return path.stat().st_size, digest.hexdigest()


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def raise_on_all_ranks(path: Path, partial: Path, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Raise on all ranks what is raised on one of them; collective.

    Args:
        path: The checkpoint that is being written, for the message.
        partial: What has been written of it; rank 0 removes it after a failure.
        group: Ranks that take part; the default is all of them, by the default backend.

    Raises:
        OSError: If a rank could not write.
    """
    failure: OSError | None = None
    try:
        yield
    except (OSError, CheckpointException) as error:
        failure = write_error(path, error)
    failures: list[OSError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure, group=group)
    for each in failures:
        if each is not None:
            if dist.get_rank() == 0:
                with suppress(OSError):
                    remove(partial)
            raise each


def write_error(path: Path, error: BaseException) -> OSError:
    """The error for a checkpoint that could not be written."""
    reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error).strip().splitlines()[-1]
    failure = OSError(
        f"the checkpoint {path} could not be written ({reason}); earlier checkpoints are intact: free some space or "
        "set another trainer.default_root_dir, and resume with --ckpt_path last"
    )
    failure.errno = error.errno if isinstance(error, OSError) else None
    return failure
