"""What a method of one's own may define, and what it is told if it returns the wrong thing."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from remax_lightning import PPO, RLOO, SFT, FunctionReward, Loss, PolicyGradientModule, Reinforce, ReMax, RewardModel
from remax_lightning.modules.base import TrainableModule
from remax_lightning.modules.baseline import BaselineModule
from remax_lightning.rollout import Rollout, Sampling


class Centered(PolicyGradientModule):
    """The smallest method: rewards less their mean over the prompt's responses."""

    min_samples = 2

    def advantages(self, rollout: Rollout) -> Tensor:
        groups = rollout.rewards.view(-1, self.sampling.num_samples)
        return (groups - groups.mean(dim=1, keepdim=True)).view(-1, 1) * rollout.response_mask


def module(cls: type[PolicyGradientModule], policy: str, **options: Any) -> PolicyGradientModule:
    defaults = {"sampling": Sampling(8, num_samples=2), "kl_coef": 0.0, "optimizer": tiny.sgd(), "max_grad_norm": None}
    reward = FunctionReward("reward_functions.letter_values")
    return cls(policy=policy, reward=reward, **{**defaults, **options})


def test_a_method_is_its_advantages(policy: str, tmp_path: Path) -> None:
    """Of two responses, the reward less the mean is half of RLOO's advantage."""
    half, full = module(Centered, policy, optimizer=tiny.sgd(2.0)), module(RLOO, policy)
    for each in (half, full):
        tiny.fit(each, tiny.prompt_data(tmp_path), tmp_path, steps=2)
    tiny.assert_close(tiny.weights(half.policy), tiny.weights(full.policy))
    with pytest.raises(ValueError, match=r"Centered compares .*num_samples must be at least 2, got 1"):
        module(Centered, policy, sampling=Sampling(8))


def wrong(name: str, value: Any) -> type[PolicyGradientModule]:
    return type("Wrong", (Centered,), {name: lambda self, *args: value(*args)})


def drop_column(rollout: Rollout) -> Tensor:
    return torch.zeros(len(rollout.rewards), rollout.response_mask.shape[1] + 1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("collect", lambda batch: None, "collect must return a Rollout with rewards and baselines, got NoneType"),
        ("advantages", lambda rollout: None, r"advantages must return a tensor of the shape \(10, .*got NoneType"),
        ("advantages", lambda rollout: rollout.rewards, r"a weight for each response token, \(10, \d+\), got \(10,\)"),
        ("advantages", drop_column, r"a weight for each response token"),
        (
            "losses",
            lambda *args: torch.zeros(()),
            r"losses must yield a Loss .*, got Tensor; write yield Loss\(value\)",
        ),
        ("losses", lambda *args: None, r"losses must yield a Loss .*, got NoneType"),
        ("losses", lambda *args: iter([torch.zeros(())]), r"losses must yield Loss\(value, .*\), got Tensor"),
    ],
)
def test_a_hook_that_returns_the_wrong_thing_gets_a_sentence(
    name: str, value: Any, message: str, policy: str, tmp_path: Path
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tiny.fit(module(wrong(name, value), policy), tiny.prompt_data(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": None}, "collect must set rewards and baselines; rewards is NoneType, not a tensor"),
        ({"baselines": torch.zeros(3)}, r"one of baselines for each of 10 responses, got the shape \(3,\)"),
    ],
)
def test_a_rollout_that_is_incomplete_gets_a_sentence(
    changes: dict[str, Any], message: str, policy: str, tmp_path: Path
) -> None:
    class Incomplete(Centered):
        def collect(self, batch: dict[str, Any]) -> Rollout:
            return Rollout(**{**vars(super().collect(batch)), **changes})

    with pytest.raises((TypeError, ValueError), match=message):
        tiny.fit(module(Incomplete, policy), tiny.prompt_data(tmp_path), tmp_path)


def test_metrics_of_a_loss_are_logged_and_drift_needs_log_probs(policy: str, tmp_path: Path) -> None:
    class Own(Centered):
        def losses(self, rollout: Rollout, advantages: Tensor, num_tokens: Tensor) -> Iterator[Loss]:
            for loss in super().losses(rollout, advantages, num_tokens):
                yield Loss(loss.value, metrics={"weight": advantages[rollout.response_mask].abs()})

    history = tiny.fit(module(Own, policy, micro_batch_size=3), tiny.prompt_data(tmp_path), tmp_path)
    assert history["train/weight"][0] > 0
    assert "train/log_prob_drift" not in history.steps[0]
    with pytest.raises(ValueError, match="max_log_prob_drift needs the log-probs of training: losses must yield"):
        tiny.fit(module(Own, policy, max_log_prob_drift=1.0), tiny.prompt_data(tmp_path), tmp_path)


@pytest.mark.parametrize("cls", [ReMax, Reinforce, RLOO, PPO, SFT, RewardModel])
def test_arguments_stand_in_the_open(cls: type) -> None:
    parameters = inspect.signature(cls).parameters.values()
    assert not [each for each in parameters if each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    assert {"optimizer", "lr_schedule", "micro_batch_size", "lora"} <= {each.name for each in parameters}


def test_an_unknown_argument_names_the_class_and_the_nearest_one(policy: str) -> None:
    with pytest.raises(TypeError, match=r"ReMax has no argument kl_coeff; did you mean kl_coef\?"):
        ReMax(policy=policy, kl_coeff=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"SFT has no argument xyz; it has policy, sampling, "):
        SFT(policy=policy, xyz=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="reward"):
        ReMax(policy=policy)  # type: ignore[call-arg]


def test_a_function_is_a_reward_and_a_name_or_a_loaded_model_is_a_policy(policy: str, tmp_path: Path) -> None:
    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        return [float(len(response)) for response in responses]

    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(policy)
    before = tiny.weights(loaded)
    trained = []
    for given in (policy, loaded):
        options = {"sampling": Sampling(8), "kl_coef": 0.1, "optimizer": tiny.sgd(0.1)}
        trained.append(ReMax(policy=given, reward=reward, **options))
        tiny.fit(trained[-1], tiny.prompt_data(tmp_path), tmp_path, steps=2)
    assert tiny.are_equal(*(tiny.weights(each.policy) for each in trained))
    assert trained[1].policy is loaded
    assert not tiny.are_equal(before, tiny.weights(loaded))
    for given, error in ((3, "got int"), (torch.nn.Linear(1, 1), "got Linear")):
        with pytest.raises(TypeError, match=f"a model is given as a folder or hub name, .*{error}"):
            ReMax(policy=given, reward=reward, sampling=Sampling(8))  # type: ignore[arg-type]


def test_a_loaded_model_is_refused_where_it_cannot_be_trained_right(policy: str) -> None:
    options = {"reward": lambda prompts, responses: [0.0], "sampling": Sampling(8)}
    dropout = tiny.language_model("gpt2", resid_pdrop=0.1)
    dropout.name_or_path = policy
    with pytest.raises(
        ValueError, match=r"trained without dropout, but the loaded GPT2LMHeadModel has .*'resid_pdrop'"
    ):
        ReMax(policy=dropout, **options)
    with pytest.raises(ValueError, match="LlamaForCausalLM does not say where its tokenizer is; give ModelSource"):
        ReMax(policy=tiny.language_model(), **options)


@pytest.mark.parametrize("cls", [PolicyGradientModule, BaselineModule, ReMax, Reinforce, RLOO, PPO, SFT, RewardModel])
def test_an_argument_has_the_same_default_wherever_it_is_written(cls: type) -> None:
    """Each constructor lists the arguments of those above it; only the optimizer's rates are a method's own."""
    own = inspect.signature(cls).parameters
    for base in cls.__mro__[1 : cls.__mro__.index(TrainableModule) + 1]:
        for name, parameter in inspect.signature(base).parameters.items():
            if name in own and name != "optimizer":
                assert own[name].default == parameter.default, f"{cls.__name__} and {base.__name__}: {name}"
