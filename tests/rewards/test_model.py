"""ModelReward against the model run alone: one conversation at a time, no padding."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers import processors
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from remax_lightning.models.tokenizer import Prompt, encode_prompt, encode_response
from remax_lightning.rewards import ModelReward

ARCHITECTURES = ["llama", "gpt2", "opt", "qwen2", "gemma", "bert"]
PROMPTS = ["Tell me", "a", "What now.", "Sing a song of it and then some more", "Go on."]
RESPONSES = [" yes", " a longer response than that", "", " b", " c c c"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}.{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant.{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hello"}]


def reward(path: str, **options: Any) -> ModelReward:
    scored = ModelReward(path, **options)
    scored.setup(torch.device("cpu"))
    return scored


def alone(path: str, ids: list[int]) -> float:
    """The model's own score of one unpadded row; without a pad token, transformers reads the last token, eos or not."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    model.config.pad_token_id = None
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])


def encode(path: str, prompt: Prompt, response: str, template: str | None = None) -> list[int]:
    words = AutoTokenizer.from_pretrained(path)
    words.chat_template = words.chat_template if template is None else template
    return encode_prompt(words, prompt) + encode_response(words, prompt, response)


def expected(path: str, prompts: list[Any], responses: list[str], template: str | None = None) -> Tensor:
    pairs = zip(prompts, responses, strict=True)
    return torch.tensor([alone(path, encode(path, prompt, response, template)) for prompt, response in pairs])


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return tiny.save_reward_model(tmp_path / "reward")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_scores_are_those_of_the_model_alone(tmp_path: Path, architecture: str, pad_is_eos: bool) -> None:
    # transformers adds a token of its own to any tokenizer in a folder of qwen2
    path = tiny.save_reward_model(tmp_path / "reward", architecture, pad_is_eos=pad_is_eos, vocab_size=tiny.VOCABULARY)
    scores = reward(path)(PROMPTS, RESPONSES, answer=PROMPTS)
    assert scores.dtype == torch.float32
    assert scores.std() > 1e-3
    torch.testing.assert_close(scores, expected(path, PROMPTS, RESPONSES), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5, 32])
def test_batch_size_and_order_do_not_matter(llama: str, size: int) -> None:
    scores = reward(llama, batch_size=size)(PROMPTS, RESPONSES)
    torch.testing.assert_close(scores, expected(llama, PROMPTS, RESPONSES), atol=1e-5, rtol=1e-5)
    turned = reward(llama, batch_size=size)(PROMPTS[::-1], RESPONSES[::-1])
    torch.testing.assert_close(turned, scores.flip(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_batch_with_every_token_of_the_vocabulary(tmp_path: Path, architecture: str) -> None:
    path = tiny.save_reward_model(tmp_path / "reward", architecture)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ. :"
    prompts, responses = ["<pad>" + letters, "a", "b c"], ["", " x", " <pad>"]
    ids = [token for pair in zip(prompts, responses, strict=True) for token in encode(path, *pair)]
    assert set(ids) == set(range(len(AutoTokenizer.from_pretrained(path))))
    prompts, responses = [*prompts, "q"], [*responses, "<pad>"]
    scores = reward(path)(prompts, responses)
    torch.testing.assert_close(scores, expected(path, prompts, responses), atol=1e-5, rtol=1e-5)


def test_the_reward_model_has_its_own_tokenizer(tmp_path: Path) -> None:
    """Nothing but text comes from the policy: another vocabulary gives the scores that belong to it."""
    path = tiny.save_reward_model(tmp_path / "reward", vocab_size=70)
    words = AutoTokenizer.from_pretrained(path)
    words.add_tokens([" yes", "ong"])
    words.save_pretrained(path)
    assert len(encode(path, "Tell me", " yes")) == len("Tell me") + 2
    torch.testing.assert_close(
        reward(path)(PROMPTS, RESPONSES), expected(path, PROMPTS, RESPONSES), atol=1e-5, rtol=1e-5
    )


def with_template(path: str, template: str) -> None:
    words = AutoTokenizer.from_pretrained(path)
    words.chat_template = template
    words.save_pretrained(path)


def test_messages_go_through_the_chat_template(llama: str) -> None:
    with_template(llama, TEMPLATE)
    words = AutoTokenizer.from_pretrained(llama)
    ids = words("user.Hello<eos>assistant. hi<eos>")["input_ids"]
    assert ids.count(1) == 2
    scores = reward(llama)([MESSAGES], [" hi"])
    assert scores.tolist() == pytest.approx([alone(llama, ids)], abs=1e-5)


def test_as_chat_makes_a_text_prompt_a_message(llama: str) -> None:
    with_template(llama, TEMPLATE)
    plain, chat = reward(llama)(["Hello"], [" hi"]), reward(llama, as_chat=True)(["Hello"], [" hi"])
    assert chat.tolist() == pytest.approx(reward(llama)([MESSAGES], [" hi"]).tolist(), abs=1e-6)
    assert plain.tolist() == pytest.approx([alone(llama, encode(llama, "Hello", " hi"))], abs=1e-5)
    assert abs(float(chat - plain)) > 1e-3


@pytest.mark.parametrize("as_file", [False, True])
def test_another_chat_template(llama: str, tmp_path: Path, as_file: bool) -> None:
    with_template(llama, TEMPLATE)
    other = TEMPLATE.replace("assistant.", "A:").replace("{{ m['role'] }}.", "{{ m['role'][0] }}:")
    given = other
    if as_file:
        given = str(tmp_path / "other.jinja")
        Path(given).write_text(other)
    scores = reward(llama, chat_template=given)([MESSAGES], [" hi"])
    assert scores.tolist() == pytest.approx(expected(llama, [MESSAGES], [" hi"], other).tolist(), abs=1e-5)
    assert abs(float(scores - reward(llama)([MESSAGES], [" hi"]))) > 1e-3


def test_messages_without_a_chat_template_are_refused(llama: str) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        reward(llama)([MESSAGES], [" hi"])


def test_no_bos_is_doubled(tmp_path: Path) -> None:
    path = tiny.save_reward_model(tmp_path / "reward", vocab_size=60)
    words = AutoTokenizer.from_pretrained(path)
    words.add_special_tokens({"bos_token": "<bos>"})
    bos = words.bos_token_id
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    words.chat_template = "<bos>" + TEMPLATE
    words.save_pretrained(path)
    letters = AutoTokenizer.from_pretrained(path)("Hello", add_special_tokens=False)["input_ids"]
    response = AutoTokenizer.from_pretrained(path)(" hi", add_special_tokens=False)["input_ids"]
    once = alone(path, [bos, *letters, *response, 1])
    assert reward(path)(["Hello", "<bos>Hello"], [" hi"] * 2).tolist() == pytest.approx([once, once], abs=1e-5)
    chat = encode(path, MESSAGES, " hi")
    assert chat.count(bos) == 1
    assert reward(path)([MESSAGES], [" hi"]).tolist() == pytest.approx([alone(path, chat)], abs=1e-5)


@pytest.mark.parametrize("max_length", [1, 4, 9])
def test_max_length_keeps_the_end(llama: str, max_length: int) -> None:
    scores = reward(llama, max_length=max_length)(PROMPTS, RESPONSES)
    rows = [encode(llama, prompt, response) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    cut = [alone(llama, ids[-max_length:]) for ids in rows]
    assert scores.tolist() == pytest.approx(cut, abs=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bert", "roberta"])
def test_the_models_context_bounds_the_length(tmp_path: Path, architecture: str) -> None:
    tiny.SHAPES.setdefault("roberta", tiny.SHAPES["bert"])
    path = tiny.save_reward_model(tmp_path / "reward", architecture)
    scores = reward(path)(["ab" * 100, "c"], [" end", " d"])
    # roberta counts its positions from pad_token_id + 1, so that it has so many fewer
    context = 127 if architecture == "roberta" else 128
    ids = encode(path, "ab" * 100, " end")
    assert len(ids) > context
    whole = [alone(path, ids[-context:]), alone(path, encode(path, "c", " d"))]
    assert scores.tolist() == pytest.approx(whole, abs=1e-5)


def test_bfloat16_weights(llama: str) -> None:
    scored = reward(llama, dtype="bfloat16")
    assert {parameter.dtype for parameter in scored.model.parameters()} == {torch.bfloat16}
    scores = scored(PROMPTS, RESPONSES)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected(llama, PROMPTS, RESPONSES), atol=0.1, rtol=0.05)


def test_the_model_is_frozen_and_dropout_is_off(tmp_path: Path) -> None:
    path = tiny.save_reward_model(tmp_path / "reward", "gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    scored = reward(path)
    assert not scored.model.training
    assert not any(parameter.requires_grad for parameter in scored.model.parameters())
    assert torch.equal(scored(PROMPTS, RESPONSES), scored(PROMPTS, RESPONSES))


def test_two_labels_are_refused(tmp_path: Path) -> None:
    path = tiny.save_reward_model(tmp_path / "reward", num_labels=2)
    with pytest.raises(ValueError, match=r"has one label, but .* has 2"):
        reward(path)


def test_one_label_of_two_is_the_reward(tmp_path: Path) -> None:
    path = tiny.save_reward_model(tmp_path / "reward", num_labels=2)
    negative, positive = (reward(path, label=label)(PROMPTS, RESPONSES) for label in (0, 1))
    torch.testing.assert_close(negative, expected(path, PROMPTS, RESPONSES), atol=1e-5, rtol=1e-5)
    assert not torch.isclose(negative, positive).any()


def test_the_last_token_of_the_response_can_be_read(llama: str) -> None:
    scores = reward(llama, ends_with_eos=False)(PROMPTS, RESPONSES)
    pairs = zip(PROMPTS, RESPONSES, strict=True)
    assert scores.tolist() == pytest.approx([alone(llama, encode(llama, *pair)[:-1]) for pair in pairs], abs=1e-5)


def test_a_tokenizer_without_eos_ends_with_its_separator(tmp_path: Path) -> None:
    path = tiny.save_reward_model(tmp_path / "reward", "bert")
    words = AutoTokenizer.from_pretrained(path)
    scores = reward(path)(["a"], ["b"])
    words.eos_token, words.sep_token = None, "<eos>"
    words.save_pretrained(path)
    assert AutoTokenizer.from_pretrained(path).eos_token is None
    assert torch.equal(reward(path)(["a"], ["b"]), scores)


def test_a_tiny_model_needs_no_weights(tmp_path: Path) -> None:
    path = tiny.save_reward_model(tmp_path / "reward", num_labels=2)
    for options in ({}, {"label": 1}):
        scored = reward("not/there/yet", architecture=path, tokenizer=path, tiny=True, **options)
        assert scored.model.config.hidden_size == 64
        assert scored(PROMPTS, RESPONSES).isfinite().all()


def test_a_folder_that_is_not_there_yet_is_missed_when_it_is_loaded(llama: str) -> None:
    scored = ModelReward("not/there/yet", architecture=llama, tokenizer=llama)
    with pytest.raises(FileNotFoundError, match="not/there/yet does not exist"):
        scored.setup(torch.device("cpu"))


def test_a_causal_language_model_is_refused(tmp_path: Path) -> None:
    path = tiny.save_model(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"no trained reward model|has one label"):
        reward(path)


def test_a_causal_language_model_with_one_label_is_refused(tmp_path: Path) -> None:
    path = tiny.save_model(tmp_path / "policy", num_labels=1)
    with pytest.raises(ValueError, match=r"no trained reward model: it lacks .*score"):
        reward(path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ModelReward(str(tmp_path / "nothing")).check()


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_length": 0}, {"max_length": -1}])
def test_values_out_of_range_are_refused(llama: str, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least 1"):
        ModelReward(llama, **options)
