"""Sharded folders from a stranger: nothing in them runs code, reads other files, waits for ever or fills the memory."""

import io
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from remax_lightning import cli
from remax_lightning.checkpoints.checkpoint_folder import (
    TensorPlanner,
    load_folder,
    sharded_tensors,
    write_non_tensors,
)
from remax_lightning.checkpoints.manifest import (
    DamagedCheckpoint,
    Manifest,
    UnusableCheckpoint,
    folder_digest,
    folder_files,
    write_manifest,
)
from remax_lightning.checkpoints.safe_checkpoint_io import read_checkpoint
from remax_lightning.models.optimizer_state import keyed_by_name

MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem", "torch.serialization")


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


def sharded(folder: Path, checkpoint: dict[str, Any]) -> Path:
    """A checkpoint as fsdp2 writes it, by one process."""
    folder.mkdir(parents=True)
    write_non_tensors(checkpoint, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(sharded_tensors(checkpoint), checkpoint_id=str(folder), no_dist=True)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sharded(tmp_path / "step=1.ckpt", {"global_step": 1, "state_dict": {"weight": torch.ones(4, 2)}})


def described(folder: Path) -> Metadata:
    return FileSystemReader(str(folder)).read_metadata()


def describe(folder: Path, description: object) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(description))


def call(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls a name with a string; dots in it are attributes, as protocol 4 has it."""
    texts = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)]
    return b"\x80\x04" + b"".join(texts) + b"\x93\x8c" + bytes([len(argument)]) + argument.encode() + b"\x85R."


def test_what_torch_writes_is_read(folder: Path) -> None:
    assert torch.equal(read_checkpoint(folder)["state_dict"]["weight"], torch.ones(4, 2))


@pytest.mark.parametrize("module", [*MODULES, "os", "builtins", "posix", "torch"])
@pytest.mark.parametrize("name", ["os.system", "system", "eval", "os.popen", "pickle.loads", "io.open", "hub.load"])
def test_no_name_of_a_pickle_is_called(module: str, name: str, folder: Path, tmp_path: Path) -> None:
    (folder / ".metadata").write_bytes(call(module, name, f"touch {tmp_path / 'ran'}"))
    with pytest.raises(DamagedCheckpoint, match=rf"its description holds a {module}.{name}"):
        read_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["FileSystemWriter", "FileSystem", "_StorageWriterTransforms", "SerializationFormat"])
def test_only_what_describes_tensors_is_admitted(name: str, folder: Path) -> None:
    """These classes do something when they are made."""
    (folder / ".metadata").write_bytes(call("torch.distributed.checkpoint.filesystem", name, "x"))
    with pytest.raises(DamagedCheckpoint, match=f"its description holds a torch.distributed.checkpoint.*{name}"):
        read_checkpoint(folder)


def hide_bytes(folder: Path, command: Command) -> None:
    """Give each tensor an entry that torch's planner reads as a pickle, and the pickle as its content."""
    content = io.BytesIO()
    torch.save(command, content)
    (folder / "__0_0.distcp").write_bytes(content.getvalue())
    description = described(folder)
    for name, old in description.state_dict_metadata.items():
        new = description.state_dict_metadata[name] = BytesStorageMetadata()
        vars(new).update(vars(old))
    names, place = description.state_dict_metadata, _StorageInfo("__0_0.distcp", 0, len(content.getvalue()))
    description.storage_data = {MetadataIndex(name): place for name in names}
    describe(folder, description)


def test_only_tensors_are_read(folder: Path, tmp_path: Path) -> None:
    hide_bytes(folder, Command(tmp_path / "ran"))
    with pytest.raises(DamagedCheckpoint, match="BytesStorageMetadata"):
        read_checkpoint(folder)
    with pytest.raises(DamagedCheckpoint, match="cannot be read"):  # as a sharded model reads it
        load_folder(folder, {"weight": torch.zeros(4, 2)}, [])
    assert not (tmp_path / "ran").exists()


def test_the_planner_reads_no_bytes(tmp_path: Path) -> None:
    content = io.BytesIO()
    torch.save(Command(tmp_path / "ran"), content)
    item = dcp.planner.ReadItem(
        dcp.planner.LoadItemType.BYTE_IO,
        MetadataIndex("weight"),
        torch.Size(),
        MetadataIndex("weight"),
        torch.Size(),
        torch.Size(),
    )
    with pytest.raises(ValueError, match="weight is no tensor"):
        TensorPlanner().load_bytes(item, content)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_cannot_change_a_class(folder: Path) -> None:
    """BUILD on a class, with a pair as its state, sets attributes of that class for the rest of the process."""
    before = vars(MetadataIndex).copy()
    names = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (MODULES[0], "MetadataIndex", "fqn")]
    (folder / ".metadata").write_bytes(b"\x80\x04" + names[0] + names[1] + b"\x93N}" + names[2] + b"K\x01s\x86b.")
    with pytest.raises(DamagedCheckpoint):
        read_checkpoint(folder)
    assert vars(MetadataIndex) == before


Change = Callable[[Metadata, Path], None]


def place(change: Callable[[_StorageInfo], None]) -> Change:
    def apply(description: Metadata, folder: Path) -> None:
        for each in description.storage_data.values():
            change(each)

    return apply


def outside(name: Callable[[Path], str]) -> Change:
    """A shard that is whole, but is not the folder's."""

    def apply(description: Metadata, folder: Path) -> None:
        shutil.move(folder / "__0_0.distcp", folder.parent / "secret.distcp")
        for each in description.storage_data.values():
            each.relative_path = name(folder)

    return apply


def link(description: Metadata, folder: Path) -> None:
    shutil.move(folder / "__0_0.distcp", folder.parent / "secret.distcp")
    (folder / "__0_0.distcp").symlink_to(folder.parent / "secret.distcp")


def pipe(description: Metadata, folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()
    os.mkfifo(folder / "__0_0.distcp")


def sized(*sizes: int) -> Change:
    def apply(description: Metadata, folder: Path) -> None:
        tensor: Any = description.state_dict_metadata["state_dict.weight"]
        tensor.size = tensor.chunks[0].sizes = torch.Size(sizes)

    return apply


def shared(description: Metadata, folder: Path) -> None:
    """A thousand tensors in the same bytes."""
    tensor: Any = description.state_dict_metadata["state_dict.weight"]
    (storage,) = description.storage_data.values()
    names = [f"state_dict.{number}" for number in range(1000)]
    description.state_dict_metadata = dict.fromkeys(names, tensor)
    description.planner_data = {name: tuple(name.split(".")) for name in names}
    description.storage_data = {MetadataIndex(name, (0, 0), 0): storage for name in names}


def repeated(description: Metadata, folder: Path) -> None:
    """A list of chunks that is in the pickle once, and in a thousand entries."""
    shared(description, folder)
    tensor: Any = description.state_dict_metadata["state_dict.0"]
    tensor.chunks *= 1000


def compressed(description: Metadata, folder: Path) -> None:
    path, content = folder / "__0_0.distcp", io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
        new.writestr("archive/more", bytes(10**7))
    path.write_bytes(content.getvalue())
    for each in description.storage_data.values():
        each.length = len(content.getvalue())


def elsewhere(description: Metadata, folder: Path) -> None:
    description.planner_data = {"state_dict.weight": ("callbacks", "weight")}


def with_transform(each: _StorageInfo) -> None:
    each.transform_descriptors = ["stream.zstd/1"]


def negative(each: _StorageInfo) -> None:
    each.offset = -1


WRONG: dict[str, tuple[Change, str]] = {
    "parent": (outside(lambda folder: "../secret.distcp"), "is no file of the folder"),
    "absolute": (outside(lambda folder: str(folder.parent / "secret.distcp")), "is no file of the folder"),
    "parent in itself": (outside(lambda folder: f"../{folder.name}/../secret.distcp"), "is no file of the folder"),
    "link": (link, "__0_0.distcp is no plain file"),
    "pipe": (pipe, "__0_0.distcp is no plain file"),
    "other file": (place(lambda each: setattr(each, "relative_path", "rest.pt")), "'rest.pt' is no file of the folder"),
    "device": (place(lambda each: setattr(each, "relative_path", "/dev/zero")), "is no file of the folder"),
    "huge": (sized(10**9, 10**9), "is too short"),
    "huge and empty": (sized(2**62, 0, 2**62), "is not where it belongs"),
    "many dimensions": (sized(*[2**62] * 1000), "in the place of a size"),
    "shared bytes": (shared, "is shorter than its tensors"),
    "repeated": (repeated, "chunks of tensors have 1000 places"),
    "compressed": (compressed, "__0_0.distcp is not what was written"),
    "transformed": (place(with_transform), "is compressed"),
    "negative": (place(negative), "in the place of a size"),
    "elsewhere": (elsewhere, "is no tensor of a model"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_right_is_refused(name: str, folder: Path) -> None:
    """Before a tensor of that size is allocated, or a file outside is opened."""
    change, message = WRONG[name]
    description = described(folder)
    change(description, folder)
    describe(folder, description)
    with pytest.raises(DamagedCheckpoint, match=message):
        read_checkpoint(folder)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "content", [b"\x80\x04}r\xff\xff\xff\x7f.", b"\x80\x04}p2147483647\n.", b"\x80\x04}.", b"", b"}"]
)
def test_a_pickle_of_another_kind_is_refused(content: bytes, folder: Path) -> None:
    """The first two ask for 32 GiB in a few bytes."""
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="cannot be read as tensors and plain types"):
        read_checkpoint(folder)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [".metadata", "rest.pt"])
@pytest.mark.parametrize("kind", ["pipe", "link", "pickle"])
def test_the_other_files_are_plain(name: str, kind: str, folder: Path, tmp_path: Path) -> None:
    path = folder / name
    if kind == "link":
        shutil.move(path, tmp_path / "other")
        path.symlink_to(tmp_path / "other")
    else:
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.write_bytes(pickle.dumps(Command(tmp_path / "ran")))
    with pytest.raises(DamagedCheckpoint, match="cannot be read as tensors and plain types"):
        read_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.timeout(60)
def test_a_checkpoint_file_is_plain(tmp_path: Path) -> None:
    path, content = tmp_path / "some.ckpt", io.BytesIO()
    torch.save({"state_dict": {"weight": torch.zeros(10**6)}}, content)
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    assert path.stat().st_size < 10**5
    with pytest.raises(DamagedCheckpoint, match="its records are larger than the file"):
        read_checkpoint(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DamagedCheckpoint, match="it is no file"):
        read_checkpoint(path)
    path.unlink()
    for wrong in ([1], {"global_step": 1}, {"state_dict": {"weight": 1}}):
        torch.save(wrong, path)
        with pytest.raises(DamagedCheckpoint, match="cannot be read as tensors and plain types"):
            read_checkpoint(path)


# ------------------------------------------------------------------------------------------------ the command line


def configuration(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A ReMax run of one step with its checkpoint; and what is in that."""
    rows = tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in tiny.PROMPTS[:2]])
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 1,
            "default_root_dir": str(tmp_path / "run"),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
        },
        "model": {
            "class_path": "ReMax",
            "init_args": {
                "policy": {"path": tiny.save_model(tmp_path / "policy")},
                "reward": {"class_path": "FunctionReward", "init_args": {"function": "reward_functions.letter_values"}},
                "sampling": {"max_new_tokens": 2},
                "kl_coef": 0.0,
            },
        },
        "self_check": {"enabled": False},
        "hf_export": {"enabled": False},
        "data": {"class_path": "PromptDataModule", "init_args": {"train": rows, "validation": rows, "batch_size": 2}},
    }
    path = tmp_path / "remax.yaml"
    path.write_text(yaml.safe_dump(config))
    cli.main(["fit", "--config", str(path)])
    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoints" / "step=1.ckpt")
    (optimizer,) = checkpoint["optimizer_states"]
    names = iter(checkpoint["state_dict"])
    groups = [[next(names) for _ in group["params"]] for group in optimizer["param_groups"]]
    return path, {**checkpoint, "optimizer_states": [keyed_by_name(optimizer, groups)]}


@pytest.mark.slow
def test_no_command_runs_code(tmp_path: Path) -> None:
    """A folder that is named, and one in the run's own folder with a manifest that fits."""
    config, checkpoint = configuration(tmp_path)
    folder = sharded(tmp_path / "run" / "checkpoints" / "step=2.ckpt", checkpoint)
    (tmp_path / "run" / "checkpoints" / "step=1.ckpt").unlink()
    commands = {"export": ["--output_dir", str(tmp_path / "out")], "validate": [], "fit": ["--trainer.max_steps", "2"]}

    def run(path: object) -> None:
        for name, options in commands.items():
            with pytest.raises(UnusableCheckpoint):
                cli.main([name, "--config", str(config), "--ckpt_path", str(path), *options])
            assert not (tmp_path / "ran").exists()

    good = (folder / ".metadata").read_bytes()
    for attack in ("name", "entry"):
        if attack == "name":
            evil = call("torch.distributed.checkpoint.filesystem", "os.system", f"touch {tmp_path / 'ran'}")
            (folder / ".metadata").write_bytes(evil)
        else:
            (folder / ".metadata").write_bytes(good)
            hide_bytes(folder, Command(tmp_path / "ran"))
        size, sha256 = folder_digest(folder_files(folder, read_shards=False))
        write_manifest(folder, Manifest(size=size, sha256=sha256, step=2, number=9))
        run(folder)
        run("last")
