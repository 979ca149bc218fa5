from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn

from remax_lightning.functional.sequence import left_pad, right_pad
from remax_lightning.models.language_model import (
    context_length,
    evaluating,
    frozen_copy,
    response_logits,
    stop_token_ids,
)

ARCHITECTURES = ["llama", "qwen2", "gpt2", "opt", "gemma", "mistral", "gemma2"]
PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12], [13]]
RESPONSES = [[20, 21, 22, 23], [24], [25, 26, 27, 28, 29, 30]]


def full(model: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pad", [0, 1, 25])
def test_response_logits_are_those_of_the_full_forward(architecture: str, pad: int) -> None:
    model = tiny.language_model(architecture)
    logits = response_logits(model, *left_pad(PROMPTS, pad), *right_pad(RESPONSES, pad))
    assert logits.shape == (3, 6, tiny.VOCABULARY)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        torch.testing.assert_close(logits[row, : len(response)], full(model, prompt, response), atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_response_logits_without_padding(architecture: str) -> None:
    model = tiny.language_model(architecture)
    logits = response_logits(model, *left_pad(PROMPTS[:1], 0), *right_pad(RESPONSES[:1], 0))
    torch.testing.assert_close(logits[0], full(model, PROMPTS[0], RESPONSES[0]), atol=2e-5, rtol=1e-4)


def test_a_response_token_does_not_see_itself() -> None:
    model = tiny.language_model()
    prompt = left_pad(PROMPTS[:1], 0)
    first = response_logits(model, *prompt, *right_pad([[20, 21, 22]], 0))
    second = response_logits(model, *prompt, *right_pad([[20, 21, 50]], 0))
    assert torch.equal(first, second)
    other = response_logits(model, *prompt, *right_pad([[50, 21, 22]], 0))
    assert torch.equal(first[:, 0], other[:, 0])
    assert not torch.equal(first[:, 1], other[:, 1])


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, [1]), (1, [1]), (7, [1, 7]), ([9, 7], [1, 7, 9]), ([1, 7], [1, 7])]
)
def test_stop_tokens_are_those_of_generation_config_and_tokenizer(
    configured: int | list[int] | None, expected: list[int]
) -> None:
    model = tiny.language_model()
    model.generation_config.eos_token_id = configured
    assert stop_token_ids(model, tiny.tokenizer()) == expected


def test_no_stop_token_is_refused() -> None:
    model, words = tiny.language_model(), tiny.tokenizer()
    model.generation_config.eos_token_id = None
    words.eos_token = None
    with pytest.raises(ValueError, match="names a stop token"):
        stop_token_ids(model, words)
    model.generation_config.eos_token_id = 7
    assert stop_token_ids(model, words) == [7]


@pytest.mark.parametrize("raises", [False, True])
def test_evaluating_restores_mixed_modes(raises: bool) -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Dropout())
    model[0].eval()
    model[1][1].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2

    def inside() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            if raises:
                raise RuntimeError("inside")

    if raises:
        with pytest.raises(RuntimeError, match="inside"):
            inside()
    else:
        inside()
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("tied", [False, True])
def test_a_frozen_copy_is_independent(tied: bool) -> None:
    model = tiny.language_model(tie_word_embeddings=tied).train()
    copy = frozen_copy(model)
    before = tiny.weights(copy)
    assert tiny.are_equal(before, tiny.weights(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert tiny.are_equal(before, tiny.weights(copy))
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in copy.modules())
    assert model.training


def test_context_length(tmp_path: Path) -> None:
    assert context_length(tiny.language_model("gpt2")) == 128
    assert context_length(tiny.language_model("opt")) == 128
    assert context_length(tiny.language_model("llama", max_position_embeddings=77)) == 77
