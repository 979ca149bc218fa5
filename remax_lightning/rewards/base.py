"""The one interface of every reward: text in, one number for each response out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from remax_lightning.models.parallelize import Sharding
from remax_lightning.models.tokenizer import Prompt


class Reward(ABC):
    """Scores responses to prompts."""

    def check(self) -> None:  # noqa: B027 (most rewards have nothing to check)
        """Refuse what cannot work, before a model is loaded; called where responses are going to be scored.

        Raises:
            ValueError: If an argument is wrong.
            OSError: If a file is not there.
        """

    def setup(  # noqa: B027 (a reward without a model loads nothing)
        self, device: torch.device, sharding: Sharding | None = None
    ) -> None:
        """Load what is needed; called once, before the first score.

        Args:
            device: Where the policy computes.
            sharding: How models are sharded over ranks; None where each rank has full models.
        """

    @abstractmethod
    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> Tensor:
        """Score each response.

        Args:
            prompts: B prompts, text or chat messages, as the data has them.
            responses: B responses without special tokens.
            **columns: The data's other columns, B values each, such as ``answer``.

        Returns:
            Rewards, (B,), float32; NaN where a response could not be scored: its row is dropped and counted. Other real
            types, (B, 1), any device and a list of numbers are accepted, too.
        """
