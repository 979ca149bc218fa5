"""Tokens in, the logits of the next ones out: the model with its cache, as it decodes a shrinking batch of rows."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from remax_lightning.functional.sequence import position_ids
from remax_lightning.models.head import DecodingHead, plain_head, without_head
from remax_lightning.rollout.kv_cache import PreallocatedCache

Caches = dict[tuple[int, int, int], PreallocatedCache]
LENGTH_STEP = 128
"""Lengths of a compiled cache are multiples of this, so that few are compiled; 128 more columns cost a step little."""


class NextLogits:
    """Decodes the live rows, which stand in the first slots of the cache.

    Args:
        policy: Causal language model.
        prompt_ids: Left-padded prompts, (B, P).
        prompt_mask: True at prompt tokens, (B, P).
        num_rows: Rows to decode at first, R.
        max_new_tokens: Longest response.
    """

    def __init__(
        self, policy: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, num_rows: int, max_new_tokens: int
    ) -> None:
        self.policy, self.prompt_ids, self.prompt_mask = policy, prompt_ids, prompt_mask
        self.cache = self.make_cache(num_rows, prompt_ids.shape[1] + max_new_tokens)
        head = plain_head(policy)
        self.head = None if head is None else DecodingHead(head, num_rows)

    def make_cache(self, num_rows: int, length: int) -> PreallocatedCache:
        """An empty cache."""
        return PreallocatedCache(self.policy.config.get_text_config().num_hidden_layers, num_rows, length)

    def of_prompts(self, prompt: Tensor) -> Tensor:
        """Logits after the prompt of each row, (R, V)."""
        ones = self.prompt_mask.new_ones(len(self.prompt_mask), self.cache.max_length - self.prompt_mask.shape[1])
        self.mask = torch.cat([self.prompt_mask, ones], dim=1)[prompt]
        self.is_padded = not bool(self.prompt_mask.all())
        self.positions = self.prompt_mask.sum(dim=1)[prompt, None]
        logits = self.logits(self.prompt_ids, self.prompt_mask, position_ids(self.prompt_mask))[prompt]
        self.cache.copy_rows(prompt, torch.arange(len(prompt), device=prompt.device))
        return logits

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """Logits after one more token of each live row, (R, V)."""
        num_rows, length = len(tokens), self.cache.get_seq_length() + 1
        mask = self.mask[:num_rows, :length] if self.is_padded else None
        logits = self.logits(tokens[:, None], mask, self.positions[:num_rows])
        self.positions += 1
        return logits

    def move(self, source: Tensor, target: Tensor) -> None:
        """Put rows in the place of others."""
        self.cache.copy_rows(source, target)
        self.positions[target] = self.positions[source]
        self.mask[target] = self.mask[source]

    def logits(self, ids: Tensor, mask: Any, positions: Tensor) -> Tensor:
        """Logits after the last column."""
        if self.head is None:
            return decoding_step(self.policy, ids, mask, positions, self.cache)
        with without_head(self.head.head):
            hidden = decoding_step(self.policy, ids, mask, positions, self.cache)
        return self.head(hidden)


class CompiledNextLogits(NextLogits):
    """Decodes by a compiled step of constant shape, on a GPU by a CUDA graph.

    The prompts are read as without it. The step then sees the whole cache, whose length is rounded up, and as many rows
    as there were, half of them, a quarter, ...: so few shapes are compiled. A graph is tied to the addresses of its
    cache, so caches are kept.

    Args:
        caches: Those of earlier rollouts, by model and shape.
        *args: As in NextLogits.
    """

    def __init__(self, caches: Caches, *args: Any) -> None:
        self.caches = caches
        super().__init__(*args)

    def make_cache(self, num_rows: int, length: int) -> PreallocatedCache:
        """An empty cache of the rounded length, that of an earlier rollout if there is one."""
        length = compiled_length(length)
        key = (id(self.policy), num_rows, length)
        if key not in self.caches:
            self.caches[key] = super().make_cache(num_rows, length)
        self.caches[key].reset()
        return self.caches[key]

    def of_prompts(self, prompt: Tensor) -> Tensor:
        """Logits after the prompt of each row, (R, V)."""
        logits = super().of_prompts(prompt)
        self.cache.make_static()
        return logits

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """Logits after one more token of each live row, (R, V)."""
        num_rows = len(self.mask)
        while len(tokens) <= num_rows // 2:
            num_rows //= 2
        positions = self.positions[:num_rows].clone()  # the address of an input must not be written to
        masks = create_masks_for_generate(
            self.policy.config,
            torch.empty(num_rows, 1, 1, device=tokens.device, dtype=self.policy.dtype),
            self.mask[:num_rows],
            self.cache,
            positions,
        )
        padded = F.pad(tokens, (0, num_rows - len(tokens)))[:, None]
        logits = compiled_step(tokens.device.type)(self.policy, padded, masks, positions, self.cache).clone()
        self.cache.advance()
        self.positions += 1
        return logits[: len(tokens)]


def compiled_length(length: int) -> int:
    """Columns of a compiled rollout's cache for sequences of at most this many tokens."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


@cache
def compiled_step(device_type: str) -> Callable[..., Tensor]:
    """The decoding step, compiled; the same for all models and rollouts, so that what was compiled is found again."""
    return torch.compile(decoding_step, mode="reduce-overhead" if device_type == "cuda" else None)


def decoding_step(
    policy: PreTrainedModel, ids: Tensor, masks: Any, positions: Tensor, cache: PreallocatedCache
) -> Tensor:
    """Logits after the last of some more columns, which are added to the cache, (R, V)."""
    outputs = policy(
        input_ids=ids,
        attention_mask=masks,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return outputs.logits[:, -1]
