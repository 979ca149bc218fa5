"""Checkpoints that are folders: each rank writes its shards of the model and of its optimizers.

Tensors are in torch's distributed format, which any number of ranks can read; everything else is in a file of its own.
Only tensors and plain types are read: see ``folder_index`` for the pickle that torch's format contains.
"""

import io
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from remax_lightning.checkpoints.folder_index import read_index
from remax_lightning.checkpoints.manifest import METADATA_FILE, DamagedCheckpoint, Files
from remax_lightning.checkpoints.plain_file import check_archive, check_plain_file, load_plain
from remax_lightning.checkpoints.synced_file import size_and_digest, write_synced
from remax_lightning.models.optimizer_state import keyed_by_index

NON_TENSOR_FILE = "rest.pt"


def sharded_tensors(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a checkpoint, this rank's shards of them, as torch's distributed format takes them."""
    return {"state_dict": checkpoint["state_dict"], **_tensors(checkpoint.get("optimizer_states", []))}


def write_non_tensors(checkpoint: dict[str, Any], folder: Path) -> Files:
    """Write everything but the tensors of a checkpoint.

    Returns:
        The file, its size in bytes and its digest.
    """
    others = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
    others["optimizers"] = [_without_tensors(state) for state in checkpoint.get("optimizer_states", [])]
    return {NON_TENSOR_FILE: write_synced(folder / NON_TENSOR_FILE, lambda file: torch.save(others, cast(Any, file)))}


def written_files(metadata: Metadata, folder: Path) -> Files:
    """The files that torch has written, with the sizes that each rank reported.

    They are not listed: a shared file system may show the files of other machines later.
    """
    sizes: dict[str, int] = {}
    for shard in cast(dict[Any, Any], metadata.storage_data).values():
        end = shard.offset + shard.length
        sizes[shard.relative_path] = max(sizes.get(shard.relative_path, 0), end)
    shards = {name: (size, str(size)) for name, size in sizes.items()}
    return {METADATA_FILE: size_and_digest(folder / METADATA_FILE), **shards}


def describe_folder(folder: str | Path) -> dict[str, Any]:
    """A checkpoint without the values of its tensors: the model's are on the meta device, the optimizers' absent."""
    checkpoint = _read_non_tensors(folder)
    del checkpoint["optimizers"]
    entries = PlainReader(folder).read_metadata().state_dict_metadata
    prefix = "state_dict."
    checkpoint["state_dict"] = {
        name.removeprefix(prefix): torch.empty(cast(Any, entry).size, device="meta")
        for name, entry in entries.items()
        if name.startswith(prefix)
    }
    return checkpoint


def read_folder(folder: str | Path) -> dict[str, Any]:
    """An unsharded checkpoint in the memory of this process, in the form of a checkpoint file."""
    checkpoint, reader = _read_non_tensors(folder), PlainReader(folder)
    metadata = reader.read_metadata()
    values = {
        name: torch.empty(cast(Any, entry).size, dtype=cast(Any, entry).properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
    }
    _load(values, reader, no_dist=True)
    nested: dict[str, Any] = {"state_dict": {}}
    for name, path in metadata.planner_data.items():
        place = nested
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = values[name]
    checkpoint["state_dict"] = nested["state_dict"]
    optimizers = checkpoint.pop("optimizers")
    checkpoint["optimizer_states"] = [
        keyed_by_index(_joined(state, nested.get(_name(number), {}))) for number, state in enumerate(optimizers)
    ]
    return checkpoint


def load_folder(folder: Path, state: dict[str, Any], optimizer_states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Read the shards of a model and its optimizers in place; collective.

    Args:
        folder: The checkpoint.
        state: The model's state, sharded as the model is.
        optimizer_states: The optimizers' states, sharded as the model is, by the names of parameters; none for an
            evaluation.

    Returns:
        The optimizers' states with what is not a tensor.

    Raises:
        DamagedCheckpoint: On all ranks, if one of them cannot read its shards.
    """
    _load({"state_dict": state, **_tensors(optimizer_states)}, PlainReader(folder))
    saved = _read_non_tensors(folder)["optimizers"]
    return [_joined(others, state["state"]) for others, state in zip(saved, optimizer_states, strict=False)]


def _load(values: dict[str, Any], reader: "PlainReader", *, no_dist: bool = False) -> None:
    try:
        dcp.load(values, storage_reader=reader, planner=TensorPlanner(), no_dist=no_dist)
    except CheckpointException as error:  # which is a BaseException
        reason = str(error).strip().splitlines()[-1]
        raise DamagedCheckpoint(
            f"the checkpoint {reader.path} cannot be read ({reason}); give an earlier one"
        ) from error


class PlainReader(FileSystemReader):
    """Reads torch's distributed format: of its pickle only what describes tensors, and no shard that is damaged.

    Each shard is a zip archive with a checksum for each of its records.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The description of the folder's tensors; see :func:`read_index`."""
        metadata = read_index(Path(self.path))
        cast(StorageMeta, metadata.storage_meta).load_id = self.load_id
        return metadata

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        content = io.BytesIO(super()._slice_file(file, sinfo).read())
        try:
            check_archive(content, sinfo.length)
        except ValueError as error:
            raise ValueError(f"{sinfo.relative_path} is not what was written") from error
        content.seek(0)
        return content


class TensorPlanner(DefaultLoadPlanner):
    """Reads tensors alone: torch's planner reads everything else as a pickle that may run code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse what is no tensor.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{read_item.dest_index.fqn} is no tensor")


def _read_non_tensors(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / NON_TENSOR_FILE
    check_plain_file(path)
    content = load_plain(path)
    for state in content["optimizers"]:
        if type(state["param_groups"]) is not list or any(type(each) is not dict for each in state["state"].values()):
            raise ValueError(f"{path.name} has no states of optimizers")
    return content


def _name(number: int) -> str:
    return f"optimizer_{number}"


def _tensors(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The tensors of optimizers' states."""
    return {
        _name(number): {
            parameter: {key: value for key, value in values.items() if isinstance(value, Tensor)}
            for parameter, values in state["state"].items()
        }
        for number, state in enumerate(states)
    }


def _without_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state without its tensors."""
    plain = {
        parameter: {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        for parameter, values in state["state"].items()
    }
    return {"param_groups": state["param_groups"], "state": plain}


def _joined(others: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    state = {parameter: {**values, **tensors.get(parameter, {})} for parameter, values in others["state"].items()}
    return {"state": state, "param_groups": others["param_groups"]}
