"""What a reward returned, as numbers: one for each response, or an error that says what came instead."""

import math
from collections.abc import Iterable, Mapping, Set, Sized
from itertools import islice

import torch
from torch import Tensor

NO_LISTS = (str, bytes, bytearray, Mapping, Set)
"""What can be iterated over but is no list of rewards: text, keys, and what has no order."""


def reward_values(returned: object, count: int, name: str) -> Tensor:
    """Rewards as a reward or a function gave them, checked.

    A tensor or an array may have the shape (B,) or (B, 1), any real type and any device. Of a list or another sequence
    each value is a number, a boolean, or something with one value; None and what is no number become NaN, alone.

    Args:
        returned: What was returned.
        count: Number of responses, B.
        name: The reward, for messages.

    Returns:
        Rewards, (B,), float64, without gradient, on the CPU.

    Raises:
        ValueError: If there is not one for each response.
    """
    shape = getattr(returned, "shape", None)  # of a tensor, or of an array of any library
    if isinstance(shape, tuple):
        if shape not in ((count,), (count, 1)):
            got = shape[0] if len(shape) == 1 else f"the shape {tuple(shape)}"
            raise ValueError(f"{name} must return one reward a response: {count}, got {got}")
        if isinstance(returned, Tensor):
            if returned.is_complex():
                raise ValueError(f"{name} must return a number for each response, got {returned.dtype}")
            # a copy: the reward may go on using its tensor, or have made it in inference mode
            return returned.detach().flatten().cpu().to(torch.float64, copy=True)
        if len(shape) == 2:
            returned = returned[:, 0]  # type: ignore[index]
    return torch.tensor(numbers(as_list(returned, count, name), name), dtype=torch.float64, device="cpu")


def as_list(returned: object, count: int, name: str) -> list[object]:
    """The values of a sequence or another iterable in order, one for each response.

    Raises:
        ValueError: If it is none, or has another number of values.
    """
    if isinstance(returned, NO_LISTS) or not isinstance(returned, Iterable):
        raise ValueError(f"{name} must return a list of {count} numbers, got {type(returned).__name__}")
    values = list(islice(returned, count + 1))  # a generator may have no end
    if len(values) != count:
        got = len(returned) if isinstance(returned, Sized) else "more" if len(values) > count else len(values)
        raise ValueError(f"{name} must return one reward a response: {count}, got {got}")
    return values


def numbers(values: list[object], name: str) -> list[float]:
    """The values as numbers, NaN for what is none.

    Raises:
        ValueError: If none of them is a number, and not because they are None.
    """
    found = [number(value) for value in values]
    strangers = [value for value, each in zip(values, found, strict=True) if value is not None and each is None]
    if strangers and all(each is None for each in found):
        raise ValueError(f"{name} must return a number for each response, got a {type(strangers[0]).__name__}")
    return [math.nan if each is None else each for each in found]


def number(value: object) -> float | None:
    """A value as a number, infinite if it is too large for one; None if it is none. Digits in a text are no number."""
    if isinstance(value, str | bytes | bytearray):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf
    except (ArithmeticError, TypeError, ValueError, RuntimeError):  # the last of a tensor with several values
        return None
