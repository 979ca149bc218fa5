"""Rows from the hub or from local files."""

import glob
import gzip
import json
from pathlib import Path

from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
ACCEPTED = (
    "a .json, .jsonl, .parquet or .csv file (.gz too), a glob of such files, a folder with such files, "
    "or a hub name 'owner/name[/configuration][:split]'"
)


def load_rows(path: str | list[str], split: str = "train") -> Dataset:
    """Load the rows of one or more sources, in their order.

    Args:
        path: File, glob, folder or hub name `owner/name[/configuration][:split]`, or a list of them.
        split: Split of a hub dataset whose name does not say one; `train[:1000]` and the like work.

    Returns:
        The rows; row `i` is the i-th row of the files in the order given (a glob's and a folder's files by name).

    Raises:
        FileNotFoundError: If a local path does not exist or holds no file of an accepted kind, or the hub has no such
            data set.
        ValueError: If a line of a JSON file is not valid JSON, or a list is empty.

    Example:
        >>> load_rows("prompts.jsonl")  # doctest: +SKIP
        >>> load_rows("openai/gsm8k/main:test")  # doctest: +SKIP
    """
    sources = [path] if isinstance(path, str) else path
    if not sources:
        raise ValueError(f"no rows to load: the list of sources is empty; give {ACCEPTED}")
    parts = [part for source in sources for part in _load_source(source, split)]
    return parts[0] if len(parts) == 1 else concatenate_datasets([_with_short_strings(part) for part in parts])


def _with_short_strings(rows: Dataset) -> Dataset:
    """The rows with one type for text: the CSV reader has another than the JSON reader, and the two do not mix."""
    features = {
        name: Value("string") if kind == Value("large_string") else kind for name, kind in rows.features.items()
    }
    return rows.cast(Features(features))


def _load_source(source: str, split: str) -> list[Dataset]:
    if not _is_local(source):
        return [_load_from_hub(source, split)]
    files = _find_files(source)
    builders = dict.fromkeys(_builder(file) for file in files)  # ordered, without repeats
    return [_load_files(builder, [file for file in files if _builder(file) == builder]) for builder in builders]


def _load_from_hub(source: str, split: str) -> Dataset:
    name, _, own_split = source.partition(":")
    owner_and_name, configuration = name.split("/")[:2], name.split("/")[2:]
    try:
        return load_dataset("/".join(owner_and_name), *configuration, split=own_split or split)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"no data at {source!r}: no such file or folder, and the hub gave none ({error}); accepted is {ACCEPTED}"
        ) from error


def _load_files(builder: str, files: list[str]) -> Dataset:
    try:
        return load_dataset(builder, data_files=files, split="train")
    except DatasetGenerationError as error:
        if builder == "json":
            _raise_at_bad_line(files)
        raise ValueError(f"cannot read {', '.join(files)} as {builder}: {error.__cause__ or error}") from error


def _raise_at_bad_line(files: list[str]) -> None:
    """Name the first line of JSON-lines files that is not JSON."""
    for file in files:
        if ".jsonl" not in Path(file).suffixes:
            continue
        with gzip.open(file, "rb") if file.endswith(".gz") else open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    json.loads(line or b"null")
                except ValueError as error:
                    raise ValueError(f"{file}, line {number}: not valid JSON ({error}); repair or remove it") from error


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
