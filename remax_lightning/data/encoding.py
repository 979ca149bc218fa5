"""Texts of many rows as tokens, with as few calls of the tokenizer as possible."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple, ParamSpec, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from remax_lightning.data.formats import UnusableRow
from remax_lightning.models.tokenizer import Prompt, encode_prompts, encode_responses

P = ParamSpec("P")
T = TypeVar("T")


class Text(NamedTuple):
    """A prompt and the responses to it that are to be tokenized."""

    prompt: Prompt
    responses: tuple[str, ...] = ()


class Tokens(NamedTuple):
    """The token ids of a prompt and of its responses."""

    prompt_ids: list[int]
    response_ids: list[list[int]]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text]) -> list[Tokens | UnusableRow]:
    """Tokens of each text, in their order; what the chat template refuses is an unusable row."""
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


def attempt(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | UnusableRow:
    """What a function returns, or the `UnusableRow` that it raises."""
    try:
        return function(*args, **kwargs)
    except UnusableRow as reason:
        return reason
