"""Named means over rows or tokens, of all batches and ranks."""

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor, device
from torchmetrics.aggregation import MeanMetric


class Means:
    """A torchmetrics mean for each name, created when first added to and dropped when computed."""

    def __init__(self) -> None:
        self.metrics: dict[str, MeanMetric] = {}

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Add values, or those where the mask is True; NaN is left out."""
        chosen = values if mask is None else values[mask]
        self._metric(name, values.device).update(chosen.detach().float())

    def add_all(self, values: Mapping[str, Tensor]) -> None:
        """Add values by name."""
        for name, each in values.items():
            self.add(name, each)

    def compute(self, on: device) -> dict[str, Tensor]:
        """The means over all ranks, in the order of the names; collective.

        Ranks may have added to different names: torchmetrics would wait forever for a rank that lacks one.

        Args:
            on: Device of metrics that this rank has not added to.
        """
        names = {*self.metrics}
        if dist.is_available() and dist.is_initialized():
            of_ranks: list[set[str]] = [set()] * dist.get_world_size()
            dist.all_gather_object(of_ranks, names)
            names = names.union(*of_ranks)
        means = {name: self._metric(name, on).compute() for name in sorted(names)}
        self.metrics = {}  # not reset: what was updated in inference mode can be updated in no other mode
        return means

    def _metric(self, name: str, on: device) -> MeanMetric:
        if name not in self.metrics:
            self.metrics[name] = MeanMetric(nan_strategy="ignore").to(on)
        return self.metrics[name]
