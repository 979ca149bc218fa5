"""From rows to examples: what is read in a row, its tokens, and a count of the rows that cannot be used."""

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeAlias, cast

from datasets import Dataset
from jinja2 import TemplateError
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from remax_lightning.data.digest import LENGTH, add_rows
from remax_lightning.data.formats import Format, Row, UnusableRow, check_depth, or_unusable, to_chat
from remax_lightning.data.readers import BadLine, refuse_bad_lines
from remax_lightning.data.sources import Source, SourceTable, load_tables
from remax_lightning.models.tokenizer import Prompt, encode_prompts, encode_responses

Batch: TypeAlias = dict[str, Any]
Columns: TypeAlias = tuple[str, ...]
Example: TypeAlias = dict[str, Any]
LongPrompts: TypeAlias = Literal["drop", "truncate", "keep_start"]

CHUNK = 1000  # rows in one call of the tokenizer: enough for its threads, few enough to hold their texts in memory


class Text(NamedTuple):
    """A prompt and the responses to it that are to be tokenized."""

    prompt: Prompt
    responses: tuple[str, ...] = ()


class Encoded(NamedTuple):
    """The usable rows of a split.

    Args:
        examples: In the order of the rows; each has its row's index in the sources as `prompt_index`.
        sizes: Number of examples from each source.
        digest: Of all rows that were read, the unusable ones too.
    """

    examples: list[Example]
    sizes: list[int]
    digest: str


class Tokens(NamedTuple):
    """The token ids of a prompt and of its responses."""

    prompt_ids: list[int]
    response_ids: list[list[int]]


@dataclass(kw_only=True)
class RowEncoder(ABC):
    """Makes examples of rows and batches of examples; a subclass for each kind of data.

    Args:
        tokenizer: The model's tokenizer.
        max_prompt_length: Longest prompt, in tokens.
        long_prompts: What happens to a longer one.
        as_chat: Turn text prompts into messages.
        prompt_column: Column with the prompts; None to recognise the format by its columns.
    """

    tokenizer: PreTrainedTokenizerBase
    max_prompt_length: int
    long_prompts: LongPrompts
    as_chat: bool
    prompt_column: str | None
    column_arguments = "prompt_column"  # the arguments that name columns, for messages

    @property
    def pad_token_id(self) -> int:
        """Id of the padding; the masks tell it from the same token in a text."""
        return cast(int, self.tokenizer.pad_token_id)

    @abstractmethod
    def choose_format(self, columns: list[str]) -> Format | None:
        """How to read rows with these columns; None if no known format has what is needed."""

    @abstractmethod
    def read(self, row: Row, data_format: Format) -> Text:
        """Read from a row what is to be tokenized.

        Raises:
            UnusableRow: If the row is to be dropped.
        """

    @abstractmethod
    def build(self, row: Row, text: Text, tokens: Tokens) -> Example:
        """Turn a row into token ids and whatever else its batch needs.

        Raises:
            UnusableRow: If the row is to be dropped.
        """

    @abstractmethod
    def collate(self, examples: list[Example]) -> Batch:
        """Batch of B examples; each has what `build` returned, and `prompt_index`."""

    def encode(self, rows: Sequence[Row | UnusableRow], columns: Sequence[Columns]) -> list[Example | UnusableRow]:
        """Examples of rows, or why they cannot be used, in their order.

        Args:
            rows: The rows; one that is unusable already stays so.
            columns: Columns of the source of each row, which say how to read it.
        """
        formats = {names: cast(Format, self.choose_format(list(names))) for names in set(columns)}
        texts = [
            row if isinstance(row, UnusableRow) else or_unusable(self._read, row, formats[names])
            for row, names in zip(rows, columns, strict=True)
        ]
        tokens = iter(tokenize(self.tokenizer, [text for text in texts if isinstance(text, Text)]))
        return [
            text if isinstance(text, UnusableRow) else or_unusable(self._build, cast(Row, row), text, next(tokens))
            for row, text in zip(rows, texts, strict=True)
        ]

    def _read(self, row: Row, data_format: Format) -> Text:
        check_depth(row)
        return self.read(row, data_format)

    def _build(self, row: Row, text: Text, tokens: Tokens | UnusableRow) -> Example:
        if isinstance(tokens, UnusableRow):
            raise tokens
        if not tokens.prompt_ids:
            raise UnusableRow("prompt without tokens")
        if len(tokens.prompt_ids) > self.max_prompt_length:
            text, tokens = self._shorten(text, tokens)
        return self.build(row, text, tokens)

    def _shorten(self, text: Text, tokens: Tokens) -> tuple[Text, Tokens]:
        """A prompt of the greatest length. If its end is cut off, its text is shortened too, as rewards read it."""
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


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text]) -> list[Tokens | UnusableRow]:
    """Tokens of each text, in their order; a text that the chat template refuses is an unusable row."""
    pairs = [(text.prompt, response) for text in texts for response in text.responses]
    try:
        prompt_ids = encode_prompts(tokenizer, [text.prompt for text in texts])
        response_ids = iter(encode_responses(tokenizer, [prompt for prompt, _ in pairs], [text for _, text in pairs]))
    except TemplateError as error:
        if len(texts) == 1:
            return [UnusableRow(f"refused by the chat template: {error}")]
        return [outcome for text in texts for outcome in tokenize(tokenizer, [text])]
    return [
        Tokens(ids, list(islice(response_ids, len(text.responses))))
        for text, ids in zip(texts, prompt_ids, strict=True)
    ]


def open_tables(key: str, source: Source, encoder: RowEncoder, streaming: bool = False) -> list[SourceTable]:
    """The tables of a data module's argument, in formats that the encoder can read; none without a source.

    Raises:
        FileNotFoundError: If the data is missing. All messages name the argument, `data.train` for the key `train`.
        ValueError: If it cannot be read, or its columns are of no known format.
    """
    if source is None:
        return []
    try:
        tables = load_tables(source, streaming=streaming)
    except (OSError, ValueError) as error:
        error.args = (f"data.{key}: {error}",)
        raise
    for table in tables:
        encoder.check_format(f"{key}, {table.source}" if isinstance(source, list) else key, [*table.columns])
    return tables


def encode_tables(
    name: str, tables: Sequence[SourceTable], indices: Sequence[int], encoder: RowEncoder, skip_bad_rows: int
) -> Encoded:
    """Examples of the rows that can be used; one warning says how many cannot, and why.

    Args:
        name: What the rows are for, in messages.
        tables: All rows of the sources.
        indices: The rows to read, counted over all tables, in ascending order.
        encoder: Makes examples.
        skip_bad_rows: Number of corrupt rows above which they are an error.

    Raises:
        ValueError: If no row can be used, or too many are corrupt.
    """
    columns = all_columns(tables)
    examples: list[Example] = []
    bad: list[BadLine] = []
    dropped: Counter[str] = Counter()
    sizes = [0] * (1 + max(table.number for table in tables))
    digest = hashlib.sha256()
    for table, chunk, rows in _chunks(tables, indices):
        bad += [row for row in rows if isinstance(row, BadLine)]
        refuse_bad_lines(bad, skip_bad_rows)
        rows = [fill_missing_columns(row, columns) for row in rows]
        add_rows(digest, rows)
        outcomes = encoder.encode(rows, [table.columns] * len(rows))
        for index, outcome in zip(chunk, outcomes, strict=True):
            if isinstance(outcome, UnusableRow):
                dropped[str(outcome)] += 1
            else:
                examples.append({**outcome, "prompt_index": index})
                sizes[table.number] += 1
    _report_dropped(name, dropped, len(indices), columns)
    return Encoded(examples, sizes, digest.hexdigest()[:LENGTH])


def _report_dropped(name: str, dropped: Counter[str], num_rows: int, columns: Columns) -> None:
    """Warn of the rows that were dropped; an error if none is left."""
    if dropped.total() == num_rows:
        raise ValueError(
            f"{name}: none of {num_rows} rows can be used ({format_reasons(dropped) or 'the source is empty'}); "
            f"check the length limits and the arguments that name columns; the columns are {list(columns)}"
        )
    if dropped:
        rank_zero_warn(f"{name}: dropped {dropped.total()} of {num_rows} rows ({format_reasons(dropped)})")


def all_columns(tables: Sequence[SourceTable]) -> Columns:
    """The columns of all tables."""
    return tuple(dict.fromkeys(column for table in tables for column in table.columns))


def fill_missing_columns(row: Row | UnusableRow, columns: Columns) -> Row | UnusableRow:
    """The row with None in the columns that it lacks."""
    return row if isinstance(row, UnusableRow) else {**dict.fromkeys(columns), **row}


def format_reasons(dropped: Counter[str]) -> str:
    """How often each reason came up, in words."""
    return ", ".join(f"{count} x {reason}" for reason, count in dropped.most_common())


def _chunks(
    tables: Sequence[SourceTable], indices: Sequence[int]
) -> Iterator[tuple[SourceTable, Sequence[int], list[Row | UnusableRow]]]:
    """The rows to read, at most `CHUNK` of one table at a time, with their indices."""
    start = 0
    for table in tables:
        assert isinstance(table.rows, Dataset | list)
        end = start + len(table.rows)
        table_indices = [index for index in indices if start <= index < end]
        for first in range(0, len(table_indices), CHUNK):
            chunk = table_indices[first : first + CHUNK]
            yield table, chunk, _read_rows(table, [index - start for index in chunk])
        start = end


def _read_rows(table: SourceTable, indices: Sequence[int]) -> list[Row | UnusableRow]:
    """Rows of a table; the datasets library does not decode a text before it is read."""
    if not isinstance(table.rows, Dataset):
        return [cast(list[Row | UnusableRow], table.rows)[index] for index in indices]
    try:
        return list(table.rows.select(indices))
    except UnicodeDecodeError as error:
        if len(indices) == 1:
            return [BadLine(f"{table.source}, row {indices[0] + 1}", f"text that is not UTF-8 ({error})")]
        return [row for index in indices for row in _read_rows(table, [index])]
