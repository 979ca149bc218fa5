"""A batch of which some optimizer steps are done when a run is saved, so that a resumed run makes the others."""

from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, device

from remax_lightning.rollout import Rollout


class UnfinishedBatch:
    """The rollouts of a batch on all ranks, and how many of its updates are done.

    The weights that the rollouts were drawn with are gone after the first of several updates; of what is saved then,
    the rollouts are a part.
    """

    def __init__(self) -> None:
        self.rollouts: list[dict[str, Any]] | None = None  # of all ranks, in host memory; None between batches
        self.step = 0  # optimizer steps taken before the batch
        self.num_done = 0  # updates of the batch, those that were skipped included
        self.is_torn = False  # an update is half done; set by who has to know
        self._num_to_skip = 0
        self._resumed: dict[str, Any] | None = None

    @property
    def can_resume(self) -> bool:
        """Whether updates of the batch are done, and a resumed run could go on after them."""
        return self.rollouts is not None and self.num_done > 0

    def can_wait(self, updates: int) -> bool:
        """Whether a resumed run could make the rest of a number of updates."""
        return self.can_resume and self.num_done < updates

    def state_dict(self) -> dict[str, Any] | None:
        """What a resumed run needs, tensors and plain types; None if it starts with a new batch."""
        return {"rollouts": self.rollouts, "step": self.step, "num_done": self.num_done} if self.can_resume else None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on with a batch that was saved."""
        self._resumed = state

    def begin(self, collect: Callable[[], Rollout], step: int, rank: int, world_size: int, on: device) -> Rollout:
        """The rollout of a batch: the one that was saved, or a new one; collective.

        Args:
            collect: Draws a new one.
            step: Optimizer steps taken.
            rank: Number of this process.
            world_size: Number of processes.
            on: Where the rollout is needed.
        """
        resumed, self._resumed = self._resumed, None
        if resumed is not None and len(resumed["rollouts"]) == world_size:
            self.rollouts, self.step, self.num_done = resumed["rollouts"], resumed["step"], resumed["num_done"]
            self._num_to_skip = self.num_done
            return _from_plain(resumed["rollouts"][rank], on)
        if resumed is not None:
            rank_zero_warn(
                f"the checkpoint was saved between the updates of a batch by {len(resumed['rollouts'])} ranks, and now "
                f"there are {world_size}: the batch is drawn and learned from again"
            )
        rollout = collect()
        self.rollouts, self.step, self.num_done, self._num_to_skip = _of_all_ranks(rollout, world_size), step, 0, 0
        return rollout

    def skips(self) -> bool:
        """Whether the next update is done already."""
        self._num_to_skip -= 1
        return self._num_to_skip >= 0

    def end_update(self) -> None:
        """An update is done, or skipped."""
        self.num_done += 1
        self.is_torn = False

    def end(self) -> None:
        """The batch is learned from."""
        self.rollouts = None


def _of_all_ranks(rollout: Rollout, world_size: int) -> list[dict[str, Any]] | None:
    """Rollouts of all ranks as plain types; None if one has fields of other types."""
    plain = [_as_plain(rollout)]
    if world_size > 1:
        plain *= world_size
        dist.all_gather_object(plain, plain[0])
    found = [each for each in plain if each is not None]
    return found if len(found) == world_size else None


def _as_plain(rollout: Rollout) -> dict[str, Any] | None:
    values = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in vars(rollout).items()}
    is_plain = all(value is None or isinstance(value, Tensor | bool | int | float | str) for value in values.values())
    return {"type": type(rollout).__name__, "values": values} if is_plain else None


def _from_plain(plain: dict[str, Any], on: device) -> Rollout:
    values = {name: value.to(on) if isinstance(value, Tensor) else value for name, value in plain["values"].items()}
    return next(kind for kind in _kinds(Rollout) if kind.__name__ == plain["type"])(**values)


def _kinds(kind: type[Rollout]) -> Iterator[type[Rollout]]:
    """A kind of rollout and those derived from it."""
    yield kind
    for each in kind.__subclasses__():
        yield from _kinds(each)
