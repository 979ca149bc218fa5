"""What the process of a command that a signal ends, or that is refused, says to whoever started it."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import reward_functions
import tiny
import yaml

from remax_lightning import cli
from remax_lightning.callbacks.run_lock import RunLock
from remax_lightning.checkpoints.manifest import manifests
from remax_lightning.modules import ReMax


@pytest.fixture
def config(policy: str, tmp_path: Path) -> Path:
    """A ReMax run of three steps, with a self-check, a validation after the last step and a test."""
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": prompt} for prompt in tiny.PROMPTS])
    trainer = {"accelerator": "cpu", "max_steps": 3, "default_root_dir": str(tmp_path / "run"), "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    model = {
        "policy": {"path": policy},
        "reward": {"class_path": "FunctionReward", "init_args": {"function": "reward_functions.letter_values"}},
        "sampling": {"max_new_tokens": 4},
        "kl_coef": 0.0,
    }
    data = {"train": rows, "validation": rows, "test": rows, "predict": rows, "batch_size": 2}
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "trainer": {**trainer, **quiet, "val_check_interval": 3, "check_val_every_n_epoch": None},
                "model": {"class_path": "ReMax", "init_args": model},
                "data": {"class_path": "PromptDataModule", "init_args": data},
            }
        )
    )
    return path


@pytest.fixture
def run(config: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command as from a shell; its exit status, 0 at the end, or its sentence."""

    def run(subcommand: str, *arguments: str) -> object:
        monkeypatch.setattr(sys, "argv", ["cli.py", subcommand, "--config", str(config), *arguments])
        try:
            cli.main()
        except SystemExit as end:
            return end.code
        return 0

    return run


def saved(config: Path) -> list[int]:
    return sorted(manifest.step for _, manifest in manifests(config.parent / "run" / "checkpoints"))


def sends(signum: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the reward send a signal when it is called for the n-th time."""
    left = [calls]

    def reward(prompts: Any, responses: Any) -> list[float]:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signum)
        return [reward_functions.letter_value(response) for response in responses]

    monkeypatch.setattr(reward_functions, "letter_values", reward)


# two calls of the self-check, one of each step
CALLS = {"in the self-check": (1, []), "in the second step": (4, [1]), "in the validation": (6, [2, 3])}


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str
)
@pytest.mark.parametrize(("calls", "steps"), CALLS.values(), ids=CALLS.keys())
def test_of_a_fit_that_a_signal_ends(
    signum: int, status: int, calls: int, steps: list[int], run: Any, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sends(signum, calls, monkeypatch)
    assert run("fit") == status
    assert saved(config) == steps


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_of_an_evaluation_that_a_signal_ends(
    subcommand: str, signum: int, status: int, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sends(signum, 2, monkeypatch)
    assert run(subcommand) == status


def test_of_a_prediction_that_a_signal_ends(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def predict_step(self: Any, batch: Any, batch_idx: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return []

    monkeypatch.setattr(ReMax, "predict_step", predict_step)
    assert run("predict") == 143


def test_of_a_fit_in_a_folder_that_is_in_use(run: Any, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = RunLock(config.parent / "run" / "checkpoints")
    monkeypatch.setattr("socket.gethostname", lambda: "another machine")
    assert lock.take() is None
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["cli.py", "fit", "--config", str(config)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert str(end.value.code).startswith("error: the run in ")
    assert f"if it is known to have ended, delete {lock.path}" in str(end.value.code)


@pytest.mark.slow
def test_of_last_after_a_rerun_that_has_saved_nothing(run: Any, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends while its model is loaded."""
    assert run("fit") == 0
    with monkeypatch.context() as context:
        context.setattr(ReMax, "configure_model", lambda self: os.kill(os.getpid(), signal.SIGINT))
        assert run("fit") == 130
    for subcommand in ("fit", "test"):
        assert "the run that was started last in" in str(run(subcommand, "--ckpt_path", "last"))
    assert run("fit") == 0
    assert run("test", "--ckpt_path", "last") == 0
    assert saved(config) == [2, 2, 3, 3]
