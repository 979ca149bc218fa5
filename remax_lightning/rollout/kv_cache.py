"""A key-value cache that is allocated once and hands out views of its filled part."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _PreallocatedLayer(CacheLayerMixin):
    """Keys and values of one layer, (rows, heads, max_length, head size)."""

    is_sliding = False

    def __init__(self, num_rows: int, max_length: int) -> None:
        super().__init__()
        self.num_rows, self.max_length = num_rows, max_length
        self.length = 0
        self.position: Tensor | None = None  # of the next token, (1,); None until the cache is static

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        for name, states in (("keys", key_states), ("values", value_states)):
            _, heads, _, size = states.shape
            setattr(self, name, states.new_zeros(self.num_rows, heads, self.max_length, size))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        rows = key_states.shape[0]
        if self.position is not None:
            self.keys[:rows].index_copy_(2, self.position, key_states)
            self.values[:rows].index_copy_(2, self.position, value_states)
            return self.keys[:rows], self.values[:rows]
        start, end = self.length, self.length + key_states.shape[2]
        self.keys[:rows, :, start:end] = key_states
        self.values[:rows, :, start:end] = value_states
        self.length = end
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.length + query_length if self.position is None else self.max_length), 0

    def get_seq_length(self) -> int:
        # a static cache of transformers answers with a tensor, so that a compiled step does not depend on the number
        return self.length if self.position is None else self.position[0]  # type: ignore[return-value]

    def get_max_length(self) -> int:
        return self.max_length


class PreallocatedCache(Cache):
    """Key-value cache for rows that start from shared prompts and leave one by one.

    Args:
        num_layers: Layers of the model.
        num_rows: The most rows that will be decoded together.
        max_length: Longest sequence, prompt and response, in tokens.
    """

    def __init__(self, num_layers: int, num_rows: int, max_length: int) -> None:
        self.attention_layers = [_PreallocatedLayer(num_rows, max_length) for _ in range(num_layers)]
        super().__init__(layers=list(self.attention_layers))
        self.max_length = max_length

    def reset(self) -> None:
        """Empty, to be filled from the first column.

        What is masked counts 0 times, and 0 times a NaN of an earlier rollout would be NaN.
        """
        for layer in self.attention_layers:
            for states in (layer.keys, layer.values):
                if states is not None:
                    states.zero_()
            layer.length, layer.position, layer.is_compileable = 0, None, False

    def make_static(self) -> None:
        """From here on the rows are handed out whole, and where they are filled is a tensor, not a number.

        So every decoding step has the same shapes and addresses, as a compiled one needs; what is not filled yet has
        to be masked.
        """
        keys = self.attention_layers[0].keys
        assert keys is not None
        self.position = torch.tensor([self.attention_layers[0].length], device=keys.device)
        for layer in self.attention_layers:
            layer.position, layer.is_compileable = self.position, True
            for tensor in (layer.keys, layer.values, self.position):
                if tensor is not None:  # a layer that shares another's keys and values
                    torch._dynamo.mark_static_address(tensor)

    def advance(self) -> None:
        """One more column is filled."""
        self.position += 1
        for layer in self.attention_layers:
            layer.length += 1

    def copy_rows(self, source: Tensor, target: Tensor) -> None:
        """Overwrite the target rows with the source rows, up to the filled length."""
        if source.numel() == 0:
            return
        for layer in self.attention_layers:
            for states in (layer.keys, layer.values):
                if states is None:  # a layer that shares another's keys and values
                    continue
                filled = states[:, :, : layer.length]
                filled.index_copy_(0, target, filled.index_select(0, source))


def compaction(kept: Tensor, greedy: Tensor) -> tuple[Tensor, Tensor]:
    """Moves that close the gaps after rows have finished: sampled rows first, greedy rows behind them.

    A row that already stands in its part stays, so at most two rows move for each row that left.

    Args:
        kept: True at slots whose row goes on, (N,).
        greedy: True at slots whose row is greedy, (N,).

    Returns:
        Slots to copy from and slots to copy to, of equal length.
    """
    slot = torch.arange(len(kept), device=kept.device)
    num_sampled, num_kept = (kept & ~greedy).sum(), kept.sum()
    source, target = [], []
    for member, part in (
        (kept & ~greedy, slot < num_sampled),
        (kept & greedy, (slot >= num_sampled) & (slot < num_kept)),
    ):
        source.append((member & ~part).nonzero()[:, 0])
        target.append((part & ~member).nonzero()[:, 0])
    return torch.cat(source), torch.cat(target)
