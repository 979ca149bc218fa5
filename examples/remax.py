"""ReMax in Python: a tiny model with random weights learns to write vowels, on a CPU in seconds, without downloads.

python examples/remax.py
"""

from functools import partial

from lightning.pytorch import Trainer, seed_everything
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.optim import AdamW
from transformers import PreTrainedTokenizerFast

from remax_lightning import HFExport, ModelSource, PromptDataModule, ReMax, Sampling, SelfCheck


def vowels(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward: the share of the 16 possible letters that are vowels."""
    return [sum(letter in "aeiou" for letter in response) / 16 for response in responses]


def tiny_policy(folder: str) -> ModelSource:
    """A Llama of two layers with random weights, whose tokens are letters."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyzĠ."])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ModelSource(config={"model_type": "llama", **sizes}, tokenizer=folder)


def main(output_dir: str = "runs/example", max_steps: int = 60) -> tuple[float, float]:
    """Train and export to ``output_dir/hf``; the mean reward before and after."""
    seed_everything(0)
    rows = [{"prompt": f"tell me about {size} {animal}."} for size in ("big", "old") for animal in ("cats", "owls")]
    data = PromptDataModule(train=240 * rows, validation=rows, predict=rows, batch_size=16, max_prompt_length=64)
    module = ReMax(
        policy=tiny_policy(f"{output_dir}/tokenizer"),  # or the folder or hub name of a model
        reward=vowels,
        sampling=Sampling(max_new_tokens=16),
        kl_coef=0.01,  # reward per nat
        optimizer=partial(AdamW, lr=1e-2),  # for random weights; a pretrained model needs about 1e-6
    )
    trainer = Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        devices=1,
        default_root_dir=output_dir,
        enable_checkpointing=False,  # or callbacks=[Checkpoint(...)], for checkpoints that resume exactly
        callbacks=[SelfCheck(), HFExport()],
    )
    before = trainer.validate(module, datamodule=data)[0]["val/reward"]
    trainer.fit(module, datamodule=data)
    after = trainer.validate(module, datamodule=data)[0]["val/reward"]
    responses = trainer.predict(module, datamodule=data)[0]
    print(f"reward before {before:.2f}, after {after:.2f}; a response: {responses[0]['response']!r}")
    return before, after


if __name__ == "__main__":
    main()
