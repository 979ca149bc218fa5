import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from remax_lightning.models.export import export
from remax_lightning.models.language_model import load_language_model, stop_token_ids
from remax_lightning.models.lora import LoRA, add_lora
from remax_lightning.models.scalar_model import load_reward_model, sequence_scores
from remax_lightning.models.source import ModelSource

ARCHITECTURES = ["llama", "gpt2", "opt", "gemma", "mistral", "gemma2", "qwen2"]
IDS = torch.tensor([[3, 4, 5, 6, 7]])


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_policy_has_the_same_logits(tmp_path: Path, architecture: str, tied: bool) -> None:
    torch.manual_seed(0)
    folder = tiny.save_model(tmp_path / "source", architecture, tie_word_embeddings=tied)
    source = ModelSource(path=folder, tokenizer=str(words_of(tmp_path)))
    model = load_language_model(source)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.01)
    export(model, source.load_tokenizer(), str(tmp_path / "hf"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(loaded.eval()(IDS).logits, model.eval()(IDS).logits)
    assert loaded.generation_config.eos_token_id == list(tiny.STOPS)
    assert stop_token_ids(loaded, source.load_tokenizer()) == sorted(tiny.STOPS)
    assert (tmp_path / "hf" / "model.safetensors").exists()


def words_of(tmp_path: Path) -> Path:
    tiny.tokenizer().save_pretrained(tmp_path / "words")
    return tmp_path / "words"


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_an_exported_reward_model_has_the_same_scores(tmp_path: Path, architecture: str) -> None:
    source = ModelSource(path=tiny.save_model(tmp_path / "source", architecture))
    model = load_reward_model(source, trained=False).eval()
    export(model, source.load_tokenizer(), str(tmp_path / "hf"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.config.num_labels == 1
    again = load_reward_model(ModelSource(path=str(tmp_path / "hf")), trained=True).eval()
    mask = torch.ones_like(IDS)
    assert torch.equal(sequence_scores(again, IDS, mask), sequence_scores(model, IDS, mask))


def test_tokenizer_and_chat_template_come_along(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
    source = ModelSource(path=tiny.save_model(tmp_path / "source"), chat_template=template)
    export(load_language_model(source), source.load_tokenizer(), str(tmp_path / "hf"))
    words = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert words.chat_template == template
    assert words("Tell me")["input_ids"] == tiny.tokenizer()("Tell me")["input_ids"]
    assert (words.pad_token_id, words.eos_token_id) == (0, 1)
    assert len(words) == len(tiny.tokenizer())


def test_sampling_values_of_a_generation_configuration_do_not_stop_an_export(tmp_path: Path) -> None:
    """Released models carry values that transformers refuses to save, such as a temperature without do_sample."""
    folder = tiny.save_model(tmp_path / "source")
    path = Path(folder) / "generation_config.json"
    values = {**json.loads(path.read_text()), "temperature": 0.6, "top_p": 0.9, "do_sample": False}
    path.write_text(json.dumps(values))
    source = ModelSource(path=folder)
    export(load_language_model(source), source.load_tokenizer(), str(tmp_path / "hf"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.generation_config.eos_token_id == list(tiny.STOPS)


def test_an_export_replaces_the_one_before(tmp_path: Path) -> None:
    source = ModelSource(path=tiny.save_model(tmp_path / "source"))
    model = load_language_model(source)
    export(model, source.load_tokenizer(), str(tmp_path / "hf"))
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    export(model, source.load_tokenizer(), str(tmp_path / "hf"))
    assert tiny.are_equal(tiny.weights(model), tiny.weights(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")))


def test_the_dtype_is_that_in_memory(tmp_path: Path) -> None:
    source = ModelSource(path=tiny.save_model(tmp_path / "source"), dtype="bfloat16")
    export(load_language_model(source), source.load_tokenizer(), str(tmp_path / "hf"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16


def with_adapters(source: ModelSource, **options: object) -> torch.nn.Module:
    model = add_lora(load_language_model(source), LoRA(rank=4, **options)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma"])
def test_adapters_go_into_an_ordinary_folder(tmp_path: Path, architecture: str) -> None:
    source = ModelSource(path=tiny.save_model(tmp_path / "source", architecture))
    model = with_adapters(source)
    export(model, source.load_tokenizer(), str(tmp_path / "hf"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    assert loaded.config.architectures == [type(loaded).__name__] == [type(model.get_base_model()).__name__]
    assert loaded.generation_config.eos_token_id == list(tiny.STOPS)
    assert not list((tmp_path / "hf").glob("adapter*"))
    assert "peft" not in (tmp_path / "hf" / "config.json").read_text()


@torch.no_grad()
def test_adapters_alone_name_their_base(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
    source = ModelSource(path=tiny.save_model(tmp_path / "source"), chat_template=template)
    model = with_adapters(source, merge=False)
    export(model, source.load_tokenizer(), str(tmp_path / "hf"), merge=False)
    assert not (tmp_path / "hf" / "model.safetensors").exists()
    config = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (source.path, 4, 32.0)
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    loaded = PeftModel.from_pretrained(base, tmp_path / "hf").eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == template
    assert (tmp_path / "hf" / "adapter_model.safetensors").stat().st_size < 100_000


@torch.no_grad()
def test_an_ordinary_export_replaces_adapters(tmp_path: Path) -> None:
    source, folder = ModelSource(path=tiny.save_model(tmp_path / "source")), str(tmp_path / "hf")
    model = with_adapters(source, merge=False)
    export(model, source.load_tokenizer(), folder, merge=False)
    export(model, source.load_tokenizer(), folder)
    loaded = load_language_model(ModelSource(path=folder)).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("merge", [True, False])
def test_adapters_of_a_reward_model(tmp_path: Path, merge: bool) -> None:
    source = ModelSource(path=tiny.save_model(tmp_path / "source"))
    model = add_lora(load_reward_model(source, trained=False), LoRA(rank=4, merge=merge)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    export(model, source.load_tokenizer(), str(tmp_path / "hf"), merge=merge)
    loaded = load_reward_model(ModelSource(path=str(tmp_path / "hf")), trained=True).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["full", "base", "merged", "adapters"])
def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path, kind: str, value: float) -> None:
    """An earlier export in the folder stays as it was."""
    source = ModelSource(path=tiny.save_model(tmp_path / "source"))
    model, tokenizer = load_language_model(source), source.load_tokenizer()
    export(model, tokenizer, str(tmp_path / "hf"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    if kind != "full":
        model = add_lora(model, LoRA(rank=2))
    names = {"merged": "lora_B", "adapters": "lora_A", "base": "norm.weight", "full": "lm_head"}
    next(value for name, value in model.named_parameters() if names[kind] in name).flatten()[0] = value
    with pytest.raises(ValueError, match=rf"has weights that are not finite \(.*{names[kind]}.*\), so it is not exp"):
        export(model, tokenizer, str(tmp_path / "hf"), merge=kind != "adapters")
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before


@torch.no_grad()
def test_a_merge_beyond_the_type_is_not_exported(tmp_path: Path) -> None:
    """Base and adapters are finite, their sum is not."""
    source = ModelSource(path=tiny.save_model(tmp_path / "source"))
    model = add_lora(load_language_model(source), LoRA(rank=2))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.fill_(1e30)
    with pytest.raises(ValueError, match=r"NaN|not finite"):
        export(model, source.load_tokenizer(), str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()
