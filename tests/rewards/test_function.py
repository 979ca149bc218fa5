import math
from pathlib import Path

import pytest
import reward_functions
import torch

from remax_lightning.rewards import FunctionReward, as_reward


def test_scores_are_the_functions() -> None:
    reward = FunctionReward("reward_functions.halves")
    rewards = reward(["p", "q", "r"], ["a", "bcd", ""])
    assert rewards.tolist() == [0.5, 1.5, 0.0]
    assert rewards.dtype == torch.float32


def test_a_named_column_is_given_and_others_are_not() -> None:
    reward = FunctionReward("reward_functions.matches")
    rewards = reward(["p", "q"], ["yes", "no"], answer=["yes", "yes"], source=["x", "y"])
    assert rewards.tolist() == [1.0, 0.0]


def test_a_function_with_columns_gets_all_of_them() -> None:
    reward_functions.seen.clear()
    FunctionReward("reward_functions.record_all")(["p"], ["a"], answer=["b"], source=[3])
    assert reward_functions.seen == [{"prompts": ["p"], "responses": ["a"], "answer": ["b"], "source": [3]}]


def test_messages_are_given_as_they_stand() -> None:
    reward_functions.seen.clear()
    prompt = [{"role": "user", "content": "Hello"}]
    FunctionReward("reward_functions.record_all")([prompt], ["a"])
    assert reward_functions.seen[0]["prompts"] == [prompt]


def test_a_named_column_that_the_data_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"needs the columns answer, .* it has prompts, responses, topic"):
        FunctionReward("reward_functions.matches")(["p"], ["yes"], topic=["a"])


def test_none_becomes_not_a_number() -> None:
    rewards = FunctionReward("reward_functions.some_none")(["p", "q"], ["", "a"]).tolist()
    assert math.isnan(rewards[0])
    assert rewards[1] == 2.0


def test_a_wrong_number_of_rewards_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reward_functions.too_few must return one reward a response: 3, got 2"):
        FunctionReward("reward_functions.too_few")(["p"] * 3, ["a"] * 3)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module.reward", "no_such_module.reward cannot be imported: No module named 'no_such_module'"),
        ("reward_functions.no_such_function", "reward_functions has no no_such_function"),
        ("reward_functions.not_a_function", "is given as my_rewards.exact_match or path/to/file.py:exact_match"),
        ("exact_match", "is given as my_rewards.exact_match or path/to/file.py:exact_match"),
        ("reward_functions.without_prompts", "needs the parameters prompts and responses"),
        ("os.system", "needs the parameters prompts and responses"),
        ("builtins.dict", "no Python function with the parameters prompts and responses"),
    ],
)
def test_what_is_no_reward_function_is_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FunctionReward(path).check()


def test_a_function_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "my_rewards.py"
    file.write_text("def length(prompts, responses):\n    return [len(each) for each in responses]\n")
    assert FunctionReward(f"{file}:length")(["p", "q"], ["abc", ""]).tolist() == [3.0, 0.0]
    with pytest.raises(ValueError, match=r"cannot be imported: .*my_rewards.py has no other"):
        FunctionReward(f"{file}:other").check()
    with pytest.raises(ValueError, match=r"cannot be imported: .*No such file"):
        FunctionReward(f"{tmp_path}/missing.py:length").check()


def test_a_function_itself() -> None:
    reward = as_reward(lambda prompts, responses: [len(each) for each in responses])
    assert isinstance(reward, FunctionReward)
    assert reward(["p"], ["abc"], answer=["x"]).tolist() == [3.0]
    assert as_reward(reward) is reward

    class Worth:
        def __call__(self, prompts: list[str], responses: list[str], answer: list[str]) -> list[bool]:
            return [response == right for response, right in zip(responses, answer, strict=True)]

    assert as_reward(Worth())(["p", "q"], ["yes", "no"], answer=["yes", "yes"]).tolist() == [1.0, 0.0]
    with pytest.raises(TypeError, match="a reward is a Reward or a function of prompts and responses, got str"):
        as_reward("my_rewards.length")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"must return a list of 2 numbers, got NoneType"),
        ({"a": [1, 2], "b": [3, 4]}, "must return a list of 2 numbers, got dict"),
        ([{"a": 1}, {"a": 2}], "must return a number for each response, got a dict"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused(returned: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FunctionReward(lambda prompts, responses: returned)(["p", "q"], ["a", "b"])


def test_an_async_function_is_refused() -> None:
    async def length(prompts: list[str], responses: list[str]) -> list[float]:
        return [0.0 for _ in responses]

    with pytest.raises(ValueError, match="length must return a list of 1 numbers, got coroutine"):
        FunctionReward(length)(["p"], ["a"])
