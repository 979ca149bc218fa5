"""Prompts with a response to imitate."""

from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from remax_lightning.data.arguments import check_lengths
from remax_lightning.data.base import Batch, TokenizedDataModule
from remax_lightning.data.encoding import Text, Tokens
from remax_lightning.data.formats import Format, Row, column_format, find_format
from remax_lightning.data.reading import Example
from remax_lightning.functional.sequence import length_mask, right_pad


class DemonstrationDataModule(TokenizedDataModule):
    """Demonstrations for supervised fine-tuning.

    A batch has `input_ids` (B, L) right-padded, `attention_mask` (B, L) bool and `loss_mask` (B, L) bool, True on the
    response and the token that ends it.
    """

    def __init__(self, max_length: int = 1024, response_column: str | None = None, **kwargs: Any) -> None:
        """Set up nothing yet.

        Args:
            max_length: Longest prompt and response together, in tokens. The end of a longer response is cut off, and no
                end is learned from it.
            response_column: Column with the responses, text. The default is found by the names of the columns, and is
                `response` if ``prompt_column`` is given.
            **kwargs: Arguments of the base class.
        """
        super().__init__(**kwargs)
        check_lengths(self.max_prompt_length, max_length)
        self.max_length = max_length
        self.response_column = response_column

    @property
    def column_arguments(self) -> str:
        """Names of the arguments that name columns."""
        return "prompt_column and response_column"

    def choose_format(self, columns: list[str]) -> Format | None:
        """The explicit columns, or a known format."""
        if self.prompt_column or self.response_column:
            return column_format(self.prompt_column or "prompt", self.response_column or "response")
        return find_format(columns, "responses")

    def read(self, row: Row, data_format: Format) -> Text:
        """The prompt and its response."""
        prompt, response = data_format.demonstration(row)
        return Text(self.canonical_prompt(prompt), (self.canonical_response(response),))

    def build(self, row: Row, text: Text, tokens: Tokens) -> Example:
        """Tokens of the prompt and as much of the response as fits."""
        ids = tokens.prompt_ids + tokens.response_ids[0]
        return {"input_ids": array("i", ids[: self.max_length]), "prompt_length": len(tokens.prompt_ids)}

    def collator(self, pad_token_id: int) -> Callable[[list[Example]], Batch]:
        """See `collate_demonstrations`."""
        return partial(collate_demonstrations, pad_token_id=pad_token_id)


def collate_demonstrations(examples: list[Example], pad_token_id: int) -> Batch:
    """Batch of demonstrations.

    Args:
        examples: B examples with `input_ids` and `prompt_length`.
        pad_token_id: Id written behind the shorter sequences.

    Returns:
        `input_ids`, `attention_mask` and `loss_mask`, each (B, L).
    """
    input_ids, attention_mask = right_pad([example["input_ids"] for example in examples], pad_token_id)
    prompt_lengths = torch.tensor([example["prompt_length"] for example in examples])
    loss_mask = attention_mask & ~length_mask(prompt_lengths, input_ids.shape[1])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": loss_mask}
