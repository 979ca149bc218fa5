"""A run that is stopped at any step, for any reason, and resumed is bitwise the run that was never stopped."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger

from remax_lightning.callbacks import Checkpoint
from remax_lightning.data import DemonstrationDataModule, PreferenceDataModule
from remax_lightning.models.source import ModelSource
from remax_lightning.modules import SFT, ReMax, RewardModel
from remax_lightning.modules.base import TrainableModule
from remax_lightning.rewards import FunctionReward
from remax_lightning.rollout import Sampling

pytestmark = pytest.mark.slow

STEPS, ROWS, BATCH = 7, 6, 2
TIMES = ("time/", "train/tokens_per_second")
# when a validation follows: each epoch (3 steps), in mid-epoch and across epochs, twice an epoch, never
VALIDATIONS: dict[str, dict[str, Any]] = {
    "epochs": {},
    "steps": {"val_check_interval": 2, "check_val_every_n_epoch": None},
    "often": {"val_check_interval": 1},
    "second": {"check_val_every_n_epoch": 2},
    "never": {"limit_val_batches": 0},
}
METHODS = ("SFT", "RewardModel", "ReMax")
Log = list[tuple[int | None, dict[str, float]]]


class Recorder(Logger):
    """What was logged, in order."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.lines: Log = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        kept = {name: float(value) for name, value in metrics.items() if not name.startswith(TIMES)}
        if set(kept) - {"epoch"}:
            self.lines.append((step, kept))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Fit:
    """A method's fit from a fixed start, in a run's folder."""

    def __init__(self, method: str, folder: Path, validation: str = "epochs") -> None:
        self.method, self.validation = method, validation
        self.start = tiny.save_model(folder / "start")
        rows = [{"prompt": "ab" * n, "chosen": "c" * (9 - n), "rejected": "d" * n} for n in range(1, ROWS + 1)]
        responses = [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows]
        self.rows = tiny.write_rows(folder / "rows.jsonl", rows if method == "RewardModel" else responses)

    def module(self) -> TrainableModule:
        source = ModelSource(path=self.start)
        options: dict[str, Any] = {
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            "lr_schedule": "linear",
            "warmup_fraction": 0.3,
        }
        torch.manual_seed(0)  # the scalar head
        if self.method == "SFT":
            return SFT(policy=source, **options)
        if self.method == "RewardModel":
            return RewardModel(model=source, **options)
        reward = FunctionReward("reward_functions.letter_values")
        sampling = Sampling(max_new_tokens=6, num_samples=2)
        return ReMax(policy=source, reward=reward, sampling=sampling, kl_coef=0.1, **options)

    def data(self) -> LightningDataModule:
        if self.method == "ReMax":
            return tiny.prompt_data(Path(self.rows).parent, train=self.rows, validation=self.rows, batch_size=BATCH)
        kind = {"SFT": DemonstrationDataModule, "RewardModel": PreferenceDataModule}[self.method]
        return kind(train=self.rows, validation=self.rows, batch_size=BATCH)

    def __call__(
        self,
        folder: Path,
        ckpt_path: str | None = None,
        callback: Callback | None = None,
        steps: int = STEPS,
        **checkpoint: Any,
    ) -> tuple[Log, dict[str, Any]]:
        """Train; what was logged, and the state of the last step."""
        recorder = Recorder()
        saver = Checkpoint(dirpath=str(folder), **checkpoint)
        trainer = tiny.trainer(
            folder.parent,
            steps,
            [callback or Callback(), saver],
            logger=recorder,
            log_every_n_steps=1,
            enable_checkpointing=True,
            **VALIDATIONS[self.validation],
        )
        module = self.module()
        try:
            trainer.fit(module, datamodule=self.data(), ckpt_path=ckpt_path)
        except Stop:
            return recorder.lines, {}
        return recorder.lines, state(trainer)


def state(trainer: Trainer) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "weights": trainer.lightning_module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "data": trainer.datamodule.state_dict(),
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
        }
    )


def assert_bitwise(one: Any, other: Any, name: str = "") -> None:
    """Equal in every bit, at all depths."""
    assert type(one) is type(other), name
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_bitwise(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), name
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_bitwise(left, right, f"{name}.{index}")
    else:
        assert one == other or one != one, name


def after(log: Log, step: int, is_validated: bool = False) -> Log:
    """What a run logs after a step: the validation that follows it, unless done, and all later steps."""
    is_validation = [any(name.startswith("val/") for name in metrics) for _, metrics in log]
    steps = [0 if line[0] is None else line[0] for line in log]
    chosen = zip(log, steps, is_validation, strict=True)
    return [line for line, at, is_val in chosen if at >= step or (at == step - 1 and is_val and not is_validated)]


class Stop(Exception):
    """Raised in the middle of a run."""


class StopAt(Callback):
    """Stops a run in the training batch after a step, or in the validation after it."""

    def __init__(self, step: int, hook: str = "training", stop: Callable[[], None] | None = None) -> None:
        self.step, self.hook, self.stop = step, hook, stop or self._raise

    @staticmethod
    def _raise() -> None:
        raise Stop

    def _stop_if(self, trainer: Trainer, hook: str) -> None:
        if hook == self.hook and trainer.global_step == self.step and not trainer.sanity_checking:
            self.stop()

    def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
        self._stop_if(trainer, "training")

    def on_validation_batch_start(self, trainer: Trainer, *args: object) -> None:
        self._stop_if(trainer, "validation")


@pytest.mark.parametrize(
    ("method", "validation"),
    [("SFT", "epochs"), ("RewardModel", "steps"), ("ReMax", "steps")]
    + [("SFT", validation) for validation in ("steps", "often", "second", "never")],
)
def test_resumed_from_every_step(method: str, validation: str, tmp_path: Path) -> None:
    fit = Fit(method, tmp_path, validation)
    log, end = fit(tmp_path / "whole", every_n_train_steps=1, save_top_k=-1)
    assert len({str(line) for line in log}) == len(log) >= STEPS
    for step in range(1, STEPS):  # the folder starts with nothing but the file
        folder = tmp_path / f"from_{step}"
        resumed, resumed_end = fit(folder, str(tmp_path / "whole" / f"step={step}.ckpt"))
        assert resumed == after(log, step), step
        assert_bitwise(resumed_end, end)


@pytest.mark.parametrize("hook", ["training", "validation"])
@pytest.mark.parametrize(("method", "validation"), [("SFT", "steps"), ("RewardModel", "epochs"), ("ReMax", "epochs")])
def test_resumed_after_an_error(method: str, validation: str, hook: str, tmp_path: Path) -> None:
    fit = Fit(method, tmp_path, validation)
    log, end = fit(tmp_path / "whole")
    stops = {"epochs": (3, 6), "steps": (2, 4, 6)}[validation] if hook == "validation" else range(1, STEPS)
    for step in stops:
        folder = tmp_path / f"stopped_{step}"
        first, _ = fit(folder, callback=StopAt(step, hook))
        assert (folder / f"step={step}.ckpt").exists()
        resumed, resumed_end = fit(folder, "last")
        assert resumed == after(log, step, is_validated=hook == "training")
        assert first + resumed == log
        assert_bitwise(resumed_end, end)


@pytest.mark.parametrize("validation", ["epochs", "steps", "never"])
def test_stopped_at_every_step_of_one_run(validation: str, tmp_path: Path) -> None:
    fit = Fit("ReMax", tmp_path, validation)
    log, end = fit(tmp_path / "whole")
    lines: Log = []
    for step in range(1, STEPS):
        lines += fit(tmp_path / "part", "last" if step > 1 else None, StopAt(step))[0]
    last, part_end = fit(tmp_path / "part", "last")
    assert lines + last == log
    assert_bitwise(part_end, end)


@pytest.mark.parametrize("validation", ["epochs", "steps", "never"])
def test_more_steps_than_at_first(validation: str, tmp_path: Path) -> None:
    fit = Fit("SFT", tmp_path, validation)
    fit.module = lambda module=fit.module: constant(module())  # type: ignore[method-assign, misc]
    log, end = fit(tmp_path / "whole")
    for steps in (1, 2, 3, 4):
        first, _ = fit(tmp_path / f"part_{steps}", steps=steps)
        resumed, resumed_end = fit(tmp_path / f"part_{steps}", "last")
        assert first + resumed == log
        assert_bitwise(resumed_end, end)


def constant(module: TrainableModule) -> TrainableModule:
    """A learning rate that does not depend on the number of steps."""
    module.lr_schedule, module.warmup_fraction = "constant", 0.0
    return module


def test_a_run_that_has_ended_does_nothing_more(tmp_path: Path) -> None:
    fit = Fit("SFT", tmp_path)
    _, end = fit(tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").iterdir()}
    log, resumed_end = fit(tmp_path / "whole", "last")
    assert log == []
    assert_bitwise(resumed_end["weights"], end["weights"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").iterdir()} == before


def test_an_error_in_the_update_saves_nothing(tmp_path: Path) -> None:
    class Torn(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *args: object) -> None:
            if trainer.global_step == 2:
                trainer.callbacks[-1].on_before_optimizer_step(trainer, trainer.lightning_module, None)  # type: ignore
                raise Stop

    fit = Fit("SFT", tmp_path)
    fit(tmp_path / "part", callback=Torn(), every_n_train_steps=1)
    before = {path.name for path in (tmp_path / "part").glob("*.ckpt")}
    shutil.rmtree(tmp_path / "part")
    fit(tmp_path / "part", callback=Torn(), every_n_train_steps=5)
    assert before == {"step=1.ckpt", "step=2.ckpt"}
    assert not list((tmp_path / "part").glob("*.ckpt"))


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_hold_plain_types(method: str, tmp_path: Path) -> None:
    Fit(method, tmp_path)(tmp_path / "run", steps=1)
    checkpoint = torch.load(tmp_path / "run" / "step=1.ckpt", weights_only=True)
    assert {"state_dict", "optimizer_states", "loops", "fingerprint"} <= set(checkpoint)


def test_kill_nine(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, str(root / "benchmarks" / "kill_nine.py"), "--kills", "3", "--steps", "9"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    output = subprocess.run(
        [*command, "--hidden_size", "32", "--folders", str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    (case,) = json.loads(output.splitlines()[-1])["cases"]
    assert case["kills"] == 3
    assert case["is_equal"]
