"""Which rows a rank reads, in which order, and where a resumed run goes on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler


@dataclass
class Position:
    """How far the training has come, the same on all ranks.

    Args:
        epoch: Passes over the rows that are complete.
        rows: Rows of this epoch in the batches so far, over all ranks; of a stream, rows read for them, dropped ones
            included.
    """

    epoch: int = 0
    rows: int = 0

    def go_to(self, epoch: int, rows: int) -> None:
        """Move; whoever reads this position reads the new one."""
        self.epoch, self.rows = epoch, rows


def shuffled_rows(epoch: int, num_rows: int, seed: int) -> np.ndarray:
    """An epoch that has each of the rows once: their indices, (num_rows,)."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def mixed_rows(epoch: int, sizes: Sequence[int], weights: Sequence[float], seed: int) -> np.ndarray:
    """An epoch that has as many rows as all sources together, of each source in proportion to its weight.

    A source goes through its rows in passes, each a new permutation, and goes on with a pass in the next epoch: no
    row comes a second time before all others of its source have come.

    Args:
        epoch: Number of the epoch, from 0.
        sizes: Rows of each source.
        weights: Weight of each source; only their proportions matter.
        seed: Together with the epoch, decides the order.

    Returns:
        Indices into the rows of the sources one after another, (sum of sizes,).
    """
    first_rows = np.cumsum([0, *sizes[:-1]])
    rows = []
    for source, (size, count) in enumerate(zip(sizes, rows_per_epoch(sizes, weights), strict=True)):
        start, end = epoch * count, (epoch + 1) * count
        passes = range(start // size, -(-end // size))
        order = [np.random.default_rng((seed, source, number)).permutation(size) for number in passes]
        skipped = start - start // size * size
        drawn = np.concatenate([np.empty(0, dtype=np.int64), *order])[skipped : skipped + count]
        rows.append(first_rows[source] + drawn)
    drawn_rows = np.concatenate(rows)
    return drawn_rows[np.random.default_rng((seed, epoch)).permutation(len(drawn_rows))]


def rows_per_epoch(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Rows of each source in an epoch, in proportion to its weight; they add up to the rows of all sources."""
    shares = np.array(weights, dtype=float) / sum(weights) * sum(sizes)
    counts = np.floor(shares).astype(int)
    largest = np.argsort(counts - shares, kind="stable")[: sum(sizes) - counts.sum()]
    counts[largest] += 1
    return counts.tolist()


class TrainingOrder(Sampler[int]):
    """This rank's rows from a position on, as many as an epoch has, in an order that the epoch decides.

    Of each global batch of `batch_size * world_size` rows, rank `rank` takes every `world_size`-th row. An incomplete
    last batch is left out. From the end of one epoch the order goes on into the next: the trainer counts its epochs
    itself, and with a limit on the batches or another world size its count differs from the position.

    Args:
        num_rows: Rows of the training set.
        batch_size: Rows per rank and step.
        rank: This rank.
        world_size: Number of ranks.
        position: Read whenever an iteration begins; advanced by the data module, once for each batch that is used.
        rows_of_epoch: The rows of an epoch with this number, (num_rows,): all of them, or some of them several times.

    Raises:
        ValueError: If there is no complete global batch.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        rank: int,
        world_size: int,
        position: Position,
        rows_of_epoch: Callable[[int], np.ndarray],
    ) -> None:
        if num_rows < batch_size * world_size:
            raise ValueError(
                f"train has {num_rows} usable rows, fewer than one batch of batch_size={batch_size} on each of "
                f"{world_size} rank(s); lower batch_size or give more rows"
            )
        self.num_rows = num_rows
        self.global_batch_size = batch_size * world_size
        self.rank = rank
        self.world_size = world_size
        self.position = position
        self.rows_of_epoch = rows_of_epoch

    def take_batch(self, position: Position) -> tuple[int, int]:
        """Advance a position by one global batch.

        A position with too few rows left for a batch belongs to the next epoch: before, since a resumed run may have
        larger batches, and after, so that a saved position is where the next batch begins.

        Returns:
            Epoch and first row of the batch.
        """
        self._leave_finished_epoch(position)
        start = position.epoch, position.rows
        position.rows += self.global_batch_size
        self._leave_finished_epoch(position)
        return start

    def _leave_finished_epoch(self, position: Position) -> None:
        if self.num_rows - position.rows < self.global_batch_size:
            position.epoch, position.rows = position.epoch + 1, 0

    def __iter__(self) -> Iterator[int]:
        position = replace(self.position)  # runs ahead of the batches that are used
        current_epoch, rows = -1, np.empty(0, dtype=np.int64)
        for _ in range(self.num_rows // self.global_batch_size):
            epoch, first = self.take_batch(position)
            if epoch != current_epoch:
                current_epoch, rows = epoch, self.rows_of_epoch(epoch)
            global_batch = rows[first : first + self.global_batch_size]
            yield from global_batch[self.rank :: self.world_size].tolist()

    def __len__(self) -> int:
        return self.num_rows // self.global_batch_size * (self.global_batch_size // self.world_size)


def split_rows(num_rows: int, held_out_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training rows and of the held-out rows (at least one unless the fraction is 0), both ascending."""
    if held_out_fraction == 0:
        return list(range(num_rows)), []
    shuffled = np.random.default_rng(seed).permutation(num_rows).tolist()
    held_out = max(1, round(num_rows * held_out_fraction))
    return sorted(shuffled[held_out:]), sorted(shuffled[:held_out])


class EvenBatches(BatchSampler):
    """A rank's rows, in order, in a given number of batches whose sizes differ by at most one.

    Args:
        sampler: The rows.
        batch_size: Largest number of rows per batch, as it was asked for.
        drop_last: For the signature of a batch sampler, which Lightning relies on; nothing is dropped.
        num_batches: Number of batches; from `even_batches`, so that it is the same on all ranks.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool, num_batches: int) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.num_batches = num_batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter([rows.tolist() for rows in np.array_split(list(self.sampler), self.num_batches)])

    def __len__(self) -> int:
        return self.num_batches


def even_batches(name: str, num_rows: int, batch_size: int, rank: int, world_size: int) -> EvenBatches:
    """A rank's evaluation batches of its every `world_size`-th row.

    All ranks have the same number of batches, since a rank with fewer would leave the others waiting. With several
    ranks and a `batch_size` of 1, some ranks may have one batch of two rows.

    Raises:
        ValueError: If there are fewer rows than ranks; the message has `name`.
    """
    if num_rows < world_size:
        raise ValueError(f"{name} has {num_rows} usable rows for {world_size} ranks; give at least one for each")
    most_rows = -(-num_rows // world_size)  # of a rank
    num_batches = min(-(-most_rows // batch_size), num_rows // world_size)
    rows = SequentialSampler(range(len(range(rank, num_rows, world_size))))  # indices into this rank's rows
    return EvenBatches(rows, batch_size, drop_last=False, num_batches=num_batches)


class Resumable:
    """Tells Lightning that a resumed loader goes on where it stopped.

    Its state is empty: the position belongs to the data module, whose state is loaded before the loader is made.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing."""


class ResumableLoader(Resumable, DataLoader[dict[str, Any]]):
    """A `DataLoader` of rows in an order that begins at the data module's position."""
