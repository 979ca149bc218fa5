"""Rewards that the tests name by their import paths."""

import os
from collections.abc import Sequence

seen: list[dict[str, object]] = []


def letter_value(response: str) -> float:
    """A number that differs from one response to the next."""
    return sum((ord(letter) * 7919) % 13 for letter in response) / 10.0


def letter_values(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    return [letter_value(response) for response in responses]


def halves(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    return [0.5 * len(response) for response in responses]


def constant(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    return [1.0 for _ in responses]


def by_process(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    return [float(os.environ["RANK"])] * len(responses)


def share_of_e(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    return [response.count("e") / max(len(response), 1) for response in responses]


def with_gaps(prompts: Sequence[object], responses: Sequence[str], gap: Sequence[str]) -> list[float | None]:
    """As letter_values, but what the column says where it says something."""
    return [
        letter_value(response) if kind == "" else None if kind == "none" else float(kind)
        for response, kind in zip(responses, gap, strict=True)
    ]


def matches(prompts: Sequence[object], responses: Sequence[str], answer: Sequence[str]) -> list[float]:
    return [float(response == expected) for response, expected in zip(responses, answer, strict=True)]


def record_all(prompts: Sequence[object], responses: Sequence[str], **columns: Sequence[object]) -> list[float]:
    seen.append({"prompts": list(prompts), "responses": list(responses), **columns})
    return [0.0] * len(responses)


def some_none(prompts: Sequence[object], responses: Sequence[str]) -> list[float | None]:
    return [None if response == "" else 2.0 for response in responses]


def too_few(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    return [0.0] * (len(responses) - 1)


def without_prompts(responses: Sequence[str]) -> list[float]:
    return [0.0] * len(responses)


not_a_function = 3


def failing_on_rank_1(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    """Raises in one of two processes."""
    if os.environ.get("LOCAL_RANK") == "1":
        raise RuntimeError("only here")
    return [float(len(response)) for response in responses]
