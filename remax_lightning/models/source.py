"""Where a model's weights, configuration and tokenizer come from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from remax_lightning.models.adapter_folder import adapter_base, tokenizer_folder
from remax_lightning.models.hub import check_reachable, looks_like_folder
from remax_lightning.models.model_folder import check_config, check_generation_config, naming_files
from remax_lightning.models.tokenizer import load_tokenizer, prepared_tokenizer

PlainValue: TypeAlias = bool | int | float | str | list | dict | None
"""A value of a configuration; lists and dicts without a type of their items, so that nothing looks for classes there"""


@dataclass(frozen=True)
class ModelSource:
    """A model to load, or a configuration to build one with random weights from.

    Args:
        path: Hugging Face folder or hub name with the weights; or an adapter folder of LoRA, which is merged into the
            base that it names.
        model: A loaded model, from Python only; it is the model that is trained, not a copy.
        architecture: Folder with the model's config.json, read in place of that of ``path``, so that ``plan`` and
            ``tiny`` need no download.
        config: Values of a Hugging Face configuration, ``model_type`` among them, to build random weights from
            instead of loading a ``path``. The vocabulary size and the special tokens default to the tokenizer's.
        tokenizer: Folder or hub name of the tokenizer; or, from Python only, a loaded one. The default is ``path``, or
            what ``model`` was loaded from.
        chat_template: Jinja text, or a path to a file with it, in place of the tokenizer's chat template.
        dtype: Type of the weights in memory. Keep what is trained in float32 and compute in bfloat16 by
            ``--trainer.precision bf16-mixed``: bfloat16 weights are too coarse for RLHF's learning rates.
        attn_implementation: Attention of transformers: ``sdpa``, ``eager``, ``flash_attention_2``, ...
            The default is the architecture's.
        tiny: Random weights of the same architecture at a toy size, with the vocabulary of the tokenizer, to try a
            recipe without its weights: nothing is loaded from ``path``.
        quantization: Load frozen base weights in 4 or 8 bit by bitsandbytes, for LoRA.

    Raises:
        ValueError: If not exactly one of ``path``, ``model`` and ``config`` is given, a ``config`` comes without a
            tokenizer, an ``architecture`` comes beside a ``config``, a ``model`` cannot be trained as it is, or the
            attention would be fetched from the hub.
    """

    path: str | None = None
    model: PreTrainedModel | None = None
    architecture: str | None = None
    config: dict[str, PlainValue] | None = None
    tokenizer: str | PreTrainedTokenizerBase | None = None
    chat_template: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: str | None = None
    tiny: bool = False
    quantization: Literal["4bit", "8bit"] | None = None

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.path, self.model, self.config)) != 1:
            raise ValueError(
                f"a model source needs exactly one of path (weights to load), config (values to build random weights "
                f"from) and, from Python, model, got path={self.path!r}, config={self.config!r} and "
                f"model={type(self.model).__name__}"
            )
        if self.attn_implementation is not None and "/" in self.attn_implementation:
            raise ValueError(
                f"attn_implementation must be part of transformers or of an installed package, such as sdpa or "
                f"flash_attention_2, got {self.attn_implementation}, which would be fetched from the hub"
            )
        if self.model is not None:
            _check_loaded(self)
        if self.config is not None and _names_class(self.config):
            raise ValueError(
                f"config has plain values of a Hugging Face configuration, not classes by class_path, got {self.config}"
            )
        if self.config is not None and self.tokenizer is None:
            raise ValueError("a model built from config needs a tokenizer: set tokenizer to a folder or a hub name")
        if self.config is not None and self.architecture is not None:
            raise ValueError(
                f"architecture stands in for the config.json of a path, but config already says what to build; "
                f"drop one of architecture={self.architecture!r} and config={self.config!r}"
            )

    @classmethod
    def of(cls, model: "ModelLike") -> "ModelSource":
        """A source as it is; or that of a folder or hub name, or of a loaded model.

        Raises:
            TypeError: If it is something else.
        """
        if isinstance(model, ModelSource):
            return model
        if isinstance(model, str | Path):
            return cls(path=str(model))
        if isinstance(model, PreTrainedModel):
            return cls(model=model)
        raise TypeError(
            f"a model is given as a folder or hub name, a ModelSource or a loaded transformers model, got "
            f"{type(model).__name__}; adapters are added by lora=LoRA(...)"
        )

    @property
    def has_weights(self) -> bool:
        """Whether there are weights to load; otherwise they are random."""
        return self.path is not None and not self.tiny

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of this model, with a pad token."""
        if isinstance(self.tokenizer, PreTrainedTokenizerBase):
            return prepared_tokenizer(self.tokenizer, self.chat_template)
        name = self.tokenizer or (self.path if self.model is None else self.model.name_or_path)
        return load_tokenizer(tokenizer_folder(str(name)), self.chat_template)

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch names it."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def loaded(self, *, on_meta: bool) -> PreTrainedModel | None:
        """The model, if it was given loaded.

        Args:
            on_meta: What is asked for is its structure on the meta device.

        Raises:
            ValueError: If it is: nothing says how to build it.
        """
        if self.model is not None and on_meta:
            raise ValueError("a loaded model cannot be sharded by fsdp2; give its folder or hub name instead")
        return self.model

    def load_config(self, **overrides: Any) -> PretrainedConfig:
        """The model's configuration with every dropout at zero.

        A rollout is decoded without dropout, so its log-probs are those of the policy that is trained only if the
        training forward has none either.

        Raises:
            FileNotFoundError: If ``architecture``, or without one ``path``, is a local path that does not exist.
            ValueError: If ``config`` has no known ``model_type``, or a value its architecture does not know; or if a
                folder's configuration cannot be read, or asks for code that is no part of transformers.
        """
        folder = self.path if self.architecture is None else self.architecture
        if folder is not None:
            folder = adapter_base(existing(folder)) or folder
            check_reachable(folder)
            with naming_files(folder, "configuration"):
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **overrides)
            check_generation_config(folder)
            config.name_or_path = str(self.path)  # that of an adapter folder, not of its base
        else:
            config = self._build_config(overrides)
        check_config(config, str(folder), self.attn_implementation, has_weights=self.has_weights)
        if self.tiny:
            shrink(config, self.load_tokenizer())
        return without_dropout(config)

    def _build_config(self, overrides: dict[str, Any]) -> PretrainedConfig:
        assert self.config is not None
        values: dict[str, Any] = dict(self.config)
        model_type = values.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"config.model_type must name an architecture of transformers, got {model_type!r}")
        config_class = CONFIG_MAPPING[model_type]
        known = set(config_class().to_dict()) | set(config_class.attribute_map)
        if unknown := sorted(set(values) - known):
            raise ValueError(f"config has values that {config_class.__name__} does not know: {', '.join(unknown)}")
        return config_class(**{**vocabulary_of(self.load_tokenizer()), **values, **overrides})


ModelLike: TypeAlias = ModelSource | str | PreTrainedModel
"""How a model is given: a source, a folder or hub name, or a loaded model."""


def _names_class(value: object) -> bool:
    """Whether a class is named anywhere in a value, as configurations of the command line do it."""
    if isinstance(value, dict):
        return "class_path" in value or any(map(_names_class, value.values()))
    return isinstance(value, list) and any(map(_names_class, value))


def _check_loaded(source: ModelSource) -> None:
    """Refuse a loaded model with dropout, of which nobody knows the tokenizer, or options that are for loading."""
    model = source.model
    assert model is not None
    if model.name_or_path == "" and source.tokenizer is None:
        raise ValueError(
            f"the loaded {type(model).__name__} does not say where its tokenizer is; give "
            "ModelSource(model=..., tokenizer=...)"
        )
    if source.architecture or source.attn_implementation or source.tiny or source.quantization:
        raise ValueError("a loaded model takes no option but tokenizer and chat_template; the others are for loading")
    dropouts = {
        name: value
        for name, value in model.config.to_dict().items()
        if "drop" in name and isinstance(value, float) and value > 0
    }
    if dropouts:
        raise ValueError(
            f"a policy is trained without dropout, but the loaded {type(model).__name__} has {dropouts}; give its "
            "folder or hub name, or load it with these at 0"
        )


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration itself, every dropout in it set to zero."""
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """What a configuration says of the vocabulary: its size and the special tokens."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def shrink(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Bring a configuration to a toy size; what its architecture switches on or groups stays so.

    Two layers of four heads; as many heads share keys and values as before, and embeddings that were narrower than the
    layers (OPT-350M) still are. The number of positions is left alone.

    Args:
        config: The configuration, which is changed.
        tokenizer: Gives the vocabulary.
    """
    heads = config.num_attention_heads
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": max(1, 4 * (getattr(config, "num_key_value_heads", None) or heads) // heads),
        "head_dim": 16,
        **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "hidden_dim"), 128),  # as architectures call it
        "word_embed_proj_dim": 64 if getattr(config, "word_embed_proj_dim", None) == config.hidden_size else 32,
        "layer_types": (getattr(config, "layer_types", None) or [])[:2],
    }
    present = {name: value for name, value in sizes.items() if getattr(config, name, None) is not None}
    for name, value in {**present, **vocabulary_of(tokenizer)}.items():
        setattr(config, name, value)


def existing(path: str) -> str:
    """``path`` itself, after a check that a local path leads to something.

    Raises:
        FileNotFoundError: If ``path`` can only be a local path (it starts with ``.``, ``/`` or ``~``, or has more than
            one slash) and nothing is there.
    """
    if looks_like_folder(path) and not Path(path).expanduser().exists():
        raise FileNotFoundError(f"{path} does not exist; a Hugging Face folder or a hub name was expected there")
    return path
