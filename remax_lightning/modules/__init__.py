"""The LightningModules."""

from remax_lightning.modules.policy_gradient import PolicyGradientModule
from remax_lightning.modules.remax import ReMax
from remax_lightning.modules.reward_model import RewardModel
from remax_lightning.modules.sft import SFT

__all__ = ["SFT", "PolicyGradientModule", "ReMax", "RewardModel"]
