"""Readers of rows: line by line, so that a bad line is one bad row, or only when a row is needed."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from datasets import IterableDataset

from remax_lightning.data.formats import Row, UnusableRow

ReadRow: TypeAlias = Callable[[], Row | UnusableRow]

UNREADABLE = (ValueError, EOFError, OSError, RecursionError, zlib.error)
"""What the libraries raise of a file that is cut off, corrupt or of another kind; they seldom name it."""

CHUNK = 1000  # rows that the datasets library converts at a time


class BadLine(UnusableRow):
    """A line that holds no row, or a row that cannot be read.

    Args:
        location: File and number of the line, or source and number of the row.
        detail: What is wrong with it.
    """

    def __init__(self, location: str, detail: str) -> None:
        super().__init__(location, detail)
        self.location, self.detail = location, detail

    def __str__(self) -> str:
        return "corrupt row"


def has_lines(file: str) -> bool:
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
        raise ValueError(
            f"{file}, after line {number}: cannot decompress it ({error}); write the file again"
        ) from error


def parse_line(file: str, number: int, line: bytes) -> Row | BadLine:
    """The row on a line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadLine(f"{file}, line {number}", f"not valid JSON ({error})")
    return row if isinstance(row, dict) else BadLine(f"{file}, line {number}", "not a JSON object")


def refuse_bad_lines(rows: list[BadLine], skip_bad_rows: int) -> None:
    """Raise a `ValueError` that names the first line above the number of those that may be skipped."""
    if len(rows) > skip_bad_rows:
        bad = rows[skip_bad_rows]
        raise ValueError(
            f"{bad.location}: {bad.detail}; repair or remove it, or raise skip_bad_rows (now {skip_bad_rows}) "
            "to skip and count such rows"
        )


class Stream:
    """Rows in order, which can be read again and from any row on.

    An item is a function that reads the row: a row that is skipped is never parsed.

    Args:
        files: The local files that they are in, in order; none of rows from elsewhere.
    """

    def __init__(self, files: Sequence[str] = ()) -> None:
        self.files = files

    def __iter__(self) -> Iterator[ReadRow]:
        return self.read_from(0)

    def read_from(self, start: int) -> Iterator[ReadRow]:
        """The rows from number `start` on."""
        raise NotImplementedError


class LineStream(Stream):
    """Rows of .jsonl files, compressed or not."""

    def read_from(self, start: int) -> Iterator[ReadRow]:
        """The rows from number `start` on; the lines before it are not parsed."""
        lines = ((file, *line) for file in self.files for line in read_lines(file))
        return (partial(parse_line, *line) for line in islice(lines, start, None))


class TableStream(Stream):
    """Rows of the datasets library, from the hub or from tables.

    Args:
        dataset: The rows, the same in the same order whenever they are read.
        name: Name of the source in messages.
        files: The local files that they are in; none of rows from elsewhere.
    """

    def __init__(self, dataset: IterableDataset, name: str, files: Sequence[str] = ()) -> None:
        super().__init__(files)
        try:  # without its features, the library would leave values of mixed types encoded
            self.dataset = dataset if dataset.features is not None else dataset._resolve_features()
        except StopIteration as error:
            raise ValueError(f"cannot read {name}: there is no row in it") from error
        except UNREADABLE as error:
            raise ValueError(f"cannot read {name}: {error}") from error
        self.name = name

    def read_from(self, start: int) -> Iterator[ReadRow]:
        """The rows from number `start` on.

        They are read in chunks: as an iterator of single rows the library would split them among a loader's workers.
        """
        dataset = self.dataset.skip(start) if start else self.dataset
        try:
            for chunk in dataset.iter(batch_size=CHUNK):
                for values in zip(*chunk.values(), strict=True):
                    yield partial(_row, tuple(chunk), values)
        except UNREADABLE as error:
            raise ValueError(f"cannot read {self.name}: {error}") from error


def _row(columns: Sequence[str], values: Sequence[Any]) -> Row:
    return dict(zip(columns, values, strict=True))
