"""A trained model as a Hugging Face folder."""

from pathlib import Path

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    """
    if isinstance(model, PeftModel) and not merge:
        # embeddings are never trained; peft would look up the base on the hub to find out
        model.save_pretrained(output_dir, save_embedding_layers=False)
    else:
        _save(merged(model) if isinstance(model, PeftModel) else model, output_dir)
        # from_pretrained would apply the adapters of an earlier export
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            (Path(output_dir) / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(output_dir)


def _save(model: PreTrainedModel, output_dir: str) -> None:
    try:
        model.save_pretrained(output_dir)
    except ValueError:
        # before transformers 5.23, sampling values of a released model that does not sample by default stop the save
        if model.generation_config is None or model.generation_config.do_sample is True:
            raise
        model.generation_config.update(**dict.fromkeys(SAMPLING_VALUES))
        model.save_pretrained(output_dir)
