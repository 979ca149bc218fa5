"""The uncertainty of a win rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

NORMAL_QUANTILE = 1.959963984540054  # of 0.975: a two-sided 95 % interval


@dataclass(frozen=True)
class WinRate:
    """A win rate with its 95 % Wilson score interval.

    Attributes:
        rate: Mean of the wins, in [0, 1].
        low: Lower end of the interval.
        high: Upper end of the interval.
        num_comparisons: Number of wins, losses and ties.
    """

    rate: float
    low: float
    high: float
    num_comparisons: int


def win_rate(wins: Sequence[float]) -> WinRate:
    """Mean of wins and its interval.

    Args:
        wins: 1 for a win, 0 for a loss, 0.5 for a tie; NaN, where there was no comparison, is left out.

    Raises:
        ValueError: If nothing was compared.

    Example:
        >>> win_rate([1.0, 0.5, 0.0, 1.0, float("nan")]).rate
        0.625

    Reference: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    compared = [win for win in wins if not math.isnan(win)]
    if not compared:
        raise ValueError(f"a win rate needs a comparison, and none of {len(wins)} rows has one; check the rewards")
    rate, count, z = sum(compared) / len(compared), len(compared), NORMAL_QUANTILE
    scale = 1 + z**2 / count
    centre = (rate + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return WinRate(rate, max(centre - half, 0.0), min(centre + half, 1.0), count)
