"""The error of weights that are not finite, which no run can go on from."""

from pathlib import Path


class NonFiniteWeights(RuntimeError):
    """The weights after a step are not finite.

    Args:
        names: The first such parameters.
        step: Optimizer steps taken.
        newest: The newest checkpoint, whose weights are finite; None if there is none.
    """

    def __init__(self, names: str, step: int, newest: Path | None) -> None:
        go_on = "start again" if newest is None else f"resume from {newest}, the newest checkpoint,"
        super().__init__(
            f"the weights after step {step} are not finite ({names}) and are not saved; {go_on} "
            "with a lower learning rate"
        )
