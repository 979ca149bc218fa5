"""Rows as JSON, whatever values the columns of the data have."""

import base64
import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import date, datetime, time
from typing import Any

import numpy as np

ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that are written as escapes: some programs end a line at U+0085, U+2028 or U+2029, a terminal obeys the
other control characters, and a lone surrogate is no text in UTF-8."""

LARGEST = 8192
"""Bits of an integer that is written as a number; Python refuses to write much larger ones in decimal digits."""


def json_line(row: Mapping[str, Any]) -> str:
    r"""A row as one line of JSON, whatever its values are; without the line break.

    Timestamps become ISO 8601, bytes base64, and what else JSON has no form for the text that ``print`` shows. A number
    that is not finite becomes null.

    Example:
        >>> json_line({"prompt": "Café", "score": float("nan"), "day": date(2024, 5, 1), "raw": b"\x00\x01"})
        '{"prompt": "Café", "score": null, "day": "2024-05-01", "raw": "AAE="}'
    """
    text = json.dumps(plain(row), ensure_ascii=False, allow_nan=False)
    return ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def plain(value: object, other: Callable[[object], str] = str) -> Any:
    """A value of nothing but what JSON has.

    Args:
        value: Anything.
        other: From a value that JSON has no form for to a text.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value) if value.bit_length() <= LARGEST else hex(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): plain(each, other) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, other) for each in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(each, other) for each in value), key=repr)
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist(), other)
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode()
    return other(value)
