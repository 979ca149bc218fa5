import math

import pytest
import torch
from torch.nn import functional as F

from remax_lightning.functional import (
    adapted_kl_coef,
    baseline_advantages,
    discounted_returns,
    generalized_advantages,
    kl_token_rewards,
)

LENGTHS = [9, 1, 4, 5, 0, 2]


def make_batch(seed=0, length=9):
    generator = torch.Generator().manual_seed(seed)
    token_rewards, values = torch.randn(2, len(LENGTHS), length, dtype=torch.float64, generator=generator)
    mask = torch.arange(length) < torch.tensor(LENGTHS)[:, None]
    return token_rewards, values, mask


def rows(tensor, mask):
    """The tokens of each response as a list of floats."""
    return [row[kept].tolist() for row, kept in zip(tensor, mask, strict=True)]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.3])
def test_returns_are_the_rewards_to_come_each_discounted_by_its_distance(gamma):
    token_rewards, _, mask = make_batch()
    returns = discounted_returns(token_rewards, mask, gamma=gamma)
    for found, earned in zip(rows(returns, mask), rows(token_rewards, mask), strict=True):
        expected = [sum(r * gamma**k for k, r in enumerate(earned[t:])) for t in range(len(earned))]
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert returns[~mask].eq(0).all()


def test_undiscounted_returns_of_the_token_rewards_are_the_advantages_without_baseline():
    rewards, log_probs, ref_log_probs, mask = make_responses()
    kl = {"log_probs": log_probs, "ref_log_probs": ref_log_probs, "kl_coef": 0.3}
    expected = baseline_advantages(rewards, torch.zeros_like(rewards), mask, kl_form="full_step", **kl)
    torch.testing.assert_close(discounted_returns(kl_token_rewards(rewards, mask, **kl), mask), expected)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_with_lambda_one_and_no_values_gae_is_the_discounted_return(gamma):
    token_rewards, values, mask = make_batch()
    advantages, returns = generalized_advantages(
        token_rewards, torch.zeros_like(values), mask, gamma=gamma, gae_lambda=1.0
    )
    torch.testing.assert_close(advantages, discounted_returns(token_rewards, mask, gamma=gamma))
    assert torch.equal(advantages, returns)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_with_lambda_one_the_values_cancel_but_for_the_tokens_own(gamma):
    token_rewards, values, mask = make_batch()
    advantages, returns = generalized_advantages(token_rewards, values, mask, gamma=gamma, gae_lambda=1.0)
    expected = discounted_returns(token_rewards, mask, gamma=gamma)
    torch.testing.assert_close(returns, expected)
    torch.testing.assert_close(advantages, (expected - values) * mask)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_with_lambda_zero_gae_is_the_error_of_one_step(gamma):
    token_rewards, values, mask = make_batch()
    advantages, _ = generalized_advantages(token_rewards, values, mask, gamma=gamma, gae_lambda=0.0)
    per_row = (rows(each, mask) for each in (advantages, token_rewards, values))
    for found, earned, value in zip(*per_row, strict=True):
        following = [*value, 0.0][1:]  # nothing is expected after the last token
        expected = [r + gamma * n - v for r, n, v in zip(earned, following, value, strict=True)]
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0)])
def test_gae_weighs_the_errors_of_n_steps_geometrically(gamma, gae_lambda):
    """The definition, equation 16 of the paper: (1 - lambda) * sum of lambda^(n-1) times the n-step advantage."""
    token_rewards, values, mask = make_batch()
    advantages, returns = generalized_advantages(token_rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    torch.testing.assert_close(advantages + values * mask, returns)
    per_row = (rows(each, mask) for each in (advantages, token_rewards, values))
    for found, earned, value in zip(*per_row, strict=True):
        for t in range(len(earned)):
            left = len(earned) - t

            def n_steps(n, t=t, earned=earned, value=value):
                summed = sum(gamma**k * earned[t + k] for k in range(n))
                expected_after = gamma**n * value[t + n] if t + n < len(value) else 0.0
                return summed + expected_after - value[t]

            # From the last token on all n-step advantages are the same, with the rest of the weight.
            expected = (1 - gae_lambda) * sum(gae_lambda ** (n - 1) * n_steps(n) for n in range(1, left))
            expected += gae_lambda ** (left - 1) * n_steps(left)
            assert found[t] == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_values_that_are_right_leave_no_advantage():
    """If the values are the returns, nothing is better than expected, for every lambda."""
    token_rewards, _, mask = make_batch()
    values = discounted_returns(token_rewards, mask, gamma=0.9)
    for gae_lambda in (0.0, 0.5, 1.0):
        advantages, returns = generalized_advantages(token_rewards, values, mask, gamma=0.9, gae_lambda=gae_lambda)
        torch.testing.assert_close(advantages, torch.zeros_like(values))
        torch.testing.assert_close(returns, values)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_padding_on_either_side_and_gaps_inside_change_nothing(junk):
    token_rewards, values, mask = make_batch()
    settings = {"gamma": 0.9, "gae_lambda": 0.7}
    clean = (
        *generalized_advantages(token_rewards, values, mask, **settings),
        discounted_returns(token_rewards, mask, gamma=0.9),
    )
    places = torch.tensor([1, 2, 5, 6, 7, 10, 11, 13, 18])  # where the nine columns go among twenty
    wide_mask = torch.zeros(len(mask), 20, dtype=torch.bool)
    wide_mask[:, places] = mask
    wide = []
    for each in (token_rewards, values):
        wide.append(torch.full(wide_mask.shape, junk, dtype=torch.float64))
        wide[-1][:, places] = each.masked_fill(~mask, junk)
    dirty = (
        *generalized_advantages(*wide, wide_mask, **settings),
        discounted_returns(wide[0], wide_mask, gamma=0.9),
    )
    for found, expected in zip(dirty, clean, strict=True):
        torch.testing.assert_close(found[:, places], expected, rtol=1e-13, atol=1e-14)
        assert found[~wide_mask].eq(0).all()


def test_a_row_that_is_not_finite_spoils_no_other():
    token_rewards, values, mask = make_batch()
    clean = generalized_advantages(token_rewards, values, mask, gamma=0.9, gae_lambda=0.7)
    token_rewards[0] = math.nan
    values[2] = math.inf
    spoiled = generalized_advantages(token_rewards, values, mask, gamma=0.9, gae_lambda=0.7)
    kept = torch.tensor([1, 3, 4, 5])
    for found, expected in zip(spoiled, clean, strict=True):
        assert torch.equal(found[kept], expected[kept])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 4)])
def test_batches_without_a_token_give_zeros(shape):
    nothing = torch.full(shape, math.nan)
    mask = torch.zeros(shape, dtype=torch.bool)
    results = (
        discounted_returns(nothing, mask),
        *generalized_advantages(nothing, nothing, mask, gamma=1.0, gae_lambda=0.95),
        kl_token_rewards(torch.full(shape[:1], math.nan), mask, nothing, nothing, 0.1),
    )
    for result in results:
        assert result.shape == shape
        assert result.eq(0).all()


def make_responses():
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(len(LENGTHS), dtype=torch.float64, generator=generator)
    log_probs, ref_log_probs = -torch.rand(2, len(LENGTHS), 9, dtype=torch.float64, generator=generator)
    mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    return rewards, log_probs, ref_log_probs, mask


def test_token_rewards_are_the_reward_at_the_last_token_and_the_penalty_at_each():
    rewards, log_probs, ref_log_probs, mask = make_responses()
    plain = kl_token_rewards(rewards, mask)
    for row, length in enumerate(LENGTHS):
        expected = [0.0] * (length - 1) + [rewards[row].item()] if length else []
        assert plain[row].tolist() == expected + [0.0] * (9 - length)
    penalized = kl_token_rewards(rewards, mask, log_probs, ref_log_probs, 0.3)
    torch.testing.assert_close((plain - penalized) / 0.3, (log_probs - ref_log_probs) * mask)
    # A policy likelier than its reference pays.
    costs = kl_token_rewards(rewards, mask, torch.zeros_like(log_probs), torch.full_like(log_probs, -2.0), 0.5) - plain
    assert costs[mask].eq(-1).all()


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_padding_reaches_no_token_reward(junk):
    rewards, log_probs, ref_log_probs, mask = make_responses()
    rewards[4] = junk  # of a response without a token
    clean = kl_token_rewards(rewards, mask, log_probs * mask, ref_log_probs * mask, 0.3)
    wide_mask = F.pad(mask, (2, 3), value=False)
    wide = [F.pad(each.masked_fill(~mask, junk), (2, 3), value=junk) for each in (log_probs, ref_log_probs)]
    found = kl_token_rewards(rewards, wide_mask, *wide, 0.3)
    assert torch.equal(found, F.pad(clean, (2, 3)))
    assert clean.isfinite().all()


def test_nothing_carries_gradient_and_half_precision_is_taken_to_float32():
    token_rewards, values, mask = make_batch()
    half = [each.bfloat16().requires_grad_() for each in (token_rewards, values)]
    exact = [each.detach().double() for each in half]
    settings = {"gamma": 0.99, "gae_lambda": 0.95}
    found = (*generalized_advantages(*half, mask, **settings), discounted_returns(half[0], mask))
    expected = (*generalized_advantages(*exact, mask, **settings), discounted_returns(exact[0], mask))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert not one.requires_grad
        torch.testing.assert_close(one, other.float())
    rewards = token_rewards[:, 0].bfloat16().requires_grad_()
    assert kl_token_rewards(rewards, mask).dtype == torch.float32
    assert not kl_token_rewards(rewards, mask, values.requires_grad_(), values, 0.1).requires_grad


def test_inputs_stay_as_they_were():
    token_rewards, values, mask = make_batch()
    copies = token_rewards.clone(), values.clone()
    generalized_advantages(token_rewards, values, mask, gamma=0.9, gae_lambda=0.7)
    discounted_returns(token_rewards, mask, gamma=0.9)
    assert torch.equal(token_rewards, copies[0])
    assert torch.equal(values, copies[1])


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (generalized_advantages, {"gamma": 0.0}, r"gamma .* must be in \(0, 1\], got 0.0"),
        (generalized_advantages, {"gae_lambda": 1.1}, r"gae_lambda must be in \[0, 1\], got 1.1"),
        (generalized_advantages, {"gae_lambda": math.nan}, r"gae_lambda must be in \[0, 1\], got nan"),
        (generalized_advantages, {"values": torch.zeros(6, 10)}, r"values must hold .* here \(6, 9\), got \(6, 10\)"),
        (generalized_advantages, {"token_rewards": torch.zeros(6)}, r"token_rewards must hold .* got \(6,\)"),
        (discounted_returns, {"gamma": 1.01}, r"gamma .* got 1.01"),
        (discounted_returns, {"token_rewards": torch.zeros(1, 9)}, r"token_rewards must hold .* got \(1, 9\)"),
        (kl_token_rewards, {"kl_coef": -1.0}, r"kl_coef .* at least 0, got -1.0"),
        (kl_token_rewards, {"kl_coef": 0.1}, r"kl_coef > 0 requires both .* got no log_probs and ref_log_probs; pass"),
        (kl_token_rewards, {"rewards": torch.zeros(6, 1)}, r"rewards must hold .* here \(6,\), got \(6, 1\)"),
        (kl_token_rewards, {"log_probs": torch.zeros(6, 1)}, r"log_probs must hold .* here \(6, 9\), got \(6, 1\)"),
    ],
)
def test_bad_arguments_are_refused_by_name(function, arguments, message):
    token_rewards, values, mask = make_batch()
    valid = {
        generalized_advantages: {"token_rewards": token_rewards, "values": values, "gamma": 1.0, "gae_lambda": 0.95},
        discounted_returns: {"token_rewards": token_rewards},
        kl_token_rewards: {"rewards": token_rewards[:, 0]},
    }[function] | {"response_mask": mask}
    function(**valid)
    with pytest.raises(ValueError, match=message):
        function(**(valid | arguments))


@pytest.mark.parametrize("start", [1e-4, 0.05, 30.0])
def test_the_adapted_weight_brings_the_kl_to_its_target(start):
    """A policy whose KL falls as the weight grows: kl = 2 / (1 + 10 * kl_coef), at 0.5 for a weight of 0.3."""
    kl_coef = start
    for _ in range(2000):
        kl_coef = adapted_kl_coef(kl_coef, 2 / (1 + 10 * kl_coef), 0.5, horizon=1000, num_samples=64)
    assert kl_coef == pytest.approx(0.3, rel=1e-3)


def test_the_weight_moves_with_the_sign_of_the_error_and_by_at_most_a_fifth():
    def factor(observed, num_samples=100):
        return adapted_kl_coef(0.1, observed, 6.0, horizon=1000, num_samples=num_samples) / 0.1

    assert factor(6.0) == 1
    assert factor(6.6) == pytest.approx(1.01)  # 10 % too much, a tenth of the horizon
    assert factor(5.4) == pytest.approx(0.99)
    assert factor(7.2) == pytest.approx(factor(1e9))
    assert factor(math.inf) == pytest.approx(1.02)
    assert factor(4.8) == pytest.approx(factor(-3.0))
    assert factor(-math.inf, num_samples=1000) == pytest.approx(0.8)
    assert factor(math.nan) == 1
    assert factor(60.0, num_samples=0) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_kl": 0.0}, "target_kl .* must be above 0, got 0.0"),
        ({"horizon": 63}, "horizon must be at least num_samples, .* got 63 and 64"),
        ({"num_samples": -1}, "horizon must be at least num_samples, .* got 1000 and -1"),
        ({"horizon": 0, "num_samples": 0}, "horizon must be at least num_samples, .* got 0 and 0"),
    ],
)
def test_a_controller_that_would_swing_is_refused(arguments, message):
    valid = {"kl_coef": 0.1, "observed_kl": 1.0, "target_kl": 6.0, "horizon": 1000, "num_samples": 64}
    with pytest.raises(ValueError, match=message):
        adapted_kl_coef(**(valid | arguments))
