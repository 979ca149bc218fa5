"""Load a model so that no rank ever holds all of it: each reads its shards from the safetensors files.

The model is built on the meta device, sharded, given memory for its shards, and filled. Where the files cannot be read
in shards (old formats, weights that have to be converted or merged, a new head, random weights), rank 0 loads the full
model into its host memory and scatters the shards.
"""

import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from remax_lightning.models.adapter_folder import adapter_base
from remax_lightning.models.adapter_names import base_name, is_adapter
from remax_lightning.models.hub import check_reachable
from remax_lightning.models.language_model import freeze
from remax_lightning.models.loading import readable_weights
from remax_lightning.models.lora import LoRA, check_quantization, initial_adapter, with_lora
from remax_lightning.models.parallelize import Sharding, checkpoint_activations, full_tensor, shard, sharded_units
from remax_lightning.models.source import ModelSource

Loader = Callable[..., PreTrainedModel]
"""Loads the model of a source; with ``on_meta=True`` only its structure, on the meta device."""


def load_sharded(
    loader: Loader,
    source: ModelSource,
    sharding: Sharding,
    *,
    key_mapping: dict[str, str] | None = None,
    lora: LoRA | None = None,
    frozen: bool = False,
) -> PreTrainedModel:
    """Load a model sharded over all ranks; collective.

    Args:
        loader: Loads the full model, or its structure alone.
        source: The model.
        sharding: How to shard it.
        key_mapping: Names of the files' tensors to replace, as in ``from_pretrained``.
        lora: Adapters to add.
        frozen: The model is not trained.

    Returns:
        The model, with the weights of ``loader(source)``.

    Raises:
        ValueError: If the source is to be quantized: quantized weights cannot be sharded.
    """
    if source.quantization is not None:
        raise ValueError(
            f"quantization={source.quantization} does not work under fsdp2, which cannot shard bitsandbytes' weights; "
            "set it to null, or train on one GPU or with trainer.strategy ddp"
        )
    folder, base = weights_folder(source), loader(source, on_meta=True)
    with readable_weights(str(folder)):
        keys = None if folder is None else stored_keys(base, folder, key_mapping)
    model = with_lora(base, lora)
    shard(model, sharding, frozen=frozen)
    allocate(model, base, sharding, frozen=frozen)
    if keys is not None:
        read_shards(model, str(folder), keys)
    else:
        scatter_from_rank_0(rank_0_state_dict(loader, source), model)
    for name, value in model.named_parameters():
        if is_adapter(name):
            copy_shard(initial_adapter(name, value.shape, 0), value)
    return model


def load_trainable(
    loader: Loader, source: ModelSource, lora: LoRA | None, sharding: Sharding | None, *, activation_checkpointing: bool
) -> PreTrainedModel:
    """A model in training mode: with adapters, sharded over ranks and with checkpointed activations, as asked for.

    Args:
        loader: Loads the model of a source.
        source: Where from.
        lora: Adapters to add.
        sharding: How to shard it; None loads the full model.
        activation_checkpointing: Store only the input of each block for the backward pass.

    Raises:
        ValueError: If weights in few bits cannot be loaded or trained so.
    """
    check_quantization(source, lora)
    model = with_lora(loader(source), lora) if sharding is None else load_sharded(loader, source, sharding, lora=lora)
    if activation_checkpointing:
        checkpoint_activations(model)
    return model.train()


def build_on_meta(loader: Loader, source: ModelSource, lora: LoRA | None) -> PreTrainedModel:
    """A model on the meta device, with its adapters."""
    return with_lora(loader(source, on_meta=True), lora)


def read_shards(model: nn.Module, folder: str, keys: dict[str, str]) -> None:
    """Fill a sharded model with this rank's shards of safetensors files; collective.

    Args:
        model: The sharded model, with or without adapters, which are not changed.
        folder: Where the files are.
        keys: Names in the files by name in the model without adapters.
    """
    shards: dict[str, Tensor] = {}
    duplicates = []  # peft trains a copy of a classifier's head and leaves the original in the model
    for name, value in model.named_parameters():
        if not is_adapter(name):
            key = keys[base_name(name)]
            if key in shards:
                duplicates.append((value.detach(), key))
            else:
                shards[key] = value.detach()
    dcp.load(shards, storage_reader=HuggingFaceStorageReader(folder))
    for duplicate, key in duplicates:
        duplicate.copy_(shards[key])


def allocate(model: nn.Module, base: PreTrainedModel, sharding: Sharding, *, frozen: bool) -> None:
    """Allocate a sharded model on the meta device, and compute the buffers that no file holds (rotary frequencies).

    Raises:
        RuntimeError: If transformers does not compute a buffer.
    """
    is_on_host = frozen and sharding.offload_frozen
    model.to_empty(device="cpu" if is_on_host else sharding.device)
    for name, buffer in list(model.named_buffers()):
        owner = model.get_submodule(name.rpartition(".")[0])
        # NaN shows below which buffers were not computed; after to_empty they would hold whatever was in memory
        empty = torch.full_like(buffer, float("nan") if buffer.is_floating_point() else 0, device=sharding.device)
        owner._buffers[name.rpartition(".")[2]] = empty
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined] # transformers then leaves it as it is
    for module in base.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
    base.initialize_weights()
    base.tie_weights()
    for name, buffer in model.named_buffers():
        if bool(buffer.isnan().any()):
            raise RuntimeError(
                f"the buffer {name} of {type(base).__name__} is in no file and transformers does not compute it, so "
                "this architecture cannot be sharded; train it under ddp"
            )


def stored_keys(model: PreTrainedModel, folder: Path, key_mapping: dict[str, str] | None) -> dict[str, str] | None:
    """Names of a model's parameters in the safetensors files of a folder.

    Returns:
        Names in the files by name in the model; None if the files lack parameters, or hold them in another form.
    """
    transforms = get_model_conversion_mapping(model, key_mapping)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    state = model.state_dict()
    names = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no dict)
                name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
                if converted is not None:
                    return None
                if name in state and list(state[name].shape) == tensors.get_slice(key).get_shape():
                    names[name] = key
    parameters = {name for name, _ in model.named_parameters()}
    has_buffers = any(name in state for name, _ in model.named_buffers())
    return names if parameters <= set(names) and not has_buffers else None


def weights_folder(source: ModelSource) -> Path | None:
    """The local folder with the safetensors files of a source; None if it has none."""
    if not source.has_weights:
        return None
    assert source.path is not None
    folder = Path(source.path).expanduser()
    if not folder.exists():
        check_reachable(source.path)
        # some repositories hold the weights a second time, in another format and under another name
        folder = Path(snapshot_download(source.path, allow_patterns=["model*.safetensors"]))
    return folder if any(folder.glob("*.safetensors")) and adapter_base(str(folder)) is None else None


def rank_0_state_dict(loader: Loader, source: ModelSource) -> dict[str, Tensor] | None:
    """The state dict of the full model on rank 0, None on the others; an error on rank 0 is raised on all ranks."""
    state, failure = None, [None]
    if dist.get_rank() == 0:
        try:
            state = loader(source).state_dict()
        except (OSError, ValueError, RuntimeError) as error:
            failure = [error]  # type: ignore[list-item]
    dist.broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]
    return state


def scatter_from_rank_0(state: dict[str, Tensor] | None, model: nn.Module) -> None:
    """Fill a sharded model with the values on rank 0, one tensor at a time; collective.

    Args:
        state: State dict of the full model on rank 0; None on the others.
        model: The sharded model, with or without adapters.
    """
    for name, value in model.named_parameters():
        if not is_adapter(name):
            assert isinstance(value, DTensor)
            device = value.device_mesh.device_type
            full = (
                torch.empty(value.shape, dtype=value.dtype, device=device) if state is None else state[base_name(name)]
            )
            copy_shard(full.to(device, value.dtype), value, from_rank_0=True)
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved:
            if state is not None:
                buffer.copy_(state[base_name(name)])
            dist.broadcast(buffer, src=0)


def sharded_frozen_copy(
    model: PreTrainedModel, loader: Loader, source: ModelSource, sharding: Sharding
) -> PreTrainedModel:
    """A copy of a sharded model that is never trained, stored in the type of the computation.

    Args:
        model: The model.
        loader: Loads its structure.
        source: Where from.
        sharding: How it is sharded.
    """
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if sharding.compute_dtype == torch.bfloat16 else "float32"
    copy = loader(replace(source, dtype=dtype), on_meta=True)
    shard(copy, sharding, frozen=True)
    allocate(copy, copy, sharding, frozen=True)
    with torch.no_grad():
        for target, value in zip(copy.parameters(), model.parameters(), strict=True):
            assert isinstance(target, DTensor)
            assert isinstance(value, DTensor)
            target.to_local().copy_(value.to_local())
        for buffer, original in zip(copy.buffers(), model.buffers(), strict=True):
            buffer.copy_(original)
    return freeze(copy)


def gather_to_rank_0(model: nn.Module, build: Callable[[], PreTrainedModel]) -> PreTrainedModel | None:
    """The full model in the host memory of rank 0; collective.

    Args:
        model: The sharded model.
        build: Builds the same model on the meta device.

    Returns:
        The copy on rank 0, None on the others.
    """
    for unit in sharded_units(model):
        unit.reshard()  # what a forward pass has left gathered is in the type of the computation
    copy = build().to_empty(device="cpu") if dist.get_rank() == 0 else None
    for named_tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
        targets = {} if copy is None else dict(named_tensors(copy, remove_duplicate=False))
        for name, value in named_tensors(model):
            full = full_tensor(value.detach())
            if copy is not None:
                targets[name].data.copy_(full)
    if copy is not None:
        copy.tie_weights()
    return copy


def copy_shard(full: Tensor, target: Tensor, *, from_rank_0: bool = False) -> None:
    """Copy this rank's shard of a full tensor.

    Args:
        full: The full tensor; on other ranks than 0 only its shape and type matter if ``from_rank_0``.
        target: A sharded parameter.
        from_rank_0: Scatter the values of rank 0; collective. Otherwise each rank has the full tensor.
    """
    assert isinstance(target, DTensor)
    source_rank = 0 if from_rank_0 else None
    sharded = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=source_rank)
    with torch.no_grad():
        target.to_local().copy_(sharded.to_local())


def peak_host_memory() -> str:
    """Peak host memory of each rank so far, GiB, as text; collective."""
    peaks = [0.0] * dist.get_world_size()
    dist.all_gather_object(peaks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    return ", ".join(f"{peak:.2f}" for peak in peaks)
