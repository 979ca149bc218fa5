"""Language models with a scalar head, in the sequence-classification format of transformers: reward models."""

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from remax_lightning.functional.sequence import last_token_index
from remax_lightning.models.language_model import check_vocabulary, vocabulary_size
from remax_lightning.models.source import ModelSource


def load_reward_model(source: ModelSource, *, trained: bool) -> PreTrainedModel:
    """Load or build a sequence-classification model with one label, every dropout at zero.

    Args:
        source: A folder of a reward model; or, to start one, a causal language model or a configuration.
        trained: The scalar head has to be in the folder; otherwise a missing head starts at random.

    Raises:
        ValueError: If a trained model was required and the folder has several labels or no scalar head.
    """
    options: dict[str, object] = {"dtype": source.torch_dtype}
    if source.attn_implementation is not None:
        options["attn_implementation"] = source.attn_implementation
    if source.path is None:
        model = AutoModelForSequenceClassification.from_config(source.load_config(num_labels=1), **options)
    else:
        stored = source.load_config()
        if trained and stored.num_labels != 1:
            raise ValueError(
                f"a reward model has one label, but {source.path} has {stored.num_labels}; "
                "expected a sequence-classification folder with num_labels=1, such as RewardModel exports"
            )
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            source.path, config=source.load_config(num_labels=1), output_loading_info=True, **options
        )
        if trained and loading["missing_keys"]:
            raise ValueError(f"{source.path} is no trained reward model: it lacks {sorted(loading['missing_keys'])}")
    check_vocabulary(model, source.load_tokenizer())
    return model


def sequence_scores(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Score of each sequence, read at its last token.

    transformers finds the last token as the last one that differs from the pad token, which goes wrong where a real
    token equals it (pad == eos). So the padding is rewritten with a token that no row ends with, and the model is told
    that this is its pad token; what stands there is masked from attention anyway.

    Args:
        model: Sequence-classification model with one label.
        input_ids: Right-padded tokens, (B, L).
        attention_mask: True at real tokens, (B, L).

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
    return output.logits[:, 0].float()
