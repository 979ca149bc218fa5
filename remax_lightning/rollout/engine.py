"""What turns prompts into responses."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from remax_lightning.rollout.types import Responses, Samples, Sampling


class RolloutEngine(ABC):
    """Draws responses of a policy.

    Responses are a function of the weights, the seed, the step and the prompt alone: not of the batch the prompt came
    in, of the number of ranks, or of the state of a random generator.
    """

    def check(self, *, is_sharded: bool) -> None:  # noqa: B027 (most engines work with both)
        """Refuse what this engine cannot decode, before a model is loaded.

        Args:
            is_sharded: Whether models are sharded over ranks.

        Raises:
            ValueError: If it cannot.
        """

    @abstractmethod
    def sample(
        self,
        policy: PreTrainedModel,
        batch: dict[str, Tensor],
        sampling: Sampling,
        *,
        stop_token_ids: Sequence[int],
        seed: int = 0,
        step: int = 0,
    ) -> Samples:
        """Draw ``num_samples`` responses to each prompt.

        Args:
            policy: Causal language model; its weights and modes do not change.
            batch: ``prompt_ids`` (B, P) left-padded, ``prompt_mask`` (B, P), ``prompt_index`` (B,) a stable id.
            sampling: How to draw.
            stop_token_ids: Tokens that end a response.
            seed: Key of the run.
            step: Key of the step.

        Returns:
            B * num_samples rows; a prompt's samples are adjacent.

        Raises:
            ValueError: If a prompt is empty, or prompt and response do not fit the model's context.
        """

    @abstractmethod
    def sample_and_greedy(
        self,
        policy: PreTrainedModel,
        batch: dict[str, Tensor],
        sampling: Sampling,
        *,
        stop_token_ids: Sequence[int],
        greedy_max_new_tokens: int | None = None,
        seed: int = 0,
        step: int = 0,
    ) -> tuple[Samples, Responses]:
        """Draw as :meth:`sample` does, and decode the most probable token at every position.

        Args:
            policy: Causal language model; its weights and modes do not change.
            batch: B prompts.
            sampling: How to draw.
            stop_token_ids: Tokens that end a response.
            greedy_max_new_tokens: Longest greedy response; the default is ``sampling.max_new_tokens``.
            seed: Key of the run.
            step: Key of the step.

        Returns:
            B * num_samples sampled rows, and B greedy rows.

        Raises:
            ValueError: If a prompt is empty, or prompt and response do not fit the model's context.
        """
