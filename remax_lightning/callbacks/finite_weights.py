"""Weights that are not finite, which no run can go on from."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class NonFiniteWeights(RuntimeError):
    """The weights after a step are not finite.

    Args:
        name: The first such parameter.
        step: Optimizer steps taken.
        newest: The newest checkpoint, whose weights are finite; None if there is none.
    """

    def __init__(self, name: str, step: int, newest: Path | None) -> None:
        go_on = "start again" if newest is None else f"resume from {newest}, the newest checkpoint,"
        super().__init__(
            f"the weights after step {step} are not finite (the first parameter is {name}) and are not saved; {go_on} "
            "with a lower learning rate"
        )


def non_finite(module: nn.Module) -> str | None:
    """Name of the first trained parameter of which a value, in this rank's shard, is infinite or NaN; None if all are.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> non_finite(layer) is None
        True
        >>> _ = nn.init.constant_(layer.bias, torch.inf)
        >>> non_finite(layer)
        'bias'
    """
    trained = [(name, value.detach()) for name, value in module.named_parameters() if value.requires_grad]
    if not trained:
        return None
    is_finite = torch.stack([_local(value).isfinite().all() for _, value in trained])  # read once, not for each
    return next((name for (name, _), fine in zip(trained, is_finite.tolist(), strict=True) if not fine), None)


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
