"""What goes wrong again and again, counted by its cause and said on the rank that it happens to."""

import warnings
from collections import Counter

import torch.distributed as dist

MAX_CAUSES = 100
"""Further causes are counted together: a message that differs each time would be a new cause at every step."""


class FailureLog:
    """Says the 1st, 10th, 100th, ... failure of each cause, with the counts so far.

    Nothing is exchanged between ranks: each says its own.
    """

    def __init__(self) -> None:
        self.times: Counter[str] = Counter()
        self.num_rows: Counter[str] = Counter()

    def count(self, cause: str, sentence: str, num_rows: int) -> None:
        """Count a failure.

        Args:
            cause: What failures have to share to be counted together.
            sentence: What is said of this one.
            num_rows: Rows that it cost.
        """
        cause = cause if cause in self.times or len(self.times) < MAX_CAUSES else "other causes"
        self.times[cause] += 1
        self.num_rows[cause] += num_rows
        times = self.times[cause]
        if is_power_of_ten(times):
            so_far = f" ({times} times so far, {self.num_rows[cause]} responses)" if times > 1 else ""
            # with a registry of its own: Python shows a text of the same place once only
            warnings.warn_explicit(f"{rank_label()}{sentence}{so_far}", UserWarning, "remax_lightning", 0, registry={})


def is_power_of_ten(number: int) -> bool:
    """Whether a count is 1, 10, 100, ...

    Example:
        >>> [number for number in range(200) if is_power_of_ten(number)]
        [1, 10, 100]
    """
    return str(number).rstrip("0") == "1"


def rank_label() -> str:
    """The rank of this process, to begin a sentence with; nothing where there is one process."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return ""
    return f"rank {dist.get_rank()}: "
