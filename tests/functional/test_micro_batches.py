"""Rows of a batch in groups that fit in memory."""

import torch

from remax_lightning.functional.micro_batches import micro_batches


def test_sizes_and_tokens() -> None:
    lengths = torch.tensor([3, 9, 4, 4, 1, 20])
    groups = micro_batches(lengths, size=3, tokens=12)
    assert sorted(torch.cat(groups).tolist()) == list(range(6))
    for group in groups:
        assert len(group) <= 3
        assert len(group) == 1 or len(group) * int(lengths[group].max()) <= 12
    assert [lengths[group].tolist() for group in groups] == [[20], [9], [4, 4, 3], [1]]
    assert len(micro_batches(lengths)) == 1


def test_the_longest_rows_come_first() -> None:
    """So a batch that does not fit in memory fails at once, and a group has rows of similar length."""
    lengths = torch.tensor([3, 9, 4, 5, 1, 20])
    for options in ({"size": 2}, {"tokens": 10}, {"size": 2, "tokens": 100}, {}):
        order = lengths[torch.cat(micro_batches(lengths, **options))]
        assert order.tolist() == [20, 9, 5, 4, 3, 1]


def test_a_group_takes_all_rows_that_fit() -> None:
    assert [len(group) for group in micro_batches(torch.tensor([4, 4, 4]), tokens=8)] == [2, 1]
    assert [len(group) for group in micro_batches(torch.tensor([4, 4, 4]), tokens=7)] == [1, 1, 1]
    assert [len(group) for group in micro_batches(torch.tensor([0, 0]), tokens=1)] == [1, 1]
    assert [len(group) for group in micro_batches(torch.tensor([4, 4, 4]), size=3)] == [3]
