"""Rows of .jsonl files, line by line: a line that cannot be read is one bad row, not the end of the file."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from remax_lightning.data.formats import Row, UnusableRow


class BadLine(UnusableRow):
    """A line that holds no row, or a row that cannot be read.

    Args:
        place: File and number of the line, or source and number of the row.
        detail: What is wrong with it.
    """

    def __init__(self, place: str, detail: str) -> None:
        super().__init__(place, detail)
        self.place, self.detail = place, detail

    def __str__(self) -> str:
        return "corrupt row"


def is_lines(file: str) -> bool:
    """Whether a file has a row on each line."""
    return ".jsonl" in Path(file).suffixes


def read_lines(file: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers, from 1.

    Raises:
        ValueError: If a compressed file is cut off or corrupt.
    """
    number = 0
    try:
        with gzip.open(file, "rb") if file.endswith(".gz") else open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}, after line {number}: cannot decompress it ({error}); write the file anew") from error


def parse_line(file: str, number: int, line: bytes) -> Row | BadLine:
    """The row on a line."""
    try:
        row = json.loads(line)
    except ValueError as error:
        return BadLine(f"{file}, line {number}", f"not valid JSON ({error})")
    return row if isinstance(row, dict) else BadLine(f"{file}, line {number}", "not a JSON object")


def refuse_bad_lines(rows: list[BadLine], skip_bad_rows: int) -> None:
    """Raise a `ValueError` that names the first line above the number of those that may be skipped."""
    if len(rows) > skip_bad_rows:
        bad = rows[skip_bad_rows]
        raise ValueError(
            f"{bad.place}: {bad.detail}; repair or remove it, or raise skip_bad_rows (now {skip_bad_rows}) "
            "to skip and count such rows"
        )
