"""Named means over rows or tokens, of all batches and processes."""

from torch import Tensor
from torchmetrics.aggregation import MeanMetric


class Means:
    """A torchmetrics mean for each name; made when first added to, emptied when computed."""

    def __init__(self) -> None:
        self.metrics: dict[str, MeanMetric] = {}

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Count values, or those where the mask is True; not-a-number is left out."""
        if name not in self.metrics:
            self.metrics[name] = MeanMetric(nan_strategy="ignore").to(values.device)
        chosen = values if mask is None else values[mask]
        self.metrics[name].update(chosen.detach().float())

    def compute(self) -> dict[str, Tensor]:
        """The means over all processes; every process has to have added to the same names."""
        means = {name: metric.compute() for name, metric in self.metrics.items()}
        for metric in self.metrics.values():
            metric.reset()
        return means
