"""A trained reward model as a reward."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from remax_lightning.functional.sequence import right_pad
from remax_lightning.models.language_model import context_length, freeze
from remax_lightning.models.scalar_model import load_reward_model, sequence_scores
from remax_lightning.models.source import ModelSource, existing
from remax_lightning.models.tokenizer import Prompt, encode_prompt, encode_response
from remax_lightning.rewards.base import Reward


class ModelReward(Reward):
    """Reward by a Hugging Face sequence-classification model with one label, through its own tokenizer and template.

    A text prompt is scored as prompt, response and end-of-sequence token; chat messages through the chat template.

    Args:
        path: Folder or hub name of the reward model, such as the ``hf`` folder that a RewardModel run writes.
        chat_template: Jinja text, or a path to a file with it, in place of the tokenizer's own chat template.
        as_chat: Give a text prompt to the chat template, as a user's message.
        batch_size: Conversations scored at once.
        max_length: Longest conversation in tokens; a longer one loses tokens of the prompt, on the left. The default is
            the model's context.
        dtype: Type of the weights in memory.
    """

    def __init__(
        self,
        path: str,
        chat_template: str | None = None,
        as_chat: bool = False,
        batch_size: int = 32,
        max_length: int | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.source = ModelSource(path=existing(path), chat_template=chat_template, dtype=dtype)
        self.as_chat, self.batch_size, self.max_length = as_chat, batch_size, max_length

    def setup(self, device: torch.device) -> None:
        """Load the model and its tokenizer."""
        self.tokenizer = self.source.load_tokenizer()
        self.model = freeze(load_reward_model(self.source, trained=True))
        self.model.to(device)  # type: ignore[arg-type]
        limits = [limit for limit in (self.max_length, context_length(self.model)) if limit is not None]
        self.limit = min(limits, default=None)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> Tensor:
        """Score each response, on the device of the model."""
        rows = [self.encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        # rows of like length are scored together, so that little is computed on padding
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        rewards = torch.empty(len(rows), device=self.model.device)
        for start in range(0, len(rows), self.batch_size):
            index = order[start : start + self.batch_size]
            ids, mask = right_pad([rows[row] for row in index], self.tokenizer.pad_token_id)
            scores = sequence_scores(self.model, ids.to(self.model.device), mask.to(self.model.device))
            rewards[index] = scores
        return rewards

    def encode(self, prompt: Prompt, response: str) -> list[int]:
        """Tokens of a conversation as the model sees it."""
        if self.as_chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        ids = encode_prompt(self.tokenizer, prompt) + encode_response(self.tokenizer, prompt, response)
        return ids if self.limit is None else ids[-self.limit :]
