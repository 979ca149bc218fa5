"""Checkpoints that are folders: each process writes its part of a model that is split over processes.

Tensors are in torch's distributed format, which any number of processes can read; all else is in a file of its own.
What is read are tensors and plain types: torch's format holds a pickle, of which only what it needs is admitted.
"""

import hashlib
import pickle
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import StorageMeta

from remax_lightning.callbacks.synced_file import size_and_digest, sync_folder, write_synced
from remax_lightning.models.optimizer_state import keyed_by_index

REST = "rest.pt"
Files = dict[str, tuple[int, str]]
"""Size in bytes and digest of each file."""


def write_part(checkpoint: dict[str, Any], folder: Path) -> Files:
    """Write this process's part of a checkpoint; collective.

    Args:
        checkpoint: With this process's part of the model and of its optimizers.
        folder: Which does not exist yet.

    Returns:
        The files that this process wrote.
    """
    states = checkpoint.get("optimizer_states", [])
    dcp.save({"state_dict": checkpoint["state_dict"], **_tensors(states)}, checkpoint_id=str(folder))
    rank = dist.get_rank()
    own = list(folder.glob(f"__{rank}_*"))
    if rank == 0:
        rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
        rest["optimizers"] = [_without_tensors(state) for state in states]
        write_synced(folder / REST, lambda file: torch.save(rest, cast(Any, file)))
        own += [folder / REST, folder / ".metadata"]
    sync_folder(folder)
    return {file.name: size_and_digest(file) for file in own}


def folder_size_and_digest(folder: Path) -> tuple[int, str]:
    """Size in bytes and digest of a folder, of the content and the names of all its files."""
    return together({file.name: size_and_digest(file) for file in folder.iterdir()})


def together(files: Files) -> tuple[int, str]:
    """Size in bytes and digest of a folder by those of its files."""
    lines = "".join(f"{name} {digest}\n" for name, (_, digest) in sorted(files.items()))
    return sum(size for size, _ in files.values()), hashlib.sha256(lines.encode()).hexdigest()


def describe_folder(folder: str | Path) -> dict[str, Any]:
    """A checkpoint without the values of its tensors: the model's are empty, the optimizers' are absent."""
    checkpoint = _read_rest(folder)
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
    """A whole checkpoint in the memory of this process alone, in the form of a checkpoint file."""
    checkpoint, reader = _read_rest(folder), PlainReader(folder)
    metadata = reader.read_metadata()
    values = {
        name: torch.empty(cast(Any, entry).size, dtype=cast(Any, entry).properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
    }
    dcp.load(values, storage_reader=reader, no_dist=True)
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
    """Read the tensors of split models and optimizers in place; collective.

    Args:
        folder: The checkpoint.
        state: The model's, as split as it is.
        optimizer_states: The optimizers', likewise, by the names of parameters.

    Returns:
        The optimizers' states with what is no tensor, too.
    """
    dcp.load({"state_dict": state, **_tensors(optimizer_states)}, storage_reader=PlainReader(folder))
    saved = _read_rest(folder)["optimizers"]
    return [_joined(rest, state["state"]) for rest, state in zip(saved, optimizer_states, strict=True)]


class PlainReader(FileSystemReader):
    """Reads torch's distributed format, but of its pickle only what describes tensors."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the folder holds.

        Raises:
            UnpicklingError: If there is anything else in the pickle.
        """
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    OTHERS = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.memory_format)
        if module in self.MODULES or (module, name) in self.OTHERS or is_type:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its description holds a {module}.{name}")


def _read_rest(folder: str | Path) -> dict[str, Any]:
    return torch.load(Path(folder) / REST, map_location="cpu", weights_only=True)


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


def _joined(rest: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    state = {parameter: {**values, **tensors.get(parameter, {})} for parameter, values in rest["state"].items()}
    return {"state": state, "param_groups": rest["param_groups"]}
