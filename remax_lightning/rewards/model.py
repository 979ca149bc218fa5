"""A trained reward model as a reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from remax_lightning.functional.sequence import right_pad
from remax_lightning.models.language_model import context_length, freeze
from remax_lightning.models.parallelize import Sharding, gathered
from remax_lightning.models.scalar_model import HEAD_NAMES, load_reward_model, sequence_scores
from remax_lightning.models.sharded_loading import load_sharded
from remax_lightning.models.source import ModelSource, existing
from remax_lightning.models.tokenizer import Prompt, encode_prompt, encode_response
from remax_lightning.rewards.base import Reward


@dataclass
class ModelReward(Reward):
    """Reward by a Hugging Face sequence-classification model, through its own tokenizer and template.

    A text prompt is scored as prompt, response and end-of-sequence token; chat messages through the chat template. A
    tokenizer without an end-of-sequence token (BERT's) ends with its separator.

    Args:
        path: Folder or hub name of the reward model, such as the ``hf`` folder that a RewardModel run writes. A folder
            of UltraRM's kind, with a ``regression_head``, is one too.
        chat_template: Jinja text, or a path to a file with it, in place of the tokenizer's own chat template.
        as_chat: Give a text prompt to the chat template, as a user's message.
        batch_size: Conversations scored at once.
        max_length: Longest conversation in tokens; a longer one loses tokens of the prompt, on the left. The default is
            the model's context.
        dtype: Type of the weights in memory.
        label: The label whose logit is the reward, of a classifier with several: 1 for a sentiment model's positive.
            The default is a model with one label.
        ends_with_eos: Read the score at the end-of-sequence token; false takes it off and reads the response's last
            token, for a model that was trained without.
        tokenizer: Folder or hub name of the tokenizer. The default is ``path``.
        architecture: Folder with the model's config.json, as in ModelSource.
        tiny: Random weights of the same architecture at a toy size, as in ModelSource.
    """

    path: str
    chat_template: str | None = None
    as_chat: bool = False
    batch_size: int = 32
    max_length: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    label: int | None = None
    ends_with_eos: bool = True
    tokenizer: str | None = None
    architecture: str | None = None
    tiny: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")

    @property
    def source(self) -> ModelSource:
        """Where the model comes from."""
        return ModelSource(
            path=self.path,
            architecture=self.architecture,
            tokenizer=self.tokenizer,
            chat_template=self.chat_template,
            dtype=self.dtype,
            tiny=self.tiny,
        )

    def check(self) -> None:
        """Refuse a folder that is not there.

        Raises:
            FileNotFoundError: If it is not.
        """
        if not self.tiny and self.architecture is None:  # of a recipe to be tried, only the configuration is needed
            existing(self.path)

    def setup(self, device: torch.device, sharding: Sharding | None = None) -> None:
        """Load the model and its tokenizer."""
        self.loaded_tokenizer = self.source.load_tokenizer()
        if self.loaded_tokenizer.eos_token is None:
            self.loaded_tokenizer.eos_token = self.loaded_tokenizer.sep_token
        load, self.device = partial(load_reward_model, trained=True, label=self.label), device
        if sharding is None:
            self.model = freeze(load(self.source)).to(device)  # type: ignore[arg-type]
        else:
            model = load_sharded(load, self.source, sharding, key_mapping=HEAD_NAMES, frozen=True)
            self.model = freeze(model)
        limits = [limit for limit in (self.max_length, context_length(self.model)) if limit is not None]
        self.limit = min(limits, default=None)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> Tensor:
        """Score each response, on the device of the model."""
        rewards = torch.empty(len(responses), device=self.device)
        with gathered(self.model):  # first, as all processes have to come here, whatever fails then
            rows = [self.encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
            # rows of like length are scored together, so that little is computed on padding
            order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
            for start in range(0, len(rows), self.batch_size):
                index = order[start : start + self.batch_size]
                ids, mask = right_pad([rows[row] for row in index], self.loaded_tokenizer.pad_token_id)
                ids, mask = ids.to(self.device), mask.to(self.device)
                rewards[index] = sequence_scores(self.model, ids, mask, label=self.label or 0)
        return rewards

    def encode(self, prompt: Prompt, response: str) -> list[int]:
        """Tokens of a conversation as the model sees it."""
        if self.as_chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        ids = encode_prompt(self.loaded_tokenizer, prompt) + encode_response(self.loaded_tokenizer, prompt, response)
        if not self.ends_with_eos and ids[-1] == self.loaded_tokenizer.eos_token_id:
            ids = ids[:-1]
        return ids if self.limit is None else ids[-self.limit :]
