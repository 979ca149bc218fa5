"""Whether weights are finite."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SHOWN = 3


def non_finite(tensors: Mapping[str, Tensor]) -> str:
    """Names of the tensors with a NaN or an infinity, the first few of them; empty if there is none.

    Args:
        tensors: Tensors by name; of a sharded one this rank's shard is looked at, of one on the meta device nothing.

    Example:
        >>> non_finite({"good": torch.zeros(2), "bad": torch.tensor([1.0, torch.inf])})
        'bad'
    """
    local = {name: _local(tensor.detach()) for name, tensor in tensors.items()}
    known = {name: each for name, each in local.items() if each.is_floating_point() and not each.is_meta}
    if not known:
        return ""
    are_finite = torch.stack([each.isfinite().all() for each in known.values()]).tolist()  # one wait for the device
    names = [name for name, is_finite in zip(known, are_finite, strict=True) if not is_finite]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def non_finite_trained(module: nn.Module) -> str:
    """As :func:`non_finite`, of the parameters that are trained."""
    return non_finite({name: each for name, each in module.named_parameters() if each.requires_grad})


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
