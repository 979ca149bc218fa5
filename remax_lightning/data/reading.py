"""From rows to examples; a row that cannot be used is dropped and counted."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_warn

from remax_lightning.data.formats import Row, UnusableRow

Example: TypeAlias = dict[str, Any]


def encode_rows(name: str, rows: Dataset, indices: Sequence[int], encode: Callable[[Row], Example]) -> list[Example]:
    """Examples of the rows that can be used; one warning says how many cannot, and why.

    Args:
        name: What the rows are for, in messages.
        rows: All rows of the source.
        indices: The rows to read.
        encode: Makes an example, or raises `UnusableRow`.

    Returns:
        The examples in the order of `indices`, each with its row's index in the source as `prompt_index`.

    Raises:
        ValueError: If no row can be used.
    """
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    for index, row in zip(indices, rows.select(indices), strict=True):
        try:
            examples.append({**encode(row), "prompt_index": index})
        except UnusableRow as reason:
            dropped[str(reason)] += 1
    reasons = ", ".join(f"{count} x {reason}" for reason, count in dropped.most_common())
    if not examples:
        raise ValueError(
            f"{name}: not one of {len(indices)} rows can be used ({reasons or 'the source is empty'}); "
            f"check the lengths allowed and the arguments that name columns; the columns are {rows.column_names}"
        )
    if dropped:
        rank_zero_warn(f"{name}: dropped {dropped.total()} of {len(indices)} rows ({reasons})")
    return examples
