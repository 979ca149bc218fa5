"""Modules that train adapters: the policy without them is the reference, and they alone are saved."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from remax_lightning.callbacks import Checkpoint, HFExport
from remax_lightning.checkpoints.safe_checkpoint_io import read_checkpoint
from remax_lightning.data import DemonstrationDataModule, PreferenceDataModule
from remax_lightning.models.lora import LoRA
from remax_lightning.models.source import ModelSource
from remax_lightning.modules import SFT, ReMax, RewardModel
from remax_lightning.rewards import ModelReward

ADAPTERS = LoRA(rank=4)
IDS = torch.arange(2, 22).view(2, 10)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def remax(policy: str, **options: Any) -> ReMax:
    return tiny.remax(policy, **{"lora": ADAPTERS, "kl_coef": 0.2, "optimizer": adam, **options})


def test_only_adapters_are_trained_and_without_them_the_policy_is_the_reference(policy: str, tmp_path: Path) -> None:
    module, other = remax(policy), remax(policy, reference=ModelSource(path=policy))
    data = tiny.prompt_data(tmp_path)
    steps = tiny.fit(module, data, tmp_path, steps=4)
    expected = tiny.fit(other, data, tmp_path, steps=4)
    assert module.reference.model is module.policy
    assert other.reference.model is not other.policy
    assert steps["train/kl"] == pytest.approx(expected["train/kl"], abs=1e-5)
    assert steps["train/kl"][0] == pytest.approx(0.0, abs=1e-5)
    assert abs(steps["train/kl"][-1]) > 1e-3
    tiny.assert_close(tiny.weights(module.policy), tiny.weights(other.policy), atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(policy)
    assert isinstance(module.policy, PeftModel)
    kept = {name.replace(".base_layer", ""): value for name, value in module.policy.named_parameters()}
    assert all(torch.equal(kept[f"base_model.model.{name}"], value) for name, value in base.named_parameters())


def test_a_checkpoint_holds_adapters_alone_and_resumes_bitwise(policy: str, tmp_path: Path) -> None:
    def run(name: str, steps: int, **options: Any) -> ReMax:
        module = remax(policy)
        saves = Checkpoint(str(tmp_path / name), every_n_train_steps=2, save_top_k=-1)
        trainer = tiny.trainer(tmp_path, steps, [saves], enable_checkpointing=True)
        trainer.fit(module, datamodule=tiny.prompt_data(tmp_path), **options)
        return module

    whole = run("whole", 4)
    part = run("part", 4, ckpt_path=str(tmp_path / "whole" / "step=2.ckpt"))
    assert tiny.are_equal(tiny.weights(part.policy), tiny.weights(whole.policy))
    saved = read_checkpoint(tmp_path / "whole" / "step=2.ckpt")
    trained = {f"policy.{name}" for name, value in whole.policy.named_parameters() if value.requires_grad}
    assert saved["state_dict"].keys() == trained
    assert len(saved["optimizer_states"][0]["state"]) == len(trained)
    assert all(".lora_" in name for name in trained)


@pytest.mark.parametrize("merge", [True, False])
def test_a_later_stage_starts_from_what_was_exported(merge: bool, policy: str, tmp_path: Path) -> None:
    rows = [{"prompt": "ab" * n, "response": " c" * (9 - n)} for n in range(1, 5)]
    data = DemonstrationDataModule(train=tiny.write_rows(tmp_path / "rows.jsonl", rows), batch_size=4)
    sft = SFT(policy=ModelSource(path=policy), optimizer=adam, lora=LoRA(rank=4, merge=merge))
    tiny.fit(sft, data, tmp_path / "sft", steps=3, callbacks=[HFExport()])
    exported = tmp_path / "sft" / "hf"
    assert (exported / "adapter_model.safetensors").exists() is not merge
    assert (exported / "model.safetensors").exists() is merge
    with torch.no_grad():
        expected = sft.policy.eval()(IDS).logits
        assert (expected - AutoModelForCausalLM.from_pretrained(policy)(IDS).logits).abs().max() > 1e-2
    module = remax(str(exported))
    steps = tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, steps=2)
    assert steps["train/kl"][0] == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad(), module.reference.active() as reference:
        torch.testing.assert_close(reference.eval()(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert (module.policy(IDS).logits - expected).abs().max() > 1e-3


def test_a_reward_model_trains_its_head_and_adapters(tmp_path: Path) -> None:
    path = tiny.save_model(tmp_path / "policy")
    rows = [{"prompt": word, "chosen": " yes", "rejected": " no"} for word in ("one", "two", "three", "four")]
    data = PreferenceDataModule(train=tiny.write_rows(tmp_path / "rows.jsonl", rows), batch_size=4)
    module = RewardModel(model=ModelSource(path=path), optimizer=adam, lora=ADAPTERS, lr_schedule="constant")
    steps = tiny.fit(module, data, tmp_path / "run", steps=15, callbacks=[HFExport()])
    assert steps["train/loss"][-1] < 0.5 * steps["train/loss"][0]
    trained = [name for name, value in module.model.named_parameters() if value.requires_grad]
    assert all(".lora_" in name or ".modules_to_save." in name for name in trained)
    assert any("score" in name for name in trained)
    reward = ModelReward(str(tmp_path / "run" / "hf"))
    reward.setup(torch.device("cpu"))
    scores = reward([row["prompt"] for row in rows] * 2, [row[name] for name in ("chosen", "rejected") for row in rows])
    assert (scores[:4] > scores[4:]).all()
    base = load_file(tmp_path / "policy" / "model.safetensors")
    plain = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    assert not torch.equal(plain["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(plain["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_quantized_weights_need_adapters(policy: str, tmp_path: Path) -> None:
    source = ModelSource(path=policy, quantization="4bit")
    module = SFT(policy=source, optimizer=adam)
    with pytest.raises(ValueError, match="weights in 4bit cannot be trained, only adapters on them; set lora"):
        module.configure_model()
