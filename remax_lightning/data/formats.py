"""Known data formats, recognised by their columns, and their one canonical form.

Canonical is a prompt (text or messages); a prompt and a response; a prompt, a chosen and a rejected response. A row
that cannot be used raises `UnusableRow`, whose text is the reason to count.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

from remax_lightning.models.tokenizer import Prompt

P = ParamSpec("P")
T = TypeVar("T")
Row: TypeAlias = dict[str, Any]
PromptReader: TypeAlias = Callable[[Row], object]
ResponseReader: TypeAlias = Callable[[Row], tuple[object, object]]

ASSISTANT = "\n\nAssistant:"
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"human": "user", "gpt": "assistant", "Human": "user", "Assistant": "assistant"}


LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, left where text was cut within an emoji
DEEPEST = 50
"""Levels of lists and dicts within a row: what walks through a batch recurses, and Python ends at 1000 calls."""


class UnusableRow(ValueError):
    """A row without what its format needs; the text says what is wrong."""


def or_unusable(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | UnusableRow:
    """What a function returns, or the `UnusableRow` that it raises."""
    try:
        return function(*args, **kwargs)
    except UnusableRow as reason:
        return reason


@dataclass(frozen=True)
class Format:
    """How the rows of one format are read.

    Args:
        columns: Columns that a data set of this format has.
        read_prompt: Reads the prompt of a row.
        read_response: Reads a prompt and its response; None if the format has no responses.
        read_pair: Reads the prompt and the chosen response, and the prompt and the rejected one; None without pairs.
    """

    columns: tuple[str, ...]
    read_prompt: PromptReader
    read_response: ResponseReader | None = None
    read_pair: tuple[ResponseReader, ResponseReader] | None = None

    def prompt(self, row: Row) -> Prompt:
        """The row's prompt.

        Raises:
            UnusableRow: If it is empty or malformed; so do the methods below.
        """
        return check_prompt(self.read_prompt(row))

    def demonstration(self, row: Row) -> tuple[Prompt, str]:
        """The row's prompt and response."""
        assert self.read_response is not None
        prompt, response = self.read_response(row)
        return check_prompt(prompt), check_response(response)

    def preference(self, row: Row) -> tuple[Prompt, str, str]:
        """The row's prompt, chosen and rejected response."""
        assert self.read_pair is not None
        (prompt, chosen), (other_prompt, rejected) = (read(row) for read in self.read_pair)
        if prompt != other_prompt:
            raise UnusableRow("chosen and rejected have different prompts")
        return check_prompt(prompt), check_response(chosen), check_response(rejected)


def check_prompt(value: object) -> Prompt:
    """A prompt that is neither empty nor malformed, its messages with nothing but role and content.

    Raises:
        UnusableRow: If it is.
    """
    prompt = value if isinstance(value, str) else read_messages(value or [])
    ending = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt[-1:])
    if not ending.strip():
        raise UnusableRow("empty prompt")
    texts = [prompt] if isinstance(prompt, str) else [text for message in prompt for text in message.values()]
    if any(map(LONE_SURROGATE.search, texts)):
        raise UnusableRow("lone surrogate in the prompt")
    return prompt


def check_response(value: object) -> str:
    """A response that is text and not empty, without the blanks at its end.

    Raises:
        UnusableRow: If it is not.
    """
    if not isinstance(value, str | None):
        raise UnusableRow("response is not text")
    if not value or not value.strip():
        raise UnusableRow("empty response")
    if LONE_SURROGATE.search(value):
        raise UnusableRow("lone surrogate in the response")
    return value.rstrip()


def check_depth(row: Row) -> None:
    """Refuse a row whose values are nested deeper than `DEEPEST`.

    Raises:
        UnusableRow: If it is one.
    """
    level: list[Any] = list(row.values())
    for _ in range(DEEPEST):
        inner = [value for value in level if isinstance(value, dict | list)]
        level = [value for values in inner for value in (values.values() if isinstance(values, dict) else values)]
        if not level:
            return
    raise UnusableRow(f"nested more than {DEEPEST} levels deep")


def read_messages(value: object) -> list[dict[str, str]]:
    """Messages of role and content, from those or from ShareGPT's `from` and `value`.

    Raises:
        UnusableRow: If it is something else.
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UnusableRow("malformed messages")
    messages = []
    for message in value:
        names = ("role", "content") if message.get("role") is not None else ("from", "value")
        role, content = (message.get(name) for name in names)
        if not isinstance(role, str) or not isinstance(content, str):
            raise UnusableRow("malformed messages")
        messages.append({"role": ROLES.get(role, role), "content": content})
    return messages


def split_dialogue(dialogue: object) -> tuple[Prompt, str]:
    """Split a dialogue, text or messages, into what precedes the assistant's last turn and that turn.

    Text is a transcript of `Human:` and `Assistant:` turns: the prompt ends with `Assistant:` and the response begins
    with the blank behind it.

    Raises:
        UnusableRow: If there is no dialogue, or the assistant has no turn in it.
    """
    if not dialogue:
        raise UnusableRow("empty dialogue")
    if isinstance(dialogue, str):
        start, marker, response = dialogue.rpartition(ASSISTANT)
        if not marker:
            raise UnusableRow("no assistant turn")
        return start + marker if start.strip() else "", response
    messages = read_messages(dialogue)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise UnusableRow("no assistant turn")
    return messages[: turns[-1]], messages[turns[-1]]["content"]


def to_chat(prompt: Prompt) -> list[dict[str, str]]:
    """Text as one user message, or as its turns if it is a transcript of `Human:` and `Assistant:` turns."""
    if not isinstance(prompt, str):
        return prompt
    before, *pieces = TURN.split(prompt.removesuffix(ASSISTANT))
    if not pieces or before.strip():
        return [{"role": "user", "content": prompt}]
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": ROLES[speaker], "content": text.strip()} for speaker, text in turns]


def column_format(prompt: str, response: str | None = None, pair: tuple[str, str] | None = None) -> Format:
    """Format of a data set with a column of prompts and columns of responses.

    Args:
        prompt: Column of the prompts, text or messages.
        response: Column of the responses, text.
        pair: Columns of the chosen and of the rejected responses; text, or messages with or without the prompt's. The
            chosen one is the response, then.
    """
    if pair is None:
        columns = (prompt,) if response is None else (prompt, response)
        read_response = None if response is None else lambda row: (row[prompt], row[response])
        return Format(columns, lambda row: row[prompt], read_response)
    chosen, rejected = (_side_reader(prompt, column) for column in pair)
    return Format((prompt, *pair), _prompt_of(chosen), chosen, (chosen, rejected))


def find_format(columns: Iterable[str], content: Literal["prompts", "responses", "pairs"]) -> Format | None:
    """The first known format with such content whose columns are all among these, or None."""
    names = set(columns)
    for known in FORMATS:
        has = {"prompts": True, "responses": known.read_response is not None, "pairs": known.read_pair is not None}
        if has[content] and names.issuperset(known.columns):
            return known
    return None


def _side_reader(prompt_column: str, column: str) -> ResponseReader:
    """Reader of one side of a pair that stands next to its prompt."""

    def read(row: Row) -> tuple[object, object]:
        prompt, side = row[prompt_column], row[column]
        if not isinstance(side, list):
            return prompt, side
        return split_dialogue(side if len(side) > 1 else read_messages(to_chat(prompt or [])) + side)

    return read


def _dialogue_reader(column: str) -> ResponseReader:
    return lambda row: split_dialogue(row[column])


def _prompt_of(read_response: ResponseReader) -> PromptReader:
    return lambda row: read_response(row)[0]


def _messages_format(column: str) -> Format:
    def open_prompt(row: Row) -> Prompt:
        """The messages, less the last one if it is the assistant's."""
        messages = read_messages(row[column] or [])
        return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages

    return Format((column,), open_prompt, _dialogue_reader(column))


def _instruction(row: Row) -> object:
    """The instruction, with its input (a column of Alpaca's) a blank line below."""
    instruction, context = row["instruction"], row.get("input")
    return f"{instruction}\n\n{context}" if instruction and context else instruction


def _first_turn(row: Row) -> object:
    """The first of the user's turns (MT-bench)."""
    turns = row["turns"]
    return turns[0] if isinstance(turns, list) and turns else turns


_CHOSEN, _REJECTED = _dialogue_reader("chosen"), _dialogue_reader("rejected")

FORMATS = (
    column_format("prompt", pair=("chosen", "rejected")),
    Format(("chosen", "rejected"), _prompt_of(_CHOSEN), _CHOSEN, (_CHOSEN, _REJECTED)),
    _messages_format("messages"),
    _messages_format("conversation"),
    _messages_format("conversations"),
    Format(("instruction", "output"), _instruction, lambda row: (_instruction(row), row["output"])),
    column_format("question", "answer"),
    column_format("prompt", "response"),
    column_format("prompt"),
    Format(("turns",), _first_turn),
)
