import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from remax_lightning.models.language_model import load_language_model
from remax_lightning.models.scalar_model import load_reward_model
from remax_lightning.models.source import ModelSource, existing

ARCHITECTURES = sorted((Path(__file__).parents[2] / "configs/paper/architectures").iterdir())
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


def test_an_architecture_beside_a_config_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match="drop one of architecture='x' and config="):
        ModelSource(config=LLAMA, tokenizer=words, architecture="x")


def test_an_architecture_is_read_in_place_of_the_paths(tmp_path: Path) -> None:
    path = tiny.save_model(tmp_path / "model")
    folder = tmp_path / "architecture"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**LLAMA, "rope_theta": 5.0, "vocab_size": 57}))
    config = ModelSource(path="not/there/yet", architecture=str(folder)).load_config(num_labels=1)
    assert (config.rope_parameters["rope_theta"], config.num_labels) == (5.0, 1)
    with pytest.raises(FileNotFoundError, match="not/there/yet does not exist"):
        load_language_model(ModelSource(path="not/there/yet", architecture=str(folder), tokenizer=path))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ModelSource(path=path, architecture="not/there/yet").load_config()
    plain, other = (load_language_model(ModelSource(path=path, architecture=a)) for a in (None, str(folder)))
    assert tiny.are_equal(tiny.weights(plain), tiny.weights(other))
    assert other.config.rope_parameters["rope_theta"] == 5.0


def number_of_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("folder", ARCHITECTURES, ids=lambda path: path.name)
def test_tiny_is_the_same_architecture_at_a_toy_size(words: str, folder: Path) -> None:
    def load(is_tiny: bool) -> PreTrainedModel:
        source = ModelSource(path=str(folder), architecture=str(folder), tokenizer=words, tiny=is_tiny)
        if source.load_config().architectures[0].endswith("ForSequenceClassification"):
            return load_reward_model(source, trained=True, on_meta=not is_tiny)
        return load_language_model(source, on_meta=not is_tiny)

    toy, whole = load(True), load(False)
    assert type(toy) is type(whole)
    tokens = AutoTokenizer.from_pretrained(words)
    assert toy.get_input_embeddings().num_embeddings == toy.config.vocab_size == len(tokens)
    assert (toy.config.pad_token_id, toy.config.eos_token_id) == (tokens.pad_token_id, tokens.eos_token_id)
    assert number_of_parameters(toy) < min(300_000, number_of_parameters(whole) / 100)
    assert ordinary_names(toy) == ordinary_names(whole)


def ordinary_names(model: PreTrainedModel) -> set[str]:
    """Names of the parameters with the layers' numbers left out."""
    return {re.sub(r"\.\d+\.", ".n.", name) for name, _ in model.named_parameters()}


def test_tiny_keeps_proportions_that_the_architecture_is_built_on(words: str) -> None:
    def load(name: str) -> PretrainedConfig:
        folder = next(str(path) for path in ARCHITECTURES if path.name == name)
        return ModelSource(path="not/there", architecture=folder, tokenizer=words, tiny=True).load_config()

    opt, narrow = load("opt-1.3b"), load("opt-350m")
    assert opt.word_embed_proj_dim == opt.hidden_size
    assert opt.do_layer_norm_before
    assert narrow.word_embed_proj_dim == narrow.hidden_size // 2
    assert not narrow.do_layer_norm_before
    llama, mistral = load("llama-2-7b"), load("mistral-7b-instruct-v0.2")
    assert llama.num_key_value_heads == llama.num_attention_heads
    assert mistral.num_key_value_heads == mistral.num_attention_heads // 4
    assert (mistral.max_position_embeddings, mistral.rope_parameters["rope_theta"]) == (32768, 1e6)


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "qwen2"])
def test_tiny_models_of_other_architectures_run(words: str, model_type: str) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    values = {"model_type": model_type, "hidden_size": 256, "num_hidden_layers": 6, **heads}
    model = load_language_model(ModelSource(config=values, tokenizer=words, tiny=True))
    assert len(model.model.layers) == 2
    assert model(torch.tensor([[3, 4]])).logits.shape == (1, 2, model.config.vocab_size)


def test_tiny_loads_nothing(tmp_path: Path) -> None:
    path = tiny.save_model(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    assert not ModelSource(path=path, tiny=True).has_weights
    assert ModelSource(path=path).has_weights
    assert load_language_model(ModelSource(path=path, tiny=True)).config.hidden_size == 64


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
