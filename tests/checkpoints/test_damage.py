"""What is damaged, foreign or not finite is skipped by ``last``, refused by name, and never hides what went wrong."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from remax_lightning.callbacks import Checkpoint
from remax_lightning.checkpoints import safe_checkpoint_io
from remax_lightning.checkpoints.checkpoint_folder import sharded_tensors, write_non_tensors
from remax_lightning.checkpoints.find_checkpoint import newest_complete
from remax_lightning.checkpoints.manifest import (
    DamagedCheckpoint,
    Manifest,
    UnusableCheckpoint,
    folder_digest,
    folder_files,
    manifest_path,
    manifests,
    next_number,
    read_manifest,
    write_manifest,
)
from remax_lightning.checkpoints.safe_checkpoint_io import SafeCheckpointIO, read_verified, remove_partial
from remax_lightning.cli import ExportingTrainer


def save(folder: Path, step: int, value: float | None = None) -> Path:
    path = folder / f"step={step}.ckpt"
    weights = {"head.weight": torch.full((64,), float(step)), "body.weight": torch.full((4,), value or 0.0)}
    SafeCheckpointIO().save_checkpoint({"global_step": step, "state_dict": weights}, path)
    return path


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def save_folder(folder: Path, step: int, value: float = 0.0) -> Path:
    """As fsdp2 does."""
    path = folder / f"step={step}.ckpt"
    path.mkdir(parents=True)
    checkpoint = {"global_step": step, "state_dict": {"body.weight": torch.full((64,), value)}}
    write_non_tensors(checkpoint, path)
    torch.distributed.checkpoint.save(sharded_tensors(checkpoint), checkpoint_id=str(path), no_dist=True)
    size, sha256 = folder_digest(folder_files(path, read_shards=False))
    write_manifest(path, Manifest(size=size, sha256=sha256, step=step, number=next_number(folder)))
    return path


WRONG_VALUES: list[dict[str, Any]] = [
    {"saved_at": None, "step": None},
    {"step": "3"},
    {"number": None},
    {"number": float("inf")},
    {"number": True},
    {"size": 1.5},
    {"sha256": 3},
    {"run": None},
    {"scores": None},
    {"scores": [1.0]},
    {"scores": {"val/reward": None}},
    {"scores": {"val/reward": "1"}},
    {"unknown": 1},
]


@pytest.mark.parametrize("values", WRONG_VALUES, ids=str)
def test_a_manifest_of_another_kind_is_none(values: dict[str, Any], tmp_path: Path) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    file = manifest_path(newer)
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    with pytest.warns(UserWarning, match="step=2.ckpt is skipped: it has no manifest that can be read"):
        assert read_verified(tmp_path)["read_from"] == str(older)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["list", "deep", "pipe", "folder", "binary"])
def test_what_is_no_manifest_is_none(kind: str, tmp_path: Path) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    file = manifest_path(newer)
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.write_bytes({"list": b"[1]", "deep": b"[" * 10**5, "binary": b"\xff\xfe"}[kind])
    assert read_manifest(newer) is None
    with pytest.warns(UserWarning, match="step=2.ckpt is skipped: it has no manifest that can be read"):
        assert newest_complete(tmp_path) == older


def test_no_time_orders_checkpoints(tmp_path: Path) -> None:
    """Neither that of the files nor the one that earlier versions wrote into manifests."""
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    for path, saved_at in ((first, 2**62), (second, None)):
        values = json.loads(manifest_path(path).read_text())
        assert "saved_at" not in values
        manifest_path(path).write_text(json.dumps({**values, "saved_at": saved_at}))
    for path in (second, manifest_path(second)):
        os.utime(path, (1, 1))
    assert [path for path, _ in manifests(tmp_path)] == [second, first]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_a_folder_with_what_is_no_file_is_skipped(kind: str, tmp_path: Path) -> None:
    older, newer = save_folder(tmp_path, 1), save_folder(tmp_path, 2)
    if kind == "pipe":
        os.mkfifo(newer / "other")
    elif kind == "link":
        (newer / "other").symlink_to(tmp_path / "nowhere")
    else:
        (newer / "other").mkdir()
    with pytest.warns(UserWarning, match="step=2.ckpt is skipped: other is no plain file"):
        assert newest_complete(tmp_path) == older


def test_a_damaged_shard_is_skipped(tmp_path: Path) -> None:
    """Its size is right, and only its checksum is not, which is seen when it is read."""
    older, newer = save_folder(tmp_path, 1), save_folder(tmp_path, 2)
    shard = newer / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[data.index(bytes(64))] ^= 1
    shard.write_bytes(data)
    with pytest.warns(UserWarning, match="step=2.ckpt is skipped: .* __0_0.distcp is not what was written"):
        assert read_verified(tmp_path)["read_from"] == str(older)
    with pytest.raises(DamagedCheckpoint, match=r"step=2.ckpt cannot be read .*__0_0.distcp is not what was written"):
        read_verified(newer)
    shutil.rmtree(older)
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(UnusableCheckpoint, match=r"has no complete checkpoint \(step=2.ckpt: "),
    ):
        read_verified(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("save_one", [save, save_folder])
def test_weights_that_are_not_finite_are_skipped(save_one: Any, value: float, tmp_path: Path) -> None:
    older, newer = save_one(tmp_path, 1), save_one(tmp_path, 2, value)
    assert newest_complete(tmp_path) == newer  # it is what was written
    message = r"step=2.ckpt has weights that are not finite \(body.weight\); give one from before"
    with pytest.warns(UserWarning, match=message):
        assert SafeCheckpointIO().load_checkpoint(tmp_path)["read_from"] == str(older)
    with pytest.raises(DamagedCheckpoint, match=message):
        SafeCheckpointIO().load_checkpoint(newer)


def test_another_model_is_not_skipped(tmp_path: Path) -> None:
    """All earlier checkpoints are of it, too."""

    def check(checkpoint: dict[str, Any]) -> None:
        raise UnusableCheckpoint(f"step {checkpoint['global_step']} does not fit")

    save(tmp_path, 1)
    save(tmp_path, 2)
    with pytest.raises(UnusableCheckpoint, match="step 2 does not fit"):
        SafeCheckpointIO(check=check).load_checkpoint(tmp_path)


def test_a_disk_that_is_read_only_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the middle of a run on: what could not be written cannot be removed either."""

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "step=1.ckpt.partial")

    monkeypatch.setattr(safe_checkpoint_io, "write_synced", refuse)
    monkeypatch.setattr(safe_checkpoint_io, "remove", refuse)
    with pytest.raises(OSError, match=r"^the checkpoint .*step=1.ckpt could not be written \(Read-only") as error:
        save(tmp_path, 1)
    assert error.value.errno == errno.EROFS


def test_a_link_that_a_save_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("kept")
    (tmp_path / "step=1.ckpt.partial").symlink_to(tmp_path / "other")
    (tmp_path / "step=2.ckpt.partial").symlink_to(tmp_path / "nowhere")
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert (tmp_path / "other" / "file").exists()


def test_no_command_goes_on_with_lost_weights(policy: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def trainer(steps: int = 2) -> Any:
        saves = [Checkpoint(str(folder), every_n_train_steps=1)]
        return tiny.trainer(tmp_path, steps, saves, enable_checkpointing=True)

    data = tiny.prompt_data(tmp_path)
    data.validation = data.test = data.predict = data.train
    trainer().fit(tiny.remax(policy), datamodule=data)
    lost = read_verified(folder / "step=2.ckpt")
    next(iter(lost["state_dict"].values()))[0, 0] = float("nan")
    SafeCheckpointIO().save_checkpoint(lost, newest := folder / "step=2-2.ckpt")
    message = (
        r"step=2-2.ckpt has weights that are not finite \(policy.model.embed_tokens.weight\); give one from before"
    )
    for command in ("fit", "validate", "test", "predict"):
        with pytest.raises(DamagedCheckpoint, match=message):
            getattr(trainer(), command)(tiny.remax(policy), datamodule=data, ckpt_path=str(newest))
    exporting = ExportingTrainer(accelerator="cpu", devices=1, logger=False)
    with pytest.raises(DamagedCheckpoint, match=message):
        exporting.export(tiny.remax(policy), str(newest), str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()
    with pytest.raises(DamagedCheckpoint, match=message):
        type(tiny.remax(policy)).load_from_checkpoint(newest, reward=tiny.remax(policy).reward)
    with pytest.warns(UserWarning, match=f"step=2-2.ckpt is skipped: .*{message}"):
        exporting.export(tiny.remax(policy), str(folder), str(tmp_path / "hf"))
    assert json.loads((tmp_path / "hf" / "training.json").read_text())["checkpoint"] == "step=2.ckpt"
    with pytest.warns(UserWarning, match=f"step=2-2.ckpt is skipped: .*{message}"):
        trainer(3).fit(tiny.remax(policy), datamodule=data, ckpt_path="last")
