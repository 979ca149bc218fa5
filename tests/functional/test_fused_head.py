import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from remax_lightning.functional import fused_log_probs, fused_policy_gradient, fused_policy_gradient_loss

SHAPE, HIDDEN_SIZE, VOCABULARY = (3, 8), 4, 50


def make_inputs(dtype=torch.float64, *, has_bias=True, is_grad=True):
    """Hidden states, weight, bias, tokens, and coefficients a third of which are 0."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"hidden": (*SHAPE, HIDDEN_SIZE), "weight": (VOCABULARY, HIDDEN_SIZE), "bias": (VOCABULARY,)}
    inputs = {
        name: torch.randn(size, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(is_grad)
        for name, size in sizes.items()
    }
    inputs["bias"] = inputs["bias"] if has_bias else None
    inputs["tokens"] = torch.randint(0, VOCABULARY, SHAPE, generator=generator)
    coefficients = torch.randn(SHAPE, dtype=torch.float64, generator=generator)
    return inputs, coefficients.masked_fill_(torch.rand(SHAPE, generator=generator) < 1 / 3, 0.0).to(dtype)


def naive(hidden, weight, tokens, *, bias=None, temperature=1.0):
    """Log-probabilities and entropy over all the logits at once."""
    log_pi = (F.linear(hidden, weight, bias) / temperature).log_softmax(-1)
    return log_pi.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -(log_pi.exp() * log_pi).sum(-1)


def leaves(inputs):
    """The inputs that need gradients."""
    return [
        inputs[name] for name in ("hidden", "weight", "bias") if inputs[name] is not None and inputs[name].requires_grad
    ]


def fused_values(inputs, coefficients, form, **settings):
    """Loss, log-probabilities, entropy and gradients, by either form."""
    if form == "gradient in the forward":
        output = fused_policy_gradient(**inputs, coefficients=coefficients, **settings)
    else:
        log_probs = fused_log_probs(**inputs, **settings)
        with torch.no_grad():
            entropy = fused_policy_gradient(**inputs, coefficients=coefficients, **settings).entropy
        output = -(coefficients * log_probs).sum(), log_probs, entropy
    return *output, *torch.autograd.grad(output[0], leaves(inputs))


@pytest.mark.parametrize("form", ["gradient in the forward", "gradient in the backward"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_autograd_over_all_the_logits_whatever_the_chunk(form, has_bias, temperature, dtype, tolerance):
    inputs, coefficients = make_inputs(dtype, has_bias=has_bias)
    log_probs, entropy = naive(**inputs, temperature=temperature)
    loss = -(coefficients * log_probs).sum()
    expected = loss, log_probs, entropy, *torch.autograd.grad(loss, leaves(inputs))
    for chunk_size in (1, 5, 24, 1000, None):
        actual = fused_values(inputs, coefficients, form, temperature=temperature, chunk_size=chunk_size)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck(temperature):
    inputs, _ = make_inputs()

    def log_probs(*tensors):
        return fused_log_probs(tensors[0], tensors[1], inputs["tokens"], bias=tensors[2], temperature=temperature)

    assert torch.autograd.gradcheck(log_probs, leaves(inputs))


class LargestNewTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation allocated."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in tensors_of((args, kwargs))}
        new = [each for each in tensors_of(output) if each.untyped_storage().data_ptr() not in known]
        self.numel = max([self.numel, *(tensor.numel() for tensor in new)])
        return output


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def test_no_tensor_holds_the_logits_of_more_than_a_chunk():
    inputs, coefficients = make_inputs()
    losses = {
        "naive": lambda: -(coefficients * naive(**inputs)[0]).sum(),
        "forward": lambda: fused_policy_gradient_loss(**inputs, coefficients=coefficients, chunk_size=5),
        "backward": lambda: -(coefficients * fused_log_probs(**inputs, chunk_size=5)).sum(),
    }
    largest = {}
    for name, loss in losses.items():
        with LargestNewTensor() as mode:
            loss().backward()
        largest[name] = mode.numel
    assert largest == {"naive": 24 * VOCABULARY, "forward": 5 * VOCABULARY, "backward": 5 * VOCABULARY}


def test_the_upstream_gradient_scales_and_can_itself_be_learned():
    inputs, coefficients = make_inputs()
    divisor = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    loss = fused_policy_gradient_loss(**inputs, coefficients=coefficients)
    expected = torch.autograd.grad(-(coefficients * naive(**inputs)[0]).sum() * 3 / divisor, [*leaves(inputs), divisor])
    torch.testing.assert_close(torch.autograd.grad(loss * 3 / divisor, [*leaves(inputs), divisor]), expected)


def test_a_second_backward_pass_is_refused_as_the_first_scaled_in_place():
    inputs, coefficients = make_inputs()
    loss = fused_policy_gradient_loss(**inputs, coefficients=coefficients)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_gradients_of_a_tied_weight_add_up():
    inputs, coefficients = make_inputs(has_bias=False)
    weight, tokens = inputs["weight"], inputs["tokens"]

    def gradient(loss):
        hidden = F.embedding(tokens, weight).tanh()
        return torch.autograd.grad(loss(hidden), weight)[0]

    actual = gradient(lambda hidden: fused_policy_gradient_loss(hidden, weight, tokens, coefficients, chunk_size=5))
    expected = gradient(lambda hidden: -(coefficients * naive(hidden, weight, tokens)[0]).sum())
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_a_coefficient_of_zero_adds_nothing_even_where_the_logits_overflow():
    inputs, coefficients = make_inputs(torch.float32, has_bias=False)
    idle = coefficients == 0
    expected = fused_values(inputs, coefficients, "gradient in the forward", chunk_size=5)
    for value in (1e38, math.inf, math.nan):
        hidden = inputs["hidden"].detach().masked_fill(idle.unsqueeze(-1), value).requires_grad_()
        spoiled = {**inputs, "hidden": hidden}
        loss, log_probs, _, *gradients = fused_values(spoiled, coefficients, "gradient in the forward", chunk_size=5)
        torch.testing.assert_close([loss, *gradients], [expected[0], *expected[3:]])
        assert gradients[0][idle].eq(0).all()
        torch.testing.assert_close(log_probs[~idle], expected[1][~idle])
    all_zero = torch.autograd.grad(fused_policy_gradient_loss(**inputs, coefficients=0 * coefficients), leaves(inputs))
    assert all(gradient.eq(0).all() for gradient in all_zero)


@pytest.mark.parametrize("form", ["gradient in the forward", "gradient in the backward"])
def test_a_forbidden_token_has_probability_zero(form):
    inputs, coefficients = make_inputs()
    allowed = {**inputs, "tokens": inputs["tokens"] % 49, **{k: inputs[k][:-1] for k in ("weight", "bias")}}
    forbidden = {**allowed, "weight": inputs["weight"], "bias": inputs["bias"].detach().clone().requires_grad_()}
    with torch.no_grad():
        forbidden["bias"][-1] = -math.inf
    expected, actual = (fused_values(each, coefficients, form, temperature=0.7) for each in (allowed, forbidden))
    torch.testing.assert_close(actual[:4], expected[:4])
    for gradient, expected_gradient in zip(actual[4:], expected[4:], strict=True):
        torch.testing.assert_close(gradient[:-1], expected_gradient)
        assert gradient[-1].eq(0).all()


@pytest.mark.parametrize("form", ["gradient in the forward", "gradient in the backward"])
def test_bfloat16_stays_near_float32(form):
    inputs, coefficients = make_inputs(torch.bfloat16)
    wide = {name: each.detach().float().requires_grad_() for name, each in inputs.items() if name != "tokens"}
    wide["tokens"] = inputs["tokens"]
    actual = fused_values(inputs, coefficients.float(), form, chunk_size=5)
    expected = fused_values(wide, coefficients.float(), form, chunk_size=5)
    assert [each.dtype for each in actual] == 3 * [torch.float32] + 3 * [torch.bfloat16]
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() < 0.01 * other.abs().max()


def test_a_small_coefficient_survives_float16_under_a_loss_scale():
    inputs, coefficients = make_inputs(torch.float16)
    tiny, scale = 1e-9, 1e9
    expected = fused_values(inputs, coefficients.float(), "gradient in the forward")[3:]
    loss = fused_policy_gradient_loss(**inputs, coefficients=coefficients.float() * tiny)
    actual = torch.autograd.grad(loss * scale, leaves(inputs))
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["gradient in the forward", "gradient in the backward"])
def test_autocast_multiplies_in_its_dtype_and_leaves_float32_gradients(form):
    inputs, coefficients = make_inputs(torch.float32)
    expected = fused_values(inputs, coefficients, form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = fused_values(inputs, coefficients, form)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        assert 0 < (one - other).abs().max() < 0.02 * other.abs().max()


@pytest.mark.parametrize("form", ["gradient in the forward", "gradient in the backward"])
def test_a_frozen_weight_gets_no_gradient(form):
    inputs, coefficients = make_inputs(has_bias=False)
    expected = fused_values(inputs, coefficients, form)
    inputs["weight"] = inputs["weight"].detach()
    with LargestNewTensor() as mode:
        actual = fused_values(inputs, coefficients, form, chunk_size=1)
    torch.testing.assert_close(actual, expected[:4])
    assert mode.numel < VOCABULARY * HIDDEN_SIZE


def test_without_gradient_only_the_values_are_computed():
    inputs, coefficients = make_inputs()
    expected = naive(**inputs)
    with torch.no_grad(), LargestNewTensor() as mode:
        output = fused_policy_gradient(**inputs, coefficients=coefficients, chunk_size=1)
        log_probs = fused_log_probs(**inputs, chunk_size=1)
    assert mode.numel < VOCABULARY * HIDDEN_SIZE  # no gradient of the weight
    torch.testing.assert_close([output[1:], log_probs], [expected, expected[0]])
    assert not any(tensor.requires_grad for tensor in (*output, log_probs))
    with_grad = fused_policy_gradient(**inputs, coefficients=coefficients)
    assert [tensor.requires_grad for tensor in with_grad] == [True, False, False]
    assert fused_log_probs(**inputs).requires_grad


@pytest.mark.parametrize("form", ["gradient in the forward", "gradient in the backward"])
def test_no_tokens_give_a_loss_and_gradients_of_zero(form):
    inputs, coefficients = make_inputs()
    inputs["hidden"] = inputs["hidden"].detach()[:0].requires_grad_()
    inputs["tokens"] = inputs["tokens"][:0]
    loss, log_probs, entropy, *gradients = fused_values(inputs, coefficients[:0], form)
    assert loss == 0
    assert log_probs.shape == entropy.shape == (0, 8)
    assert all(gradient.eq(0).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": torch.zeros(3, 7).long()}, r"tokens must hold one id per hidden state.* \(3, 8\), got \(3, 7\)"),
        ({"coefficients": torch.zeros(3, 1)}, r"coefficients must hold one weight .* \(3, 8\), got \(3, 1\); slice"),
        ({"weight": torch.zeros(4, 50)}, r"weight must hold one row .* \(4, 4\), got \(4, 50\)"),
        ({"bias": torch.zeros(4)}, r"bias must hold one value per row of weight, \(V,\), here \(50,\), got \(4,\)"),
        ({"temperature": 0.0}, r"temperature .* must be above 0, got 0.0"),
        ({"temperature": math.nan}, r"temperature .* must be above 0, got nan"),
        ({"chunk_size": 0}, r"chunk_size .* at least 1, got 0; None picks it"),
    ],
)
def test_refusals(changed, message):
    inputs, coefficients = make_inputs()
    arguments = {**inputs, "coefficients": coefficients, **changed}
    with pytest.raises(ValueError, match=message):
        fused_policy_gradient(**arguments)
    if "coefficients" not in changed:
        del arguments["coefficients"]
        with pytest.raises(ValueError, match=message):
            fused_log_probs(**arguments)
