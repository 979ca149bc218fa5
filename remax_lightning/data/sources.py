"""Rows from files, the hub or Python objects, loaded or streamed."""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, cast

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from remax_lightning.data.formats import Row, UnusableRow
from remax_lightning.data.readers import (
    UNREADABLE,
    BadLine,
    LineStream,
    Stream,
    TableStream,
    has_lines,
    parse_line,
    read_lines,
)
from remax_lightning.models.hub import check_reachable

OneSource: TypeAlias = str | Dataset | IterableDataset | list[Row]
Source: TypeAlias = OneSource | list[OneSource] | None
Rows: TypeAlias = Dataset | list[Row | UnusableRow]

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
KINDS_OF_FILES = ".json, .jsonl, .parquet or .csv (.gz too)"
ACCEPTED = (
    f"a file ({KINDS_OF_FILES}), a glob of such files, a folder with such files, a hub name "
    "'owner/name[/configuration][:split]', or a list of these; in Python also a datasets.Dataset or a list of dicts"
)
HEAD = 100  # rows of a stream that show which columns it has


@dataclass(frozen=True)
class SourceTable:
    """Rows of one source that are read in one way.

    Args:
        source: The source, as the user names it.
        number: Index of the source among the sources.
        columns: Names of the columns.
        rows: The rows: a list if they had to be read line by line, a stream if they are read as they are needed.
    """

    source: str
    number: int
    columns: tuple[str, ...]
    rows: Rows | Stream


def list_sources(source: Source) -> list[OneSource]:
    """The sources, one by one; a list of rows is one source.

    Example:
        >>> list_sources("a.jsonl"), list_sources([{"prompt": "Hi"}]), list_sources(["a.jsonl", "b.csv"])
        (['a.jsonl'], [[{'prompt': 'Hi'}]], ['a.jsonl', 'b.csv'])
    """
    if source is None:
        return []
    is_several = isinstance(source, list) and not (source and all(isinstance(row, dict) for row in source))
    return cast(list[OneSource], source if is_several else [source])


def check_sources(key: str, source: Source, streaming: bool) -> None:
    """Refuse what is no source, without a look at the disk or the hub.

    Raises:
        TypeError: If it is something else, or a stream that is not to be streamed. The message names `key`.
    """
    for one in list_sources(source):
        if isinstance(one, IterableDataset) and not streaming:
            raise TypeError(f"{key}: an IterableDataset can only be train with streaming=True; give a Dataset")
        is_rows = isinstance(one, list) and one and all(isinstance(row, dict) for row in one)
        if not (isinstance(one, str | Dataset | IterableDataset) or is_rows):
            hint = f", such as data[{next(iter(one))!r}]" if isinstance(one, dict) and one else ""
            raise TypeError(f"{key} must be {ACCEPTED}{hint}; got {type(one).__name__}")


def load_tables(sources: Source, split: str = "train", streaming: bool = False) -> list[SourceTable]:
    """Load or open the rows of one or more sources, in their order.

    Args:
        sources: File, glob, folder or hub name `owner/name[/configuration][:split]`, `Dataset`, list of rows, or a list
            of these; an `IterableDataset` only if `streaming`.
        split: Split of a hub data set whose name does not include one; `train[:1000]` and the like work.
        streaming: Read the rows only when they are needed.

    Returns:
        The tables, each with its rows in the order of its files (a glob's and a folder's by name). A line of a .jsonl
        file that holds no row is a `BadLine` among them.

    Raises:
        FileNotFoundError: If a local path does not exist or holds no file of an accepted kind, or the hub has no such
            data set or cannot be reached.
        ValueError: If a file cannot be read or is empty, or the list of sources is.

    Example:
        >>> load_tables([{"prompt": "Hi"}, {"prompt": "Ho"}])[0].columns
        ('prompt',)
        >>> load_tables(["openai/gsm8k/main:test", "more.csv"])  # doctest: +SKIP
    """
    if not list_sources(sources):
        raise ValueError(f"the list of sources is empty; give {ACCEPTED}")
    return [
        SourceTable(source_name(source), number, _columns(source_name(source), rows), rows)
        for number, source in enumerate(list_sources(sources))
        for rows in _load_source(source, split, streaming)
    ]


def source_name(source: OneSource) -> str:
    """A source in messages: as the user names it, or its type."""
    return source if isinstance(source, str) else f"a {type(source).__name__}"


def _load_source(source: OneSource, split: str, streaming: bool) -> Sequence[Rows | Stream]:
    if isinstance(source, list):
        return [cast(Rows, source)]
    if isinstance(source, Dataset):
        return [source.with_format(None)]  # plain values, whatever the user reads from it
    if isinstance(source, IterableDataset):
        return [TableStream(source, source_name(source))]
    if not _is_local(source):
        rows = _load_from_hub(source, split, streaming)
        return [TableStream(rows, source) if isinstance(rows, IterableDataset) else rows]
    files = _find_files(source)
    kinds = [(_builder(file), has_lines(file)) for file in files]
    groups = {kind: [file for file, other in zip(files, kinds, strict=True) if other == kind] for kind in kinds}
    if streaming:
        return [_stream_files(*kind, group) for kind, group in groups.items()]
    return [_load_files(*kind, group) for kind, group in groups.items()]


def _load_from_hub(source: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    path, _, named_split = source.partition(":")
    name, configuration = "/".join(path.split("/")[:2]), path.split("/")[2:]
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    check_reachable(name, "dataset")  # within seconds; the library retries for half a minute
    try:
        return load_dataset(name, *configuration, split=named_split or split, **options)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"no data at {source!r}: there is no such file or folder, and no such data set on the hub ({error}); "
            f"give {ACCEPTED}"
        ) from error


def _load_files(builder: str, in_lines: bool, files: list[str]) -> Rows:
    """The rows of files of one kind; line by line only if some line is not like the others."""
    try:
        return load_dataset(builder, data_files=files, split="train")
    except (DatasetGenerationError, StopIteration, *UNREADABLE) as error:
        if in_lines:
            rows = [parse_line(file, *line) for file in files for line in read_lines(file)]
            if rows:
                return rows
        raise _unreadable(files, builder, error) from error


def _stream_files(builder: str, in_lines: bool, files: list[str]) -> Rows | Stream:
    if in_lines:
        return LineStream(files)
    if builder == "json":  # one array, which has to be parsed in one piece; the loaded rows stay on the disk
        return _load_files(builder, in_lines, files)
    try:
        rows = load_dataset(builder, data_files=files, split="train", streaming=True)
        return TableStream(rows, ", ".join(files), files)
    except UNREADABLE as error:
        raise _unreadable(files, builder, error) from error


def _unreadable(files: list[str], builder: str, error: Exception) -> ValueError:
    empty = [file for file in files if os.path.getsize(file) == 0]
    if empty:
        return ValueError(f"cannot read {', '.join(empty)}: the file is empty")
    reason = str(error.__cause__ or error)
    if not reason or "corresponds to no data" in reason:
        reason = "there is no row in it"
    return ValueError(f"cannot read {', '.join(files)} as {builder}: {reason}")


def _columns(source: str, rows: Rows | Stream) -> tuple[str, ...]:
    """Names of the columns; of those that the first rows have, where each row has its own."""
    if isinstance(rows, Dataset):
        return tuple(rows.column_names)
    head = rows if isinstance(rows, list) else [read() for read in islice(rows, HEAD)]
    columns = tuple(dict.fromkeys(name for row in head if isinstance(row, dict) for name in row))
    bad = next((row for row in head if isinstance(row, BadLine)), None)
    if not columns and bad is not None:
        raise ValueError(f"{bad.location}: {bad.detail}, and so on; {source!r} has no row that can be read")
    if not columns:
        raise ValueError(f"cannot read {source}: there is no row in it")
    return columns


def _is_local(source: str) -> bool:
    """Whether a source is a path: by its form, or since it exists."""
    looks_local = source.startswith((".", "/", "~")) or _builder(source) != "" or "*" in source
    return looks_local or Path(source).exists()


def _find_files(source: str) -> list[str]:
    path = Path(source).expanduser()
    paths = [str(file) for file in path.iterdir()] if path.is_dir() else glob.glob(str(path), recursive=True)
    files = sorted(file for file in paths if _builder(file))
    if files:
        return files
    reason = "there is no such file or folder"
    if paths or path.is_dir():
        reason = f"it is a folder without files of the kinds {KINDS_OF_FILES}"
        if not path.is_dir():
            reason = f"a file must be {KINDS_OF_FILES}"
    elif "*" in source:
        reason = "no file matches"
    raise FileNotFoundError(f"no data at {source!r}: {reason}; give {ACCEPTED}")


def _builder(file: str) -> str:
    """Name of the loader for a file's suffix, empty if there is none."""
    return BUILDERS.get(Path(file.removesuffix(".gz")).suffix, "")
