"""A trained model as a Hugging Face folder."""

from pathlib import Path

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remax_lightning.models.lora import merged


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
        (merged(model) if isinstance(model, PeftModel) else model).save_pretrained(output_dir)
        # from_pretrained would apply the adapters of an earlier export
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            (Path(output_dir) / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(output_dir)
