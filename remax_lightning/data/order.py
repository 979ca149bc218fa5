"""Which rows a process reads, in which order, and from where a resumed run goes on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler, DataLoader, Sampler


@dataclass
class Position:
    """How far the training has come, the same on all processes.

    Args:
        epoch: Passes over the rows that are complete.
        rows: Rows handed out in this epoch, over all processes.
    """

    epoch: int = 0
    rows: int = 0

    def advance(self, count: int, num_rows: int) -> None:
        """Count a global batch of `count` of the `num_rows` rows as handed out."""
        self.leave_finished_epoch(count, num_rows)
        self.rows += count
        self.leave_finished_epoch(count, num_rows)

    def leave_finished_epoch(self, count: int, num_rows: int) -> None:
        """Go to the start of the next epoch if fewer than `count` of the `num_rows` rows are left in this one."""
        if num_rows - self.rows < count:
            self.epoch, self.rows = self.epoch + 1, 0


class TrainingOrder(Sampler[int]):
    """This process's rows from a position on, as many as an epoch has, in an order set by the seed and the epoch only.

    Of each global batch of `batch_size * world_size` rows, process `rank` takes every `world_size`-th row. An
    incomplete last batch is left out. From the end of one permutation the order goes on into the next: the trainer ends
    its epochs by its own count, which a limit on the batches or another number of processes sets off from the position.

    Args:
        num_rows: Rows of the training set.
        batch_size: Rows per process and step.
        rank: This process.
        world_size: Number of processes.
        seed: Together with the epoch, decides the permutation.
        position: Read whenever an iteration begins; advanced by whoever hands out the batches.
    """

    def __init__(
        self, num_rows: int, batch_size: int, rank: int, world_size: int, seed: int, position: Position
    ) -> None:
        self.num_rows = num_rows
        self.global_batch_size = batch_size * world_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.position = position

    def __iter__(self) -> Iterator[int]:
        position = replace(self.position)
        epoch, permutation = -1, np.empty(0, dtype=np.int64)
        for _ in range(self.num_rows // self.global_batch_size):
            position.leave_finished_epoch(self.global_batch_size, self.num_rows)
            if position.epoch != epoch:
                epoch = position.epoch
                permutation = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
            global_batch = permutation[position.rows : position.rows + self.global_batch_size]
            yield from global_batch[self.rank :: self.world_size].tolist()
            position.advance(self.global_batch_size, self.num_rows)

    def __len__(self) -> int:
        return self.num_rows // self.global_batch_size * (self.global_batch_size // self.world_size)


class EvenBatches(BatchSampler):
    """A process's rows, in order, in a given number of batches whose sizes differ by at most one.

    Args:
        sampler: The rows.
        batch_size: Rows per batch that were asked for.
        drop_last: For the signature of a batch sampler, which Lightning relies on; nothing is dropped.
        num_batches: Number of batches; from `count_batches`, so that it is the same on all processes.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool, num_batches: int) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.num_batches = num_batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter([part.tolist() for part in np.array_split(list(self.sampler), self.num_batches)])

    def __len__(self) -> int:
        return self.num_batches


def count_batches(num_rows: int, batch_size: int, world_size: int) -> int:
    """Evaluation batches of each process: as many on all, since one that has fewer would leave the others waiting.

    With several processes and a `batch_size` of 1, some processes may have one batch of two rows.
    """
    most_rows = -(-num_rows // world_size)
    return min(-(-most_rows // batch_size), num_rows // world_size)


class ResumableLoader(DataLoader[dict[str, Any]]):
    """Tells Lightning that a resumed loader goes on where it stopped.

    Its own state is empty: the position belongs to the data module, whose state is loaded before the loader is made.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing."""
