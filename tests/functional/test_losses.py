import math

import pytest
import torch
from torch.nn import functional as F

from remax_lightning.functional import (
    bradley_terry_loss,
    clipped_policy_loss,
    kl_penalty_loss,
    policy_gradient_loss,
    token_log_probs,
    value_loss,
)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 7, dtype=torch.float64, generator=generator)
    tokens = torch.randint(0, 7, (6, 5), generator=generator)
    advantages = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 0, 4, 2])[:, None]
    return logits, tokens, advantages, mask


def test_with_every_advantage_one_it_is_cross_entropy_with_ignored_labels(batch):
    logits, tokens, _, mask = batch
    labels = tokens.masked_fill(~mask, -100)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    log_probs = token_log_probs(logits, tokens)
    torch.testing.assert_close(policy_gradient_loss(log_probs, torch.ones_like(log_probs), mask), expected)


def test_the_gradient_is_minus_the_advantage_over_the_token_count(batch):
    logits, tokens, advantages, mask = batch
    log_probs = token_log_probs(logits, tokens).requires_grad_()
    advantages.requires_grad_()
    policy_gradient_loss(log_probs, advantages, mask).backward()
    assert advantages.grad is None
    torch.testing.assert_close(log_probs.grad * -15, advantages.detach() * mask)  # 15 tokens in the mask


@pytest.mark.parametrize("sizes", [[6], [2, 4], [1, 1, 1, 1, 1, 1]])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_with_the_global_token_count_add_up_to_the_batch(batch, sizes, as_tensor):
    logits, tokens, advantages, mask = batch
    num_tokens = mask.sum() if as_tensor else float(mask.sum())
    logits.requires_grad_()
    whole = policy_gradient_loss(token_log_probs(logits, tokens), advantages, mask)
    (expected,) = torch.autograd.grad(whole, logits)
    total = torch.zeros(())
    for rows in torch.arange(6).split(sizes):
        log_probs = token_log_probs(logits[rows], tokens[rows])
        loss = policy_gradient_loss(log_probs, advantages[rows], mask[rows], num_tokens=num_tokens)
        loss.backward()
        total = total + loss.detach()
    torch.testing.assert_close(total, whole.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_padding_reaches_neither_the_loss_nor_its_gradient(batch, junk):
    logits, tokens, advantages, mask = batch
    log_probs = token_log_probs(logits, tokens)
    losses, gradients = [], []
    for filler in (0.0, junk):
        wide_mask = F.pad(mask, (1, 2), value=False)
        wide = F.pad(log_probs.masked_fill(~mask, filler), (1, 2), value=filler).requires_grad_()
        weights = F.pad(advantages.masked_fill(~mask, filler), (1, 2), value=filler)
        loss = policy_gradient_loss(wide, weights, wide_mask)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(wide.grad)
    assert torch.equal(*losses)
    assert torch.equal(*gradients)
    torch.testing.assert_close(losses[1], policy_gradient_loss(log_probs, advantages, mask))


def test_an_empty_mask_gives_zero_loss_and_zero_gradient(batch):
    logits, tokens, advantages, mask = batch
    logits.requires_grad_()
    loss = policy_gradient_loss(token_log_probs(logits, tokens), advantages, torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.eq(0).all()


def test_bradley_terry_gradient_is_the_probability_of_the_wrong_order():
    gaps = torch.linspace(-30, 30, 61, dtype=torch.float64)
    chosen, rejected = gaps.clone().requires_grad_(), torch.zeros_like(gaps).requires_grad_()
    bradley_terry_loss(chosen, rejected).backward()
    wrong = 1 - torch.sigmoid(gaps)
    torch.testing.assert_close(chosen.grad * 61, -wrong)
    torch.testing.assert_close(rejected.grad * 61, wrong)


def test_bradley_terry_depends_on_the_difference_only_and_is_log_2_at_equality():
    chosen, rejected = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = bradley_terry_loss(chosen, rejected)
    torch.testing.assert_close(bradley_terry_loss(chosen + 37.5, rejected + 37.5), loss)
    assert bradley_terry_loss(chosen, chosen).item() == pytest.approx(math.log(2), abs=1e-15)
    # Swapping the two changes the loss by the mean difference: log sigmoid(d) - log sigmoid(-d) = d.
    torch.testing.assert_close(bradley_terry_loss(rejected, chosen) - loss, (chosen - rejected).mean())


def test_a_very_wrong_order_costs_its_gap_and_does_not_overflow():
    assert bradley_terry_loss(torch.tensor([-1e4]), torch.tensor([0.0])).item() == 1e4


def test_shapes_that_would_broadcast_are_refused(batch):
    logits, tokens, advantages, mask = batch
    log_probs = token_log_probs(logits, tokens)
    with pytest.raises(ValueError, match=r"advantages must hold .*\(6, 5\), got \(6, 1\); slice or reshape"):
        policy_gradient_loss(log_probs, advantages[:, :1], mask)
    with pytest.raises(ValueError, match=r"response_mask must hold .*\(6, 5\), got \(5,\)"):
        policy_gradient_loss(log_probs, advantages, mask[0])
    with pytest.raises(ValueError, match=r"rejected_scores must hold .*\(3,\), got \(3, 1\)"):
        bradley_terry_loss(torch.zeros(3), torch.zeros(3, 1))


def gradient(scalar, tensor):
    return torch.autograd.grad(scalar, tensor, retain_graph=True)[0]


@pytest.mark.parametrize("clip_range", [1e-9, 0.2, 5.0])
def test_at_ratio_one_the_clipped_loss_has_the_policy_gradient(batch, clip_range):
    logits, tokens, advantages, mask = batch
    log_probs = token_log_probs(logits.requires_grad_(), tokens)
    loss, clipped = clipped_policy_loss(log_probs, log_probs, advantages, mask, clip_range=clip_range)
    assert not clipped.any()
    torch.testing.assert_close(loss, -advantages[mask].mean())
    expected = gradient(policy_gradient_loss(log_probs, advantages, mask), logits)
    torch.testing.assert_close(gradient(loss, logits), expected, rtol=1e-13, atol=1e-16)


def test_beyond_the_clip_only_tokens_that_are_pushed_back_have_a_gradient():
    """Advantage up: nothing to gain above 1.2. Advantage down: nothing below 0.8."""
    ratios = torch.tensor([1e-30, 0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0, 1e30], dtype=torch.float64)
    mask = torch.ones(1, 9, dtype=torch.bool)
    old = torch.full((1, 9), -2.0, dtype=torch.float64)
    for advantage, outward in ((2.0, ratios > 1.2), (-2.0, ratios < 0.8), (0.0, ratios < 0)):
        log_probs = (old + ratios.log()).requires_grad_()
        advantages = torch.full_like(old, advantage)
        loss, clipped = clipped_policy_loss(log_probs, old, advantages, mask, clip_range=0.2, num_tokens=1)
        slopes = gradient(loss, log_probs)
        assert torch.equal(clipped, outward[None])
        assert slopes[clipped].eq(0).all()
        torch.testing.assert_close(slopes[~clipped], -advantage * ratios[~outward])


def test_the_clipped_loss_never_promises_more_than_the_ratio_and_is_continuous(batch):
    """A bound from above on the loss without a clip, the same inside it, and the integral of its own gradient."""
    _, _, advantages, mask = batch
    generator = torch.Generator().manual_seed(1)
    old, change = torch.randn(2, 6, 5, dtype=torch.float64, generator=generator)
    plain = -(advantages * change.exp())
    found = torch.zeros_like(plain)
    clipped = torch.zeros_like(mask)
    for cell in mask.nonzero():
        one = torch.zeros_like(mask)
        one[tuple(cell)] = True
        loss, is_clipped = clipped_policy_loss(old + change, old, advantages, one, clip_range=0.2)
        found[tuple(cell)] = loss
        clipped |= is_clipped
    assert 3 < clipped.sum() < mask.sum()  # the cases are there
    assert (found >= plain - 1e-12)[mask].all()
    torch.testing.assert_close(found[mask & ~clipped], plain[mask & ~clipped])
    assert (found > plain)[clipped].all()

    def loss_along(path):  # from ratio 1 to the changed one
        points = old.expand(len(path), 6, 5) + path[:, None, None] * change
        return torch.stack([clipped_policy_loss(p, old, advantages, mask, clip_range=0.2)[0] for p in points])

    path = torch.linspace(0, 1, 2001, dtype=torch.float64, requires_grad=True)
    losses = loss_along(path)
    slopes = gradient(losses.sum(), path)
    torch.testing.assert_close(torch.trapezoid(slopes, path), losses[-1] - losses[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("log_ratio", [800.0, math.inf])
def test_a_ratio_that_overflows_gives_no_nan_where_it_does_not_count(log_ratio):
    log_probs = torch.tensor([log_ratio, log_ratio, -log_ratio, 0.0]).requires_grad_()
    advantages = torch.tensor([1.0, 0.0, -1.0, 1.0])
    mask = torch.ones(4, dtype=torch.bool)
    loss, clipped = clipped_policy_loss(log_probs, torch.zeros(4), advantages, mask, clip_range=0.2)
    assert loss.item() == pytest.approx(-(1.2 - 0.8 + 1) / 4)
    assert clipped.tolist() == [True, False, True, False]
    assert gradient(loss, log_probs).tolist() == [0, 0, 0, -0.25]


def clipped_loss(log_probs, others, mask, **settings):
    return clipped_policy_loss(log_probs, others[0], others[1], mask, clip_range=0.2, **settings)[0]


def clipped_value_loss(values, others, mask, **settings):
    return value_loss(values, others[0], others[1], mask, clip_range=0.2, **settings)


def plain_value_loss(values, others, mask, **settings):
    return value_loss(values, others[0], others[1], mask, **settings)


def kl_loss_k1(log_probs, others, mask, **settings):
    return kl_penalty_loss(log_probs, others[0], mask, estimator="k1", **settings)


def kl_loss_k2(log_probs, others, mask, **settings):
    return kl_penalty_loss(log_probs, others[0], mask, estimator="k2", **settings)


def kl_loss_k3(log_probs, others, mask, **settings):
    return kl_penalty_loss(log_probs, others[0], mask, estimator="k3", **settings)


@pytest.fixture(params=[clipped_loss, clipped_value_loss, plain_value_loss, kl_loss_k1, kl_loss_k2, kl_loss_k3])
def masked_loss(request):
    return request.param


@pytest.fixture
def terms(batch):
    generator = torch.Generator().manual_seed(3)
    first, second, third = torch.randn(3, 6, 5, dtype=torch.float64, generator=generator)
    return first.requires_grad_(), [second, third], batch[-1]


def test_derivatives_agree_with_finite_differences(masked_loss, terms):
    first, others, mask = terms
    assert torch.autograd.gradcheck(lambda x: masked_loss(x, others, mask), first)


def test_only_the_first_argument_has_a_gradient(masked_loss, terms):
    first, others, mask = terms
    for other in others:
        other.requires_grad_()
    masked_loss(first, others, mask).backward()
    assert all(other.grad is None for other in others)
    assert first.grad[mask].ne(0).any()


def test_parts_with_the_global_count_and_the_flat_layout_add_up_to_the_batch(masked_loss, terms):
    first, others, mask = terms
    whole = masked_loss(first, others, mask)
    expected = gradient(whole, first)
    assert whole.item() == pytest.approx(masked_loss(first, others, mask, num_tokens=1).item() / 15)
    for num_tokens in (mask.sum(), 15.0):
        parts = [
            masked_loss(first[rows], [o[rows] for o in others], mask[rows], num_tokens=num_tokens)
            for rows in torch.arange(6).split([2, 1, 3])
        ]
        torch.testing.assert_close(sum(parts), whole)
        torch.testing.assert_close(gradient(sum(parts), first), expected)
    flat = masked_loss(first[mask], [o[mask] for o in others], torch.ones(15, dtype=torch.bool))
    torch.testing.assert_close(flat, whole)
    torch.testing.assert_close(gradient(flat, first), expected)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e4])
def test_no_loss_or_gradient_comes_from_padding(masked_loss, terms, junk):
    first, others, mask = terms
    results = []
    for fillers in ((0.0, 0.0, 0.0), (junk, 0.0, 1.0), (0.0, junk, -1.0), (0.0, 0.0, junk), (junk, junk, junk)):
        wide = [
            F.pad(each.detach().masked_fill(~mask, filler), (1, 2), value=filler)
            for each, filler in zip([first, *others], fillers, strict=True)
        ]
        wide[0].requires_grad_()
        loss = masked_loss(wide[0], wide[1:], F.pad(mask, (1, 2), value=False))
        results.append((loss.detach(), gradient(loss, wide[0])))
    for loss, slopes in results:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(slopes, results[0][1])
    torch.testing.assert_close(results[-1][0], masked_loss(first, others, mask).detach())
    torch.testing.assert_close(results[-1][1][:, 1:-2], gradient(masked_loss(first, others, mask), first))
    _, clipped = clipped_policy_loss(wide[0], wide[1], wide[2], F.pad(mask, (1, 2), value=False), clip_range=0.2)
    assert not clipped[~F.pad(mask, (1, 2), value=False)].any()


def test_a_loss_over_no_token_is_zero_and_so_is_its_gradient(masked_loss, terms):
    first, others, mask = terms
    loss = masked_loss(first, others, torch.zeros_like(mask))
    assert loss.item() == 0
    assert gradient(loss, first).eq(0).all()


def test_the_values_are_pulled_to_their_returns(batch):
    *_, mask = batch
    generator = torch.Generator().manual_seed(1)
    values, returns = torch.randn(2, 6, 5, dtype=torch.float64, generator=generator)
    values.requires_grad_()
    loss = value_loss(values, values, returns, mask, num_tokens=1)
    # A full step along the gradient lands on the returns, at no loss: half the squared error has curvature one.
    landed = values - gradient(loss, values)
    torch.testing.assert_close(landed[mask], returns[mask])
    assert value_loss(landed, values, returns, mask).item() == pytest.approx(0, abs=1e-24)
    for clip_range in (None, 100.0):
        found = value_loss(values, torch.zeros_like(values), returns, mask, num_tokens=1, clip_range=clip_range)
        torch.testing.assert_close(found, loss)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_that_has_moved_far_to_its_return_rests_and_one_that_moved_away_comes_back(sign):
    """Old value 0, return 1, clip 0.2: what is kept near is at most 0.2, an error of 0.8. And mirrored."""
    values = torch.tensor([-3.0, -0.21, -0.1, 0.1, 0.19, 0.21, 0.9, 1.5, 1.79, 1.81, 4.0], dtype=torch.float64)
    moving = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1], dtype=torch.bool)
    values = (sign * values).requires_grad_()
    old, returns, mask = torch.zeros(11), torch.full((11,), float(sign)), torch.ones(11, dtype=torch.bool)
    loss = value_loss(values, old, returns, mask, clip_range=0.2, num_tokens=1)
    slopes = gradient(loss, values)
    torch.testing.assert_close(slopes, torch.where(moving, values.detach() - sign, 0.0))
    resting = value_loss(values[~moving], old[~moving], returns[~moving], mask[~moving], clip_range=0.2)
    assert resting.item() == pytest.approx(0.5 * 0.8**2)
    assert loss > value_loss(values, old, returns, mask, num_tokens=1)


def test_half_precision_values_are_taken_to_float32():
    values = torch.tensor([100.0], dtype=torch.bfloat16, requires_grad=True)  # the next one is 100.5
    settings = {"old_values": values - 1, "returns": torch.tensor([100.1]), "response_mask": torch.tensor([True])}
    assert value_loss(values, **settings, clip_range=0.3).item() == pytest.approx(0.8**2 / 2, rel=1e-4)
    loss = value_loss(values, **settings)
    assert loss.item() == pytest.approx(0.1**2 / 2, rel=1e-4)
    assert gradient(loss, values).dtype == torch.bfloat16


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_loss_is_zero_for_the_reference_itself_and_only_k1_can_be_negative(batch, estimator):
    logits, tokens, _, mask = batch
    log_probs = token_log_probs(logits, tokens)
    assert kl_penalty_loss(log_probs, log_probs, mask, estimator=estimator) == 0
    signs = {kl_penalty_loss(log_probs + d, log_probs, mask, estimator=estimator).sign().item() for d in (-1, 1)}
    assert signs == ({-1.0, 1.0} if estimator == "k1" else {1.0})


def test_losses_refuse_bad_arguments_by_name(batch):
    logits, tokens, advantages, mask = batch
    log_probs = token_log_probs(logits, tokens)
    for clip_range in (0.0, -0.2, math.nan):
        with pytest.raises(ValueError, match=r"clip_range bounds \|ratio - 1\| and must be above 0, got"):
            clipped_policy_loss(log_probs, log_probs, advantages, mask, clip_range=clip_range)
        with pytest.raises(ValueError, match=r"clip_range bounds \|values - old_values\| and must be above 0, got"):
            value_loss(log_probs, log_probs, log_probs, mask, clip_range=clip_range)
    with pytest.raises(ValueError, match=r"estimator must be one of k1, k2, k3, got 'k4'; use k2"):
        kl_penalty_loss(log_probs, log_probs, mask, estimator="k4")
    with pytest.raises(ValueError, match=r"old_log_probs must hold .*\(6, 5\), got \(6, 1\)"):
        clipped_policy_loss(log_probs, log_probs[:, :1], advantages, mask, clip_range=0.2)
    with pytest.raises(ValueError, match=r"advantages must hold .*\(6, 5\), got \(6,\)"):
        clipped_policy_loss(log_probs, log_probs, advantages[:, 0], mask, clip_range=0.2)
    with pytest.raises(ValueError, match=r"returns must hold one value per token of values.*\(6, 5\), got \(5,\)"):
        value_loss(log_probs, log_probs, log_probs[0], mask)
    with pytest.raises(ValueError, match=r"old_values must hold .*\(6, 5\), got \(5,\)"):
        value_loss(log_probs, log_probs[0], log_probs, mask)
    with pytest.raises(ValueError, match=r"ref_log_probs must hold .*\(6, 5\), got \(6, 1\)"):
        kl_penalty_loss(log_probs, log_probs[:, :1], mask, estimator="k2")
