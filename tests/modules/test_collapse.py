"""What is said of a run that learns nothing, or has left its reference far behind."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from remax_lightning.modules import KLControl, ReMax
from remax_lightning.modules.collapse import PATIENCE, USUAL_KL, CollapseWatch
from remax_lightning.modules.policy_gradient import reward_std
from remax_lightning.rollout import Sampling

HEALTHY = {"reward": 1.0, "reward_std": 0.5, "baseline_gap": 0.1, "grad_norm": 0.3, "response_length": 8.0, "kl": 2.0}
EQUAL, ZERO, SHORT = "all rewards of a step are equal", "the gradient is 0", "all responses have at most one token"


def said(watch: CollapseWatch, steps: int, **changes: float) -> list[tuple[int, str]]:
    """Step, from 1, and first words of each sentence."""
    found = []
    for step in range(1, steps + 1):
        found += [(step, text.split(",")[0]) for text in watch.observe({**HEALTHY, **changes})]
    return found


def test_a_healthy_run_is_left_in_peace() -> None:
    assert said(CollapseWatch(), 200) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"reward_std": 0.0}, EQUAL),
        ({"reward": 900.0, "reward_std": 1e-5}, EQUAL),  # the last bits of a model's scores
        ({"grad_norm": 0.0}, ZERO),
        ({"response_length": 1.0}, SHORT),
        ({"response_length": 0.5}, SHORT),
    ],
)
def test_a_sign_is_said_after_ten_a_hundred_and_a_thousand_steps(changes: dict[str, float], expected: str) -> None:
    assert said(CollapseWatch(), 1100, **changes) == [(10, expected), (100, expected), (1000, expected)]
    assert PATIENCE == 10


def test_a_step_without_the_sign_starts_the_count_again() -> None:
    watch = CollapseWatch()
    assert said(watch, 9, grad_norm=0.0) == said(watch, 1) == said(watch, 9, grad_norm=0.0) == []
    assert said(watch, 1, grad_norm=0.0) == [(1, ZERO)]


def test_a_skipped_step_says_nothing() -> None:
    watch = CollapseWatch()
    assert said(watch, 9, grad_norm=0.0) == []
    assert said(watch, 20, grad_norm=0.0, reward=math.nan, reward_std=math.nan, steps_skipped=1.0) == []
    assert said(watch, 1, grad_norm=0.0) == [(1, ZERO)]


def test_equal_rewards_with_other_greedy_ones_are_something_to_learn() -> None:
    assert said(CollapseWatch(has_greedy_baseline=True), 20, reward_std=0.0, baseline_gap=0.4) == []
    assert said(CollapseWatch(has_greedy_baseline=True), 10, reward_std=0.0, baseline_gap=0.0) == [(10, EQUAL)]
    assert said(CollapseWatch(), 10, reward_std=0.0, baseline_gap=0.4) == [(10, EQUAL)]


def test_metrics_that_a_method_does_not_have_are_no_sign() -> None:
    watch = CollapseWatch(has_greedy_baseline=True)
    assert [watch.observe({"reward": 1.0}) for _ in range(20)] == [[]] * 20


def test_the_kl_is_said_once_and_each_time_that_it_has_doubled() -> None:
    watch = CollapseWatch()
    course = [10, 50, 51, 60, 99, 30, 76, 101, 180, 450, 700, 801, math.nan, math.inf]
    steps = [step for step, kl in enumerate(course) if watch.observe({**HEALTHY, "kl": kl})]
    assert [course[step] for step in steps] == [51, 101, 450, 801]
    (text,) = CollapseWatch().observe({**HEALTHY, "kl": 76.0})
    assert text.startswith("the mean KL of a response is 76 nats, which in most runs stays below 50")
    assert "set kl.limit" in text


def test_a_target_of_ones_own_raises_what_is_usual() -> None:
    watch = CollapseWatch(kl_target=60.0)
    assert not watch.observe({**HEALTHY, "kl": 119.0})
    assert watch.observe({**HEALTHY, "kl": 121.0})
    assert CollapseWatch(kl_target=1.0).kl_bound == USUAL_KL


def test_the_standard_deviation_is_that_of_all_ranks() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0, 5.5, -3.0])
    parts = rewards[:2], rewards[2:]
    sums: list[torch.Tensor] = []
    for part in parts:
        reward_std(part, lambda values: (sums.append(values), values)[1])
    assert float(reward_std(parts[0], lambda _: sums[0] + sums[1])) == pytest.approx(float(rewards.std(correction=0)))
    assert float(reward_std(torch.full((64,), 0.1), lambda values: values)) < 1e-8
    for too_few in (rewards[:0], rewards[:1]):
        assert reward_std(too_few, lambda values: values).isnan()


def fitted(policy: str, folder: Path, reward: str, **options: Any) -> list[str]:
    """Warnings of twelve steps."""
    module = tiny.remax(policy, reward, **options)
    with pytest.warns() as caught:
        tiny.fit(module, tiny.prompt_data(folder), folder, 12)
    return [str(each.message) for each in caught]


def test_a_run_that_learns_nothing_says_so(policy: str, tmp_path: Path) -> None:
    texts = fitted(policy, tmp_path, "constant", sampling=Sampling(4))
    assert sum(text.startswith(f"{EQUAL}, for 10 steps in a row") for text in texts) == 1
    assert sum(text.startswith(f"{ZERO}, for 10 steps in a row") for text in texts) == 1
    assert not any(text.startswith(SHORT) for text in texts)
    assert any(text.startswith(SHORT) for text in fitted(policy, tmp_path, "letter_values", sampling=Sampling(1)))


def test_a_run_that_leaves_its_reference_says_so(policy: str, tmp_path: Path) -> None:
    module = tiny.remax(policy, kl_coef=1e-6, kl=KLControl(), sampling=Sampling(40), optimizer=tiny.adam(1.0))
    assert isinstance(module, ReMax)
    with pytest.warns(match=r"the mean KL of a response is \d.* nats, which in most runs stays below 50"):
        tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, 3)
