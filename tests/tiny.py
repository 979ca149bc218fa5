"""Models and tokenizers that are built in milliseconds."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from remax_lightning.data import PromptDataModule
from remax_lightning.models.source import ModelSource
from remax_lightning.modules import ReMax
from remax_lightning.rewards import FunctionReward, Reward
from remax_lightning.rollout import Sampling

VOCABULARY = 64
STOPS = (1, 10, 20, 30, 40, 50)
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
SHAPES["bert"] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
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
    _spread(model, scale)
    return model.eval()


def _spread(model: nn.Module, scale: float) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(2.0 if "embed" in name or "wte" in name else scale)


def tokenizer(pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges that knows the letters, the blank and full stop."""
    characters = list("ĠabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.:")
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *characters])}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    pad = "<eos>" if pad_is_eos else "<pad>"
    extra = ["<pad>"] if pad_is_eos else []  # never part of a text, whatever pads
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<eos>", pad_token=pad, additional_special_tokens=extra
    )


def save_model(
    folder: Path,
    model_type: str = "llama",
    scale: float = 3.0,
    seed: int = 0,
    pad_is_eos: bool = False,
    **values: object,
) -> str:
    """A folder with a random causal language model, the tokenizer whose vocabulary it has, and several stop tokens."""
    words = tokenizer(pad_is_eos)
    model = language_model(model_type, seed, scale, vocab_size=len(words), **values)
    model.generation_config.eos_token_id = list(STOPS)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def save_reward_model(
    folder: Path,
    model_type: str = "llama",
    scale: float = 3.0,
    seed: int = 0,
    pad_is_eos: bool = False,
    **values: object,
) -> str:
    """A folder with a random sequence-classification model of one label, unless told, and the tokenizer."""
    words = tokenizer(pad_is_eos)
    torch.manual_seed(seed)
    defaults = {"vocab_size": len(words), "eos_token_id": 1, "bos_token_id": 1, "pad_token_id": words.pad_token_id}
    config = AutoConfig.for_model(model_type, **{**SHAPES[model_type], **defaults, "num_labels": 1, **values})
    model = AutoModelForSequenceClassification.from_config(config)
    _spread(model, scale)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """A JSON-lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


class History(Callback):
    """The metrics of every training batch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def __getitem__(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]


def trainer(folder: Path, steps: int = 1, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    """A quiet trainer on one CPU."""
    defaults: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    values = {**defaults, **options}
    return Trainer(
        accelerator="cpu", devices=1, max_steps=steps, default_root_dir=folder, callbacks=list(callbacks), **values
    )


def fit(module: LightningModule, data: LightningDataModule, folder: Path, steps: int = 1, **options: Any) -> History:
    """Train a module; the metrics of its batches."""
    history = History()
    callbacks = [history, *options.pop("callbacks", ())]
    trainer(folder, steps, callbacks, **options).fit(module, datamodule=data)
    return history


def sgd(lr: float = 1.0, **values: Any) -> Callable[..., torch.optim.Optimizer]:
    """Plain gradient descent: with a rate of 1 the weights change by minus the gradient."""
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, **values)


def adam(lr: float = 1e-2, **values: Any) -> Callable[..., torch.optim.Optimizer]:
    """AdamW with a rate that moves every weight far in one step."""
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, **values)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def difference(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Before minus after, by name."""
    assert before.keys() == after.keys()
    return {name: before[name] - after[name] for name in before}


def norm(values: dict[str, Tensor]) -> float:
    """Euclidean norm of all values together."""
    return float(torch.stack([value.norm() for value in values.values()]).norm())


def are_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """True if all values are bitwise equal."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-6, rtol: float = 1e-4
) -> None:
    """All values are close."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")


PROMPTS = ["Tell me", "a", "What now.", "Sing a song of it", "Go on."]


def prompt_data(folder: Path, rows: Sequence[dict[str, Any]] | None = None, **options: Any) -> PromptDataModule:
    """All rows in one training batch; PROMPTS unless told."""
    chosen = [{"prompt": prompt} for prompt in PROMPTS] if rows is None else rows
    path = write_rows(folder / f"prompts{len(list(folder.glob('prompts*')))}.jsonl", chosen)
    return PromptDataModule(**{"train": path, "batch_size": len(chosen), **options})


def remax(policy: str, reward: Reward | str = "letter_values", **options: Any) -> ReMax:
    """ReMax by plain gradient descent with a rate of 1 and without a KL penalty, unless told."""
    defaults: dict[str, Any] = {
        "sampling": Sampling(max_new_tokens=12),
        "kl_coef": 0.0,
        "optimizer": sgd(),
        "lr_schedule": "constant",
        "max_grad_norm": None,
    }
    scored = FunctionReward(f"reward_functions.{reward}") if isinstance(reward, str) else reward
    return ReMax(policy=ModelSource(path=policy), reward=scored, **{**defaults, **options})
