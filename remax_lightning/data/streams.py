"""Rows that are read only when they are needed. A stream's item is a function, so a skipped row is never parsed."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

from datasets import IterableDataset

from remax_lightning.data.formats import Row, UnusableRow
from remax_lightning.data.lines import parse_line, read_lines

ReadRow: TypeAlias = Callable[[], Row | UnusableRow]

CHUNK = 1000  # rows that the datasets library converts at a time


class Stream:
    """Rows in their order, which can be read again and from any row on."""

    def __iter__(self) -> Iterator[ReadRow]:
        return self.read_from(0)

    def read_from(self, start: int) -> Iterator[ReadRow]:
        """The rows from one on."""
        raise NotImplementedError


class LineStream(Stream):
    """Rows of .jsonl files, compressed or not.

    Args:
        files: The files, in their order.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files

    def read_from(self, start: int) -> Iterator[ReadRow]:
        """The rows from one on; the lines before it are not parsed."""
        lines = ((file, *line) for file in self.files for line in read_lines(file))
        return (partial(parse_line, *line) for line in islice(lines, start, None))


class TableStream(Stream):
    """Rows of the datasets library, from the hub or from tables.

    Args:
        dataset: The rows.
        name: What they are called in messages.
    """

    def __init__(self, dataset: IterableDataset, name: str) -> None:
        try:  # without its features, the library would leave values of mixed types encoded
            self.dataset = dataset if dataset.features is not None else dataset._resolve_features()
        except StopIteration as error:
            raise ValueError(f"cannot read {name}: there is no row in it") from error
        self.name = name

    def read_from(self, start: int) -> Iterator[ReadRow]:
        """The rows from one on.

        They are read in chunks: as an iterator of single rows the library would share them out to a loader's workers.
        """
        dataset = self.dataset.skip(start) if start else self.dataset
        try:
            for chunk in dataset.iter(batch_size=CHUNK):
                for values in zip(*chunk.values(), strict=True):
                    yield partial(_row, tuple(chunk), values)
        except ValueError as error:
            raise ValueError(f"cannot read {self.name}: {error}") from error


def _row(columns: Sequence[str], values: Sequence[Any]) -> Row:
    return dict(zip(columns, values, strict=True))
