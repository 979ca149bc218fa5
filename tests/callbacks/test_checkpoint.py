"""Checkpoint files: whole or not there, the newest complete one, and what may not change between save and resume."""

import contextlib
import errno
import json
import math
import os
import pickle
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from remax_lightning import cli
from remax_lightning.callbacks import Checkpoint
from remax_lightning.checkpoints.find_checkpoint import find_checkpoint, newest_complete, verified
from remax_lightning.checkpoints.manifest import (
    UnusableCheckpoint,
    add_scores,
    manifest_path,
    manifests,
    read_manifest,
    unused_path,
)
from remax_lightning.checkpoints.safe_checkpoint_io import SafeCheckpointIO, SaveOptions, read_checkpoint


def content(step: int) -> dict[str, Any]:
    return {"global_step": step, "state_dict": {"weight": torch.full((4096,), float(step))}}


def save(folder: Path, *steps: int) -> list[Path]:
    """Checkpoints of some steps, one after the other."""
    io = SafeCheckpointIO()
    paths = [folder / f"step={step}.ckpt" for step in steps]
    for step, path in zip(steps, paths, strict=True):
        io.save_checkpoint(content(step), path)
    return paths


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def flip(path: Path) -> None:
    """Change one bit in the middle, where the tensor is."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def forget(path: Path) -> None:
    """As a kill between the two files would leave it, or another program."""
    manifest_path(path).unlink()


DAMAGE = {"truncated": truncate, "one bit": flip, "empty": empty}


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    (path,) = save(tmp_path / "new" / "folder", 3)
    assert torch.equal(SafeCheckpointIO().load_checkpoint(path)["state_dict"]["weight"], torch.full((4096,), 3.0))
    manifest = read_manifest(path)
    assert manifest is not None
    assert (manifest.size, manifest.step) == (path.stat().st_size, 3)
    verified(path)
    assert {each.name for each in path.parent.iterdir()} == {"step=3.ckpt", "step=3.ckpt.json"}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_newest_is_skipped(damage: Any, tmp_path: Path) -> None:
    older, newer = save(tmp_path, 10, 9)  # the newest is the one written last, whatever its step
    assert newest_complete(tmp_path) == newer
    damage(newer)
    with pytest.warns(UserWarning, match=r"step=9.ckpt is skipped: it"):
        assert newest_complete(tmp_path) == older
    with pytest.raises(UnusableCheckpoint, match=r"step=9.ckpt is corrupt: it"):
        verified(newer)
    damage(older)
    with pytest.raises(UnusableCheckpoint, match=r"no complete checkpoint \(step=10.ckpt: its? .*; step=9.ckpt: its? "):
        newest_complete(tmp_path)


def test_without_a_manifest_a_file_counts_only_by_name(tmp_path: Path) -> None:
    assert newest_complete(tmp_path) is None
    older, newer = save(tmp_path, 1, 2)
    forget(newer)
    with pytest.warns(UserWarning, match=r"step=2.ckpt is skipped: it has no manifest that can be read"):
        assert newest_complete(tmp_path) == older
    verified(newer)
    forget(older)
    with pytest.raises(UnusableCheckpoint, match=r"step=1.ckpt: it has no manifest .*; step=2.ckpt: it has no manif"):
        newest_complete(tmp_path)
    manifest_path(older).write_text("{")
    assert read_manifest(older) is None


def test_a_manifest_without_a_file_is_nothing(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    path.unlink()
    assert newest_complete(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="there is no checkpoint "):
        verified(path)


@pytest.mark.parametrize("kind", ["text", "truncated", "object"])
def test_what_is_not_a_checkpoint_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "some.ckpt"
    if kind == "text":
        path.write_text("weights")
    elif kind == "object":
        torch.save({"module": torch.nn.Linear(1, 1)}, path)
    else:
        (saved,) = save(tmp_path, 1)
        path.write_bytes(saved.read_bytes()[:5000])
    reasons = {"object": r"contains a torch.nn.\S*Linear, whose package"}
    reason = reasons.get(kind, "cannot be read as tensors and plain types")
    with pytest.raises(UnusableCheckpoint, match=f"some.ckpt {reason}"):
        SafeCheckpointIO().load_checkpoint(path, weights_only=False)


class FullDisk:
    """A file on a disk that has room for some bytes."""

    def __init__(self, path: Path, mode: str, room: int) -> None:
        self.file, self.room = open(path, mode), room  # noqa: SIM115 (closed on leaving)

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *args: object) -> None:
        self.file.close()


@pytest.mark.parametrize("room", [0, 100, 5000, 17000])
@pytest.mark.parametrize("step", [2, 3])
def test_a_full_disk_leaves_the_older_ones(
    room: int, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    module = "remax_lightning.checkpoints.synced_file.open"
    monkeypatch.setattr(module, partial(FullDisk, room=room), raising=False)
    with pytest.raises(OSError, match=rf"step={step}.ckpt could not be written \(No space left on device\)") as error:
        save(tmp_path, step)
    monkeypatch.undo()
    assert error.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def note_rename(old: Path, new: Path) -> None:
        events.append(f"name {new.name}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    save(tmp_path / "run", 1)
    assert events == [
        "sync step=1.ckpt.partial",
        "sync step=1.ckpt.json.partial",
        "name step=1.ckpt.json",
        "sync run",
        "name step=1.ckpt",
        "sync run",
    ]


def test_a_clock_that_steps_back_does_not_change_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(1000, 0, -1))
    monkeypatch.setattr(time, "time_ns", lambda: next(times))
    first, second = save(tmp_path, 1, 2)
    assert [path for path, _ in manifests(tmp_path)] == [second, first]
    policy = tiny.save_model(tmp_path / "policy")
    train(policy, tmp_path / "run", 4)
    assert steps_in(tmp_path / "run") == {3, 4}
    train(policy, tmp_path / "run", 6, "last")
    assert steps_in(tmp_path / "run") == {4, 5, 6}  # with the one that it was resumed from


def test_manifests_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They have a time and no number; no clock is believed."""
    paths = save(tmp_path, 1, 2, 0)
    for path, saved_at in zip(paths[:2], (2**62, 2**61), strict=True):
        old = json.loads(manifest_path(path).read_text())
        del old["number"]
        manifest_path(path).write_text(json.dumps({**old, "saved_at": saved_at}))
    assert [path for path, _ in manifests(tmp_path)] == [paths[2], paths[1], paths[0]]
    (newest,) = save(tmp_path, 0)
    assert newest_complete(tmp_path) == newest
    assert verified(paths[1]) == paths[1]


def test_a_folder_of_checkpoints_means_its_newest_complete_one(tmp_path: Path) -> None:
    older, newer = save(tmp_path, 1, 2)
    assert verified(tmp_path) == newer
    truncate(newer)
    with pytest.warns(UserWarning, match=r"step=2.ckpt is skipped"):
        assert SafeCheckpointIO().load_checkpoint(tmp_path)["read_from"] == str(older)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint "):
        verified(tmp_path.parent / "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in "):
        verified(tmp_path / "empty")


def scored(folder: Path, *scores: dict[str, float], run: str = "") -> list[Path]:
    paths = [folder / f"step={number}{run}.ckpt" for number in range(len(scores))]
    for path, each in zip(paths, scores, strict=True):
        SafeCheckpointIO().save_checkpoint(content(1), path, SaveOptions(run=run, scores=each))
    return paths


@pytest.mark.parametrize(
    ("name", "monitor", "mode", "best"),
    [
        ("val/reward", None, "max", 1),
        ("val/accuracy", None, "min", 1),  # the mode is that of a monitor
        ("val/loss", None, "max", 2),
        ("val/kl", "val/kl", "max", 1),
        ("val/kl", "val/kl", "min", 2),
    ],
)
def test_the_best_is_found(name: str, monitor: str | None, mode: str, best: int, tmp_path: Path) -> None:
    scored(tmp_path, {name: 1000.0}, {name: -1000.0}, run="another training")
    values = [0.2, 0.3, 0.1, float("nan")]
    paths = scored(tmp_path, *({name: value} for value in values), {})
    for is_fit in (True, False):
        assert find_checkpoint("best", tmp_path, monitor, mode, is_fit=is_fit) == str(paths[best])


def test_the_first_main_metric_counts(tmp_path: Path) -> None:
    paths = scored(tmp_path, {"val/loss": 1.0, "val/accuracy": 0.9}, {"val/loss": 0.5, "val/accuracy": 0.8})
    assert find_checkpoint("best", tmp_path, is_fit=False) == str(paths[0])


def test_without_a_score_there_is_no_best(tmp_path: Path) -> None:
    for is_fit in (True, False):
        with pytest.raises(FileNotFoundError, match=r"--ckpt_path best: there is no checkpoint in .*; run fit first"):
            find_checkpoint("best", tmp_path, is_fit=is_fit)
    scored(tmp_path, {"val/reward": 0.5}, run="another training")
    scored(tmp_path, {})
    with pytest.raises(ValueError, match=r"--ckpt_path best: no checkpoint in .* has a score .*data.validation"):
        find_checkpoint("best", tmp_path, is_fit=False)
    with pytest.raises(ValueError, match=r"has a score of val/kl; .* or give last"):
        find_checkpoint("best", tmp_path, "val/kl", is_fit=False)


def test_scores_are_kept_in_the_manifest(tmp_path: Path) -> None:
    older, newer = save(tmp_path, 1, 2)
    add_scores(older, {"val/reward": 0.5})
    assert [(path, manifest.scores) for path, manifest in manifests(tmp_path)] == [
        (newer, {}),
        (older, {"val/reward": 0.5}),
    ]
    verified(older)


def test_keep_last_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        Checkpoint(dirpath=str(tmp_path), keep_last=0)


def train(policy: str, folder: Path, steps: int, ckpt_path: str | None = None, **options: Any) -> Checkpoint:
    callback = Checkpoint(dirpath=str(folder), **{"every_n_train_steps": 1, **options})
    trainer = tiny.trainer(folder.parent, steps, [callback], enable_checkpointing=True)
    data = tiny.prompt_data(folder.parent, batch_size=2)
    trainer.fit(tiny.remax(policy, optimizer=tiny.adam()), datamodule=data, ckpt_path=ckpt_path)
    return callback


def steps_in(folder: Path) -> set[int]:
    return {int(path.stem.partition("=")[2]) for path in folder.glob("*.ckpt")}


def test_a_plugin_of_the_user_is_refused(tmp_path: Path) -> None:
    policy = tiny.save_model(tmp_path / "policy")
    saves = Checkpoint(dirpath=str(tmp_path / "run"))
    trainer = tiny.trainer(tmp_path, 1, [saves], enable_checkpointing=True, plugins=[AsyncCheckpointIO()])
    with pytest.raises(ValueError, match=r"the checkpoint plugin AsyncCheckpointIO cannot be used: .*checkpoint.async"):
        trainer.fit(tiny.remax(policy), datamodule=tiny.prompt_data(tmp_path))


def test_a_file_is_not_saved_in_the_background(tmp_path: Path) -> None:
    policy = tiny.save_model(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"here \(SingleDeviceStrategy\) a checkpoint is one file"):
        train(policy, tmp_path / "run", 1, async_save=True)


def test_last_and_best_in_python(tmp_path: Path) -> None:
    policy, folder = tiny.save_model(tmp_path / "policy"), tmp_path / "run"
    data = tiny.prompt_data(tmp_path, batch_size=2)
    data.test = data.validation = data.train

    def trainer(steps: int = 4) -> Any:
        saves = Checkpoint(dirpath=str(folder), save_top_k=-1)
        options: dict[str, Any] = {"val_check_interval": 1, "check_val_every_n_epoch": None}
        return tiny.trainer(tmp_path, steps, [saves], enable_checkpointing=True, **options)

    module = tiny.remax(policy, optimizer=tiny.adam())
    with pytest.raises(FileNotFoundError, match=r"--ckpt_path last: there is no checkpoint in .*run; run fit first"):
        trainer().test(module, datamodule=data, ckpt_path="last")
    trainer().fit(module, datamodule=data, ckpt_path="last")
    scores = {path: manifest.scores["val/reward"] for path, manifest in manifests(folder)}
    assert len(set(scores.values())) == 4
    best = max(scores, key=lambda path: scores[path])
    again = trainer()
    (result,) = again.test(tiny.remax(policy), datamodule=data, ckpt_path="best", verbose=False)
    assert again.checkpoint_callback.store.resumed_from == str(best)
    assert result["test/reward"] == pytest.approx(scores[best], abs=1e-5)


@pytest.mark.parametrize("interval", [None, 1])
def test_the_score_of_a_validation_is_recorded(interval: int | None, tmp_path: Path) -> None:
    """Saved after it or before it, and after a resumption that starts with the validation."""
    policy, folder = tiny.save_model(tmp_path / "policy"), tmp_path / "run"

    class Stop(Callback):
        def on_validation_start(self, trainer: Any, *args: object) -> None:
            if trainer.global_step == 2:
                raise KeyError

    def fit(*callbacks: Callback) -> dict[str, float]:
        saves = Checkpoint(dirpath=str(folder), every_n_train_steps=interval, keep_last=9)
        options: dict[str, Any] = {"val_check_interval": 1, "check_val_every_n_epoch": None}
        trainer = tiny.trainer(tmp_path, 3, [*callbacks, saves], enable_checkpointing=True, **options)
        data = tiny.prompt_data(tmp_path, batch_size=2)
        data.validation = data.train
        with contextlib.suppress(KeyError):
            trainer.fit(tiny.remax(policy, optimizer=tiny.adam()), datamodule=data, ckpt_path="last")
        return {path.name: manifest.scores.get("val/reward", math.nan) for path, manifest in manifests(folder)}

    first = fit(Stop())
    assert set(first) == {"step=1.ckpt", "step=2.ckpt"}
    assert math.isnan(first["step=2.ckpt"])
    scores = fit()
    assert set(scores) == {"step=1.ckpt", "step=2.ckpt", "step=3.ckpt"}
    assert len(set(scores.values())) == 3
    assert not any(map(math.isnan, scores.values()))


def test_another_run_in_the_same_folder_is_left_alone(tmp_path: Path) -> None:
    policy, folder = tiny.save_model(tmp_path / "policy"), tmp_path / "run"
    train(policy, folder, 5)
    train(policy, folder, 3)
    assert steps_in(folder) == {2, 3, 4, 5}
    newest = newest_complete(folder)
    assert newest is not None
    assert newest.name == "step=3.ckpt"
    train(policy, folder, 7, str(newest))
    assert steps_in(folder) == {3, 4, 5, 6, 7}  # what it was resumed from stays, and the other run's 4 and 5


def test_an_interrupted_save_is_cleared_away(tmp_path: Path) -> None:
    policy, folder = tiny.save_model(tmp_path / "policy"), tmp_path / "run"
    folder.mkdir()
    (folder / "step=1.ckpt.partial").write_text("half")
    train(policy, folder, 1)
    assert {path.name for path in folder.iterdir()} == {"step=1.ckpt", "step=1.ckpt.json"}


def test_a_full_disk_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, folder = tiny.save_model(tmp_path / "policy"), tmp_path / "run"
    train(policy, folder, 2)
    module = "remax_lightning.checkpoints.synced_file.open"
    monkeypatch.setattr(module, partial(FullDisk, room=10_000), raising=False)
    monkeypatch.setattr("remax_lightning.checkpoints.find_checkpoint.integrity_error", lambda *args: None)
    with (
        pytest.warns(UserWarning, match="the state after the last finished step could not be saved"),
        pytest.raises(OSError, match=r"step=3.ckpt could not be written"),
    ):
        train(policy, folder, 4, str(folder / "step=2.ckpt"))
    monkeypatch.undo()
    assert newest_complete(folder) == folder / "step=2.ckpt"
    assert {path.name for path in folder.iterdir()} == {
        f"step={step}.ckpt{suffix}" for step in (1, 2) for suffix in ("", ".json")
    }


# ---------------------------------------------------------------------------------------- weights that cannot be used


class Ruin(Callback):
    """Makes one weight NaN after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: object) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.policy.lm_head.weight[3, 5] = torch.nan


@pytest.mark.parametrize("interval", [1, 2, 9])
def test_weights_that_are_not_finite_are_not_saved(interval: int, tmp_path: Path) -> None:
    """Neither when it is time nor after the error nor at the end, and the older ones stay."""
    policy, folder = tiny.save_model(tmp_path / "policy"), tmp_path / "run"
    saves = Checkpoint(dirpath=str(folder), every_n_train_steps=interval, keep_last=1)
    trainer = tiny.trainer(tmp_path, 3, [Ruin(3), saves], enable_checkpointing=True)
    go_on = {1: r"resume from .*step=2.ckpt, the newest", 2: r"resume from .*step=2.ckpt, the newest", 9: "start again"}
    message = rf"weights after step 3 are not finite \(policy.lm_head.weight\) and are not saved; {go_on[interval]}"
    with pytest.raises(RuntimeError, match=message), pytest.warns(UserWarning, match=f"not be saved: the {message}"):
        trainer.fit(tiny.remax(policy, optimizer=tiny.adam()), datamodule=tiny.prompt_data(tmp_path, batch_size=2))
    assert steps_in(folder) == ({2} if interval < 9 else set())


def test_after_ten_skipped_steps_the_weights_from_before_are_there_and_named(tmp_path: Path) -> None:
    """Saves of the same weights, after skipped steps, do not push them out."""
    policy, folder = tiny.save_model(tmp_path / "policy"), tmp_path / "run"

    class Explode(Callback):
        """From a step on, every gradient is infinite."""

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 2:
                pl_module.policy.lm_head.weight.grad.fill_(torch.inf)

    saves = Checkpoint(dirpath=str(folder), keep_last=2)  # at the end of each epoch, of three batches
    trainer = tiny.trainer(tmp_path, 9, [Explode(), saves], enable_checkpointing=True, limit_train_batches=1)
    message = r"10 steps in a row .*; the newest checkpoint whose gradient was finite is .*run/step=1.ckpt"
    with pytest.raises(RuntimeError, match=message):
        trainer.fit(tiny.remax(policy, optimizer=tiny.adam()), datamodule=tiny.prompt_data(tmp_path, batch_size=2))
    entries = manifests(folder)
    assert [manifest.step for _, manifest in entries] == [2, 1]
    assert newest_complete(folder) == entries[0][0]


# ------------------------------------------------------------------------------------------------------------- scores


def scores_of(
    folder: Path, policy: str, steps: int, interval: int, monitor: str | None = "val/reward", **options: Any
) -> dict[str, float]:
    """A run of three batches an epoch that is validated after every so many; the checkpoints' scores."""
    saves = Checkpoint(dirpath=str(folder), monitor=monitor, keep_last=9, save_top_k=9)
    validations = {"val_check_interval": interval, "check_val_every_n_epoch": None}
    trainer = tiny.trainer(folder.parent, steps, [saves], enable_checkpointing=True, **validations)
    data = tiny.prompt_data(folder.parent, [{"prompt": each} for each in ("Go", "a", "What")], batch_size=1)
    data.validation = data.train
    trainer.fit(tiny.remax(policy, optimizer=tiny.adam()), datamodule=data, **options)
    return {path.name: manifest.scores.get("val/reward", math.nan) for path, manifest in manifests(folder)}


def test_a_score_is_that_of_the_weights(tmp_path: Path) -> None:
    """Checkpoints at the end of an epoch, without a validation, have none; also before the first one, and resumed."""
    policy, folder = tiny.save_model(tmp_path / "policy"), tmp_path / "run"
    scores = scores_of(folder, policy, 5, 4)
    scores = scores_of(folder, policy, 10, 4, ckpt_path="last")
    validated = {name for name, score in scores.items() if not math.isnan(score)}
    assert scores.keys() - validated == {"step=3.ckpt", "step=5.ckpt", "step=6.ckpt", "step=9.ckpt", "step=10.ckpt"}
    assert validated == {"step=4.ckpt", "step=8.ckpt"}
    data = tiny.prompt_data(tmp_path, [{"prompt": each} for each in ("Go", "a", "What")], batch_size=1)
    data.validation = data.train
    for name in validated:
        (found,) = tiny.trainer(tmp_path).validate(
            tiny.remax(policy), datamodule=data, ckpt_path=str(folder / name), verbose=False
        )
        assert found["val/reward"] == pytest.approx(scores[name], abs=1e-5)


def test_a_monitor_that_no_validation_logs_is_refused(tmp_path: Path) -> None:
    """At the first validation, where the names are known; a training's metric is of the weights before the step."""
    policy = tiny.save_model(tmp_path / "policy")
    for monitor in ("val/rewrad", "train/reward"):
        with pytest.raises(ValueError, match=rf"that the validation logs, got {monitor}; there are .*val/reward"):
            scores_of(tmp_path / "run", policy, 5, 4, monitor)
    saves = Checkpoint(dirpath=str(tmp_path / "other"), monitor="val/reward")
    with pytest.raises(ValueError, match=r"got val/reward, but this fit does not validate; set data.validation"):
        tiny.trainer(tmp_path, 1, [saves], enable_checkpointing=True).fit(
            tiny.remax(policy), datamodule=tiny.prompt_data(tmp_path)
        )


# ------------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    """A configuration of a ReMax run of three steps, with its checkpoints already there."""
    prompts = tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in tiny.PROMPTS])
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "default_root_dir": str(tmp_path / "run"),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
        },
        "checkpoint": {"every_n_train_steps": 1},
        "model": {
            "class_path": "ReMax",
            "init_args": {
                "policy": {"path": tiny.save_model(tmp_path / "policy")},
                "reward": {"class_path": "FunctionReward", "init_args": {"function": "reward_functions.letter_values"}},
                "sampling": {"max_new_tokens": 4},
                "kl_coef": 0.1,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {"class_path": "PromptDataModule", "init_args": {"train": prompts, "test": prompts, "batch_size": 2}},
    }
    path = tmp_path / "remax.yaml"
    path.write_text(yaml.safe_dump(config))
    cli.main(["fit", "--config", str(path)])
    return path


def run(config: Path, *arguments: object, subcommand: str = "fit") -> None:
    cli.main([subcommand, "--config", str(config), *map(str, arguments)])


def folder_of(config: Path) -> Path:
    return config.parent / "run" / "checkpoints"


@pytest.mark.slow
def test_last_falls_back(configured: Path) -> None:
    truncate(folder_of(configured) / "step=3.ckpt")
    with pytest.warns(UserWarning, match=r"step=3.ckpt is skipped: it has \d+ bytes"):
        run(configured, "--ckpt_path", "last", "--trainer.max_steps", 4)
    assert steps_in(folder_of(configured)) >= {2, 4}
    assert read_checkpoint(folder_of(configured) / "step=3.ckpt")["global_step"] == 3  # trained again, whole again


@pytest.mark.slow
def test_the_best_on_the_command_line(configured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = configured.parent / "prompts.jsonl"
    validate = ["--trainer.val_check_interval", 1, "--trainer.check_val_every_n_epoch", "null"]
    validate += ["--data.validation", prompts, "--checkpoint.save_top_k", -1]
    with pytest.raises(ValueError, match=r"--ckpt_path best: no checkpoint in .* has a score"):
        run(configured, "--ckpt_path", "best", subcommand="test")
    run(configured, "--trainer.max_steps", 4, *validate)
    entries = [entry for entry in manifests(folder_of(configured)) if entry[1].scores]
    assert len(entries) == 4
    best, manifest = max(entries, key=lambda entry: entry[1].scores["val/reward"])
    read: list[str] = []
    monkeypatch.setattr(
        "remax_lightning.checkpoints.find_checkpoint.verified_on_rank_0",
        lambda path, skipped: read.append(path) or Path(path),
    )
    for subcommand in ("validate", "test", "predict"):
        run(configured, "--ckpt_path", "best", "--data.validation", prompts, subcommand=subcommand)
    run(configured, "--ckpt_path", "best", "--trainer.max_steps", manifest.step)
    assert read == [str(best)] * 4
    hf = configured.parent / "best_hf"
    run(configured, "--ckpt_path", "best", "--output_dir", hf, subcommand="export")
    record = json.loads((hf / "training.json").read_text())
    assert (record["checkpoint"], record["step"], record["is_best"]) == (best.name, manifest.step, True)
    assert (record["best_by"], record["scores"]["val/reward"]) == ("val/reward", manifest.scores["val/reward"])
    assert record["is_last"] == (manifest.step == 4)


@pytest.mark.slow
def test_the_exported_step_is_recorded_and_printed(configured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"method": "ReMax", "step": 3, "checkpoint": "step=3.ckpt", "is_last": True}
    unrated = {"is_best": None, "best_by": None, "scores": {}}
    assert json.loads((configured.parent / "run" / "hf" / "training.json").read_text()) == {**record, **unrated}
    for name, says in {"last": "step 3 (step=3.ckpt, the last)", "step=2.ckpt": "step 2 (step=2.ckpt)"}.items():
        path = name if name == "last" else folder_of(configured) / name
        hf = configured.parent / "hf"
        run(configured, "--ckpt_path", path, "--output_dir", hf, subcommand="export")
        assert f"exported {says} to {hf}" in capsys.readouterr().out
        assert json.loads((hf / "training.json").read_text())["is_last"] == (name == "last")


@pytest.mark.slow
def test_nothing_complete_is_an_error(configured: Path) -> None:
    for path in folder_of(configured).glob("*.ckpt"):
        truncate(path)
    for subcommand in ("fit", "test"):
        with pytest.raises(UnusableCheckpoint, match="has no complete checkpoint"):
            run(configured, "--ckpt_path", "last", subcommand=subcommand)


@pytest.mark.slow
def test_a_corrupt_file_is_refused(configured: Path) -> None:
    path = folder_of(configured) / "step=3.ckpt"
    flip(path)
    with pytest.raises(UnusableCheckpoint, match=r"step=3.ckpt is corrupt: its content is not what was written"):
        run(configured, "--ckpt_path", path, subcommand="test")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint "):
        run(configured, "--ckpt_path", folder_of(configured) / "step=7.ckpt")


@pytest.mark.parametrize("address", ["http://host/a.ckpt", "https://host/a.ckpt", "s3://bucket/a", "registry:name"])
def test_addresses_are_refused(address: str, tmp_path: Path) -> None:
    for is_fit in (True, False):
        with pytest.raises(ValueError, match=f"--ckpt_path takes a local path, last or best, got {address}; copy it"):
            find_checkpoint(address, tmp_path, is_fit=is_fit)


def test_the_command_line_refuses_addresses(configured: Path) -> None:
    with pytest.raises(ValueError, match="--ckpt_path takes a local path, last or best"):
        run(configured, "--ckpt_path", "http://host/a.ckpt", subcommand="test")


def warnings_of(config: Path, *arguments: object) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(config, "--ckpt_path", "last", "--trainer.max_steps", 4, *arguments)
    return [str(each.message) for each in caught if "changed since the checkpoint" in str(each.message)]


@pytest.mark.slow
def test_what_may_change_is_named(configured: Path) -> None:
    assert warnings_of(configured) == []
    told = warnings_of(configured, "--model.kl_coef", 0.2, "--data.batch_size", 1, "--model.optimizer.lr", 0.5)
    assert [text.partition(": ")[2] for text in told] == [
        "data.init_args.batch_size: 2 -> 1",
        "model.init_args.kl_coef: 0.1 -> 0.2",
        "model.init_args.optimizer.init_args.lr: 0.01 -> 0.5",
    ]
    assert ["keeps its saved values" in text for text in told] == [False, False, True]


def other_policy(folder: Path, **values: Any) -> str:
    return tiny.save_model(folder / "other", **values)


def renamed_token(folder: Path) -> str:
    """The same model, and a tokenizer of the same size with one word swapped for another."""
    path = Path(other_policy(folder)) / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return str(path.parent)


@pytest.mark.slow
def test_what_may_not_change_is_refused(configured: Path, tmp_path: Path) -> None:
    def refused(*arguments: object, message: str) -> None:
        with pytest.raises(UnusableCheckpoint, match=message):
            run(configured, "--ckpt_path", "last", "--trainer.max_steps", 4, *arguments)

    other = tiny.save_model(tmp_path / "gpt2", "gpt2")
    refused("--model.policy.path", other, message="architecture was llama, now it is gpt2; restore")
    deeper = tiny.save_model(tmp_path / "deeper", num_hidden_layers=3)
    refused("--model.policy.path", deeper, message="shape of policy.model.layers.2.* was absent, now it is")
    refused("--model.policy.path", renamed_token(tmp_path), message="tokenizer was ")
    sgd = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", 0.1]
    refused(*sgd, message="optimizer.class_path was torch.optim.AdamW, now it is torch.optim.SGD")
    with pytest.raises(UnusableCheckpoint, match="architecture was llama, now it is gpt2"):
        run(configured, "--ckpt_path", "last", "--model.policy.path", other, subcommand="test")
    export = ["--ckpt_path", "last", "--output_dir", tmp_path / "hf", "--model.policy.path", deeper]
    with pytest.raises(UnusableCheckpoint, match="shape of policy"):
        run(configured, *export, subcommand="export")


def test_a_complete_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 3)
    assert unused_path(tmp_path, 3) == tmp_path / "step=3-2.ckpt"
    assert unused_path(tmp_path, 4) == tmp_path / "step=4.ckpt"
    truncate(path)
    assert unused_path(tmp_path, 3) == path


def test_a_folder_with_a_foreign_pickle_is_refused(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "touched",))

    folder = tmp_path / "step=1.ckpt"
    folder.mkdir()
    torch.save({"optimizers": []}, folder / "rest.pt")
    (folder / ".metadata").write_bytes(pickle.dumps(Touch()))
    with pytest.raises(UnusableCheckpoint, match="cannot be read as tensors and plain types"):
        read_checkpoint(folder)
    assert not (tmp_path / "touched").exists()
