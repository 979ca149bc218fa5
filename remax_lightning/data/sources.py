"""Rows from the hub or from local files, loaded or streamed."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from remax_lightning.data.formats import Row, UnusableRow
from remax_lightning.data.lines import BadLine, is_lines, parse_line, read_lines
from remax_lightning.data.streams import LineStream, Stream, TableStream

Rows: TypeAlias = Dataset | list[Row | UnusableRow]

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
ACCEPTED = (
    "a .json, .jsonl, .parquet or .csv file (.gz too), a glob of such files, a folder with such files, "
    "or a hub name 'owner/name[/configuration][:split]'"
)
HEAD = 100  # rows of a stream that show which columns it has


@dataclass(frozen=True)
class Part:
    """Rows of one source that are read in one way.

    Args:
        source: The source, as the user names it.
        number: Its place among the sources, from 0.
        columns: Names of the columns.
        rows: The rows: a list if they had to be read line by line, a stream if they are read as they are needed.
    """

    source: str
    number: int
    columns: tuple[str, ...]
    rows: Rows | Stream


def load_parts(sources: str | list[str], split: str = "train", streaming: bool = False) -> list[Part]:
    """Load or open the rows of one or more sources, in their order.

    Args:
        sources: File, glob, folder or hub name `owner/name[/configuration][:split]`, or a list of them.
        split: Split of a hub dataset whose name does not say one; `train[:1000]` and the like work.
        streaming: Read the rows only when they are needed.

    Returns:
        The parts, each with its rows in the order of its files (a glob's and a folder's by name). A line of a .jsonl
        file that holds no row is a `BadLine` among them.

    Raises:
        FileNotFoundError: If a local path does not exist or holds no file of an accepted kind, or the hub has no such
            data set.
        ValueError: If a file cannot be read or is empty, or the list of sources is.

    Example:
        >>> load_parts("prompts.jsonl")  # doctest: +SKIP
        >>> load_parts(["openai/gsm8k/main:test", "more.csv"])  # doctest: +SKIP
    """
    names = [sources] if isinstance(sources, str) else sources
    if not names:
        raise ValueError(f"no rows to load: the list of sources is empty; give {ACCEPTED}")
    return [
        Part(source, number, _columns(source, rows), rows)
        for number, source in enumerate(names)
        for rows in _load_source(source, split, streaming)
    ]


def _load_source(source: str, split: str, streaming: bool) -> Sequence[Rows | Stream]:
    if not _is_local(source):
        rows = _load_from_hub(source, split, streaming)
        return [TableStream(rows, source) if isinstance(rows, IterableDataset) else rows]
    files = _find_files(source)
    kinds = [(_builder(file), is_lines(file)) for file in files]
    groups = {kind: [file for file, other in zip(files, kinds, strict=True) if other == kind] for kind in kinds}
    if streaming:
        return [_stream_files(*kind, group) for kind, group in groups.items()]
    return [_load_files(*kind, group) for kind, group in groups.items()]


def _load_from_hub(source: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    name, _, own_split = source.partition(":")
    owner_and_name, configuration = name.split("/")[:2], name.split("/")[2:]
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    try:
        return load_dataset("/".join(owner_and_name), *configuration, split=own_split or split, **options)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"no data at {source!r}: no such file or folder, and the hub gave none ({error}); accepted is {ACCEPTED}"
        ) from error


def _load_files(builder: str, in_lines: bool, files: list[str]) -> Rows:
    """The rows of files of one kind; line by line only if some line is not like the others."""
    try:
        return load_dataset(builder, data_files=files, split="train")
    except (DatasetGenerationError, ValueError, EOFError, StopIteration) as error:
        if in_lines:
            rows = [parse_line(file, *line) for file in files for line in read_lines(file)]
            if rows:
                return rows
        raise ValueError(
            f"cannot read {', '.join(files)} as {builder}: {error.__cause__ or error or 'there is no row in it'}"
        ) from error


def _stream_files(builder: str, in_lines: bool, files: list[str]) -> Rows | Stream:
    if in_lines:
        return LineStream(files)
    if builder == "json":  # one array, which has to be parsed as a whole; the loaded rows stay on the disk
        return _load_files(builder, in_lines, files)
    try:
        return TableStream(load_dataset(builder, data_files=files, split="train", streaming=True), ", ".join(files))
    except ValueError as error:
        raise ValueError(f"cannot read {', '.join(files)} as {builder}: {error}") from error


def _columns(source: str, rows: Rows | Stream) -> tuple[str, ...]:
    """Names of the columns; of those that the first rows have, where each row has its own."""
    if isinstance(rows, Dataset):
        return tuple(rows.column_names)
    head = rows if isinstance(rows, list) else [read() for read in islice(rows, HEAD)]
    columns = tuple(dict.fromkeys(name for row in head if isinstance(row, dict) for name in row))
    bad = next((row for row in head if isinstance(row, BadLine)), None)
    if not columns and bad is not None:
        raise ValueError(f"{bad.place}: {bad.detail}, and so on; {source!r} has no row that can be read")
    if not columns:
        raise ValueError(f"cannot read {source!r}: there is no row in it")
    return columns


def _is_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or _builder(source) != "" or "*" in source or Path(source).exists()


def _find_files(source: str) -> list[str]:
    path = Path(source).expanduser()
    found = [str(file) for file in path.iterdir()] if path.is_dir() else glob.glob(str(path), recursive=True)
    files = sorted(file for file in found if _builder(file))
    if not files:
        raise FileNotFoundError(f"no data at {source!r}; accepted is {ACCEPTED}")
    return files


def _builder(file: str) -> str:
    """Name of the loader for a file's suffix, empty if there is none."""
    return BUILDERS.get(Path(file.removesuffix(".gz")).suffix, "")
