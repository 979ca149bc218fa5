"""A Python function as a reward."""

import importlib
import inspect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from remax_lightning.models.tokenizer import Prompt
from remax_lightning.rewards.base import Reward


class FunctionReward(Reward):
    """Reward by a function of your own: ``function(prompts, responses, **columns) -> list of numbers``.

    It gets the prompts, the responses and the data's other columns (such as ``answer``) as lists of equal length, by
    name; a function without ``**columns`` gets only those that it names.

    Args:
        function: Import path, such as ``my_rewards.exact_match``. Modules in the working directory are found.
    """

    def __init__(self, function: str) -> None:
        self.name = function
        self.function = _resolve(function)
        parameters = inspect.signature(self.function).parameters
        self.takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self.parameters = set(parameters)
        if not {"prompts", "responses"} <= self.parameters:
            raise ValueError(
                f"a reward function needs the parameters prompts and responses, got {function}"
                f"{inspect.signature(self.function)}"
            )

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> Tensor:
        """Score each response; what is no number, None for one, becomes not-a-number.

        Raises:
            ValueError: If the function returns another number of rewards than it got responses.
        """
        wanted = columns if self.takes_all else {k: v for k, v in columns.items() if k in self.parameters}
        rewards = self.function(prompts=prompts, responses=responses, **wanted)
        if len(rewards) != len(responses):
            raise ValueError(f"{self.name} must return one reward a response: {len(responses)}, got {len(rewards)}")
        return torch.tensor([_number(reward) for reward in rewards])


def _number(reward: object) -> float:
    try:
        return float(reward)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _resolve(path: str) -> Callable[..., Sequence[float | None]]:
    module_name, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module_name), name) if module_name else None
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"the reward function {path} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"a reward function is named by its import path, such as my_rewards.exact_match, got {path}")
    try:
        inspect.signature(function)
    except ValueError as error:
        raise ValueError(f"{path} is no Python function with the parameters prompts and responses") from error
    return function
