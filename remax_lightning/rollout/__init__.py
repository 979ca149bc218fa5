"""Prompts in, responses out."""

from remax_lightning.rollout.engine import RolloutEngine
from remax_lightning.rollout.responder import Responder
from remax_lightning.rollout.transformers_engine import TransformersEngine
from remax_lightning.rollout.types import Responses, Rollout, Samples, Sampling

__all__ = ["Responder", "Responses", "Rollout", "RolloutEngine", "Samples", "Sampling", "TransformersEngine"]
