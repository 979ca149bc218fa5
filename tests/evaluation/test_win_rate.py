import math
import random

import pytest

from remax_lightning.evaluation.win_rate import win_rate


# statsmodels.stats.proportion.proportion_confint(k, n, method="wilson"), and Newcombe 1998, table I, method 3
@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_interval_has_published_values(wins: int, count: int, low: float, high: float) -> None:
    result = win_rate([1.0] * wins + [0.0] * (count - wins))
    assert result.rate == pytest.approx(wins / count)
    assert result.low == pytest.approx(low, abs=6e-5)
    assert result.high == pytest.approx(high, abs=6e-5)
    assert result.num_comparisons == count


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_interval_covers_the_true_rate(rate: float) -> None:
    rng = random.Random(0)
    covered = 0
    for _ in range(2000):
        result = win_rate([float(rng.random() < rate) for _ in range(100)])
        covered += result.low <= rate <= result.high
    assert 0.93 < covered / 2000 < 0.97


def test_ties_count_one_half() -> None:
    assert win_rate([0.5, 0.5]).rate == 0.5
    assert win_rate([0.5, 1.0, 0.0, 1.0]).rate == 0.625


def test_swapped_models_mirror_the_interval() -> None:
    wins = [0.0, 1.0, 1.0, 0.5, 1.0]
    ahead, behind = win_rate(wins), win_rate([1 - win for win in wins])
    assert ahead.rate == pytest.approx(1 - behind.rate)
    assert ahead.low == pytest.approx(1 - behind.high)


def test_rows_without_a_comparison_are_left_out() -> None:
    result = win_rate([1.0, math.nan, math.nan])
    assert (result.rate, result.num_comparisons) == (1.0, 1)


@pytest.mark.parametrize(("wins", "count"), [([], 0), ([math.nan], 1)])
def test_no_comparison_is_an_error(wins: list[float], count: int) -> None:
    with pytest.raises(ValueError, match=f"none of {count} rows has one"):
        win_rate(wins)
