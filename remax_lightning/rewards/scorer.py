"""Scores of several lists of responses in one call of a reward; what cannot be scored is NaN."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from remax_lightning.rewards.base import Reward

LARGEST_REWARD = 1e6
"""A reward beyond this size is an error, not a judgement: its row is dropped like one without a finite reward. Rewards
of models and checks lie within some tens; 1e6 still leaves float32 a resolution of 0.06."""

PARAMETERS = ("self", "prompts", "responses")
"""What a reward's own parameters are called: a column of such a name cannot be passed beside them."""


def reward_columns(columns: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """The columns that a reward is given: all but those that are called like its own parameters."""
    return {name: column for name, column in columns.items() if name not in PARAMETERS}


def score_responses(
    reward: Reward, columns: Mapping[str, Sequence[Any]], *responses: Sequence[str], device: torch.device
) -> list[Tensor]:
    """Rewards of lists of responses to the same prompts, by one call of the reward that has each response once.

    Equal responses to a prompt have equal rewards, whatever the reward does: a CPU kernel's last bits depend on the row
    in the batch, and a remote judge may be noisy.

    Args:
        reward: The reward.
        columns: Columns of B prompts, ``prompt`` among them.
        *responses: Lists of a multiple of B responses; a prompt's responses are adjacent.
        device: Where the rewards are wanted.

    Returns:
        Rewards of each list, float32; NaN where there is no usable reward, everywhere if the reward raises.
    """
    num_prompts = len(columns["prompt"])
    keys = [(index * num_prompts // len(texts), text) for texts in responses for index, text in enumerate(texts)]
    positions = {key: position for position, key in enumerate(dict.fromkeys(keys))}
    unique = {name: [column[prompt] for prompt, _ in positions] for name, column in reward_columns(columns).items()}
    try:
        rewards = reward(unique.pop("prompt"), [text for _, text in positions], **unique).to(device)
    except Exception as error:
        # one failure of a reward must not end a run of days: its rows are dropped and counted, and a reward that
        # always fails ends training by too many skipped steps
        failure = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"the reward failed for {len(positions)} responses; their rows are dropped: {failure}", stacklevel=1
        )
        rewards = torch.full((len(positions),), torch.nan, device=device)
    rewards = rewards.masked_fill(rewards.abs() > LARGEST_REWARD, torch.nan)
    return list(rewards[[positions[key] for key in keys]].split([len(texts) for texts in responses]))
