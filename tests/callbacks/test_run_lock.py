"""One run uses a folder at a time, and what an earlier one has left there is not taken for a later one's."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from lightning.pytorch import Callback

from remax_lightning.callbacks import Checkpoint, run_lock
from remax_lightning.callbacks.run_lock import Holder, RunLock


def write(lock: RunLock, **changes: Any) -> Holder:
    """Another holder of a lock."""
    holder = replace(Holder.here(), **changes)
    lock.path.write_text(json.dumps(asdict(holder)))
    return holder


@pytest.fixture
def lock(tmp_path: Path) -> RunLock:
    return RunLock(tmp_path / "new" / "checkpoints")


@pytest.fixture
def process() -> Any:
    """Another process."""
    sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield sleeping
    sleeping.kill()
    sleeping.wait()


def test_it_is_taken_and_released(lock: RunLock) -> None:
    assert lock.take() is None
    assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    assert RunLock(lock.folder).take() is None  # a fit of this process that was not released
    lock.release()
    lock.release()
    assert list(lock.path.parent.iterdir()) == []


def test_another_process_has_it(lock: RunLock, process: Any) -> None:
    lock.path.parent.mkdir()
    holder = write(lock, pid=process.pid, started=run_lock._started(process.pid))
    before = lock.path.read_text()
    refusal = lock.take()
    assert refusal is not None
    assert f"in use by process {process.pid} on this machine since {holder.since}" in refusal
    assert "delete" not in refusal
    lock.release()
    assert lock.path.read_text() == before
    write(lock, pid=process.pid, started=12345)  # its number is another process's now
    assert lock.take() is None
    lock.release()
    write(lock, pid=process.pid, started=run_lock._started(process.pid), boot="before the machine was started again")
    assert lock.take() is None
    lock.release()
    write(lock, pid=process.pid, started=run_lock._started(process.pid))
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while run_lock._started(process.pid) != -1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lock.take() is None  # though nobody has asked for its status yet
    assert json.loads(lock.path.read_text())["pid"] == os.getpid()


def test_of_another_machine_nothing_is_known(lock: RunLock, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.path.parent.mkdir()
    write(lock, host="elsewhere", pid=1)
    refusal = lock.take()
    assert refusal is not None
    assert "process 1 on elsewhere" in refusal
    assert f"if it is known to have ended, delete {lock.path}" in refusal
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    write(lock, host="elsewhere", pid=1)
    assert lock.take() is not None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the job was requeued, on another machine
    assert lock.take() is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "here"}'])
def test_a_lock_that_was_never_written_is_taken_over(
    content: str, lock: RunLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "SECONDS_TO_WRITE", 0.1)
    lock.path.parent.mkdir()
    lock.path.write_text(content)
    assert lock.take() is None


def test_two_that_take_over_at_once(lock: RunLock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one has seen the lock of a process that has ended, too, but the first one was faster."""
    lock.path.parent.mkdir()
    write(lock, pid=2**22 + 1)
    stale = lock.path.read_text()
    lock.path.unlink()
    other = write(lock, host="the first one's")
    read, seen = RunLock._read, [stale]
    monkeypatch.setattr(RunLock, "_read", lambda self: seen.pop() if seen else read(self))
    refusal = lock.take()
    assert refusal is not None
    assert "the first one's" in refusal
    assert Holder(**json.loads(lock.path.read_text())) == other
    assert len(list(lock.path.parent.iterdir())) == 1


# ----------------------------------------------------------------------------------------------------------- of a run


class Fails(Callback):
    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.call)

    def call(self, *args: object) -> None:
        raise KeyError


def fit(policy: str, folder: Path, steps: int, *callbacks: Callback, **options: Any) -> None:
    saver = Checkpoint(dirpath=str(folder), every_n_train_steps=1)
    trainer = tiny.trainer(folder.parent, steps, [*callbacks, saver], enable_checkpointing=True)
    data = tiny.prompt_data(folder.parent, batch_size=2)
    trainer.fit(tiny.remax(policy, optimizer=tiny.adam()), datamodule=data, **options)


def test_a_run_has_its_folder_for_itself(policy: str, tmp_path: Path) -> None:
    """A refused one changes nothing, and an error gives the lock back."""
    folder, seen = tmp_path / "run", []

    class Look(Callback):
        def on_train_batch_start(self, *args: object) -> None:
            seen.append(Path(f"{folder}.lock").exists())

    fit(policy, folder, 2, Look())
    assert seen == [True, True]
    for hook in ("on_fit_start", "on_train_batch_start", "on_train_end"):
        with pytest.raises(KeyError):
            fit(policy, folder, 1, Fails(hook))
        assert not Path(f"{folder}.lock").exists()
    (folder / "step=3.ckpt.partial").write_text("another run is writing this")
    write(RunLock(folder), host="elsewhere")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for options in ({}, {"ckpt_path": str(folder / "step=2.ckpt")}):
        with pytest.raises(RuntimeError, match=r"the run in .*run is in use by process \d+ on elsewhere"):
            fit(policy, folder, 3, **options)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert Path(f"{folder}.lock").exists()


def test_another_runs_checkpoints_are_told_of_and_not_resumed_from(policy: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit(policy, folder, 2)
    with pytest.warns(
        UserWarning, match=r"checkpoints of an earlier run, the newest .*step=2.ckpt; this run starts fr"
    ):
        fit(policy, folder, 3)
    fit(policy, folder, 3, ckpt_path="last")
    with pytest.raises(KeyError):
        fit(policy, folder, 3, Fails("on_train_batch_start"))
    message = r"--ckpt_path last: the run that was started last in .* before its first checkpoint, .*step=3.ckpt, to go"
    trainer = tiny.trainer(tmp_path, 4, [Checkpoint(dirpath=str(folder))], enable_checkpointing=True)
    data = tiny.prompt_data(tmp_path)
    data.test = data.train
    with pytest.raises(ValueError, match=message):
        fit(policy, folder, 4, ckpt_path="last")
    with pytest.raises(ValueError, match=message):
        trainer.test(tiny.remax(policy), datamodule=data, ckpt_path="last")
    fit(policy, folder, 4, ckpt_path=str(folder / "step=3.ckpt"))
    fit(policy, folder, 5, ckpt_path="last")
    assert (folder / "step=5.ckpt").exists()


def test_it_names_this_machine() -> None:
    assert Holder.here().host == socket.gethostname()
    assert Holder.here().started > 0 or not Path("/proc/self/stat").exists()
