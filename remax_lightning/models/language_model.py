"""Causal language models: load or build, freeze, score the tokens of a response."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from remax_lightning.functional.sequence import position_ids
from remax_lightning.models.adapter_folder import adapter_base
from remax_lightning.models.loading import check_complete, load_weights
from remax_lightning.models.source import ModelSource


def load_language_model(source: ModelSource, *, on_meta: bool = False) -> PreTrainedModel:
    """Load or build the causal language model of a source, every dropout at zero.

    Args:
        source: The model.
        on_meta: Build its structure alone, on the meta device.

    Raises:
        ValueError: If the folder lacks weights, or the tokenizer has tokens beyond the model's vocabulary.
    """
    if (loaded := source.loaded(on_meta=on_meta)) is not None:
        check_vocabulary(loaded, source.load_tokenizer())
        return loaded
    config = source.load_config()
    options: dict[str, object] = {"dtype": source.torch_dtype}
    if source.attn_implementation is not None:
        options["attn_implementation"] = source.attn_implementation
    if on_meta:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **options)
        if source.has_weights:
            with suppress(OSError):  # a folder without one has what its configuration says
                path = str(source.path)
                model.generation_config = GenerationConfig.from_pretrained(adapter_base(path) or path)
    elif source.has_weights:
        model, loading = load_weights(AutoModelForCausalLM, source, config=config, **options)
        check_complete(source.path, model, set(loading["missing_keys"]))
    else:
        model = AutoModelForCausalLM.from_config(config, **options)
    check_vocabulary(model, source.load_tokenizer())
    return model


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of tokens that the model can embed; it may have more of them than its tokenizer."""
    return cast(nn.Embedding, model.get_input_embeddings()).num_embeddings


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose tokens the model cannot embed.

    Raises:
        ValueError: If the tokenizer has more tokens than the model has input embeddings.
    """
    if len(tokenizer) > vocabulary_size(model):
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but the model {model.name_or_path or type(model).__name__} "
            f"embeds only {vocabulary_size(model)}; use the tokenizer that the model was trained with"
        )


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that is never trained, in eval mode: the reference policy."""
    return freeze(copy.deepcopy(model))


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, without gradients and in eval mode."""
    model.requires_grad_(False)
    return model.eval()


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: those of the generation configuration and the tokenizer's end-of-sequence.

    Raises:
        ValueError: If there is none, since then no response could ever end.
    """
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    stops = set(configured if isinstance(configured, list) else [configured])
    stops = (stops | {tokenizer.eos_token_id}) - {None}
    if not stops:
        raise ValueError(
            "neither the model's generation configuration nor its tokenizer names a stop token (eos_token_id), so a "
            "response could never end; set the tokenizer's eos_token"
        )
    return sorted(stops)


def context_length(model: PreTrainedModel) -> int | None:
    """The longest sequence, in tokens, that the model has positions for; None where it has no such limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # RoBERTa and its relatives start counting positions behind the padding index
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    embeddings = getattr(getattr(plain.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(embeddings, "padding_idx", None)
    return limit if limit is None or padding is None else limit - padding - 1


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the context; the mode of every submodule is restored after it, also when something raises."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def response_logits(
    model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor
) -> Tensor:
    """Logits from which each response token was chosen, given the prompt and the response before it.

    The head runs on the response's positions alone.

    Args:
        model: Causal language model of transformers.
        prompt_ids: Left-padded prompts, (B, P).
        prompt_mask: True at prompt tokens, (B, P).
        response_ids: Right-padded responses, (B, T).
        response_mask: True at response tokens, (B, T).

    Returns:
        Logits, (B, T, V).
    """
    mask = torch.cat([prompt_mask, response_mask], dim=1)
    logits = model(
        input_ids=torch.cat([prompt_ids, response_ids], dim=1),
        attention_mask=mask,
        position_ids=position_ids(mask),
        logits_to_keep=response_ids.shape[1] + 1,
        use_cache=False,
    ).logits
    return logits[:, :-1]
