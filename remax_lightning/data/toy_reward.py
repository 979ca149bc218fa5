"""The hidden gold reward of the quickstart's small world."""

from collections.abc import Sequence

from remax_lightning.data.toy_grammar import KIND_TRAITS, RUDE_TRAITS, Facts, Sentence, read_prompt, read_response

LOWEST_REWARD, HIGHEST_REWARD = -5.0, 5.0
MAX_SENTENCES = 5  # a longer response rambles
MAX_KIND_WORDS = 3  # further kind words earn nothing
KIND_WORDS = frozenset().union(*KIND_TRAITS.values())
RUDE_WORDS = frozenset().union(*RUDE_TRAITS.values())


def gold_reward(prompts: list[str], responses: list[str], **columns: object) -> list[float]:
    """The world's hidden reward: what the preferences come from and what the evaluation measures.

    It pays for the right colour, animal and place, up to three different kind words, a habit and a good closing. It
    charges for wrong facts, rude words, evasions, repetitions, sentences outside the grammar and more than five
    sentences. A whole response without a fault earns 5; an empty one -5.

    Args:
        prompts: Prompts of the world.
        responses: One response to each prompt.
        **columns: Further columns of a batch; not used.

    Returns:
        One reward in [-5, 5] for each response.

    Raises:
        ValueError: If the lengths differ or a prompt is not from the world.

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
