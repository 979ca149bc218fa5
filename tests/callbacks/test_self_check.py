from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoTokenizer

from remax_lightning.callbacks import SelfCheck
from remax_lightning.callbacks.self_check import CHECKS
from remax_lightning.models.source import ModelSource
from remax_lightning.modules import ReMax
from remax_lightning.rewards import ModelReward, Reward
from remax_lightning.rollout import Sampling, TransformersEngine


def check(module: ReMax, folder: Path, *, prompts: dict[str, Any] | None = None, **options: Any) -> tiny.History:
    data = tiny.prompt_data(folder, **(prompts or {}))
    return tiny.fit(module, data, folder, callbacks=[SelfCheck(**options)])


def trips(name: str, message: str, module: ReMax, folder: Path, **options: Any) -> None:
    """A check fails before the first step with a message, and does not once it is left out."""
    with pytest.raises(ValueError, match=message) as error:
        check(module, folder, **options)
    assert str(error.value).startswith("self-check: ")
    assert module.trainer.global_step == 0
    check(module, folder, skip=[name], **options)
    assert module.trainer.global_step == 1
    check(module, folder, enabled=False, **options)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_sound_run_passes(architecture: str, precision: str, tmp_path: Path) -> None:
    path = tiny.save_model(tmp_path / "policy", architecture)
    reward = ModelReward(tiny.save_reward_model(tmp_path / "reward"))
    module = tiny.remax(path, reward, kl_coef=0.1, sampling=Sampling(12, temperature=0.7))
    prompts = {"max_prompt_length": 64}
    history = tiny.fit(
        module, tiny.prompt_data(tmp_path, **prompts), tmp_path, callbacks=[SelfCheck()], precision=precision
    )
    assert len(history.steps) == 1


def test_it_changes_nothing(policy: str, tmp_path: Path) -> None:
    trained = []
    for enabled in (True, False):
        module = tiny.remax(policy, kl_coef=0.1)
        check(module, tmp_path, enabled=enabled)
        trained.append(tiny.weights(module.policy))
    assert tiny.are_equal(*trained)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_is_checked_and_not_used_up(policy: str, tmp_path: Path, num_workers: int) -> None:
    trained = []
    for enabled in (True, False):
        module = tiny.remax(policy, kl_coef=0.1)
        stream = {"streaming": True, "shuffle_window": 3, "batch_size": 2, "num_workers": num_workers}
        data = tiny.prompt_data(tmp_path, **stream)
        history = tiny.fit(module, data, tmp_path, steps=3, callbacks=[SelfCheck(enabled=enabled)])
        trained.append(tiny.weights(module.policy))
        assert len(history.steps) == 3
    assert tiny.are_equal(*trained)


def test_context(tmp_path: Path) -> None:
    path = tiny.save_model(tmp_path / "policy", "gpt2")
    module = tiny.remax(path)
    trips("context", "128 positions, but data.max_prompt_length=512 and .*max_new_tokens=12 make 524", module, tmp_path)
    check(tiny.remax(path), tmp_path, prompts={"max_prompt_length": 116})


def test_padding(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny.remax(policy)
    module.configure_model()
    forward = module.policy.forward

    def blind(**inputs: Any) -> Any:
        mask = inputs.get("attention_mask")
        return forward(**{**inputs, "attention_mask": None if mask is None else torch.ones_like(mask)})

    monkeypatch.setattr(module.policy, "forward", blind)
    data = {"rows": [{"prompt": "Tell me"}, {"prompt": "Sing it"}]}
    with pytest.raises(ValueError, match="self-check: padding changes the log-probs by"):
        check(module, tmp_path, prompts=data)


def test_sampler(policy: str, tmp_path: Path) -> None:
    class WrongTemperature(TransformersEngine):
        def sample_and_greedy(self, policy: Any, batch: Any, sampling: Sampling, **options: Any) -> Any:
            return super().sample_and_greedy(
                policy, batch, Sampling(sampling.max_new_tokens, temperature=2.0), **options
            )

    module = tiny.remax(policy, engine=WrongTemperature())
    trips("sampler", "the sampler's log-probs differ from those of training by", module, tmp_path)


def test_reference(policy: str, tmp_path: Path) -> None:
    module = tiny.remax(policy, kl_coef=0.1)
    module.configure_model()
    with torch.no_grad():
        module.policy.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    trips("reference", "the reference differs from the policy by", module, tmp_path)
    other = tiny.save_model(tmp_path / "other", seed=1)
    check(tiny.remax(policy, kl_coef=0.1, reference=ModelSource(path=other)), tmp_path)


def test_stop_token(policy: str, tmp_path: Path) -> None:
    module = tiny.remax(policy)
    module.configure_model()
    forward = module.policy.forward

    def endless(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = output.logits.index_fill(-1, torch.tensor(tiny.STOPS), -1e4)
        return output

    module.policy.forward = endless
    trips("stop_token", r"no stop token of .* has a log-prob above", module, tmp_path)
    module = tiny.remax(policy)
    module.configure_model()
    module.responder = replace(module.responder, stop_token_ids=[1000])
    trips("stop_token", r"the stop tokens \[1000\] are beyond the model's vocabulary", module, tmp_path)


def test_double_bos(policy: str, tmp_path: Path) -> None:
    path = tiny.save_reward_model(tmp_path / "reward")
    words = AutoTokenizer.from_pretrained(path)
    words.bos_token = "<eos>"
    words.chat_template = "<eos><eos>{% for m in messages %}{{ m.content }}{% endfor %}"
    words.save_pretrained(path)
    module = tiny.remax(policy, ModelReward(path, as_chat=True))
    trips("double_bos", "begin with two BOS tokens", module, tmp_path)


class Fixed(Reward):
    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, prompts: Any, responses: Any, **columns: Any) -> Tensor:
        return torch.full((len(responses),), self.value)


def test_rewards(policy: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="self-check: none of 10 rewards is finite; fix the reward"):
        check(tiny.remax(policy, Fixed(float("nan"))), tmp_path)


def test_a_row_without_a_reward_is_a_warning(policy: str, tmp_path: Path) -> None:
    class Gap(Reward):
        def __call__(self, prompts: Any, responses: Any, **columns: Any) -> Tensor:
            return torch.tensor([float("nan"), *(float(len(response)) for response in responses[1:])])

    with pytest.warns(match="self-check: 2 of 10 rewards are not finite"):
        check(tiny.remax(policy, Gap()), tmp_path)


def test_a_reward_that_raises_shows_its_own_error(policy: str, tmp_path: Path) -> None:
    class Broken(Reward):
        def __call__(self, prompts: Any, responses: Any, **columns: Any) -> Tensor:
            raise KeyError("no such column")

    with pytest.raises(KeyError, match="no such column"):
        check(tiny.remax(policy, Broken()), tmp_path)


def test_a_reward_that_is_not_one_number_for_each_response_is_refused(policy: str, tmp_path: Path) -> None:
    class Mean(Reward):
        def __call__(self, prompts: Any, responses: Any, **columns: Any) -> Tensor:
            return torch.tensor(1.0)

    with pytest.raises(ValueError, match=r"Mean must return one reward a response: 5, got the shape \(\)"):
        check(tiny.remax(policy, Mean()), tmp_path)


def test_equal_rewards(policy: str, tmp_path: Path) -> None:
    trips(
        "equal_rewards", "all 10 rewards are 2, from which nothing is learned", tiny.remax(policy, Fixed(2.0)), tmp_path
    )


def test_num_prompts_and_max_new_tokens_bound_what_is_drawn(policy: str, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    class Counting(Fixed):
        def __call__(self, prompts: Any, responses: Any, **columns: Any) -> Tensor:
            seen.append(list(responses))
            return super().__call__(prompts, responses)

    module = tiny.remax(policy, Counting(1.0))
    check(module, tmp_path, num_prompts=2, max_new_tokens=3, skip=["equal_rewards"])
    drawn = seen[0]
    assert len(drawn) == 2
    assert all(len(module.tokenizer(text)["input_ids"]) <= 3 for text in drawn)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"skip takes names of checks, context, .*; got paddings"):
        SelfCheck(skip=["paddings"])
    assert len(CHECKS) == 9
