"""Refuse a checkpoint of another model; warn of settings that have changed since it was saved."""

import hashlib
import json
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from remax_lightning.callbacks.manifest import UnusableCheckpoint
from remax_lightning.modules.base import TrainableModule

OPTIMIZER = ".optimizer."


def fingerprint(module: TrainableModule) -> dict[str, Any]:
    """Plain values that tell whether a module can load the state of another one."""
    tokenizer = module.tokenizer
    known = [sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.special_tokens_map.items()))]
    config = module.trained_model.config
    return {
        "method": type(module).__name__,
        "architecture": config.model_type,
        "vocabulary size": config.vocab_size,
        "tokenizer": hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16],
    }


def check_model(checkpoint: dict[str, Any], module: TrainableModule, is_fit: bool) -> None:
    """Refuse a checkpoint of another model.

    Args:
        checkpoint: What was read.
        module: The module that will load it.
        is_fit: Training resumes from it; otherwise the weights of another method may be evaluated.

    Raises:
        UnusableCheckpoint: If the method, architecture, vocabulary size, tokenizer or a parameter's shape differs.
    """
    saved, own = checkpoint.get("fingerprint", {}), fingerprint(module)
    for name, value in own.items():
        if name in saved and saved[name] != value and (is_fit or name != "method"):
            raise _misfit(name, saved[name], value)
    old = {name: list(tensor.shape) for name, tensor in checkpoint.get("state_dict", {}).items()}
    new = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            raise _misfit(f"shape of {name}", old.get(name, "absent"), new.get(name, "absent"))


def check_configuration(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Warn of each value that was different when the checkpoint was saved.

    Args:
        old: The configuration in the checkpoint, by full names.
        new: That of this run, by full names.

    Raises:
        UnusableCheckpoint: If the class of the optimizer differs, since its saved state would be meaningless.
    """
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    for name in changed:
        values = f"{name}: {old.get(name)} -> {new.get(name)}"
        if name.endswith(f"{OPTIMIZER}class_path"):
            raise _misfit(name, old.get(name), new.get(name))
        if OPTIMIZER in name:
            rank_zero_warn(f"changed since the checkpoint, but the optimizer keeps its saved values: {values}")
        else:
            rank_zero_warn(f"changed since the checkpoint: {values}")


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as a flat one: names with dots, plain values."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values


def _misfit(name: str, old: object, new: object) -> UnusableCheckpoint:
    return UnusableCheckpoint(
        f"the checkpoint does not fit this run: {name} was {old}, now it is {new}; restore the old value, or start "
        "without --ckpt_path"
    )
