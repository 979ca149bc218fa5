"""The language of the quickstart's toy data: its grammar, a parser, and the hidden gold reward of a response.

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

LOWEST_REWARD, HIGHEST_REWARD = -5.0, 5.0
MAX_SENTENCES = 5  # a longer response rambles
MAX_KIND_WORDS = 3  # further kind words earn nothing
KIND_WORDS = frozenset().union(*KIND_TRAITS.values())
RUDE_WORDS = frozenset().union(*RUDE_TRAITS.values())


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
        prompt: A toy prompt, with or without a chat template around it.

    Returns:
        Its colour, animal and place.

    Raises:
        ValueError: If the prompt does not name one of each.
    """
    matches = {name: pattern.search(prompt) for name, pattern in _FACT_PATTERNS.items()}
    missing = [name for name, match in matches.items() if match is None]
    if missing:
        raise ValueError(
            f"A prompt must name a colour, an animal and a place of the toy data; {prompt!r} names no {missing[0]}. "
            "Use the prompts that make-toy-data has written."
        )
    return Facts(**{name: match.group() for name, match in matches.items() if match})


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


def gold_reward(prompts: list[str], responses: list[str], **columns: object) -> list[float]:
    """The hidden reward of the toy data: the preferences are drawn by it, and the evaluation measures it.

    It pays for the right colour, animal and place, up to three different kind words, a habit and a good closing. It
    charges for wrong facts, rude words, evasions, repetitions, sentences outside the grammar and more than five
    sentences. A complete response without a fault earns 5; an empty one -5.

    Args:
        prompts: Toy prompts.
        responses: One response to each prompt.
        **columns: Further columns of a batch; not used.

    Returns:
        One reward in [-5, 5] for each response.

    Raises:
        ValueError: If the lengths differ or a prompt is not a toy prompt.

    Example:
        >>> gold_reward(["Tell me about the red fox in the lake."], ["The red fox lives in the lake. Have a nice day."])
        [3.0]
    """
    if len(prompts) != len(responses):
        raise ValueError(
            f"gold_reward needs one response for each prompt; it got {len(prompts)} prompts and {len(responses)} "
            "responses. Pass lists of equal length."
        )
    return [
        _gold(read_prompt(prompt), read_response(response)) for prompt, response in zip(prompts, responses, strict=True)
    ]


def _gold(facts: Facts, sentences: Sequence[Sentence]) -> float:
    """The reward of one response."""
    if not sentences:
        return LOWEST_REWARD
    reward = (
        -1.0
        + _fact_score(facts, sentences)
        + _trait_score(sentences)
        + _closing_score(sentences)
        + _fault_score(sentences)
    )
    reward += 0.5 * any(sentence.kind == "habit" for sentence in sentences)
    return min(max(reward, LOWEST_REWARD), HIGHEST_REWARD)


def _fact_score(facts: Facts, sentences: Sequence[Sentence]) -> float:
    """One for each right fact of the first home sentence, less one for each wrong fact of any; -1 without one."""
    homes = [sentence.slots for sentence in sentences if sentence.kind == "home"]
    if not homes:
        return -1.0
    wanted = vars(facts).items()
    right = sum(homes[0][name] == value for name, value in wanted)
    wrong = sum(home[name] != value for home in homes for name, value in wanted)
    return float(right - wrong)


def _trait_score(sentences: Sequence[Sentence]) -> float:
    """A half for each different kind word up to the cap, less a half for a repeated word and one for a rude word."""
    words = [word for s in sentences for slot, word in s.slots.items() if slot in KIND_TRAITS]
    kind = len(set(words) & KIND_WORDS)
    rude = sum(word in RUDE_WORDS for word in words)
    return 0.5 * min(kind, MAX_KIND_WORDS) - 1.0 * rude - 0.5 * (len(words) - len(set(words)))


def _closing_score(sentences: Sequence[Sentence]) -> float:
    """One for a good closing as the last sentence, less a half for one elsewhere and one and a half for a rude one."""
    kinds = [sentence.kind for sentence in sentences]
    early = kinds[:-1].count("good_closing")
    return 1.0 * (kinds[-1] == "good_closing") - 0.5 * early - 1.5 * kinds.count("rude_closing")


def _fault_score(sentences: Sequence[Sentence]) -> float:
    """Charges for sentences outside the grammar, evasions, repetitions and rambling."""
    kinds = [sentence.kind for sentence in sentences]
    repeated = len(sentences) - len({sentence.text for sentence in sentences})
    rambling = max(len(sentences) - MAX_SENTENCES, 0)
    return -1.5 * kinds.count(None) - 1.0 * kinds.count("dodge") - 1.0 * repeated - 1.0 * rambling
