"""Rows, files and tokenizers that are not as they should be: a sentence or a count for each."""

import gzip
import json
import warnings

import pytest
from data.helpers import CHATML, ROWS, attach, build_tokenizer, dropped, indices, train_batches
from datasets import Dataset

from remax_lightning.data import DemonstrationDataModule, PromptDataModule
from remax_lightning.data.sources import load_tables

LINES = [json.dumps(row).encode() for row in ROWS]


def nested(depth):
    value = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def save(folder, lines, name="rows.jsonl"):
    text = b"\n".join(lines)
    (folder / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    return str(folder / name)


# files


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "detail"),
    [
        (b'{"prompt": "b', r"not valid JSON \(.*\)"),
        (b"3", "not a JSON object"),
        (b'{"prompt": "\xff"}', r"text that is not UTF-8 \(.*\)"),
    ],
)
def test_corrupt_line_is_named_or_skipped_and_counted(tmp_path, name, line, detail):
    path = save(tmp_path, [*LINES[:3], line, *LINES[3:], b"", line], name)
    with pytest.raises(ValueError, match=rf"{name}, (line|row) 4: {detail}; repair .*skip_bad_rows \(now 0\)"):
        attach(PromptDataModule(train=path))
    with pytest.raises(ValueError, match=rf"{name}, (line|row) 2[123]: {detail}; .*skip_bad_rows \(now 1\)"):
        attach(PromptDataModule(train=path, skip_bad_rows=1))
    data = PromptDataModule(train=path, skip_bad_rows=2, batch_size=5)
    assert dropped(data) == ["train: dropped 2 of 22 rows (2 x corrupt row)"]
    batches = train_batches(data)
    assert sorted(indices(batches)) == [0, 1, 2, *range(4, 21)]
    for batch in batches:
        for index, answer in zip(indices([batch]), batch["answer"], strict=True):
            assert answer == index - (index > 3)


def test_file_with_corrupt_lines_only_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: not valid JSON.*no row that can be read"):
        load_tables(save(tmp_path, [b"{", b"{"]))


def test_rows_with_columns_of_their_own_beside_a_corrupt_line(tmp_path):
    path = save(tmp_path, [b'{"prompt": "a"}', b"{", b'{"answer": 1}', b'{"prompt": "b", "answer": "two"}'])
    data = PromptDataModule(train=path, skip_bad_rows=1, batch_size=2)
    assert dropped(data) == ["train: dropped 2 of 4 rows (1 x corrupt row, 1 x empty prompt)"]
    (batch,) = train_batches(data)
    assert dict(zip(batch["prompt"], batch["answer"], strict=True)) == {"a": None, "b": "two"}


@pytest.mark.parametrize("streaming", [False, True])
def test_compressed_file_that_is_cut_off_is_named(tmp_path, streaming):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(LINES))[:-20])
    with pytest.raises(ValueError, match=r"rows.jsonl.gz, after line \d+: cannot decompress it"):
        train_batches(attach(PromptDataModule(train=str(path), streaming=streaming)))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv", "rows.json"])
@pytest.mark.parametrize("text", [b"", b"\x00\x01nonsense\n"])
def test_file_that_cannot_be_read_is_named(tmp_path, name, text, streaming):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=rf"{name}"):
        train_batches(attach(PromptDataModule(train=str(tmp_path / name), streaming=streaming)))


def test_missing_file_is_named(tmp_path):
    message = r"data.train: no data at '.*none.jsonl': there is no such file or folder; give a file"
    with pytest.raises(FileNotFoundError, match=message):
        attach(PromptDataModule(train=str(tmp_path / "none.jsonl")))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("./data", "there is no such file or folder"),
        ("./none*.csv", "no file matches"),
        ("./rows.txt", "a file must be .json, .jsonl, .parquet or .csv"),
        ("./folder", "it is a folder without files of the kinds .json"),
    ],
)
def test_missing_data_names_the_argument_and_what_was_looked_for(tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.txt").write_text("x")
    for split, stage in [("train", "fit"), ("validation", "validate"), ("test", "test"), ("predict", "predict")]:
        with pytest.raises(FileNotFoundError) as caught:
            attach(PromptDataModule(**{split: name}), stage=stage)
        assert str(caught.value).startswith(f"data.{split}: no data at {name!r}: {reason}")


def test_missing_data_of_another_split_names_the_argument_it_comes_from(tmp_path):
    missing = str(tmp_path / "none.jsonl")
    for arguments, stage, key in [
        ({"test": missing}, "predict", "test"),
        ({"train": missing, "validation_fraction": 0.5}, "validate", "train"),
    ]:
        with pytest.raises(FileNotFoundError, match=f"^data.{key}: no data"):
            attach(PromptDataModule(**arguments), stage=stage)


def test_unreachable_hub_data_set_names_the_argument_within_seconds(write, monkeypatch):
    def refuse(name, kind):
        raise FileNotFoundError(f"{name} is neither an existing folder nor in the cache")

    def retry(*names, split):
        raise AssertionError("the library would retry for half a minute")

    monkeypatch.setattr("remax_lightning.data.sources.check_reachable", refuse)
    monkeypatch.setattr("remax_lightning.data.sources.load_dataset", retry)
    with pytest.raises(FileNotFoundError, match=r"^data.validation: owner/name is neither an existing folder"):
        attach(PromptDataModule(validation="owner/name:test"), stage="validate")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv", "rows.json"])
def test_empty_file_is_called_empty(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"^data.train: cannot read .*{name}: the file is empty$"):
        attach(PromptDataModule(train=str(tmp_path / name)))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_file_without_rows_says_so(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"\n\n") if name.endswith("gz") else b"\n\n")
    with pytest.raises(ValueError, match=rf"^data.train: cannot read .*{name}.*: there is no row in it"):
        attach(PromptDataModule(train=str(tmp_path / name)))


def test_source_of_unknown_format_is_named(write):
    with pytest.raises(ValueError, match=r"train, .*other.jsonl: the rows have the columns \['text'\].*prompt_column"):
        attach(PromptDataModule(train=[write(ROWS), write([{"text": "Hi"}], "other.jsonl")]))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.csv.gz"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 1.0])
def test_compressed_file_with_a_flipped_byte_is_named(tmp_path, name, place, streaming):
    rows = [{"prompt": f"{index * 7919}"} for index in range(300)]
    lines = ["prompt", *(row["prompt"] for row in rows)] if ".csv" in name else list(map(json.dumps, rows))
    text = json.dumps(rows) if name == "rows.json.gz" else "\n".join(lines)
    content = bytearray(gzip.compress(text.encode()))
    content[12 + round(place * (len(content) - 13))] ^= 0x55  # past the header, with a time stamp that may be anything
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^(data.train: )?(cannot read )?.*{name}.*: ."):
        train_batches(attach(PromptDataModule(train=str(tmp_path / name), streaming=streaming, batch_size=300)))


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_file_with_a_flipped_byte_is_named(tmp_path, streaming):
    path = tmp_path / "rows.parquet"
    Dataset.from_list(ROWS).to_parquet(path)
    content = bytearray(path.read_bytes())
    content[5] ^= 0x55  # in the header of the first page
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^data.train: cannot read .*rows.parquet.*: ."):
        train_batches(attach(PromptDataModule(train=str(path), streaming=streaming)))


@pytest.mark.parametrize("streaming", [False, True])
def test_line_that_is_nested_too_deeply_is_a_corrupt_row(tmp_path, streaming):
    deep = b'{"prompt": "a", "answer": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    path = save(tmp_path, [*LINES, deep])
    with pytest.raises(ValueError, match=r"rows.jsonl, line 21: not valid JSON \(maximum recursion depth exceeded"):
        train_batches(attach(PromptDataModule(train=path, streaming=streaming)))
    data = attach(PromptDataModule(train=path, streaming=streaming, skip_bad_rows=1, batch_size=20))
    assert sorted(indices(train_batches(data))) == list(range(20))


@pytest.mark.parametrize("streaming", [False, True])
def test_row_that_is_nested_too_deeply_is_dropped_wherever_it_comes_from(streaming):
    deep = {"prompt": "Hi", "answer": nested(5000)}
    data = PromptDataModule(train=[*ROWS, deep], streaming=streaming, batch_size=20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert sorted(indices(train_batches(attach(data)))) == list(range(20))
    assert any("1 x nested more than 50 levels deep" in str(warning.message) for warning in caught)


def test_file_that_is_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "rows.json").write_text('[{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}]")
    with pytest.raises(ValueError, match=r"cannot read .*rows.json as json: "):
        attach(PromptDataModule(train=str(tmp_path / "rows.json")))


# rows


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": ""}, "empty prompt"),
        ({"prompt": None}, "empty prompt"),
        ({"prompt": " \n\t\u00a0"}, "empty prompt"),
        ({"prompt": 3}, "malformed messages"),
        ({"prompt": {"text": "Hi"}}, "malformed messages"),
        ({"prompt": [{"role": "user", "content": 3}]}, "malformed messages"),
        ({"prompt": [{"role": "user", "content": ""}]}, "empty prompt"),
        ({"prompt": "fox " * 100}, "prompt above 30 tokens"),
        ({"prompt": "cut \ud83d"}, "lone surrogate in the prompt"),
        ({"prompt": [{"role": "user", "content": "\udc00"}]}, "lone surrogate in the prompt"),
        ({"prompt": [{"role": "\udc00", "content": "Hi"}]}, "lone surrogate in the prompt"),
        ({"prompt": "Hi", "answer": nested(51)}, "nested more than 50 levels deep"),
        ({"prompt": "Hi", "answer": nested(400)}, "nested more than 50 levels deep"),
    ],
)
def test_row_that_cannot_be_used_is_dropped_and_counted(write, row, reason):
    data = PromptDataModule(train=write([*ROWS, row]), max_prompt_length=30)
    assert dropped(data) == [f"train: dropped 1 of 21 rows (1 x {reason})"]
    assert len(data.examples["train"]) == 20


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, "response is not text"),
        (None, "empty response"),
        ("  ", "empty response"),
        ("\ud83d", "lone surrogate in the response"),
    ],
)
def test_response_that_cannot_be_used_is_dropped_and_counted(write, value, reason):
    rows = [{"prompt": row["prompt"], "response": row["response"]} for row in ROWS]
    data = DemonstrationDataModule(train=write([*rows, {"prompt": "Hi", "response": value}]))
    assert dropped(data) == [f"train: dropped 1 of 21 rows (1 x {reason})"]


def test_conversation_that_the_template_refuses_is_dropped_and_counted(write):
    template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    refused = {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]}
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    data = PromptDataModule(train=write([*rows[:4], refused, *rows[4:]]))
    message = "train: dropped 1 of 21 rows (1 x refused by the chat template: user first)"
    assert dropped(data, tokenizer=build_tokenizer(template=template)) == [message]
    expected = attach(PromptDataModule(train=write(rows, "usable.jsonl"))).examples["train"]
    assert [each["prompt_ids"] for each in data.examples["train"]] == [each["prompt_ids"] for each in expected]


def test_prompt_without_tokens_is_dropped_and_counted(write):
    class Forgetful:
        """A tokenizer that knows nothing of some characters."""

        def __init__(self):
            self.known = build_tokenizer()

        def __getattr__(self, name):
            return getattr(self.known, name)

        def __call__(self, text, **options):
            texts = [each.replace("?", "") for each in text] if isinstance(text, list) else text.replace("?", "")
            return self.known(texts, **options)

    data = PromptDataModule(train=write([*ROWS, {"prompt": "???"}]))
    assert dropped(data, tokenizer=Forgetful()) == ["train: dropped 1 of 21 rows (1 x prompt without tokens)"]


# tokenizers


def test_tokenizer_without_pad_pads_with_eos(write, tmp_path):
    build_tokenizer(pad=None).save_pretrained(tmp_path / "tokenizer")
    data = attach(PromptDataModule(train=write(ROWS), tokenizer=str(tmp_path / "tokenizer")))
    for batch in train_batches(data):
        assert set(batch["prompt_ids"][~batch["prompt_mask"]].tolist()) <= {data.encoder.tokenizer.eos_token_id}
    assert data.encoder.tokenizer.pad_token == "</s>"


def test_columns_of_csv_and_parquet_may_differ(tmp_path, write):
    Dataset.from_list([{"prompt": "a", "n": "x"}]).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list([{"question": "b", "answer": "y", "n": 1}]).to_csv(tmp_path / "b.csv")
    data = attach(PromptDataModule(train=[str(tmp_path / "a.parquet"), str(tmp_path / "b.csv")], batch_size=2))
    (batch,) = train_batches(data)
    assert sorted(zip(batch["prompt"], map(str, batch["n"]), strict=True)) == [("a", "x"), ("b", "1")]
    assert sorted(map(str, batch["answer"])) == ["None", "y"]
