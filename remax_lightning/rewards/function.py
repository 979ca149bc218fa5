"""A Python function as a reward."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from remax_lightning.models.tokenizer import Prompt
from remax_lightning.rewards.base import Reward
from remax_lightning.rewards.values import reward_values


class RewardFunction(Protocol):
    """A function that scores responses; it names the columns of the data that it needs, or takes ``**columns``."""

    def __call__(self, *, prompts: Any, responses: Any, **columns: Any) -> Any:
        """A number for each response, None where there is none."""


RewardLike: TypeAlias = Reward | RewardFunction
"""How a reward is given: a reward, or a function."""


@dataclass
class FunctionReward(Reward):
    """Reward by a function: ``function(prompts, responses, **columns) -> list of numbers``.

    It gets the prompts, the responses and the data's other columns (such as ``answer``) as lists of equal length, by
    name; a function without ``**columns`` gets only those that it names.

    Args:
        function: Import path such as ``my_rewards.exact_match`` (modules in the working directory are found), or
            ``path/to/file.py:exact_match``; from Python, the function itself.

    Example:
        >>> reward = FunctionReward(lambda prompts, responses: [len(response) for response in responses])
        >>> reward(["Hi"], ["Hello"])
        tensor([5.])
    """

    function: str | RewardFunction

    @property
    def name(self) -> str:
        """The function, for messages."""
        return self.function if isinstance(self.function, str) else getattr(self.function, "__name__", "the function")

    @cached_property
    def signature(self) -> inspect.Signature:
        """The parameters of the function.

        Raises:
            ValueError: If prompts and responses are not among them.
        """
        function = self.callable
        try:
            signature = inspect.signature(function)
        except ValueError as error:
            raise ValueError(f"{self.name} is no Python function with the parameters prompts and responses") from error
        if not self.takes_all(signature) and not {"prompts", "responses"} <= set(signature.parameters):
            raise ValueError(
                f"a reward function needs the parameters prompts and responses, got {self.name}{signature}"
            )
        return signature

    @staticmethod
    def takes_all(signature: inspect.Signature) -> bool:
        """Whether the function takes any column by name."""
        return any(each.kind is inspect.Parameter.VAR_KEYWORD for each in signature.parameters.values())

    @cached_property
    def callable(self) -> Callable[..., Any]:
        """The function itself."""
        return resolve(self.function) if isinstance(self.function, str) else self.function

    def check(self) -> None:
        """Refuse a function that cannot be imported or lacks a parameter.

        Raises:
            ValueError: If it is.
        """
        assert self.signature is not None

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **columns: Sequence[object]) -> Tensor:
        """Score each response; None, and what else is no number in a row, becomes NaN.

        Raises:
            ValueError: If a column that the function needs is missing, or it returns something other than a number for
                each response.
        """
        parameters, known = self.signature.parameters, ("prompts", "responses", *columns)
        if not self.takes_all(self.signature):
            columns = {name: column for name, column in columns.items() if name in parameters}
        needed = {
            name
            for name, each in parameters.items()
            if each.default is each.empty and each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)
        }
        if missing := sorted(needed - {*known}):
            raise ValueError(
                f"{self.name} needs the columns {', '.join(missing)}, which the data does not have; it has "
                f"{', '.join(known)}"
            )
        rewards = self.callable(prompts=prompts, responses=responses, **columns)
        return reward_values(rewards, len(responses), self.name).float()


def as_reward(reward: RewardLike) -> Reward:
    """A reward as it is, or that of a function.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(reward, Reward):
        return reward
    if not callable(reward):
        raise TypeError(
            f"a reward is a Reward or a function of prompts and responses, got {type(reward).__name__}; a function is "
            "named by FunctionReward('my_rewards.exact_match')"
        )
    return FunctionReward(reward)


def resolve(path: str) -> Callable[..., Any]:
    """The function of an import path, or of ``file.py:name``.

    Raises:
        ValueError: If there is none.
    """
    file, is_file, name = path.rpartition(":")
    if not is_file and path.endswith(".py"):
        raise ValueError(f"the reward function in {path} needs its name: {path}:exact_match")
    if not is_file:
        file, _, name = path.rpartition(".")
    try:
        if is_file:
            spec = importlib.util.spec_from_file_location(Path(file).stem, Path(file).expanduser())
            if spec is None or spec.loader is None:
                raise ImportError(f"{file} is no Python file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(file) if file else None  # type: ignore[assignment]
        function = getattr(module, name, None)
    except (ImportError, OSError) as error:
        raise ValueError(f"the reward function {path} cannot be imported: {error}") from error
    if module is not None and function is None:
        raise ValueError(f"the reward function {path} cannot be imported: {file} has no {name}")
    if not callable(function):
        raise ValueError(
            f"a reward function is given as my_rewards.exact_match or path/to/file.py:exact_match, got {path}"
        )
    return function
