"""Every response of a small recurrent policy is enumerated, so expectations are sums and the laws hold to rounding."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from remax_lightning.functional import (
    kl_k1,
    kl_k2,
    kl_k3,
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
