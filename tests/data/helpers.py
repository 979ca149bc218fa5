"""What the tests of the data modules share."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from remax_lightning.models.tokenizer import encode_prompt, encode_response

REAL_DATA = Path(__file__).parents[2].parent / "shared" / "data"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLOURS = "red blue green black white grey pink brown tan gold teal navy lime plum rust sand mint rose coal snow"
WORDS = COLOURS.split(" ")
ROWS = [{"prompt": f"Name a {word} animal", "response": f"The {word} fox", "answer": i} for i, word in enumerate(WORDS)]
PAIRS = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "No"} for row in ROWS]


def build_tokenizer(pad="<pad>", bos=False, template=CHATML):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    core.train_from_iterator([row["prompt"] + " " + row["response"] for row in ROWS], trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


class Recorder(LightningModule):
    """Records the rows it is given; draws from the global generator as dropout would."""

    def __init__(self, tokenizer=None):
        super().__init__()
        self.tokenizer = build_tokenizer() if tokenizer is None else tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []
        self.evaluated = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["prompt_index"].tolist())
        return (self.weight * torch.rand(1)).sum()

    def validation_step(self, batch, batch_idx):
        self.evaluated.append(batch["prompt_index"].tolist())

    test_step = validation_step
    predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder, steps=None, epochs=None, ckpt_path=None, **options):
    recorder = Recorder()
    trainer = Trainer(
        default_root_dir=folder,
        max_steps=-1 if steps is None else steps,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
        **options,
    )
    trainer.fit(recorder, datamodule=data, ckpt_path=ckpt_path)
    return recorder


def attach(data, rank=0, world_size=1, tokenizer=None, stage="fit", distributed_sampler=False):
    """Set the module up as one of several processes."""
    module = SimpleNamespace(tokenizer=build_tokenizer() if tokenizer is None else tokenizer)
    data.trainer = SimpleNamespace(
        lightning_module=module,
        global_rank=rank,
        world_size=world_size,
        global_step=0,
        max_steps=1000,
        training=True,
        limit_val_batches=1.0,
        val_check_interval=1.0,
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=distributed_sampler),
    )
    data.setup(stage)
    return data


def train_batches(data):
    """One epoch, counted as the trainer does."""
    return [data.on_before_batch_transfer(batch, 0) for batch in data.train_dataloader()]


def indices(batches):
    return [index for batch in batches for index in batch["prompt_index"].tolist()]


def encoded(tokenizer, row):
    return encode_prompt(tokenizer, row["prompt"]), encode_response(tokenizer, row["prompt"], row["response"])


def dropped(data, **where):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(data, **where)
    return [str(warning.message) for warning in caught if "dropped" in str(warning.message)]


def real(name):
    if not (REAL_DATA / name).exists():
        pytest.skip(f"{name} is not next to the repository")
    return str(REAL_DATA / name)
