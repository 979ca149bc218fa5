"""Files that are on the disk when they are said to be written."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


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
