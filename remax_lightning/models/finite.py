"""Whether weights are finite."""

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor

SHOWN = 3


def non_finite(tensors: Mapping[str, Tensor]) -> str:
    """Names of the tensors with a NaN or an infinity, the first few of them; empty if there is none.

    Args:
        tensors: Tensors by name; of a sharded one this rank's shard is looked at, of one on the meta device nothing.
    """
    names = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _is_finite(tensor: Tensor) -> bool:
    values = tensor.detach()
    values = values.to_local() if isinstance(values, DTensor) else values
    return values.is_meta or not values.is_floating_point() or bool(values.isfinite().all())
