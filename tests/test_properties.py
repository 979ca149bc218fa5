"""Random files, rows and values for what reads and writes them: no input may end a run but by its one sentence."""

import gzip
import json
import math
import pickle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remax_lightning.checkpoints.checkpoint_folder import METADATA_FILE
from remax_lightning.checkpoints.manifest import Manifest, manifest_path, manifests, read_manifest
from remax_lightning.checkpoints.safe_checkpoint_io import UnusableCheckpoint, read_checkpoint
from remax_lightning.data.formats import FORMATS, Row, UnusableRow, check_depth, or_unusable
from remax_lightning.data.readers import BadLine, parse_line, read_lines
from remax_lightning.rollout.plain_rows import json_line

settings.register_profile("project", deadline=None, database=None, derandomize=True, max_examples=100)
settings.load_profile("project")

texts = st.text(st.characters(codec=None, exclude_categories=[]), max_size=20)  # lone surrogates, too
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))
rows = st.dictionaries(texts, values, max_size=4)
odd_values = values | st.binary() | st.dates() | st.datetimes() | st.complex_numbers() | st.sets(st.integers())


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def finite(value: Any) -> Any:
    """A value as JSON can have it: what is not finite is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return list(map(finite, value))
    return {key: finite(each) for key, each in value.items()} if isinstance(value, dict) else value


@given(rows)
def test_a_row_is_one_line_that_is_read_as_it_was(row: Row) -> None:
    line = json_line(row)
    assert len((line + "\n").splitlines()) == 1
    line.encode("utf-8")
    assert json.loads(line, parse_constant=refuse_constant) == finite(row)


@given(st.dictionaries(texts, odd_values, max_size=4))
def test_any_value_can_be_written(row: Row) -> None:
    line = json_line(row)
    assert set(json.loads(line, parse_constant=refuse_constant)) == set(row)


def written(content: bytes, name: str = "rows.jsonl") -> list[Row | BadLine]:
    """What is read of a file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return [parse_line(name, *line) for line in read_lines(str(path))]


@given(st.lists(rows, max_size=5), st.booleans(), st.booleans())
def test_rows_are_read_as_they_were_written(given_rows: list[Row], is_ascii: bool, is_compressed: bool) -> None:
    given_rows = [finite(row) for row in given_rows]
    text = "".join(json.dumps(row, ensure_ascii=is_ascii) + "\n" for row in given_rows)
    content = text.encode("utf-8", errors="surrogatepass")
    read = written(gzip.compress(content), "rows.jsonl.gz") if is_compressed else written(content)
    assert len(read) == len(given_rows)
    for row, expected in zip(read, given_rows, strict=True):
        # what is not text in UTF-8 is a bad line unless it is escaped
        assert row == expected or (isinstance(row, BadLine) and not is_ascii)


@given(st.binary(max_size=200))
def test_any_bytes_are_rows_or_bad_lines(content: bytes) -> None:
    assert all(isinstance(row, dict | BadLine) for row in written(content))


@given(st.binary(min_size=1, max_size=200))
def test_a_broken_compressed_file_is_named(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz, after line \d+: cannot decompress it"):
        written(content, "rows.jsonl.gz")


messages = st.lists(
    st.fixed_dictionaries({"role": texts | st.sampled_from(["user", "assistant"]), "content": values}) | values,
    max_size=3,
)


@pytest.mark.parametrize("number", range(len(FORMATS)))
@given(st.data())
def test_any_value_of_a_column_is_usable_or_says_why_not(number: int, data: st.DataObject) -> None:
    known = FORMATS[number]
    row = {column: data.draw(values | messages) for column in known.columns}
    if isinstance(or_unusable(check_depth, row), UnusableRow):
        return
    for read in (known.prompt, known.demonstration, known.preference):
        if (read == known.demonstration and known.read_response is None) or (
            read == known.preference and known.read_pair is None
        ):
            continue
        result = or_unusable(read, row)
        if isinstance(result, UnusableRow):
            assert str(result)
            continue
        prompt = result if read == known.prompt else result[0]
        assert isinstance(prompt, str | list)
        json.dumps(result).encode()
        "".join(result[1:] if isinstance(result, tuple) else []).encode()  # no half of a character is left


@given(values | st.fixed_dictionaries(dict.fromkeys(("size", "sha256", "step", "number", "saved_at"), values)))
def test_any_manifest_can_be_looked_at(content: Any) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "step=1.ckpt"
        path.write_bytes(b"")
        manifest_path(path).write_text(json.dumps(content))
        other = Path(folder) / "step=2.ckpt"
        other.write_bytes(b"")
        manifest_path(other).write_text(json.dumps({"size": 0, "sha256": "", "step": 2, "number": 3}))
        assert isinstance(read_manifest(path), Manifest | None)
        assert other in [entry[0] for entry in manifests(folder)]


class Anything:
    """What a stranger's pickle may name."""


@given(st.binary(max_size=100) | st.builds(pickle.dumps, values | st.just(Anything())))
def test_a_description_of_any_content_is_refused(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "step=1.ckpt"
        path.mkdir()
        (path / METADATA_FILE).write_bytes(content)
        (path / "rest.pt").write_bytes(content)
        with pytest.raises(UnusableCheckpoint):
            read_checkpoint(path)


@given(st.binary(max_size=100) | st.builds(pickle.dumps, values))
def test_a_checkpoint_of_any_content_is_refused(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "step=1.ckpt"
        path.write_bytes(content)
        with pytest.raises(UnusableCheckpoint):
            read_checkpoint(path)
