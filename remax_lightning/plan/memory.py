"""The arithmetic of a plan: terms, moments and phases, and the head, whose memory no layer has a part in."""

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
CHUNK = 2048
"""Tokens whose logits exist at once on a GPU, see :mod:`remax_lightning.functional.fused_head`."""
BLOCK = 2**25
"""Logits that are in float32 at once on a GPU."""
CONTEXT = 2.0
"""What CUDA, its libraries and NCCL take of a GPU beside torch's tensors, GiB."""
FRAGMENTATION = 0.05
"""Part of a GPU's memory that torch's allocator cannot use for what is asked of it."""


@dataclass(frozen=True)
class Moment:
    """A point of a step at which memory may be at its peak.

    Args:
        name: What happens.
        terms: Bytes by term, see TERMS.
    """

    name: str
    terms: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of all terms."""
        return sum(self.terms.values())


@dataclass(frozen=True)
class Phase:
    """A part of a step.

    Args:
        name: Its name.
        moments: Where its peak may be.
    """

    name: str
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        """The moment that takes most."""
        return max(self.moments, key=lambda moment: moment.total)


@dataclass(frozen=True)
class Plan:
    """The memory of one GPU over a step.

    Args:
        name: The method.
        phases: The parts of a step.
    """

    name: str
    phases: tuple[Phase, ...]

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of all."""
        return max(phase.peak.total for phase in self.phases)

    def fits(self, gpu_memory: float) -> bool:
        """Whether it fits into a GPU of so many GiB."""
        return self.peak <= usable(gpu_memory)


def usable(gpu_memory: float) -> int:
    """Bytes that torch's tensors may take of a GPU.

    Args:
        gpu_memory: Memory of the GPU, GiB.
    """
    return int((gpu_memory * (1 - FRAGMENTATION) - CONTEXT) * GIB)


def moment(name: str, *parts: Mapping[str, int]) -> Moment:
    """A moment whose terms are the sums of those of its parts."""
    return Moment(name, {term: sum(part.get(term, 0) for part in parts) for term in TERMS})


@dataclass(frozen=True)
class Head:
    """The head of a language model and how it is computed.

    Args:
        hidden_size: Numbers in a hidden state, H.
        vocabulary: Rows of the head, V.
        itemsize: Bytes of a number in its matrix products.
        input_itemsize: Bytes of a number in the hidden states and the weight as they come; more than ``itemsize``
            under autocast, which makes copies.
        is_trained: Whether its weight has a gradient.
        chunk: Tokens whose logits exist at once.
        block: Logits that are in float32 at once.
    """

    hidden_size: int
    vocabulary: int
    itemsize: int
    input_itemsize: int
    is_trained: bool
    chunk: int = CHUNK
    block: int = BLOCK

    @property
    def weight(self) -> int:
        """Numbers in the weight."""
        return self.hidden_size * self.vocabulary

    def training(self, tokens: int) -> int:
        """Most bytes while a micro-batch of so many response tokens goes through the head.

        The hidden states of the tokens and their gradient, the gradient of the weight in float32, and the larger of
        what a chunk takes in the softmax and in its gradient's matrix products.
        """
        rows = min(self.chunk, tokens)
        logits = rows * self.vocabulary * self.itemsize
        block = min(max(1, self.block // self.vocabulary), rows)
        wide = block * self.vocabulary * 4 * (1 if block == rows else 2)  # one block is held until the next is there
        softmax = wide * (2 if self.itemsize < 4 else 1)
        products = rows * self.hidden_size * (2 * self.itemsize + 4)
        if self.is_trained and self.itemsize < 4:
            products += self.weight * self.itemsize
        working = self._inputs(tokens) + logits + rows * self.hidden_size * self.itemsize + max(softmax, products)
        return working + self._gradients(tokens)

    def backward(self, tokens: int) -> int:
        """Most bytes while the head's gradients are handed on: the weight's in float32 and in its own type."""
        own = self.weight * self.itemsize if self.is_trained and self.itemsize < 4 else 0
        return self._gradients(tokens) + own

    def scoring(self, tokens: int) -> int:
        """Most bytes while the log-probs of so many tokens are computed without gradient."""
        rows = min(self.chunk, tokens)
        wide = min(max(1, self.block // self.vocabulary), rows) * self.vocabulary * 4
        logits = rows * self.vocabulary * self.itemsize
        hidden = rows * self.hidden_size * self.itemsize
        return self._inputs(tokens) + logits + hidden + wide * (2 if self.itemsize < 4 else 1)

    def _inputs(self, tokens: int) -> int:
        copies = (
            0 if self.input_itemsize == self.itemsize else (tokens * self.hidden_size + self.weight) * self.itemsize
        )
        return tokens * self.hidden_size * self.input_itemsize + copies

    def _gradients(self, tokens: int) -> int:
        return tokens * self.hidden_size * self.itemsize + (self.weight * 4 if self.is_trained else 0)
