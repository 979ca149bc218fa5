"""SIGTERM at any moment of a run: the last finished step is saved, the exit status is 143, the rest can be resumed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment

from remax_lightning.callbacks import Checkpoint
from remax_lightning.callbacks.signal_guard import Terminated

STEPS = 4


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Signals(Callback):
    """Sends SIGTERM to this process when a hook of the step after some others is reached."""

    def __init__(self, hook: str, step: int = 2) -> None:
        self.step, self.hook, self.seen = step, hook, 0
        setattr(self, hook, self.send)

    def send(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == self.step and not self.seen:
            self.seen = 1
            sigterm()


def fit(policy: str, folder: Path, callback: Callback | None = None, *, patch: Any = None, **options: Any) -> Any:
    module = tiny.remax(policy, optimizer=tiny.adam())
    data = tiny.prompt_data(folder.parent, batch_size=2)
    data.validation = data.train
    if patch is not None:
        patch(module)
    saver = Checkpoint(dirpath=str(folder))
    trainer = tiny.trainer(
        folder.parent,
        STEPS,
        [callback or Callback(), saver],
        enable_checkpointing=True,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    trainer.fit(module, datamodule=data, **options)
    return trainer.lightning_module.policy


@contextmanager
def ended() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as end:
        yield
    assert end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def saved(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.ckpt")}


def assert_resumes(policy: str, folder: Path) -> None:
    whole = fit(policy, folder.parent / "whole")
    assert tiny.are_equal(tiny.weights(fit(policy, folder, ckpt_path="last")), tiny.weights(whole))


def test_in_a_rollout(policy: str, tmp_path: Path) -> None:
    """The signal comes while the second token of the fourth step is decoded; nothing more is computed."""
    calls = []

    def patch(module: Any) -> None:
        configure = module.configure_model

        def configure_and_hook() -> None:
            configure()

            def send(model: torch.nn.Module, *args: object) -> None:
                if module.global_step == 3 and module.trainer.training:
                    calls.append(model.training)
                    if len(calls) == 2:
                        sigterm()

            module.policy.register_forward_pre_hook(send)

        module.configure_model = configure_and_hook

    with ended():
        fit(policy, tmp_path / "run", patch=patch)
    assert len(calls) == 2
    assert saved(tmp_path / "run") == {"step=2.ckpt", "step=3.ckpt"}
    assert_resumes(policy, tmp_path / "run")


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_start", 1),
        ("on_train_batch_start", 3),
        ("on_before_optimizer_step", 3),
        ("on_train_batch_end", 3),
        ("on_validation_start", 2),
        ("on_validation_batch_start", 2),
        ("on_validation_end", 2),
        ("on_train_epoch_end", 4),
    ],
)
def test_anywhere(policy: str, tmp_path: Path, hook: str, step: int) -> None:
    with ended():
        fit(policy, tmp_path / "run", Signals(hook, step))
    assert f"step={step}.ckpt" in saved(tmp_path / "run")
    assert not saved(tmp_path / "run") & {f"step={later}.ckpt" for later in range(step + 1, STEPS + 1)}
    assert_resumes(policy, tmp_path / "run")


def test_in_the_optimizer(policy: str, tmp_path: Path) -> None:
    """The signal comes between two tensors of an update."""

    def patch(module: Any) -> None:
        class Torn(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                parameters = [p for group in self.param_groups for p in group["params"]]
                with torch.enable_grad():
                    closure()
                for number, parameter in enumerate(parameters):
                    if number == 3 and module.global_step == 2:
                        sigterm()
                    if parameter.grad is not None:
                        parameter.data.sub_(parameter.grad, alpha=0.01)

        module.optimizer = lambda parameters: Torn(parameters, lr=0.01)

    with ended():
        fit(policy, tmp_path / "run", patch=patch)
    assert saved(tmp_path / "run") == {"step=2.ckpt", "step=3.ckpt"}


def test_while_saving(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = torch.save, []

    def save(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            sigterm()
        real(*args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with ended():
        fit(policy, tmp_path / "run")
    assert len(calls) == 1
    assert saved(tmp_path / "run") == {"step=2.ckpt"}


def test_before_the_first_step_there_is_nothing_to_save(policy: str, tmp_path: Path) -> None:
    with ended():
        fit(policy, tmp_path / "run", Signals("on_train_batch_start", 0))
    assert not (tmp_path / "run").exists()


def test_slurm_requeue_is_left_to_lightning(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM passes, and SIGUSR1 saves the last finished step and requeues the job."""
    for name, value in {
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    for name, value in {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "here"}.items():
        monkeypatch.setenv(name, value)
    commands: list[Any] = []
    monkeypatch.setattr(
        "lightning.pytorch.trainer.connectors.signal_connector.call", lambda command, **_: commands.append(command) or 0
    )
    before = signal.getsignal(signal.SIGUSR1)

    handlers = []

    class Requeue(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
            handlers.append(signal.getsignal(signal.SIGTERM))
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGUSR1)

    module = tiny.remax(policy, optimizer=tiny.adam())
    trainer = tiny.trainer(
        tmp_path,
        STEPS,
        [Requeue(), Checkpoint(dirpath=str(tmp_path / "run"))],
        enable_checkpointing=True,
        plugins=[SLURMEnvironment(auto_requeue=True)],
    )
    trainer.fit(module, datamodule=tiny.prompt_data(tmp_path, batch_size=2))
    assert signal.getsignal(signal.SIGUSR1) is before
    assert all("signal_connector" in type(handler).__module__ for handler in handlers)
    assert commands == [["scontrol", "requeue", "7"]]
    checkpoint = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    resumed = tiny.remax(policy, optimizer=tiny.adam())
    again = tiny.trainer(tmp_path, STEPS)
    again.fit(resumed, datamodule=tiny.prompt_data(tmp_path, batch_size=2), ckpt_path=str(tmp_path / "hpc_ckpt_1.ckpt"))
    assert tiny.are_equal(tiny.weights(resumed.policy), tiny.weights(module.policy))


def running(group: int) -> list[str]:
    """Processes of a group that have not ended, whether or not somebody has asked for their status."""
    lines = [path.read_text().rpartition(")") for path in Path("/proc").glob("[0-9]*/stat")]
    states = [(name, *rest.split()[:3]) for name, _, rest in lines]
    return [name for name, state, _, of in states if of == str(group) and state not in "ZX"]


SCRIPT = """
import sys, time
from pathlib import Path
import tiny, torch
from lightning.pytorch import Callback
from remax_lightning.callbacks import Checkpoint
root, devices = Path(sys.argv[1]), int(sys.argv[2])

class Wait(Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 2:
            Path(root, f"waits_{trainer.global_rank}").touch()
            for _ in range(6000):
                time.sleep(0.01)

data = tiny.prompt_data(root, batch_size=1, train=str(root / "rows.jsonl"))
trainer = tiny.Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=4,
    callbacks=[Wait(), Checkpoint(dirpath=str(root / "run"))], logger=False, enable_progress_bar=False,
    enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, default_root_dir=root)
trainer.fit(tiny.remax(sys.argv[3], optimizer=tiny.adam()), datamodule=data)
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_process(policy: str, tmp_path: Path, devices: int) -> None:
    """The exit status, as whoever sent the signal sees it, and nothing of the run is left."""
    tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": prompt} for prompt in tiny.PROMPTS])
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'tests'}"}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), str(devices), policy]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 100
        while len(list(tmp_path.glob("waits_*"))) < devices and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        start = time.monotonic()
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 143, errors[-2000:]
        assert time.monotonic() - start < 10
        assert saved(tmp_path / "run") == {"step=2.ckpt"}
        time.sleep(0.5)
        assert running(process.pid) == []
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


# ---------------------------------------------------------------------------------------- errors and other signals


class Fails(Callback):
    """Acts when a hook is reached in the batch after some steps, for the n-th time there."""

    def __init__(self, hook: str, step: int, act: Any, count: int = 1) -> None:
        self.step, self.act, self.count = step, act, count
        setattr(self, hook, self.call)

    def call(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            self.count -= 1
            if self.count == 0:
                self.act()
