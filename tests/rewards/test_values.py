"""What a reward may return: what is plain is taken, the rest is refused by one sentence."""

import itertools
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy
import pandas
import pytest
import torch

from remax_lightning.rewards.values import reward_values


def infinite() -> Any:
    return itertools.count()


@pytest.mark.parametrize(
    "returned",
    [
        torch.tensor([0.5, 2.0]),
        torch.tensor([0.5, 2.0], dtype=torch.float64),
        torch.tensor([0.5, 2.0], dtype=torch.bfloat16),
        torch.tensor([0.5, 2.0], requires_grad=True),
        torch.tensor([[0.5], [2.0]]),
        numpy.array([0.5, 2.0]),
        numpy.array([[0.5], [2.0]], dtype=numpy.float16),
        numpy.array([0.5, 2.0], dtype=object),
        pandas.Series([0.5, 2.0]),
        [0.5, 2],
        (0.5, 2.0),
        (value for value in (0.5, 2.0)),
        {"a": 0.5, "b": 2.0}.values(),
        [Fraction(1, 2), Decimal(2)],
        [torch.tensor(0.5), torch.tensor([2.0])],
        [numpy.float32(0.5), numpy.int64(2)],
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_of_any_kind_are_taken(returned: object) -> None:
    values = reward_values(returned, 2, "worth")
    assert values.tolist() == [0.5, 2.0]
    assert (values.dtype, values.requires_grad) == (torch.float64, False)


@pytest.mark.parametrize(
    "returned",
    [torch.tensor([True, False]), [True, False], numpy.array([1, 0])],
    ids=lambda value: type(value).__name__,
)
def test_a_truth_is_one_or_zero(returned: object) -> None:
    assert reward_values(returned, 2, "worth").tolist() == [1.0, 0.0]


def test_a_tensor_of_inference_mode_can_be_used_in_training() -> None:
    with torch.inference_mode():
        returned = torch.tensor([1.0, 2.0], dtype=torch.float64)
    values = reward_values(returned, 2, "worth")
    assert not values.is_inference()
    (torch.ones(2, dtype=torch.float64, requires_grad=True) * values).sum().backward()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "worth must return a list of 2 numbers, got NoneType"),
        (0.5, "worth must return a list of 2 numbers, got float"),
        ("12", "worth must return a list of 2 numbers, got str"),
        (b"12", "worth must return a list of 2 numbers, got bytes"),
        ({1: "a", 2: "b"}, "worth must return a list of 2 numbers, got dict"),
        ({1: "a", 2: "b"}.keys(), "worth must return a list of 2 numbers, got dict_keys"),
        ({1.0, 2.0}, "worth must return a list of 2 numbers, got set"),
        (torch.tensor(0.5), r"one reward a response: 2, got the shape \(\)"),
        (numpy.float64(0.5), r"one reward a response: 2, got the shape \(\)"),
        (torch.zeros(3), "one reward a response: 2, got 3"),
        (torch.zeros(1), "one reward a response: 2, got 1"),
        (torch.zeros(1, 2), r"one reward a response: 2, got the shape \(1, 2\)"),
        (torch.zeros(2, 2), r"one reward a response: 2, got the shape \(2, 2\)"),
        (numpy.zeros((2, 3)), r"one reward a response: 2, got the shape \(2, 3\)"),
        (pandas.DataFrame({0: [0.5, 2.0], 1: [1.0, 1.0]}), r"one reward a response: 2, got the shape \(2, 2\)"),
        (torch.zeros(2, dtype=torch.complex64), "a number for each response, got torch.complex64"),
        ([1.0, 2.0, 3.0], "one reward a response: 2, got 3"),
        ([1.0], "one reward a response: 2, got 1"),
        (infinite(), "one reward a response: 2, got more"),
        (["1", "0"], "a number for each response, got a str"),
        ([[1.0], [2.0]], "a number for each response, got a list"),
        ([None, {"score": 1}], "a number for each response, got a dict"),
        ([torch.zeros(2), torch.zeros(2)], "a number for each response, got a Tensor"),
        ([1j, 2j], "a number for each response, got a complex"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_one_number_for_each_response_is_refused(returned: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward_values(returned, 2, "worth")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, math.nan),
        ("7", math.nan),
        ("seven", math.nan),
        ([7.0], math.nan),
        (torch.zeros(2), math.nan),
        (Decimal("sNaN"), math.nan),
        (10**400, math.inf),
        (-math.inf, -math.inf),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_row_without_a_number_costs_no_other_row(value: object, expected: float) -> None:
    first, second = reward_values([value, 2.0], 2, "worth").tolist()
    assert second == 2.0
    assert first == expected or (math.isnan(first) and math.isnan(expected))


def test_no_number_at_all_is_no_error_where_the_reward_says_so() -> None:
    assert reward_values([None, math.nan], 2, "worth").isnan().all()
