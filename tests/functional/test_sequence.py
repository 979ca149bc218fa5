import pytest
import torch

from remax_lightning.functional import (
    align_left,
    last_token_index,
    left_pad,
    length_mask,
    position_ids,
    response_lengths,
    right_pad,
)

ROWS = [[7, 8, 9], [0], [], [5, 0, 0, 5]]  # 0 is a real token here, and the padding


@pytest.mark.parametrize("pad", [left_pad, right_pad])
def test_padding_loses_no_token_and_adds_none(pad):
    ids, mask = pad(ROWS, pad_token_id=0)
    assert ids.shape == mask.shape == (4, 4)
    assert ids.dtype == torch.long
    assert mask.dtype == torch.bool
    assert [row_ids[row_mask].tolist() for row_ids, row_mask in zip(ids, mask, strict=True)] == ROWS
    assert pad(ROWS, pad_token_id=-1)[0][~mask].eq(-1).all()


def test_left_padded_rows_end_together_and_right_padded_rows_start_together():
    assert left_pad([[1], [2, 3]], 0)[0].tolist() == [[0, 1], [2, 3]]
    assert right_pad([[1], [2, 3]], 0)[0].tolist() == [[1, 0], [2, 3]]


def test_padding_no_rows_gives_an_empty_batch():
    ids, mask = left_pad([], 0)
    assert ids.shape == mask.shape == (0, 0)


def test_length_mask_has_each_rows_length_and_no_gap():
    lengths = torch.tensor([0, 1, 3, 5])
    mask = length_mask(lengths, 5)
    assert mask.dtype == torch.bool
    assert mask.sum(-1).tolist() == lengths.tolist()
    assert (mask[:, 1:] <= mask[:, :-1]).all()


@pytest.mark.parametrize(
    ("row", "stops", "length"),
    [
        ([5, 6, 2, 7], [2], 3),
        ([2, 2, 2, 2], [2], 1),
        ([5, 6, 7, 2], [2], 4),
        ([5, 6, 7, 8], [2], 4),
        ([5, 3, 2, 8], [2, 3], 2),
        ([5, 2, 3, 8], [], 4),
    ],
)
def test_a_response_ends_with_its_first_stop_token(row, stops, length):
    assert response_lengths(torch.tensor([row]), stops).tolist() == [length]


def test_what_follows_the_stop_token_does_not_matter():
    tokens = torch.randint(0, 5, (200, 8), generator=torch.Generator().manual_seed(0))
    lengths = response_lengths(tokens, [1, 3])
    for filler in (0, 1, 3):
        assert torch.equal(response_lengths(tokens.where(length_mask(lengths, 8), filler), [1, 3]), lengths)
    assert 1 < lengths.float().mean() < 8


def test_positions_of_real_tokens_do_not_depend_on_the_padding():
    for pad in (left_pad, right_pad):
        _, mask = pad(ROWS, 0)
        positions = position_ids(mask)
        assert [p[m].tolist() for p, m in zip(positions, mask, strict=True)] == [list(range(len(r))) for r in ROWS]
    assert position_ids(left_pad(ROWS, 0)[1])[1].tolist() == [0, 0, 0, 0]
    assert positions.min() == 0


def test_aligning_keeps_each_rows_entries_in_their_order():
    prompts, responses = left_pad(ROWS, 3), right_pad(ROWS[::-1], 4)
    ids, mask = (torch.cat(pair, dim=1) for pair in zip(prompts, responses, strict=True))
    whole = [first + second for first, second in zip(ROWS, ROWS[::-1], strict=True)]
    expected, kept = right_pad(whole, 0)
    assert torch.equal(align_left(ids, mask), expected)
    assert torch.equal(align_left(mask, mask), kept)


def test_the_last_token_is_found_on_either_side():
    for pad in (left_pad, right_pad):
        ids, mask = pad([[1, 2, 9], [9], [3, 9]], 0)
        index = last_token_index(mask)
        assert ids.gather(1, index[:, None]).flatten().tolist() == [9, 9, 9]
    assert index.tolist() == [2, 0, 1]
    assert last_token_index(torch.zeros(1, 3, dtype=torch.bool)).tolist() == [0]
