"""Digests that tell whether rows are the same as in another run or on another rank, wherever they are stored."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Protocol

from lightning.pytorch.utilities import rank_zero_warn

from remax_lightning.data.formats import Row, UnusableRow, check_depth, or_unusable
from remax_lightning.data.order import Position
from remax_lightning.data.readers import Stream
from remax_lightning.data.sources import HEAD, SourceTable
from remax_lightning.rollout.plain_rows import plain

LENGTH = 16  # hexadecimal digits: 64 bits
BLOCK = 1 << 16  # bytes
BLOCKS = 64  # of a file: all of one of up to 4 MiB


class Hash(Protocol):
    """What is asked of a hash."""

    def update(self, data: bytes, /) -> None:
        """Take in more."""

    def hexdigest(self) -> str:
        """The digest so far."""


def add_rows(digest: Hash, rows: Iterable[Row | UnusableRow]) -> None:
    """Take in rows: names and values of their columns.

    Of a value that JSON has no form for its type counts, and of a row that cannot be used as it is why.
    """
    for row in rows:
        read = row if isinstance(row, UnusableRow) else or_unusable(check_depth, row)
        values = str(read) if isinstance(read, UnusableRow) else plain(row, other=lambda each: type(each).__qualname__)
        text = json.dumps(values, sort_keys=True)
        digest.update(text.encode() + b"\n")


def stream_digest(tables: Sequence[SourceTable]) -> str:
    """A digest of what can be read of a stream within moments.

    Of files their sizes and 64 evenly spaced blocks of 64 KiB, which is all of a file of up to 4 MiB; of other streams
    the first 100 rows; of rows in memory these and their number.
    """
    digest = hashlib.sha256()
    for table in tables:
        if isinstance(table.rows, Stream):
            for file in table.rows.files:
                _add_file(digest, file)
            if not table.rows.files:
                add_rows(digest, (read() for read in islice(table.rows, HEAD)))
        else:
            digest.update(str(len(table.rows)).encode())
            add_rows(digest, islice(table.rows, HEAD))
    return digest.hexdigest()[:LENGTH]


def _add_file(digest: Hash, file: str) -> None:
    size = os.path.getsize(file)
    digest.update(str(size).encode())
    with open(file, "rb") as content:
        count = min(BLOCKS, -(-size // BLOCK))
        for number in range(count):
            # from the first to the last block; they overlap in a small file
            content.seek(number * (size - BLOCK) // (count - 1) if count > 1 else 0)
            digest.update(content.read(BLOCK))


def joint_digest(digests: dict[str, str]) -> str:
    """One digest of those of several splits."""
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()[:LENGTH]


def warn_of_changed_rows(old: dict[str, str], new: dict[str, str], position: Position) -> None:
    """Tell of splits whose rows are others than when a checkpoint was saved, and what follows from it.

    Args:
        old: Digests in the checkpoint, by split; none in one of an earlier version.
        new: Those of this run.
        position: Where the training goes on.
    """
    place = f"row {position.rows} of epoch {position.epoch}"
    consequences = {
        "train": f"training goes on at {place} of the new ones, so some rows may come twice or not at all",
        "validation": "scores of earlier checkpoints do not compare with those to come",
    }
    for split, consequence in consequences.items():
        if split in old and split in new and old[split] != new[split]:
            rank_zero_warn(
                f"the rows of data.{split} are not those from before the checkpoint (digest {old[split]}, now "
                f"{new[split]}): {consequence}; give the old rows to resume exactly"
            )
