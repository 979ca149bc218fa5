"""Memory measured on the CPU, by what torch itself says."""

import gc

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of what is kept for the backward pass, each storage once and without parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {each.untyped_storage().data_ptr() for each in model.parameters()}
        self.kept: dict[int, Tensor] = {}
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self.parameters:
            self.kept[address] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(each.untyped_storage().nbytes() for each in self.kept.values())


class PeakMemory:
    """The most bytes that torch's allocator gave out inside of the context beyond those at its start.

    With one thread: CPU kernels have buffers for each, which a GPU has not. What earlier tests have left in reference
    cycles is freed before, or it would count as freed inside.
    """

    def __enter__(self) -> "PeakMemory":
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        gc.collect()
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.profile.__exit__(None, None, None)
        torch.set_num_threads(self.threads)
        assert self.profile.profiler is not None
        events = self.profile.profiler.kineto_results.events()
        changes = [(each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]"]
        self.peak = total = 0
        for _, change in sorted(changes, key=lambda change: change[0]):
            total += change
            self.peak = max(self.peak, total)
