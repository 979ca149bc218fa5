import math

import pytest
import torch
from torch.nn import functional as F

from remax_lightning.functional import entropy, kl_k1, kl_k2, kl_k3, masked_mean, token_log_probs


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def logits(generator):
    return 3 * torch.randn(4, 5, 11, dtype=torch.float64, generator=generator)


@pytest.fixture
def tokens(generator):
    return torch.randint(0, 11, (4, 5), generator=generator)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_token_log_probs_equal_cross_entropy(logits, tokens, temperature):
    expected = -F.cross_entropy((logits / temperature).flatten(0, 1), tokens.flatten(), reduction="none").view(4, 5)
    actual = token_log_probs(logits, tokens, temperature=temperature)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


def test_probabilities_of_all_tokens_sum_to_one(logits):
    every_token = torch.arange(11).expand(4, 5, 11)
    probs = torch.stack([token_log_probs(logits, t, temperature=0.7).exp() for t in every_token.unbind(-1)])
    torch.testing.assert_close(probs.sum(0), torch.ones(4, 5, dtype=torch.float64))


def test_a_shift_of_the_logits_changes_nothing(logits, tokens, generator):
    shift = torch.randn(4, 5, 1, dtype=torch.float64, generator=generator)
    for function in (lambda x: token_log_probs(x, tokens), entropy):
        torch.testing.assert_close(function(logits + shift), function(logits), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_taken_to_float32_before_the_softmax(logits, tokens, dtype):
    half = logits.to(dtype)
    for function in (lambda x: token_log_probs(x, tokens, temperature=0.7), lambda x: entropy(x, temperature=0.7)):
        assert function(half).dtype == torch.float32
        torch.testing.assert_close(function(half), function(half.double()).float(), rtol=1e-5, atol=1e-5)
        assert function(logits).dtype == torch.float64


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    value = token_log_probs(logits, torch.tensor([[0]])) + entropy(logits)
    value.sum().backward()
    assert value.item() == 0
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_entropy_of_a_uniform_is_log_v_at_any_temperature(temperature):
    logits = torch.full((2, 3, 7), 5.0, dtype=torch.float64)
    torch.testing.assert_close(
        entropy(logits, temperature=temperature), torch.full((2, 3), math.log(7), dtype=torch.float64)
    )


def test_entropy_equals_torch_distributions_and_grows_with_temperature(logits):
    values = [entropy(logits, temperature=t) for t in (0.2, 1.0, 4.0)]
    assert (values[0] < values[1]).all()
    assert (values[1] < values[2]).all()
    torch.testing.assert_close(values[1], torch.distributions.Categorical(logits=logits).entropy())


def test_a_forbidden_token_adds_nothing_to_the_entropy_or_its_gradient(logits):
    allowed = logits.clone().requires_grad_()
    forbidden = torch.cat([logits, torch.full((4, 5, 1), -torch.inf, dtype=torch.float64)], -1).requires_grad_()
    values = entropy(allowed), entropy(forbidden)
    for value in values:
        value.sum().backward()
    torch.testing.assert_close(*values)
    torch.testing.assert_close(forbidden.grad[..., :-1], allowed.grad)
    assert forbidden.grad[..., -1].eq(0).all()


@pytest.mark.parametrize("function", [entropy, lambda x, **kw: token_log_probs(x, torch.zeros(4, 5).long(), **kw)])
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_not_above_zero_is_refused(logits, function, temperature):
    with pytest.raises(ValueError, match=rf"temperature .* must be above 0, got {temperature}; .*argmax"):
        function(logits, temperature=temperature)


def test_tokens_that_do_not_line_up_with_the_logits_are_refused(logits, tokens):
    with pytest.raises(ValueError, match=r"tokens must hold one id per position .* \(4, 5\), got \(4, 4\); slice"):
        token_log_probs(logits, tokens[:, 1:])


def kl_by_tokens(policy_logits, ref_logits):
    """Log-probs of every token under both, and the KL by torch.distributions."""
    policy = torch.distributions.Categorical(logits=policy_logits)
    reference = torch.distributions.Categorical(logits=ref_logits)
    return policy.logits, reference.logits, torch.distributions.kl_divergence(policy, reference)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_k1_and_k3_are_unbiased(logits, generator, estimator):
    ref_logits = torch.randn(4, 5, 11, dtype=torch.float64, generator=generator)
    log_probs, ref_log_probs, exact = kl_by_tokens(logits, ref_logits)
    expected = (log_probs.exp() * estimator(log_probs, ref_log_probs)).sum(-1)
    torch.testing.assert_close(expected, exact, rtol=1e-12, atol=1e-12)


def test_k2_is_biased_but_its_expected_gradient_is_that_of_the_kl(logits, generator):
    ref_logits = torch.randn(4, 5, 11, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    log_probs, ref_log_probs, exact = kl_by_tokens(logits, ref_logits)
    expected = (log_probs.exp().detach() * kl_k2(log_probs, ref_log_probs)).sum(-1)  # the tokens are drawn: no gradient
    actual_grad, exact_grad = (torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (expected, exact))
    torch.testing.assert_close(actual_grad, exact_grad, rtol=1e-10, atol=1e-12)
    assert (expected - exact).abs().min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k2_and_k3_are_never_negative_and_agree_near_zero(dtype):
    log_ratio = torch.logspace(-9, 1, 1000, dtype=dtype)
    for sign in (1, -1):
        k2, k3 = (k(sign * log_ratio, torch.zeros_like(log_ratio)) for k in (kl_k2, kl_k3))
        assert (k2 > 0).all()
        assert (k3 >= 0).all()
    medium = torch.tensor([1e-3, -1e-3], dtype=torch.float64)
    torch.testing.assert_close(
        kl_k3(medium, torch.zeros(2).double()), kl_k2(medium, torch.zeros(2).double()), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("estimator", [kl_k1, kl_k2, kl_k3])
def test_the_kl_of_a_policy_to_itself_is_zero(logits, estimator):
    assert estimator(logits, logits).eq(0).all()


def test_masked_mean_sees_only_the_mask(generator):
    values = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    expected = values[mask].mean()
    values[~mask] = torch.tensor([math.nan, math.inf], dtype=torch.float64).repeat(4)
    torch.testing.assert_close(masked_mean(values, mask), expected)
    assert masked_mean(values, torch.zeros_like(mask)).item() == 0
