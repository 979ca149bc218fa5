"""The models of a run on the meta device, and dry runs of their passes, each built and measured once."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from remax_lightning.models.lora import LoRA, with_lora
from remax_lightning.models.parallelize import checkpoint_activations
from remax_lightning.models.source import ModelSource
from remax_lightning.plan.memory import Head
from remax_lightning.plan.models import Optimizer, Weights, build, frozen_bytes, gathered_bytes, weights
from remax_lightning.plan.passes import plain_head
from remax_lightning.plan.recipe import Layout


@dataclass(frozen=True)
class Body:
    """A model of a run.

    Args:
        source: Where it comes from.
        name: Its argument in the configuration.
        is_scalar: It has a scalar head.
        label: The label of a classifier with several, as in ModelReward.
        is_trained: It has gradients.
        is_checkpointed: Its blocks compute their activations again.
        lora: Adapters that are trained in place of its weights.
    """

    source: ModelSource
    name: str
    is_scalar: bool = False
    label: int | None = None
    is_trained: bool = False
    is_checkpointed: bool = False
    lora: LoRA | None = None

    def build(self) -> PreTrainedModel:
        """The model on the meta device, in the type in which it is kept."""
        model = build(self.source, self.name, scalar=self.is_scalar, label=self.label)
        model = with_lora(model, None if self.lora is None else replace(self.lora, merge=True))
        if self.is_checkpointed:
            checkpoint_activations(model)
        return model.train() if self.is_trained else model.requires_grad_(False).eval()


class Bench:
    """Remembers what was built and measured, so that plans of many micro-batch sizes are quick."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def kept(self, body: Body) -> PreTrainedModel:
        """A model in the type in which it is kept."""
        return self._once(("kept", body), body.build)

    def computing(self, body: Body, layout: Layout) -> PreTrainedModel:
        """A model in the type in which it computes."""
        if not layout.is_sharded:
            return self.kept(body)
        dtype = torch.bfloat16 if layout.itemsize == 2 else torch.float32
        return self._once(("computing", body, dtype), lambda: cast(nn.Module, body.build()).to(dtype))

    def weights(self, body: Body, optimizer: Optimizer, layout: Layout) -> Weights:
        """What a trained model takes on one GPU."""
        itemsize = layout.itemsize if layout.is_sharded else None
        key = ("weights", body, optimizer, layout.shards, itemsize)
        return self._once(key, lambda: weights(self.kept(body), optimizer, layout.shards, itemsize))

    def frozen(self, body: Body, layout: Layout) -> int:
        """Bytes of a frozen model on one GPU while it is not used."""
        if layout.is_sharded and layout.offload_frozen:
            return 0
        return self._once(("frozen", body, layout.shards), lambda: frozen_bytes(self.kept(body), layout.shards))

    def gathered(self, body: Body, layout: Layout) -> int:
        """Bytes of a model put together for its use; 0 if it was not split."""
        return gathered_bytes(self.kept(body), layout.itemsize) if layout.is_sharded else 0

    def run(self, dry_pass: Callable[..., Any], body: Body, layout: Layout, *arguments: Any) -> Any:
        """What a dry run of a pass of :mod:`remax_lightning.plan.passes` takes."""
        key = (dry_pass.__name__, body, layout.is_sharded, layout.itemsize, layout.autocast, arguments)
        model = self.computing(body, layout)
        return self._once(key, lambda: dry_pass(model, *arguments, autocast=layout.autocast))

    def head(self, body: Body, layout: Layout) -> Head | None:
        """The head of a language model; None if it is part of the model's passes."""
        model = self.computing(body, layout)
        head: nn.Linear | None = self._once(("head", body, layout.is_sharded), lambda: plain_head(model))
        if head is None:
            return None
        given = head.weight.element_size()
        return Head(
            hidden_size=head.in_features,
            vocabulary=head.out_features,
            itemsize=2 if layout.autocast else given,
            input_itemsize=given,
            is_trained=head.weight.requires_grad,
        )

    def _once(self, key: object, make: Callable[[], Any]) -> Any:
        name = repr(key)
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]
