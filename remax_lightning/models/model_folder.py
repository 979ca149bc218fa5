"""What a model's folder may hold: readable files, and nothing that fetches or runs code of somebody else's."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "vocab.json",
    "model.safetensors.index.json",
)
ATTENTIONS = ("eager", "sdpa", "flex_attention")
"""Attention that is part of transformers and torch; any other is a package or a kernel that the hub has."""

EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""The same of mixtures of experts."""

LEFT_OUT = ("auto_map", "fusion_config", "distributed_config")
"""What a configuration may say of Python code that comes with it, or of how transformers is to change its own."""

NEEDED = {"configuration": "config.json", "tokenizer": "tokenizer.json"}
"""What is read of a folder, and its file."""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: If it holds something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); restore it or download the model again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(values).__name__}; download the model again")
    return values


def check_generation_config(path: str) -> None:
    """Refuse a folder whose generation_config.json transformers would pass over, and with it the stop tokens.

    Raises:
        ValueError: If it is no JSON object, or its ``eos_token_id`` is neither a token nor a list of them.
    """
    file = Path(path).expanduser() / "generation_config.json"
    if not file.is_file():
        return
    stops = read_json(file).get("eos_token_id")
    if not all(each is None or type(each) is int for each in (stops if isinstance(stops, list) else [stops])):
        raise ValueError(f"{file}: eos_token_id must be the id of a token, or a list of them, got {stops!r}")


@contextmanager
def naming_files(path: str, what: str) -> Iterator[None]:
    """Turn whatever a library says of a folder or hub name into one sentence that names the file.

    Args:
        path: The folder or hub name.
        what: What is read of it: ``configuration`` or ``tokenizer``.

    Raises:
        ValueError: In place of any error within.
    """
    try:
        yield
    except Exception as error:
        folder = Path(path).expanduser()
        for name in JSON_FILES:
            if (folder / name).is_file():
                read_json(folder / name)
        if folder.is_dir() and not (folder / NEEDED[what]).is_file():
            raise ValueError(f"{path} has no {NEEDED[what]}; give the folder of a Hugging Face model") from error
        if "custom code" in str(error):  # transformers' words where it would ask whether to trust it
            raise ValueError(
                f"the {what} of {path} needs Python code that comes with it (auto_map), which is never run; give a "
                "model of an architecture that transformers has"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the {what} of {path} cannot be loaded: {reason}") from error


def check_config(config: PretrainedConfig, path: str, attn_implementation: str | None, *, has_weights: bool) -> None:
    """Refuse what a configuration may ask for that is no part of transformers, or take it out where it has no use.

    Args:
        config: The configuration, which is changed: ``auto_map`` and the like are left out, so that the architecture of
            transformers is used as it is.
        path: Where it comes from, for messages.
        attn_implementation: The attention that the user has set, which takes the place of the configuration's.
        has_weights: Whether weights are loaded, to which a quantization belongs.

    Raises:
        ValueError: If it asks for attention, experts or a quantization whose code would be fetched or is not here.
    """
    for each in (config, *(getattr(config, name) for name in config.sub_configs)):
        if not isinstance(each, PretrainedConfig):
            continue
        if attn_implementation is not None:
            each._attn_implementation = None
        for name, value, known in (
            ("attn_implementation", each._attn_implementation, ATTENTIONS),
            ("experts_implementation", each._experts_implementation, EXPERTS),
        ):
            if value is not None and value not in known:
                raise ValueError(
                    f"the configuration of {path} asks for {name}={value!r}, which may be fetched from the hub; take "
                    f"it out of its config.json{', or set attn_implementation' if 'attn' in name else ''}"
                )
        for name in LEFT_OUT:
            vars(each).pop(name, None)
    quantization = vars(config).get("quantization_config")
    if not has_weights:
        vars(config).pop("quantization_config", None)
    elif quantization is not None and _method(quantization) != "bitsandbytes":
        raise ValueError(
            f"the weights of {path} are quantized ({_method(quantization)}), which cannot be trained here; give the "
            "model in full precision, with quantization if it is to be loaded in few bits"
        )


def _method(quantization: object) -> str:
    values = quantization if isinstance(quantization, dict) else getattr(quantization, "__dict__", {})
    return str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
