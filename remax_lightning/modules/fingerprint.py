"""Whether a module can load the state of another one."""

import hashlib
import json
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remax_lightning.checkpoints.manifest import UnusableCheckpoint
from remax_lightning.models.reference import REFERENCE
from remax_lightning.models.weight_sample import changed_parameters


class Trained(Protocol):
    """What is asked of a module."""

    tokenizer: PreTrainedTokenizerBase
    frozen: dict[str, dict[str, Any]]

    @property
    def trained_model(self) -> PreTrainedModel:
        """The model that the optimizer updates."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name."""


def fingerprint(module: Trained) -> dict[str, Any]:
    """Plain values that tell whether a module can load the state of another one."""
    return {
        **_of_model(module),
        "frozen": module.frozen,
    }


def _of_model(module: Trained) -> dict[str, Any]:
    tokenizer = module.tokenizer
    known = [sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.special_tokens_map.items()))]
    config = module.trained_model.config
    return {
        "method": type(module).__name__,
        "architecture": config.model_type,
        "vocabulary size": config.vocab_size,
        "tokenizer": hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16],
    }


def check_model(checkpoint: dict[str, Any], module: Trained, is_fit: bool) -> None:
    """Refuse a checkpoint of another model.

    Args:
        checkpoint: What was read.
        module: The module that will load it.
        is_fit: Training resumes from it; otherwise the weights of another method may be evaluated.

    Raises:
        UnusableCheckpoint: If the method, architecture, vocabulary size, tokenizer, a parameter's shape or the weights
            under adapters differ; or, in training, those of the reference.
    """
    saved, own = checkpoint.get("fingerprint", {}), _of_model(module)
    for name, value in own.items():
        if name in saved and saved[name] != value and (is_fit or name != "method"):
            raise misfit(name, saved[name], value)
    old = {name: list(tensor.shape) for name, tensor in checkpoint.get("state_dict", {}).items()}
    new = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            raise misfit(f"shape of {name}", old.get(name, "absent"), new.get(name, "absent"))
    _check_frozen(saved.get("frozen", {}), module.frozen, is_fit)


def _check_frozen(saved: dict[str, dict[str, Any]], own: dict[str, dict[str, Any]], is_fit: bool) -> None:
    for name in sorted(saved.keys() & own.keys()):
        if name == REFERENCE and not is_fit:
            continue  # nothing is measured against it
        if changed := changed_parameters(saved[name], own[name]):
            raise UnusableCheckpoint(
                f"the checkpoint does not fit this run: {name} has other weights than when it was saved "
                f"({len(changed)} parameters differ, {changed[0]} among them); restore the model that was there, or "
                "start a new run without --ckpt_path"
            )


def misfit(name: str, old: object, new: object) -> UnusableCheckpoint:
    """The error of a checkpoint that differs in something that must not differ."""
    return UnusableCheckpoint(
        f"the checkpoint does not fit this run: {name} was {old}, now it is {new}; restore the old value, or start "
        "without --ckpt_path"
    )
