"""What a sharded folder says of its tensors, read from torch's pickle without running any code that it names.

The folder may come from a stranger. Every name in the pickle stands for a class of this file that does nothing; what
comes out is checked, and torch's objects are built from it anew. Files outside of the folder are not read, and no
tensor is larger than the files that are said to hold it.
"""

import pickle
import pickletools
import re
from collections import Counter
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from remax_lightning.checkpoints.manifest import METADATA_FILE, SHARD_SUFFIX
from remax_lightning.checkpoints.plain_file import check_plain_file

LARGEST = 2**30
"""Bytes of a description; that of a model of 100 billion parameters on 1000 ranks has a third of it."""
MOST_DIMENSIONS = 64  # torch's own limit


class _Record:
    """In place of a class of torch: keeps its state, and does nothing."""

    state: object = None

    def __init__(self, *arguments: object) -> None:
        """Arguments, such as the name of a layout, are not needed."""

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Description(_Record):
    pass


class _Tensor(_Record):
    pass


class _Properties(_Record):
    pass


class _Chunk(_Record):
    pass


class _Index(_Record):
    pass


class _Place(_Record):
    pass


class _Unused(_Record):
    pass


_METADATA = "torch.distributed.checkpoint.metadata"
_ADMITTED: dict[tuple[str, str], Any] = {
    (_METADATA, "Metadata"): _Description,
    (_METADATA, "TensorStorageMetadata"): _Tensor,
    (_METADATA, "TensorProperties"): _Properties,
    (_METADATA, "ChunkStorageMetadata"): _Chunk,
    (_METADATA, "MetadataIndex"): _Index,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Place,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _Unused,
    (_METADATA, "StorageMeta"): _Unused,
    ("torch.serialization", "_get_layout"): _Unused,
    ("pathlib", "PosixPath"): _Unused,
    ("pathlib._local", "PosixPath"): _Unused,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    **{
        ("torch", str(dtype).removeprefix("torch.")): dtype
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype)
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"its description holds a {module}.{name}")
        return _ADMITTED[module, name]


def read_index(folder: Path) -> Metadata:
    """The description of a folder's tensors.

    Args:
        folder: The checkpoint.

    Raises:
        ValueError: If the description holds anything but tensors, is at odds with itself or with the files, or names
            what is no plain file of the folder.
        UnpicklingError: If it names a class that has no place in it.
    """
    description = _fields(_unpickled(folder / METADATA_FILE), _Description)
    entries, places, paths = (
        _as(description.get(name), dict) for name in ("state_dict_metadata", "storage_data", "planner_data")
    )
    # before anything is walked through: a list may be in the pickle once and in many entries
    num_chunks = sum(len(_as(_fields(entry, _Tensor).get("chunks"), list)) for entry in entries.values())
    _require(num_chunks == len(places), f"{num_chunks} chunks of tensors have {len(places)} places in files")
    tensors = {_as(name, str): _tensor(name, _fields(entry, _Tensor)) for name, entry in entries.items()}
    storage = dict(_placed(index, place) for index, place in places.items())
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, storage)
    _check_files(folder, storage)
    _check_paths(tensors, paths)
    return Metadata(tensors, planner_data=paths, storage_data=storage, storage_meta=StorageMeta())  # type: ignore[arg-type]


def _unpickled(path: Path) -> object:
    size = check_plain_file(path)
    _require(size <= LARGEST, f"its description has {size} bytes, more than {LARGEST}")
    content = path.read_bytes()
    # torch writes no numbers of places in the memo, by which a few bytes could ask for any amount of memory
    if any(opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") for opcode, _, _ in pickletools.genops(content)):
        raise ValueError("its description was not written by torch")
    return _Unpickler(BytesIO(content)).load()


def _tensor(name: str, fields: dict[str, Any]) -> TensorStorageMetadata:
    properties = fields.get("properties")
    _require(type(properties) is _Properties, f"{name} has no properties")
    dtype = _as(properties.state, tuple)[0]  # type: ignore[union-attr]
    _require(isinstance(dtype, torch.dtype), f"{name} has no type")
    chunks = [_fields(chunk, _Chunk) for chunk in fields["chunks"]]
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=dtype),
        size=_size(fields.get("size")),
        chunks=[ChunkStorageMetadata(_size(each.get("offsets")), _size(each.get("sizes"))) for each in chunks],
    )


def _placed(index: object, place: object) -> tuple[MetadataIndex, _StorageInfo]:
    key, value = _fields(index, _Index), _fields(place, _Place)
    name, number, file = _as(key.get("fqn"), str), key.get("index"), _as(value.get("relative_path"), str)
    _require(number is None or type(number) is int, f"a chunk of {name} has the number {number!r}")
    _require(Path(file).name == file and file.endswith(SHARD_SUFFIX), f"{file!r} is no file of the folder")
    _require(value.get("transform_descriptors") is None, f"{file} is compressed")
    start, length = _size((value.get("offset"), value.get("length")))
    return MetadataIndex(name, _size(key.get("offset")), number), _StorageInfo(file, start, length)


def _check_tensor(name: str, tensor: TensorStorageMetadata, storage: dict[MetadataIndex, _StorageInfo]) -> None:
    covered = 0
    for chunk in tensor.chunks:
        place = storage.get(MetadataIndex(name, chunk.offsets))
        ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=False)]
        is_inside = len(chunk.offsets) == len(chunk.sizes) == len(tensor.size)
        is_inside &= all(end <= size for end, size in zip(ends, tensor.size, strict=False))
        _require(is_inside and place is not None, f"a chunk of {name} is not where it belongs")
        numel = prod(chunk.sizes)
        _require(numel * tensor.properties.dtype.itemsize <= place.length, f"a chunk of {name} is too short")  # type: ignore[union-attr]
        covered += numel
    _require(covered == prod(tensor.size), f"{name} is not complete")


def _check_files(folder: Path, storage: dict[MetadataIndex, _StorageInfo]) -> None:
    """No byte is read twice: otherwise a small folder would fill any memory, or take any time."""
    lengths: Counter[str] = Counter()
    for place in storage.values():
        lengths[place.relative_path] += place.length
    for name, length in lengths.items():
        _require(length <= check_plain_file(folder / name), f"{name} is shorter than its tensors")


def _check_paths(tensors: dict[str, TensorStorageMetadata], paths: dict[Any, Any]) -> None:
    """A tensor is one of the model, or one of an optimizer's state of a parameter."""
    _require(paths.keys() == tensors.keys(), "names and places of the tensors differ")
    for name, path in paths.items():
        parts = [_as(part, str) for part in _as(path, tuple)]
        is_known = len(parts) == 2 and parts[0] == "state_dict"
        is_known |= len(parts) == 3 and re.fullmatch(r"optimizer_\d+", parts[0]) is not None
        _require(is_known and ".".join(parts) == name, f"{name!r} is no tensor of a model or an optimizer")


def _fields(value: object, record: type[_Record]) -> dict[str, Any]:
    if type(value) is not record:
        raise ValueError(f"its description holds a {type(value).__name__} in the place of a {record.__name__}")
    return _as(value.state, dict)


def _as(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"its description holds a {type(value).__name__} in the place of a {kind.__name__}")
    return value


def _size(value: object) -> torch.Size:
    sizes = _as(value, tuple)
    is_size = len(sizes) <= MOST_DIMENSIONS and all(type(each) is int and 0 <= each < 2**63 for each in sizes)
    _require(is_size, "its description holds something else in the place of a size")
    return torch.Size(sizes)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
