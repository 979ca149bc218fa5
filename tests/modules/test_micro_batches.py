"""Micro-batches: their sizes where they are asked for, the schedule at a skipped step, several updates of a batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from remax_lightning.data import PreferenceDataModule
from remax_lightning.modules import PPO, RewardModel
from remax_lightning.rewards import FunctionReward, Reward
from remax_lightning.rollout import Sampling


class Widths:
    """Tokens, padding included, of each forward pass with gradient."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.sizes: list[int] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model: Any, args: Any, inputs: dict[str, Tensor]) -> None:
        if torch.is_grad_enabled():
            self.sizes.append(inputs["input_ids"].numel())


def test_the_budget_of_a_policy_counts_prompts_too(policy: str, tmp_path: Path) -> None:
    rows = [{"prompt": "Tell me of it " * 2 + letter} for letter in "abcdef"]
    module = tiny.remax(policy, sampling=Sampling(4), micro_batch_tokens=70)
    module.configure_model()
    widths = Widths(module.policy)
    tiny.fit(module, tiny.prompt_data(tmp_path, rows), tmp_path)
    assert len(widths.sizes) >= 3
    assert max(widths.sizes) <= 70


def test_the_budget_of_a_reward_model_counts_both_sides(policy: str, tmp_path: Path) -> None:
    rows = [{"prompt": "Tell me of it", "chosen": " so " + letter, "rejected": " no"} for letter in "abcdef"]
    path = tiny.write_rows(tmp_path / "pairs.jsonl", rows)
    module = RewardModel(model=policy, optimizer=tiny.sgd(0.1), lr_schedule="constant", micro_batch_tokens=80)
    module.configure_model()
    widths = Widths(module.model)
    tiny.fit(module, PreferenceDataModule(train=path, batch_size=6), tmp_path)
    assert len(widths.sizes) >= 3
    assert max(widths.sizes) <= 80


class Sometimes(Reward):
    """No reward at some calls."""

    def __init__(self, broken: Sequence[int]) -> None:
        self.calls, self.broken = -1, broken

    def __call__(self, prompts: Any, responses: Sequence[str], **columns: Any) -> Tensor:
        self.calls += 1
        scores = torch.arange(len(responses)).float()
        return scores * torch.nan if self.calls in self.broken else scores


def test_a_skipped_step_does_not_advance_the_schedule(policy: str, tmp_path: Path) -> None:
    options = {"lr_schedule": "linear", "optimizer": tiny.sgd(0.4)}
    module = tiny.remax(policy, Sometimes([1, 2]), **options)
    history = tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, steps=4)
    assert history["train/steps_skipped"] == [0, 1, 1, 0, 0, 0]
    assert history["train/learning_rate"] == pytest.approx([0.4, 0.3, 0.3, 0.3, 0.2, 0.1])


def test_each_update_of_a_batch_sees_the_weights_of_the_one_before(policy: str, tmp_path: Path) -> None:
    """Also under Lightning's autocast, which lasts as long as the training step: it must not cache casts of weights."""
    seen: list[Tensor] = []

    class Watched(PPO):
        def policy_loss(self, *args: Any) -> Any:
            loss = super().policy_loss(*args)
            seen.append(loss.log_probs)
            return loss

    reward = FunctionReward("reward_functions.letter_values")
    options = {"sampling": Sampling(8), "kl_coef": 0.0, "optimizer": tiny.sgd(5.0), "lr_schedule": "constant"}
    module = Watched(policy=policy, reward=reward, num_epochs=2, **options)
    tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, steps=2, precision="bf16-mixed")
    assert len(seen) == 2
    assert float((seen[0] - seen[1]).abs().max()) > 0.05
