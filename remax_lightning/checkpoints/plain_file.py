"""Files of tensors and plain types, as torch.save writes them, read without code and without surprises of size."""

import stat
import zipfile
from pathlib import Path
from typing import IO, Any

import torch


def load_plain(path: str | Path) -> dict[str, Any]:
    """The content of a file that torch.save has written.

    Raises:
        ValueError: If it is no plain file, no archive of torch's, or no dict.
        UnpicklingError: If it holds anything but tensors and plain types.
    """
    if not Path(path).is_file():  # a pipe would be waited for
        raise ValueError("it is no file")
    with zipfile.ZipFile(path) as archive:
        check_stored(archive, Path(path).stat().st_size)
    content = torch.load(path, map_location="cpu", weights_only=True)
    if type(content) is not dict:
        raise ValueError(f"it holds a {type(content).__name__}")
    return content


def check_archive(file: IO[bytes], size: int) -> None:
    """Read an archive by its checksums, which torch.load does not look at.

    Args:
        file: The archive.
        size: Its length in bytes.

    Raises:
        ValueError: If it is not what was written.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            check_stored(archive, size)
            damaged = archive.testzip()
    except zipfile.BadZipFile:
        damaged = "its archive"
    if damaged is not None:
        raise ValueError(f"{damaged} is not what was written")


def check_stored(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive that holds more than its bytes; torch's do not compress.

    Raises:
        ValueError: If a record is compressed, or several share their bytes.
    """
    records = archive.infolist()
    is_stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    if not is_stored or sum(record.file_size for record in records) > size:
        raise ValueError("its records are larger than the file")


def check_plain_file(path: Path) -> int:
    """Size of a file in bytes.

    Raises:
        ValueError: If it is none but a link, say, or a pipe, which would be waited for.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is no plain file")
    return status.st_size
