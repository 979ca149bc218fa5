"""The one interface of every reward: text in, one number for each response out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from remax_lightning.models.tokenizer import Prompt


class Reward(ABC):
    """Scores responses to prompts."""

    def setup(self, device: torch.device) -> None:  # noqa: B027 (a reward without a model loads nothing)
        """Load what is needed, on the device of the policy; called once before the first score."""

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
