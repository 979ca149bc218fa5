"""REINFORCE, RLOO and PPO: what each of them says that differs, and the KL control that all share."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from remax_lightning.callbacks import Checkpoint
from remax_lightning.functional.log_probs import kl_k3
from remax_lightning.models.source import ModelSource
from remax_lightning.modules import PPO, RLOO, KLControl, PolicyGradientModule, Reinforce, ReMax
from remax_lightning.modules import ppo as ppo_module
from remax_lightning.modules.baseline import BaselineModule
from remax_lightning.modules.ppo import minibatches
from remax_lightning.rewards import FunctionReward, ModelReward
from remax_lightning.rollout import Rollout, Sampling


@pytest.fixture
def reward_model(tmp_path: Path) -> str:
    return tiny.save_reward_model(tmp_path / "reward_model")


def module(kind: type[PolicyGradientModule], policy: str, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "policy": ModelSource(path=policy),
        "reward": FunctionReward("reward_functions.letter_values"),
        "sampling": Sampling(max_new_tokens=8, num_samples=2),
        "kl_coef": 0.0,
        "optimizer": tiny.sgd(),
        "lr_schedule": "constant",
        "max_grad_norm": None,
    }
    return kind(**{**defaults, **options})


def watch(given: Any) -> list[Rollout]:
    """The rollouts that a module collects."""
    seen: list[Rollout] = []
    collect = given.collect

    def watched(batch: dict[str, Any]) -> Rollout:
        seen.append(collect(batch))
        return seen[-1]

    given.collect = watched
    return seen


def trained(given: Any, folder: Path, steps: int = 1, **options: Any) -> tuple[dict[str, Tensor], tiny.History]:
    """What was taken off each weight, and the metrics."""
    before: dict[str, Tensor] = {}

    class Start(tiny.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            before.update(tiny.weights(pl_module.policy))

    history = tiny.fit(given, tiny.prompt_data(folder), folder, steps, callbacks=[Start()], **options)
    return tiny.difference(before, tiny.weights(given.policy)), history


class Known(BaselineModule):
    """Baselines that a test gives."""

    def collect(self, batch: dict[str, Any]) -> Rollout:
        rollout = super().collect(batch)
        return replace(rollout, baselines=self.given(rollout.rewards))


def known(policy: str, baselines: Any, **options: Any) -> Known:
    made = module(Known, policy, **options)
    made.given = baselines
    return made


def test_rloo_compares_with_the_other_responses_of_the_prompt(policy: str, tmp_path: Path) -> None:
    change, history = trained(module(RLOO, policy), tmp_path)
    expected, _ = trained(known(policy, lambda rewards: rewards.view(-1, 2).flip(1).flatten()), tmp_path)
    assert tiny.norm(change) > 1e-3
    tiny.assert_close(change, expected)
    assert history["train/baseline_gap"][0] == pytest.approx(0.0, abs=1e-6)


def test_rloo_needs_two_samples(policy: str) -> None:
    with pytest.raises(ValueError, match=r"RLOO compares .*; model.sampling.num_samples must be at least 2, got 1"):
        module(RLOO, policy, sampling=Sampling(max_new_tokens=4))


@pytest.mark.parametrize(
    ("baseline", "of"),
    [
        ("none", torch.zeros_like),
        ("moving_average", torch.zeros_like),  # the first step has no past
        ("batch_mean", lambda rewards: (rewards.sum() - rewards) / (len(rewards) - 1)),
    ],
)
def test_reinforce_compares_with(baseline: str, of: Any, policy: str, tmp_path: Path) -> None:
    change, _ = trained(module(Reinforce, policy, baseline=baseline), tmp_path)
    expected, _ = trained(known(policy, of), tmp_path)
    assert tiny.norm(change) > 1e-3
    tiny.assert_close(change, expected)


def test_a_batch_mean_leaves_out_rows_without_a_reward(policy: str, tmp_path: Path) -> None:
    rows = [{"prompt": word, "gap": "nan" if word == "a" else ""} for word in tiny.PROMPTS]
    reward = FunctionReward("reward_functions.with_gaps")
    given = module(Reinforce, policy, baseline="batch_mean", reward=reward)
    seen = watch(given)
    tiny.fit(given, tiny.prompt_data(tmp_path, rows), tmp_path)
    rewards = seen[0].rewards
    finite = rewards[rewards.isfinite()]
    assert len(finite) == len(rewards) - 2
    mean = (finite.sum() - finite) / (len(finite) - 1)
    torch.testing.assert_close(seen[0].baselines[rewards.isfinite()], mean)


def test_a_moving_average_follows_the_rewards_and_is_resumed(policy: str, tmp_path: Path) -> None:
    def run(name: str, **options: Any) -> tuple[Any, tiny.History]:
        given = module(Reinforce, policy, decay=0.5)
        history = tiny.History()
        saves = Checkpoint(str(tmp_path / name), every_n_train_steps=2, save_top_k=-1)
        trainer = tiny.trainer(tmp_path, 4, [history, saves], enable_checkpointing=True)
        trainer.fit(given, datamodule=tiny.prompt_data(tmp_path), **options)
        return given, history

    given, history = run("whole")
    rewards, expected, average = history["train/reward"], [0.0], None
    for reward in rewards:
        average = reward if average is None else 0.5 * average + 0.5 * reward
        expected.append(average)
    assert history["train/baseline_reward"] == pytest.approx(expected[:-1], rel=1e-5)
    resumed, _ = run("resumed", ckpt_path=str(tmp_path / "whole" / "step=2.ckpt"))
    assert float(resumed.moving_average) == float(given.moving_average) == pytest.approx(expected[-1], rel=1e-5)
    assert tiny.are_equal(tiny.weights(resumed.policy), tiny.weights(given.policy))


def test_baseline_metrics(policy: str, tmp_path: Path) -> None:
    given = module(ReMax, policy)
    seen = watch(given)
    _, history = trained(given, tmp_path)
    rewards, baselines = seen[0].rewards, seen[0].baselines
    assert history["train/baseline_gap"] == [pytest.approx(float((rewards - baselines).mean()), rel=1e-4)]
    assert history["train/beats_baseline"] == [pytest.approx(float((rewards > baselines).float().mean()))]
    correlation = torch.corrcoef(torch.stack([rewards, baselines]))[0, 1]
    assert history["train/baseline_correlation"] == [pytest.approx(float(correlation), abs=1e-4)]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_baselines_that_tell_the_rewards_correlate_with_them(sign: float, policy: str, tmp_path: Path) -> None:
    _, history = trained(known(policy, lambda rewards: sign * rewards + 3), tmp_path)
    assert history["train/baseline_correlation"] == [pytest.approx(sign, abs=1e-4)]


def ppo(policy: str, **options: Any) -> PPO:
    """Its first step on values that say 0."""
    defaults = {"sampling": Sampling(max_new_tokens=8), "normalize_advantages": False, "gae_lambda": 1.0}
    return module(PPO, policy, **{**defaults, **options})


def test_the_first_step_of_ppo_is_the_policy_gradient(policy: str, tmp_path: Path) -> None:
    change, history = trained(ppo(policy), tmp_path)
    sampling = Sampling(max_new_tokens=8)
    expected, _ = trained(module(Reinforce, policy, baseline="none", sampling=sampling), tmp_path)
    assert tiny.norm(change) > 1e-3
    tiny.assert_close(change, expected, atol=1e-5)
    assert history["train/clipped"] == [0.0]


def test_with_the_kl_in_its_rewards_too(policy: str, tmp_path: Path) -> None:
    other = tiny.save_model(tmp_path / "other", seed=1)
    options = {"kl_coef": 0.3, "reference": ModelSource(path=other), "sampling": Sampling(max_new_tokens=8)}
    change, _ = trained(ppo(policy, **options), tmp_path)
    expected, _ = trained(module(Reinforce, policy, baseline="none", **options), tmp_path)
    tiny.assert_close(change, expected, atol=1e-5)
    without, _ = trained(ppo(policy, **{**options, "kl_coef": 0.0, "reference": None}), tmp_path)
    assert tiny.norm(tiny.difference(change, without)) > 1e-3


def test_the_value_model_learns_the_returns(policy: str, tmp_path: Path) -> None:
    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=1e-6)

    given = ppo(policy, optimizer=adam, value_learning_rate=1e-2, value_clip_range=None)
    history = tiny.fit(given, tiny.prompt_data(tmp_path), tmp_path, steps=30)
    assert history["train/value_error"][-1] < 0.5 * history["train/value_error"][0]
    assert history["train/value_grad_norm"][0] > 0


def test_a_value_model_starts_from_the_reward_model(policy: str, reward_model: str, tmp_path: Path) -> None:
    given = ppo(policy, reward=ModelReward(reward_model))
    given.configure_model()
    expected = module(PPO, policy, value_model=ModelSource(path=reward_model))
    expected.configure_model()
    assert tiny.are_equal(tiny.weights(given.value_model), tiny.weights(expected.value_model))
    assert float(given.value_model.score.weight.abs().sum()) > 0
    other = ppo(policy)
    other.configure_model()
    assert float(other.value_model.score.weight.abs().sum()) == 0


def test_several_optimizer_steps_on_each_rollout(policy: str, tmp_path: Path) -> None:
    sampling = Sampling(max_new_tokens=8, num_samples=2)
    given = ppo(policy, num_epochs=2, num_minibatches=2, sampling=sampling, optimizer=tiny.sgd(0.02))
    saves = Checkpoint(str(tmp_path / "saves"), every_n_train_steps=6, save_top_k=-1)
    history = tiny.History()
    trainer = tiny.trainer(tmp_path, 16, [history, saves], enable_checkpointing=True)
    seen = watch(given)
    trainer.fit(given, datamodule=tiny.prompt_data(tmp_path))
    assert trainer.global_step == 16
    assert len(seen) == 4
    assert max(history["train/clipped"]) > 0
    assert history["train/log_prob_drift"][0] > 1e-4  # of later updates, from the policy that responded
    # after the batches that reach or pass 6, 12 and the end
    assert sorted(path.name for path in (tmp_path / "saves").glob("*.ckpt")) == [
        "step=12.ckpt",
        "step=16.ckpt",
        "step=8.ckpt",
    ]


def test_the_learning_rate_counts_every_optimizer_step(policy: str, tmp_path: Path) -> None:
    """Three batches with 4 optimizer steps each: the rate falls over all 12, and its mean in each batch is logged."""
    given = ppo(policy, num_epochs=2, num_minibatches=2, lr_schedule="linear", optimizer=tiny.sgd(0.12))
    trainer = tiny.trainer(tmp_path, -1, [history := tiny.History()], max_epochs=3)
    trainer.fit(given, datamodule=tiny.prompt_data(tmp_path))
    assert trainer.global_step == 12
    means = [0.12 * (1 - (done + 1.5) / 12) for done in (0, 4, 8)]
    assert history["train/learning_rate"] == pytest.approx(means, abs=1e-6)


def test_minibatches_have_every_row_once_in_an_order_of_seed_step_and_epoch() -> None:
    def order(*key: int) -> list[list[int]]:
        return [rows.tolist() for rows in minibatches(8, 3, *key)]

    assert sorted(row for rows in order(7, 5, 1) for row in rows) == list(range(8))
    assert len(order(7, 5, 1)) == 3
    assert order(7, 5, 1) == order(7, 5, 1)
    for other in ((8, 5, 1), (7, 6, 1), (7, 5, 0)):
        assert order(*other) != order(7, 5, 1)


def test_minibatches_have_another_order_at_each_step(policy: str, tmp_path: Path) -> None:
    asked: list[list[list[int]]] = []

    def recorded(*arguments: int) -> list[Tensor]:
        rows = minibatches(*arguments)
        asked.append([each.tolist() for each in rows])
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_module, "minibatches", recorded)
        module = ppo(policy, num_minibatches=2, num_epochs=2, optimizer=tiny.sgd(0.05))
        tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, steps=12)
    assert len(asked) == 6  # two epochs of three batches
    assert len({str(each) for each in asked}) > 3


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_ppo_does_not_depend_on_micro_batches(micro_batch_size: int, policy: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"gae_lambda": 0.9, "normalize_advantages": True, "num_epochs": 2, "kl_coef": 0.1}
    options["optimizer"] = tiny.sgd(0.05)
    change, _ = trained(ppo(policy, **options), tmp_path, steps=4)
    other, _ = trained(ppo(policy, micro_batch_size=micro_batch_size, **options), tmp_path, steps=4)
    assert tiny.norm(change) > 1e-3
    tiny.assert_close(change, other, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_epochs": 0}, "num_epochs must be at least 1, got 0"),
        ({"clip_range": 0.0}, "clip_range must be above 0, got 0.0"),
        ({"value_coef": -1.0}, "value_coef must be above 0, got -1.0"),
        ({"gae_lambda": 1.5}, "gae_lambda in"),
    ],
)
def test_ppo_refuses(options: dict[str, Any], message: str, policy: str) -> None:
    with pytest.raises(ValueError, match=message):
        ppo(policy, **options)


@pytest.mark.parametrize("name", ["clip_range", "value_clip_range", "value_coef", "gamma", "gae_lambda"])
def test_every_option_of_ppo_has_an_effect(name: str, policy: str, reward_model: str, tmp_path: Path) -> None:
    def weights(**options: Any) -> dict[str, Tensor]:
        defaults = {"gae_lambda": 0.9, "num_epochs": 3, "optimizer": tiny.sgd(0.2), "max_grad_norm": 1.0}
        given = ppo(policy, reward=ModelReward(reward_model), **{**defaults, **options})
        tiny.fit(given, tiny.prompt_data(tmp_path), tmp_path, steps=3)
        return {**tiny.weights(given.policy), **{f"value.{k}": v for k, v in tiny.weights(given.value_model).items()}}

    other = {"clip_range": 0.01, "value_clip_range": 1e-4, "value_coef": 0.1, "gamma": 0.5, "gae_lambda": 0.1}
    assert tiny.norm(tiny.difference(weights(), weights(**{name: other[name]}))) > 1e-5


def with_kl(policy: str, tmp_path: Path, kind: Any = Reinforce, **control: Any) -> Any:
    other = (
        tiny.save_model(tmp_path / "other", seed=1) if not (tmp_path / "other").exists() else str(tmp_path / "other")
    )
    options = {"kl_coef": 0.5, "reference": ModelSource(path=other), "kl": KLControl(**control)}
    extra = {"baseline": "none"} if kind is Reinforce else {}
    return module(kind, policy, sampling=Sampling(max_new_tokens=8), **options, **extra)


def test_a_kl_of_k2_in_the_loss_is_the_one_step_penalty(policy: str, tmp_path: Path) -> None:
    change, _ = trained(with_kl(policy, tmp_path, estimator="k2", in_loss=True), tmp_path)
    one_step = with_kl(policy, tmp_path)
    one_step.kl_form = "one_step"
    expected, _ = trained(one_step, tmp_path)
    tiny.assert_close(change, expected, atol=1e-5)


@pytest.mark.parametrize("kind", [Reinforce, PPO])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_kl_in_the_loss_has_the_estimators_gradient(kind: Any, estimator: Any, policy: str, tmp_path: Path) -> None:
    given = with_kl(policy, tmp_path, kind, estimator=estimator, in_loss=True)
    assert given.kl.in_loss
    change, _ = trained(given, tmp_path)
    other, _ = trained(with_kl(policy, tmp_path, kind, estimator=estimator), tmp_path)
    assert tiny.norm(tiny.difference(change, other)) > 1e-3


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_kl_in_the_loss_of_ppo_is_not_in_its_rewards_too(estimator: Any, policy: str, tmp_path: Path) -> None:
    control = {"estimator": estimator, "in_loss": True}
    given = with_kl(policy, tmp_path, PPO, **control)
    given.normalize_advantages, given.gae_lambda = False, 1.0  # with values of 0 the first step is REINFORCE's
    change, _ = trained(given, tmp_path)
    expected, _ = trained(with_kl(policy, tmp_path, **control), tmp_path)
    tiny.assert_close(change, expected, atol=1e-5)


def test_ppo_learns_from_rows_without_an_advantage_too(policy: str, tmp_path: Path) -> None:
    """With rewards and values of 0 there is the KL in the loss alone, the same as with a reward of next to 0."""
    changes = []
    for value in ("0", "1e-7"):
        rows = [{"prompt": prompt, "gap": value} for prompt in tiny.PROMPTS]
        given = with_kl(policy, tmp_path, PPO, estimator="k2", in_loss=True)
        given.normalize_advantages = False
        given.reward = FunctionReward("reward_functions.with_gaps")
        tiny.fit(given, tiny.prompt_data(tmp_path, rows), tmp_path)
        changes.append(tiny.weights(given.policy))
    tiny.assert_close(changes[0], changes[1], atol=1e-5)
    untrained = with_kl(policy, tmp_path, PPO)
    untrained.configure_model()
    assert tiny.norm(tiny.difference(changes[0], tiny.weights(untrained.policy))) > 1e-3


def test_estimators_in_the_reward_differ(policy: str, tmp_path: Path) -> None:
    changes = [trained(with_kl(policy, tmp_path, estimator=name), tmp_path)[0] for name in ("k1", "k2", "k3")]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert tiny.norm(tiny.difference(changes[first], changes[second])) > 1e-3
    assert float(kl_k3(torch.tensor(0.0), torch.tensor(1.0))) > 0


def test_an_adaptive_weight_rises_above_the_target_and_falls_below(policy: str, tmp_path: Path) -> None:
    coefs = []
    for target in (1e-3, 1e6):
        given = with_kl(policy, tmp_path, target=target, horizon=50)
        _, history = trained(given, tmp_path, steps=3)
        assert min(history["train/kl"]) > 1e-3
        coefs.append(history["train/kl_coef"])
    rising, falling = coefs
    assert rising == pytest.approx([0.5, 0.5 * 1.02, 0.5 * 1.02**2])  # 20 % times 5 of 50 responses
    assert falling == pytest.approx([0.5, 0.5 * 0.98, 0.5 * 0.98**2])


def test_an_adapted_weight_is_resumed(policy: str, tmp_path: Path) -> None:
    def run(name: str, **options: Any) -> Any:
        given = with_kl(policy, tmp_path, target=1e-3, horizon=50)
        saves = Checkpoint(str(tmp_path / name), every_n_train_steps=1, save_top_k=-1)
        trainer = tiny.trainer(tmp_path, 3, [saves], enable_checkpointing=True)
        trainer.fit(given, datamodule=tiny.prompt_data(tmp_path), **options)
        return given

    whole = run("whole")
    resumed = run("resumed", ckpt_path=str(tmp_path / "whole" / "step=1.ckpt"))
    assert resumed.kl_controller.weight == whole.kl_controller.weight == pytest.approx(0.5 * 1.02**3)
    assert tiny.are_equal(tiny.weights(resumed.policy), tiny.weights(whole.policy))


def test_training_ends_at_the_limit_with_a_checkpoint(policy: str, tmp_path: Path) -> None:
    given = with_kl(policy, tmp_path, limit=1e-3)
    saves = Checkpoint(str(tmp_path / "saves"), every_n_train_steps=50)
    trainer = tiny.trainer(tmp_path, 10, [saves], enable_checkpointing=True)
    with pytest.warns(UserWarning, match="training ends: the mean KL of a response is"):
        trainer.fit(given, datamodule=tiny.prompt_data(tmp_path))
    assert trainer.global_step == 1
    assert [path.name for path in (tmp_path / "saves").glob("*.ckpt")] == ["step=1.ckpt"]


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"in_loss": True}, "k1 in the loss has an expected gradient of 0; set kl.estimator to k2 or k3"),
        ({"target": 0.0}, "kl.target is a KL in nats above 0"),
        ({"limit": -1.0}, "kl.limit is a KL in nats above 0"),
        ({"horizon": 0}, "kl.horizon is a number of responses, at least 1, got 0"),
    ],
)
def test_kl_control_refuses(control: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KLControl(**control)


def test_kl_control_without_a_penalty_is_refused(policy: str) -> None:
    with pytest.raises(ValueError, match="kl says how a KL penalty is taken, but kl_coef is 0"):
        module(Reinforce, policy, kl=KLControl(limit=1.0))


def test_a_horizon_shorter_than_a_step_is_refused(policy: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kl.horizon must be at least the 5 responses of a step, got 2"):
        trained(with_kl(policy, tmp_path, target=1.0, horizon=2), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Reinforce, RLOO, PPO])
def test_a_reward_is_learned(kind: Any, tmp_path: Path) -> None:
    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=1e-2)

    policy = tiny.save_model(tmp_path / "policy", scale=1.0)
    options: dict[str, Any] = {"optimizer": adam, "max_grad_norm": 1.0}
    options["reward"] = FunctionReward("reward_functions.share_of_e")
    given = module(kind, policy, **options)
    data = tiny.prompt_data(tmp_path, [{"prompt": prompt} for prompt in tiny.PROMPTS * 4])
    rewards = tiny.fit(given, data, tmp_path, steps=40)["train/reward"]
    assert sum(rewards[:5]) / 5 < 0.1
    assert sum(rewards[-5:]) / 5 > 0.25
