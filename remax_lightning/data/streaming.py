"""Training on rows that are read as they are needed, in an order that survives a resume exactly.

The rows are read in the order of their sources and shuffled in windows: the permutation of a window depends on the
seed, the epoch and the window's number, so a resumed run needs to know only how many rows were read. Windows before
that are skipped without parsing their rows.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from remax_lightning.data.encoding import Columns, Example, all_columns, fill_missing_columns, format_reasons
from remax_lightning.data.formats import Row, UnusableRow
from remax_lightning.data.order import Position, Resumable
from remax_lightning.data.readers import BadLine, ReadRow, Stream, refuse_bad_lines
from remax_lightning.data.sources import SourceTable

T = TypeVar("T")
Encode: TypeAlias = Callable[[Sequence[Row | UnusableRow], Sequence[Columns]], list[Example | UnusableRow]]
"""`RowEncoder.encode`: examples of rows, or why they cannot be used, in their order."""


class StreamedBatch(dict[str, Any]):
    """A batch of a stream.

    Args:
        entries: Its tensors and columns.
        position: The position after it. It is no entry: those are what the data has, of one value for each row.
    """

    def __init__(self, entries: dict[str, Any], position: Position) -> None:
        super().__init__(entries)
        self.position = position


@dataclass(frozen=True)
class Window:
    """The rows of a window after encoding.

    Args:
        end: Rows of the epoch up to the end of this window.
        examples: The usable ones, each with the number of rows of the epoch up to and including it.
        dropped: Why the others were dropped.
        bad: The corrupt ones among the dropped rows.
    """

    end: int
    examples: list[tuple[int, Example]]
    dropped: Counter[str]
    bad: list[BadLine]


class StreamedWindows(IterableDataset[Window]):
    """The rows of an epoch in shuffled windows; of several worker processes, each encodes every n-th window.

    Args:
        tables: The rows, of one source after another.
        encode: Makes examples of rows.
        window_size: Rows of a window.
        limit: Number of rows after which an epoch ends; None for all.
        seed: Together with the epoch and the number of a window, decides its order.
    """

    def __init__(
        self, tables: Sequence[SourceTable], encode: Encode, window_size: int, limit: int | None, seed: int
    ) -> None:
        self.tables = tables
        self.encode = encode
        self.window_size = window_size
        self.limit = limit
        self.seed = seed
        self.position = Position()

    def __iter__(self) -> Iterator[Window]:
        worker = get_worker_info()
        worker_id, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        first = self.position.rows // self.window_size
        rows = self._read_from(first * self.window_size)
        for number in count(first):
            window = list(islice(rows, self.window_size))
            if not window:
                return
            if (number - first) % num_workers == worker_id:
                yield self._encode(number, window)

    def _read_from(self, start: int) -> Iterator[tuple[SourceTable, ReadRow]]:
        rows: Iterator[tuple[SourceTable, ReadRow]]
        if len(self.tables) == 1 and isinstance(self.tables[0].rows, Stream):  # which can skip without reading
            rows = ((self.tables[0], read) for read in self.tables[0].rows.read_from(start))
        else:
            rows = islice(((table, read) for table in self.tables for read in _readers(table)), start, None)
        return rows if self.limit is None else islice(rows, max(self.limit - start, 0))

    def _encode(self, number: int, window: Sequence[tuple[SourceTable, ReadRow]]) -> Window:
        first = number * self.window_size
        order = np.random.default_rng((self.seed, self.position.epoch, number)).permutation(len(window)).tolist()
        start = max(self.position.rows, first)
        remaining = order[start - first :]  # a resumed run may start in mid-window
        columns = all_columns(self.tables)
        rows = [window[index][1]() for index in remaining]
        columns_of_rows = [window[index][0].columns for index in remaining]
        outcomes = self.encode([fill_missing_columns(row, columns) for row in rows], columns_of_rows)
        examples = [
            (rows_read, {**outcome, "prompt_index": first + index})
            for rows_read, index, outcome in zip(count(start + 1), remaining, outcomes, strict=False)
            if not isinstance(outcome, UnusableRow)
        ]
        dropped = Counter(str(outcome) for outcome in outcomes if isinstance(outcome, UnusableRow))
        return Window(first + len(window), examples, dropped, [row for row in rows if isinstance(row, BadLine)])


class StreamLoader(Resumable):
    """This rank's batches from a position on, up to the end of the epoch.

    The batches hold usable rows only and are full; an incomplete last one is left out. All ranks read and encode all
    rows, since the batch that a row falls into depends on the rows dropped before it.

    Args:
        windows: The rows.
        batch_size: Rows per rank and step.
        rank: This rank.
        world_size: Number of ranks.
        position: Read whenever an iteration begins; set by the data module to that of each batch it uses.
        collate: Makes a batch of examples.
        num_workers: Processes that encode windows.
        skip_bad_rows: Number of corrupt rows of an epoch above which they are an error.
    """

    def __init__(
        self,
        windows: StreamedWindows,
        batch_size: int,
        rank: int,
        world_size: int,
        position: Position,
        collate: Callable[[list[Example]], dict[str, Any]],
        num_workers: int,
        skip_bad_rows: int,
    ) -> None:
        self.windows = windows
        self.global_batch_size = batch_size * world_size
        self.rank = rank
        self.world_size = world_size
        self.position = position
        self.collate = collate
        self.num_workers = num_workers
        self.skip_bad_rows = skip_bad_rows

    def __iter__(self) -> Iterator[StreamedBatch]:
        position, num_batches = replace(self.position), 0
        while not num_batches:
            for batch in self._rest_of_epoch(position):
                num_batches += 1
                yield batch
            if not num_batches and position.rows == 0:
                raise ValueError(
                    f"train has fewer usable rows than one batch of {self.global_batch_size} over all ranks; "
                    "lower batch_size or give more rows"
                )
            position = Position(position.epoch + 1, 0)

    def _rest_of_epoch(self, position: Position) -> Iterator[StreamedBatch]:
        """Batches up to the end of the epoch; each waits until it is known whether it is the last."""
        waiting: deque[tuple[int, Example]] = deque()
        complete_batch: tuple[int, list[Example]] | None = None
        for window in self._read(position):
            waiting.extend(window.examples)
            while len(waiting) >= self.global_batch_size:
                if complete_batch is not None:
                    yield self._batch(complete_batch[1], Position(position.epoch, complete_batch[0]))
                taken = [waiting.popleft() for _ in range(self.global_batch_size)]
                complete_batch = taken[-1][0], [example for _, example in taken]
        if complete_batch is not None:
            yield self._batch(complete_batch[1], Position(position.epoch + 1, 0))

    def _batch(self, examples: list[Example], position: Position) -> StreamedBatch:
        return StreamedBatch(self.collate(examples[self.rank :: self.world_size]), position)

    def _read(self, position: Position) -> Iterator[Window]:
        """The windows from a position on; at the end, a warning counts the rows dropped."""
        self.windows.position = replace(position)
        loader = DataLoader(
            self.windows,
            batch_size=None,
            collate_fn=_identity,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(0),  # the global one is left alone
        )
        end, dropped, bad = position.rows, Counter[str](), []
        for window in loader:
            end = window.end
            dropped += window.dropped
            bad += window.bad
            refuse_bad_lines(bad, self.skip_bad_rows)
            yield window
        if dropped:
            rank_zero_warn(
                f"train: dropped {dropped.total()} of {end - position.rows} rows ({format_reasons(dropped)}) "
                f"from row {position.rows} to the end of epoch {position.epoch}"
            )


def _identity(value: T) -> T:
    return value


def _readers(table: SourceTable) -> Iterator[ReadRow]:
    """A table's rows, as a stream gives them."""
    return iter(table.rows) if isinstance(table.rows, Stream) else (partial(_identity, row) for row in table.rows)
