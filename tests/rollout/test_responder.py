"""What a batch is made of."""

from typing import Any

import pytest
import torch

from remax_lightning.rollout.responder import first_rows, raw_columns

BATCH: dict[str, Any] = {"prompt_ids": torch.ones(3, 2), "prompt": ["a", "b", "c"], "answer": (1, 2, 3)}


def test_columns_are_what_is_no_tensor() -> None:
    assert raw_columns(BATCH) == {"prompt": ["a", "b", "c"], "answer": (1, 2, 3)}


def test_first_rows_of_everything() -> None:
    first = first_rows(BATCH, 2)
    assert first["prompt_ids"].shape == (2, 2)
    assert raw_columns(first) == {"prompt": ["a", "b"], "answer": (1, 2)}


@pytest.mark.parametrize("value", [object(), 3, None, "abc", {"a": 1}])
def test_what_has_no_rows_is_named(value: object) -> None:
    for read in (raw_columns, lambda batch: first_rows(batch, 2)):
        with pytest.raises(
            TypeError, match=f"a list for each column of the data; extra is of type {type(value).__name__}"
        ):
            read({**BATCH, "extra": value})
