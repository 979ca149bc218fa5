"""Several sources in given proportions."""

from collections import Counter

import numpy as np
import pytest
from data.helpers import ROWS, attach, dropped, indices, train_batches

from remax_lightning.data import PromptDataModule
from remax_lightning.data.order import mixed_rows, rows_per_epoch


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([20, 20], [1, 1], [20, 20]),
        ([20, 20], [0.75, 0.25], [30, 10]),
        ([90, 10], [1, 1], [50, 50]),
        ([4, 3, 3], [1, 1, 1], [4, 3, 3]),
        ([1, 1, 1], [5, 4, 1], [2, 1, 0]),
        ([7], [2], [7]),
    ],
)
def test_rows_per_epoch_are_the_shares_of_all_rows(sizes, weights, expected):
    assert rows_per_epoch(sizes, weights) == expected


def test_epochs_have_the_proportions_and_go_through_each_source_in_passes():
    sizes, weights = [30, 7, 11], [1, 3, 0.25]
    counts = rows_per_epoch(sizes, weights)
    assert counts == [11, 34, 3]
    epochs = [mixed_rows(epoch, sizes, weights, seed=1) for epoch in range(9)]
    bounds = [(0, 30), (30, 37), (37, 48)]
    seen = np.zeros(48, dtype=int)
    for epoch in epochs:
        assert [((epoch >= low) & (epoch < high)).sum() for low, high in bounds] == counts
        seen += np.bincount(epoch, minlength=48)
        for low, high in bounds:
            assert seen[low:high].max() - seen[low:high].min() <= 1
    assert not np.array_equal(epochs[0], epochs[1])


def test_order_is_a_function_of_seed_and_epoch():
    sizes, weights = [30, 7], [1, 3]
    assert np.array_equal(mixed_rows(4, sizes, weights, 2), mixed_rows(4, sizes, weights, 2))
    assert not np.array_equal(mixed_rows(4, sizes, weights, 2), mixed_rows(4, sizes, weights, 3))
    epoch = mixed_rows(0, [1000, 1000], [1, 1], 0)
    assert 400 < (epoch[:1000] < 1000).sum() < 600  # the sources are mixed, not one after the other


def test_weights_of_a_data_module_count_usable_rows(write):
    few = write([{"question": f"Say {number}", "answer": str(number)} for number in range(5)], "few.jsonl")
    many = write([{"prompt": ""}, *ROWS[:15]])
    data = PromptDataModule(train=[many, few], weights=[1, 3], batch_size=4)
    assert dropped(data) == ["train: dropped 1 of 21 rows (1 x empty prompt)"]
    for _ in range(3):
        batches = train_batches(data)
        assert [len(batch["prompt"]) for batch in batches] == [4] * 5
        assert Counter(index >= 16 for index in indices(batches)) == {False: 5, True: 15}
        for batch in batches:
            for index, prompt in zip(indices([batch]), batch["prompt"], strict=True):
                assert prompt == (f"Say {index - 16}" if index >= 16 else ROWS[index - 1]["prompt"])


def test_two_ranks_share_what_one_reads(write):
    arguments = {"train": [write(ROWS), write(ROWS[:5], "few.jsonl")], "weights": [1, 2]}
    alone = attach(PromptDataModule(batch_size=6, **arguments))
    ranks = [attach(PromptDataModule(batch_size=3, **arguments), rank, 2) for rank in (0, 1)]
    whole, first, second = (train_batches(data) for data in (alone, *ranks))
    assert [indices([batch])[::2] for batch in whole] == [indices([batch]) for batch in first]
    assert [indices([batch])[1::2] for batch in whole] == [indices([batch]) for batch in second]


def test_without_weights_each_row_comes_once(write):
    data = attach(PromptDataModule(train=[write(ROWS), write(ROWS[:4], "few.jsonl")], batch_size=4))
    assert sorted(indices(train_batches(data))) == list(range(24))


@pytest.mark.parametrize(
    ("train", "weights", "message"),
    [
        (["a.jsonl", "b.jsonl"], [1.0], "one number for each source of train, got 1 for 2"),
        ("a.jsonl", [1.0, 2.0], "got 2 for 1; give train as a list"),
        (["a.jsonl", "b.jsonl"], [1.0, 0.0], r"must be positive, got \[1.0, 0.0\]"),
        (["a.jsonl", "b.jsonl"], [1.0, float("nan")], "must be positive"),
    ],
)
def test_impossible_weights_are_refused(train, weights, message):
    with pytest.raises(ValueError, match=message):
        PromptDataModule(train=train, weights=weights)


def test_source_without_usable_rows_is_named(write):
    empty = write([{"prompt": " "}], "empty.jsonl")
    with pytest.raises(ValueError, match=r"train: no row of .*empty.jsonl.* can be used.*weights"):
        dropped(PromptDataModule(train=[write(ROWS), empty], weights=[1, 1]))
