"""Log-probabilities of tokens straight from hidden states: the head, the softmax and their gradients, chunk by chunk.

The logits of N tokens, (N, V), and what autograd keeps of them are the largest tensors of a training step. Here the
logits of `chunk_size` tokens exist at a time. Everything is in nats. Half-precision logits are taken to float32 for the
softmax; the gradient matmuls run in the dtype of the weight and are summed over chunks in float32. float64 stays so.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from remax_lightning.functional._checks import require_shape

CPU_CHUNK_SIZE, CHUNK_SIZE = 384, 2048  # tokens whose logits exist at once; with fewer the matmuls are slower
CPU_BLOCK_SIZE, BLOCK_SIZE = 2**19, 2**25  # logits in float32 at once: 2 MiB, for a CPU's cache, and 128 MiB


class HeadOutput(NamedTuple):
    """What one pass over the head gives.

    Attributes:
        loss: Scalar, with gradient.
        log_probs: Log-probabilities of the tokens in nats, without gradient, (...).
        entropy: Entropy of the distribution each token was taken from, in nats, without gradient, (...).
    """

    loss: Tensor
    log_probs: Tensor
    entropy: Tensor


def fused_policy_gradient(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    coefficients: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> HeadOutput:
    """-sum(coefficients * log pi(tokens)) with pi = softmax((hidden @ weight.T + bias) / temperature).

    The coefficients are known beforehand, so the forward pass forms the gradients while it has the logits of a chunk;
    the backward pass scales them in place, which is why it can run once only. A coefficient of 0 (padding, an advantage
    of 0) adds exactly 0, whatever its hidden state, and costs no gradient.

    Args:
        hidden: Hidden states, (..., H); `hidden[..., t, :]` must predict `tokens[..., t]`: the caller shifts by one.
        weight: Rows of the head, (V, H).
        tokens: Token ids, (...) long.
        coefficients: Weight of each token, (...); treated as constants.
        bias: Added to the logits, (V,).
        temperature: Sampling temperature, above 0.
        chunk_size: Tokens whose logits exist at once, at least 1; None takes 384 on a CPU and 2048 on an accelerator.

    Returns:
        Loss, log-probabilities and entropy, float32 or float64.

    Raises:
        ValueError: If a shape does not match, the temperature is not above 0, or chunk_size is below 1.
    """
    head, shape = _checked(hidden, weight, tokens, bias, temperature, chunk_size), hidden.shape[:-1]
    require_shape(shape, "one weight per hidden state, (...)", coefficients=coefficients)
    loss, log_probs, entropy = _PolicyGradient.apply(*head, coefficients.detach().flatten())
    return HeadOutput(loss, log_probs.view(shape), entropy.view(shape))


def fused_policy_gradient_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    coefficients: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    """The loss of `fused_policy_gradient` alone, scalar; same arguments and errors."""
    return fused_policy_gradient(
        hidden, weight, tokens, coefficients, bias=bias, temperature=temperature, chunk_size=chunk_size
    ).loss


def fused_log_probs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probabilities with gradient, for losses that are not linear in them, and for those of a reference.

    The backward pass computes the logits of each chunk again: `fused_policy_gradient` is cheaper where the weight of a
    token is known beforehand. Tokens whose log-probability gets a gradient of 0 are left out of it.

    Args:
        hidden: Hidden states, (..., H).
        weight: Rows of the head, (V, H).
        tokens: Token ids, (...) long.
        bias: As in `fused_policy_gradient`.
        temperature: As in `fused_policy_gradient`.
        chunk_size: As in `fused_policy_gradient`.

    Returns:
        Log-probabilities in nats, (...), float32 or float64.

    Raises:
        ValueError: If a shape does not match, the temperature is not above 0, or chunk_size is below 1.
    """
    head = _checked(hidden, weight, tokens, bias, temperature, chunk_size)
    return _LogProbs.apply(*head).view(hidden.shape[:-1])


class _Head(NamedTuple):
    """What the logits depend on, checked and flat; the first three may need gradients."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    tokens: Tensor  # (N,)
    temperature: float
    chunk_size: int


class _Gradients(NamedTuple):
    """Sums of the gradients so far; None for an input that needs none."""

    hidden: Tensor | None
    weight: Tensor | None  # float32 or float64, as the bias
    bias: Tensor | None


class _PolicyGradient(torch.autograd.Function):
    """Forward forms the gradients, backward scales them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        head, coefficients = _Head(*inputs[:-1]), inputs[-1]
        gradients = _zeros(head, ctx.needs_input_grad)
        log_probs, entropy = _empty_outputs(head)
        weighted = coefficients.to(log_probs.dtype)
        # in units of the largest, so that none is lost in float16 before the backward pass scales them
        unit = weighted.abs().max() if len(weighted) else weighted.new_ones(())
        active, idle = (rows.nonzero().squeeze(-1) for rows in (weighted != 0, weighted == 0))
        _sweep(head, active, log_probs, entropy, weighted / unit, gradients)
        _sweep(head, idle, log_probs, entropy)
        ctx.save_for_backward(unit, *gradients)
        ctx.mark_non_differentiable(log_probs, entropy)
        return -(weighted[active] * log_probs[active]).sum(), log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        unit, *gradients = ctx.saved_tensors
        scaled = (None if each is None else each.mul_(upstream * unit) for each in gradients)
        return *scaled, None, None, None, None  # autograd casts them to the dtypes of the inputs


class _LogProbs(torch.autograd.Function):
    """Backward is the forward of `_PolicyGradient` with the negative upstream gradient for the coefficients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        head = _Head(*inputs)
        log_probs, _ = _empty_outputs(head)
        _sweep(head, torch.arange(len(head.tokens), device=head.tokens.device), log_probs)
        ctx.save_for_backward(*head[:4])
        ctx.settings = head[4:]
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        head = _Head(*ctx.saved_tensors, *ctx.settings)
        gradients = _zeros(head, ctx.needs_input_grad)
        _sweep(head, upstream.ne(0).nonzero().squeeze(-1), *_empty_outputs(head), -upstream, gradients)
        return *gradients, None, None, None


def _sweep(
    head: _Head,
    rows: Tensor,
    log_probs: Tensor,
    entropy: Tensor | None = None,
    coefficients: Tensor | None = None,
    gradients: _Gradients | None = None,
) -> None:
    """Fill in log_probs and entropy at the rows and add the gradients of -sum(coefficients * log_probs) over them."""
    buffer, scale = head.weight.new_empty(min(head.chunk_size, len(rows)), len(head.weight)), 1 / head.temperature
    with nullcontext() if buffer.is_meta else torch.autocast(buffer.device.type, enabled=False):
        for chunk in rows.split(head.chunk_size):
            hidden, scores = head.hidden[chunk], buffer[: len(chunk)]
            bias = (scores, 0.0) if head.bias is None else (head.bias, scale)
            torch.addmm(bias[0], hidden, head.weight.T, beta=bias[1], alpha=scale, out=scores)
            if entropy is None:
                log_probs[chunk] = _token_log_probs(scores, head.tokens[chunk])
                continue
            log_probs[chunk], entropy[chunk] = _softmax_minus_one_hot_(scores, head.tokens[chunk])
            if coefficients is not None and gradients is not None:
                weights = (coefficients[chunk] * scale).unsqueeze(-1)
                _add_gradients(gradients, chunk, scores, hidden, head.weight, weights)


def _softmax_minus_one_hot_(scores: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite the scores, (n, V), by the gradient of -log_probs to them; return log_probs and entropy, (n,) each."""
    dtype = _wide(scores.dtype)
    log_probs, entropy = scores.new_empty(2, len(scores), dtype=dtype)
    for rows in _blocks(scores):
        block, chosen = scores[rows].to(dtype), tokens[rows].unsqueeze(-1)
        probs = block.softmax(-1)
        block -= block.amax(-1, keepdim=True)
        log_total = -probs.amax(-1).log()  # of exp(block): its largest entry is exp(0)
        log_probs[rows] = block.gather(-1, chosen).squeeze(-1) - log_total
        finite = block.clamp_(min=torch.finfo(dtype).min)  # 0 * -inf would be NaN
        entropy[rows] = log_total - finite.mul_(probs).sum(-1)
        scores[rows] = probs.scatter_add_(-1, chosen, torch.full_like(chosen, -1, dtype=dtype))
    return log_probs, entropy


def _token_log_probs(scores: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities alone, (n,)."""
    log_probs = scores.new_empty(len(scores), dtype=_wide(scores.dtype))
    for rows in _blocks(scores):
        block = scores[rows].to(log_probs.dtype)
        log_probs[rows] = block.gather(-1, tokens[rows].unsqueeze(-1)).squeeze(-1) - block.logsumexp(-1)
    return log_probs


def _blocks(scores: Tensor) -> list[slice]:
    """Few rows at a time, on a CPU so few that they fit in the cache: three times as fast as the whole chunk."""
    size = max(1, (CPU_BLOCK_SIZE if scores.device.type == "cpu" else BLOCK_SIZE) // scores.shape[-1])
    return [slice(start, start + size) for start in range(0, len(scores), size)]


def _add_gradients(
    gradients: _Gradients, rows: Tensor, grad_scores: Tensor, hidden: Tensor, weight: Tensor, weights: Tensor
) -> None:
    """Add what these rows give when each, (n, V) and (n, H), has its weight, (n, 1)."""
    if gradients.hidden is not None:
        gradients.hidden[rows] = (weights * (grad_scores @ weight)).to(hidden.dtype)
    for total, factor in ((gradients.weight, hidden), (gradients.bias, torch.ones_like(weights))):
        if total is None:
            continue
        weighted = (weights * factor).to(weight.dtype)
        if total.dtype == weight.dtype and total.dim() == 2:
            total.addmm_(grad_scores.T, weighted)
        else:
            total += (grad_scores.T @ weighted).view_as(total)


def _checked(
    hidden: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | None, temperature: float, chunk_size: int | None
) -> _Head:
    """The arguments, flat, in the dtype of autocast where it is on, without gradient where grad mode is off."""
    rows = (len(weight), hidden.shape[-1])
    require_shape(hidden.shape[:-1], "one id per hidden state, (...)", tokens=tokens)
    require_shape(rows, "one row per token of the vocabulary, as long as a hidden state, (V, H)", weight=weight)
    require_shape(rows[:1], "one value per row of weight, (V,)", bias=bias)
    if not temperature > 0:
        raise ValueError(f"temperature divides the logits and must be above 0, got {temperature}; 1 leaves them alone.")
    if chunk_size is None:
        chunk_size = CPU_CHUNK_SIZE if weight.device.type == "cpu" else CHUNK_SIZE
    if chunk_size < 1:
        raise ValueError(f"chunk_size counts tokens and must be at least 1, got {chunk_size}; None picks it.")
    bias = None if bias is None else _usable(bias)
    return _Head(_usable(hidden.reshape(-1, rows[1])), _usable(weight), bias, tokens.flatten(), temperature, chunk_size)


def _usable(tensor: Tensor) -> Tensor:
    device_type = tensor.device.type
    if not tensor.is_meta and torch.is_autocast_enabled(device_type) and tensor.dtype != torch.float64:
        tensor = tensor.to(torch.get_autocast_dtype(device_type))
    # a Function is told that its inputs need gradients even where grad mode is off
    return tensor if torch.is_grad_enabled() else tensor.detach()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _empty_outputs(head: _Head) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy to be filled in."""
    shape, dtype = head.tokens.shape, _wide(head.weight.dtype)
    return head.hidden.new_empty(shape, dtype=dtype), head.hidden.new_empty(shape, dtype=dtype)


def _zeros(head: _Head, is_needed: tuple[bool, ...]) -> _Gradients:
    """Gradients to be summed, in float32 or float64 where chunks add up."""
    dtypes = (head.hidden.dtype, _wide(head.weight.dtype), _wide(head.weight.dtype))
    zeros = (
        torch.zeros_like(tensor, dtype=dtype) if tensor is not None and needed else None
        for tensor, dtype, needed in zip(head[:3], dtypes, is_needed, strict=False)
    )
    return _Gradients(*zeros)
