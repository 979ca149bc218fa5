"""Models without weights: their architecture, and the bytes that their parameters and optimizer take on one GPU."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from remax_lightning.models.parallelize import blocks
from remax_lightning.models.source import ModelSource, without_dropout

EIGHT_BIT = ("torchao", "bitsandbytes")
BLOCK = 256
"""Values that share a scale in an 8-bit optimizer."""


@dataclass(frozen=True)
class Optimizer:
    """An optimizer as the configuration names it.

    Args:
        class_path: Full name of the class.
        init_args: Its arguments beside the parameters.
    """

    class_path: str
    init_args: Mapping[str, Any]

    @property
    def is_8bit(self) -> bool:
        """Whether it keeps its two moments in 8 bit."""
        return self.class_path.split(".")[0] in EIGHT_BIT and "8bit" in self.class_path.lower()


@dataclass(frozen=True)
class Weights:
    """What the parameters of a model take on one GPU, bytes.

    Attributes:
        parameters: Number of parameters of the whole model.
        masters: Parameters as they are kept.
        gradients: Gradients of what is trained, as the optimizer sees them.
        optimizer: States of the optimizer.
        step: Made by the optimizer while it steps.
        whole_gradients: Gradients of what is trained before they are split over GPUs, float32.
        gathered: The whole model in the type of the computation, if it is split over GPUs.
        working: What is gathered of it while it is trained: what is outside of its blocks, and two blocks.
        reduced: Gradients of two blocks on their way to being split, in both types.
        head: Gradient of the head's weight in the type of the computation, until the end of the backward pass.
    """

    parameters: int
    masters: int
    gradients: int
    optimizer: int
    step: int
    whole_gradients: int
    gathered: int = 0
    working: int = 0
    reduced: int = 0
    head: int = 0


def load_config(source: ModelSource, name: str, **overrides: Any) -> PretrainedConfig:
    """The configuration of a model, from this machine alone.

    Args:
        source: The model.
        name: Its argument in the configuration of the run, for messages.
        **overrides: Values of the configuration.

    Raises:
        ValueError: If it would have to be downloaded.
    """
    folder = source.path if source.architecture is None else source.architecture
    needs_tokenizer = source.tiny or (source.config is not None and "vocab_size" not in source.config)
    tokenizer = source.path if source.tokenizer is None else source.tokenizer
    if source.config is None and not _is_folder(folder):
        raise ValueError(
            f"plan downloads nothing and {folder} is no local folder with a config.json, so the size of {name} is not "
            f"known; give {name}.architecture, a folder with the config.json"
        )
    if needs_tokenizer and not _is_folder(str(tokenizer)):
        raise ValueError(
            f"plan downloads nothing, so the vocabulary of {name} is not known; give {name}.config.vocab_size or a "
            f"local folder as {name}.tokenizer, got {tokenizer}"
        )
    if source.config is None or needs_tokenizer:
        return source.load_config(**overrides)
    return without_dropout(AutoConfig.for_model(**{**source.config, **overrides}))


def _is_folder(path: str | None) -> bool:
    return path is not None and Path(path).expanduser().is_dir()


def build(source: ModelSource, name: str, *, scalar: bool = False, label: int | None = None) -> PreTrainedModel:
    """A model on the meta device.

    Args:
        source: The model.
        name: Its argument in the configuration of the run, for messages.
        scalar: With a scalar head in place of the language model's.
        label: The label of a classifier with several, as in ModelReward.
    """
    labels = {"num_labels": 1} if scalar and label is None else {}
    config = load_config(source, name, **labels)
    if scalar:
        config.use_cache = False
    options: dict[str, Any] = {"dtype": source.torch_dtype}
    if source.attn_implementation == "eager":
        options["attn_implementation"] = "eager"
    if scalar and config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = 0
    model_class = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    with torch.device("meta"):
        return cast(PreTrainedModel, model_class.from_config(config, **options))


def frozen_bytes(model: nn.Module, shards: int) -> int:
    """Bytes of the parameters of a model on one of the GPUs that it is split over."""
    return sum(_shard(each, shards).numel() * each.element_size() for each in model.parameters())


def gathered_bytes(model: nn.Module, itemsize: int) -> int:
    """Bytes of a whole model in the type of the computation."""
    return sum(each.numel() for each in model.parameters()) * itemsize


def weights(model: PreTrainedModel, optimizer: Optimizer, shards: int, itemsize: int | None) -> Weights:
    """What a trained model takes on one GPU.

    Args:
        model: The model on the meta device, in the type in which it is kept.
        optimizer: What trains it.
        shards: GPUs that it is split over.
        itemsize: Bytes of a number in the computation, if it is split by FSDP2; None if it is not.
    """
    trained = [each for each in model.parameters() if each.requires_grad]
    gradients = sum(_shard(each, shards).numel() * each.element_size() for each in trained)
    states = optimizer_bytes(optimizer, [_shard(each, shards) for each in trained])
    whole = 4 * sum(each.numel() for each in trained)
    kept = {
        "parameters": sum(each.numel() for each in model.parameters()),
        "masters": frozen_bytes(model, shards),
        "gradients": gradients,
        "optimizer": states,
        "whole_gradients": whole,
    }
    if itemsize is None:
        return Weights(**kept, step=0 if _steps_in_place(optimizer) else gradients)
    sizes = [sum(each.numel() for each in block.parameters()) for block in blocks(model)]
    learned = [sum(each.numel() for each in block.parameters() if each.requires_grad) for block in blocks(model)]
    outside = kept["parameters"] - sum(sizes)
    head = model.get_output_embeddings()
    return Weights(
        **kept,
        step=0,
        gathered=gathered_bytes(model, itemsize),
        working=(outside + sum(sorted(sizes)[-2:])) * itemsize,
        reduced=sum(sorted(learned)[-2:]) * (itemsize + 4),
        head=head.weight.numel() * itemsize if head is not None and head.weight.requires_grad else 0,
    )


def optimizer_bytes(optimizer: Optimizer, parameters: list[nn.Parameter]) -> int:
    """Bytes that an optimizer keeps for parameters on the meta device: it takes one step with them.

    Those of 8-bit optimizers, which need a GPU, are counted as two moments of a byte and their scales.
    """
    if optimizer.is_8bit:
        return sum(2 * each.numel() + 2 * 4 * -(-each.numel() // BLOCK) for each in parameters)
    module, _, name = optimizer.class_path.rpartition(".")
    arguments = {key: value for key, value in optimizer.init_args.items() if key != "fused"}  # it changes no state
    stepper = getattr(importlib.import_module(module), name)(parameters, **arguments)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    stepper.step()
    states = [value for state in stepper.state.values() for value in state.values()]
    return sum(value.nbytes for value in states if isinstance(value, torch.Tensor))


def _steps_in_place(optimizer: Optimizer) -> bool:
    """Whether a step makes no copy of the moments, as torch's default for unsharded parameters on a GPU does."""
    name = optimizer.class_path.rpartition(".")[2]
    return name in ("FusedAdamW", "SGD") or optimizer.init_args.get("fused") is True or optimizer.is_8bit


def _shard(parameter: nn.Parameter, shards: int) -> nn.Parameter:
    """The first GPU's slice of a parameter, which is split along its first dimension."""
    if shards == 1 or parameter.dim() == 0:
        return parameter
    shape = (-(-parameter.shape[0] // shards), *parameter.shape[1:])
    return nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"))
