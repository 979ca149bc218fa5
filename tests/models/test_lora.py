"""Adapters change nothing until they are trained, are trained alone, come off, and go into the weights."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from remax_lightning.models.head import plain_head
from remax_lightning.models.language_model import context_length, freeze, stop_token_ids, vocabulary_size
from remax_lightning.models.lora import (
    LoRA,
    add_lora,
    check_quantization,
    init_adapters,
    initial_adapter,
    merged,
    without_adapters,
)
from remax_lightning.models.next_token import log_probs_of, policy_gradient_of
from remax_lightning.models.scalar_model import sequence_scores
from remax_lightning.models.source import ModelSource
from remax_lightning.rollout import Sampling, TransformersEngine
from remax_lightning.rollout.types import Responses, Samples

ARCHITECTURES = ["llama", "qwen2", "mistral", "gemma", "gemma2", "opt", "gpt2"]
IDS = torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 6, 5]])
MASK = torch.tensor([[False, False, True, True, True], [False, True, True, True, True]])
BATCH = {"prompt_ids": IDS, "prompt_mask": torch.ones_like(IDS), "prompt_index": torch.tensor([0, 1])}
LLAMA = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LLAMA += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LAYERS = {
    **dict.fromkeys(("llama", "qwen2", "mistral", "gemma", "gemma2"), ("model.layers", LLAMA)),
    "opt": ("model.decoder.layers", [*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "fc1", "fc2"]),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
}


def classifier(architecture: str = "llama", **values: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {
        **tiny.SHAPES[architecture.replace("roberta", "bert")],
        "vocab_size": tiny.VOCABULARY,
        "pad_token_id": 0,
        "num_labels": 1,
        **values,
    }
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(architecture, **shape)).eval()


def train(model: nn.Module, steps: int = 3) -> None:
    """A few steps up the logit of token 3, or the score."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05)
    for _ in range(steps):
        (-model(input_ids=IDS).logits[..., -1:].sum()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def trained(model: PreTrainedModel, lora: LoRA = LoRA(rank=4)) -> PeftModel:
    adapted = add_lora(model, lora)
    train(adapted)
    return adapted


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted_layers(model: nn.Module) -> set[str]:
    names = {name.partition(".lora_")[0] for name in trainable(model) if ".lora_" in name}
    return {name.removeprefix("base_model.model.") for name in names}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fresh_adapters_change_no_logit_and_trained_ones_come_off(architecture: str) -> None:
    model = tiny.language_model(architecture)
    before, weights = logits(model), tiny.weights(model)
    adapted = add_lora(model, LoRA(rank=4))
    assert torch.equal(logits(adapted), before)
    train(adapted)
    assert (logits(adapted) - before).abs().max() > 0.01
    with without_adapters(adapted) as base:
        assert base is adapted
        assert torch.equal(logits(base), before)
    own = {name.replace(".base_layer.", "."): value for name, value in tiny.weights(adapted.get_base_model()).items()}
    assert all(torch.equal(own[name], value) for name, value in weights.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_layer_of_every_block_and_nothing_else(architecture: str) -> None:
    adapted = add_lora(tiny.language_model(architecture), LoRA())
    blocks, names = LAYERS[architecture]
    assert adapted_layers(adapted) == {f"{blocks}.{number}.{name}" for number in (0, 1) for name in names}
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable(adapted))


def test_projections_beside_the_blocks_are_left_alone() -> None:
    adapted = add_lora(tiny.language_model("opt", word_embed_proj_dim=16), LoRA())
    assert adapted.get_base_model().model.decoder.project_in is not None
    assert adapted_layers(adapted) == adapted_layers(add_lora(tiny.language_model("opt"), LoRA()))


def test_a_name_that_occurs_beside_the_blocks_too_is_told_apart() -> None:
    model = classifier("bert")
    dense = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {"bert.pooler.dense", "classifier"} <= dense
    assert adapted_layers(add_lora(model, LoRA())) == dense - {"bert.pooler.dense", "classifier"}


def test_layers_of_choice() -> None:
    adapted = add_lora(tiny.language_model(), LoRA(rank=3, alpha=6.0, target_modules=["q_proj", "1.mlp.up_proj"]))
    expected = {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    assert adapted_layers(adapted) == expected
    layer = adapted.get_base_model().model.layers[1].mlp.up_proj
    assert (layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape) == ((3, 32), (48, 3))
    assert layer.scaling["default"] == 2.0


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_update_is_alpha_over_rank_times_b_a(architecture: str) -> None:
    adapted = trained(tiny.language_model(architecture), LoRA(rank=4, alpha=12.0))
    parts, plain = tiny.weights(adapted), tiny.weights(merged(adapted))
    for name in adapted_layers(adapted):
        a, b = (parts[f"base_model.model.{name}.lora_{part}.default.weight"] for part in "AB")
        update = 3.0 * b @ a
        base = parts[f"base_model.model.{name}.base_layer.weight"]
        expected = base + (update.T if architecture == "gpt2" else update)
        torch.testing.assert_close(plain[f"{name}.weight"], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("build", [tiny.language_model, classifier], ids=["language model", "classifier"])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "qwen2"])
def test_merged_is_adapted_and_the_live_model_stays(build: Callable[..., PreTrainedModel], architecture: str) -> None:
    model = build(architecture)
    adapted = trained(model)
    weights, expected, names = tiny.weights(adapted), logits(adapted), trainable(adapted)
    plain = merged(adapted)
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=1e-5)
    assert type(plain) is type(model)
    assert set(tiny.weights(plain)) == set(tiny.weights(build(architecture)))
    assert trainable(plain) == set(tiny.weights(plain))
    train(plain)
    assert torch.equal(logits(adapted), expected)
    assert tiny.are_equal(tiny.weights(adapted), weights)
    assert trainable(adapted) == names


def test_merging_keeps_the_embeddings_tied() -> None:
    plain = merged(trained(tiny.language_model("llama", tie_word_embeddings=True)))
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_what_is_not_finite_is_not_merged() -> None:
    adapted = trained(tiny.language_model())
    adapted.get_base_model().model.layers[0].mlp.up_proj.lora_A["default"].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        merged(adapted)


def test_adapters_are_a_function_of_the_seed_and_their_names() -> None:
    torch.manual_seed(5)
    model = tiny.language_model()
    state = torch.get_rng_state()
    first = tiny.weights(add_lora(model, LoRA(rank=4), seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert tiny.are_equal(first, tiny.weights(add_lora(tiny.language_model(), LoRA(rank=4), seed=3)))
    matrices = {name: value for name, value in first.items() if ".lora_A." in name}
    other = tiny.weights(add_lora(tiny.language_model(), LoRA(rank=4), seed=4))
    assert not any(torch.equal(value, other[name]) for name, value in matrices.items())
    assert len({tuple(value.flatten()[:8].tolist()) for value in matrices.values()}) == len(matrices) == 14
    fewer = tiny.weights(add_lora(tiny.language_model(), LoRA(rank=4, target_modules=["up_proj"]), seed=3))
    assert all(torch.equal(value, first[name]) for name, value in fewer.items() if ".lora_" in name)
    for name, value in first.items():
        if ".lora_" in name:
            assert torch.equal(value, initial_adapter(name, value.shape, 3))


def test_adapters_start_as_those_of_peft() -> None:
    values = initial_adapter("x.lora_A.default.weight", (64, 400), 0)
    assert values.abs().max() <= 1 / math.sqrt(400)
    assert float(values.std()) == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)
    assert abs(float(values.mean())) < 1e-3
    assert not initial_adapter("x.lora_B.default.weight", (400, 64), 0).any()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_from_the_meta_device_starts_equal(architecture: str) -> None:
    model = tiny.language_model(architecture)
    weights = tiny.weights(model)
    expected = add_lora(model, LoRA(rank=4), seed=2)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny.language_model(architecture).config)
    adapted = add_lora(empty, LoRA(rank=4), seed=2)
    assert all(parameter.is_meta for parameter in adapted.parameters())
    assert trainable(adapted) == trainable(expected)
    adapted.to_empty(device="cpu")
    adapted.get_base_model().tie_weights()
    for name, parameter in adapted.named_parameters():
        if ".lora_" not in name:
            parameter.data.copy_(weights[name.removeprefix("base_model.model.").replace(".base_layer.", ".")])
    init_adapters(adapted, seed=2)
    assert tiny.are_equal(tiny.weights(adapted), tiny.weights(expected))


def test_a_fresh_start_forgets_what_was_trained() -> None:
    fresh, adapted = tiny.weights(add_lora(classifier(), LoRA(rank=4), 1)), trained(classifier(), LoRA(rank=4))
    init_adapters(adapted, seed=1)
    assert tiny.are_equal(tiny.weights(adapted), fresh)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "bert"])
def test_the_head_of_a_classifier_is_trained_whole(architecture: str) -> None:
    model = classifier(architecture)
    before = logits(model)
    adapted = add_lora(model, LoRA(rank=4))
    assert torch.equal(logits(adapted), before)
    head = "classifier" if architecture == "bert" else "score"
    assert f"base_model.model.{head}.modules_to_save.default.weight" in trainable(adapted)
    assert all(".lora_" in name or ".modules_to_save." in name for name in trainable(adapted))
    train(adapted)
    assert (logits(adapted) - before).abs().max() > 1e-3
    with without_adapters(adapted):
        assert torch.equal(logits(adapted), before)
    scores = sequence_scores(adapted, IDS, torch.ones_like(IDS))
    torch.testing.assert_close(scores, sequence_scores(merged(adapted), IDS, torch.ones_like(IDS)))


def test_gradient_reaches_every_adapter_and_nothing_else() -> None:
    adapted = trained(tiny.language_model())
    logits_of_all = adapted(input_ids=IDS).logits
    logits_of_all.square().sum().backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name)
        assert parameter.grad is None or bool(parameter.grad.any()), name


def test_the_state_is_restored_when_something_raises() -> None:
    adapted = trained(classifier()).train()
    frozen = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    adapted.get_parameter(frozen).requires_grad_(False)
    expected, names = logits(adapted), trainable(adapted)
    with without_adapters(adapted):
        assert trainable(adapted) == names
    with pytest.raises(KeyError), without_adapters(adapted):
        raise KeyError
    assert torch.equal(logits(adapted), expected)
    assert trainable(adapted) == names
    assert all(module.training for module in adapted.modules())


def test_the_context_may_be_nested() -> None:
    adapted = trained(tiny.language_model())
    expected = logits(adapted)
    with without_adapters(adapted):
        base = logits(adapted)
        with without_adapters(adapted):
            assert torch.equal(logits(adapted), base)
        assert torch.equal(logits(adapted), base)
    assert torch.equal(logits(adapted), expected)


def test_the_mode_is_that_of_the_model() -> None:
    for training in (True, False):
        adapted = add_lora(tiny.language_model().train(training), LoRA())
        assert {module.training for module in adapted.modules()} == {training}


@pytest.mark.parametrize("build", [tiny.language_model, classifier], ids=["language model", "classifier"])
def test_what_is_trained_is_float32_on_bfloat16_weights(build: Callable[..., PreTrainedModel]) -> None:
    model = build().bfloat16()
    before = logits(model)
    adapted = add_lora(model, LoRA(rank=4))
    torch.testing.assert_close(logits(adapted).bfloat16(), before)
    types = {name: parameter.dtype for name, parameter in adapted.named_parameters()}
    names = trainable(adapted)
    assert {types[name] for name in names} == {torch.float32}
    assert {types[name] for name in set(types) - names} == {torch.bfloat16}
    train(adapted)
    with without_adapters(adapted):
        assert torch.equal(logits(adapted), before)
    plain = merged(adapted)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(plain).float(), logits(adapted).float(), atol=0.3, rtol=0.05)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"rank": 0}, "rank .* at least 1, got 0"),
        ({"alpha": 0.0}, "alpha .* above 0 .* got 0"),
        ({"alpha": math.nan}, "alpha .* above 0 .* got nan"),
        ({"target_modules": []}, "names no layer; null means"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LoRA(**values)


@pytest.mark.parametrize("target", ["qproj", "proj", "embed_tokens", "mlp", "norm", ""])
def test_a_target_that_is_no_linear_layer_is_refused_by_name(target: str) -> None:
    with pytest.raises(ValueError, match=f"'{target}', but no linear layer of LlamaForCausalLM .* k_proj, lm_head"):
        add_lora(tiny.language_model(), LoRA(target_modules=["q_proj", target]))


def test_an_adapter_on_the_head() -> None:
    model = tiny.language_model()
    adapted = trained(model, LoRA(target_modules=["lm_head"]))
    with pytest.warns(match="the head has an adapter"):
        assert plain_head(adapted) is None
    torch.testing.assert_close(logits(merged(adapted)), logits(adapted), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="head of LlamaForCausalLM shares its weight with the embeddings"):
        add_lora(tiny.language_model(tie_word_embeddings=True), LoRA(target_modules=["lm_head"]))


def test_adapters_alone_need_a_base_that_can_be_loaded() -> None:
    with pytest.raises(ValueError, match=r"built from a configuration.* set merge=True"):
        add_lora(tiny.language_model(), LoRA(merge=False))


def test_without_adapters_needs_adapters() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapters"), without_adapters(tiny.language_model()):
        pass


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_weights_are_not_trained(quantization: Any) -> None:
    source = ModelSource(path="owner/name", quantization=quantization)
    with pytest.raises(ValueError, match=f"weights in {quantization} cannot be trained.* set lora"):
        check_quantization(source, None)
    check_quantization(source, LoRA())
    check_quantization(ModelSource(path="owner/name"), None)
    with pytest.raises(ValueError, match="weights that are loaded from a path"):
        check_quantization(ModelSource(config={}, tokenizer="owner/name", quantization=quantization), LoRA())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2"])
def test_a_model_with_adapters_is_used_like_any_other(architecture: str) -> None:
    plain = tiny.language_model(architecture, scale=3.0)
    adapted = trained(tiny.language_model(architecture, scale=3.0))
    assert vocabulary_size(adapted) == vocabulary_size(plain)
    assert context_length(adapted) == context_length(plain)
    assert (adapted.dtype, adapted.device) == (plain.dtype, plain.device)
    assert adapted.config.to_dict() == plain.config.to_dict()
    assert stop_token_ids(adapted, tiny.tokenizer()) == stop_token_ids(plain, tiny.tokenizer())
    assert adapted.generation_config.eos_token_id == plain.generation_config.eos_token_id
    head = plain_head(adapted)
    assert (head is None) == (architecture == "gemma2")
    assert head is None or head is adapted.get_output_embeddings()
    own, reference = log_probs_of(merged(adapted), IDS, MASK), log_probs_of(plain, IDS, MASK)
    torch.testing.assert_close(log_probs_of(adapted, IDS, MASK), own, atol=1e-5, rtol=1e-4)
    with without_adapters(adapted):
        assert torch.equal(log_probs_of(adapted, IDS, MASK), reference)
    output = policy_gradient_of(adapted, IDS, MASK, torch.ones(int(MASK.sum())))
    torch.testing.assert_close(output.log_probs, own, atol=1e-5, rtol=1e-4)
    output.loss.backward()
    assert {name for name, parameter in adapted.named_parameters() if parameter.grad is not None} == trainable(adapted)


def test_the_context_of_an_encoder_is_found_below_the_adapters() -> None:
    model = classifier("roberta")
    assert context_length(add_lora(classifier("roberta"), LoRA())) == context_length(model) == 128 - 1


def test_activation_checkpointing_changes_no_gradient() -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        adapted = trained(tiny.language_model()).train()
        if checkpointing:
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted(input_ids=IDS).logits.square().mean().backward()
        return {name: each.grad for name, each in adapted.named_parameters() if each.grad is not None}

    tiny.assert_close(gradients(True), gradients(False))


def rollouts(model: PreTrainedModel) -> tuple[Samples, Responses]:
    sampling = Sampling(max_new_tokens=10, num_samples=2)
    return TransformersEngine().sample_and_greedy(model, BATCH, sampling, stop_token_ids=[1], seed=1)


def test_the_engine_decodes_with_and_without_adapters() -> None:
    plain = freeze(tiny.language_model(scale=3.0))
    adapted = trained(tiny.language_model(scale=3.0))
    samples, greedy = rollouts(adapted)
    for ours, theirs in zip((samples, greedy), rollouts(merged(adapted)), strict=True):
        assert torch.equal(ours.response_ids, theirs.response_ids)
    values = log_probs_of(adapted, *samples.sequences())
    torch.testing.assert_close(samples.at_tokens(values), samples.log_probs, atol=1e-4, rtol=1e-4)
    with without_adapters(adapted):
        base = rollouts(adapted)
    expected = rollouts(plain)
    for ours, theirs in zip(base, expected, strict=True):
        assert torch.equal(ours.response_ids, theirs.response_ids)
    assert torch.equal(base[0].log_probs, expected[0].log_probs)
    assert not torch.equal(base[0].response_ids, samples.response_ids)


def test_a_convolution_is_adapted_across_its_transposed_weight() -> None:
    adapted = add_lora(tiny.language_model("gpt2"), LoRA(rank=2))
    layer = adapted.get_base_model().transformer.h[0].mlp.c_fc
    assert isinstance(layer.get_base_layer(), Conv1D)
    assert (layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape) == ((2, 32), (128, 2))
