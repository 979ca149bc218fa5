"""Log-probs of given tokens and the policy gradient through them, against the whole forward of each sequence."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from remax_lightning.functional import entropy, right_pad, token_log_probs
from remax_lightning.models.head import plain_head
from remax_lightning.models.next_token import log_probs_of, policy_gradient_of

ARCHITECTURES = ["llama", "qwen2", "gpt2", "opt", "gemma", "mistral", "gemma2"]
ROWS = [[3, 4, 5, 20, 21, 22, 23], [6, 7, 24], [13, 25, 26, 27, 28, 29, 30, 11, 12, 13, 14, 15]]
STARTS, ENDS = [3, 2, 1], [7, 3, 10]


def batch(pad: int) -> tuple[Tensor, Tensor]:
    ids, _ = right_pad(ROWS, pad)
    column = torch.arange(ids.shape[1])
    return ids, (column >= torch.tensor(STARTS)[:, None]) & (column < torch.tensor(ENDS)[:, None])


def expected(model: torch.nn.Module, temperature: float) -> tuple[Tensor, Tensor]:
    log_probs, entropies = [], []
    for row, start, end in zip(ROWS, STARTS, ENDS, strict=True):
        logits = model(torch.tensor([row])).logits[0, start - 1 : end - 1]
        log_probs.append(token_log_probs(logits, torch.tensor(row[start:end]), temperature=temperature))
        entropies.append(entropy(logits, temperature=temperature))
    return torch.cat(log_probs), torch.cat(entropies)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("pad", "temperature"), [(0, 1.0), (25, 0.7)])
def test_they_are_those_of_each_row_alone(architecture: str, pad: int, temperature: float) -> None:
    model = tiny.language_model(architecture, scale=3.0)
    assert (plain_head(model) is None) == (architecture == "gemma2")
    ids, mask = batch(pad)
    log_probs, entropies = expected(model, temperature)
    torch.testing.assert_close(log_probs_of(model, ids, mask, temperature=temperature), log_probs, atol=1e-5, rtol=1e-4)

    coefficients = torch.linspace(-1, 1, len(log_probs))
    model.zero_grad()
    (-(coefficients * log_probs).sum()).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    output = policy_gradient_of(model, ids, mask, coefficients, temperature=temperature)
    output.loss.backward()
    torch.testing.assert_close(output.log_probs, log_probs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.entropy, entropies, atol=1e-5, rtol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-3, msg=name)


def test_the_log_probs_have_a_gradient() -> None:
    model = tiny.language_model(scale=3.0)
    ids, mask = batch(0)
    (log_probs_of(model, ids, mask) ** 2).sum().backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    (expected(model, 1.0)[0] ** 2).sum().backward()
    torch.testing.assert_close(gradient, model.lm_head.weight.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("length", [1, 12])
def test_no_token_gives_no_value_and_a_gradient_of_zero(architecture: str, length: int) -> None:
    model, (ids, mask) = tiny.language_model(architecture), batch(0)
    ids, mask = ids[:, :length], torch.zeros_like(mask[:, :length])
    assert log_probs_of(model, ids, mask).shape == (0,)
    output = policy_gradient_of(model, ids, mask, torch.zeros(0))
    output.loss.backward()
    assert float(output.loss) == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)


def test_a_model_with_adapters_trains_them_alone() -> None:
    torch.manual_seed(0)
    base = tiny.language_model(scale=3.0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    assert plain_head(model) is base.lm_head
    ids, mask = batch(0)
    log_probs, _ = expected(model, 1.0)
    coefficients = torch.linspace(-1, 1, len(log_probs))
    (-(coefficients * log_probs).sum()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    output = policy_gradient_of(model, ids, mask, coefficients)
    output.loss.backward()
    torch.testing.assert_close(output.log_probs, log_probs, atol=1e-5, rtol=1e-4)
    assert set(gradients) == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-4, rtol=1e-3, msg=name)
    with model.disable_adapter():
        off = log_probs_of(model, ids, mask)
    torch.testing.assert_close(off, expected(tiny.language_model(scale=3.0), 1.0)[0], atol=1e-5, rtol=1e-4)


def test_half_precision_stays_near_float32() -> None:
    model = tiny.language_model(scale=2.0)
    ids, mask = batch(0)
    exact = policy_gradient_of(model, ids, mask, torch.ones(int(mask.sum())))
    exact.loss.backward()
    half = tiny.language_model(scale=2.0).bfloat16()
    output = policy_gradient_of(half, ids, mask, torch.ones(int(mask.sum())))
    output.loss.backward()
    assert output.log_probs.dtype == torch.float32
    torch.testing.assert_close(output.log_probs, exact.log_probs, atol=0.1, rtol=0.05)
    norm = model.lm_head.weight.grad.norm()
    assert (half.lm_head.weight.grad.float() - model.lm_head.weight.grad).norm() < 0.05 * norm
