"""Rows as JSON, whatever their values are."""

import datetime
import json
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from remax_lightning.rollout.plain_rows import json_line


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def read(line: str) -> Any:
    """As a strict reader does."""
    assert line.encode("utf-8").decode("utf-8").splitlines() == [line]
    return json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize(
    "text", ["a\u2028b\u2029c\u0085d", "\x1b[2J\x9b2J\x7f", "Grüße, 世界 \U0001f600", 'a "b"\n\\u2028']
)
def test_texts_come_back(text: str) -> None:
    assert read(json_line({"prompt": text, text: [text]})) == {"prompt": text, text: [text]}
    assert not {"\u2028", "\u0085", "\x1b", "\x9b", "\x7f"} & set(json_line({"prompt": text}))


def test_letters_are_written_as_they_are() -> None:
    assert json_line({"prompt": "Grüße, 世界 \U0001f600"}) == '{"prompt": "Grüße, 世界 \U0001f600"}'


def test_a_lone_surrogate_comes_back() -> None:
    assert read(json_line({"title": "cut \ud83d", "\udc00": 1})) == {"title": "cut \ud83d", "\udc00": 1}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), None),
        ([1.5, float("inf"), {"a": -float("inf")}], [1.5, None, {"a": None}]),
        (10**400, 10**400),
        (np.float32(0.5), 0.5),
        (np.array([1, 2]), [1, 2]),
        ((1, True, None), [1, True, None]),
        ({3, 1}, [1, 3]),
        ({1: "a", None: "b"}, {"1": "a", "None": "b"}),
        (datetime.datetime(2024, 5, 1, 12, 30), "2024-05-01T12:30:00"),
        (datetime.date(2024, 5, 1), "2024-05-01"),
        (datetime.timedelta(seconds=90), "0:01:30"),
        (Decimal("1.50"), "1.50"),
        (b"\x00\xff", "AP8="),
    ],
)
def test_values_that_json_lacks(value: object, expected: object) -> None:
    assert read(json_line({"value": value})) == {"value": expected}


def test_a_number_too_long_for_decimal_digits() -> None:
    assert read(json_line({"value": 16**5000})) == {"value": "0x1" + 5000 * "0"}
