"""Models from adapter folders and in few bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from remax_lightning.models import loading
from remax_lightning.models.export import export
from remax_lightning.models.language_model import load_language_model, stop_token_ids
from remax_lightning.models.lora import LoRA, add_lora, merged, without_adapters
from remax_lightning.models.scalar_model import load_reward_model
from remax_lightning.models.source import ModelSource

IDS = torch.tensor([[3, 4, 5, 6, 7]])


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(IDS).logits


def train(model: nn.Module) -> None:
    """Give every trained weight a value that it did not start with."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def adapters(folder: Path, architecture: str = "llama", **options: Any) -> tuple[str, PeftModel]:
    """A folder with trained adapters on a base in another one, and the live model."""
    source = ModelSource(path=tiny.save_model(folder / "base", architecture, **options))
    model = add_lora(load_language_model(source), LoRA(rank=4, merge=False))
    train(model)
    export(model, source.load_tokenizer(), str(folder / "adapters"), merge=False)
    return str(folder / "adapters"), model.eval()


def reward_adapters(folder: Path, path: str) -> tuple[str, PeftModel]:
    source = ModelSource(path=path)
    model = add_lora(load_reward_model(source, trained=False), LoRA(rank=4, merge=False))
    train(model)
    export(model, source.load_tokenizer(), str(folder / "reward"), merge=False)
    return str(folder / "reward"), model.eval()


def rewrite(folder: str, **values: Any) -> None:
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2"])
def test_an_adapter_folder_is_its_base_with_the_adapters(tmp_path: Path, architecture: str) -> None:
    folder, live = adapters(tmp_path, architecture)
    state = torch.get_rng_state()
    model = load_language_model(ModelSource(path=folder))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(logits(model), logits(live), atol=1e-5, rtol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert type(model) is type(plain)
    assert set(tiny.weights(model)) == set(tiny.weights(plain))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert stop_token_ids(model, ModelSource(path=folder).load_tokenizer()) == sorted(tiny.STOPS)


def test_the_reference_of_new_adapters_has_the_old_ones(tmp_path: Path) -> None:
    folder, first = adapters(tmp_path)
    second = add_lora(load_language_model(ModelSource(path=folder)), LoRA(rank=2))
    train(second)
    with without_adapters(second):
        torch.testing.assert_close(logits(second), logits(first), atol=1e-5, rtol=1e-5)
    assert (logits(second) - logits(first)).abs().max() > 0.01


def test_new_adapters_on_a_merged_base_are_not_exported_alone(tmp_path: Path) -> None:
    folder, _ = adapters(tmp_path)
    with pytest.raises(ValueError, match=f"merged from the adapter folder {folder}, .* set merge=True"):
        add_lora(load_language_model(ModelSource(path=folder)), LoRA(merge=False))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(ModelSource(path=folder).load_config())
    with pytest.raises(ValueError, match="merged from the adapter folder"):
        add_lora(empty, LoRA(merge=False))


def test_configuration_and_tokenizer_are_found(tmp_path: Path) -> None:
    folder, live = adapters(tmp_path, attention_dropout=0.1)
    source = ModelSource(path=folder)
    assert source.load_config().hidden_size == 32
    assert source.load_config().attention_dropout == 0.0
    assert source.load_config().name_or_path == folder
    assert source.load_tokenizer().name_or_path == folder
    for file in Path(folder).glob("tokenizer*"):
        file.unlink()
    assert source.load_tokenizer().name_or_path == str(tmp_path / "base")
    torch.testing.assert_close(logits(load_language_model(source)), logits(live), atol=1e-5, rtol=1e-5)
    structure = load_language_model(source, on_meta=True)
    assert structure.generation_config.eos_token_id == list(tiny.STOPS)


def test_a_base_may_be_named_from_where_it_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save_model(Path("base"))
    source = ModelSource(path="base")
    export(add_lora(load_language_model(source), LoRA(merge=False)), source.load_tokenizer(), "adapters", merge=False)
    monkeypatch.chdir("/")
    assert load_language_model(ModelSource(path=str(tmp_path / "adapters"))).name_or_path == str(tmp_path / "adapters")


def test_adapters_of_others_are_merged(tmp_path: Path) -> None:
    """Written by peft itself, with what this project does not offer: DoRA, dropout, another scale."""
    base = AutoModelForCausalLM.from_pretrained(tiny.save_model(tmp_path / "base"))
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "lora_dropout": 0.1}
    model = get_peft_model(base, LoraConfig(r=4, use_rslora=True, use_dora=True, init_lora_weights=False, **options))
    model.save_pretrained(tmp_path / "adapters")
    loaded = load_language_model(ModelSource(path=str(tmp_path / "adapters")))
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)


def test_a_reward_model_of_adapters_and_a_head(tmp_path: Path) -> None:
    folder, live = reward_adapters(tmp_path, tiny.save_model(tmp_path / "base"))
    loaded = load_reward_model(ModelSource(path=folder), trained=True)
    torch.testing.assert_close(logits(loaded), logits(live), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(merged(live)), logits(live), atol=1e-5, rtol=1e-5)


def test_a_reward_model_starts_from_the_adapters_of_a_language_model(tmp_path: Path) -> None:
    folder, live = adapters(tmp_path)
    started = load_reward_model(ModelSource(path=folder), trained=False)
    body = tiny.weights(merged(live).model)
    tiny.assert_close(tiny.weights(started.model), body)
    with pytest.raises(ValueError, match=r"no trained reward model: it lacks .*score.weight"):
        load_reward_model(ModelSource(path=folder), trained=True)


def test_the_dtype_of_an_adapter_folder(tmp_path: Path) -> None:
    folder, _ = adapters(tmp_path)
    model = load_language_model(ModelSource(path=folder, dtype="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("base", "error", "match"),
    [
        (None, ValueError, "adapter_config.json names no base model; set base_model_name_or_path"),
        ("/nothing/there", FileNotFoundError, "/nothing/there does not exist; .*adapter_config.json names it"),
        ("ITSELF", ValueError, "which is an adapter folder too; merge that one first"),
    ],
)
def test_a_base_that_cannot_be_loaded_is_named(
    tmp_path: Path, base: str | None, error: type[Exception], match: str
) -> None:
    folder, _ = adapters(tmp_path)
    rewrite(folder, base_model_name_or_path=folder if base == "ITSELF" else base)
    for load in (ModelSource(path=folder).load_config, lambda: load_language_model(ModelSource(path=folder))):
        with pytest.raises(error, match=match):
            load()


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder, _ = adapters(tmp_path)
    for number, (match, options) in enumerate(
        [
            ("size mismatch", {"intermediate_size": 64}),
            ("missing adapter keys", {"num_hidden_layers": 3}),
            ("not found in the base model", {"architecture": "gpt2"}),
        ]
    ):
        architecture = options.pop("architecture", "llama")
        other = tiny.save_model(tmp_path / str(number), architecture, **options)
        rewrite(folder, base_model_name_or_path=other)
        with pytest.raises(ValueError, match=rf"adapters of {folder} do not fit (?s:.*){match}"):
            load_language_model(ModelSource(path=folder))


def test_other_kinds_of_adapters_are_refused(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny.save_model(tmp_path / "base"))
    names = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    get_peft_model(base, IA3Config(**names)).save_pretrained(tmp_path / "adapters")
    with pytest.raises(ValueError, match="only LoRA is supported"):
        load_language_model(ModelSource(path=str(tmp_path / "adapters")))


def test_adapters_on_the_hub_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers puts them on their base by itself and leaves them unmerged."""
    folder, _ = adapters(tmp_path)

    class Hub:
        @staticmethod
        def from_pretrained(path: str, output_loading_info: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
            return AutoModelForCausalLM.from_pretrained(folder), {}

    monkeypatch.setattr(loading, "check_reachable", lambda name: None)
    with pytest.raises(ValueError, match="owner/name on the hub holds adapters; download it"):
        loading.load_weights(Hub, ModelSource(path="owner/name"))


def test_bitsandbytes_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    source = ModelSource(path=tiny.save_model(tmp_path / "base"), quantization="4bit")
    with pytest.raises(ImportError, match=r"4bit needs bitsandbytes: pip install 'remax-lightning\[quantization\]'"):
        load_language_model(source)


def test_adapters_are_not_merged_into_quantized_weights(tmp_path: Path) -> None:
    folder, _ = adapters(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be merged into weights in 8bit; export it merged"):
        load_language_model(ModelSource(path=folder, quantization="8bit"))


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_weights_under_adapters(tmp_path: Path, quantization: Any, dtype: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    shape = {"hidden_size": 128, "intermediate_size": 256}
    source = ModelSource(path=tiny.save_model(tmp_path / "base", **shape), quantization=quantization, dtype=dtype)
    model = load_language_model(source)
    kinds = {parameter.dtype for parameter in model.parameters()}
    assert kinds == {source.torch_dtype, torch.uint8 if quantization == "4bit" else torch.int8}
    exact, before = logits(AutoModelForCausalLM.from_pretrained(source.path)), logits(model).float()
    assert 0 < (before - exact).abs().max() < 0.5
    adapted = add_lora(model, LoRA(rank=4, merge=False))
    assert torch.equal(logits(adapted).float(), before)
    adapted.train()(IDS).logits.square().mean().backward()
    gradients = {name: p.grad.float() for name, p in adapted.named_parameters() if p.grad is not None}
    assert set(gradients) == {name for name, p in adapted.named_parameters() if ".lora_" in name}
    exactly = add_lora(merged(adapted), LoRA(rank=4))
    exactly(IDS).logits.square().mean().backward()
    for name, gradient in gradients.items():
        expected = exactly.get_parameter(name).grad
        assert not expected.any() or torch.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.98
    train(adapted)
    after = logits(adapted).float()
    assert (after - before).abs().max() > 0.5
    with without_adapters(adapted):
        assert torch.equal(logits(adapted).float(), before)
    close = {"atol": 0.1, "rtol": 0.05}
    export(adapted, source.load_tokenizer(), str(tmp_path / "merged"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {parameter.dtype for parameter in loaded.parameters()} == {source.torch_dtype}
    torch.testing.assert_close(logits(loaded).float(), after, **close)
    export(adapted, source.load_tokenizer(), str(tmp_path / "adapters"), merge=False)
    on_exact = load_language_model(ModelSource(path=str(tmp_path / "adapters")))
    assert (logits(on_exact) - after).abs().max() < 1.5
    assert torch.equal(logits(adapted).float(), after)


def test_a_quantized_classifier(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = tiny.save_model(tmp_path / "base", hidden_size=128, intermediate_size=256)
    source = ModelSource(path=base, quantization="4bit", dtype="bfloat16")
    adapted = add_lora(load_reward_model(source, trained=False), LoRA(rank=4))
    train(adapted)
    expected = logits(adapted).float()
    export(adapted, source.load_tokenizer(), str(tmp_path / "hf"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(logits(loaded).float(), expected, atol=0.1, rtol=0.05)


def without(folder: str, *ends: str) -> str:
    """The folder itself, without some weights."""
    file = Path(folder) / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if not name.endswith(ends)}
    save_file(kept, file, {"format": "pt"})
    return folder


LAYER = "layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("names", [(LAYER,), ("lm_head.weight",), ("weight",)])
def test_a_policy_that_lacks_weights_is_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    folder = without(tiny.save_model(tmp_path / "policy"), *names)
    more = " and 18 more" if names == ("weight",) else ""
    with pytest.raises(ValueError, match=rf"policy lacks weights of LlamaForCausalLM \(.*{names[0]}{more}\), which wo"):
        load_language_model(ModelSource(path=folder))


def test_a_reward_model_is_no_policy(tmp_path: Path) -> None:
    folder = tiny.save_reward_model(tmp_path / "reward")
    with pytest.raises(ValueError, match=r"reward lacks weights of LlamaForCausalLM \(lm_head.weight\)"):
        load_language_model(ModelSource(path=folder))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_may_be_tied_or_new(architecture: str, tied: bool, tmp_path: Path) -> None:
    source = ModelSource(path=tiny.save_model(tmp_path / "policy", architecture, tie_word_embeddings=tied))
    load_language_model(source)
    load_reward_model(source, trained=False)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "deberta-v2"])
def test_the_head_of_an_encoder_may_be_new(architecture: str, tmp_path: Path) -> None:
    """With a pooler, which BERT has inside of its body."""
    config = AutoConfig.for_model(architecture, **{**tiny.SHAPES["bert"], "vocab_size": 64})
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "encoder")
    tiny.tokenizer().save_pretrained(tmp_path / "encoder")
    load_reward_model(ModelSource(path=str(tmp_path / "encoder")), trained=False)


def test_a_start_of_a_reward_model_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    folder = without(tiny.save_model(tmp_path / "policy"), LAYER, "lm_head.weight")
    with pytest.raises(ValueError, match=rf"lacks weights of LlamaForSequenceClassification \(model.{LAYER}\), which"):
        load_reward_model(ModelSource(path=folder), trained=False)


@pytest.mark.parametrize("is_safe", [True, False])
def test_a_damaged_file_of_weights_is_named(is_safe: bool, tmp_path: Path) -> None:
    folder = Path(tiny.save_model(tmp_path / "model"))
    file = folder / "model.safetensors"
    if not is_safe:
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
        file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(
        ValueError, match=rf"the weights in {folder} cannot be read \(.*\); copy or download them again"
    ):
        load_language_model(ModelSource(path=str(folder)))
