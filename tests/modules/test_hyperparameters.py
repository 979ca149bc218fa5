"""A module's arguments as plain values: in the logger, in checkpoints, and back into a module."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from remax_lightning import PPO, RLOO, SFT, KLControl, LoRA, ModelReward, ModelSource, Reinforce, ReMax, RewardModel
from remax_lightning.callbacks import Checkpoint
from remax_lightning.modules.hyperparameters import as_plain, restored
from remax_lightning.rewards import FunctionReward, Reward
from remax_lightning.rollout import Sampling, TransformersEngine


class Mine(Reward):
    def __call__(self, prompts: Any, responses: Any, **columns: Any) -> Any:
        return torch.zeros(len(responses))


def test_plain_values() -> None:
    assert as_plain(Sampling(3, top_k=2)) == {
        "max_new_tokens": 3,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 2,
        "num_samples": 1,
    }
    reward = as_plain(ModelReward("folder", batch_size=4))
    assert reward["class_path"] == "remax_lightning.rewards.model.ModelReward"
    assert reward["init_args"]["batch_size"] == 4
    assert as_plain(TransformersEngine(compile=True))["init_args"] == {"compile": True}
    assert as_plain(partial(torch.optim.AdamW, lr=0.1)) == {
        "class_path": "torch.optim.adamw.AdamW",
        "init_args": {"lr": 0.1},
    }
    assert as_plain({"a": (1, None, Mine())}) == {"a": [1, None, {"class_path": f"{__name__}.Mine"}]}


def modules(policy: str) -> list[Any]:
    reward, sampling = FunctionReward("reward_functions.letter_values"), Sampling(6, num_samples=2)
    common: dict[str, Any] = {"policy": policy, "reward": reward, "sampling": sampling}
    return [
        ReMax(**common, judge=reward, lora=LoRA(rank=2), kl=KLControl(target=2.0), seed=4, kl_form="one_step"),
        Reinforce(**{**common, "policy": ModelSource(path=policy)}, baseline="batch_mean", kl_coef=0.0),
        RLOO(**common, engine=TransformersEngine(), reference=policy),
        PPO(**common, value_model=ModelSource(path=policy, dtype="bfloat16")),
        SFT(policy=policy),
        RewardModel(model=policy, max_grad_norm=None),
    ]


@pytest.mark.parametrize("number", range(6))
def test_a_module_is_built_again_from_its_hyper_parameters(number: int, policy: str) -> None:
    module = modules(policy)[number]
    values = yaml.safe_load(yaml.safe_dump(dict(module.hparams)))
    again = type(module)(**restored(type(module), values, {}))
    assert {**again.hparams, "optimizer": None} == {**module.hparams, "optimizer": None}


def test_what_cannot_be_restored_has_to_be_passed(policy: str) -> None:
    module = ReMax(policy=policy, reward=Mine(), sampling=Sampling(6))
    with pytest.raises(ValueError, match=r"reward was .*Mine.*pass reward=... to ReMax.load_from_checkpoint"):
        restored(ReMax, module.hparams, {})
    reward = Mine()
    assert restored(ReMax, module.hparams, {"reward": reward})["reward"] is reward
    loaded = tiny.language_model(vocab_size=len(tiny.tokenizer()))
    loaded.name_or_path = policy
    module = ReMax(policy=loaded, reward=FunctionReward("a.b"), sampling=Sampling(6))
    with pytest.raises(ValueError, match=r"policy was .*LlamaForCausalLM.*pass policy=..."):
        restored(ReMax, module.hparams, {})
    module = ReMax(policy=policy, reward=lambda prompts, responses: [0.0], sampling=Sampling(6))
    with pytest.raises(ValueError, match=r"reward was .*lambda.*pass reward=..."):
        restored(ReMax, module.hparams, {})


@pytest.mark.parametrize("path", ["os.system", "remax_lightning.cli.main", "remax_lightning.models.lora.LoRA"])
def test_hyper_parameters_run_no_code(path: str, policy: str) -> None:
    for value in ({"class_path": path, "init_args": {"command": "touch x"}}, path):
        with pytest.raises(ValueError, match="which a checkpoint does not restore"):
            restored(ReMax, {"reward": value}, {})


def test_a_logger_gets_them(policy: str, tmp_path: Path) -> None:
    module = modules(policy)[0]
    tiny.fit(module, tiny.prompt_data(tmp_path), tmp_path, logger=CSVLogger(tmp_path))
    values = yaml.safe_load((tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text())
    assert values["kl"]["target"] == 2.0
    assert values["sampling"]["num_samples"] == 2
    assert values["policy"] == policy


def test_a_module_is_loaded_from_a_checkpoint(policy: str, tmp_path: Path) -> None:
    trained = modules(policy)[0]
    checkpoint = Checkpoint(str(tmp_path / "checkpoints"))
    options = {"callbacks": [checkpoint], "enable_checkpointing": True}
    tiny.fit(trained, tiny.prompt_data(tmp_path), tmp_path, steps=2, **options)
    path = checkpoint.last_model_path
    loaded = ReMax.load_from_checkpoint(path)
    assert tiny.are_equal(tiny.weights(loaded.policy), tiny.weights(trained.policy))
    assert loaded.kl_controller.weight == trained.kl_controller.weight
    assert loaded.hparams == trained.hparams
    assert ReMax.load_from_checkpoint(path, kl_coef=0.3).kl_coef == 0.3
    newest = ReMax.load_from_checkpoint(tmp_path / "checkpoints")
    assert tiny.are_equal(tiny.weights(newest.policy), tiny.weights(trained.policy))
    with pytest.raises(ValueError, match="does not fit this run: method was ReMax, now it is SFT"):
        SFT.load_from_checkpoint(path)
    with pytest.raises(TypeError, match="ReMax has no argument kl_coeff"):
        ReMax.load_from_checkpoint(path, kl_coeff=0.3)
