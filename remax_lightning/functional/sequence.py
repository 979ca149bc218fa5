"""Lengths, masks, positions and padding of token sequences.

Masks come from lengths and stop tokens, never from `ids != pad_token_id`: a tokenizer may use one id for padding and
for the end of the text, and a policy may emit it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def length_mask(lengths: Tensor, max_length: int) -> Tensor:
    """Mask of the first `lengths[b]` positions of each row.

    Args:
        lengths: Number of tokens in each row, (B,).
        max_length: Width of the mask, in tokens.

    Returns:
        True where the position is below the row's length, (B, max_length) bool.

    Example:
        >>> length_mask(torch.tensor([1, 3]), 3).tolist()
        [[True, False, False], [True, True, True]]
    """
    return torch.arange(max_length, device=lengths.device) < lengths.unsqueeze(-1)


def response_lengths(tokens: Tensor, stop_token_ids: Sequence[int]) -> Tensor:
    """Number of tokens up to and including the first stop token.

    Args:
        tokens: Response tokens, (B, T).
        stop_token_ids: Ids that end a response; may be empty.

    Returns:
        Lengths in tokens, (B,) long; T where no stop token occurs.

    Example:
        >>> response_lengths(torch.tensor([[5, 2, 2], [5, 6, 7]]), stop_token_ids=[2]).tolist()
        [2, 3]
    """
    stop_ids = torch.tensor(list(stop_token_ids), dtype=tokens.dtype, device=tokens.device)
    is_stop = torch.isin(tokens, stop_ids).long()  # (B, T)
    stops_before = is_stop.cumsum(-1) - is_stop
    return (stops_before == 0).sum(-1)


def left_pad(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Stack rows of different lengths so that they end together; the layout of prompts before generation.

    Args:
        rows: Token ids of each of the B rows.
        pad_token_id: Id written in front of the shorter rows.

    Returns:
        ids (B, L) long and mask (B, L) bool, True at the row's own tokens; L is the longest row's length.
    """
    return _pad(rows, pad_token_id, on_the_left=True)


def right_pad(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Stack rows of different lengths so that they start together.

    Args:
        rows: Token ids of each of the B rows.
        pad_token_id: Id written after the shorter rows.

    Returns:
        ids (B, L) long and mask (B, L) bool, True at the row's own tokens; L is the longest row's length.
    """
    return _pad(rows, pad_token_id, on_the_left=False)


def _pad(rows: Sequence[Sequence[int]], pad_token_id: int, *, on_the_left: bool) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    mask = length_mask(lengths, max(map(len, rows), default=0))
    if on_the_left:
        mask = mask.flip(-1)
    ids = torch.full(mask.shape, pad_token_id, dtype=torch.long)
    ids[mask] = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    return ids, mask


def align_left(values: Tensor, mask: Tensor) -> Tensor:
    """Move the entries where the mask is True to the front of their rows, in their order.

    Args:
        values: One value per position, (B, L); False or 0 is written behind the entries.
        mask: True at the entries to keep, (B, L) bool.

    Returns:
        (B, most entries of a row), the dtype of the values.

    Example:
        >>> mask = torch.tensor([[False, True, False, True], [True, False, False, False]])
        >>> align_left(torch.tensor([[9, 5, 9, 6], [7, 9, 9, 9]]), mask).tolist()
        [[5, 6], [7, 0]]
    """
    lengths = mask.sum(-1)
    kept = length_mask(lengths, int(lengths.max()))
    aligned = values.new_zeros(kept.shape)
    aligned[kept] = values[mask]
    return aligned


def position_ids(mask: Tensor) -> Tensor:
    """Position of each token among the real tokens of its row.

    Args:
        mask: True at real tokens, (B, L) bool.

    Returns:
        Positions from 0, (B, L) long; 0 on leading padding, the last position again on trailing padding.

    Example:
        >>> position_ids(torch.tensor([[False, False, True, True]])).tolist()
        [[0, 0, 0, 1]]
    """
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def last_token_index(mask: Tensor) -> Tensor:
    """Index of the last real token of each row, whichever side the padding is on.

    Args:
        mask: True at real tokens, (B, L) bool with L >= 1.

    Returns:
        Indices, (B,) long; 0 for a row without a real token.
    """
    return (torch.arange(mask.shape[-1], device=mask.device) * mask).amax(-1)
