"""The one interface of every reward: text in, one number for each response out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from remax_lightning.models.parallelize import Sharding
from remax_lightning.models.tokenizer import Prompt


class Reward(ABC):
    """Scores responses to prompts."""

    def setup(  # noqa: B027 (a reward without a model loads nothing)
        self, device: torch.device, sharding: Sharding | None = None
    ) -> None:
        """Load what is needed; called once before the first score.

        Args:
            device: Where the policy computes.
            sharding: How models are split over processes; None where each process has its own.
        """

    @abstractmethod
    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> Tensor:
        """Score each response.

        Args:
            prompts: B prompts, text or chat messages, as they stand in the data.
            responses: B responses without special tokens.
            **columns: The data's other columns, B values each, such as ``answer``.

        Returns:
            Rewards, (B,), float32; not-a-number where a response could not be scored: its row is dropped and counted.
        """
