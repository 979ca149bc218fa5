"""The head of a model apart from its body."""

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from remax_lightning.models.head import DecodingHead, plain_head, without_head

PLAIN = ["llama", "qwen2", "gpt2", "opt", "gemma", "mistral"]
IDS = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])


def scaled(model_type: str, **values: float) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, vocab_size=tiny.VOCABULARY, **tiny.SHAPES["llama"], **values)
    )


@torch.no_grad()
@pytest.mark.parametrize("architecture", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_of_the_hidden_states_gives_the_logits(architecture: str, dtype: torch.dtype) -> None:
    model = tiny.language_model(architecture).to(dtype)
    head = plain_head(model)
    assert head is model.get_output_embeddings()
    expected = model(IDS).logits
    with without_head(head):
        hidden = model(IDS).logits
    assert hidden.shape == (2, 4, 32)
    torch.testing.assert_close(head(hidden), expected)
    assert torch.equal(model(IDS).logits, expected)


def test_a_bias_is_part_of_a_plain_head() -> None:
    values = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", vocab_size=tiny.VOCABULARY, **values))
    head = plain_head(model)
    assert head is not None
    assert head.bias is not None


@pytest.mark.parametrize(
    "model",
    [
        tiny.language_model("gemma2"),
        tiny.language_model("gemma2", final_logit_softcapping=1e6),
        scaled("cohere", logit_scale=0.0625),
        scaled("granite", logits_scaling=8.0),
    ],
    ids=["capped", "barely capped", "cohere", "granite"],
)
def test_logits_that_are_capped_or_scaled_have_no_plain_head(model: PreTrainedModel) -> None:
    with pytest.warns(match=f"{type(model).__name__} are not what a plain linear head returns"):
        assert plain_head(model) is None


def test_an_adapter_on_the_head_is_noticed_even_after_the_first_look() -> None:
    model = tiny.language_model()
    assert plain_head(model) is not None
    model.set_output_embeddings(nn.Sequential(model.get_output_embeddings()))
    assert plain_head(model) is None


def test_the_head_is_back_when_something_raises() -> None:
    model = tiny.language_model()
    with pytest.raises(KeyError), without_head(model.lm_head):
        raise KeyError
    assert model(IDS).logits.shape[-1] == tiny.VOCABULARY


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_decoding_head_is_the_head(bias: bool, num_rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = nn.Linear(48, 1001, bias=bias).to(dtype)
    hidden = torch.randn(num_rows, 48, dtype=dtype)
    torch.testing.assert_close(DecodingHead(head, 16)(hidden), head(hidden))
