"""Models and tokenizers that are built in milliseconds."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 64
SHAPES = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
    },
}
SHAPES["qwen2"] = SHAPES["llama"]
SHAPES["mistral"] = {**SHAPES["llama"], "sliding_window": 8}
SHAPES["gemma"] = {**SHAPES["llama"], "head_dim": 8}
SHAPES["gemma2"] = {**SHAPES["gemma"], "sliding_window": 8}


def language_model(model_type: str = "llama", seed: int = 0, scale: float = 8.0, **values: object) -> PreTrainedModel:
    """A random causal language model whose distributions are far from uniform, so that no two logits tie."""
    torch.manual_seed(seed)
    defaults = {"vocab_size": VOCABULARY, "eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **{**SHAPES[model_type], **defaults, **values})
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(2.0 if "embed" in name or "wte" in name else scale)
    return model.eval()


def tokenizer(pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges that knows the letters, the blank and full stop."""
    characters = list("ĠabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.:")
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *characters])}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    pad = "<eos>" if pad_is_eos else "<pad>"
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token=pad)
