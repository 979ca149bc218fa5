"""The estimates against the variance of the gradient itself, over every outcome of small bandits."""

from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from remax_lightning.functional import gradient_variance
from remax_lightning.functional.gradient_variance import (
    BASELINES,
    VarianceSums,
    count_sketch,
    gradient_variances,
    variance_sums,
)


class Bandit(NamedTuple):
    """A prompt: probabilities, scores and rewards of its arms."""

    probs: Tensor  # (arms,)
    scores: Tensor  # (arms, d)
    rewards: Tensor  # (arms,)


def bandit(p: float, best: float, other: float) -> Bandit:
    """Two arms with one logit between them."""
    return Bandit(torch.tensor([p, 1 - p]), torch.tensor([[1 - p], [-p]]), torch.tensor([best, other]))


def bandits(num_prompts: int, num_arms: int) -> list[Bandit]:
    """Prompts that share their parameters: logits are a matrix times the prompt's features."""
    generator = torch.Generator().manual_seed(num_prompts)
    found = []
    for _ in range(num_prompts):
        features, logits, rewards = (torch.randn(num_arms, generator=generator).double() for _ in range(3))
        probs = logits.softmax(0)
        scores = torch.einsum("ka,f->kaf", torch.eye(num_arms) - probs, features).flatten(1)
        found.append(Bandit(probs, scores, rewards + 1))
    return found


def baselines(prompts: list[Bandit], outcome: list[tuple[int, ...]]) -> list[list[float]]:
    """The four baselines of each response, one after the other."""
    rewards = [[float(b.rewards[arm]) for arm in arms] for b, arms in zip(prompts, outcome, strict=True)]
    found = []
    for x, each in enumerate(prompts):
        for i in range(len(rewards[x])):
            siblings = [r for j, r in enumerate(rewards[x]) if j != i]
            batch = siblings + [r for z, others in enumerate(rewards) if z != x for r in others]
            greedy = float(each.rewards[each.probs.argmax()])
            found.append([0.0, greedy, sum(siblings) / len(siblings), sum(batch) / len(batch)])
    return found


def enumerated(prompts: list[Bandit], sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Over all outcomes: the expected estimates, and the variances of the mean gradient times N."""
    prompt = torch.tensor([x for x, size in enumerate(sizes) for _ in range(size)])
    weights, estimates, gradients = [], [], []
    draws = [product(range(len(b.probs)), repeat=size) for b, size in zip(prompts, sizes, strict=True)]
    for outcome in product(*draws):
        pairs = [(b, arm) for b, arms in zip(prompts, outcome, strict=True) for arm in arms]
        scores = torch.stack([b.scores[arm] for b, arm in pairs]).double()
        rewards = torch.stack([b.rewards[arm] for b, arm in pairs]).double()
        advantages = rewards[:, None] - torch.tensor(baselines(prompts, list(outcome))).double()
        weights.append(torch.stack([b.probs[arm] for b, arm in pairs]).double().prod())
        estimates.append(gradient_variances(variance_sums(scores, advantages, prompt)))
        gradients.append(advantages.T @ scores / len(scores))  # (4, d)
    probs, means = torch.stack(weights), torch.stack(gradients)
    assert float(probs.sum()) == pytest.approx(1, abs=1e-6)
    expected = torch.einsum("o,obd->bd", probs, means)
    variances = torch.einsum("o,obd->b", probs, (means - expected).square()) * sum(sizes)
    return probs @ torch.stack(estimates), variances


@pytest.mark.parametrize(("num_arms", "sizes"), [(2, [2]), (3, [2, 2]), (2, [3, 3]), (2, [4, 2, 2]), (3, [5])], ids=str)
def test_the_estimates_are_the_variances_in_expectation(num_arms: int, sizes: list[int]) -> None:
    estimates, variances = enumerated(bandits(len(sizes), num_arms), sizes)
    torch.testing.assert_close(estimates, variances, rtol=1e-6, atol=1e-9)
    assert len(set(variances.tolist())) > 2


@pytest.mark.parametrize(("best", "other"), [(1.0, 0.4), (2.0, 0.1), (3.0, 2.0)])
def test_the_greedy_baseline_helps_below_the_threshold(best: float, other: float) -> None:
    threshold = 0.5 + 0.5 * other / (best - other)
    for p in (0.2, 0.45, 0.55, 0.7, 0.9, 0.97, threshold - 0.01, threshold + 0.01):
        if 0 < p < 1:
            estimates, variances = enumerated([bandit(p, best, other)], [2])
            torch.testing.assert_close(estimates, variances, rtol=1e-5, atol=1e-9)
            assert (estimates[1] < estimates[0]) == (p < threshold), p


def test_no_advantage_no_variance() -> None:
    rewards = torch.full((4,), 0.1)
    zeros = torch.zeros(4)
    advantages = torch.stack([rewards, zeros, zeros, zeros], dim=1)
    sums = variance_sums(torch.randn(4, 7), advantages, torch.tensor([3, 3, 1, 1]))
    variances = gradient_variances(sums)
    assert variances[0] > 0
    assert variances[1:].tolist() == [0, 0, 0]
    assert sums.num_helped == sums.num_prompts == 2


def test_prompts_that_the_greedy_baseline_helps() -> None:
    rewards, greedy = torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0, 1.0]), torch.tensor([2.0, 2.0, 5.0, 5.0, 2.0, 2.0])
    advantages = torch.stack([rewards, rewards - greedy, rewards, rewards], dim=1)
    sums = variance_sums(torch.ones(6, 2), advantages, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert (int(sums.num_helped), int(sums.num_prompts)) == (1, 3)  # worse for the second, no matter for the third


def test_sums_of_processes_add_up() -> None:
    scores, advantages = torch.randn(10, 5), torch.randn(10, len(BASELINES))
    prompt = torch.tensor([0, 0, 0, 1, 1, 7, 7, 4, 4, 4])
    whole = variance_sums(scores, advantages, prompt)
    parts = (variance_sums(scores[part], advantages[part], prompt[part]) for part in (slice(5), slice(5, 10)))
    for name, both, one in zip(VarianceSums._fields, zip(*parts, strict=True), whole, strict=True):
        torch.testing.assert_close(sum(both), one, msg=name)
    order = torch.randperm(10)
    shuffled = variance_sums(scores[order], advantages[order], prompt[order])
    torch.testing.assert_close(gradient_variances(shuffled), gradient_variances(whole))


def test_without_responses() -> None:
    nothing = variance_sums(torch.zeros(0, 3), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    assert gradient_variances(nothing).isnan().all()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 responses to each, got a prompt with 1"):
        variance_sums(torch.zeros(3, 2), torch.zeros(3, 4), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match=r"advantages must hold .* here \(3, 4\), got \(3, 2\)"):
        variance_sums(torch.zeros(3, 2), torch.zeros(3, 2), torch.tensor([0, 0, 0]))
    with pytest.raises(ValueError, match="prompt must hold one number per response"):
        variance_sums(torch.zeros(2, 2), torch.zeros(2, 4), torch.tensor([0, 0, 0]))
    with pytest.raises(ValueError, match=r"dimensions .* at least 1, got 0"):
        count_sketch([torch.zeros(2)], 0, seed=0)


@pytest.mark.parametrize("chunk", [2**20, 7])
def test_a_sketch_keeps_inner_products_on_average(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_variance, "_CHUNK", chunk)
    dimensions, num_seeds = 8, 2000
    first = [torch.randn(3, 5), torch.randn(4), torch.tensor(3.0)]
    second = [each + torch.randn_like(each) for each in first]
    a, b = (torch.cat([each.flatten() for each in parts]) for parts in (first, second))
    products = []
    for seed in range(num_seeds):
        x, y = (count_sketch(parts, dimensions, seed=seed) for parts in (first, second))
        products.append(torch.stack([x @ y, x @ x]))
    found, norms = torch.stack(products), torch.stack([a.norm() * b.norm(), a @ a])
    bound = (2 / dimensions) ** 0.5 * norms
    assert bool(((found.mean(0) - torch.stack([a @ b, a @ a])).abs() < 4 * bound / num_seeds**0.5).all())
    assert bool((found.std(0) < 1.1 * bound).all())
    assert bool((found.std(0) > 0.1 * bound).all())


def test_a_sketch_is_linear_and_a_function_of_its_seed() -> None:
    state = torch.get_rng_state()
    parts = [torch.arange(12.0).view(3, 4), torch.ones(5)]
    first, again, other = (count_sketch(parts, 6, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(count_sketch([2 * part for part in parts], 6, seed=3), 2 * first)
    assert count_sketch([part.bfloat16() for part in parts], 6, seed=3).dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)
