"""The head of a causal language model apart from its body: hidden states in, logits out."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

_has_plain_head: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The head of a model whose logits are exactly ``head(hidden states)``; None, and a warning, for any other model.

    Models that cap or scale their logits (Gemma 2, Cohere, Granite) have no plain head, nor have those with an adapter
    on it. The model is tested once, on one token: the output of its head must be its logits, bitwise; on the meta
    device, where there are no values, the same tensor.
    """
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        if model not in _has_plain_head:
            _has_plain_head[model] = _passes_through(model, head)
        if _has_plain_head[model]:
            return head
    # Python shows the same warning from here once
    warnings.warn(
        f"the logits of {type(model).__name__} are not what a plain linear head returns (it caps or scales them or the "
        "head has an adapter), so those of all response tokens of a micro-batch are in memory at once; "
        "micro_batch_tokens bounds them",
        stacklevel=1,
    )
    return None


@torch.no_grad()
def _passes_through(model: PreTrainedModel, head: nn.Linear) -> bool:
    """True if the model returns the output of its head unchanged."""
    # every half-precision type holds these numbers exactly
    marks = torch.linspace(-1000, 1000, head.out_features, device=head.weight.device).bfloat16()
    marked: list[Tensor] = []

    def mark(_: nn.Module, __: object, output: Tensor) -> Tensor:
        marked.append(marks.to(output.dtype).expand_as(output))
        return marked[0]

    handle = head.register_forward_hook(mark)
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)
        logits = model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False).logits
    finally:
        handle.remove()
    if logits.is_meta:
        return logits.untyped_storage()._cdata == marked[0].untyped_storage()._cdata
    return torch.equal(logits[0, -1].float(), marks.float())


def _identity(input: Tensor) -> Tensor:
    return input


@contextmanager
def without_head(head: nn.Linear) -> Iterator[None]:
    """Inside the context the head returns its input, so a model's logits are its hidden states.

    The caller still calls the model, not its body: FSDP's and DDP's hooks are on the model.
    """
    head.forward = _identity  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward


class DecodingHead:
    """A head that is applied to few rows at a time, many times, without gradient.

    On a CPU the weight is packed for the matrix product once, not at every call: twice as fast for 32 rows, at the cost
    of a second copy of the weight.

    Args:
        head: The head; later changes of its weight have no effect.
        num_rows: Largest number of rows, R.
    """

    def __init__(self, head: nn.Linear, num_rows: int) -> None:
        self.head, weight = head, head.weight
        is_packable = (
            weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        )
        self.packed = None
        if is_packable and not torch.is_autocast_enabled("cpu"):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), num_rows)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits, (R, V), of hidden states, (R, H)."""
        if self.packed is None:
            return F.linear(hidden, self.head.weight, self.head.bias)
        return torch.ops.mkldnn._linear_pointwise(hidden, self.packed, self.head.bias, "none", [], "")
