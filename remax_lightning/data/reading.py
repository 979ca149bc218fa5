"""From rows to examples; a row that cannot be used is dropped and counted."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, cast

from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_warn

from remax_lightning.data.formats import Row, UnusableRow
from remax_lightning.data.lines import BadLine, refuse_bad_lines
from remax_lightning.data.sources import Part

Columns: TypeAlias = tuple[str, ...]
Example: TypeAlias = dict[str, Any]
Encode: TypeAlias = Callable[[Sequence[Row | UnusableRow], Sequence[Columns]], list[Example | UnusableRow]]
"""Examples of rows, or why they cannot be used, in their order; from the rows and the columns of each one's source."""

CHUNK = 1000  # rows that are tokenized in one call


def encode_parts(
    name: str, parts: Sequence[Part], indices: Sequence[int], encode: Encode, skip_bad_rows: int
) -> tuple[list[Example], list[int]]:
    """Examples of the rows that can be used; one warning says how many cannot, and why.

    Args:
        name: What the rows are for, in messages.
        parts: All rows of the sources.
        indices: The rows to read, of all parts one after another, in ascending order.
        encode: Makes examples.
        skip_bad_rows: Number of corrupt rows above which they are an error.

    Returns:
        The examples in the order of `indices`, each with its row's index in the sources as `prompt_index`, and how many
        of them are from each source.

    Raises:
        ValueError: If no row can be used, or too many are corrupt.
    """
    columns = all_columns(parts)
    examples: list[Example] = []
    bad: list[BadLine] = []
    dropped: Counter[str] = Counter()
    sizes = [0] * (1 + max(part.number for part in parts))
    for part, own, rows in _chunks(parts, indices):
        bad += [row for row in rows if isinstance(row, BadLine)]
        refuse_bad_lines(bad, skip_bad_rows)
        outcomes = encode([complete(row, columns) for row in rows], [part.columns] * len(rows))
        for index, outcome in zip(own, outcomes, strict=True):
            if isinstance(outcome, UnusableRow):
                dropped[str(outcome)] += 1
            else:
                examples.append({**outcome, "prompt_index": index})
                sizes[part.number] += 1
    if not examples:
        raise ValueError(
            f"{name}: not one of {len(indices)} rows can be used ({reasons(dropped) or 'the source is empty'}); "
            f"check the lengths allowed and the arguments that name columns; the columns are {list(columns)}"
        )
    if dropped:
        rank_zero_warn(f"{name}: dropped {dropped.total()} of {len(indices)} rows ({reasons(dropped)})")
    return examples, sizes


def all_columns(parts: Sequence[Part]) -> Columns:
    """The columns of all parts."""
    return tuple(dict.fromkeys(column for part in parts for column in part.columns))


def complete(row: Row | UnusableRow, columns: Columns) -> Row | UnusableRow:
    """The row with None in the columns that it lacks."""
    return row if isinstance(row, UnusableRow) else {**dict.fromkeys(columns), **row}


def reasons(dropped: Counter[str]) -> str:
    """How often each reason came up, in words."""
    return ", ".join(f"{count} x {reason}" for reason, count in dropped.most_common())


def _chunks(
    parts: Sequence[Part], indices: Sequence[int]
) -> Iterator[tuple[Part, Sequence[int], list[Row | UnusableRow]]]:
    """The rows to read, at most `CHUNK` of one part at a time, with their indices."""
    start = 0
    for part in parts:
        assert isinstance(part.rows, Dataset | list)
        end = start + len(part.rows)
        own = [index for index in indices if start <= index < end]
        for first in range(0, len(own), CHUNK):
            chunk = own[first : first + CHUNK]
            local = [index - start for index in chunk]
            yield part, chunk, _read(part, local)
        start = end


def _read(part: Part, indices: Sequence[int]) -> list[Row | UnusableRow]:
    """Rows of a part; the library does not look at the bytes of a text before it is read."""
    if not isinstance(part.rows, Dataset):
        return [cast(list[Row | UnusableRow], part.rows)[index] for index in indices]
    try:
        return list(part.rows.select(indices))
    except UnicodeDecodeError as error:
        if len(indices) == 1:
            return [BadLine(f"{part.source}, row {indices[0] + 1}", f"text that is not UTF-8 ({error})")]
        return [row for index in indices for row in _read(part, [index])]
