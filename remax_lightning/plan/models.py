"""Models without weights: their architecture, and the bytes that their parameters and optimizer take on one GPU."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from remax_lightning.models.lora import LoRA, with_lora
from remax_lightning.models.parallelize import blocks, checkpoint_activations
from remax_lightning.models.source import ModelSource, without_dropout

EIGHT_BIT = ("torchao", "bitsandbytes")
SCALE_BLOCK = 256
"""Values that share a float32 scale: the default block size of the 8-bit optimizers of torchao and bitsandbytes."""


@dataclass(frozen=True)
class ModelSpec:
    """A model of a run.

    Args:
        source: Where it comes from.
        name: Its argument in the configuration.
        is_scalar: Whether it has a scalar head in place of the language model's.
        label: The label of a classifier with several, as in ModelReward.
        is_trained: Whether it has gradients.
        is_checkpointed: Whether its blocks compute their activations again.
        lora: Adapters that are trained in place of its weights.
    """

    source: ModelSource
    name: str
    is_scalar: bool = False
    label: int | None = None
    is_trained: bool = False
    is_checkpointed: bool = False
    lora: LoRA | None = None

    def load_config(self) -> PretrainedConfig:
        """The model's configuration, from this machine alone.

        Raises:
            ValueError: If it would have to be downloaded.
        """
        source, overrides = self.source, {"num_labels": 1} if self.is_scalar and self.label is None else {}
        folder = source.path if source.architecture is None else source.architecture
        needs_tokenizer = source.tiny or (source.config is not None and "vocab_size" not in source.config)
        tokenizer = source.path if source.tokenizer is None else source.tokenizer
        if source.config is None and not _is_folder(folder):
            raise ValueError(
                f"plan downloads nothing and {folder} is no local folder with a config.json, so the size of "
                f"{self.name} is not known; give {self.name}.architecture, a folder with the config.json"
            )
        if needs_tokenizer and not _is_folder(tokenizer):
            raise ValueError(
                f"plan downloads nothing, so the vocabulary of {self.name} is not known; give "
                f"{self.name}.config.vocab_size or a local folder as {self.name}.tokenizer, got {tokenizer}"
            )
        if source.config is None or needs_tokenizer:
            return source.load_config(**overrides)
        values: dict[str, Any] = {**source.config, **overrides}
        return without_dropout(AutoConfig.for_model(**values))

    def build(self) -> PreTrainedModel:
        """The model on the meta device, in the type in which its parameters are stored."""
        config = self.load_config()
        options: dict[str, Any] = {"dtype": self.source.torch_dtype}
        if self.source.attn_implementation == "eager":  # all others are planned as one fused kernel
            options["attn_implementation"] = "eager"
        if self.is_scalar:
            config.use_cache = False
        with torch.device("meta"):
            auto_class = AutoModelForSequenceClassification if self.is_scalar else AutoModelForCausalLM
            model = auto_class.from_config(config, **options)
        # merge=True: where the base is on disk matters to an export, not to a plan
        model = with_lora(model, None if self.lora is None else replace(self.lora, merge=True))
        if self.is_checkpointed:
            checkpoint_activations(model)
        return model.train() if self.is_trained else model.requires_grad_(False).eval()


def _is_folder(path: object) -> bool:
    return isinstance(path, str) and Path(path).expanduser().is_dir()


def import_class(class_path: str) -> Any:
    """The class with this full name."""
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


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
        """Whether its two moments are stored in 8 bits."""
        return self.class_path.split(".")[0] in EIGHT_BIT and "8bit" in self.class_path.lower()

    @property
    def steps_in_place(self) -> bool:
        """Whether a step makes no copy of the moments, as torch's default for unsharded parameters on a GPU does."""
        name = self.class_path.rpartition(".")[2]
        return name in ("FusedAdamW", "SGD") or self.init_args.get("fused") is True or self.is_8bit

    def state_bytes(self, parameters: list[nn.Parameter]) -> int:
        """Bytes of the states of parameters on the meta device, found by taking one step with them.

        8-bit optimizers need a GPU for that; they are counted as two moments of one byte and the scales.
        """
        if self.is_8bit:
            return sum(2 * each.numel() + 2 * 4 * -(-each.numel() // SCALE_BLOCK) for each in parameters)
        arguments = {key: value for key, value in self.init_args.items() if key != "fused"}  # it changes no state
        stepper = import_class(self.class_path)(parameters, **arguments)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        stepper.step()
        states = [value for state in stepper.state.values() for value in state.values()]
        return sum(value.nbytes for value in states if isinstance(value, torch.Tensor))


@dataclass(frozen=True)
class Weights:
    """What the parameters of a trained model take on one GPU, bytes.

    Attributes:
        masters: Parameters as they are stored.
        gradients: Gradients as the optimizer sees them.
        optimizer: States of the optimizer.
        step: Temporary copies of the optimizer's step.
        unsharded_gradients: Gradients before they are reduced to shards, float32.
        gathered: The unsharded model in the type of the computation, if it is sharded.
        working: What is gathered of it in training: what is outside of its blocks, and two blocks.
        reduced: Gradients of two blocks while they are reduced to shards, in both types.
        head: Gradient of the head's weight in the type of the computation, until the end of the backward pass.
    """

    masters: int
    gradients: int
    optimizer: int
    step: int
    unsharded_gradients: int
    gathered: int = 0
    working: int = 0
    reduced: int = 0
    head: int = 0


def weights(model: PreTrainedModel, optimizer: Optimizer, shards: int, itemsize: int | None) -> Weights:
    """What a trained model takes on one GPU.

    Args:
        model: The model on the meta device, in the type in which it is stored.
        optimizer: What trains it.
        shards: GPUs that it is sharded over.
        itemsize: Bytes of a number in the computation, if it is sharded by FSDP2; None if it is not.
    """
    trained = [each for each in model.parameters() if each.requires_grad]
    gradients = sum(_shard(each, shards).nbytes for each in trained)
    result = Weights(
        masters=frozen_bytes(model, shards),
        gradients=gradients,
        optimizer=optimizer.state_bytes([_shard(each, shards) for each in trained]),
        step=0 if itemsize is not None or optimizer.steps_in_place else gradients,
        unsharded_gradients=4 * sum(each.numel() for each in trained),
    )
    if itemsize is None:
        return result
    sizes = [sum(each.numel() for each in block.parameters()) for block in blocks(model)]
    learned = [sum(each.numel() for each in block.parameters() if each.requires_grad) for block in blocks(model)]
    gathered, head = gathered_bytes(model, itemsize), model.get_output_embeddings()
    return replace(
        result,
        gathered=gathered,
        working=gathered - sum(sorted(sizes)[:-2]) * itemsize,
        reduced=sum(sorted(learned)[-2:]) * (itemsize + 4),
        head=head.weight.numel() * itemsize if head is not None and head.weight.requires_grad else 0,
    )


def frozen_bytes(model: nn.Module, shards: int) -> int:
    """Bytes of a model's parameters on one of the GPUs that it is sharded over."""
    return sum(_shard(each, shards).nbytes for each in model.parameters())


def gathered_bytes(model: nn.Module, itemsize: int) -> int:
    """Bytes of an unsharded model in the type of the computation."""
    return sum(each.numel() for each in model.parameters()) * itemsize


def _shard(parameter: nn.Parameter, shards: int) -> nn.Parameter:
    """The first GPU's shard of a parameter, which FSDP2 cuts along the first dimension."""
    if shards == 1 or parameter.dim() == 0:
        return parameter
    shape = (-(-parameter.shape[0] // shards), *parameter.shape[1:])
    return nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"))
