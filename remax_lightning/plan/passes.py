"""The passes of a run through its models, each as a dry run: training, scoring, prefill and decoding."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from remax_lightning.functional.log_probs import entropy, token_log_probs
from remax_lightning.models.head import without_head
from remax_lightning.models.scalar_model import sequence_scores
from remax_lightning.plan.dry_run import Ledger, Usage, dry_run
from remax_lightning.rollout.kv_cache import PreallocatedCache
from remax_lightning.rollout.next_logits import decoding_step
from remax_lightning.rollout.sampling import sample_tokens
from remax_lightning.rollout.types import Sampling


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The head of a model on the meta device whose logits are what the head returns; None for any other model.

    Such a head's logits never exist for all tokens at once, see :func:`remax_lightning.models.head.plain_head`.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    mark = torch.empty(1, 1, head.out_features, device="meta")
    handle = head.register_forward_hook(lambda _, __, output: mark)
    try:
        with torch.no_grad(), dry_run(model, autocast=False, is_padded=False):
            ids = _ids(1, 1)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        handle.remove()
    return head if logits.untyped_storage()._cdata == mark.untyped_storage()._cdata else None


@contextmanager
def _apart_from_head(head: nn.Linear | None) -> Iterator[None]:
    if head is None:
        yield
        return
    with without_head(head):
        yield


def language_model_training(
    model: PreTrainedModel, rows: int, length: int, num_kept: int, gradient_size: float = 0.0, *, autocast: bool = False
) -> Usage:
    """Forward and backward pass of full-length rows as in :func:`remax_lightning.models.next_token.policy_gradient_of`.

    A plain head, whose memory is bounded, is left out.

    Args:
        model: Causal language model on the meta device, in training mode.
        rows: Sequences, B.
        length: Tokens in each, L.
        num_kept: Last positions of each row that are learned from.
        gradient_size: Bytes that are kept of each number in the parameters' gradients, if they come in this pass; their
            sum is left out of what it takes, but not when it takes it.
        autocast: Whether bfloat16 autocast is on.
    """
    head = plain_head(model)
    context = dry_run(model, autocast=autocast, is_padded=False, gradient_size=gradient_size)
    with context as (ledger, accelerator):
        with _apart_from_head(head):
            ids = _ids(rows, length)
            mask = torch.ones_like(ids)
            states = model(input_ids=ids, attention_mask=mask, logits_to_keep=num_kept + 1, use_cache=False).logits
            del ids, mask
        if head is not None:
            with ledger.paused():  # the head has gathered them
                hidden = states[:, :-1].flatten(0, 1).clone()
            del states
            return _backward(hidden, ledger, accelerator.copies)
        logits = states[:, :-1].flatten(0, 1).clone()
        del states
        log_probs = token_log_probs(logits, torch.empty(len(logits), dtype=torch.long, device="meta"))
        with torch.no_grad():
            entropy(logits)
        del logits
        return _backward(log_probs, ledger, accelerator.copies)


def scalar_model_training(
    model: PreTrainedModel, rows: int, length: int, gradient_size: float = 0.0, *, autocast: bool = False
) -> Usage:
    """Forward and backward pass of padded rows through a reward or value model; arguments as above."""
    context = dry_run(model, autocast=autocast, is_padded=True, gradient_size=gradient_size)
    with context as (ledger, accelerator):
        scores = _scores(model, rows, length)
        return _backward(scores, ledger, accelerator.copies)


def language_model_scoring(
    model: PreTrainedModel, rows: int, length: int, num_kept: int, *, autocast: bool = False
) -> Usage:
    """Forward pass without gradient; arguments as in :func:`language_model_training`."""
    head = plain_head(model)
    with torch.no_grad(), dry_run(model, autocast=autocast, is_padded=False) as (ledger, accelerator):
        with _apart_from_head(head):
            ids = _ids(rows, length)
            mask = torch.ones_like(ids)
            states = model(input_ids=ids, attention_mask=mask, logits_to_keep=num_kept + 1, use_cache=False).logits
        if head is None:
            tokens = torch.empty(rows, num_kept, dtype=torch.long, device="meta")
            token_log_probs(states[:, :-1].clone(), tokens)
        return Usage(saved=ledger.live, peak=ledger.peak, copies=_bytes(accelerator.copies))


def scalar_model_scoring(model: PreTrainedModel, rows: int, length: int, *, autocast: bool = False) -> Usage:
    """Forward pass of padded rows without gradient through a reward or value model."""
    with torch.no_grad(), dry_run(model, autocast=autocast, is_padded=True) as (ledger, accelerator):
        _scores(model, rows, length)
        return Usage(peak=ledger.peak, copies=_bytes(accelerator.copies))


def rollout(
    model: PreTrainedModel, prompts: int, rows: int, lengths: tuple[int, int], sampling: Sampling, *, autocast: bool
) -> tuple[Usage, Usage]:
    """Prefill of padded prompts and the last step of decoding, as the embedded engine does them.

    Args:
        model: Causal language model on the meta device.
        prompts: Prompts, each prefilled once.
        rows: Responses that are decoded together.
        lengths: Longest prompt and columns of the cache, tokens.
        sampling: How tokens are drawn.
        autocast: Whether bfloat16 autocast is on.

    Returns:
        Memory of both beside the key-value cache, which each gives as ``cache``.
    """
    cache = PreallocatedCache(model.config.get_text_config().num_hidden_layers, rows, lengths[1])
    with torch.no_grad(), dry_run(model, autocast=autocast, is_padded=True):
        _step(model, cache, prompts, 1)  # which allocates the cache
    cache.reset()
    prefill = _decoding(model, cache, prompts, lengths[0], rows, sampling, autocast)
    for layer in cache.attention_layers:
        layer.length = lengths[1] - 1
    return prefill, _decoding(model, cache, rows, 1, rows, sampling, autocast)


def _decoding(
    model: PreTrainedModel,
    cache: PreallocatedCache,
    batch: int,
    width: int,
    rows: int,
    sampling: Sampling,
    autocast: bool,
) -> Usage:
    """Memory of one call of the model on (batch, width) tokens, and of the next tokens of all rows."""
    cached = [each for layer in cache.attention_layers for each in (layer.keys, layer.values) if each is not None]
    with torch.no_grad(), dry_run(model, autocast=autocast, is_padded=True) as (ledger, accelerator):
        ledger.leave_out(cached)
        logits = _step(model, cache, batch, width)
        if batch != rows or width > 1:
            prompt = torch.empty(rows, dtype=torch.long, device="meta")
            logits = logits[prompt]
            cache.copy_rows(prompt, prompt)
        sample_tokens(logits, torch.empty(rows, device="meta"), sampling)
    size = sum(each.nbytes for each in cached)
    return Usage(peak=ledger.peak, copies=_bytes(accelerator.copies), cache=size)


def _step(model: PreTrainedModel, cache: PreallocatedCache, rows: int, width: int) -> Tensor:
    ids = _ids(rows, width)
    length = cache.attention_layers[0].length + width
    mask = torch.ones(rows, length, dtype=torch.bool, device="meta")
    return decoding_step(model, ids, mask, torch.zeros_like(ids), cache)


def _scores(model: PreTrainedModel, rows: int, length: int) -> Tensor:
    ids = _ids(rows, length)
    return sequence_scores(model, ids, torch.ones_like(ids, dtype=torch.bool))


def _ids(rows: int, length: int) -> Tensor:
    return torch.zeros(rows, length, dtype=torch.long, device="meta")


def _backward(output: Tensor, ledger: Ledger, copies: dict[int, Tensor]) -> Usage:
    saved = ledger.live
    # torch.autograd.backward would leave the accelerator, which the forward pass of a checkpointed block needs again
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward((output,), (torch.empty_like(output),), False, False, (), True, True)
    return Usage(saved=saved, peak=ledger.peak - ledger.added, copies=_bytes(copies))


def _bytes(tensors: dict[int, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
