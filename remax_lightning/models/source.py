"""Where a model's weights, configuration and tokenizer come from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from remax_lightning.models.tokenizer import load_tokenizer, looks_like_folder


@dataclass(frozen=True)
class ModelSource:
    """A model to load, or a configuration to build one with random weights from.

    Args:
        path: Hugging Face folder or hub name with the weights.
        config: Values of a Hugging Face configuration, ``model_type`` among them, to build random weights from
            instead of loading a ``path``. The vocabulary size and the special tokens default to the tokenizer's.
        tokenizer: Folder or hub name of the tokenizer. The default is ``path``.
        chat_template: Jinja text, or a path to a file with it, in place of the tokenizer's own chat template.
        dtype: Type of the weights in memory. Keep what is trained in float32 and compute in bfloat16 by
            ``--trainer.precision bf16-mixed``: bfloat16 weights are too coarse for RLHF's learning rates.
        attn_implementation: Attention of transformers: ``sdpa``, ``eager``, ``flash_attention_2``, ...
            The default is the architecture's.

    Raises:
        ValueError: If not exactly one of ``path`` and ``config`` is given, or a ``config`` comes without a tokenizer.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.config is None):
            raise ValueError(
                f"a model source needs exactly one of path (weights to load) and config (values to build random "
                f"weights from), got path={self.path!r} and config={self.config!r}"
            )
        if self.config is not None and self.tokenizer is None:
            raise ValueError("a model built from config needs a tokenizer: set tokenizer to a folder or a hub name")

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of this model, with a pad token."""
        name = self.tokenizer if self.tokenizer is not None else self.path
        assert name is not None
        return load_tokenizer(name, self.chat_template)

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch names it."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def load_config(self, **overrides: Any) -> PretrainedConfig:
        """The model's configuration with every dropout at zero.

        A rollout is decoded without dropout, so its log-probs are those of the policy that is trained only if the
        training forward has none either.

        Raises:
            FileNotFoundError: If ``path`` is a local path that does not exist.
            ValueError: If ``config`` has no known ``model_type``, or a value its architecture does not know.
        """
        if self.path is not None:
            config = AutoConfig.from_pretrained(existing(self.path), **overrides)
        else:
            config = self._build_config(overrides)
        for name, value in config.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        return config

    def _build_config(self, overrides: dict[str, Any]) -> PretrainedConfig:
        assert self.config is not None
        values = dict(self.config)
        model_type = values.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"config.model_type must name an architecture of transformers, got {model_type!r}")
        config_class = CONFIG_MAPPING[model_type]
        known = set(config_class().to_dict()) | set(config_class.attribute_map)
        if unknown := sorted(set(values) - known):
            raise ValueError(f"config has values that {config_class.__name__} does not know: {', '.join(unknown)}")
        tokenizer = self.load_tokenizer()
        defaults = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        return config_class(**{**defaults, **values, **overrides})


def existing(path: str) -> str:
    """``path`` itself, after a check that a local path leads to something.

    Raises:
        FileNotFoundError: If ``path`` can only be a local path (it starts with ``.``, ``/`` or ``~``, or has more than
            one slash) and nothing is there.
    """
    if looks_like_folder(path) and not Path(path).expanduser().exists():
        raise FileNotFoundError(f"{path} does not exist; a Hugging Face folder or a hub name was expected there")
    return path
