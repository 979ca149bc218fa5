"""The passes of a run through its models, each as a dry run: training, scoring, prefill and decoding."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from remax_lightning.functional.fused_head import fused_log_probs, fused_policy_gradient
from remax_lightning.functional.log_probs import entropy, token_log_probs
from remax_lightning.models.head import plain_head, without_head
from remax_lightning.models.scalar_model import sequence_scores
from remax_lightning.plan.dry_run import AllocationTracker, CudaOnMeta, Usage, dry_run
from remax_lightning.rollout.kv_cache import PreallocatedCache
from remax_lightning.rollout.next_logits import decoding_step
from remax_lightning.rollout.sampling import sample_tokens
from remax_lightning.rollout.types import Sampling


def chunked_head(model: PreTrainedModel) -> nn.Linear | None:
    """The head of a model on the meta device if its logits are computed in chunks, so that all never exist at once."""
    with dry_run(model, autocast=False, is_padded=False):
        return plain_head(model)


def language_model_training(
    model: PreTrainedModel, rows: int, length: int, learned: int, gradient_size: float = 0.0, *, autocast: bool = False
) -> Usage:
    """Forward and backward pass of full-length rows as in :func:`remax_lightning.models.next_token.policy_gradient_of`.

    A head that is computed in chunks is left out.

    Args:
        model: Causal language model on the meta device, in training mode.
        rows: Sequences, B.
        length: Tokens in each, L.
        learned: Last positions of each row that are learned from.
        gradient_size: Bytes stored of each number in the parameters' gradients, if they come in this pass; their sum is
            left out of the usage, but not when they come.
        autocast: Whether bfloat16 autocast is on.
    """
    head = chunked_head(model)
    with dry_run(model, autocast=autocast, is_padded=False, gradient_size=gradient_size) as (tracker, cuda):
        states = _states(model, head, rows, length, learned)
        # the head gathers the hidden states of its tokens itself
        with nullcontext() if head is None else tracker.paused():
            output = states.flatten(0, 1).clone()
        del states
        if head is None:
            output, logits = token_log_probs(output, torch.empty(len(output), dtype=torch.long, device="meta")), output
            with torch.no_grad():
                entropy(logits)
            del logits
        return _backward(output, tracker, cuda)


def scalar_model_training(
    model: PreTrainedModel, rows: int, length: int, gradient_size: float = 0.0, *, autocast: bool = False
) -> Usage:
    """Forward and backward pass of padded rows through a reward or value model; arguments as above."""
    with dry_run(model, autocast=autocast, is_padded=True, gradient_size=gradient_size) as (tracker, cuda):
        return _backward(_scores(model, rows, length), tracker, cuda)


def language_model_scoring(
    model: PreTrainedModel, rows: int, length: int, learned: int, *, autocast: bool = False
) -> Usage:
    """Forward pass without gradient; arguments as in :func:`language_model_training`."""
    head = chunked_head(model)
    with torch.no_grad(), dry_run(model, autocast=autocast, is_padded=False) as (tracker, cuda):
        states = _states(model, head, rows, length, learned)
        if head is None:
            token_log_probs(states.clone(), torch.empty(rows, learned, dtype=torch.long, device="meta"))
        return Usage(saved=tracker.live, peak=tracker.peak, copies=cuda.copied_bytes)


def scalar_model_scoring(model: PreTrainedModel, rows: int, length: int, *, autocast: bool = False) -> Usage:
    """Forward pass of padded rows without gradient through a reward or value model."""
    with torch.no_grad(), dry_run(model, autocast=autocast, is_padded=True) as (tracker, cuda):
        _scores(model, rows, length)
        return Usage(peak=tracker.peak, copies=cuda.copied_bytes)


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
    cached = [each for layer in cache.attention_layers for each in (layer.keys, layer.values) if each is not None]
    usages: list[Usage] = []
    for filled, batch, width in ((0, prompts, lengths[0]), (lengths[1] - 1, rows, 1)):
        cache.reset()
        for layer in cache.attention_layers:
            layer.length = filled
        with torch.no_grad(), dry_run(model, autocast=autocast, is_padded=True) as (tracker, cuda):
            tracker.leave_out(cached)
            logits = _step(model, cache, batch, width)
            if not usages:  # each response starts from its prompt's
                prompt = torch.empty(rows, dtype=torch.long, device="meta")
                logits = logits[prompt]
                cache.copy_rows(prompt, prompt)
            sample_tokens(logits, torch.empty(rows, device="meta"), sampling)
            size = sum(each.nbytes for each in cached)
            usages.append(Usage(peak=tracker.peak, copies=cuda.copied_bytes, cache=size))
            del logits
    return usages[0], usages[1]


def head_training(model: PreTrainedModel, tokens: int, *, autocast: bool) -> Usage:
    """Forward and backward pass of a head that is computed in chunks, from the hidden states of the tokens on.

    Nothing for any other head, which is part of the passes above.
    """
    if (head := chunked_head(model)) is None:
        return Usage()
    with dry_run(model, autocast=False, is_padded=False) as (tracker, cuda):
        output = _call_head(fused_policy_gradient, head, autocast, tokens, torch.empty(tokens, device="meta"))
        return _backward(output.loss, tracker, cuda)


def head_scoring(model: PreTrainedModel, tokens: int, *, autocast: bool) -> Usage:
    """As :func:`head_training`, the log-probs alone and without gradient."""
    if (head := chunked_head(model)) is None:
        return Usage()
    with torch.no_grad(), dry_run(model, autocast=False, is_padded=False) as (tracker, _):
        _call_head(fused_log_probs, head, autocast, tokens)
        return Usage(peak=tracker.peak)


def _call_head(function: Callable[..., Any], head: nn.Linear, autocast: bool, tokens: int, *arguments: Tensor) -> Any:
    """Call a function of the fused head, under autocast with the copies that it would make."""
    ids = torch.empty(tokens, dtype=torch.long, device="meta")
    hidden = torch.empty(tokens, head.in_features, dtype=head.weight.dtype, device="meta", requires_grad=True)
    given = [hidden, head.weight, head.bias]
    if autocast:
        given = [each if each is None else each.bfloat16() for each in given]
    return function(given[0], given[1], ids, *arguments, bias=given[2])


def _step(model: PreTrainedModel, cache: PreallocatedCache, rows: int, width: int) -> Tensor:
    ids = _ids(rows, width)
    mask = torch.ones(rows, cache.attention_layers[0].length + width, dtype=torch.bool, device="meta")
    return decoding_step(model, ids, mask, torch.zeros_like(ids), cache)


def _states(model: PreTrainedModel, head: nn.Linear | None, rows: int, length: int, learned: int) -> Tensor:
    """Logits at the positions that are learned from, (B, K, V); hidden states, (B, K, H), if the head is left out."""
    ids = _ids(rows, length)
    with nullcontext() if head is None else without_head(head):
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": learned + 1}
        return model(**arguments, use_cache=False).logits[:, :-1]


def _scores(model: PreTrainedModel, rows: int, length: int) -> Tensor:
    ids = _ids(rows, length)
    return sequence_scores(model, ids, torch.ones_like(ids, dtype=torch.bool))


def _ids(rows: int, length: int) -> Tensor:
    return torch.zeros(rows, length, dtype=torch.long, device="meta")


def _backward(output: Tensor, tracker: AllocationTracker, cuda: CudaOnMeta) -> Usage:
    saved = tracker.live
    # torch.autograd.backward would leave the mode that a checkpointed block needs when it runs forward again
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward((output,), (torch.empty_like(output),), False, False, (), True, True)
    return Usage(saved=saved, peak=tracker.peak - tracker.added, copies=cuda.copied_bytes)
