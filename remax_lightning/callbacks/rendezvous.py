"""Ranks that can only save together meet after an error, if they all get there."""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

SECONDS_TO_MEET = 10.0
"""How long a rank waits for the others: those that the same error or signal ends come within a second."""


@dataclass(frozen=True)
class Claim:
    """What a rank wants to save after an error; all must want the same.

    Args:
        batches: Batches trained on.
        step: Optimizer steps taken.
        is_savable: Its state is consistent and finite.
    """

    batches: int
    step: int
    is_savable: bool


class Rendezvous:
    """A group of all ranks that training does not use: what is half exchanged there cannot be taken for a message here.

    It is made when training starts, which is collective.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo")

    def meet(self, claim: Claim, path: str) -> str | None:
        """Wait for all ranks, for ten seconds.

        Args:
            claim: What this rank wants to save.
            path: Where, on rank 0.

        Returns:
            Where all ranks save now, by this group; None if one has not come, or wants to save something else.
        """
        try:
            options = dist.BarrierOptions()
            options.timeout = timedelta(seconds=SECONDS_TO_MEET)
            self.group.barrier(options).wait()  # dist.barrier knows only the group's timeout
            found: list[tuple[Claim, str]] = [(claim, path)] * dist.get_world_size()
            dist.all_gather_object(found, (claim, path), group=self.group)
        except (RuntimeError, ValueError):  # a rank has not come, or its process has ended
            return None
        is_agreed = claim.is_savable and all(other == claim for other, _ in found)
        return found[0][1] if is_agreed else None
