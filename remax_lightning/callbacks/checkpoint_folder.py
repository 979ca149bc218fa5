"""Checkpoints that are folders: each process writes its part of a model that is split over processes.

Tensors are in torch's distributed format, which any number of processes can read; all else is in a file of its own.
"""

import hashlib
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from remax_lightning.callbacks.synced_file import size_and_digest, write_synced
from remax_lightning.models.optimizer_state import numbered

REST = "rest.pt"


def is_split(checkpoint: dict[str, Any]) -> bool:
    """Whether the tensors of a checkpoint are split over processes."""
    return any(isinstance(value, DTensor) for value in checkpoint.get("state_dict", {}).values())


def write_folder(checkpoint: dict[str, Any], folder: Path) -> tuple[int, str]:
    """Write a checkpoint; collective.

    Args:
        checkpoint: With this process's part of the model and of its optimizers.
        folder: Which does not exist yet.

    Returns:
        Size in bytes and digest of the folder.
    """
    tensors = {"state_dict": checkpoint["state_dict"]}
    for number, state in enumerate(checkpoint.get("optimizer_states", [])):
        tensors[f"optimizer_{number}"] = state
    dcp.save(tensors, checkpoint_id=folder)
    rank = dist.get_rank()
    if rank == 0:
        rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
        write_synced(folder / REST, lambda file: torch.save(rest, cast(Any, file)))
    own = [*folder.glob(f"__{rank}_*"), *([folder / REST, folder / ".metadata"] if rank == 0 else [])]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {file.name: size_and_digest(file) for file in own})
    return _together({name: value for part in parts for name, value in part.items()})


def folder_size_and_digest(folder: Path) -> tuple[int, str]:
    """Size in bytes and digest of a folder, of the content and the names of all its files."""
    return _together({file.name: size_and_digest(file) for file in folder.iterdir()})


def _together(files: dict[str, tuple[int, str]]) -> tuple[int, str]:
    lines = "".join(f"{name} {digest}\n" for name, (_, digest) in sorted(files.items()))
    return sum(size for size, _ in files.values()), hashlib.sha256(lines.encode()).hexdigest()


def describe_folder(folder: str | Path) -> dict[str, Any]:
    """A checkpoint without the values of its tensors: the model's are empty, the optimizers' are absent."""
    checkpoint = torch.load(Path(folder) / REST, map_location="cpu", weights_only=True)
    checkpoint["state_dict"] = {
        path[1]: torch.empty(entry.size, device="meta")
        for path, entry in _entries(folder)
        if path[0] == "state_dict" and isinstance(entry, TensorStorageMetadata)
    }
    return checkpoint


def read_folder(folder: str | Path) -> dict[str, Any]:
    """A whole checkpoint in the memory of this process alone, in the form of a checkpoint file."""
    checkpoint = torch.load(Path(folder) / REST, map_location="cpu", weights_only=True)
    values = {
        ".".join(map(str, path)): torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for path, entry in _entries(folder)
    }
    dcp.load(values, storage_reader=FileSystemReader(folder), no_dist=True)
    nested: dict[str, Any] = {}
    for path, _ in _entries(folder):
        place = nested
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = values[".".join(map(str, path))]
    checkpoint["state_dict"] = nested.pop("state_dict")
    optimizers = sorted(nested, key=lambda name: int(name.rpartition("_")[2]))
    checkpoint["optimizer_states"] = [numbered(_with_lists(nested[name])) for name in optimizers]
    return checkpoint


def _with_lists(value: Any) -> Any:
    """Nested values in which a dictionary whose keys are numbers is a list, as it was before it was taken apart."""
    if not isinstance(value, dict):
        return value
    if value and all(isinstance(key, int) for key in value):
        return [_with_lists(value[number]) for number in sorted(value)]
    return {name: _with_lists(each) for name, each in value.items()}


def _entries(folder: str | Path) -> list[tuple[tuple[Any, ...], Any]]:
    """Where each value stands in the nested checkpoint, and what it is."""
    metadata = FileSystemReader(folder).read_metadata()
    return [(metadata.planner_data[name], entry) for name, entry in metadata.state_dict_metadata.items()]
