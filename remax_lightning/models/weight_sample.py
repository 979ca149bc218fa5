"""Values of frozen weights by which a later run notices that others have been loaded in their place.

A checkpoint of adapters, or of a policy with a reference, is of use with the frozen weights alone that were there when
it was saved. Digests of the files would take minutes for a large model, and differ with the names and sizes of the
files; a digest of the weights would differ with the last bits of a merge on another machine. So up to 64 values of each
parameter are kept, evenly spread over it and rounded to bfloat16: they depend neither on the folder nor on how the
model is sharded or in which type it is loaded, and are taken in milliseconds. Weights that were trained further differ
in all parameters; a few rows of one matrix that were replaced may go unnoticed.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from remax_lightning.models.adapter_names import base_name

SIZE = 64
LARGEST_SHARE = 0.05
"""Of a parameter's values that may differ: the last bits of a merge turn the rounding of few."""
LARGEST_TOTAL = 0.001
"""Of all values that may differ: training at a tiny rate turns the rounding of few, but in all parameters."""


@torch.no_grad()
def weight_sample(model: nn.Module) -> dict[str, Any]:
    """Values of the parameters that are not trained; collective if they are sharded.

    Quantized ones are left out, so that a base may be loaded in other bits. So is the head that a classifier's trained
    copy replaces.

    Returns:
        ``names`` and ``counts`` of values of the parameters, and their ``values`` one after the other, bfloat16.
    """
    frozen = {
        base_name(name): value
        for name, value in model.named_parameters()
        if not value.requires_grad and value.is_floating_point() and ".original_module." not in name
    }
    samples = [_sample(value) for value in frozen.values()]
    values = torch.cat(samples) if samples else torch.zeros(0)
    sharded = next((value for value in frozen.values() if isinstance(value, DTensor)), None)
    if sharded is not None:
        mesh = sharded.device_mesh
        values = values.to(mesh.device_type)
        dist.all_reduce(values, group=mesh.get_group(mesh.ndim - 1))  # each value is 0 on all ranks but one
    counts = [len(sample) for sample in samples]
    return {"names": list(frozen), "counts": counts, "values": values.to("cpu", torch.bfloat16)}


def changed_parameters(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of the parameters in both samples whose values are not the same; empty if the weights are.

    Args:
        old: An earlier :func:`weight_sample`.
        new: A later one.
    """
    before, after = _by_name(old), _by_name(new)
    shares = {}
    for name in before.keys() & after.keys():
        is_like = before[name].shape == after[name].shape
        differ = (before[name] != after[name]).sum().item() if is_like else len(after[name])
        shares[name] = differ / max(len(after[name]), 1)
    total = sum(shares.values()) / max(len(shares), 1)
    limit = 0.0 if total > LARGEST_TOTAL else LARGEST_SHARE
    return sorted(name for name, share in shares.items() if share > limit)


def _by_name(sample: dict[str, Any]) -> dict[str, Tensor]:
    return dict(zip(sample["names"], sample["values"].split(sample["counts"]), strict=True))


def _sample(parameter: Tensor) -> Tensor:
    """Values of a parameter, float32; those of other ranks' shards are 0."""
    count = min(SIZE, parameter.numel())
    index = torch.arange(count) * (parameter.numel() - 1) // max(count - 1, 1)
    values, start = parameter.detach(), 0
    if isinstance(values, DTensor):
        mesh, rows = values.device_mesh, values.shape[0]
        rank, ranks = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
        # FSDP2 splits the first dimension as torch.chunk does
        start = min(rank * -(-rows // ranks), rows) * (values.numel() // max(rows, 1))
        values = values.to_local()
    index = index.to(values.device) - start
    is_here = (index >= 0) & (index < values.numel())
    sample = torch.zeros(count, device=values.device)
    sample[is_here] = values.flatten()[index[is_here]].float()
    return sample
