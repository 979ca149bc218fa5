"""The data modules: prompts to respond to, demonstrations to imitate, preferences between two responses."""

from array import array
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from remax_lightning.data.base import TokenizedDataModule
from remax_lightning.data.encoding import Batch, Example, RowEncoder, Text, Tokens
from remax_lightning.data.formats import Format, Row, UnusableRow, column_format, find_format
from remax_lightning.functional.sequence import left_pad, length_mask, right_pad
from remax_lightning.rewards.scorer import PARAMETERS

TENSORS = ("prompt_ids", "prompt_mask", "prompt_index")  # of a batch of prompts


@dataclass(kw_only=True, eq=False, repr=False)  # so that errors of the constructor name this class
class PromptDataModule(TokenizedDataModule):
    """Prompts to respond to.

    A batch has `prompt_ids` (B, P) left-padded, `prompt_mask` (B, P) bool, `prompt_index` (B,), each row's index in its
    source, and a list of B values for each column of the source; `prompt` is the prompt as text or messages. A loader
    that is given to `trainer.fit` instead of a data module has to yield batches with these keys.
    """

    def encoder_with(self, tokenizer: PreTrainedTokenizerBase) -> RowEncoder:
        """Prompts as examples."""
        return PromptEncoder(**self.encoder_options(tokenizer))


@dataclass(kw_only=True, eq=False, repr=False)
class DemonstrationDataModule(TokenizedDataModule):
    """Demonstrations for supervised fine-tuning.

    A batch has `input_ids` (B, L) right-padded, `attention_mask` (B, L) bool and `loss_mask` (B, L) bool, True on the
    response and the token that ends it.

    Args:
        max_length: Longest prompt and response together, in tokens. The end of a longer response is cut off, and the
            model is not trained to end there.
        response_column: Column with the responses, text. The default is found by the names of the columns, and is
            `response` if ``prompt_column`` is given.
    """

    max_length: int = 1024
    response_column: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lengths(self.max_prompt_length, self.max_length)

    def encoder_with(self, tokenizer: PreTrainedTokenizerBase) -> RowEncoder:
        """Demonstrations as examples."""
        return DemonstrationEncoder(
            max_length=self.max_length,
            response_column=self.response_column,
            **self.encoder_options(tokenizer),
        )


@dataclass(kw_only=True, eq=False, repr=False)
class PreferenceDataModule(TokenizedDataModule):
    """Preferences for reward-model training.

    A batch has `input_ids` (2B, L) right-padded, the B chosen sequences and then the B rejected ones, and
    `attention_mask` (2B, L) bool.

    Args:
        max_length: Longest prompt and response together, in tokens. A pair with a longer one is dropped.
        chosen_column: Column with the preferred responses. The default is found by the names of the columns, and is
            `chosen` if another column is given.
        rejected_column: Column with the other responses. The default is found by the names of the columns, and is
            `rejected` if another column is given.
    """

    max_length: int = 1024
    chosen_column: str | None = None
    rejected_column: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lengths(self.max_prompt_length, self.max_length)

    def encoder_with(self, tokenizer: PreTrainedTokenizerBase) -> RowEncoder:
        """Preferences as examples."""
        return PreferenceEncoder(
            max_length=self.max_length,
            chosen_column=self.chosen_column,
            rejected_column=self.rejected_column,
            **self.encoder_options(tokenizer),
        )


class PromptEncoder(RowEncoder):
    """Prompts as examples: the row, its canonical prompt and that prompt's tokens."""

    def choose_format(self, columns: list[str]) -> Format | None:
        """The explicit column, or a known format."""
        return column_format(self.prompt_column) if self.prompt_column else find_format(columns, "prompts")

    def check_format(self, name: str, columns: list[str]) -> None:
        """Warn of columns that a batch or a reward cannot have, since something else has their name.

        Raises:
            ValueError: If rows with these columns cannot be read.
        """
        super().check_format(name, columns)
        data_format = self.choose_format(columns)
        assert data_format is not None
        others = [column for column in columns if column not in data_format.columns]
        if lost := [column for column in others if column in TENSORS]:
            rank_zero_warn(
                f"{name}: the columns {lost} are left out, since a batch has tensors of these names; rename them to "
                "keep them"
            )
        if hidden := [column for column in others if column in PARAMETERS]:
            rank_zero_warn(
                f"{name}: the columns {hidden} are not given to rewards, whose own parameters have these names; rename "
                "them if a reward needs them"
            )

    def read(self, row: Row, data_format: Format) -> Text:
        """The prompt."""
        return Text(self.canonical_prompt(data_format.prompt(row)))

    def build(self, row: Row, text: Text, tokens: Tokens) -> Example:
        """The row, its canonical prompt and that prompt's tokens."""
        return {**row, "prompt": text.prompt, "prompt_ids": array("i", tokens.prompt_ids)}

    def collate(self, examples: list[Example]) -> Batch:
        """`prompt_ids` (B, P), `prompt_mask` (B, P), `prompt_index` (B,) and the columns as lists."""
        prompt_ids, prompt_mask = left_pad([example["prompt_ids"] for example in examples], self.pad_token_id)
        names = dict.fromkeys(name for example in examples for name in example)
        columns = {name: [example.get(name) for example in examples] for name in names}
        prompt_index = torch.tensor(columns["prompt_index"])  # (B,)
        return {**columns, "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "prompt_index": prompt_index}


@dataclass(kw_only=True)
class DemonstrationEncoder(RowEncoder):
    """Demonstrations as examples: the tokens of the prompt and as much of the response as fits."""

    max_length: int
    response_column: str | None
    column_arguments = "prompt_column and response_column"

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

    def collate(self, examples: list[Example]) -> Batch:
        """`input_ids`, `attention_mask` and `loss_mask`, each (B, L)."""
        input_ids, attention_mask = right_pad([example["input_ids"] for example in examples], self.pad_token_id)
        prompt_lengths = torch.tensor([example["prompt_length"] for example in examples])  # (B,)
        loss_mask = attention_mask & ~length_mask(prompt_lengths, input_ids.shape[1])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": loss_mask}


@dataclass(kw_only=True)
class PreferenceEncoder(RowEncoder):
    """Preferences as examples: the tokens of both sequences."""

    max_length: int
    chosen_column: str | None
    rejected_column: str | None
    column_arguments = "prompt_column, chosen_column and rejected_column"

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

    def collate(self, examples: list[Example]) -> Batch:
        """`input_ids` and `attention_mask`, each (2B, L), chosen rows first."""
        rows = [example[side] for side in ("chosen_ids", "rejected_ids") for example in examples]
        input_ids, attention_mask = right_pad(rows, self.pad_token_id)
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def check_lengths(max_prompt_length: int, max_length: int) -> None:
    """Raise a `ValueError` if the limits leave no room for a response."""
    if max_length <= max_prompt_length:
        raise ValueError(
            f"max_length must exceed max_prompt_length to leave room for a response, got {max_length} and "
            f"{max_prompt_length}; raise max_length or lower max_prompt_length"
        )
