"""What turns prompts into responses."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from remax_lightning.rollout.types import Rollout, Sampling


class RolloutEngine(ABC):
    """Draws responses of a policy; with the greedy ones, if asked, in the same pass."""

    @abstractmethod
    def generate(
        self,
        policy: PreTrainedModel,
        batch: dict[str, Tensor],
        sampling: Sampling,
        *,
        stop_token_ids: Sequence[int],
        greedy: bool = True,
        greedy_max_new_tokens: int | None = None,
        seed: int = 0,
        step: int = 0,
    ) -> tuple[Rollout, Rollout | None]:
        """Draw ``num_samples`` responses for each prompt, and the greedy one.

        The responses are a function of the weights, the seed, the step and the prompt alone: not of the batch the
        prompt came in, of the number of processes, or of the state of a random generator.

        Args:
            policy: Causal language model; its weights and modes are left as they were.
            batch: ``prompt_ids`` (B, P) left-padded, ``prompt_mask`` (B, P), ``prompt_index`` (B,) a stable id.
            sampling: How to draw.
            stop_token_ids: Tokens that end a response.
            greedy: Also decode the most probable token at every position.
            greedy_max_new_tokens: Longest greedy response; the default is ``sampling.max_new_tokens``.
            seed: Key of the run.
            step: Key of the step.

        Returns:
            Sampled responses, (B * num_samples) rows with a prompt's samples adjacent; greedy responses, B rows, or
            None.

        Raises:
            ValueError: If a prompt is empty, or prompt and response do not fit the model's context.
        """
