"""The models of a run on the meta device, and dry runs of their passes, each built and run once."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from remax_lightning.plan.models import ModelSpec, Optimizer, Weights, frozen_bytes, gathered_bytes, weights
from remax_lightning.plan.recipe import Layout


class DryRunCache:
    """Models and dry runs by what they depend on, so that plans of many micro-batch sizes are quick."""

    def __init__(self) -> None:
        self._results: dict[str, Any] = {}

    def stored(self, spec: ModelSpec) -> PreTrainedModel:
        """A model in the type in which it is stored."""
        return self._once(("stored", spec), spec.build)

    def computing(self, spec: ModelSpec, layout: Layout) -> PreTrainedModel:
        """A model in the type in which it computes."""
        if layout.itemsize is None:
            return self.stored(spec)
        dtype = torch.bfloat16 if layout.itemsize == 2 else torch.float32
        return self._once(("computing", spec, dtype), lambda: cast(nn.Module, spec.build()).to(dtype))

    def weights(self, spec: ModelSpec, optimizer: Optimizer, layout: Layout) -> Weights:
        """What a trained model takes on one GPU."""
        sharding = (layout.shards, layout.itemsize)
        key = ("weights", spec, optimizer, sharding)
        return self._once(key, lambda: weights(self.stored(spec), optimizer, *sharding))

    def frozen(self, spec: ModelSpec, layout: Layout) -> int:
        """Bytes of a frozen model on one GPU while it is not used."""
        if layout.is_sharded and layout.offload_frozen:
            return 0
        return self._once(("frozen", spec, layout.shards), lambda: frozen_bytes(self.stored(spec), layout.shards))

    def gathered(self, spec: ModelSpec, layout: Layout) -> int:
        """Bytes of a sharded model while it is gathered; 0 if it is not sharded."""
        return 0 if layout.itemsize is None else gathered_bytes(self.stored(spec), layout.itemsize)

    def run(self, dry_pass: Callable[..., Any], spec: ModelSpec, layout: Layout, *arguments: Any) -> Any:
        """The usage of a pass of :mod:`remax_lightning.plan.passes`."""
        key = (dry_pass.__name__, spec, layout.itemsize, layout.autocast, arguments)
        model = self.computing(spec, layout)
        return self._once(key, lambda: dry_pass(model, *arguments, autocast=layout.autocast))

    def _once(self, key: object, make: Callable[[], Any]) -> Any:
        name = repr(key)  # the values of a model's configuration have no hash
        if name not in self._results:
            self._results[name] = make()
        return self._results[name]
