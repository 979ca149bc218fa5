"""Run a model on tensors without data (the meta device) and count the memory that it would take on a GPU.

Every operation of the forward and the backward pass is seen, so the count holds for any architecture. Where the meta
device differs from a GPU it is made to act like one: attention in one kernel, autocast, questions about values.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HALF = {
    F.linear,
    F.scaled_dot_product_attention,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.addmm,
    torch.baddbmm,
    torch.einsum,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.mm,
    Tensor.bmm,
}
"""What autocast runs in bfloat16."""
SINGLE = {F.layer_norm, F.softmax, F.log_softmax, torch.softmax, Tensor.softmax, torch.pow, Tensor.pow, torch.rsqrt}
"""What autocast runs in float32 on a GPU."""
WITH_SCRATCH = {torch.logsumexp, Tensor.logsumexp}
"""What allocates a tensor like its input while it runs, which the meta device does not."""


@dataclass(frozen=True)
class Usage:
    """Memory of a pass through a model beside its parameters and their gradients, bytes.

    Attributes:
        saved: What the backward pass needs of the forward pass.
        peak: The most at once, in the forward or the backward pass.
        copies: Copies of trained parameters in bfloat16, which autocast caches.
        cache: Keys and values.
    """

    saved: int = 0
    peak: int = 0
    copies: int = 0
    cache: int = 0


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside the context, each storage once.

    Args:
        is_padded: Answer to a model that asks whether a padding mask has padding in it; values are not known here.

    Attributes:
        live: Bytes of the tensors that exist now.
        peak: The most bytes that existed at once.
        added: Bytes that were added by :meth:`add`.
    """

    def __init__(self, is_padded: bool = False) -> None:
        super().__init__()
        self.is_padded, self.is_paused = is_padded, False
        self.live = self.peak = self.added = 0
        self._known: dict[int, Any] = {}

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these tensors, nor views of them."""
        for tensor in tensors:
            self._track(tensor, 0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is made inside the context is never counted."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and track its outputs."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self._answer(args[0])
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:  # all are: the most memory
            func, args = torch.ops.aten.new_empty.default, (args[0], [args[0].numel(), args[0].dim()])
            kwargs = {"dtype": torch.int64}
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor):
                self._track(output, 0 if self.is_paused else output.untyped_storage().nbytes())
        return outputs

    def _track(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return

        def forget(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, forget)
        self._count(size)

    def add(self, size: int) -> None:
        """Count these bytes, too, from here on."""
        self.added += size
        self._count(size)

    def _count(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def _answer(self, tensor: Tensor) -> bool | int:
        if tensor.dtype == torch.bool:
            return not self.is_padded
        if tensor.dtype == torch.int64:
            return 0  # a token
        raise NotImplementedError(f"the value of a tensor of type {tensor.dtype} is asked for")


class CudaOnMeta(TorchFunctionMode):
    """Computes on the meta device as on a GPU: attention without the scores of all pairs of tokens, and autocast.

    Args:
        tracker: Does not count the copies of trained parameters, which autocast caches until it ends.
        autocast: Whether to compute under bfloat16 autocast.
    """

    def __init__(self, tracker: AllocationTracker, autocast: bool) -> None:
        super().__init__()
        self.tracker, self.autocast = tracker, autocast
        self.copies: dict[int, Tensor] = {}  # by the parameter's id

    @property
    def copied_bytes(self) -> int:
        """Bytes of the copies of trained parameters."""
        return sum(copy.nbytes for copy in self.copies.values())

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch."""
        arguments: Any = (tuple(args), dict(kwargs or {}))
        if self.autocast and func in HALF:
            arguments = tree_map(self._half, arguments)
        elif self.autocast and func in SINGLE:
            arguments = tree_map(_single, arguments)
        call = attention if func is F.scaled_dot_product_attention else func
        with torch.no_grad():
            scratch = torch.empty_like(arguments[0][0]) if func in WITH_SCRATCH else None
        result = call(*arguments[0], **arguments[1])
        del scratch
        return result

    def _half(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.bfloat16()
        if id(value) not in self.copies:
            with self.tracker.paused():
                self.copies[id(value)] = value.bfloat16()
        return self.copies[id(value)]


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` by a kernel that saves queries, keys, values, its output and one sum per row."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextmanager
def dry_run(
    model: nn.Module, *, autocast: bool, is_padded: bool, gradient_size: float = 0.0
) -> Iterator[tuple[AllocationTracker, CudaOnMeta]]:
    """Inside the context the memory of what a model on the meta device computes is counted; its parameters are not.

    Args:
        model: The model.
        autocast: Whether to compute under bfloat16 autocast.
        is_padded: Whether the masks that the model is given have padding in them.
        gradient_size: Bytes that are stored of each number in a parameter's gradient once it is accumulated.
    """
    tracker = AllocationTracker(is_padded)
    tracker.leave_out([*model.parameters(), *model.buffers()])

    def store(parameter: Tensor) -> None:
        parameter.grad = None
        tracker.add(int(gradient_size * parameter.numel()))

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(store) for parameter in trained]
    try:
        with tracker, CudaOnMeta(tracker, autocast) as cuda:
            yield tracker, cuda
    except NotImplementedError as error:
        raise ValueError(
            f"{type(model).__name__} cannot be run without data, so its memory is not known beforehand: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
