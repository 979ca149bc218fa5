import math

import pytest
import reward_functions
import torch

from remax_lightning.rewards import FunctionReward


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
    with pytest.raises(TypeError, match="answer"):
        FunctionReward("reward_functions.matches")(["p"], ["yes"])


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
        ("reward_functions.no_such_function", "no_such_function"),
        ("reward_functions.not_a_function", "named by its import path"),
        ("exact_match", "named by its import path"),
        ("reward_functions.without_prompts", "needs the parameters prompts and responses"),
        ("os.system", "needs the parameters prompts and responses"),
        ("builtins.dict", "no Python function with the parameters prompts and responses"),
    ],
)
def test_what_is_no_reward_function_is_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FunctionReward(path)
