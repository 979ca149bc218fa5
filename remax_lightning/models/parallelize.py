"""Fully sharded data parallelism (FSDP2) of transformers models, block by block.

Each rank stores a shard of every parameter. A block is gathered while it computes; for a rollout, whose many short
steps would each wait for it, the full model is gathered once.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass(frozen=True)
class Sharding:
    """How models are sharded over ranks.

    Args:
        mesh: The ranks: one dimension to shard over, or two, to replicate over the first and shard over the second.
        device: Where this rank computes.
        compute_dtype: Type of gathered parameters and activations; gradients are reduced in float32.
        offload_frozen: Shards of frozen models are in host memory.
        sync_every_micro_batch: Gradients are reduced to shards after each micro-batch, not once a step: less memory,
            more communication.
    """

    mesh: DeviceMesh
    device: torch.device
    compute_dtype: torch.dtype
    offload_frozen: bool = False
    sync_every_micro_batch: bool = False


def shard(model: nn.Module, sharding: Sharding, *, frozen: bool = False) -> None:
    """Shard the parameters of a model, in place; each block is a unit, what is outside of them another.

    Args:
        model: Model of transformers, or one with adapters; it may be on the meta device.
        sharding: How.
        frozen: The model is not trained.
    """
    policy = MixedPrecisionPolicy(param_dtype=sharding.compute_dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy() if frozen and sharding.offload_frozen else OffloadPolicy()
    for block in blocks(model):
        fully_shard(block, mesh=sharding.mesh, reshard_after_forward=True, mp_policy=policy, offload_policy=offload)
    # the fused head reads its weight after the model's forward pass, so the root unit stays gathered until backward
    fully_shard(model, mesh=sharding.mesh, reshard_after_forward=False, mp_policy=policy, offload_policy=offload)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformer that are alike, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Save only the input of each block for the backward pass, which computes the rest again."""
    with warnings.catch_warnings():
        # transformers has renamed it, in a version that not every Python can have
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})


def sharded_units(model: nn.Module) -> list[FSDPModule]:
    """What is gathered together: the model first, then its blocks; nothing for a model that is not sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside the context every rank has the full model, in its compute type, and no forward pass communicates.

    So ranks may call the model different numbers of times, without gradient. Entering is collective, leaving is not;
    the model is resharded also when something raises. Nothing happens to a model that is not sharded.
    """
    units = sharded_units(model)
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield
    finally:
        for number, unit in enumerate(units):
            unit.reshard()
            unit.set_reshard_after_forward(number > 0, recurse=False)


def sync_gradients(model: nn.Module, sharding: Sharding, *, is_last: bool) -> None:
    """Have the next backward pass reduce gradients over ranks if it is a step's last, or if each is to do so."""
    cast(FSDPModule, model).set_requires_gradient_sync(is_last or sharding.sync_every_micro_batch)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded over ranks; collective if it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
