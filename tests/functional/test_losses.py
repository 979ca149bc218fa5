import math

import pytest
import torch
from torch.nn import functional as F

from remax_lightning.functional import bradley_terry_loss, policy_gradient_loss, token_log_probs


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
