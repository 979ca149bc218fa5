"""A checkpoint of adapters, or of a policy with a reference, is used with the frozen weights that it was saved with."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from remax_lightning.callbacks import Checkpoint
from remax_lightning.checkpoints.manifest import UnusableCheckpoint
from remax_lightning.checkpoints.safe_checkpoint_io import SafeCheckpointIO, read_checkpoint
from remax_lightning.cli import ExportingTrainer
from remax_lightning.data import PreferenceDataModule
from remax_lightning.models.lora import LoRA
from remax_lightning.models.source import ModelSource
from remax_lightning.modules import PPO, ReMax, RewardModel
from remax_lightning.rollout import Sampling

BASE = r"the LlamaForCausalLM under the adapters has other weights than when it was saved \(\d+ parameters differ, "


def remax(policy: str, lora: LoRA | None = LoRA(rank=2), **options: Any) -> ReMax:
    return tiny.remax(policy, **{"lora": lora, "kl_coef": 0.1, "optimizer": tiny.adam(), **options})


def ppo(policy: str, lora: LoRA | None = LoRA(rank=2)) -> PPO:
    reward = tiny.remax(policy).reward
    return PPO(policy, reward, Sampling(max_new_tokens=2), lora=lora, value_model=str(Path(policy).parent / "value"))


def fit(module: Any, folder: Path, steps: int, ckpt_path: str | None = None) -> str:
    saves = Checkpoint(str(folder / "run"), every_n_train_steps=1, keep_last=9)
    data = tiny.prompt_data(folder)
    trainer = tiny.trainer(folder, steps, [saves], enable_checkpointing=True)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return saves.last_model_path


def replace(folder: Path, name: str = "policy", **options: Any) -> None:
    """Other weights in the same folder."""
    shutil.rmtree(folder / name)
    tiny.save_model(folder / name, **{"seed": 1, **options})


def test_other_weights_under_adapters_are_refused(tmp_path: Path) -> None:
    policy = tiny.save_model(tmp_path / "policy")
    path = fit(remax(policy), tmp_path, 1)
    fit(remax(policy), tmp_path, 2, path)
    replace(tmp_path)
    with pytest.raises(UnusableCheckpoint, match=BASE):
        fit(remax(policy), tmp_path, 2, path)
    exporting = ExportingTrainer(accelerator="cpu", devices=1, logger=False)
    with pytest.raises(UnusableCheckpoint, match=BASE):
        exporting.export(remax(policy), path, str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()
    data = tiny.prompt_data(tmp_path)
    data.validation = data.train
    trainer = tiny.trainer(tmp_path, callbacks=[Checkpoint(str(tmp_path / "run"))], enable_checkpointing=True)
    with pytest.raises(UnusableCheckpoint, match=BASE):
        trainer.validate(remax(policy), datamodule=data, ckpt_path=path)
    with pytest.raises(UnusableCheckpoint, match=BASE):
        ReMax.load_from_checkpoint(path, reward=remax(policy).reward)


def test_the_same_weights_may_be_elsewhere_and_in_another_type(tmp_path: Path) -> None:
    policy = tiny.save_model(tmp_path / "policy")
    path = fit(remax(policy), tmp_path, 1)
    shutil.move(policy, tmp_path / "elsewhere")
    moved = remax(policy := str(tmp_path / "elsewhere"))
    fit(moved, tmp_path, 2, path)
    half = tiny.remax(policy, lora=LoRA(rank=2), kl_coef=0.1, optimizer=tiny.adam())
    half.source = ModelSource(path=policy, dtype="bfloat16")
    fit(half, tmp_path, 2, path)


@pytest.mark.parametrize("separate", [False, True])
def test_another_reference_is_refused(separate: bool, tmp_path: Path) -> None:
    """The weights of the policy are all in the checkpoint, those of the reference are not."""
    policy = tiny.save_model(tmp_path / "policy")
    options: dict[str, Any] = {"lora": None}
    if separate:
        options["reference"] = ModelSource(path=tiny.save_model(tmp_path / "reference", seed=5))
    path = fit(remax(policy, **options), tmp_path, 1)
    replace(tmp_path, "reference" if separate else "policy")
    message = "the reference has other weights than when it was saved"
    with pytest.raises(UnusableCheckpoint, match=message):
        fit(remax(policy, **options), tmp_path, 2, path)
    ExportingTrainer(accelerator="cpu", devices=1, logger=False).export(
        remax(policy, **options), path, str(tmp_path / "hf")
    )
    fit(remax(policy, lora=None, kl_coef=0.0), tmp_path, 2, path)  # which has none


def test_the_start_of_full_weights_without_a_reference_may_change(tmp_path: Path) -> None:
    policy = tiny.save_model(tmp_path / "policy")
    path = fit(remax(policy, lora=None, kl_coef=0.0), tmp_path, 1)
    replace(tmp_path)
    fit(remax(policy, lora=None, kl_coef=0.0), tmp_path, 2, path)


def test_another_value_model_under_adapters_is_refused(tmp_path: Path) -> None:
    policy = tiny.save_model(tmp_path / "policy")
    tiny.save_reward_model(tmp_path / "value")
    path = fit(ppo(policy), tmp_path, 1)
    shutil.rmtree(tmp_path / "value")
    tiny.save_reward_model(tmp_path / "value", seed=1)
    with pytest.raises(UnusableCheckpoint, match="the LlamaForSequenceClassification under the adapters has other wei"):
        fit(ppo(policy), tmp_path, 2, path)


def test_a_new_head_may_start_elsewhere(tmp_path: Path) -> None:
    """It is trained, so the checkpoint has it; what it starts with depends on the seed."""
    policy = tiny.save_model(tmp_path / "policy")
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    train = tiny.write_rows(tmp_path / "pairs.jsonl", rows)

    def run(steps: int, path: str | None, seed: int) -> str:
        torch.manual_seed(seed)
        module = RewardModel(policy, lora=LoRA(rank=2))
        saves = Checkpoint(str(tmp_path / "run"), every_n_train_steps=1, keep_last=9)
        trainer = tiny.trainer(tmp_path, steps, [saves], enable_checkpointing=True)
        trainer.fit(module, datamodule=PreferenceDataModule(train=train, batch_size=2), ckpt_path=path)
        return saves.last_model_path

    path = run(1, None, 0)
    run(2, path, 1)
    replace(tmp_path)
    with pytest.raises(UnusableCheckpoint, match="under the adapters has other weights"):
        run(2, path, 0)


def test_checkpoints_of_earlier_versions_have_no_sample(tmp_path: Path) -> None:
    policy = tiny.save_model(tmp_path / "policy")
    old = read_checkpoint(fit(remax(policy), tmp_path, 1))
    del old["fingerprint"]["frozen"]
    SafeCheckpointIO().save_checkpoint(old, tmp_path / "old.ckpt")
    fit(remax(policy), tmp_path, 2, str(tmp_path / "old.ckpt"))
