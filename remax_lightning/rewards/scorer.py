"""One call of a reward, checked, and scores of several lists of responses by it; what cannot be scored is NaN."""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from remax_lightning.models.visible_text import visible
from remax_lightning.rewards.base import Reward
from remax_lightning.rewards.failures import FailureLog
from remax_lightning.rewards.function import FunctionReward
from remax_lightning.rewards.process_state import preserved_process_state
from remax_lightning.rewards.values import reward_values

LARGEST_REWARD = 1e6
"""A reward beyond this size is an error, not a judgement: its row is dropped like one without a finite reward. Rewards
of models and checks lie within some tens; 1e6 still leaves float32 a resolution of 0.06."""

PARAMETERS = ("self", "prompts", "responses")
"""What a reward's own parameters are called: a column of such a name cannot be passed beside them."""


def reward_columns(columns: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """The columns that a reward is given: all but those that are called like its own parameters."""
    return {name: column for name, column in columns.items() if name not in PARAMETERS}


def checked_rewards(reward: Reward, columns: Mapping[str, Sequence[Any]], responses: Sequence[str]) -> Tensor:
    """Rewards of responses, by one call that can change neither the data nor the state of the process.

    Args:
        reward: The reward.
        columns: Columns of B values, ``prompt`` among them; the reward gets copies.
        responses: B responses.

    Returns:
        Rewards, (B,), float64, on the CPU; NaN where there is no number.

    Raises:
        ValueError: If the reward does not return one number for each response.
        RuntimeError: If it ends Python, as ``sys.exit`` does; whatever else it raises is raised as it is.
    """
    given = {name: [deepcopy(value) for value in column] for name, column in reward_columns(columns).items()}
    name = reward.name if isinstance(reward, FunctionReward) else type(reward).__name__
    try:
        with preserved_process_state():
            returned = reward(given.pop("prompt"), list(responses), **given)
            return reward_values(returned, len(responses), name)
    except BaseException as error:
        # exceptions derived from SystemExit are signals to this process, such as SIGTERM
        is_signal = isinstance(error, SystemExit) and type(error) is not SystemExit
        if isinstance(error, Exception | KeyboardInterrupt) or is_signal:
            raise
        raise RuntimeError(
            f"{name} raised {type(error).__name__}({error}), which would end the run; a reward must return, or raise "
            "an Exception"
        ) from error


@dataclass
class Scorer:
    """A reward whose failures cost rows, not the run; they are counted and said.

    Args:
        reward: The reward.
        name: What it is, for messages.
    """

    reward: Reward
    name: str = "reward"
    failures: FailureLog = field(default_factory=FailureLog, init=False, repr=False)

    def score(
        self, columns: Mapping[str, Sequence[Any]], *responses: Sequence[str | None], device: torch.device
    ) -> list[Tensor]:
        """Rewards of lists of responses to the same prompts, by one call of the reward that has each response once.

        Equal responses to a prompt have equal rewards, whatever the reward does: a CPU kernel's last bits depend on the
        row in the batch, and a remote judge may be noisy.

        Args:
            columns: Columns of B prompts, ``prompt`` among them.
            *responses: Lists of a multiple of B responses, None where the policy had none to give; a prompt's
                responses are adjacent.
            device: Where the rewards are wanted.

        Returns:
            Rewards of each list, float32; NaN where there is no usable reward, everywhere if the reward raises.
        """
        num_prompts = len(columns["prompt"])
        keys = [(index * num_prompts // len(texts), text) for texts in responses for index, text in enumerate(texts)]
        self._count_rows([text is None for _, text in keys], "the policy's logits were not finite")
        # all are scored, since all ranks have to call a sharded reward model
        positions = {key: position for position, key in enumerate(dict.fromkeys(keys))}
        unique = {name: [column[prompt] for prompt, _ in positions] for name, column in columns.items()}
        rewards = self._rewards(unique, [text or "" for _, text in positions])
        has_text = torch.tensor([text is not None for _, text in positions])
        rewards = rewards.masked_fill(~has_text | (rewards.abs() > LARGEST_REWARD), torch.nan)
        rewards = rewards.to(device, torch.float32)
        return list(rewards[[positions[key] for key in keys]].split([len(texts) for texts in responses]))

    def _rewards(self, columns: Mapping[str, Sequence[Any]], responses: Sequence[str]) -> Tensor:
        """Rewards, (B,), NaN if the reward fails."""
        try:
            rewards = checked_rewards(self.reward, columns, responses)
        except Exception as error:
            # one failure of a reward must not end a run of days: its rows are dropped and counted, and a reward that
            # always fails ends training by too many skipped steps
            failure, count = described(error), len(responses)
            sentence = f"the {self.name} failed for {count} responses; their rows are dropped: {failure}"
            self.failures.count(re.sub(r"0x[0-9a-f]+|\d+", "N", failure), sentence, count)
            return torch.full((count,), torch.nan, dtype=torch.float64)
        self._count_rows(rewards.isnan().tolist(), f"the {self.name} was None, NaN or no number")
        self._count_rows((rewards.abs() > LARGEST_REWARD).tolist(), f"the {self.name} was beyond {LARGEST_REWARD:,.0f}")
        return rewards

    def _count_rows(self, are_unusable: list[bool], cause: str) -> None:
        """Count rows that cannot be used for a cause."""
        if count := sum(are_unusable):
            self.failures.count(
                cause, f"{cause} for {count} of {len(are_unusable)} responses, which are dropped", count
            )


def described(error: Exception) -> str:
    """Type and first line of an error, its control characters, which a response may have brought along, written out."""
    return visible(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}")
