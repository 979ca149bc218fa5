"""Activations, key-value caches and the head take what a dry run says, measured on the CPU."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from plan.measured import PeakMemory, SavedTensors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from remax_lightning.functional import fused_head
from remax_lightning.functional.fused_head import fused_log_probs, fused_policy_gradient
from remax_lightning.models.head import plain_head, without_head
from remax_lightning.models.parallelize import checkpoint_activations
from remax_lightning.models.scalar_model import sequence_scores
from remax_lightning.plan import dry_run, passes
from remax_lightning.rollout import Sampling
from remax_lightning.rollout.next_logits import NextLogits

ROWS, LENGTH, KEPT = 3, 96, 32
WIDE = {"hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**WIDE, "num_key_value_heads": 2},
    "qwen2": {**WIDE, "num_key_value_heads": 2},
    "mistral": {**WIDE, "num_key_value_heads": 2, "sliding_window": 16},
    "opt": {**WIDE, "ffn_dim": 224, "word_embed_proj_dim": 96, "max_position_embeddings": 128},
    "gpt2": {"n_embd": 96, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gemma2": {**WIDE, "num_key_value_heads": 2, "head_dim": 24},
}
CAPPED = "gemma2"


def build(model_type: str, dtype: torch.dtype, device: str, *, checkpointed: bool = False, scalar: bool = False) -> Any:
    tokens = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **SHAPES[model_type], **tokens, num_labels=1)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    model_class = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    with torch.device(device):
        model = model_class.from_config(config, dtype=dtype)
    if checkpointed:
        checkpoint_activations(model)
    return model.train()


def hidden_states(model: PreTrainedModel) -> Tensor:
    """What a training pass gives to the head."""
    head, ids = plain_head(model), torch.randint(0, 64, (ROWS, LENGTH))
    with nullcontext() if head is None else without_head(head):
        states = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=KEPT + 1, use_cache=False)
    return states.logits[:, :-1].flatten(0, 1).clone()


def saved(model: PreTrainedModel) -> int:
    hooks = SavedTensors(model)
    with hooks:
        hidden_states(model)
    return hooks.bytes


def peak(model: PreTrainedModel) -> int:
    """Most bytes in a forward and a backward pass; gradients vanish, as those of a split model do."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
    with PeakMemory() as memory:
        states = hidden_states(model)
        gradient = torch.ones_like(states)
        states.backward(gradient)
    return memory.peak - states.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", [each for each in SHAPES if each != CAPPED])
def test_activations(model_type: str, dtype: torch.dtype) -> None:
    usage = passes.language_model_training(build(model_type, dtype, "meta"), ROWS, LENGTH, KEPT)
    real = build(model_type, dtype, "cpu")
    assert usage.saved == pytest.approx(saved(real), rel=0.02)
    assert usage.peak == pytest.approx(peak(real), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", [each for each in SHAPES if each != CAPPED])
def test_checkpointed_activations(model_type: str, dtype: torch.dtype) -> None:
    usage = passes.language_model_training(build(model_type, dtype, "meta", checkpointed=True), ROWS, LENGTH, KEPT)
    whole = passes.language_model_training(build(model_type, dtype, "meta"), ROWS, LENGTH, KEPT)
    assert usage.peak == pytest.approx(peak(build(model_type, dtype, "cpu", checkpointed=True)), rel=0.1)
    assert usage.saved < 0.25 * whole.saved
    assert usage.peak < 0.75 * whole.peak


@pytest.mark.parametrize("model_type", [each for each in SHAPES if each != CAPPED])
def test_activations_under_autocast(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # on a CPU autocast takes no function of those that are in these models to float32, on a GPU it does
    monkeypatch.setattr(dry_run, "SINGLE", set())
    usage = passes.language_model_training(build(model_type, torch.float32, "meta"), ROWS, LENGTH, KEPT, autocast=True)
    real = build(model_type, torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert usage.saved + usage.copies == pytest.approx(saved(real), rel=0.02)
    body = [each for name, each in real.named_parameters() if each.dim() == 2 and "emb" not in name]
    assert usage.copies == pytest.approx(2 * sum(each.numel() for each in body if each.shape[0] != 64), rel=0.15)


def test_logits_that_are_capped_are_in_memory() -> None:
    usage = passes.language_model_training(build(CAPPED, torch.float32, "meta"), ROWS, LENGTH, KEPT)
    model = build(CAPPED, torch.float32, "meta")
    model.config.final_logit_softcapping = None
    assert passes.chunked_head(model) is model.lm_head
    plain = passes.language_model_training(model, ROWS, LENGTH, KEPT)
    assert usage.saved - plain.saved >= 2 * ROWS * KEPT * 64 * 4


def test_activations_grow_with_rows_and_attention_never_with_pairs_of_tokens() -> None:
    model = build("llama", torch.bfloat16, "meta")
    one, two = (passes.language_model_training(model, rows, LENGTH, KEPT).saved for rows in (8, 16))
    longer = passes.language_model_training(model, 8, 2 * LENGTH, KEPT).saved
    assert two == pytest.approx(2 * one, rel=0.01)
    assert longer == pytest.approx(2 * one, rel=0.01)


@pytest.mark.parametrize("model_type", ["llama", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring(model_type: str, dtype: torch.dtype) -> None:
    planned = passes.scalar_model_scoring(build(model_type, dtype, "meta", scalar=True).eval(), ROWS, LENGTH).peak
    real, ids = build(model_type, dtype, "cpu", scalar=True).eval(), torch.randint(2, 64, (ROWS, LENGTH))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, LENGTH // 2 :] = False
    with torch.no_grad(), PeakMemory() as memory:
        sequence_scores(real, ids, mask)
    assert planned == pytest.approx(memory.peak, rel=0.15)


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "mistral"])
@pytest.mark.parametrize("autocast", [False, True])
def test_cache(model_type: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "SINGLE", set())
    prompts, rows, new = 2, 6, 5
    model = build(model_type, torch.float32, "meta").eval()
    usages = passes.rollout(model, prompts, rows, (7, 7 + new), Sampling(max_new_tokens=new), autocast=autocast)
    ids, mask = torch.randint(2, 64, (prompts, 7)), torch.ones(prompts, 7, dtype=torch.bool)
    mask[0, :3] = False
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        next_logits = NextLogits(build(model_type, torch.float32, "cpu").eval(), ids, mask, rows, new)
        next_logits.of_prompts(torch.arange(rows) % prompts)
    real = sum(states.nbytes for layer in next_logits.cache.attention_layers for states in (layer.keys, layer.values))
    assert [usage.cache for usage in usages] == [real, real]
    assert all(usage.peak > 0 for usage in usages)


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("tokens", [100, 2000])
def test_head(dtype: torch.dtype, autocast: bool, trained: bool, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_head, "CHUNK_SIZE", fused_head.CPU_CHUNK_SIZE)
    monkeypatch.setattr(fused_head, "BLOCK_SIZE", fused_head.CPU_BLOCK_SIZE)
    model = build("llama", dtype, "meta")
    model.set_output_embeddings(nn.Linear(96, 3000, bias=False, dtype=dtype, device="meta"))
    model.lm_head.requires_grad_(trained)
    weight = torch.randn(3000, 96, dtype=dtype).requires_grad_(trained)
    hidden = torch.randn(tokens, 96, dtype=dtype).requires_grad_()
    target, ones = torch.randint(0, 3000, (tokens,)), torch.ones(tokens)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), PeakMemory() as training:
        fused_policy_gradient(hidden, weight, target, ones).loss.backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), PeakMemory() as scoring:
        fused_log_probs(hidden, weight, target)
    own = hidden.nbytes  # made before
    assert passes.head_training(model, tokens, autocast=autocast).peak == pytest.approx(training.peak + own, rel=0.05)
    assert passes.head_scoring(model, tokens, autocast=autocast).peak == pytest.approx(scoring.peak + own, rel=0.05)


def test_a_question_that_needs_data_is_refused() -> None:
    class Curious(nn.Module):
        def forward(self, ids: Tensor) -> float:
            return float(ids.double().sum())

    model = Curious()
    with (
        pytest.raises(ValueError, match="Curious cannot be run without data"),
        dry_run.dry_run(model, autocast=False, is_padded=False),
    ):
        model(torch.ones(2, device="meta"))
