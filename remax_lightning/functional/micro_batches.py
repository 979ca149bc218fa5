"""Rows of a batch in groups that fit in memory."""

from torch import Tensor


def micro_batches(lengths: Tensor, *, size: int | None = None, tokens: int | None = None) -> list[Tensor]:
    """Split a batch into groups of rows of similar length, the longest rows first.

    Args:
        lengths: Tokens of each row, (B,).
        size: Most rows of a group; None sets no limit.
        tokens: Most tokens of a group, padding included; a longer row is a group of its own. None sets no limit.

    Returns:
        Row indices of each group; every row is in one of them.

    Example:
        >>> import torch
        >>> micro_batches(torch.tensor([3, 9, 4]), tokens=9)
        [tensor([1]), tensor([2, 0])]
    """
    order = lengths.argsort(descending=True, stable=True)
    size = len(order) if size is None else size
    if tokens is None:
        return list(order.split(size))
    groups = []
    while len(order) > 0:
        fitting = tokens // max(int(lengths[order[0]]), 1)
        groups.append(order[: max(min(size, fitting), 1)])
        order = order[len(groups[-1]) :]
    return groups
