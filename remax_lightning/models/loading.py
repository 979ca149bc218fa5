"""Weights of a folder or the hub: as they are, in few bits, or with the adapters of an adapter folder merged in."""

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, PreTrainedModel

from remax_lightning.models.adapter_folder import adapter_base
from remax_lightning.models.adapter_names import base_name
from remax_lightning.models.hub import check_reachable
from remax_lightning.models.lora import merge_in_place
from remax_lightning.models.source import ModelSource, existing


def load_weights(auto_class: Any, source: ModelSource, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load the model of a source that has weights, on the CPU; in few bits, on the current GPU if there is one.

    Of an adapter folder the base is loaded and the adapters are merged into it, so what comes out is an ordinary model:
    new adapters on it have the base and the old ones together as their reference.

    Args:
        auto_class: The class of transformers that loads it, such as ``AutoModelForCausalLM``.
        source: The model.
        **options: As in ``from_pretrained``.

    Returns:
        Model; and which weights were missing or did not fit, as transformers reports it.

    Raises:
        ImportError: If it is to be quantized and bitsandbytes is not installed.
        ValueError: If a file is damaged, or adapters cannot be merged: on quantized weights, not of LoRA, not of this
            model, or on the hub.
    """
    assert source.path is not None
    base = adapter_base(existing(source.path))
    check_reachable(base or source.path)  # beside an architecture, the configuration did not come from there
    if source.quantization is not None:
        options["quantization_config"] = _quantization(source, is_adapter=base is not None)
    with readable_weights(base or source.path):
        model, loading = auto_class.from_pretrained(base or source.path, output_loading_info=True, **options)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            # a rollout on a CPU would leave the weights in a packed form whose gradients are silently wrong
            module.support_avx512bf16_for_cpu = False
    if base is not None:
        trained = _merge_adapters(model, source.path)
        loading["missing_keys"] = set(loading["missing_keys"]) - trained
        model.name_or_path = source.path
    elif model._hf_peft_config_loaded:
        raise ValueError(f"{source.path} on the hub holds adapters; download it and give path the folder")
    return model, loading


@contextmanager
def readable_weights(path: str) -> Iterator[None]:
    """Name the folder whose weights cannot be read, which the libraries that read them do not.

    Args:
        path: The folder or hub name.

    Raises:
        ValueError: If a file of weights is cut off or damaged.
    """
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        if type(error) is RuntimeError and "PytorchStreamReader" not in str(error):  # of torch.load
            raise
        raise ValueError(
            f"the weights in {path} cannot be read ({str(error).splitlines()[0]}); copy or download them again"
        ) from error


def check_complete(path: str | None, model: PreTrainedModel, missing: set[str]) -> None:
    """Refuse a folder that lacks parameters, which would be random; tied ones and buffers need not be there.

    Args:
        path: The folder or hub name.
        model: What was loaded.
        missing: Names that transformers misses in the folder.

    Raises:
        ValueError: If one is a parameter.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if names := sorted(missing & parameters):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"{path} lacks weights of {type(model).__name__} ({', '.join(names[:3])}{more}), which would be random; "
            "give a complete folder of this kind of model"
        )


def _quantization(source: ModelSource, *, is_adapter: bool) -> BitsAndBytesConfig:
    if is_adapter:
        raise ValueError(
            f"{source.path} is an adapter folder, which cannot be merged into weights in {source.quantization}; export "
            "it merged (lora.merge: true) and set path to that folder, or drop quantization"
        )
    if find_spec("bitsandbytes") is None:
        raise ImportError(
            f"quantization={source.quantization} needs bitsandbytes: pip install 'remax-lightning[quantization]'"
        )
    return BitsAndBytesConfig(
        load_in_4bit=source.quantization == "4bit",
        load_in_8bit=source.quantization == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _merge_adapters(model: PreTrainedModel, path: str) -> set[str]:
    """Merge the adapters of a folder into their base, in place.

    Returns:
        Names of the full weights that the folder holds beside the adapters, such as a classifier's head.
    """
    config = PeftConfig.from_pretrained(path)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{path} holds adapters of peft's type {config.peft_type}; only LoRA is supported")
    config.task_type = None  # a reward model may start from the adapters of a language model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls a function of transformers by a deprecated name
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            adapted = PeftModel.from_pretrained(model, path, config=config, torch_device="cpu", low_cpu_mem_usage=True)
        except (UserWarning, RuntimeError, ValueError) as error:
            raise ValueError(f"the adapters of {path} do not fit {type(model).__name__}: {error}") from error
    full = {base_name(name) for name, _ in adapted.named_parameters() if ".modules_to_save." in name}
    merge_in_place(adapted)
    return full
