"""Prompts for rollouts, with the raw columns that a reward may need."""

from array import array
from collections.abc import Callable
from functools import partial

import torch

from remax_lightning.data.base import Batch, TokenizedDataModule
from remax_lightning.data.encoding import Text, Tokens
from remax_lightning.data.formats import Format, Row, column_format, find_format
from remax_lightning.data.reading import Example
from remax_lightning.functional.sequence import left_pad


class PromptDataModule(TokenizedDataModule):
    """Prompts to respond to.

    A batch has `prompt_ids` (B, P) left-padded, `prompt_mask` (B, P) bool, `prompt_index` (B,), each row's index in its
    source, and a list of B values for each column of the source; `prompt` is the prompt as text or messages.
    """

    def choose_format(self, columns: list[str]) -> Format | None:
        """The explicit column, or a known format."""
        return column_format(self.prompt_column) if self.prompt_column else find_format(columns, "prompts")

    def read(self, row: Row, data_format: Format) -> Text:
        """The prompt."""
        return Text(self.canonical_prompt(data_format.prompt(row)))

    def build(self, row: Row, text: Text, tokens: Tokens) -> Example:
        """The row, its canonical prompt and that prompt's tokens."""
        return {**row, "prompt": text.prompt, "prompt_ids": array("i", tokens.prompt_ids)}

    def collator(self, pad_token_id: int) -> Callable[[list[Example]], Batch]:
        """See `collate_prompts`."""
        return partial(collate_prompts, pad_token_id=pad_token_id)


def collate_prompts(examples: list[Example], pad_token_id: int) -> Batch:
    """Batch of prompts.

    Args:
        examples: B examples with `prompt_ids`, `prompt_index` and any other keys.
        pad_token_id: Id written in front of the shorter prompts.

    Returns:
        `prompt_ids` (B, P), `prompt_mask` (B, P), `prompt_index` (B,) and the other keys as lists.
    """
    prompt_ids, prompt_mask = left_pad([example["prompt_ids"] for example in examples], pad_token_id)
    names = dict.fromkeys(name for example in examples for name in example)
    columns = {name: [example.get(name) for example in examples] for name in names}
    prompt_index = torch.tensor(columns["prompt_index"])
    return {**columns, "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "prompt_index": prompt_index}
