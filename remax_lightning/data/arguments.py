"""What the data modules refuse before they read anything."""

import math
from collections.abc import Mapping
from typing import Any


def check_arguments(values: Mapping[str, Any]) -> None:
    """Raise a `ValueError` that names an argument which is out of its range or does not go with another.

    Args:
        values: Arguments of a data module by name, `train` and `validation` among them.
    """
    for name in ("batch_size", "eval_batch_size", "max_prompt_length", "limit", "shuffle_window"):
        if values[name] is not None and values[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {values[name]}")
    if not 0 <= values["validation_fraction"] < 1:
        raise ValueError(f"validation_fraction must be in [0, 1), got {values['validation_fraction']}")
    for name in ("seed", "skip_bad_rows"):
        if values[name] < 0:
            raise ValueError(f"{name} must not be negative, got {values[name]}")
    if values["weights"] is not None:
        _check_weights(values["weights"], values["train"])
    if values["streaming"]:
        _check_streaming(values)


def _check_weights(weights: list[float], train: object) -> None:
    num_sources = len(train) if isinstance(train, list) else 1
    if len(weights) != num_sources:
        raise ValueError(
            f"weights must have one number for each source of train, got {len(weights)} for {num_sources}; "
            "give train as a list"
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights must be positive, got {weights}; leave out a source that is not to be used")


def _check_streaming(values: Mapping[str, Any]) -> None:
    if values["weights"] is not None:
        raise ValueError(
            "weights cannot be used with streaming, since the number of rows of each source has to be known; "
            "set streaming to false, or leave out weights to read the sources one after another"
        )
    if values["validation_fraction"] > 0 and values["validation"] is None:
        raise ValueError(
            f"validation_fraction={values['validation_fraction']} cannot be used with streaming, since the rows are "
            "drawn from all; give the rows of validation, or set streaming to false"
        )


def check_lengths(max_prompt_length: int, max_length: int) -> None:
    """Raise a `ValueError` if the limits leave no room for a response."""
    if max_length <= max_prompt_length:
        raise ValueError(
            f"max_length must exceed max_prompt_length to leave room for a response, got {max_length} and "
            f"{max_prompt_length}; raise max_length or lower max_prompt_length"
        )


def check_sizes(sizes: list[int], sources: list[str] | str) -> None:
    """Raise a `ValueError` if a weighted source has no row that can be used."""
    if 0 in sizes:
        source = sources if isinstance(sources, str) else sources[sizes.index(0)]
        raise ValueError(
            f"train: no row of {source} can be used (a limit takes rows of the first sources first); "
            "leave it out of train and weights"
        )
