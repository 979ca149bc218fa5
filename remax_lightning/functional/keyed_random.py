"""Random numbers as a pure function of what they are for, with no generator state.

A row's key comes from (seed, step, prompt, sample), a uniform from (key, position). A rollout is then the same in any
batch order, on any number of ranks, before and after a resume; and its random numbers are the same on CPU and GPU,
since they take 64-bit integer arithmetic only. Products wrap modulo 2**64.

The generator is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), which can jump
to any index of its stream. Not for cryptography.
"""

import os

import torch
from torch import Tensor


def run_seed(seed: int | None) -> int:
    """The seed itself, or where it is None that of ``seed_everything``; 0 without one.

    Args:
        seed: Seed of a part of the run, such as the order of the data.

    Example:
        >>> run_seed(7)
        7
    """
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed


def row_keys(seed: int, step: int, prompt_index: Tensor, sample_index: Tensor) -> Tensor:
    """Key of each row's random stream.

    Each of the four numbers picks an output of the stream that the ones before it seeded, so (seed 1, step 0) and
    (seed 0, step 1) do not meet as they would in a sum.

    Args:
        seed: Seed of the run, any integer; taken modulo 2**64.
        step: Training step of the rollout.
        prompt_index: Stable id of each row's prompt, (R,) long.
        sample_index: Which of the prompt's samples the row is, (R,) long.

    Returns:
        Keys, (R,) long, any sign.
    """
    keys = torch.zeros_like(prompt_index, dtype=torch.long)
    for number in (seed, step, prompt_index, sample_index):
        keys = _splitmix64(keys, number)
    return keys


def keyed_uniforms(keys: Tensor, position: Tensor | int) -> Tensor:
    """One uniform number for each row.

    Args:
        keys: Keys from `row_keys`, (R,) long.
        position: Index of the response token that the number is for, (R,) long, or one integer for all rows.

    Returns:
        Odd multiples of 2**-24 in the open interval (0, 1), (R,) float32: exact, never 0 and never 1.
    """
    top_bits = _shift_right(_splitmix64(keys, position), 41)  # 23 bits
    return (top_bits.to(torch.float32) + 0.5) * 2.0**-23


def _splitmix64(seeds: Tensor, index: Tensor | int) -> Tensor:
    """Output number `index`, from 0, of the SplitMix64 stream of each seed, (R,) long."""
    if isinstance(index, int):
        index = torch.tensor(_to_int64(index))
    bits = seeds + (index.long() + 1) * _GOLDEN_RATIO
    bits = (bits ^ _shift_right(bits, 30)) * _FIRST_FACTOR
    bits = (bits ^ _shift_right(bits, 27)) * _SECOND_FACTOR
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift: torch's own copies the sign bit into the gap."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _to_int64(number: int) -> int:
    """The signed integer with the same lowest 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


_GOLDEN_RATIO = _to_int64(0x9E3779B97F4A7C15)
_FIRST_FACTOR = _to_int64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = _to_int64(0x94D049BB133111EB)
