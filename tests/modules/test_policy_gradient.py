"""The one manual-optimization loop: what it drops, skips, clips, schedules and logs."""

import os
from collections.abc import Container, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tiny import PROMPTS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from remax_lightning.functional import fused_head
from remax_lightning.models import head
from remax_lightning.models.source import ModelSource
from remax_lightning.modules import ReMax
from remax_lightning.rewards import Reward
from remax_lightning.rollout import Sampling, TransformersEngine

METRICS = {
    "reward",
    "reward_std",
    "baseline_reward",
    "baseline_gap",
    "beats_baseline",
    "baseline_correlation",
    "advantage_mean",
    "kl",
    "kl_coef",
    "entropy",
    "response_length",
    "truncated",
    "grad_norm",
    "log_prob_drift",
    "identical_pairs",
    "rows_dropped",
    "tokens_per_second",
    "steps_skipped",
    "learning_rate",
}


def start(policy: str) -> dict[str, Tensor]:
    return tiny.weights(AutoModelForCausalLM.from_pretrained(policy))


def adam(lr: float = 1e-2, weight_decay: float = 0.1) -> Any:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


def rows(*gaps: str) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "gap": gap} for prompt, gap in zip(PROMPTS, gaps, strict=False)]


def state(trainer: Any) -> dict[str, Tensor]:
    values = trainer.optimizers[0].state_dict()["state"]
    return {f"{index}.{name}": value.clone() for index, entry in values.items() for name, value in entry.items()}


class Snapshots(tiny.Callback):
    """Weights and optimizer state after every batch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: object) -> None:
        self.weights.append(tiny.weights(module.trained_model))
        self.states.append(state(trainer))


class Recorder(Reward):
    """Notes what it is asked and what it answers; the rewards are listed by call, or counted."""

    def __init__(self, *answers: list[float]) -> None:
        self.answers, self.calls = list(answers), []

    def __call__(self, prompts: Any, responses: Any, **columns: Any) -> Tensor:
        values = self.answers[len(self.calls)] if self.answers else [float(len(response)) for response in responses]
        self.calls.append({"prompts": prompts, "responses": responses, "rewards": values, **columns})
        return torch.tensor(values)


def final(module: ReMax) -> dict[str, Tensor]:
    return tiny.weights(module.policy)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_update_does_not_depend_on_the_micro_batch(policy: str, other: str, tmp_path: Path, optimizer: str) -> None:
    results = []
    for size in (None, 1, 3):
        module = tiny.remax(
            policy,
            "with_gaps",
            kl_coef=0.2,
            reference=ModelSource(path=other),
            sampling=Sampling(12, num_samples=2),
            micro_batch_size=size,
            max_grad_norm=1.0,
            optimizer=tiny.sgd() if optimizer == "sgd" else lambda ps: torch.optim.AdamW(ps, lr=1e-3, eps=1e-3),
        )
        history = tiny.fit(module, tiny.prompt_data(tmp_path, rows("", "nan", "", "", "")), tmp_path)
        results.append((final(module), history.steps[0]))
    assert not tiny.are_equal(start(policy), results[0][0])
    for weights, metrics in results[1:]:
        tiny.assert_close(weights, results[0][0], atol=1e-6, rtol=0)
        for name in METRICS - {"tokens_per_second"}:
            assert metrics[f"train/{name}"] == pytest.approx(results[0][1][f"train/{name}"], abs=2e-5), name


@pytest.mark.parametrize(
    ("gap", "micro_batch_size"), [("none", None), ("nan", None), ("nan", 1), ("inf", 1), ("-inf", None), ("1e30", None)]
)
def test_a_row_without_a_finite_reward_is_dropped(
    policy: str, other: str, tmp_path: Path, gap: str, micro_batch_size: int | None
) -> None:
    options = {"kl_coef": 0.1, "reference": ModelSource(path=other), "micro_batch_size": micro_batch_size}
    module = tiny.remax(policy, "with_gaps", **options)
    history = tiny.fit(module, tiny.prompt_data(tmp_path, rows("", "", "", gap, gap)), tmp_path)
    survivors = tiny.remax(policy, "with_gaps", **options)
    expected = tiny.fit(survivors, tiny.prompt_data(tmp_path, rows("", "", "")), tmp_path)
    assert not tiny.are_equal(start(policy), final(module))
    tiny.assert_close(final(module), final(survivors))
    assert history["train/rows_dropped"] == [2.0]
    assert expected["train/rows_dropped"] == [0.0]
    for name in ("reward", "baseline_reward", "kl", "advantage_mean", "entropy", "grad_norm"):
        assert history[f"train/{name}"] == pytest.approx(expected[f"train/{name}"], abs=1e-5), name


@pytest.mark.parametrize("side", ["sampled", "greedy"])
def test_a_row_is_dropped_for_either_side(policy: str, tmp_path: Path, side: str) -> None:
    clean, broken = [3.0, 1.0, 4.0, 1.0, 5.0], [3.0, float("nan"), 4.0, 1.0, 5.0]
    reward = Recorder(broken + clean if side == "sampled" else clean + broken)
    history = tiny.fit(tiny.remax(policy, reward), tiny.prompt_data(tmp_path), tmp_path)
    assert history["train/rows_dropped"] == [1.0]
    assert history["train/reward"] == history["train/baseline_reward"] == [3.25]


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_batch_without_rewards_changes_nothing(policy: str, tmp_path: Path, micro_batch_size: int | None) -> None:
    module = tiny.remax(policy, Recorder([1.0, 2.0, 0.0, 0.0], [float("nan")] * 4, [3.0, 1.0, 0.0, 0.0]))
    module.optimizer, module.micro_batch_size = adam(), micro_batch_size
    snapshots = Snapshots()
    data = tiny.prompt_data(tmp_path, rows("", ""), batch_size=2)
    history = tiny.fit(module, data, tmp_path, steps=2, callbacks=[snapshots])
    assert history["train/steps_skipped"] == [0.0, 1.0, 0.0]
    assert history["train/rows_dropped"] == [0.0, 2.0, 0.0]
    assert not tiny.are_equal(start(policy), snapshots.weights[0])
    assert tiny.are_equal(snapshots.weights[0], snapshots.weights[1])
    assert tiny.are_equal(snapshots.states[0], snapshots.states[1])
    assert not tiny.are_equal(snapshots.weights[1], snapshots.weights[2])


def test_ten_skipped_steps_in_a_row_end_the_run(policy: str, tmp_path: Path) -> None:
    module = tiny.remax(policy, "with_gaps", optimizer=adam())
    history = tiny.History()
    trainer = tiny.trainer(tmp_path, 30, [history])
    with pytest.raises(RuntimeError, match="10 steps in a row"):
        trainer.fit(module, datamodule=tiny.prompt_data(tmp_path, rows("nan", "none", "inf", "-inf", "nan")))
    assert history["train/steps_skipped"] == [1.0] * 9
    assert tiny.are_equal(start(policy), final(module))


def test_a_used_step_starts_the_count_again(policy: str, tmp_path: Path) -> None:
    bad, good = [float("nan")] * 2, [1.0, 0.0]
    module = tiny.remax(policy, Recorder(*[bad] * 9, good, *[bad] * 9, good))
    history = tiny.fit(module, tiny.prompt_data(tmp_path, rows("")), tmp_path, steps=2)
    assert history["train/steps_skipped"] == [*[1.0] * 9, 0.0] * 2


class Failing(Recorder):
    """Raises in some of its calls, counted from 0; the answers of the others are as without that."""

    def __init__(self, calls: Container[int], *answers: list[float]) -> None:
        super().__init__(*answers)
        self.failing, self.count = calls, -1

    def __call__(self, prompts: Any, responses: Any, **columns: Any) -> Tensor:
        self.count += 1
        if self.count in self.failing:
            raise ConnectionError("the reward's server is away")
        return super().__call__(prompts, responses, **columns)


def test_a_reward_that_fails_once_costs_one_step(policy: str, tmp_path: Path) -> None:
    module = tiny.remax(policy, Failing({1}, *[[1.0, 3.0, 0.0, 0.0]] * 3), optimizer=adam())
    snapshots = Snapshots()
    data = tiny.prompt_data(tmp_path, rows("", ""), batch_size=2)
    with pytest.warns(match="failed for 4 responses; their rows are dropped: ConnectionError: the reward's server"):
        history = tiny.fit(module, data, tmp_path, steps=2, callbacks=[snapshots])
    assert history["train/rows_dropped"] == [0.0, 2.0, 0.0]
    assert history["train/steps_skipped"] == [0.0, 1.0, 0.0]
    assert tiny.are_equal(snapshots.weights[0], snapshots.weights[1])
    assert not tiny.are_equal(snapshots.weights[1], snapshots.weights[2])


def test_a_reward_that_always_fails_ends_the_run(policy: str, tmp_path: Path) -> None:
    module = tiny.remax(policy, Failing(range(1000)), optimizer=adam())
    with pytest.raises(RuntimeError, match="10 steps in a row"):
        tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, steps=30)
    assert tiny.are_equal(start(policy), final(module))


def test_a_reward_with_a_wrong_count_drops_its_rows(policy: str, tmp_path: Path) -> None:
    module = tiny.remax(policy, "too_few", optimizer=adam())
    with (
        pytest.warns(match="ValueError: reward_functions.too_few must return one reward a response: 10, got 9"),
        pytest.raises(RuntimeError, match="10 steps in a row"),
    ):
        tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, steps=30)
    assert tiny.are_equal(start(policy), final(module))


class Careless(Reward):
    """Sets for the whole process, wherever its code runs, what training needs otherwise; it changes the data, too."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lengths = folder, set()

    def spoil(self) -> None:
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        torch.manual_seed(1)
        os.chdir(self.folder)

    def check(self) -> None:
        self.spoil()

    def setup(self, device: Any, sharding: Any = None) -> None:
        self.spoil()

    def __call__(self, prompts: Any, responses: Any, **columns: Any) -> Tensor:
        self.spoil()
        for prompt in prompts:
            self.lengths.add(len(prompt))
            prompt.append({"role": "assistant", "content": "mine"})
        values = [[sum(map(ord, response)) % 13] for response in responses]
        return torch.tensor(values, dtype=torch.int64, device="cpu")  # (B, 1)


class Careful(Careless):
    """The same numbers."""

    def spoil(self) -> None:
        pass


def test_what_a_reward_does_beside_scoring_changes_nothing(tmp_path: Path) -> None:
    path, words = tiny.save_model(tmp_path / "policy"), tiny.tokenizer()
    words.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    words.save_pretrained(path)
    rows = [{"messages": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    results, folder = [], Path.cwd()
    for reward in (Careless(tmp_path), Careful(tmp_path)):
        try:
            module = tiny.remax(path, reward)
            history = tiny.fit(module, tiny.prompt_data(tmp_path, rows), tmp_path, steps=3)
            assert Path.cwd() == folder
        finally:
            torch.set_grad_enabled(True)
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
            os.chdir(folder)
        assert history["train/steps_skipped"] == [0.0] * 3
        assert reward.lengths == {1}  # of every epoch
        results.append(final(module))
    assert tiny.are_equal(*results)


def test_a_reward_of_the_wrong_size_costs_a_step_and_not_the_run(policy: str, tmp_path: Path) -> None:
    for count in (3, 5):
        module = tiny.remax(policy, Recorder([1.0, 3.0, 0.0, 0.0], [1.0] * count, [2.0, 0.0, 0.0, 0.0]))
        data = tiny.prompt_data(tmp_path, rows("", ""), batch_size=2)
        with pytest.warns(match=f"ValueError: Recorder must return one reward a response: 4, got {count}"):
            history = tiny.fit(module, data, tmp_path, steps=2)
        assert history["train/steps_skipped"] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing(
    policy: str, tmp_path: Path, value: float, max_grad_norm: float | None
) -> None:
    module = tiny.remax(policy, optimizer=adam(), max_grad_norm=max_grad_norm)
    module.configure_model()
    snapshots = Snapshots()
    broken = next(p for name, p in module.policy.named_parameters() if name.endswith("layers.1.mlp.down_proj.weight"))
    broken.register_hook(lambda gradient: gradient * value if len(snapshots.weights) == 1 else gradient)
    history = tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, steps=2, callbacks=[snapshots])
    assert history["train/steps_skipped"] == [0.0, 1.0, 0.0]
    assert tiny.are_equal(snapshots.weights[0], snapshots.weights[1])
    assert tiny.are_equal(snapshots.states[0], snapshots.states[1])
    assert not tiny.are_equal(snapshots.weights[1], snapshots.weights[2])
    assert all(torch.isfinite(weight).all() for weight in snapshots.weights[2].values())


def test_metrics(policy: str, tmp_path: Path) -> None:
    history = tiny.fit(tiny.remax(policy, kl_coef=0.1), tiny.prompt_data(tmp_path), tmp_path, steps=2)
    times = {f"time/{phase}" for phase in ("rollout", "reward", "reference", "update", "step")}
    for metrics in history.steps:
        assert {f"train/{name}" for name in METRICS} | times == set(metrics)
        assert metrics["train/log_prob_drift"] < 1e-4
        assert metrics["train/tokens_per_second"] > 0
        assert 0 < metrics["train/entropy"] < 4.1
        assert 1 <= metrics["train/response_length"] <= 12
        assert 0 < metrics["train/truncated"] < 1
        parts = sum(metrics[name] for name in times - {"time/step"})
        assert 0.5 * metrics["time/step"] < parts <= metrics["time/step"] + 1e-3


def test_reward_metrics_hold_the_two_sides_apart(policy: str, tmp_path: Path) -> None:
    reward = Recorder()
    module = tiny.remax(policy, reward, sampling=Sampling(12, num_samples=3))
    history = tiny.fit(
        module, tiny.prompt_data(tmp_path, [{"prompt": p, "answer": p[::-1]} for p in PROMPTS]), tmp_path
    )
    (call,) = reward.calls
    assert len(call["responses"]) == 20
    assert history["train/reward"] == [pytest.approx(sum(call["rewards"][:15]) / 15)]
    assert history["train/reward_std"] == [pytest.approx(float(torch.tensor(call["rewards"][:15]).std(correction=0)))]
    assert history["train/baseline_reward"] == [pytest.approx(sum(call["rewards"][15:]) / 5)]
    assert call["prompts"][:15] == [prompt for prompt in call["prompts"][15:] for _ in range(3)]
    assert call["answer"] == [prompt[::-1] for prompt in call["prompts"]]
    assert set(call) == {"prompts", "responses", "rewards", "answer"}


def test_drift_stays_small_at_another_temperature(policy: str, tmp_path: Path) -> None:
    module = tiny.remax(policy, sampling=Sampling(12, temperature=0.7))
    history = tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, steps=2)
    assert max(history["train/log_prob_drift"]) < 1e-4


@pytest.mark.parametrize("limit", [0.05, 1e6])
def test_max_grad_norm_bounds_the_gradient(policy: str, tmp_path: Path, limit: float) -> None:
    free, clipped = tiny.remax(policy), tiny.remax(policy, max_grad_norm=limit)
    data = tiny.prompt_data(tmp_path)
    histories = [tiny.fit(module, data, tmp_path) for module in (free, clipped)]
    before = start(policy)
    whole, taken = (tiny.difference(before, final(module)) for module in (free, clipped))
    norm = histories[0]["train/grad_norm"][0]
    assert tiny.norm(whole) == pytest.approx(norm, rel=1e-4)
    assert histories[1]["train/grad_norm"][0] == pytest.approx(norm, rel=1e-5)
    scale = min(limit / norm, 1.0)
    tiny.assert_close(taken, {name: value * scale for name, value in whole.items()}, rtol=1e-3)


@pytest.mark.parametrize(
    ("schedule", "warmup_fraction", "expected"),
    [
        ("constant", 0.0, [1.0, 1.0, 1.0, 1.0]),
        ("constant", 0.5, [0.0, 0.5, 1.0, 1.0]),
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25]),
        ("cosine", 0.0, [1.0, 0.8535534, 0.5, 0.1464466]),
        ("cosine", 0.5, [0.0, 0.5, 1.0, 0.5]),
    ],
)
def test_learning_rate(
    policy: str, tmp_path: Path, schedule: str, warmup_fraction: float, expected: list[float]
) -> None:
    options: dict[str, Any] = {"lr_schedule": schedule, "warmup_fraction": warmup_fraction, "optimizer": tiny.sgd(0.02)}
    snapshots = Snapshots()
    history = tiny.fit(
        tiny.remax(policy, **options), tiny.prompt_data(tmp_path), tmp_path, steps=4, callbacks=[snapshots]
    )
    assert history["train/learning_rate"] == pytest.approx([0.02 * value for value in expected], abs=1e-7)
    steps = zip([start(policy), *snapshots.weights[:-1]], snapshots.weights, history.steps, strict=True)
    for before, after, metrics in steps:
        moved = tiny.norm(tiny.difference(before, after))
        assert moved == pytest.approx(metrics["train/learning_rate"] * metrics["train/grad_norm"], rel=1e-2, abs=1e-5)


def test_a_schedule_without_an_end_is_refused(policy: str, tmp_path: Path) -> None:
    module = tiny.remax(policy, lr_schedule="cosine")
    trainer = tiny.trainer(tmp_path, -1, max_epochs=-1)
    with pytest.raises(ValueError, match=r"set trainer.max_steps or trainer.max_epochs"):
        trainer.fit(module, datamodule=tiny.prompt_data(tmp_path))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_weight_decay_leaves_norms_and_biases(tmp_path: Path, architecture: str) -> None:
    policy = tiny.save_model(tmp_path / "policy", architecture)
    before = start(policy)
    module = tiny.remax(policy, "constant", optimizer=tiny.sgd(0.1, weight_decay=0.5))
    tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path)
    kinds = set()
    for name, weight in final(module).items():
        is_plain = "norm" in name or "ln_" in name or name.endswith("bias")
        kinds.add(is_plain)
        torch.testing.assert_close(weight, before[name] * (1.0 if is_plain else 0.95), msg=name)
    assert kinds == {True, False}


def test_the_optimizer_is_the_one_given(policy: str, tmp_path: Path) -> None:
    module = tiny.remax(policy, optimizer=adam(lr=1e-3, weight_decay=0.0))
    trainer = tiny.trainer(tmp_path)
    trainer.fit(module, datamodule=tiny.prompt_data(tmp_path))
    assert isinstance(trainer.optimizers[0], torch.optim.AdamW)
    moved = tiny.difference(start(policy), final(module))
    assert max(float(value.abs().max()) for value in moved.values()) == pytest.approx(1e-3, rel=1e-2)


def test_the_default_optimizer_is_that_of_the_recipes(policy: str) -> None:
    module = ReMax(policy=ModelSource(path=policy), reward=Recorder(), sampling=Sampling(4))
    module.configure_model()
    optimizer = module.optimizer(module.policy.parameters())
    assert type(optimizer) is torch.optim.AdamW
    assert {name: optimizer.defaults[name] for name in ("lr", "betas", "weight_decay")} == {
        "lr": 1e-6,
        "betas": (0.9, 0.95),
        "weight_decay": 0.1,
    }


def test_dropout_in_the_configuration_changes_nothing(tmp_path: Path) -> None:
    plain = tiny.save_model(tmp_path / "plain", "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    dropping = tiny.save_model(tmp_path / "dropping", "gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    results = []
    for folder in (plain, dropping):
        module = tiny.remax(folder)
        tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path)
        results.append(final(module))
    assert tiny.are_equal(*results)


def test_a_run_repeats(policy: str, tmp_path: Path) -> None:
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(results))  # has no part in it
        module = tiny.remax(policy, seed=seed, optimizer=adam())
        tiny.fit(module, tiny.prompt_data(tmp_path, batch_size=2), tmp_path, steps=3)
        results.append(final(module))
    assert tiny.are_equal(results[0], results[1])
    assert not tiny.are_equal(results[0], results[2])


def test_each_step_draws_other_responses(policy: str, tmp_path: Path) -> None:
    reward = Recorder()
    module = tiny.remax(policy, reward, optimizer=tiny.sgd(0.0))
    tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, steps=2)
    first, second = ([dict(zip(PROMPTS, part, strict=True)) for part in halves(call)] for call in reward.calls)
    assert first[1] == second[1]
    assert all(first[0][prompt] != second[0][prompt] for prompt in PROMPTS)


def halves(call: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Sampled and greedy responses in the order of PROMPTS."""
    first, second = call["responses"][:5], call["responses"][5:]
    order = [call["prompts"][:5].index(prompt) for prompt in PROMPTS]
    return [first[place] for place in order], [second[place] for place in order]


def test_fp16_mixed_is_refused(policy: str) -> None:
    module = tiny.remax(policy)
    # on a CPU, Lightning itself turns it into bf16-mixed
    module._trainer = SimpleNamespace(precision="16-mixed", strategy=None)
    with pytest.raises(ValueError, match="use bf16-mixed"):
        module.setup("fit")


def test_bf16_mixed_trains_float32_weights(policy: str, tmp_path: Path) -> None:
    module = tiny.remax(policy, kl_coef=0.1, micro_batch_size=2)
    history = tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, steps=2, precision="bf16-mixed")
    assert history["train/steps_skipped"] == [0.0, 0.0]
    assert 1e-5 < history["train/log_prob_drift"][0] < 0.3
    assert {parameter.dtype for parameter in module.policy.parameters()} == {torch.float32}
    assert not tiny.are_equal(start(policy), final(module))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_coef": -0.1}, "kl_coef must be 0"),
        ({"missing_stop_penalty": -1.0}, "missing_stop_penalty is subtracted from the reward"),
        ({"warmup_fraction": 1.0}, "warmup_fraction"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": 1.5}, "gamma"),
        ({"reward_clip": 0.0}, "reward_clip"),
        ({"kl_form": "both"}, "kl_form"),
        ({"greedy_max_new_tokens": 0}, "greedy_max_new_tokens"),
        ({"greedy_max_new_tokens": -3}, "greedy_max_new_tokens"),
    ],
)
def test_values_out_of_range_are_refused(policy: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.remax(policy, **options)


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 5}])
def test_a_biased_sampler_is_warned_of(policy: str, options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="the gradient is biased"):
        tiny.remax(policy, sampling=Sampling(4, **options))


def test_a_module_can_be_trained_again(policy: str, tmp_path: Path) -> None:
    module = tiny.remax(policy, optimizer=tiny.sgd(0.1))
    data = tiny.prompt_data(tmp_path)
    tiny.fit(module, data, tmp_path)
    once = deepcopy(final(module))
    tiny.fit(module, data, tmp_path)
    assert not tiny.are_equal(once, final(module))


@pytest.mark.parametrize("lengths", [[5, 1, 9, 3, 9, 2, 30, 1], [4] * 6, [1]])
@pytest.mark.parametrize(("size", "tokens"), [(None, 10), (None, 1), (2, 1000), (3, 12), (None, 1000), (3, None)])
def test_micro_batches_hold_their_limits(policy: str, lengths: list[int], size: int | None, tokens: int | None) -> None:
    module = tiny.remax(policy, micro_batch_size=size, micro_batch_tokens=tokens)
    parts = [[lengths[row] for row in rows.tolist()] for rows in module.micro_batches(torch.tensor(lengths))]
    assert [length for part in parts for length in part] == sorted(lengths, reverse=True)
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        assert len(part) <= (size or len(lengths))
        assert len(part) == 1 or len(part) * max(part) <= (tokens or 1000)
        if following is not None:  # not smaller than it has to be
            assert len(part) == size or (len(part) + 1) * max(part) > (tokens or 1000)


def test_the_update_does_not_depend_on_the_token_budget(policy: str, other: str, tmp_path: Path) -> None:
    results, sizes = [], []
    for budget in (None, 1, 40):
        module = tiny.remax(policy, kl_coef=0.1, reference=ModelSource(path=other), micro_batch_tokens=budget)
        split = module.micro_batches
        module.micro_batches = lambda lengths, split=split: note(sizes, split(lengths))
        tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, steps=2)
        results.append(final(module))
    assert {1, 5} < set(sizes)
    for result in results[1:]:
        tiny.assert_close(result, results[0])


def note(sizes: list[int], parts: list[Tensor]) -> list[Tensor]:
    sizes += map(len, parts)
    return parts


class Forwards:
    """Rows of each training forward of a module's policy."""

    def __init__(self, module: ReMax) -> None:
        module.configure_model()
        self.rows: list[int] = []
        module.policy.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, policy: Any, args: Any, inputs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self.rows.append(len(inputs["input_ids"]))


def test_rows_without_advantage_cost_nothing_and_change_nothing(policy: str, tmp_path: Path) -> None:
    """Two of five responses are worth what their baselines are; the update is that of all rows, none left out."""
    values = [3.0, 1.0, 0.0, 2.0, 5.0]
    module, whole = (tiny.remax(policy, Recorder([*values, 0.0, 1.0, 0.0, 0.0, 0.0])) for _ in range(2))
    forwards, all_rows = Forwards(module), Forwards(whole)
    # a penalty too small to be felt gives every row an advantage
    loss = whole.advantages
    whole.advantages = lambda rollout: loss(rollout) + 1e-30 * rollout.response_mask
    data = tiny.prompt_data(tmp_path)
    tiny.fit(module, data, tmp_path)
    tiny.fit(whole, data, tmp_path)
    assert (forwards.rows, all_rows.rows) == ([3], [5])
    tiny.assert_close(final(module), final(whole))


def test_a_step_without_any_advantage_is_a_step_of_gradient_zero(policy: str, tmp_path: Path) -> None:
    module = tiny.remax(policy, Recorder([1.0] * 10), optimizer=tiny.sgd(weight_decay=0.1))
    forwards = Forwards(module)
    history = tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path)
    assert forwards.rows == [1]
    assert history["train/grad_norm"] == history["train/steps_skipped"] == [0.0]
    decayed = next(name for name in final(module) if name.endswith("down_proj.weight"))
    torch.testing.assert_close(final(module)[decayed], 0.9 * start(policy)[decayed])


def test_equal_responses_to_a_prompt_are_scored_once(policy: str, tmp_path: Path) -> None:
    reward = Recorder()
    sampling = Sampling(12, temperature=1e-4, num_samples=2)  # as good as greedy
    history = tiny.fit(tiny.remax(policy, reward, sampling=sampling), tiny.prompt_data(tmp_path), tmp_path)
    (call,) = reward.calls
    assert sorted(call["prompts"]) == sorted(PROMPTS)
    assert history["train/identical_pairs"] == [1.0]
    assert history["train/reward"] == history["train/baseline_reward"] == [pytest.approx(sum(call["rewards"]) / 5)]


class Drifting(TransformersEngine):
    """Says of each token that it was less probable than it was."""

    def sample_and_greedy(self, *args: Any, **options: Any) -> Any:
        samples, greedy = super().sample_and_greedy(*args, **options)
        return replace(samples, log_probs=samples.log_probs - 0.01), greedy


@pytest.mark.parametrize(("limit", "skipped"), [(None, 0.0), (1e-3, 1.0), (10.0, 0.0)])
def test_a_step_whose_sampler_drifts_beyond_the_limit_is_skipped(
    policy: str, tmp_path: Path, limit: float | None, skipped: float
) -> None:
    module = tiny.remax(policy, max_log_prob_drift=limit)
    module.engine = Drifting()
    history = tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, limit_train_batches=1, max_epochs=1)
    assert history["train/log_prob_drift"] == [pytest.approx(0.01, rel=1e-2)]
    assert history["train/steps_skipped"] == [skipped]
    assert tiny.are_equal(start(policy), final(module)) == bool(skipped)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor):
                self.size = max(self.size, output.numel())
        return outputs


@pytest.mark.parametrize("method", ["fused", "plain"])
def test_a_step_never_has_the_logits_of_all_tokens(policy: str, tmp_path: Path, method: str) -> None:
    """8 prompts, at least 90 tokens: a step's largest tensor is far below their logits; the plain path shows them."""
    rows = [{"prompt": "Tell me " * 3 + letter} for letter in "abcdefgh"]
    module = tiny.remax(policy, kl_coef=0.1, sampling=Sampling(40), seed=3)
    module.configure_model()
    vocabulary = 4096
    for model in (module.policy, module.reference.model):
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
        if method == "plain":
            head._has_plain_head[model] = False
    lengths: list[int] = []
    advantages = module.advantages
    module.advantages = lambda rollout: (lengths.append(int(rollout.response_mask.sum())), advantages(rollout))[1]
    with Largest() as largest, fused_head_chunks(16):
        tiny.fit(module, tiny.prompt_data(tmp_path, rows), tmp_path)
    weights = vocabulary * 32
    assert lengths[0] > 3 * weights / vocabulary
    assert (largest.size < lengths[0] * vocabulary) == (method == "fused")
    assert method == "plain" or largest.size <= weights


@contextmanager
def fused_head_chunks(size: int) -> Iterator[None]:
    """Chunks of so many tokens in the fused head, in place of its own choice."""
    checked = fused_head._checked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_head, "_checked", lambda *args: checked(*args[:-1], size))
        yield
