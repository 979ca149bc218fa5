"""A trained model as a Hugging Face folder."""

from pathlib import Path

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remax_lightning.models.finite import non_finite
from remax_lightning.models.lora import merged

SAMPLING_VALUES = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")


def export(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, output_dir: str, *, merge: bool = True
) -> None:
    """Save weights (safetensors), configuration, generation configuration, tokenizer and chat template.

    Args:
        model: Causal language model or sequence-classification model, with adapters or without.
        tokenizer: Its tokenizer.
        output_dir: Folder to write, created if missing; files of the same name are replaced.
        merge: Merge adapters into the weights and write an ordinary model; if false, write the adapters alone and the
            name of their base. Without adapters it makes no difference.

    Raises:
        ValueError: If a weight is not finite; nothing is written.
    """
    _check_finite(model, output_dir)
    if isinstance(model, PeftModel) and not merge:
        # embeddings are never trained; peft would look up the base on the hub to find out
        model.save_pretrained(output_dir, save_embedding_layers=False)
    else:
        plain = merged(model) if isinstance(model, PeftModel) else model
        _check_finite(plain, output_dir)  # the sum of a base and its adapters may be larger than the type can hold
        _save(plain, output_dir)
        # from_pretrained would apply the adapters of an earlier export
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            (Path(output_dir) / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(output_dir)


def _check_finite(model: PreTrainedModel | PeftModel, output_dir: str) -> None:
    if names := non_finite(dict(model.named_parameters())):
        raise ValueError(
            f"the model has weights that are not finite ({names}), so it is not exported and {output_dir} is as it "
            "was; export a checkpoint from before they were lost"
        )


def _save(model: PreTrainedModel, output_dir: str) -> None:
    try:
        model.save_pretrained(output_dir)
    except ValueError:
        # before transformers 5.23, sampling values of a released model that does not sample by default stop the save
        if model.generation_config is None or model.generation_config.do_sample is True:
            raise
        model.generation_config.update(**dict.fromkeys(SAMPLING_VALUES))
        model.save_pretrained(output_dir)
