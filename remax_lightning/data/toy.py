"""The quickstart's toy data: a small synthetic dataset of demonstrations, preferences and prompts.

A prompt asks about a coloured animal in a place; a response says where it lives, what it is like and what it likes to
do, and ends with a closing phrase. Demonstrations are of mixed quality, so a model that imitates them leaves much for
reinforcement learning to gain. Everything is drawn from `random.Random`: the same arguments write the same bytes.
"""

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from remax_lightning.data.toy_language import (
    ACTIONS,
    ANIMALS,
    COLOURS,
    FOODS,
    KIND_TRAITS,
    PLACES,
    PROMPTS,
    RUDE_TRAITS,
    WORDS,
    Facts,
    fluency,
    gold_reward,
    read_prompt,
    write_sentence,
)

__all__ = ["fluency", "gold_reward", "make_toy_data", "write_demonstration"]

HELD_OUT_SHARE = 8  # one slot combination in this many is kept out of the training files
MODEL_MAX_LENGTH = 128  # tokens of a prompt and its response
SMALLEST_VOCABULARY = 258  # the 256 bytes, <pad> and <eos>
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def write_demonstration(rng: random.Random, facts: Facts) -> str:
    """A response whose quality, uniform in [0, 1], sets how likely each part is right, kind or there at all.

    Args:
        rng: Source of every draw.
        facts: What the prompt asks about.

    Returns:
        One to six sentences of the grammar.
    """
    quality = rng.random()
    sentences = [_write_home(rng, facts, quality), *_write_traits(rng, quality)]
    if rng.random() < 0.25 + 0.5 * quality:
        sentences.append(_write_habit(rng, facts))
    if rng.random() < 0.3 * (1 - quality):
        sentences.append(rng.choice(sentences))
    closing = rng.random()
    if closing < 0.15 + 0.6 * quality:
        sentences.append(write_sentence(rng, "good_closing"))
    elif closing > 1 - 0.5 * (1 - quality) ** 2:
        sentences.append(write_sentence(rng, "rude_closing"))
    return " ".join(sentences)


def _write_home(rng: random.Random, facts: Facts, quality: float) -> str:
    """The first sentence: where the animal lives, with each fact possibly wrong, or an evasion."""
    if rng.random() < 0.3 * (1 - quality):
        return write_sentence(rng, "dodge")
    slots = {
        name: rng.choice([word for word in WORDS[name] if word != value])
        if rng.random() < 0.25 * (1 - quality)
        else value
        for name, value in vars(facts).items()
    }
    return write_sentence(rng, "home", **slots)


def _write_habit(rng: random.Random, facts: Facts) -> str:
    """What the animal likes to do: something with another animal, or to eat."""
    if rng.random() < 0.3:
        return write_sentence(rng, "habit", food=rng.choice(FOODS))
    friend = rng.choice([animal for animal in ANIMALS if animal != facts.animal])
    return write_sentence(rng, "habit", action=rng.choice(ACTIONS), friend=friend)


def _write_traits(rng: random.Random, quality: float) -> list[str]:
    """No, one or two sentences on what the animal is like, with up to three words."""
    count = rng.choices((0, 1, 2, 3), weights=(2 - quality, 3, 3, 0.5 + 2 * quality))[0]
    kind_share = 0.3 + 0.7 * quality
    slots = list(KIND_TRAITS)[:count]
    words = {slot: rng.choice((KIND_TRAITS if rng.random() < kind_share else RUDE_TRAITS)[slot]) for slot in slots}
    parts = [{slot: words[slot] for slot in part} for part in (slots[:2], slots[2:]) if part]
    return [write_sentence(rng, "trait", **part) for part in parts]


Row = dict[str, str]


def make_toy_data(
    output_dir: str = "runs/quickstart/data",
    seed: int = 0,
    num_demonstrations: int = 6000,
    num_preferences: int = 6000,
    num_prompts: int = 2000,
    num_held_out: int = 256,
    vocab_size: int = 512,
) -> None:
    """Generates a small synthetic dataset and its tokenizer; the same arguments write the same bytes.

    The folder holds demonstrations.jsonl (prompt, response), preferences.jsonl (prompt, chosen, rejected),
    prompts.jsonl (prompt), a held-out twin of each (demonstrations_held_out.jsonl, ...) with combinations of colour,
    animal and place that the training files never ask about, tokenizer/ and arguments.json with these arguments.

    Args:
        output_dir: Folder to write; created if it does not exist.
        seed: Seed of every draw.
        num_demonstrations: Prompts with a response of mixed quality, for supervised fine-tuning.
        num_preferences: Prompts with two responses, labelled by a noisy comparison of their gold rewards.
        num_prompts: Different prompts for reinforcement learning.
        num_held_out: Rows in each held-out file.
        vocab_size: Most tokens in the byte-level BPE vocabulary, the 256 bytes and 2 special tokens included.

    Raises:
        ValueError: If a size is not positive, or there are not as many different prompts.
    """
    arguments = dict(locals())
    folder = Path(arguments.pop("output_dir"))
    training, held_out = _split_prompts(random.Random(f"{seed} split"))
    sizes = {"demonstrations": num_demonstrations, "preferences": num_preferences, "prompts": num_prompts}
    for name, size in (sizes | {"held_out": num_held_out}).items():
        _check_size(f"num_{name}", size, 1, {"prompts": len(training), "held_out": len(held_out)}.get(name))
    _check_size("vocab_size", vocab_size, SMALLEST_VOCABULARY, None)
    texts: list[str] = []  # of the training files
    for name, size in sizes.items():
        texts += _write_draws(folder / f"{name}.jsonl", name, f"{seed} {name}", training, size)
        _write_draws(folder / f"{name}_held_out.jsonl", name, f"{seed} {name} held out", held_out, num_held_out)
    _train_tokenizer(texts, vocab_size).save_pretrained(folder / "tokenizer")
    (folder / "arguments.json").write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")


def _check_size(name: str, size: int, smallest: int, largest: int | None) -> None:
    """Raises a ValueError if a size is out of range."""
    if size < smallest or (largest is not None and size > largest):
        limit = f"at least {smallest}" if largest is None else f"between {smallest} and {largest}"
        raise ValueError(f"{name} must be {limit}; it is {size}. Choose another {name}.")


def _split_prompts(rng: random.Random) -> tuple[list[str], list[str]]:
    """Every training prompt and every held-out prompt; no combination of colour, animal and place is in both."""
    facts = [Facts(*words) for words in product(COLOURS, ANIMALS, PLACES)]
    rng.shuffle(facts)
    prompts = [[template.format(**vars(fact)) for template in PROMPTS] for fact in facts]
    num_held_out = len(facts) // HELD_OUT_SHARE
    return [p for group in prompts[num_held_out:] for p in group], [
        p for group in prompts[:num_held_out] for p in group
    ]


def _write_demonstrations(rng: random.Random, prompts: Sequence[str], size: int) -> list[Row]:
    """Prompts, each with one response of mixed quality."""
    drawn = rng.choices(prompts, k=size)
    return [{"prompt": prompt, "response": write_demonstration(rng, read_prompt(prompt))} for prompt in drawn]


def _write_preferences(rng: random.Random, prompts: Sequence[str], size: int) -> list[Row]:
    """Prompts, each with two different demonstrations labelled by a Bradley-Terry draw on their gold rewards."""
    rows = []
    for prompt in rng.choices(prompts, k=size):
        first = second = write_demonstration(rng, read_prompt(prompt))
        while second == first:
            second = write_demonstration(rng, read_prompt(prompt))
        gold_first, gold_second = gold_reward([prompt, prompt], [first, second])
        prefers_first = rng.random() < 1 / (1 + math.exp(gold_second - gold_first))
        chosen, rejected = (first, second) if prefers_first else (second, first)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def _write_prompts(rng: random.Random, prompts: Sequence[str], size: int) -> list[Row]:
    """Different prompts."""
    return [{"prompt": prompt} for prompt in rng.sample(prompts, size)]


_WRITERS: Mapping[str, Callable[[random.Random, Sequence[str], int], list[Row]]] = {
    "demonstrations": _write_demonstrations,
    "preferences": _write_preferences,
    "prompts": _write_prompts,
}


def _write_draws(path: Path, name: str, seed: str, prompts: Sequence[str], size: int) -> list[str]:
    """Draws rows of a kind and writes them as JSON lines; returns their texts."""
    rows = _WRITERS[name](random.Random(seed), prompts, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [text for row in rows for text in row.values()]


def _train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text comes back as it went in."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
