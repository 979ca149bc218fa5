# ruff: noqa: F401 (for editors and type checkers; at run time __getattr__ imports them)
"""ReMax: RLHF without a value model, as a collection of PyTorch Lightning modules."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remax_lightning.callbacks import (
        Checkpoint,
        GradientVariance,
        HFExport,
        ProgressLines,
        ResponseWriter,
        SelfCheck,
    )
    from remax_lightning.data import DemonstrationDataModule, PreferenceDataModule, PromptDataModule
    from remax_lightning.models.lora import LoRA
    from remax_lightning.models.source import ModelSource
    from remax_lightning.modules import (
        PPO,
        RLOO,
        SFT,
        KLControl,
        Loss,
        PolicyGradientModule,
        Reinforce,
        ReMax,
        RewardModel,
    )
    from remax_lightning.rewards import FunctionReward, ModelReward, Reward
    from remax_lightning.rollout import Rollout, RolloutEngine, Sampling, TransformersEngine
    from remax_lightning.strategies import FSDP2Strategy

__version__ = version("remax-lightning")

_MODULES = {
    "callbacks": ("Checkpoint", "GradientVariance", "HFExport", "ProgressLines", "ResponseWriter", "SelfCheck"),
    "data": ("DemonstrationDataModule", "PreferenceDataModule", "PromptDataModule"),
    "models.lora": ("LoRA",),
    "models.source": ("ModelSource",),
    "modules": ("KLControl", "Loss", "PPO", "PolicyGradientModule", "RLOO", "ReMax", "Reinforce", "RewardModel", "SFT"),
    "rewards": ("FunctionReward", "ModelReward", "Reward"),
    "rollout": ("Rollout", "RolloutEngine", "Sampling", "TransformersEngine"),
    "strategies": ("FSDP2Strategy",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "__version__",
    *_MODULE_OF,
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and transformers take seconds."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
