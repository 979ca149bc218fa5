"""Logits that are not finite: rows of a policy or a reference that cannot be used cost themselves alone."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from remax_lightning.callbacks import SelfCheck
from remax_lightning.models.source import ModelSource
from remax_lightning.modules import PPO, RLOO, Reinforce, ReMax
from remax_lightning.modules.policy_gradient import PolicyGradientModule
from remax_lightning.rewards import FunctionReward
from remax_lightning.rollout import Sampling

NAN = float("nan")
PROMPTS = ["Tell me", "a", "What now.", "Ziggy", "Zoo"]  # with a Z, whose embedding is broken


def saved(folder: Path, *, prompts_with_z: bool = False, seed: int = 0) -> str:
    """A policy without finite logits: none at all, or none after a Z."""
    path = tiny.save_model(folder, seed=seed)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        if prompts_with_z:
            token = tiny.tokenizer().convert_tokens_to_ids("Z")
            model.get_input_embeddings().weight[token] = NAN
            model.lm_head.weight *= 10
            model.lm_head.weight[token] = 0.0  # so it is not drawn
        else:
            model.lm_head.weight[5] = NAN
    model.save_pretrained(path)
    return path


METHODS: list[tuple[type[PolicyGradientModule], dict[str, Any]]] = [
    (ReMax, {}),
    (Reinforce, {"baseline": "batch_mean"}),
    (RLOO, {"sampling": Sampling(6, num_samples=2)}),
    (PPO, {"num_epochs": 2}),
]


def built(method: type[PolicyGradientModule], policy: str, **options: Any) -> PolicyGradientModule:
    defaults: dict[str, Any] = {
        "reward": FunctionReward("reward_functions.letter_values"),
        "sampling": Sampling(6),
        "optimizer": tiny.sgd(0.1),
        "lr_schedule": "constant",
        "kl_coef": 0.1,
    }
    return method(policy=ModelSource(path=policy), **{**defaults, **options})


def trained(method: type[PolicyGradientModule], policy: str, prompts: list[str], folder: Path, **options: Any) -> Any:
    """Weights after a step, those of the broken token apart, and its metrics."""
    module = built(method, policy, **options)
    data = tiny.prompt_data(folder, [{"prompt": prompt} for prompt in prompts])
    history = tiny.fit(module, data, folder, module.updates_per_batch)
    return {name: value.nan_to_num(0.0) for name, value in tiny.weights(module).items()}, history.steps[0]


@pytest.mark.parametrize(("method", "options"), METHODS[:3], ids=lambda each: getattr(each, "__name__", ""))
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_rows_without_finite_logits_are_dropped_and_counted(
    method: type[PolicyGradientModule], options: dict[str, Any], kl_coef: float, tmp_path: Path
) -> None:
    path, options = saved(tmp_path / "policy", prompts_with_z=True), {**options, "kl_coef": kl_coef}
    with pytest.warns(match=r"the policy's logits were not finite for \d+ of \d+ responses, which are dropped"):
        weights, metrics = trained(method, path, PROMPTS, tmp_path, **options)
    expected, others = trained(method, path, PROMPTS[:3], tmp_path, **options)
    assert (metrics["train/rows_dropped"], others["train/rows_dropped"]) == (4 if method is RLOO else 2, 0)
    assert metrics["train/steps_skipped"] == 0
    assert metrics["train/grad_norm"] > 0
    tiny.assert_close(weights, expected)
    assert metrics["train/reward"] == pytest.approx(others["train/reward"])


def test_ppo_learns_from_the_other_rows(tmp_path: Path) -> None:
    path = saved(tmp_path / "policy", prompts_with_z=True)
    value_model = tiny.save_model(tmp_path / "values", seed=1)  # of a sound model
    options = {**METHODS[3][1], "value_model": ModelSource(path=value_model)}
    before = AutoModelForCausalLM.from_pretrained(path).lm_head.weight
    weights, metrics = trained(PPO, path, PROMPTS, tmp_path, **options)
    assert metrics["train/rows_dropped"] == 2
    assert metrics["train/steps_skipped"] == 0
    assert not torch.equal(weights["policy.lm_head.weight"], before)
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda each: getattr(each, "__name__", ""))
def test_a_policy_without_any_finite_logits_ends_the_run(
    method: type[PolicyGradientModule], options: dict[str, Any], tmp_path: Path
) -> None:
    module = built(method, saved(tmp_path / "policy"), **options)
    history = tiny.History()
    with pytest.raises(RuntimeError, match=r"10 steps in a row .*: the policy's logits are not finite, so its weights"):
        tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, 30, callbacks=[history])
    assert all(each == 1 for each in history["train/steps_skipped"])


def test_other_reasons_to_skip_do_not_blame_the_weights(policy: str, tmp_path: Path) -> None:
    module = built(ReMax, policy, reward=lambda prompts, responses: [None] * len(responses))
    with pytest.raises(RuntimeError, match=r"10 steps in a row .* look at the rewards"):
        tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, 30)


def test_a_reference_without_finite_log_probs_is_said(policy: str, tmp_path: Path) -> None:
    broken = saved(tmp_path / "reference", prompts_with_z=True, seed=1)
    reference, rows = ModelSource(path=broken), [{"prompt": prompt} for prompt in PROMPTS]
    module = built(ReMax, policy, reference=reference)
    with pytest.warns(match="the reference's log-probs were not finite for 2 of 5 responses, which are dropped"):
        history = tiny.fit(module, tiny.prompt_data(tmp_path, rows), tmp_path)
    assert (history["train/rows_dropped"], history["train/steps_skipped"]) == ([2.0], [0.0])
    with pytest.raises(ValueError, match="self-check: the reference's log-probs are not finite"):
        tiny.fit(
            built(ReMax, policy, reference=reference),
            tiny.prompt_data(tmp_path, rows),
            tmp_path,
            callbacks=[SelfCheck()],
        )


def test_the_self_check_refuses_a_policy_without_finite_logits(tmp_path: Path) -> None:
    module = built(ReMax, saved(tmp_path / "policy"))
    with pytest.raises(ValueError, match="self-check: the policy's logits are not finite for 10 of 10 responses"):
        tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, callbacks=[SelfCheck()])
    assert module.global_step == 0


def test_evaluation_leaves_such_rows_out_and_predictions_have_none(tmp_path: Path) -> None:
    module = built(
        ReMax, saved(tmp_path / "policy", prompts_with_z=True), judge=FunctionReward("reward_functions.halves")
    )
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    source = tiny.write_rows(tmp_path / "held_out.jsonl", rows)
    data = tiny.prompt_data(tmp_path, rows, validation=source, predict=source)
    trainer = tiny.trainer(tmp_path)
    with pytest.warns(match="the policy's logits were not finite"):
        (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
    found = {name: metrics[f"val/{name}"] for name in ("reward", "judge_reward", "kl", "win_rate")}
    assert all(value == value for value in found.values()), found
    assert found["kl"] == pytest.approx(0, abs=1e-4)
    with pytest.warns(match=r"logits are not finite for 2 of 5 prompts, whose responses are null"):
        (predicted,) = trainer.predict(module, datamodule=data)
    assert [row["response"] is None for row in predicted] == [False, False, False, True, True]
