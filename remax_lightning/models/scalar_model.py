"""Language models with a scalar head, in the sequence-classification format of transformers: reward models."""

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from remax_lightning.functional.sequence import last_token_index
from remax_lightning.models.language_model import check_vocabulary, vocabulary_size
from remax_lightning.models.loading import check_complete, load_weights
from remax_lightning.models.source import ModelSource

HEAD_NAMES = {"^regression_head": "score"}
"""Names of heads in the files of other projects (UltraRM), and the name in transformers' Llama."""


def load_reward_model(
    source: ModelSource, *, trained: bool, label: int | None = None, on_meta: bool = False
) -> PreTrainedModel:
    """Load or build a sequence-classification model with one label, every dropout at zero.

    Args:
        source: A folder of a reward model; or, to start one, a causal language model or a configuration.
        trained: The scalar head has to be in the folder; otherwise a missing head starts at random.
        label: The label of a classifier with several whose logit is the score. The default is a model with one label.
        on_meta: Build its structure alone, on the meta device.

    Raises:
        ValueError: If the folder has another number of labels, lacks weights below the head, or lacks the head of a
            trained model.
    """
    if (loaded := source.loaded(on_meta=on_meta)) is not None:
        scalar_head(loaded)
        check_vocabulary(loaded, source.load_tokenizer())
        return loaded
    options: dict[str, object] = {"dtype": source.torch_dtype}
    if source.attn_implementation is not None:
        options["attn_implementation"] = source.attn_implementation
    config = source.load_config(num_labels=1) if label is None else source.load_config()
    config.use_cache = False  # nothing is decoded, so keys and values would only take memory
    if label is not None and label not in range(config.num_labels or 0):
        raise ValueError(f"label must be one of the {config.num_labels} of {source.path}, from 0, got {label}")
    if on_meta or not source.has_weights:
        with torch.device("meta") if on_meta else nullcontext():
            model = AutoModelForSequenceClassification.from_config(config, **options)
    else:
        model = _load_trained(source, config, trained, options)
    check_vocabulary(model, source.load_tokenizer())
    return model


def _load_trained(
    source: ModelSource, config: PretrainedConfig, trained: bool, options: dict[str, object]
) -> PreTrainedModel:
    model, loading = load_weights(
        AutoModelForSequenceClassification,
        source,
        config=config,
        key_mapping=HEAD_NAMES,
        ignore_mismatched_sizes=True,  # refused below, by name
        **options,
    )
    for name, stored, expected in sorted(loading["mismatched_keys"]):
        if tuple(stored[1:]) == tuple(expected[1:]) and expected[0] == config.num_labels:
            raise ValueError(
                f"a reward model has one label, but {source.path} has {stored[0]}; expected a sequence-classification "
                "folder with num_labels=1, such as RewardModel exports, or the label that is to be read"
            )
        raise ValueError(f"{source.path} does not fit its config.json: {name} is {stored}, expected {expected}")
    if trained and loading["missing_keys"]:
        raise ValueError(f"{source.path} is no trained reward model: it lacks {sorted(loading['missing_keys'])}")
    # a head is new where the folder is a language model's; some call a layer of it a pooler
    body = {name for name in loading["missing_keys"] if name.startswith(f"{model.base_model_prefix}.")}
    check_complete(source.path, model, {name for name in body if ".pooler." not in name})
    # save_pretrained would undo the renaming, and transformers would not find the head in the exported folder
    conversions = [
        each for each in cast(list[Any], model._weight_conversions) if each.source_patterns[0] not in HEAD_NAMES
    ]
    model._weight_conversions = conversions  # type: ignore[assignment]
    return model


def sequence_scores(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, *, label: int = 0) -> Tensor:
    """Score of each sequence, read at its last token.

    transformers takes the last token that differs from the pad token, which is wrong where pad == eos. So the padding
    is overwritten with a token that no row ends with, and the model's pad_token_id is set to it; padding is masked from
    attention anyway.

    Args:
        model: Sequence-classification model.
        input_ids: Right-padded tokens, (B, L).
        attention_mask: True at real tokens, (B, L).
        label: The label whose logit is the score.

    Returns:
        Scores, (B,), float32.
    """
    mask = attention_mask.bool()
    last_tokens = torch.zeros(vocabulary_size(model), dtype=torch.bool, device=mask.device)
    last_tokens[input_ids.gather(1, last_token_index(mask)[:, None])] = True
    filler = int(last_tokens.to(torch.uint8).argmin())
    config = model.config.get_text_config()
    pad_token_id, config.pad_token_id = config.pad_token_id, filler
    try:
        output = model(input_ids=input_ids.masked_fill(~mask, filler), attention_mask=mask)
    finally:
        config.pad_token_id = pad_token_id
    return output.logits[:, label].float()


def scalar_head(model: nn.Module) -> nn.Linear:
    """The head of a sequence-classification model with one label.

    Raises:
        ValueError: If no linear layer of it has one output.
    """
    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1]
    if not heads:
        raise ValueError(f"{type(model).__name__} has no linear layer with one output, so it cannot be a value model")
    return heads[-1]


def token_values(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Value of what comes before each token where the mask is True, (N,), float32, row by row; with gradient.

    Args:
        model: Sequence-classification model with one label; its head is read at every position.
        ids: Right-padded sequences, (B, L).
        mask: True at N tokens, none of them the first of its row, (B, L) bool.
    """
    # the model returns the score of the last token alone
    outputs: list[Tensor] = []
    handle = scalar_head(model).register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        handle.remove()
    return outputs[0][:, :-1, 0][mask[:, 1:]].float()
