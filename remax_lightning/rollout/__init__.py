"""Prompts in, responses out."""

from remax_lightning.rollout.engine import RolloutEngine
from remax_lightning.rollout.transformers_engine import TransformersEngine
from remax_lightning.rollout.types import Rollout, Sampling

__all__ = ["Rollout", "RolloutEngine", "Sampling", "TransformersEngine"]
