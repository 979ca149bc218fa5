"""Low-rank adapters: they alone are trained, and without them the policy is its own reference.

There is no dropout on the adapters: a rollout has none, so training must have none either (see ModelSource).
"""

import copy
import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from remax_lightning.models.adapter_folder import absolute, adapter_base
from remax_lightning.models.adapter_names import base_name, is_adapter
from remax_lightning.models.source import ModelSource
from remax_lightning.models.weight_sample import weight_sample


@dataclass(frozen=True)
class LoRA:
    """Train low-rank adapters on frozen weights: the update of a layer's weight is alpha / rank * B A.

    Args:
        rank: Rows of A and columns of B, at least 1.
        alpha: The update is scaled by alpha / rank, so that a learning rate suits every rank; above 0.
        target_modules: Ends of the names of the linear layers that get an adapter, such as ``q_proj``. The default is
            every linear layer of every block; neither the embeddings nor the head.
        merge: Export the base with the adapters merged into it, an ordinary folder; or, if false, the adapters alone,
            which need the base to be loaded.

    Raises:
        ValueError: If an argument is out of its range.

    Reference: Hu et al. 2021, arXiv 2106.09685.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: list[str] | None = None
    merge: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"the rank of an adapter must be at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"the alpha of an adapter must be above 0 and finite, got {self.alpha}")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("target_modules names no layer; null means every linear layer of every block")


def check_quantization(source: ModelSource, lora: LoRA | None) -> None:
    """Refuse to train quantized weights, or to quantize random ones.

    Raises:
        ValueError: If the source is quantized and there are no adapters to train, or no weights to load.
    """
    if source.quantization is None:
        return
    if lora is None:
        raise ValueError(
            f"weights in {source.quantization} cannot be trained, only adapters on them; set lora, or drop quantization"
        )
    if source.path is None:
        raise ValueError("quantization is of weights that are loaded from a path; drop it, or config")


def add_lora(model: PreTrainedModel, lora: LoRA, seed: int = 0) -> PeftModel:
    """Freeze a model and put fresh adapters on it; until they are trained they change nothing.

    A classifier's scalar head is trained as it is, without an adapter.

    Args:
        model: Causal language model or sequence classifier; it is changed in place. On the meta device its adapters
            stay there too, for :func:`init_adapters` once there is memory for them.
        lora: Which adapters.
        seed: Key of their random values.

    Returns:
        The model with adapters; what is trained is float32, whatever the frozen weights are.

    Raises:
        ValueError: If the target modules match no linear layer or a head that is tied to the embeddings, or if the
            adapters are to be exported alone and their base is in no folder.
    """
    if not lora.merge:
        _check_base(model.name_or_path)
    targets = _targets(model, lora)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),  # peft divides by the rank, nothing else
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for name, module in _matches(model, targets)),
        task_type=TaskType.CAUSAL_LM if model.get_output_embeddings() is not None else TaskType.SEQ_CLS,
    )
    with warnings.catch_warnings():
        # peft calls a function of transformers by a deprecated name
        warnings.simplefilter("ignore", FutureWarning)
        # from the global generator nothing is drawn on the meta device
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    config.base_model_name_or_path = absolute(model.name_or_path or "")
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            for matrices in (module.lora_A, module.lora_B):
                matrices.to_empty(device=cast(nn.Linear, module.get_base_layer()).weight.device)
        elif isinstance(module, ModulesToSaveWrapper):
            for head in module.modules_to_save.values():
                head.float().register_forward_pre_hook(_in_own_type)
    init_adapters(adapted, seed)
    return cast(PeftModel, adapted.train(model.training))


def with_lora(model: PreTrainedModel, lora: LoRA | None) -> PreTrainedModel:
    """The model with fresh adapters, or as it is if there are to be none."""
    return model if lora is None else cast(PreTrainedModel, add_lora(model, lora))


def base_samples(model: nn.Module) -> dict[str, dict[str, Any]]:
    """A sample of the weights under adapters by their name, see :func:`weight_sample`; none without; collective."""
    if not isinstance(model, PeftModel):
        return {}
    return {f"the {type(model.get_base_model()).__name__} under the adapters": weight_sample(model)}


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int) -> None:
    """Fresh adapters, and a classifier's trained head as that of the base; what is on the meta device stays as it is.

    Args:
        model: Model with adapters, not sharded.
        seed: Key of the random values.
    """
    for name, parameter in model.named_parameters():
        if is_adapter(name) and not parameter.is_meta:
            parameter.copy_(initial_adapter(name, parameter.shape, seed))
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for trained in module.modules_to_save.values():
                for target, source in zip(trained.parameters(), module.original_module.parameters(), strict=True):
                    target.copy_(source)


def initial_adapter(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Values that an adapter's matrix starts with: peft's, A uniform within 1 / sqrt(columns) and B zero.

    They are a function of the arguments alone, so they depend neither on the order in which a model is built nor on the
    world size.

    Args:
        name: Name of the parameter in the model with adapters.
        shape: Its unsharded shape, (rank, in) or (out, rank).
        seed: Key of all adapters.

    Returns:
        Values, float32, on the CPU.
    """
    values = torch.zeros(tuple(shape))
    if ".lora_A." in name:
        key = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little"))
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    return values


def leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Drop parameters that are not trained from a state dict; a resumed run loads them from their source again."""
    frozen = {id(value) for value in module.parameters() if not value.requires_grad}
    for name, value in module.named_parameters(remove_duplicate=False):
        if id(value) in frozen:
            state.pop(prefix + name, None)


@contextmanager
def without_adapters(model: PeftModel) -> Iterator[PeftModel]:
    """Inside the context the model is its base, the head of a classifier included: the reference policy.

    No parameter is touched: peft's ``disable_adapter`` freezes the adapters and afterwards makes all of them trainable,
    also those that were frozen before.

    Raises:
        ValueError: If the model has no adapters.
    """
    layers = [module for module in model.modules() if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper))]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapters, so it is not its own reference; see add_lora")
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield model
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def merged(model: PeftModel) -> PreTrainedModel:
    """An ordinary model with the adapters merged into its weights; the argument is not changed.

    The copy is in CPU memory and takes as much of it as the model without adapters, plus its largest matrix; that of a
    quantized model is on the model's device, in its ``dtype``. Weights in bfloat16 round the update.

    Raises:
        ValueError: If an adapter is not finite.
    """
    if all(parameter.is_floating_point() for parameter in model.parameters()):
        tensors = chain(model.parameters(), model.buffers())
        memo: dict[int, object] = {id(tensor): _on_cpu(tensor) for tensor in tensors}
        return merge_in_place(copy.deepcopy(model, memo))
    return _merge_dequantized(copy.deepcopy(model))


def merge_in_place(model: PeftModel) -> PreTrainedModel:
    """The base with the adapters merged into it, all of it trainable; the argument must not be used afterwards."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.to(next(module.original_module.parameters()).dtype)
    plain = model.merge_and_unload(safe_merge=True)
    return cast(PreTrainedModel, plain.requires_grad_(True))


@torch.no_grad()
def _merge_dequantized(model: PeftModel) -> PreTrainedModel:
    """The dequantized base with the adapters added to it; the argument must not be used afterwards."""
    dtype, layers = model.dtype, [(name, each) for name, each in model.named_modules() if isinstance(each, LoraLayer)]
    plain = cast(PreTrainedModel, model.unload().dequantize(dtype))
    for name, layer in layers:
        update = cast(Linear, layer).get_delta_weight("default")
        cast(nn.Linear, plain.get_submodule(base_name(name))).weight.add_(update)
    return plain.to(dtype).requires_grad_(True)


def _on_cpu(tensor: Tensor) -> Tensor:
    values = tensor.detach().to("cpu", copy=True)
    return nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _in_own_type(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs of a head in the type of its weights."""
    dtype = next(head.parameters()).dtype
    return tuple(each.to(dtype) for each in inputs)


def _check_base(path: str | None) -> None:
    if not path or adapter_base(path) is not None:
        origin = f"merged from the adapter folder {path}" if path else "built from a configuration"
        raise ValueError(
            f"merge=False exports adapters alone, but the model under them was {origin}, so they could not be loaded "
            "again; set merge=True"
        )


def _targets(model: PreTrainedModel, lora: LoRA) -> list[str]:
    """Ends of names by which peft finds the layers that get an adapter, and no others."""
    if lora.target_modules is None:
        blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
        chosen = [name for name, module in _linear_layers(model) if name.startswith(blocks)]
        ends = _ends(chosen)
        return ends if {name for name, _ in _matches(model, ends)} == set(chosen) else chosen
    for target in lora.target_modules:
        matches = [module for _, module in _matches(model, [target])]
        if not matches or not all(isinstance(module, nn.Linear | Conv1D) for module in matches):
            names = ", ".join(_ends([name for name, _ in _linear_layers(model)]))
            raise ValueError(
                f"target_modules has {target!r}, but no linear layer of {type(model).__name__} has a name that ends "
                f"so; choose from {names}"
            )
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is cast(nn.Embedding, model.get_input_embeddings()).weight
    if is_tied and any(module is head for _, module in _matches(model, lora.target_modules)):
        raise ValueError(
            f"the head of {type(model).__name__} shares its weight with the embeddings, so an adapter on it could not "
            "be merged; take it out of target_modules"
        )
    return lora.target_modules


def _linear_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _matches(model: nn.Module, targets: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The modules that peft finds by ends of their names."""
    ends = tuple(f".{target}" for target in targets)
    return [(name, module) for name, module in model.named_modules() if f".{name}".endswith(ends)]


def _ends(names: Sequence[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
