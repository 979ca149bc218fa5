"""Every response of a small recurrent policy is enumerated, so expectations are sums and the laws hold to rounding."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from remax_lightning.functional import (
    baseline_advantages,
    clipped_policy_loss,
    discounted_returns,
    generalized_advantages,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_penalty_loss,
    kl_token_rewards,
    leave_one_out,
    leave_one_out_baselines,
    length_mask,
    policy_gradient_loss,
    remax_advantages,
    response_lengths,
    token_log_probs,
)

VOCABULARY, LENGTH, STOP = 4, 3, 3
EXACT = {"rtol": 1e-10, "atol": 1e-12}


class TinyPolicy(nn.Module):
    """GRU over one start symbol and the tokens so far."""

    def __init__(self, seed: int):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(VOCABULARY + 1, 4)
            self.rnn = nn.GRU(4, 4, batch_first=True)
            self.head = nn.Linear(4, VOCABULARY)
        for parameter in self.double().parameters():
            parameter.data *= 2  # far from uniform

    def forward(self, tokens: Tensor) -> Tensor:
        inputs = torch.cat([torch.full_like(tokens[:, :1], VOCABULARY), tokens[:, :-1]], 1)
        return self.head(self.rnn(self.embedding(inputs))[0])


class World:
    """All responses with their rewards, a policy and a reference."""

    def __init__(self):
        grid = torch.tensor(list(product(range(VOCABULARY), repeat=LENGTH)))
        lengths = response_lengths(grid, [STOP])
        self.tokens = grid.where(length_mask(lengths, LENGTH), 0).unique(dim=0)  # 0 is a real token and the padding
        # Zeros after a stop token are padding; without one the row has the full length.
        self.mask = length_mask(response_lengths(self.tokens, [STOP]), LENGTH)
        self.policy, self.reference = TinyPolicy(0), TinyPolicy(1)
        self.parameters = list(self.policy.parameters())
        generator = torch.Generator().manual_seed(2)
        self.rewards = torch.randn(len(self.tokens), dtype=torch.float64, generator=generator)
        self.log_probs = token_log_probs(self.policy(self.tokens), self.tokens)
        self.ref_log_probs = token_log_probs(self.reference(self.tokens), self.tokens).detach()

    def sequence_log_probs(self) -> tuple[Tensor, Tensor]:
        """By torch.distributions, apart from what is tested: log pi and log ref of each response, (N,)."""
        models = (self.policy, self.reference)
        by_token = [torch.distributions.Categorical(logits=m(self.tokens)).log_prob(self.tokens) for m in models]
        return (by_token[0] * self.mask).sum(-1), (by_token[1] * self.mask).sum(-1).detach()

    def gradient(self, scalar: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, self.parameters, retain_graph=True)])

    def exact_gradient(self, kl_coef: float) -> Tensor:
        log_pi, log_ref = self.sequence_log_probs()
        return self.gradient((log_pi.exp() * (self.rewards - kl_coef * (log_pi - log_ref))).sum())

    def expected_gradient(self, baselines: Tensor, kl_coef: float, kl_form: str = "full_step") -> Tensor:
        """Sum over responses of probability times the gradient that this response alone would give."""
        advantages = remax_advantages(
            self.rewards,
            baselines,
            self.mask,
            log_probs=self.log_probs,
            ref_log_probs=self.ref_log_probs,
            kl_coef=kl_coef,
            kl_form=kl_form,
        )
        probabilities = self.sequence_log_probs()[0].exp().detach()
        rows = zip(self.log_probs.split(1), advantages.split(1), self.mask.split(1), strict=True)
        losses = torch.stack([policy_gradient_loss(*row, num_tokens=1) for row in rows])
        return -self.gradient((probabilities * losses).sum())

    def greedy_reward(self) -> Tensor:
        candidates = range(len(self.tokens))
        for t in range(LENGTH):
            best = self.policy(self.tokens).argmax(-1)[:, t]
            candidates = [i for i in candidates if not self.mask[i, t] or self.tokens[i, t] == best[i]]
        assert len(candidates) == 1
        return self.rewards[candidates[0]]


@pytest.fixture(scope="module")
def world():
    return World()


def test_the_enumeration_is_complete_and_has_every_length(world):
    assert len(world.tokens) == 1 + 3 + 3 * 3 * 4
    assert world.mask.sum(-1).unique().tolist() == [1, 2, 3]
    assert world.sequence_log_probs()[0].exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("kl_coef", [0.0, 0.05, 1.0, 10.0])
@pytest.mark.parametrize("baseline", [0.0, -7.3, 0.41, 25.0, "greedy"])
def test_full_step_is_the_exact_gradient_of_reward_minus_kl_for_any_baseline(world, kl_coef, baseline):
    baselines = torch.zeros_like(world.rewards) + (world.greedy_reward() if baseline == "greedy" else baseline)
    exact = world.exact_gradient(kl_coef)
    assert exact.norm() > 0.1
    torch.testing.assert_close(world.expected_gradient(baselines, kl_coef), exact, **EXACT)


def test_a_baseline_that_looks_at_the_response_is_biased(world):
    assert not torch.allclose(world.expected_gradient(world.rewards / 2, 0.0), world.exact_gradient(0.0), rtol=0.01)


def test_one_step_is_that_gradient_only_without_a_penalty(world):
    baselines = torch.zeros_like(world.rewards)
    torch.testing.assert_close(world.expected_gradient(baselines, 0.0, "one_step"), world.exact_gradient(0.0), **EXACT)
    for kl_coef in (0.05, 1.0):
        exact = world.exact_gradient(kl_coef)
        error = world.expected_gradient(baselines, kl_coef, "one_step") - exact
        assert error.norm() > 0.01 * kl_coef * exact.norm()


def exact_kl(world) -> Tensor:
    log_pi, log_ref = world.sequence_log_probs()
    return (log_pi.exp() * (log_pi - log_ref)).sum()


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_k1_and_k3_summed_over_a_response_are_the_kl_in_expectation(world, estimator):
    sums = (estimator(world.log_probs, world.ref_log_probs) * world.mask).sum(-1)
    expected = (world.sequence_log_probs()[0].exp() * sums).sum()
    torch.testing.assert_close(expected, exact_kl(world), **EXACT)
    assert exact_kl(world) > 0.1


def test_the_expected_gradient_of_k2_of_the_response_is_that_of_the_kl(world):
    log_pi, log_ref = world.sequence_log_probs()
    expected = (log_pi.exp().detach() * kl_k2(log_pi, log_ref)).sum()
    torch.testing.assert_close(world.gradient(expected), world.gradient(exact_kl(world)), **EXACT)


def pairs_gradient(world, advantages_of_pairs) -> Tensor:
    """Expected gradient of two independent samples of the prompt, by enumerating all pairs; a pair's rows adjacent.

    Args:
        world: As above.
        advantages_of_pairs: Advantages, (2 * pairs, T), from the index of each row among all responses.
    """
    number = len(world.rewards)
    index = torch.cartesian_prod(torch.arange(number), torch.arange(number)).flatten()
    probabilities = world.sequence_log_probs()[0].exp().detach()[index].view(-1, 2).prod(-1)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    weights = probabilities.repeat_interleave(2)[:, None] / 2  # the loss is linear in them: the mean of a pair's rows
    advantages = weights * advantages_of_pairs(index)
    return -world.gradient(policy_gradient_loss(world.log_probs[index], advantages, world.mask[index], num_tokens=1))


@pytest.mark.parametrize("kl_coef", [0.0, 0.05, 1.0])
def test_leave_one_out_of_two_samples_is_the_exact_gradient_with_the_kl_in_the_tokens(world, kl_coef):
    def advantages(index):
        rewards = world.rewards[index]
        kl = {"log_probs": world.log_probs[index], "ref_log_probs": world.ref_log_probs[index], "kl_coef": kl_coef}
        return baseline_advantages(rewards, leave_one_out_baselines(rewards, 2), world.mask[index], **kl)

    torch.testing.assert_close(pairs_gradient(world, advantages), world.exact_gradient(kl_coef), **EXACT)


@pytest.mark.parametrize("kl_coef", [0.05, 1.0])
def test_leave_one_out_of_two_samples_is_the_exact_gradient_with_the_kl_in_the_rewards(world, kl_coef):
    token_rewards = kl_token_rewards(world.rewards, world.mask, world.log_probs, world.ref_log_probs, kl_coef)

    def advantages(index):
        return leave_one_out(token_rewards.sum(-1)[index], 2)[:, None].expand(-1, LENGTH)

    torch.testing.assert_close(pairs_gradient(world, advantages), world.exact_gradient(kl_coef), **EXACT)


def test_the_mean_of_both_samples_as_the_baseline_would_halve_the_gradient(world):
    def advantages(index):
        rewards = world.rewards[index].view(-1, 2)
        return (rewards - rewards.mean(-1, keepdim=True)).view(-1, 1).expand(-1, LENGTH)

    torch.testing.assert_close(pairs_gradient(world, advantages), world.exact_gradient(0.0) / 2, **EXACT)


def first_step_gradient(world, values: Tensor, kl_coef: float, gae_lambda: float) -> Tensor:
    """Expected gradient of PPO's first step after a rollout, where policy and old policy are the same."""
    token_rewards = kl_token_rewards(world.rewards, world.mask, world.log_probs, world.ref_log_probs, kl_coef)
    advantages, _ = generalized_advantages(token_rewards, values, world.mask, gamma=1.0, gae_lambda=gae_lambda)
    probabilities = world.sequence_log_probs()[0].exp().detach()[:, None]
    loss, clipped = clipped_policy_loss(
        world.log_probs, world.log_probs, probabilities * advantages, world.mask, clip_range=0.2, num_tokens=1
    )
    assert not clipped.any()
    return -world.gradient(loss)


def state_values(world, seed: int) -> Tensor:
    """A function of the tokens before each one, (N, T), right or not."""
    return TinyPolicy(seed)(world.tokens)[..., 0].detach() + 2


def right_values(world, kl_coef: float) -> Tensor:
    """Expected return of each token given those before it, by enumeration, (N, T)."""
    token_rewards = kl_token_rewards(world.rewards, world.mask, world.log_probs, world.ref_log_probs, kl_coef)
    returns = discounted_returns(token_rewards, world.mask)
    probabilities = world.sequence_log_probs()[0].exp().detach()
    values = torch.zeros_like(returns)
    for t in range(LENGTH):
        same_start = (world.tokens[:, None, :t] == world.tokens[None, :, :t]).all(-1)
        together = probabilities * (same_start & world.mask[:, t])
        values[:, t] = (together * returns[:, t]).sum(-1) / together.sum(-1)
    return values.masked_fill(~world.mask, torch.nan)


@pytest.mark.parametrize("kl_coef", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("seed", [3, 4])
def test_ppos_first_step_with_lambda_one_is_the_exact_gradient_for_any_values(world, kl_coef, seed):
    found = first_step_gradient(world, state_values(world, seed), kl_coef, 1.0)
    torch.testing.assert_close(found, world.exact_gradient(kl_coef), **EXACT)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95])
def test_a_smaller_lambda_is_the_exact_gradient_for_the_right_values_only(world, gae_lambda):
    exact = world.exact_gradient(0.3)
    found = first_step_gradient(world, right_values(world, 0.3), 0.3, gae_lambda)
    torch.testing.assert_close(found, exact, **EXACT)
    wrong = first_step_gradient(world, state_values(world, 3), 0.3, gae_lambda)
    assert (wrong - exact).norm() > 0.01 * exact.norm()


def test_values_that_look_at_the_token_are_biased(world):
    after = state_values(world, 3).roll(-1, dims=-1)  # one token too late
    exact = world.exact_gradient(0.3)
    assert (first_step_gradient(world, after, 0.3, 1.0) - exact).norm() > 0.01 * exact.norm()


def kl_loss_gradient(world, estimator: str) -> Tensor:
    """Expected gradient of the KL penalty in the loss, summed over the tokens of a response."""
    rows = zip(world.log_probs.split(1), world.ref_log_probs.split(1), world.mask.split(1), strict=True)
    losses = torch.stack([kl_penalty_loss(*row, estimator=estimator, num_tokens=1) for row in rows])
    return world.gradient((world.sequence_log_probs()[0].exp().detach() * losses).sum())


def token_kl_gradient(world, *, reversed_: bool) -> Tensor:
    """Gradient of the KL between the distributions of each token, expected over the tokens before it, held fixed."""
    pair = [torch.distributions.Categorical(logits=m(world.tokens)) for m in (world.policy, world.reference)]
    by_token = torch.distributions.kl_divergence(*(pair[::-1] if reversed_ else pair)) * world.mask
    return world.gradient((world.sequence_log_probs()[0].exp().detach() * by_token.sum(-1)).sum())


def test_the_expected_gradient_of_k1_in_the_loss_is_zero(world):
    torch.testing.assert_close(kl_loss_gradient(world, "k1"), torch.zeros_like(world.exact_gradient(0.0)), **EXACT)


def test_the_expected_gradient_of_k2_in_the_loss_is_that_of_the_kl_of_each_token(world):
    found = kl_loss_gradient(world, "k2")
    torch.testing.assert_close(found, token_kl_gradient(world, reversed_=False), **EXACT)
    nothing = torch.zeros_like(world.rewards)
    one_step = (world.expected_gradient(nothing, c, "one_step") for c in (0.0, 1.0))
    torch.testing.assert_close(found, next(one_step) - next(one_step), **EXACT)
    # Not that of the response's: the tokens answer for no later one.
    whole = world.gradient(exact_kl(world))
    assert (found - whole).norm() > 0.01 * whole.norm()


def test_the_expected_gradient_of_k3_in_the_loss_is_that_of_the_kl_the_other_way_round(world):
    found = kl_loss_gradient(world, "k3")
    torch.testing.assert_close(found, token_kl_gradient(world, reversed_=True), **EXACT)
    assert (found - token_kl_gradient(world, reversed_=False)).norm() > 0.1 * found.norm()
