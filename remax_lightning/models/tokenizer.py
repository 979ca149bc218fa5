"""One way of writing a conversation as tokens, for rollouts, training and reward scoring alike.

The prompt and the response are always tokenized apart, so a prompt has the same tokens wherever it occurs and
`encode_prompt(...) + encode_response(...)` is a training sequence.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from remax_lightning.models.chat_template import TemplateLimit, render
from remax_lightning.models.hub import check_reachable
from remax_lightning.models.model_folder import naming_files

Prompt: TypeAlias = str | list[dict[str, str]]
"""Plain text, or chat messages, each with a `role` and a `content`."""


def load_tokenizer(path: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can pad.

    A tokenizer without a pad token pads with its eos token; masks come from lengths, so the two may be the same.

    Args:
        path: Folder or hub name.
        chat_template: Jinja text, or a path to a `.jinja` file, in place of the tokenizer's chat template.

    Raises:
        FileNotFoundError: If `path` is neither an existing folder nor a hub name that is cached or can be reached.
        ValueError: If a file cannot be read, or the tokenizer has neither a pad nor an eos token.
    """
    check_reachable(path, "tokenizer")
    with naming_files(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(Path(path).expanduser()), trust_remote_code=False)
    return prepared_tokenizer(tokenizer, chat_template)


def prepared_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer itself, with a pad token and the chat template.

    Raises:
        ValueError: If it has neither a pad nor an eos token.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path!r} has neither a pad nor an eos token; add an eos token to it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        file = Path(chat_template).expanduser() if chat_template.endswith(".jinja") else None
        if file is not None and not file.is_file():
            raise FileNotFoundError(
                f"chat_template: there is no file {chat_template}; give an existing one, or its text"
            )
        tokenizer.chat_template = chat_template if file is None else file.read_text("utf-8")
    return tokenizer


def have_same_vocabulary(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers have the same tokens, so that log-probs of their models can be compared."""
    return first.get_vocab() == second.get_vocab()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Tokens of a prompt, up to where the response begins.

    Of the special tokens that the tokenizer adds to text, those in front stay (a BOS token that the text already starts
    with is not doubled) and those behind are dropped. Messages are rendered by the chat template, with the generation
    prompt; their special tokens are the template's.

    Args:
        tokenizer: Tokenizer; with a chat template if the prompt is a list of messages.
        prompt: Text or messages.

    Returns:
        Token ids.

    Raises:
        ValueError: If the prompt is a list of messages and the tokenizer has no chat template.
    """
    return encode_prompts(tokenizer, [prompt])[0]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Tokens of each prompt, as `encode_prompt` gives them; one call of the tokenizer, which may use many threads."""
    leading = _leading_special_tokens(tokenizer)
    texts = [
        prompt if isinstance(prompt, str) else _render(tokenizer, prompt, add_generation_prompt=True)
        for prompt in prompts
    ]
    rows = zip(prompts, _tokenize(tokenizer, texts), strict=True)
    return [_begin(tokenizer, ids, leading) if isinstance(prompt, str) else ids for prompt, ids in rows]


def encode_response(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str) -> list[int]:
    """Tokens that follow the prompt, the one that ends the response included.

    After text: the response's tokens and eos. After messages: what the chat template writes after the rendered prompt,
    up to the token that ends the turn; a template that adds none gets eos, and so does one that writes the prompt
    differently once a response follows it.

    Args:
        tokenizer: Tokenizer with an eos token.
        prompt: Text or messages.
        response: Text of the response.

    Returns:
        Token ids; the last one is a special token.
    """
    return encode_responses(tokenizer, [prompt], [response])[0]


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], responses: Sequence[str]
) -> list[list[int]]:
    """Tokens that follow each prompt, as `encode_response` gives them; one call of the tokenizer."""
    pairs = list(zip(prompts, responses, strict=True))
    rows = _tokenize(tokenizer, [_response_text(tokenizer, prompt, response) for prompt, response in pairs])
    return [
        _end(tokenizer, ids, cut_blanks=not isinstance(prompt, str))
        for (prompt, _), ids in zip(pairs, rows, strict=True)
    ]


def _response_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str) -> str:
    """What follows the prompt: the response, after messages with what the chat template puts around it."""
    if isinstance(prompt, str):
        return response
    before = _render(tokenizer, prompt, add_generation_prompt=True)
    turn = {"role": "assistant", "content": response}
    conversation = _render(tokenizer, [*prompt, turn], add_generation_prompt=False)
    return conversation[len(before) :] if conversation.startswith(before) else response


def _begin(tokenizer: PreTrainedTokenizerBase, ids: list[int], leading: list[int]) -> list[int]:
    """Prepend the leading special tokens to those of a text, unless the text itself starts with a BOS token."""
    has_bos = ids[:1] == leading[-1:] == [tokenizer.bos_token_id]
    return ids if has_bos else leading + ids


def _end(tokenizer: PreTrainedTokenizerBase, ids: list[int], *, cut_blanks: bool) -> list[int]:
    """Make the last token one that ends a response; blanks that a template writes behind it are dropped."""
    end = len(ids)
    while cut_blanks and end and not str(tokenizer.decode([ids[end - 1]])).strip():
        end -= 1
    if end and _is_special(tokenizer, ids[end - 1]):
        return ids[:end]
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no eos token to end a response with; set one")
    return [*ids, tokenizer.eos_token_id]


def _leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the tokenizer puts in front of any text."""
    (plain,), marked = _tokenize(tokenizer, ["a"]), tokenizer("a")["input_ids"]
    starts = (start for start in range(len(marked)) if marked[start : start + len(plain)] == plain)
    return marked[: next(starts, 0)]


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the prompt is a list of messages, but tokenizer {tokenizer.name_or_path!r} has no chat template; "
            "set chat_template, or use text prompts"
        )
    template, special_tokens = tokenizer.get_chat_template(), tokenizer.special_tokens_map
    try:
        return render(template, messages, special_tokens, add_generation_prompt=add_generation_prompt)
    except TemplateLimit as error:
        raise TemplateLimit(
            f"the chat template of tokenizer {tokenizer.name_or_path!r} needs more than {error} for a conversation of "
            f"{len(messages)} messages; set chat_template to another one"
        ) from error


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _is_special(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return tokenizer.decode([token], skip_special_tokens=True) == "" != tokenizer.decode([token])
