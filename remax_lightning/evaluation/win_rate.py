"""How often one model's responses score above another's, with its uncertainty."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

NORMAL_QUANTILE = 1.959963984540054  # of 0.975: a two-sided 95 % interval


@dataclass(frozen=True)
class WinRate:
    """A win rate with its 95 % interval.

    Attributes:
        rate: Share of comparisons won, a tie as one half, in [0, 1].
        low: Lower end of the Wilson score interval.
        high: Upper end of the Wilson score interval.
        num_comparisons: Pairs compared.
    """

    rate: float
    low: float
    high: float
    num_comparisons: int


def win_rate(scores: Sequence[float], reference_scores: Sequence[float]) -> WinRate:
    """Share of pairs in which the score is above the reference score.

    Ties count one half; pairs with a score that is not finite are left out.

    Args:
        scores: Score of each response.
        reference_scores: Score of the reference's response to the same prompt.

    Returns:
        The rate and its 95 % Wilson score interval.

    Raises:
        ValueError: If the lengths differ or no pair of finite scores is left.

    Example:
        >>> win_rate([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 1.0]).rate
        0.625

    Reference: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    if len(scores) != len(reference_scores):
        raise ValueError(
            f"win_rate needs one reference score for each score; it got {len(scores)} scores and "
            f"{len(reference_scores)} reference scores. Score the same prompts with both models."
        )
    pairs = [
        (score, reference)
        for score, reference in zip(scores, reference_scores, strict=True)
        if math.isfinite(score) and math.isfinite(reference)
    ]
    if not pairs:
        raise ValueError(
            f"win_rate needs a pair of finite scores; none of the {len(scores)} pairs is finite. "
            "Check the reward that produced them."
        )
    wins = sum(1.0 if score > reference else 0.5 * (score == reference) for score, reference in pairs)
    rate = wins / len(pairs)
    low, high = _wilson_interval(rate, len(pairs))
    return WinRate(rate, low, high, len(pairs))


def _wilson_interval(rate: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share of `count` trials."""
    z = NORMAL_QUANTILE
    scale = 1 + z**2 / count
    centre = (rate + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)
