"""Files that are on the disk when they are said to be written."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException


class HashedFile:
    """What torch.save needs of a file, noting length, digest and the first error, which torch would replace."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write, and count."""
        try:
            self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self.file.flush()


def write_synced(path: Path, write: Callable[[HashedFile], Any]) -> tuple[int, str]:
    """Write a file and wait until the disk has it; its size and digest."""
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
    """Wait until the disk has the names of a folder's files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_and_digest(path: Path) -> tuple[int, str]:
    """Size in bytes and digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return path.stat().st_size, digest.hexdigest()


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def raise_on_all_ranks(path: Path) -> Iterator[None]:
    """Raise in all processes what is raised in one of them; collective."""
    failure: OSError | None = None
    try:
        yield
    except (OSError, CheckpointException) as error:
        failure = write_error(path, error)
    failures: list[OSError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for each in failures:
        if each is not None:
            raise each


def write_error(path: Path, error: BaseException) -> OSError:
    """What to say of a checkpoint that could not be written."""
    reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error).strip().splitlines()[-1]
    return OSError(
        error.errno if isinstance(error, OSError) else None,
        f"the checkpoint {path} could not be written ({reason}); those written before it are intact: make room or give "
        "another checkpoint.dirpath, and resume with --ckpt_path last",
    )
