"""Write a trained model as a Hugging Face folder that anyone can load."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output_dir: str) -> None:
    """Save weights (safetensors), configuration, generation configuration, tokenizer and chat template.

    Args:
        model: Causal language model or sequence-classification model.
        tokenizer: Its tokenizer.
        output_dir: Folder to write, made if missing; files of the same name are replaced.
    """
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
