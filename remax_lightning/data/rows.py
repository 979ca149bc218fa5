"""How a data module turns the rows of its sources into examples."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, TypeAlias, cast

from transformers import PreTrainedTokenizerBase

from remax_lightning.data.encoding import Text, Tokens, attempt, tokenize
from remax_lightning.data.formats import Format, Row, UnusableRow, to_chat
from remax_lightning.data.reading import Columns, Example
from remax_lightning.models.tokenizer import Prompt

LongPrompts: TypeAlias = Literal["drop", "truncate", "keep_start"]


class RowEncoder(ABC):
    """From rows to examples: a subclass says what it reads in a row and what it makes of the tokens.

    Args:
        max_prompt_length: Longest prompt, in tokens.
        long_prompts: What happens to a longer one.
        as_chat: Turn text prompts into messages.
    """

    tokenizer: PreTrainedTokenizerBase  # set by whoever knows it

    def __init__(self, max_prompt_length: int, long_prompts: LongPrompts, as_chat: bool) -> None:
        super().__init__()
        self.max_prompt_length = max_prompt_length
        self.long_prompts = long_prompts
        self.as_chat = as_chat

    @abstractmethod
    def choose_format(self, columns: list[str]) -> Format | None:
        """How to read rows with these columns; None if no known format has what is needed."""

    @abstractmethod
    def read(self, row: Row, data_format: Format) -> Text:
        """Find in a row what is to be tokenized.

        Raises:
            UnusableRow: If the row is to be dropped.
        """

    @abstractmethod
    def build(self, row: Row, text: Text, tokens: Tokens) -> Example:
        """Turn a row into token ids and whatever else its batch needs.

        Raises:
            UnusableRow: If the row is to be dropped.
        """

    @property
    def column_arguments(self) -> str:
        """Names of the arguments that name columns."""
        return "prompt_column"

    def encode(self, rows: Sequence[Row | UnusableRow], columns: Sequence[Columns]) -> list[Example | UnusableRow]:
        """Examples of rows, or why they cannot be used, in their order.

        Args:
            rows: The rows; one that is unusable already stays so.
            columns: Columns of the source of each row, which say how to read it.
        """
        formats = {each: cast(Format, self.choose_format(list(each))) for each in set(columns)}
        texts = [
            row if isinstance(row, UnusableRow) else attempt(self.read, row, formats[each])
            for row, each in zip(rows, columns, strict=True)
        ]
        tokens = iter(tokenize(self.tokenizer, [text for text in texts if isinstance(text, Text)]))
        return [
            text if isinstance(text, UnusableRow) else attempt(self._build, cast(Row, row), text, next(tokens))
            for row, text in zip(rows, texts, strict=True)
        ]

    def _build(self, row: Row, text: Text, tokens: Tokens | UnusableRow) -> Example:
        if isinstance(tokens, UnusableRow):
            raise tokens
        if not tokens.prompt_ids:
            raise UnusableRow("prompt without tokens")
        if len(tokens.prompt_ids) > self.max_prompt_length:
            text, tokens = self._shorten(text, tokens)
        return self.build(row, text, tokens)

    def _shorten(self, text: Text, tokens: Tokens) -> tuple[Text, Tokens]:
        """A prompt of the greatest length. One that lost its end is as short for those who read its text."""
        limit = self.max_prompt_length
        if self.long_prompts == "truncate":
            return text, tokens._replace(prompt_ids=tokens.prompt_ids[-limit:])
        if self.long_prompts == "drop" or not isinstance(text.prompt, str):
            raise UnusableRow(f"prompt above {limit} tokens")
        start = tokens.prompt_ids[:limit]
        prompt = str(self.tokenizer.decode(start, skip_special_tokens=True))
        return text._replace(prompt=prompt), tokens._replace(prompt_ids=start)

    def canonical_prompt(self, prompt: Prompt) -> Prompt:
        """The prompt; messages if `as_chat`."""
        return to_chat(prompt) if self.as_chat else prompt

    def canonical_response(self, response: str) -> str:
        """The response; without the blank that sets it off from a text prompt if `as_chat`."""
        return response.strip() if self.as_chat else response

    def check_format(self, name: str, columns: list[str]) -> None:
        """Raise a `ValueError` if rows with these columns cannot be read.

        Args:
            name: What the rows are for, in the message.
            columns: Their columns.
        """
        data_format = self.choose_format(columns)
        if data_format is None or not set(columns).issuperset(data_format.columns):
            lacking = "none of the known formats" if data_format is None else f"not all of {data_format.columns}"
            raise ValueError(
                f"{name}: the rows have the columns {columns}, {lacking}; "
                f"set {self.column_arguments} to the names of columns that they have"
            )
