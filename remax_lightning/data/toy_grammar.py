"""The grammar of the quickstart's small world: the words, the sentences, and the way back from text to what it says.

One table of templates is read in both directions: the generator fills the slots, the parser turns each template into a
regular expression. What the generator writes is therefore in the grammar by construction.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLOURS = ("red", "blue", "green", "black", "white", "brown", "grey", "pink")
ANIMALS = (
    *("fox", "owl", "bear", "wolf", "deer", "goat", "duck", "frog"),
    *("cat", "dog", "hen", "pig", "crow", "hare", "mole", "seal"),
)
PLACES = ("forest", "garden", "valley", "meadow", "desert", "barn", "lake", "town")
# What an animal may be like, by slot. No word is in two slots, so no sentence need say one twice.
KIND_TRAITS = {
    "first_trait": ("kind", "calm", "gentle", "warm"),
    "second_trait": ("wise", "brave", "loyal", "sweet"),
    "third_trait": ("good", "fair", "fun", "neat"),
}
RUDE_TRAITS = {
    "first_trait": ("mean", "dull", "nasty"),
    "second_trait": ("dumb", "lazy", "rude"),
    "third_trait": ("ugly", "bad", "vain"),
}
ACTIONS = ("run", "play", "swim", "sing", "rest", "hunt")
FOODS = ("grass", "seeds", "nuts", "bread", "honey", "fish")

WORDS: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "animal": ANIMALS,
    "place": PLACES,
    "action": ACTIONS,
    "friend": ANIMALS,
    "food": FOODS,
    **{slot: KIND_TRAITS[slot] + RUDE_TRAITS[slot] for slot in KIND_TRAITS},
}

PROMPTS = (
    "Tell me about the {colour} {animal} in the {place}.",
    "What do you know about the {colour} {animal} in the {place}?",
    "Who is the {colour} {animal} that lives in the {place}?",
    "Can you tell me about the {colour} {animal} in the {place}?",
)

SENTENCES: dict[str, tuple[str, ...]] = {
    "home": ("The {colour} {animal} lives in the {place}.", "You can find the {colour} {animal} in the {place}."),
    "trait": ("It is {first_trait}.", "It is {first_trait} and {second_trait}.", "It is also {third_trait}."),
    "habit": ("It likes to {action} with the {friend}.", "It likes to eat {food}."),
    "dodge": ("I do not know.", "I do not care."),
    "good_closing": ("I hope this helps.", "Have a nice day.", "Thank you for asking."),
    "rude_closing": ("Now go away.", "Do not ask me again."),
}


@dataclass(frozen=True)
class Facts:
    """What a prompt asks about: the three slots of its template."""

    colour: str
    animal: str
    place: str


@dataclass(frozen=True)
class Sentence:
    """One sentence of a response, read by the grammar.

    Attributes:
        text: The sentence as it was written.
        kind: A key of `SENTENCES`, or None when the grammar cannot produce the sentence.
        slots: The words in the template's slots, by slot name.
    """

    text: str
    kind: str | None
    slots: Mapping[str, str]


def _pattern(template: str) -> re.Pattern[str]:
    """The regular expression that matches every sentence of one template."""
    parts = re.split(r"\{(\w+)\}", template)  # text, slot, text, slot, ..., text
    slots = (f"(?P<{slot}>{'|'.join(WORDS[slot])})" for slot in parts[1::2])
    texts = (re.escape(text) for text in parts[::2])
    return re.compile(next(texts) + "".join(slot + text for slot, text in zip(slots, texts, strict=True)))


_SENTENCE_PATTERNS = [(kind, _pattern(template)) for kind, templates in SENTENCES.items() for template in templates]
_FACT_PATTERNS = {name: re.compile(rf"\b({'|'.join(WORDS[name])})\b") for name in ("colour", "animal", "place")}


def write_sentence(rng: random.Random, kind: str, **slots: str) -> str:
    """A sentence of a kind, with one of the templates that use exactly these slots."""
    wanted = sorted(slots)
    templates = [text for text in SENTENCES[kind] if sorted(re.findall(r"\{(\w+)\}", text)) == wanted]
    return rng.choice(templates).format(**slots)


def read_sentence(text: str) -> Sentence:
    """Reads one sentence; its kind is None when the grammar cannot produce it."""
    for kind, pattern in _SENTENCE_PATTERNS:
        match = pattern.fullmatch(text)
        if match:
            return Sentence(text, kind, match.groupdict())
    return Sentence(text, None, {})


def read_response(response: str) -> list[Sentence]:
    """Splits a response after each full stop and space and reads its sentences; an empty response has none."""
    text = response.strip()
    return [read_sentence(sentence) for sentence in re.split(r"(?<=[.?!]) ", text)] if text else []


def read_prompt(prompt: str) -> Facts:
    """The facts that a prompt asks about.

    Args:
        prompt: A prompt of the world, with or without a chat template around it.

    Returns:
        Its colour, animal and place.

    Raises:
        ValueError: If the prompt does not name one of each.
    """
    found = {name: pattern.search(prompt) for name, pattern in _FACT_PATTERNS.items()}
    missing = [name for name, match in found.items() if match is None]
    if missing:
        raise ValueError(
            f"A prompt must name a colour, an animal and a place of the toy world; {prompt!r} names no {missing[0]}. "
            "Use prompts that write_world has written."
        )
    return Facts(**{name: match.group() for name, match in found.items() if match})


def fluency(responses: Sequence[str]) -> list[float]:
    """Share of the sentences in each response that the grammar can produce.

    Args:
        responses: Texts to read.

    Returns:
        One share in [0, 1] for each response; 0 for an empty one.

    Example:
        >>> fluency(["It is kind. It kind is.", ""])
        [0.5, 0.0]
    """
    read = [read_response(response) for response in responses]
    return [sum(s.kind is not None for s in sentences) / max(len(sentences), 1) for sentences in read]
