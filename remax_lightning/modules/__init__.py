"""The LightningModules."""

from remax_lightning.modules.gradients import Loss
from remax_lightning.modules.kl_control import KLControl
from remax_lightning.modules.policy_gradient import PolicyGradientModule
from remax_lightning.modules.ppo import PPO
from remax_lightning.modules.reinforce import Reinforce
from remax_lightning.modules.remax import ReMax
from remax_lightning.modules.reward_model import RewardModel
from remax_lightning.modules.rloo import RLOO
from remax_lightning.modules.sft import SFT

__all__ = ["PPO", "RLOO", "SFT", "KLControl", "Loss", "PolicyGradientModule", "ReMax", "Reinforce", "RewardModel"]
