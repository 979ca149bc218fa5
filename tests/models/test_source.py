from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from remax_lightning.models.language_model import load_language_model
from remax_lightning.models.source import ModelSource, existing

LLAMA = {"model_type": "llama", **tiny.SHAPES["llama"]}


@pytest.fixture
def words(tmp_path: Path) -> str:
    tiny.tokenizer().save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


@pytest.mark.parametrize("values", [{}, {"path": "x", "config": LLAMA}])
def test_exactly_one_of_path_and_config(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="exactly one of path"):
        ModelSource(**values)


def test_a_config_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="needs a tokenizer"):
        ModelSource(config=LLAMA)


def test_a_config_takes_its_vocabulary_from_the_tokenizer(words: str) -> None:
    config = ModelSource(config=LLAMA, tokenizer=words).load_config()
    tokens = AutoTokenizer.from_pretrained(words)
    assert config.vocab_size == len(tokens)
    assert (config.pad_token_id, config.eos_token_id) == (tokens.pad_token_id, tokens.eos_token_id)
    assert config.hidden_size == 32
    assert ModelSource(config={**LLAMA, "vocab_size": 100}, tokenizer=words).load_config().vocab_size == 100


def test_an_unknown_value_is_refused_by_name(words: str) -> None:
    source = ModelSource(config={**LLAMA, "hiden_size": 32, "layers": 2}, tokenizer=words)
    with pytest.raises(ValueError, match="LlamaConfig does not know: hiden_size, layers"):
        source.load_config()


@pytest.mark.parametrize("model_type", [None, "lama"])
def test_an_unknown_model_type_is_refused(words: str, model_type: str | None) -> None:
    source = ModelSource(config={"model_type": model_type} if model_type else {"hidden_size": 32}, tokenizer=words)
    with pytest.raises(ValueError, match="model_type must name an architecture of transformers, got"):
        source.load_config()


def test_names_by_which_an_architecture_goes_too_are_taken(words: str) -> None:
    config = ModelSource(config={"model_type": "gpt2", "hidden_size": 32, "n_head": 4}, tokenizer=words).load_config()
    assert config.n_embd == 32


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("gpt2", {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}),
        ("opt", {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.3}),
        ("llama", {"attention_dropout": 0.3}),
        ("bert", {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "classifier_dropout": 0.3}),
    ],
)
@pytest.mark.parametrize("from_path", [False, True])
def test_every_dropout_is_zero(
    words: str, tmp_path: Path, model_type: str, values: dict[str, float], from_path: bool
) -> None:
    given = {"model_type": model_type, **tiny.SHAPES[model_type], **values}
    source = ModelSource(config=given, tokenizer=words)
    if from_path:
        folder = tiny.save_reward_model(tmp_path / "model", model_type, **values)
        source = ModelSource(path=folder)
    config = source.load_config()
    assert {name: getattr(config, name) for name in values} == dict.fromkeys(values, 0.0)


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_training_mode_is_deterministic(tmp_path: Path, model_type: str) -> None:
    values = {"resid_pdrop": 0.5, "embd_pdrop": 0.5} if model_type == "gpt2" else {"dropout": 0.5, "layerdrop": 0.5}
    model = load_language_model(ModelSource(path=tiny.save_model(tmp_path / "model", model_type, **values))).train()
    ids = torch.tensor([[3, 4, 5, 6]])
    first = model(ids).logits
    assert all(torch.equal(first, model(ids).logits) for _ in range(3))
    assert torch.equal(first, model.eval()(ids).logits)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny.language_model(vocab_size=40).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens but the model .* embeds only 40"):
        load_language_model(ModelSource(path=str(tmp_path / "model")))


def test_a_larger_vocabulary_is_taken(tmp_path: Path) -> None:
    tiny.language_model(vocab_size=100).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    assert load_language_model(ModelSource(path=str(tmp_path / "model"))).vocab_size == 100


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("from_path", [False, True])
def test_dtype(words: str, tmp_path: Path, dtype: Any, from_path: bool) -> None:
    source = ModelSource(config=LLAMA, tokenizer=words, dtype=dtype)
    if from_path:
        source = ModelSource(path=tiny.save_model(tmp_path / "model"), dtype=dtype)
    assert {parameter.dtype for parameter in load_language_model(source).parameters()} == {getattr(torch, dtype)}


def test_attn_implementation(words: str) -> None:
    for name in ("eager", "sdpa"):
        model = load_language_model(ModelSource(config=LLAMA, tokenizer=words, attn_implementation=name))
        assert model.config._attn_implementation == name


def test_tokenizer_and_chat_template_of_the_source(words: str, tmp_path: Path) -> None:
    path = tiny.save_model(tmp_path / "model")
    assert ModelSource(path=path).load_tokenizer().name_or_path == path
    assert ModelSource(path=path, tokenizer=words).load_tokenizer().name_or_path == words
    assert ModelSource(path=path, chat_template="{{ 1 }}").load_tokenizer().chat_template == "{{ 1 }}"


@pytest.mark.parametrize("path", ["./nothing", "/nothing/at/all", "~/nothing", "runs/of/nothing"])
def test_a_missing_folder_is_refused(path: str) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        existing(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ModelSource(path=path).load_config()


def test_a_hub_name_is_left_alone() -> None:
    assert existing("owner/name") == "owner/name"
