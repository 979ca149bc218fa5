"""Signals and errors at any moment: the last finished step is saved, the exit status tells, the rest is resumed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment

from remax_lightning import cli
from remax_lightning.callbacks import Checkpoint
from remax_lightning.callbacks.signal_guard import Terminated
from remax_lightning.modules import PPO, Reinforce
from remax_lightning.rewards import FunctionReward
from remax_lightning.rollout import Sampling

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


def fit(
    policy: str,
    folder: Path,
    callback: Callback | None = None,
    *,
    patch: Any = None,
    interval: int | None = None,
    **options: Any,
) -> Any:
    module = tiny.remax(policy, optimizer=tiny.adam())
    data = tiny.prompt_data(folder.parent, batch_size=2)
    data.validation = data.train
    if patch is not None:
        patch(module)
    saver = Checkpoint(dirpath=str(folder), every_n_train_steps=interval)
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


# ------------------------------------------------------------------------------------- other signals, and errors


class Act(Callback):
    """Acts when a hook is reached in the batch after some steps, or there for the n-th time."""

    def __init__(self, hook: str, step: int, act: Callable[[], None], count: int = 1) -> None:
        self.step, self.act, self.count = step, act, count
        setattr(self, hook, self.call)

    def call(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            self.count -= 1
            if self.count == 0:
                self.act()


def fail() -> None:
    raise KeyError("in a callback")


def send(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


@contextmanager
def ending(cause: int | None) -> Iterator[None]:
    """A run that a signal ends, or None for an error."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.raises(KeyError if cause is None else SystemExit) as end:
        yield
    if cause is not None:
        assert cli.status_of_signal(end.value) == 128 + cause
    assert {signum: signal.getsignal(signum) for signum in before} == before


CAUSES = {"error": None, "SIGINT": signal.SIGINT, "SIGHUP": signal.SIGHUP, "SIGTERM": signal.SIGTERM}


@pytest.mark.parametrize("cause", CAUSES.values(), ids=CAUSES.keys())
@pytest.mark.parametrize(
    ("hook", "step"), [("on_train_batch_end", 3), ("on_train_batch_start", 3), ("on_train_epoch_end", 4)]
)
def test_the_last_finished_step_is_saved(cause: int | None, hook: str, step: int, policy: str, tmp_path: Path) -> None:
    """Also if the batch that took it has not ended."""
    with ending(cause):
        fit(policy, tmp_path / "run", Act(hook, step, fail if cause is None else send(cause)))
    assert f"step={step}.ckpt" in saved(tmp_path / "run")
    assert_resumes(policy, tmp_path / "run")


PPO_STEPS = 12  # three batches of four updates: two passes over two minibatches


def ppo(
    policy: str, folder: Path, callback: Callback | None = None, steps: int = PPO_STEPS, **options: Any
) -> tuple[Any, list[list[str]]]:
    """A run of PPO; its policy and the prompts of each rollout."""
    module = PPO(
        policy=policy,
        reward=FunctionReward("reward_functions.letter_values"),
        sampling=Sampling(max_new_tokens=6),
        num_epochs=2,
        num_minibatches=2,
        optimizer=tiny.adam(1e-3),
        lr_schedule="constant",
    )
    collect, prompts = module.collect, []

    def watched(batch: dict[str, Any]) -> Any:
        prompts.append(batch["prompt"])
        return collect(batch)

    module.collect = watched  # type: ignore[method-assign]
    saver = Checkpoint(dirpath=str(folder))
    trainer = tiny.trainer(folder.parent, steps, [callback or Callback(), saver], enable_checkpointing=True)
    rows = [{"prompt": prompt} for prompt in ("Go", "a", "What", "Sing", "no", "up")]
    try:
        trainer.fit(module, datamodule=tiny.prompt_data(folder.parent, rows, batch_size=2), **options)
    finally:
        assert not Path(f"{folder}.lock").exists()
    return module.policy, prompts


UPDATES = {"first batch": 1, "before a batch's last": 7, "after a batch's last": 8, "last batch": 10}


@pytest.mark.parametrize("cause", [None, signal.SIGINT, signal.SIGTERM], ids=["error", "SIGINT", "SIGTERM"])
@pytest.mark.parametrize("updates", UPDATES.values(), ids=UPDATES.keys())
def test_between_the_updates_of_a_batch(cause: int | None, updates: int, policy: str, tmp_path: Path) -> None:
    """The rollout is saved, too, and a resumed run makes the other updates."""
    whole, all_prompts = ppo(policy, tmp_path / "whole")

    class Update(Act):
        def on_before_zero_grad(self, trainer: Trainer, *args: object) -> None:
            self.call(trainer)

    act = Update("on_fit_start", updates, fail if cause is None else send(cause))
    with ending(cause):
        ppo(policy, tmp_path / "run", act)
    assert saved(tmp_path / "run") == {f"step={updates}.ckpt"}
    checkpoint = torch.load(tmp_path / "run" / f"step={updates}.ckpt", weights_only=True)
    assert {int(value["step"]) for value in checkpoint["optimizer_states"][0]["state"].values()} == {updates}
    assert (checkpoint["unfinished_batch"] is None) == (updates == 8 and cause is not None)
    resumed, prompts = ppo(policy, tmp_path / "run", ckpt_path="last")
    assert prompts == all_prompts[-(-updates // 4) :]
    assert tiny.are_equal(tiny.weights(resumed), tiny.weights(whole))


def test_between_the_updates_of_a_batch_again_and_again(policy: str, tmp_path: Path) -> None:
    whole, _ = ppo(policy, tmp_path / "whole")
    for updates in (2, 3, 6, 7, 9):
        with pytest.raises(KeyError):
            ppo(policy, tmp_path / "run", Act("on_after_backward", updates, fail), ckpt_path="last")
        assert f"step={updates}.ckpt" in saved(tmp_path / "run")
    resumed, _ = ppo(policy, tmp_path / "run", ckpt_path="last")
    assert tiny.are_equal(tiny.weights(resumed), tiny.weights(whole))


def test_what_steers_by_a_batch_does_it_once(policy: str, tmp_path: Path) -> None:
    """After an error between the update and what follows from it: the moving average of the rewards."""

    def run(folder: Path, step: int | None = None, **options: Any) -> Any:
        module = Reinforce(
            policy=policy,
            reward=FunctionReward("reward_functions.letter_values"),
            sampling=Sampling(max_new_tokens=6),
            kl_coef=0.0,
            optimizer=tiny.adam(1e-3),
        )
        end_step = module.end_step

        def end(*args: Any) -> None:
            if module.global_step == step:
                fail()
            end_step(*args)

        module.end_step = end  # type: ignore[method-assign]
        trainer = tiny.trainer(tmp_path, 4, [Checkpoint(dirpath=str(folder))], enable_checkpointing=True)
        trainer.fit(module, datamodule=tiny.prompt_data(tmp_path, batch_size=2), **options)
        return module

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyError):
        run(tmp_path / "run", 3)
    assert "step=3.ckpt" in saved(tmp_path / "run")
    resumed = run(tmp_path / "run", ckpt_path="last")
    assert torch.equal(resumed.moving_average, whole.moving_average)
    assert tiny.are_equal(tiny.weights(resumed.policy), tiny.weights(whole.policy))


@pytest.mark.parametrize("cause", [None, signal.SIGINT], ids=["error", "second SIGINT"])
def test_a_rollout_that_cannot_be_saved(
    cause: int | None, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal waits for the end of the batch; after an error or a second one, a resumed run takes the next batch.

    No update is lost or made twice.
    """
    monkeypatch.setattr("remax_lightning.modules.unfinished_batch._as_plain", lambda rollout: None)
    monkeypatch.setattr("remax_lightning.callbacks.signal_guard.REPEATED_SECONDS", 0.0)

    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    _, all_prompts = ppo(policy, tmp_path / "whole")
    before: dict[str, Any] = {}

    class Watch(Act):
        """Acts in the backward pass of the third update of the second batch."""

        def on_after_backward(self, trainer: Trainer, module: Any) -> None:
            before.update(tiny.weights(module.policy))
            self.call(trainer)

    with ending(signal.SIGTERM):
        ppo(policy, tmp_path / "other", Act("on_before_optimizer_step", 6, send(signal.SIGTERM)))
    assert saved(tmp_path / "other") == {"step=8.ckpt"}
    with ending(cause):
        ppo(policy, tmp_path / "run", Watch("on_fit_start", 6, fail if cause is None else twice))
    assert saved(tmp_path / "run") == {"step=6.ckpt"}
    checkpoint = torch.load(tmp_path / "run" / "step=6.ckpt", weights_only=True)
    state = {name.removeprefix("policy."): value for name, value in checkpoint["state_dict"].items()}
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert {int(value["step"]) for value in checkpoint["optimizer_states"][0]["state"].values()} == {6}
    assert checkpoint["lr_schedulers"][0]["last_epoch"] == 6
    _, prompts = ppo(policy, tmp_path / "run", steps=10, ckpt_path="last")
    assert prompts == all_prompts[2:]
    newest = torch.load(tmp_path / "run" / "step=10.ckpt", weights_only=True)
    assert {int(value["step"]) for value in newest["optimizer_states"][0]["state"].values()} == {10}


def test_an_update_that_is_half_done_is_not_saved(policy: str, tmp_path: Path) -> None:
    def patch(module: Any) -> None:
        class Torn(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                with torch.enable_grad():
                    closure()
                self.param_groups[0]["params"][0].data.fill_(1.0)
                if module.global_step == 2:
                    raise KeyError

        module.optimizer = lambda parameters: Torn(parameters, lr=0.01)

    with (
        pytest.warns(UserWarning, match=r"could not be saved: the update was interrupted half way; there is no"),
        ending(None),
    ):
        fit(policy, tmp_path / "run", patch=patch, interval=9)
    assert saved(tmp_path / "run") == set()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_ignored(signum: int, policy: str, tmp_path: Path) -> None:
    """As under nohup, or of a job in the background."""
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        fit(policy, tmp_path / "run", Act("on_train_batch_start", 3, send(signum)))
    finally:
        signal.signal(signum, before)
    assert "step=4.ckpt" in saved(tmp_path / "run")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_in_an_evaluation(subcommand: str, signum: int, policy: str, tmp_path: Path) -> None:
    ended: list[str] = []

    class Count(Callback):
        def on_exception(self, *args: object) -> None:
            ended.append("exception")

    act = Act(f"on_{'validation' if subcommand == 'validate' else subcommand}_batch_start", 0, send(signum), count=2)
    callbacks = [Count(), act, Checkpoint(dirpath=str(tmp_path / "run"))]
    data = tiny.prompt_data(tmp_path, batch_size=1)
    data.validation = data.test = data.train
    trainer = tiny.trainer(tmp_path, 1, callbacks, enable_checkpointing=True)
    with ending(signum):
        getattr(trainer, subcommand)(tiny.remax(policy), datamodule=data)
    assert ended == ["exception"]


def test_before_the_first_step(policy: str, tmp_path: Path) -> None:
    """In the self-check, and while its batch is made ready; Lightning would take a step and exit with 0."""
    for hook in ("on_train_start", "on_train_epoch_start"):
        with ended():
            fit(policy, tmp_path / "run", Signals(hook, 0))
        assert not (tmp_path / "run").exists()
        assert not (tmp_path / "run.lock").exists()


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
