"""The arithmetic of a plan: terms, points and phases of a step."""

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30
TERMS = (
    "master weights",
    "gradients",
    "optimizer states",
    "compute copy",
    "reference",
    "reward model",
    "value model",
    "KV cache",
    "activations",
    "head",
)
CONTEXT = 2.0
"""GiB of a GPU that CUDA, its libraries and NCCL take beside torch's tensors: an estimate, not measured yet."""
FRAGMENTATION = 0.05
"""Share of a GPU's memory lost in gaps of torch's caching allocator: an estimate, not measured yet."""


@dataclass(frozen=True)
class MemoryPoint:
    """A point of a step at which memory may be at its peak.

    Args:
        name: What happens.
        terms: Bytes by term, see TERMS.
    """

    name: str
    terms: Mapping[str, int]

    @classmethod
    def of(cls, name: str, *parts: Mapping[str, int]) -> "MemoryPoint":
        """The point whose terms are the sums of those of its parts."""
        return cls(name, {term: sum(part.get(term, 0) for part in parts) for term in TERMS})

    @property
    def total(self) -> int:
        """Bytes of all terms."""
        return sum(self.terms.values())


@dataclass(frozen=True)
class Plan:
    """The memory of one GPU over a step.

    Args:
        name: The method.
        phases: The points of each phase of the step.
    """

    name: str
    phases: Mapping[str, list[MemoryPoint]]

    @property
    def peaks(self) -> dict[str, MemoryPoint]:
        """The point of each phase with the most memory."""
        return {name: max(points, key=lambda point: point.total) for name, points in self.phases.items()}

    @property
    def peak(self) -> int:
        """The most bytes at any point."""
        return max(point.total for point in self.peaks.values())

    def fits(self, gpu_memory: float) -> bool:
        """Whether it fits into a GPU with this memory, GiB."""
        return self.peak <= usable(gpu_memory)


def usable(gpu_memory: float) -> int:
    """Bytes that torch's tensors may take of a GPU with this memory, GiB."""
    return int((gpu_memory * (1 - FRAGMENTATION) - CONTEXT) * GIB)
