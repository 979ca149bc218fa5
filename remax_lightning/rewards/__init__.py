"""What a response is worth."""

from remax_lightning.rewards.base import Reward
from remax_lightning.rewards.function import FunctionReward, RewardFunction, RewardLike, as_reward
from remax_lightning.rewards.model import ModelReward

__all__ = ["FunctionReward", "ModelReward", "Reward", "RewardFunction", "RewardLike", "as_reward"]
