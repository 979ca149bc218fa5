import math

import pytest
import torch

from remax_lightning.functional import (
    baseline_advantages,
    leave_one_out,
    leave_one_out_baselines,
    masked_moments,
    normalized,
    remax_advantages,
)


def bandit_variances(probs, best, other, baselines):
    """Exact variance of the policy gradient wrt the logit of the best arm, over both arms, (N,)."""
    mask = torch.ones(len(probs), 1, dtype=torch.bool)
    scores = torch.stack([1 - probs, -probs])  # d log pi / d logit
    gradients = scores * torch.stack([remax_advantages(r, baselines, mask).squeeze(-1) for r in (best, other)])
    weights = torch.stack([probs, 1 - probs])
    return (weights * gradients**2).sum(0) - (weights * gradients).sum(0) ** 2


def test_the_greedy_baseline_lowers_a_bandits_variance_exactly_below_the_papers_threshold():
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(3, 20_000, dtype=torch.float64, generator=generator)
    probs, (other, best) = draws[0], draws[1:].sort(dim=0).values  # best > other > 0
    threshold = 0.5 + 0.5 * other / (best - other)
    clear = ((probs - threshold).abs() > 1e-3) & ((probs - 0.5).abs() > 1e-3) & (probs > 1e-3) & (probs < 1 - 1e-3)
    probs, best, other, threshold = (x[clear] for x in (probs, best, other, threshold))
    greedy = torch.where(probs > 0.5, best, other)
    lower = bandit_variances(probs, best, other, greedy) < bandit_variances(probs, best, other, torch.zeros_like(best))
    assert torch.equal(lower, probs < threshold)
    assert 0.05 < lower.double().mean() < 0.95


def make_batch(seed=0, batch=5, length=6):
    generator = torch.Generator().manual_seed(seed)
    rewards, baselines = torch.randn(2, batch, dtype=torch.float64, generator=generator)
    log_probs, ref_log_probs = -torch.rand(2, batch, length, dtype=torch.float64, generator=generator)
    mask = torch.arange(length) < torch.tensor([6, 1, 3, 4, 0])[:, None]
    return rewards, baselines, mask, {"log_probs": log_probs, "ref_log_probs": ref_log_probs, "kl_coef": 0.1}


@pytest.mark.parametrize("kl_form", ["full_step", "one_step"])
def test_whatever_padding_holds_its_advantage_is_zero_and_no_other_changes(kl_form):
    rewards, baselines, mask, kl = make_batch()
    clean = remax_advantages(rewards, baselines, mask, kl_form=kl_form, gamma=0.9, **kl)
    for junk in (math.nan, math.inf, -math.inf):
        dirty = kl | {name: kl[name].masked_fill(~mask, junk) for name in ("log_probs", "ref_log_probs")}
        assert torch.equal(remax_advantages(rewards, baselines, mask, kl_form=kl_form, gamma=0.9, **dirty), clean)
    assert clean[~mask].eq(0).all()
    assert clean[mask].ne(0).all()


def test_a_row_without_a_response_gives_zeros_even_for_a_nan_reward():
    rewards, baselines, mask, kl = make_batch()
    rewards[4] = math.nan
    assert remax_advantages(rewards, baselines, mask, **kl)[4].eq(0).all()


@pytest.mark.parametrize("kl_form", ["full_step", "one_step"])
def test_extra_padded_columns_change_nothing(kl_form):
    rewards, baselines, mask, kl = make_batch()
    padded = kl | {n: torch.nn.functional.pad(kl[n], (2, 3), value=math.nan) for n in ("log_probs", "ref_log_probs")}
    wide_mask = torch.nn.functional.pad(mask, (2, 3), value=False)
    wide = remax_advantages(rewards, baselines, wide_mask, kl_form=kl_form, gamma=0.9, **padded)
    narrow = remax_advantages(rewards, baselines, mask, kl_form=kl_form, gamma=0.9, **kl)
    torch.testing.assert_close(wide[:, 2:-3], narrow, rtol=0, atol=1e-15)
    assert wide[:, [0, 1, -3, -2, -1]].eq(0).all()


def test_without_discount_and_penalty_every_token_has_the_reward_difference():
    rewards, baselines, mask, _ = make_batch()
    advantages = remax_advantages(rewards, baselines, mask)
    assert torch.equal(advantages, (rewards - baselines)[:, None] * mask)


def test_the_discount_grows_from_the_last_token_backwards():
    rewards, baselines, mask, _ = make_batch()
    advantages = remax_advantages(rewards, baselines, mask, gamma=0.5)
    both = mask[:, :-1] & mask[:, 1:]
    torch.testing.assert_close(advantages[:, :-1][both], 0.5 * advantages[:, 1:][both])
    torch.testing.assert_close(advantages[2, 2], 0.5 * (rewards - baselines)[2])


def test_the_kl_forms_differ_by_the_penalties_of_the_tokens_to_come():
    rewards, baselines, mask, kl = make_batch()
    one, full = (remax_advantages(rewards, baselines, mask, kl_form=form, **kl) for form in ("one_step", "full_step"))
    penalties = one - remax_advantages(rewards, baselines, mask)
    torch.testing.assert_close(full - one, penalties.sum(-1, keepdim=True) * mask - penalties.cumsum(-1) * mask)
    assert torch.equal(one[1], full[1])  # a response of one token has none to come


@pytest.mark.parametrize("kl_form", ["full_step", "one_step"])
def test_a_policy_likelier_than_its_reference_is_penalized(kl_form):
    rewards, _, mask, _ = make_batch()
    zeros = torch.zeros(mask.shape, dtype=torch.float64)
    kl = {"log_probs": zeros, "ref_log_probs": zeros - 1, "kl_coef": 0.1, "kl_form": kl_form}
    assert (remax_advantages(rewards, rewards, mask, **kl)[mask] < 0).all()


def test_the_clip_bounds_the_difference_and_not_the_penalty():
    rewards, baselines, mask, kl = make_batch()
    clipped = remax_advantages(100 * rewards, baselines, mask, reward_clip=1.0)
    assert torch.equal(clipped, torch.sign(100 * rewards - baselines)[:, None] * mask)
    loose = remax_advantages(rewards, baselines, mask, reward_clip=100.0, **kl)
    assert torch.equal(loose, remax_advantages(rewards, baselines, mask, **kl))
    shifted = remax_advantages(rewards + 1e4, baselines + 1e4, mask, reward_clip=100.0, **kl)
    torch.testing.assert_close(shifted, loose, rtol=0, atol=1e-10)
    kl["log_probs"] = kl["log_probs"] + 1e3
    assert remax_advantages(rewards, baselines, mask, reward_clip=1.0, **kl)[mask].max() < -50


def test_advantages_carry_no_gradient_and_half_precision_rewards_are_taken_to_float32():
    rewards, baselines, mask, kl = make_batch()
    kl["log_probs"].requires_grad_()
    assert not remax_advantages(rewards.requires_grad_(), baselines, mask, **kl).requires_grad
    half = remax_advantages(rewards.bfloat16(), baselines.bfloat16(), mask, gamma=0.99)
    assert half.dtype == torch.float32
    exact = remax_advantages(rewards.bfloat16().double(), baselines.bfloat16().double(), mask, gamma=0.99)
    torch.testing.assert_close(half, exact.float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kl_form": "two_step"}, r"kl_form must be one of full_step, one_step, got 'two_step'; use full_step"),
        ({"kl_coef": -0.1}, r"kl_coef .* must be at least 0, got -0.1; use 0 for no penalty"),
        ({"kl_coef": math.nan}, r"kl_coef .* must be at least 0, got nan"),
        ({"kl_coef": 0.1, "log_probs": None}, r"kl_coef > 0 requires both .*, got no log_probs; pass"),
        ({"kl_coef": 0.1, "ref_log_probs": None}, r"kl_coef > 0 requires both .*, got no ref_log_probs; pass"),
        (
            {"kl_coef": 0.1, "log_probs": None, "ref_log_probs": None},
            r"got no log_probs and ref_log_probs; pass them or set kl_coef=0",
        ),
        ({"gamma": 0.0}, r"gamma .* must be in \(0, 1\], got 0.0; use 1.0 for no discount"),
        ({"gamma": 1.5}, r"gamma .* must be in \(0, 1\], got 1.5"),
        ({"reward_clip": 0.0}, r"reward_clip .* must be above 0, got 0.0; use None for no bound"),
        ({"reward_clip": -5.0}, r"reward_clip .* must be above 0, got -5.0"),
        (
            {"rewards": torch.zeros(5, 1)},
            r"rewards must hold one value per response, \(B,\), here \(5,\), got \(5, 1\)",
        ),
        ({"baselines": torch.zeros(4)}, r"baselines must hold .* here \(5,\), got \(4,\); slice or reshape"),
        ({"log_probs": torch.zeros(5, 7)}, r"log_probs must hold .* \(B, T\), here \(5, 6\), got \(5, 7\)"),
        ({"ref_log_probs": torch.zeros(6)}, r"ref_log_probs must hold .* here \(5, 6\), got \(6,\)"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    rewards, baselines, mask, kl = make_batch()
    valid = {"rewards": rewards, "baselines": baselines, "response_mask": mask, **kl}
    remax_advantages(**valid)
    with pytest.raises(ValueError, match=message):
        remax_advantages(**(valid | arguments))


def test_remax_is_the_baseline_form_under_its_own_name():
    assert remax_advantages is baseline_advantages


@pytest.mark.parametrize("num_samples", [2, 3, 8])
def test_leave_one_out_sums_to_zero_over_each_prompt_and_stretches_the_deviation_from_its_mean(num_samples):
    rewards = torch.randn(5 * num_samples, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    advantages = leave_one_out(rewards, num_samples).view(5, num_samples)
    torch.testing.assert_close(advantages.sum(-1), torch.zeros(5, dtype=torch.float64))
    by_prompt = rewards.view(5, num_samples)
    deviations = by_prompt - by_prompt.mean(-1, keepdim=True)
    torch.testing.assert_close(advantages, deviations * num_samples / (num_samples - 1))
    torch.testing.assert_close(rewards - leave_one_out_baselines(rewards, num_samples), advantages.flatten())


def test_the_baseline_of_a_response_looks_neither_at_its_own_reward_nor_at_other_prompts():
    rewards = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    baselines = leave_one_out_baselines(rewards, 4)
    for index, other in enumerate(torch.eye(12, dtype=torch.bool)):
        changed = leave_one_out_baselines(rewards.masked_fill(other, 99.0), 4) != baselines
        prompt = torch.arange(12) // 4 == index // 4
        assert torch.equal(changed, prompt & ~other)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_counts_for_no_other_response(junk):
    rewards = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = leave_one_out(rewards, 4)
    rewards[5] = junk  # one of the second prompt
    rewards[[8, 9, 11]] = junk  # the third prompt has one left
    rewards[12:] = junk  # the fourth none
    advantages = leave_one_out(rewards, 4)
    assert torch.equal(advantages[:4], expected[:4])
    assert advantages.isnan().nonzero().flatten().tolist() == [5, *range(8, 16)]
    left = rewards[[4, 6, 7]]
    assert torch.equal(advantages[[4, 6, 7]], leave_one_out(left, 3))
    baselines = leave_one_out_baselines(rewards, 4)
    torch.testing.assert_close(baselines[5], left.mean())
    assert baselines.isnan().nonzero().flatten().tolist() == [10, *range(12, 16)]


def test_small_rewards_survive_beside_a_large_one_and_large_rewards_lose_nothing_but_their_digits():
    assert leave_one_out_baselines(torch.tensor([1e30, 1.0, 2.0, 6.0]), 4)[0] == 3
    rewards = torch.tensor([1.0, 2.0, 6.0]) + 2**20
    assert leave_one_out(rewards, 3).tolist() == [-3.0, -1.5, 4.5]
    assert leave_one_out(rewards.bfloat16(), 3).dtype == torch.float32
    assert not leave_one_out(rewards.requires_grad_(), 3).requires_grad
    assert leave_one_out(torch.zeros(0), 3).shape == (0,)


@pytest.mark.parametrize("function", [leave_one_out, leave_one_out_baselines])
def test_leave_one_out_without_another_response_is_refused(function):
    with pytest.raises(ValueError, match=r"^num_samples must be at least 2 for a leave-one-out baseline, got 1$"):
        function(torch.zeros(4), 1)
    with pytest.raises(ValueError, match="num_samples = 3 adjacent rewards for each prompt, got 4 in all"):
        function(torch.zeros(4), 3)
    with pytest.raises(ValueError, match=r"rewards must hold one value per response, .* got \(2, 2\)"):
        function(torch.zeros(2, 2), 2)


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    values = 3 * torch.randn(5, 6, dtype=torch.float64, generator=generator) + 7
    return values, torch.arange(6) < torch.tensor([6, 1, 3, 4, 0])[:, None]


def test_normalized_values_have_mean_zero_and_deviation_one_and_keep_their_order(scores):
    values, mask = scores
    found = normalized(values, mask, masked_moments(values, mask))
    assert found[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert found[mask].std(correction=0).item() == pytest.approx(1, abs=1e-8)
    assert torch.equal(found[mask].argsort(), values[mask].argsort())
    assert found[~mask].eq(0).all()
    moved = 0.5 * values - 100  # the same up to the unit and the origin
    torch.testing.assert_close(normalized(moved, mask, masked_moments(moved, mask)), found, rtol=1e-7, atol=1e-7)


def test_moments_of_parts_add_up_whatever_padding_holds(scores):
    values, mask = scores
    whole = masked_moments(values, mask)
    assert whole[0] == 14
    for junk in (math.nan, math.inf):
        dirty = values.masked_fill(~mask, junk)
        parts = [masked_moments(dirty[rows], mask[rows]) for rows in torch.arange(5).split([2, 1, 2])]
        torch.testing.assert_close(sum(parts), whole)
        by_part = [normalized(dirty[rows], mask[rows], sum(parts)) for rows in torch.arange(5).split([2, 1, 2])]
        torch.testing.assert_close(torch.cat(by_part), normalized(values, mask, whole))
    # Each part by its own moments is not the same: that is what adding them up is for.
    assert not torch.allclose(normalized(values[:2], mask[:2], parts[0]), by_part[0], atol=0.01)


def test_values_that_are_equal_few_or_far_from_zero(scores):
    values, mask = scores
    for constant in (0.0, 0.1, -1e4, *torch.linspace(1e6, 2e6, 20).tolist()):
        equal = torch.full((5, 6), constant, dtype=torch.float64) / 3
        assert normalized(equal, mask, masked_moments(equal, mask)).abs().max() < 1e-3
    nothing = torch.zeros_like(mask)
    assert normalized(values, nothing, masked_moments(values, nothing)).eq(0).all()
    one = torch.zeros_like(mask)
    one[2, 1] = True
    assert normalized(values, one, masked_moments(values, one)).abs().max() < 1e-3
    far = (values * 2**10).round() / 2**10 + 2**12  # the variance is a millionth of the squared mean; exact in float32
    near = normalized(far, mask, masked_moments(far, mask))
    single = normalized(far.float(), mask, masked_moments(far.float(), mask))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, near.float(), rtol=1e-6, atol=1e-6)


def test_moments_and_masks_of_other_shapes_are_refused(scores):
    values, mask = scores
    with pytest.raises(ValueError, match=r"mask must hold .* here \(5, 6\), got \(6,\)"):
        masked_moments(values, mask[0])
    with pytest.raises(ValueError, match=r"mask must hold .* here \(5, 6\), got \(6,\)"):
        normalized(values, mask[0], masked_moments(values, mask))
    with pytest.raises(ValueError, match=r"moments must hold count, sum and sum of squares, here \(3,\), got \(2,\)"):
        normalized(values, mask, torch.zeros(2))
