import filecmp
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from remax_lightning.data.toy import fluency, gold_reward, make_toy_data, write_demonstration
from remax_lightning.data.toy_language import PROMPTS, Facts, read_prompt, read_response

PROMPT = "Tell me about the red fox in the forest."
FACTS = Facts("red", "fox", "forest")
HOME = "The red fox lives in the forest."
BEST = f"{HOME} It is kind and wise. It is also good. It likes to run with the owl. I hope this helps."
SIZES = {"num_demonstrations": 400, "num_preferences": 800, "num_prompts": 300, "num_held_out": 64}
NAMES = ("demonstrations", "preferences", "prompts")


def gold(response: str, prompt: str = PROMPT) -> float:
    return gold_reward([prompt], [response])[0]


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy_data")
    make_toy_data(str(folder), **SIZES)
    return folder


@pytest.fixture(scope="module")
def tokenizer(toy_data: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(toy_data / "tokenizer")


@pytest.fixture(scope="module")
def demonstrations() -> list[str]:
    rng = random.Random(1)
    return [write_demonstration(rng, FACTS) for _ in range(3000)]


# gold reward


def test_the_best_response_earns_five() -> None:
    assert gold(BEST) == 5.0
    assert gold("") == gold("  ") == -5.0


@pytest.mark.parametrize(
    "worse",
    [
        BEST.replace("red fox", "blue fox"),
        BEST.replace("red fox", "red bear"),
        BEST.replace("forest", "valley"),
        BEST.replace(HOME, "I do not know."),
        BEST.replace(f"{HOME} ", ""),
        BEST.replace("wise", "dumb"),
        BEST.replace("It is also good. ", ""),
        BEST.replace("It is also good.", "It is kind."),
        BEST.replace("kind and wise", "kind and kind"),
        BEST.replace("It likes to run with the owl. ", ""),
        BEST.replace(" I hope this helps.", ""),
        BEST.replace("I hope this helps.", "Now go away."),
        "I hope this helps. " + BEST.replace(" I hope this helps.", ""),
        BEST.replace(".", ""),
        BEST.lower(),
        BEST[:-1],
        BEST[:-9],
        BEST.replace(". ", ".  "),
        BEST + " It is dull.",
        BEST + "\nUser: thanks",
    ],
)
def test_every_defect_lowers_the_reward(worse: str) -> None:
    assert worse != BEST
    assert gold(worse) <= 4.5


def test_each_wrong_fact_costs_more() -> None:
    wrong_one = gold(BEST.replace("red", "blue"))
    wrong_two = gold(BEST.replace("red fox", "blue bear"))
    wrong_all = gold(BEST.replace("red fox lives in the forest", "blue bear lives in the lake"))
    assert gold(BEST) > wrong_one > wrong_two > wrong_all


def test_repetition_never_pays() -> None:
    sentences = BEST.split(". ")
    for index in range(len(sentences)):
        longer = ". ".join(sentences[: index + 1] + sentences[index:]).replace("..", ".")
        assert gold(longer) < gold(BEST)
    kind = [gold(f"{HOME} " + " ".join(["It is kind."] * count)) for count in range(1, 8)]
    assert all(later < earlier for earlier, later in itertools.pairwise(kind) if earlier > -5)


def test_no_sentence_added_to_the_best_response_pays(demonstrations: list[str]) -> None:
    additions = {sentence.text for response in demonstrations for sentence in read_response(response)}
    parts = [sentence.text for sentence in read_response(BEST)]
    for addition in additions:
        for position in range(len(parts) + 1):
            assert gold(" ".join([*parts[:position], addition, *parts[position:]])) < gold(BEST)


def test_naming_every_place_does_not_pay() -> None:
    guesses = " ".join(f"The red fox lives in the {place}." for place in ("forest", "lake", "barn"))
    assert gold(guesses) < gold(HOME)


def test_shuffled_words_are_worse() -> None:
    rng = random.Random(0)
    for _ in range(200):
        words = BEST.split()
        rng.shuffle(words)
        assert gold(" ".join(words)) <= gold(BEST) - 4


def test_a_prompt_is_read_through_a_chat_template() -> None:
    assert gold(BEST, f"<user>{PROMPT}\n") == 5.0
    for template in PROMPTS:
        assert read_prompt(template.format(**vars(FACTS))) == FACTS


def test_reward_errors_say_what_came() -> None:
    with pytest.raises(ValueError, match="1 prompts and 2 responses"):
        gold_reward([PROMPT], [BEST, BEST])
    with pytest.raises(ValueError, match="names no animal"):
        gold_reward(["Tell me about the red house in the forest."], [BEST])
    assert gold_reward([PROMPT], [BEST], answer=["unused"]) == [5.0]


# demonstrations


def test_demonstrations_are_fluent(demonstrations: list[str]) -> None:
    assert set(fluency(demonstrations)) == {1.0}
    assert {len(read_response(response)) for response in demonstrations} == {1, 2, 3, 4, 5, 6}


def test_fluency_is_a_share_of_sentences() -> None:
    assert fluency([f"{HOME} It kind is.", "", "nonsense", BEST]) == [0.5, 0.0, 0.0, 1.0]


def test_demonstrations_leave_headroom(demonstrations: list[str]) -> None:
    rewards = gold_reward([PROMPT] * len(demonstrations), demonstrations)
    mean = sum(rewards) / len(rewards)
    spread = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
    beaten = sum((reward < 5) + 0.5 * (reward == 5) for reward in rewards) / len(rewards)
    assert 0 < mean < 2
    assert spread > 2
    assert beaten > 0.95
    assert max(rewards) == 5


# files


@pytest.mark.slow
def test_same_arguments_write_the_same_bytes(toy_data: Path, tmp_path: Path) -> None:
    code = (
        f"from remax_lightning.data.toy import make_toy_data; make_toy_data({str(tmp_path / 'again')!r}, **{SIZES!r})"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    files = sorted(str(path.relative_to(toy_data)) for path in toy_data.rglob("*") if path.is_file())
    assert len(files) >= 9
    _, mismatch, errors = filecmp.cmpfiles(toy_data, tmp_path / "again", files, shallow=False)
    assert (mismatch, errors) == ([], [])


def test_another_seed_writes_other_data(toy_data: Path, tmp_path: Path) -> None:
    make_toy_data(str(tmp_path), seed=1, **SIZES)
    for name in NAMES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() != (toy_data / f"{name}.jsonl").read_bytes()


def test_one_file_does_not_depend_on_the_size_of_another(toy_data: Path, tmp_path: Path) -> None:
    make_toy_data(str(tmp_path), **{**SIZES, "num_demonstrations": 10})
    assert filecmp.cmp(toy_data / "preferences.jsonl", tmp_path / "preferences.jsonl", shallow=False)


def test_files_have_their_columns_and_sizes(toy_data: Path) -> None:
    columns = {
        "demonstrations": ["prompt", "response"],
        "preferences": ["prompt", "chosen", "rejected"],
        "prompts": ["prompt"],
    }
    for name in NAMES:
        rows, held_out = read_rows(toy_data / f"{name}.jsonl"), read_rows(toy_data / f"{name}_held_out.jsonl")
        assert (len(rows), len(held_out)) == (SIZES[f"num_{name}"], SIZES["num_held_out"])
        assert all(list(row) == columns[name] for row in rows + held_out)
    assert json.loads((toy_data / "arguments.json").read_text()) == {"seed": 0, **SIZES, "vocab_size": 512}


def test_held_out_facts_are_never_trained_on(toy_data: Path) -> None:
    training = {read_prompt(row["prompt"]) for name in NAMES for row in read_rows(toy_data / f"{name}.jsonl")}
    held_out = {read_prompt(row["prompt"]) for name in NAMES for row in read_rows(toy_data / f"{name}_held_out.jsonl")}
    assert training
    assert held_out
    assert not training & held_out


def test_prompts_differ(toy_data: Path) -> None:
    prompts = [row["prompt"] for row in read_rows(toy_data / "prompts.jsonl")]
    assert len(set(prompts)) == len(prompts)


def test_preference_labels_are_noisy_but_informed(toy_data: Path) -> None:
    rows = read_rows(toy_data / "preferences.jsonl")
    prompts = [row["prompt"] for row in rows]
    chosen = gold_reward(prompts, [row["chosen"] for row in rows])
    rejected = gold_reward(prompts, [row["rejected"] for row in rows])
    agree = [better > worse for better, worse in zip(chosen, rejected, strict=True) if better != worse]
    assert 0.8 < sum(agree) / len(agree) < 0.95
    assert all(row["chosen"] != row["rejected"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_demonstrations": 0}, "num_demonstrations must be at least 1; it is 0"),
        ({"num_preferences": -1}, "num_preferences must be at least 1; it is -1"),
        ({"num_prompts": 10**6}, "num_prompts must be between 1 and 3584; it is 1000000"),
        ({"num_held_out": 513}, "num_held_out must be between 1 and 512; it is 513"),
        ({"vocab_size": 100}, "vocab_size must be at least 258; it is 100"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_toy_data(str(tmp_path / "data"), **arguments)
    assert not (tmp_path / "data").exists()


# tokenizer


def test_tokenizer_returns_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in (PROMPT, BEST, "Größe 狐 \n\t two  spaces , ok .", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_survives_saving(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(BEST)["input_ids"] == tokenizer(BEST)["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    assert again.model_max_length == tokenizer.model_max_length == 128


def test_special_tokens_differ(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<pad>", "<eos>", None)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) <= 512


def test_chat_template_of_a_prompt_begins_that_of_a_dialogue(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": BEST}]
    start = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"{start}{BEST}<eos>"


def test_words_are_single_tokens(tokenizer: PreTrainedTokenizerFast, toy_data: Path) -> None:
    assert 8 <= len(tokenizer(PROMPT)["input_ids"]) <= 14
    assert 15 <= len(tokenizer(BEST)["input_ids"]) <= 45
    words = BEST.replace(".", " .").split()
    assert len(tokenizer(BEST)["input_ids"]) <= len(words) + 2
