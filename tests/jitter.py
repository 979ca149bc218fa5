"""Matrix products whose last bits depend on the row and on the shape, as those of some machines do.

On a CPU with AMX, or with another number of threads, two equal rows of one batch need not have bitwise equal results,
nor a row alone and the same row in a batch. ``pytest --jitter`` (``make test-jitter``) does the same on any machine:
it moves each element of a product by up to an ulp. A product of the same shape is moved in the same way each time, so
that repeated computations stay bitwise equal.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.mkldnn._linear_pointwise.default,
}


@functools.cache
def factors(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Numbers within an ulp of one, the same for the same shape."""
    generator = torch.Generator().manual_seed(hash(tuple(shape)) % 2**63)
    return 1 + torch.finfo(dtype).eps * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1)


class Jitter(TorchDispatchMode):
    """Moves the results of all matrix products made while it is active."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            product = result[0] if isinstance(result, tuple) else result
            if type(product) is Tensor and product.device.type == "cpu":
                product.copy_(product * factors(product.shape, product.dtype))
        return result
