"""Two processes with half the batch each do what one process with the whole batch does."""

from pathlib import Path
from typing import Any

import pandas
import pytest
import tiny
import yaml
from processes import ROOT, run_python
from safetensors.torch import load_file

from remax_lightning.cli import main

pytestmark = pytest.mark.slow

SECONDS = 120
STEPS = 3
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
COMMON: dict[str, Any] = {"optimizer": SGD, "lr_schedule": "linear", "micro_batch_size": 1, "max_grad_norm": 5.0}
FSDP2 = {"class_path": "FSDP2Strategy", "init_args": {"compute_dtype": "float32"}}
TIMES = ("time/", "train/tokens_per_second", "epoch", "step")


def run(
    folder: Path, name: str, model: dict[str, Any], data: dict[str, Any], processes: int, strategy: Any = "auto"
) -> Path:
    """A fit with as many processes; the global batch is four rows."""
    values = dict(data["init_args"], batch_size=4 // processes, eval_batch_size=4 // processes)
    config = {
        "model": model,
        "data": {**data, "init_args": values},
        "trainer": {
            "accelerator": "cpu",
            "devices": processes,
            "strategy": strategy,
            "max_steps": STEPS,
            "default_root_dir": str(folder / name),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "check_val_every_n_epoch": None,
            "val_check_interval": STEPS,
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    arguments = ["fit", "--config", str(path)]
    if processes > 1:
        run_python([str(ROOT / "cli.py"), *arguments], SECONDS)
    else:
        main(arguments)
    return folder / name


def metrics(root: Path) -> pandas.DataFrame:
    table = pandas.read_csv(root / "logs" / "version_0" / "metrics.csv")
    return table[[name for name in table.columns if not name.startswith(TIMES)]]


def assert_same(one: Path, two: Path, start: str) -> None:
    before, single, split = (
        load_file(Path(folder) / "model.safetensors") for folder in (start, one / "hf", two / "hf")
    )
    assert tiny.norm(tiny.difference(before, single)) > 0.01
    tiny.assert_close(split, single, atol=1e-6, rtol=0)
    expected, actual = metrics(one), metrics(two)
    assert len(expected) >= STEPS
    pandas.testing.assert_frame_equal(actual, expected, check_like=True, atol=1e-4, rtol=1e-4)


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("strategy", ["ddp", FSDP2], ids=["ddp", "fsdp2"])
def test_remax(strategy: Any, tmp_path: Path) -> None:
    policy, other = tiny.save_model(tmp_path / "policy"), tiny.save_model(tmp_path / "other", seed=1)
    words = ["Go", "Tell me more", "a", "What is it", "Sing.", "no", "Yes or no", "up"]
    train = tiny.write_rows(
        tmp_path / "train.jsonl", [{"prompt": word, "gap": "nan" if word == "a" else ""} for word in words]
    )
    held_out = tiny.write_rows(tmp_path / "held_out.jsonl", [{"prompt": word, "gap": ""} for word in words[:5]])
    model = {
        "class_path": "ReMax",
        "init_args": {
            **COMMON,
            "policy": {"path": policy},
            "reference": {"path": other},
            "reward": {"class_path": "FunctionReward", "init_args": {"function": "reward_functions.with_gaps"}},
            "sampling": {"max_new_tokens": 10, "num_samples": 2},
            "kl_coef": 0.2,
        },
    }
    data = {"class_path": "PromptDataModule", "init_args": {"train": train, "validation": held_out}}
    one, two = run(tmp_path, "one", model, data, 1), run(tmp_path, "two", model, data, 2, strategy)
    assert_same(one, two, policy)
    table = metrics(one)
    assert sorted(table["train/rows_dropped"].dropna().unique()) == [0.0, 2.0]
    assert {"val/reward", "val/win_rate", "val/kl"} <= set(table.columns)


@pytest.mark.timeout(2 * SECONDS)
def test_sft(tmp_path: Path) -> None:
    policy = tiny.save_model(tmp_path / "policy")
    rows = [{"prompt": "ab" * n, "response": " c" * (9 - n)} for n in range(1, 9)]
    train = tiny.write_rows(tmp_path / "train.jsonl", rows)
    model = {"class_path": "SFT", "init_args": {**COMMON, "policy": {"path": policy}}}
    data = {"class_path": "DemonstrationDataModule", "init_args": {"train": train, "validation": train}}
    one, two = run(tmp_path, "one", model, data, 1), run(tmp_path, "two", model, data, 2, "ddp")
    assert_same(one, two, policy)


@pytest.mark.timeout(2 * SECONDS)
def test_ppo(tmp_path: Path) -> None:
    """Two models, whose gradients are exchanged in one backward pass."""
    policy = tiny.save_model(tmp_path / "policy")
    words = ["Go", "Tell me more", "a", "What is it", "Sing.", "no", "Yes or no", "up"]
    train = tiny.write_rows(tmp_path / "train.jsonl", [{"prompt": word} for word in words])
    model = {
        "class_path": "PPO",
        "init_args": {
            **COMMON,
            "policy": {"path": policy},
            "reward": {"class_path": "FunctionReward", "init_args": {"function": "reward_functions.letter_values"}},
            "sampling": {"max_new_tokens": 10},
            "kl_coef": 0.2,
        },
    }
    data = {"class_path": "PromptDataModule", "init_args": {"train": train}}
    one, two = run(tmp_path, "one", model, data, 1), run(tmp_path, "two", model, data, 2, "ddp")
    assert_same(one, two, policy)


@pytest.mark.timeout(2 * SECONDS)
def test_only_the_rank_that_fails_says_why(tmp_path: Path) -> None:
    """The self-check fails on one rank; the other one, which waits for it, has no traceback to show."""
    policy = tiny.save_model(tmp_path / "policy")
    train = tiny.write_rows(tmp_path / "train.jsonl", [{"prompt": prompt} for prompt in tiny.PROMPTS])
    options = [
        *("--model=ReMax", f"--model.policy.path={policy}", "--model.sampling.max_new_tokens=2"),
        *("--model.reward=FunctionReward", "--model.reward.function=reward_functions.failing_on_rank_1"),
        *("--data=PromptDataModule", f"--data.train={train}", "--data.batch_size=1", "--trainer.accelerator=cpu"),
        *("--trainer.devices=2", f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.max_steps=1"),
    ]
    with pytest.raises(AssertionError) as ended:  # with another status than 0
        run_python([str(ROOT / "cli.py"), "fit", *options], SECONDS)
    told = str(ended.value)
    assert "error: the reward raised RuntimeError: only here" in told
    assert "error: the connection to another rank is lost" in told
    assert "Traceback" not in told
