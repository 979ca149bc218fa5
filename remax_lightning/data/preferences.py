"""Prompts with two responses of which one was preferred."""

from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

from remax_lightning.data.arguments import check_lengths
from remax_lightning.data.base import Batch, TokenizedDataModule
from remax_lightning.data.encoding import Text, Tokens
from remax_lightning.data.formats import Format, Row, UnusableRow, column_format, find_format
from remax_lightning.data.reading import Example
from remax_lightning.functional.sequence import right_pad


class PreferenceDataModule(TokenizedDataModule):
    """Preferences for reward-model training.

    A batch has `input_ids` (2B, L) right-padded, the B chosen sequences and then the B rejected ones, and
    `attention_mask` (2B, L) bool.
    """

    def __init__(
        self,
        max_length: int = 1024,
        chosen_column: str | None = None,
        rejected_column: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Set up nothing yet.

        Args:
            max_length: Longest prompt and response together, in tokens. A pair with a longer one is dropped.
            chosen_column: Column with the preferred responses. The default is found by the names of the columns, and is
                `chosen` if another column is given.
            rejected_column: Column with the other responses, likewise.
            **kwargs: Arguments of the base class.
        """
        super().__init__(**kwargs)
        check_lengths(self.max_prompt_length, max_length)
        self.max_length = max_length
        self.chosen_column = chosen_column
        self.rejected_column = rejected_column

    @property
    def column_arguments(self) -> str:
        """Names of the arguments that name columns."""
        return "prompt_column, chosen_column and rejected_column"

    def choose_format(self, columns: list[str]) -> Format | None:
        """The explicit columns, or a known format."""
        if self.prompt_column or self.chosen_column or self.rejected_column:
            pair = (self.chosen_column or "chosen", self.rejected_column or "rejected")
            return column_format(self.prompt_column or "prompt", pair=pair)
        return find_format(columns, "pairs")

    def read(self, row: Row, data_format: Format) -> Text:
        """The prompt, the chosen and the rejected response."""
        prompt, chosen, rejected = data_format.preference(row)
        responses = self.canonical_response(chosen), self.canonical_response(rejected)
        return Text(self.canonical_prompt(prompt), responses)

    def build(self, row: Row, text: Text, tokens: Tokens) -> Example:
        """Tokens of both sequences."""
        chosen, rejected = (tokens.prompt_ids + response_ids for response_ids in tokens.response_ids)
        if max(len(chosen), len(rejected)) > self.max_length:
            raise UnusableRow(f"prompt and response above {self.max_length} tokens")
        return {"chosen_ids": array("i", chosen), "rejected_ids": array("i", rejected)}

    def collator(self, pad_token_id: int) -> Callable[[list[Example]], Batch]:
        """See `collate_preferences`."""
        return partial(collate_preferences, pad_token_id=pad_token_id)


def collate_preferences(examples: list[Example], pad_token_id: int) -> Batch:
    """Batch of preferences.

    Args:
        examples: B examples with `chosen_ids` and `rejected_ids`.
        pad_token_id: Id written behind the shorter sequences.

    Returns:
        `input_ids` and `attention_mask`, each (2B, L), chosen rows first.
    """
    rows = [example[side] for side in ("chosen_ids", "rejected_ids") for example in examples]
    input_ids, attention_mask = right_pad(rows, pad_token_id)
    return {"input_ids": input_ids, "attention_mask": attention_mask}
