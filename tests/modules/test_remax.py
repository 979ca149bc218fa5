"""ReMax's update against one written out by hand, token by token, for every option."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from reward_functions import letter_value
from tiny import PROMPTS, STOPS
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from remax_lightning.data import PromptDataModule
from remax_lightning.models import reference as references
from remax_lightning.models.source import ModelSource
from remax_lightning.rewards import FunctionReward
from remax_lightning.rollout import Rollout, Sampling, TransformersEngine

LENGTH = 12


def responses(rollout: Rollout) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]


def chosen_log_probs(model: PreTrainedModel, prompt: list[int], response: list[int], temperature: float) -> Tensor:
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[range(len(response)), response]


def gradient_by_hand(
    policy: str,
    sampling: Sampling,
    reference: str | None = None,
    kl_coef: float = 0.0,
    kl_form: str = "full_step",
    gamma: float = 1.0,
    reward_clip: float | None = None,
    missing_stop_penalty: float = 0.0,
    greedy_max_new_tokens: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Gradient of the loss, prompt by prompt, unpadded, in transformers' own forward pass."""
    model, words = AutoModelForCausalLM.from_pretrained(policy).eval(), AutoTokenizer.from_pretrained(policy)
    other = None if reference is None else AutoModelForCausalLM.from_pretrained(reference).eval()

    def worth(tokens: list[int]) -> float:
        missing = tokens[-1] not in STOPS
        return letter_value(words.decode(tokens, skip_special_tokens=True)) - missing_stop_penalty * missing

    total, count = torch.zeros(()), 0
    for index, prompt in enumerate(PROMPTS):
        ids = words(prompt)["input_ids"]
        batch = {
            "prompt_ids": torch.tensor([ids]),
            "prompt_mask": torch.ones(1, len(ids), dtype=torch.bool),
            "prompt_index": torch.tensor([index]),
        }
        sampled, greedy = TransformersEngine().sample_and_greedy(
            model, batch, sampling, stop_token_ids=STOPS, greedy_max_new_tokens=greedy_max_new_tokens, seed=seed
        )
        baseline = worth(responses(greedy)[0])
        for tokens in responses(sampled):
            advantage = worth(tokens) - baseline
            if reward_clip is not None:
                advantage = min(max(advantage, -reward_clip), reward_clip)
            log_probs = chosen_log_probs(model, ids, tokens, sampling.temperature)
            penalty = [0.0] * len(tokens)
            if other is not None:
                with torch.no_grad():
                    kl = (log_probs - chosen_log_probs(other, ids, tokens, sampling.temperature)).tolist()
                penalty = [sum(kl[t:]) if kl_form == "full_step" else kl[t] for t in range(len(tokens))]
            for t in range(len(tokens)):
                weight = advantage * gamma ** (len(tokens) - t) - kl_coef * penalty[t]
                total = total + weight * log_probs[t]
            count += len(tokens)
    (-total / count).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def step(policy: str, folder: Path, data: PromptDataModule | None = None, **options: Any) -> dict[str, Tensor]:
    """What one step of plain gradient descent with a rate of 1 takes from the weights."""
    module = tiny.remax(policy, **options)
    module.configure_model()
    before = tiny.weights(module.policy)
    tiny.fit(module, data or tiny.prompt_data(folder), folder)
    return tiny.difference(before, tiny.weights(module.policy))


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "gamma": {"gamma": 0.8},
    "reward_clip": {"reward_clip": 0.5},
    "missing_stop_penalty": {"missing_stop_penalty": 3.0},
    "greedy_max_new_tokens": {"greedy_max_new_tokens": 3},
    "num_samples": {"sampling": Sampling(LENGTH, num_samples=3)},
    "temperature": {"sampling": Sampling(LENGTH, temperature=0.7)},
    "seed": {"seed": 5},
    "full_step": {"kl_coef": 0.5, "kl_form": "full_step"},
    "one_step": {"kl_coef": 0.5, "kl_form": "one_step"},
    "all": {
        "kl_coef": 0.3,
        "gamma": 0.9,
        "reward_clip": 1.0,
        "missing_stop_penalty": 0.5,
        "greedy_max_new_tokens": 6,
        "sampling": Sampling(LENGTH, temperature=0.7, num_samples=2),
    },
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_the_update_is_the_one_by_hand(policy: str, other: str, tmp_path: Path, name: str) -> None:
    options = OPTIONS[name]
    reference = other if "kl_coef" in options else None
    by_hand = {"sampling": Sampling(LENGTH), "reference": reference, **options}
    expected = gradient_by_hand(policy, **by_hand)
    source = None if reference is None else ModelSource(path=reference)
    taken = step(policy, tmp_path, reference=source, **options)
    assert tiny.norm(expected) > 0.1
    tiny.assert_close(taken, expected)
    if name != "nothing":
        without = gradient_by_hand(policy, Sampling(LENGTH))
        assert tiny.norm(tiny.difference(expected, without)) > 0.01 * tiny.norm(without)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_the_update_is_the_one_by_hand_for_other_architectures(tmp_path: Path, architecture: str) -> None:
    policy = tiny.save_model(tmp_path / "policy", architecture)
    tiny.assert_close(step(policy, tmp_path), gradient_by_hand(policy, Sampling(LENGTH)))


def test_pad_equal_to_eos_changes_nothing(policy: str, tmp_path: Path) -> None:
    padded = tiny.save_model(tmp_path / "pad_is_eos", pad_is_eos=True)
    assert tiny.are_equal(step(policy, tmp_path), step(padded, tmp_path))


def test_one_step_and_full_step_differ(policy: str, other: str) -> None:
    full, one = (
        gradient_by_hand(policy, Sampling(LENGTH), other, kl_coef=0.5, kl_form=form)
        for form in ("full_step", "one_step")
    )
    assert tiny.norm(tiny.difference(full, one)) > 0.01


def test_identical_pairs_teach_nothing(policy: str, tmp_path: Path) -> None:
    module = tiny.remax(policy, sampling=Sampling(LENGTH, temperature=1e-4))
    module.configure_model()
    before = tiny.weights(module.policy)
    history = tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path)
    assert history["train/identical_pairs"] == [1.0]
    assert history["train/advantage_mean"] == [0.0]
    assert history["train/reward"] == history["train/baseline_reward"]
    assert tiny.are_equal(before, tiny.weights(module.policy))


def test_without_kl_coef_no_reference_is_loaded(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a reference was loaded")

    monkeypatch.setattr(references, "frozen_copy", refuse)
    module = tiny.remax(policy)
    history = tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path)
    assert module.reference is None
    assert "train/kl" not in history.steps[0]


def test_a_reference_without_kl_coef_is_refused(policy: str, other: str) -> None:
    with pytest.raises(ValueError, match="a reference was given but kl_coef is 0"):
        tiny.remax(policy, reference=ModelSource(path=other))


@pytest.mark.parametrize("given", [False, True])
def test_the_reference_stays_as_it_is(policy: str, other: str, tmp_path: Path, given: bool) -> None:
    module = tiny.remax(policy, kl_coef=0.1, reference=ModelSource(path=other) if given else None)
    module.configure_model()
    assert module.reference is not None
    before = tiny.weights(module.reference.model)
    history = tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, steps=3)
    assert tiny.are_equal(before, tiny.weights(module.reference.model))
    assert not tiny.are_equal(before, tiny.weights(module.policy))
    assert not any(parameter.requires_grad for parameter in module.reference.model.parameters())
    assert not any(name.startswith("reference") for name in module.state_dict())
    assert abs(history["train/kl"][0]) < 1e-4 if not given else abs(history["train/kl"][0]) > 0.1
    assert abs(history["train/kl"][2]) > 1e-3


def test_kl_is_that_of_the_sampled_responses(policy: str, other: str, tmp_path: Path) -> None:
    module = tiny.remax(policy, kl_coef=0.1, reference=ModelSource(path=other))
    history = tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path)
    model, words = AutoModelForCausalLM.from_pretrained(policy).eval(), AutoTokenizer.from_pretrained(policy)
    reference = AutoModelForCausalLM.from_pretrained(other).eval()
    values = []
    for index, prompt in enumerate(PROMPTS):
        ids = words(prompt)["input_ids"]
        batch = {
            "prompt_ids": torch.tensor([ids]),
            "prompt_mask": torch.ones(1, len(ids)),
            "prompt_index": torch.tensor([index]),
        }
        sampled = TransformersEngine().sample(model, batch, Sampling(LENGTH), stop_token_ids=STOPS)
        tokens = responses(sampled)[0]
        with torch.no_grad():
            values.append(
                (chosen_log_probs(model, ids, tokens, 1.0) - chosen_log_probs(reference, ids, tokens, 1.0)).sum()
            )
    assert history["train/kl"][0] == pytest.approx(float(torch.stack(values).mean()), abs=1e-4)


def test_win_rate_of_the_unchanged_policy_is_one_half_and_validation_repeats(policy: str, tmp_path: Path) -> None:
    data = tiny.prompt_data(tmp_path)
    data.sources["validation"] = data.sources["train"]
    module = tiny.remax(policy, kl_coef=0.1)
    trainer = tiny.trainer(tmp_path)
    first = trainer.validate(module, data, verbose=False)[0]
    second = trainer.validate(module, data, verbose=False)[0]
    assert first == second
    assert first["val/win_rate"] == 0.5
    assert abs(first["val/kl"]) < 1e-4
    names = {"reward", "baseline_reward", "response_length", "truncated", "kl", "win_rate"}
    assert {f"val/{name}" for name in names} == set(first)


def test_validation_does_not_depend_on_the_batch_size(policy: str, other: str, tmp_path: Path) -> None:
    results = []
    for size in (1, 2, 5):
        data = tiny.prompt_data(tmp_path, eval_batch_size=size)
        data.sources["validation"] = data.sources["train"]
        module = tiny.remax(policy, kl_coef=0.1, reference=ModelSource(path=other), micro_batch_size=2)
        results.append(tiny.trainer(tmp_path).validate(module, data, verbose=False)[0])
    for result in results[1:]:
        assert result == pytest.approx(results[0], abs=1e-4)


def test_the_judge_decides_who_wins(policy: str, other: str, tmp_path: Path) -> None:
    results = {}
    for judge in ("halves", "constant", None):
        data = tiny.prompt_data(tmp_path)
        data.sources["validation"] = data.sources["train"]
        chosen = None if judge is None else FunctionReward(f"reward_functions.{judge}")
        module = tiny.remax(policy, kl_coef=0.1, reference=ModelSource(path=other), judge=chosen)
        results[judge] = tiny.trainer(tmp_path).validate(module, data, verbose=False)[0]
    assert results["constant"]["val/judge_reward"] == 1.0
    assert results["constant"]["val/win_rate"] == 0.5
    assert results["halves"]["val/judge_reward"] > 1.0
    assert "val/judge_reward" not in results[None]
    assert len({result["val/reward"] for result in results.values()}) == 1
    assert len({result["val/win_rate"] for result in results.values()}) > 1


def test_the_judge_does_not_train(policy: str, tmp_path: Path) -> None:
    judged = step(policy, tmp_path, judge=FunctionReward("reward_functions.halves"))
    assert tiny.are_equal(judged, step(policy, tmp_path))


def test_test_rows_hold_both_policies(policy: str, other: str, tmp_path: Path) -> None:
    module = tiny.remax(
        policy, kl_coef=0.1, reference=ModelSource(path=other), judge=FunctionReward("reward_functions.halves")
    )
    data = tiny.prompt_data(tmp_path, [{"prompt": prompt, "answer": "x"} for prompt in PROMPTS])
    data.sources["test"] = data.sources["train"]
    data.eval_batch_size = 3
    recorder = Rows()
    result = tiny.trainer(tmp_path, callbacks=[recorder]).test(module, data, verbose=False)[0]
    rows = recorder.rows
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["answer"] for row in rows] == ["x"] * len(PROMPTS)
    for row in rows:
        assert row["reward"] == pytest.approx(letter_value(row["response"]), abs=1e-5)
        assert row["reference_reward"] == pytest.approx(letter_value(row["reference_response"]), abs=1e-5)
        assert row["judge_reward"] == 0.5 * len(row["response"])
        score, against = row["judge_reward"], row["reference_judge_reward"]
        assert row["win_rate"] == (0.5 if score == against else float(score > against))
    for name in ("reward", "judge_reward", "win_rate", "kl", "response_length", "truncated"):
        assert result[f"test/{name}"] == pytest.approx(sum(row[name] for row in rows) / len(rows), abs=1e-5)


def test_the_reference_answers_the_test_prompts_after_a_validation(policy: str, other: str, tmp_path: Path) -> None:
    module = tiny.remax(policy, kl_coef=0.1, reference=ModelSource(path=other))
    data = tiny.prompt_data(tmp_path)
    data.sources["validation"] = data.sources["train"]
    fresh = tiny.prompt_data(tmp_path, [{"prompt": "Another"}, {"prompt": "Something else"}])
    fresh.sources["test"] = fresh.sources["train"]
    trainer = tiny.trainer(tmp_path)
    expected = trainer.test(tiny.remax(policy, kl_coef=0.1, reference=ModelSource(path=other)), fresh, verbose=False)
    trainer.validate(module, data, verbose=False)
    rows = Rows()
    tiny.trainer(tmp_path, callbacks=[rows]).test(module, fresh, verbose=False)
    alone = Rows()
    again = tiny.remax(policy, kl_coef=0.1, reference=ModelSource(path=other))
    assert tiny.trainer(tmp_path, callbacks=[alone]).test(again, fresh, verbose=False) == expected
    assert [row["reference_response"] for row in rows.rows] == [row["reference_response"] for row in alone.rows]


def test_predict_gives_a_sampled_and_the_greedy_response(policy: str, tmp_path: Path) -> None:
    data = tiny.prompt_data(tmp_path)
    data.sources["predict"] = data.sources["train"]
    predictions = tiny.trainer(tmp_path).predict(tiny.remax(policy), data)
    model, words = AutoModelForCausalLM.from_pretrained(policy).eval(), AutoTokenizer.from_pretrained(policy)
    assert predictions is not None
    for row, prompt in zip(predictions[0], PROMPTS, strict=True):
        ids = torch.tensor([words(prompt)["input_ids"]])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False)
        assert row["prompt"] == prompt
        assert row["greedy_response"] == words.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert any(row["response"] != row["greedy_response"] for row in predictions[0])


def test_a_reward_is_learned(tmp_path: Path) -> None:
    policy = tiny.save_model(tmp_path / "policy", scale=1.0)
    data = tiny.prompt_data(tmp_path, [{"prompt": prompt} for prompt in PROMPTS * 4])
    module = tiny.remax(
        policy,
        "share_of_e",
        sampling=Sampling(8),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0),
    )
    rewards = tiny.fit(module, data, tmp_path, steps=30)["train/reward"]
    assert sum(rewards[:5]) / 5 < 0.1
    assert sum(rewards[-5:]) / 5 > 0.25


class Rows(tiny.Callback):
    """The rows that a test gave."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_test_batch_end(self, trainer: object, module: object, outputs: Any, *args: object) -> None:
        self.rows += outputs["rows"]


def test_a_reference_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    policy, other = tiny.save_model(tmp_path / "policy"), tiny.save_model(tmp_path / "other")
    words = AutoTokenizer.from_pretrained(other)
    words.add_tokens(["\u00a7"])
    words.save_pretrained(other)
    with pytest.raises(ValueError, match="the reference's tokenizer is not the policy's"):
        tiny.remax(policy, kl_coef=0.1, reference=ModelSource(path=other))
