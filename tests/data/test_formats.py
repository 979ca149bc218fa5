import gzip
import json

import pytest
from datasets import Dataset

from remax_lightning.data.formats import UnusableRow, column_format, find_format, to_chat
from remax_lightning.data.sources import load_tables

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
RUDE = {"role": "assistant", "content": "Go away"}
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How are you?\n\nAssistant:"
SHARE_GPT = [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
SYSTEM = {"role": "system", "content": "S"}


def read(row, content):
    known = find_format(row, content)
    assert known is not None
    return {"prompts": known.prompt, "responses": known.demonstration, "pairs": known.preference}[content](row)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi"}, "Hi"),
        ({"prompt": [USER]}, [USER]),
        ({"prompt": "Hi", "chosen": None, "rejected": None}, "Hi"),
        ({"chosen": HH + " Fine. \n", "rejected": HH + " Bad"}, HH),
        ({"instruction": "Hi", "output": None}, "Hi"),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n\n1 2"),
        ({"instruction": "Add", "input": "", "output": "3"}, "Add"),
        ({"question": "Hi", "answer": "Hello"}, "Hi"),
        ({"messages": [USER, BOT]}, [USER]),
        ({"messages": [USER, BOT, USER]}, [USER, BOT, USER]),
        ({"conversations": SHARE_GPT}, [SYSTEM, USER]),
        ({"conversation": [USER]}, [USER]),
        ({"prompt": "Hi", "messages": [USER, BOT]}, [USER]),
        ({"messages": [{**USER, "tool_calls": None}]}, [USER]),
        ({"question_id": 81, "category": "writing", "turns": ["Hi", "Again"]}, "Hi"),
        ({"instruction": "Hi", "output": "Hello", "generator": "g", "dataset": "d"}, "Hi"),
    ],
)
def test_prompts(row, prompt):
    assert read(row, "prompts") == prompt


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"prompt": "Hi", "response": " Hello \n"}, "Hi", " Hello"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, "Hi", "Hello"),
        ({"chosen": HH + " Fine. \n", "rejected": HH + " Bad"}, HH, " Fine."),
        ({"instruction": "Hi", "output": "Hello"}, "Hi", "Hello"),
        ({"question": "Hi", "answer": "Hello"}, "Hi", "Hello"),
        ({"messages": [USER, BOT, USER, BOT]}, [USER, BOT, USER], "Hello"),
        ({"messages": [USER, BOT, USER]}, [USER], "Hello"),
        ({"conversations": SHARE_GPT}, [SYSTEM, USER], "Hello"),
    ],
)
def test_demonstrations(row, prompt, response):
    assert read(row, "responses") == (prompt, response)


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}, "Hi", "Hello", "Go away"),
        ({"chosen": HH + " Fine.", "rejected": HH + " Bad"}, HH, " Fine.", " Bad"),
        ({"chosen": [USER, BOT], "rejected": [USER, RUDE]}, [USER], "Hello", "Go away"),
        ({"prompt": "Hi", "chosen": [USER, BOT], "rejected": [USER, RUDE]}, [USER], "Hello", "Go away"),
        ({"prompt": [USER], "chosen": [BOT], "rejected": [RUDE]}, [USER], "Hello", "Go away"),
        ({"prompt": "Hi", "chosen": [BOT], "rejected": [RUDE]}, [USER], "Hello", "Go away"),
    ],
)
def test_preferences(row, prompt, chosen, rejected):
    assert read(row, "pairs") == (prompt, chosen, rejected)


@pytest.mark.parametrize(
    ("row", "content", "reason"),
    [
        ({"prompt": None}, "prompts", "empty prompt"),
        ({"prompt": " \n"}, "prompts", "empty prompt"),
        ({"prompt": []}, "prompts", "empty prompt"),
        ({"prompt": [{"role": "user", "content": " "}]}, "prompts", "empty prompt"),
        ({"prompt": [{"role": "user", "content": None}]}, "prompts", "malformed messages"),
        ({"prompt": 3}, "prompts", "malformed messages"),
        ({"messages": None}, "prompts", "empty prompt"),
        ({"turns": None}, "prompts", "empty prompt"),
        ({"turns": []}, "prompts", "empty prompt"),
        ({"turns": ["\t", "Again"]}, "prompts", "empty prompt"),
        ({"turns": [3]}, "prompts", "malformed messages"),
        ({"messages": [BOT]}, "prompts", "empty prompt"),
        ({"prompt": "Hi", "response": None}, "responses", "empty response"),
        ({"prompt": "Hi", "response": "\n"}, "responses", "empty response"),
        ({"prompt": "Hi", "response": 3}, "responses", "response is not text"),
        ({"messages": [USER]}, "responses", "no assistant turn"),
        ({"chosen": "Hello", "rejected": "No"}, "pairs", "no assistant turn"),
        ({"chosen": None, "rejected": None}, "pairs", "empty dialogue"),
        ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, "pairs", "empty prompt"),
        ({"chosen": HH + " a", "rejected": "\n\nHuman: b\n\nAssistant: c"}, "pairs", "different prompts"),
        ({"chosen": [USER, BOT], "rejected": [SYSTEM, USER, RUDE]}, "pairs", "different prompts"),
        ({"instruction": None, "input": "x", "output": "y"}, "responses", "empty prompt"),
    ],
)
def test_unusable_rows_say_why(row, content, reason):
    with pytest.raises(UnusableRow, match=reason):
        read(row, content)


def test_unknown_columns_have_no_format():
    assert find_format(["text"], "prompts") is None
    assert find_format(["prompt"], "responses") is None
    assert find_format(["messages"], "pairs") is None
    assert find_format(["turns"], "responses") is None


def test_explicit_columns():
    row = {"q": "Hi", "good": "Hello", "bad": "No"}
    assert column_format("q").prompt(row) == "Hi"
    assert column_format("q", "good").demonstration(row) == ("Hi", "Hello")
    assert column_format("q", pair=("good", "bad")).preference(row) == ("Hi", "Hello", "No")


def test_to_chat():
    assert to_chat("Hi") == [USER]
    assert to_chat([USER]) == [USER]
    assert to_chat(HH) == [USER, BOT, {"role": "user", "content": "How are you?"}]
    quoted = "Read this:\n\nHuman: hi"
    assert to_chat(quoted) == [{"role": "user", "content": quoted}]


ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]


def load_rows(sources):
    return [row for part in load_tables(sources) for row in part.rows]


def write_lines(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.jsonl.gz", "r.parquet", "r.csv", "r.csv.gz"])
def test_load_rows_by_suffix(tmp_path, name):
    path = tmp_path / name
    if "json" in name:
        write_lines(path, ROWS)
    elif "csv" in name:
        text = b"prompt,n\na,1\nb,2\n"
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    else:
        Dataset.from_list(ROWS).to_parquet(path)
    assert load_rows(str(path)) == ROWS


def test_load_rows_of_a_json_array(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(ROWS, indent=1))
    assert load_rows(str(tmp_path / "r.json")) == ROWS


def test_load_rows_of_folders_globs_and_lists(tmp_path):
    first, second = write_lines(tmp_path / "1.jsonl", ROWS[:1]), write_lines(tmp_path / "2.jsonl.gz", ROWS[1:])
    (tmp_path / "README.md").write_text("no data")
    assert load_rows(str(tmp_path)) == ROWS
    assert load_rows(str(tmp_path / "*")) == ROWS
    assert load_rows([second, first]) == ROWS[::-1]


def test_load_rows_of_different_kinds(tmp_path):
    first = write_lines(tmp_path / "1.jsonl", ROWS)
    (tmp_path / "2.csv").write_text("prompt,n\nc,3\n")
    assert load_rows([first, str(tmp_path / "2.csv")]) == [*ROWS, {"prompt": "c", "n": 3}]


def test_load_rows_with_values_of_different_types(tmp_path):
    rows = [{"prompt": "a", "answer": 1}, {"prompt": [USER], "answer": "two"}, {"prompt": "c", "answer": [3]}]
    assert load_rows(write_lines(tmp_path / "r.jsonl", rows)) == rows


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "none*.csv", "."])
def test_missing_files_are_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        load_rows(name)
    assert repr(name) in str(caught.value)
    assert ".parquet" in str(caught.value)


def test_no_sources_are_refused():
    with pytest.raises(ValueError, match="list of sources is empty"):
        load_rows([])


@pytest.mark.parametrize(
    ("source", "arguments", "split"),
    [
        ("owner/name", ["owner/name"], "train"),
        ("owner/name:test", ["owner/name"], "test"),
        ("owner/name/main:train[:5]", ["owner/name", "main"], "train[:5]"),
    ],
)
def test_hub_names(monkeypatch, source, arguments, split):
    calls = []
    monkeypatch.setattr(
        "remax_lightning.data.sources.load_dataset",
        lambda *names, split: calls.append((list(names), split)) or Dataset.from_list(ROWS),
    )
    monkeypatch.setattr("remax_lightning.data.sources.check_reachable", lambda name, kind: calls.append((name, kind)))
    assert load_rows(source) == ROWS
    assert calls == [("owner/name", "dataset"), (arguments, split)]


def test_missing_hub_name_says_what_is_accepted(monkeypatch):
    def refuse(*names, split):
        raise ConnectionError("gone")

    monkeypatch.setattr("remax_lightning.data.sources.check_reachable", lambda name, kind: None)
    monkeypatch.setattr("remax_lightning.data.sources.load_dataset", refuse)
    with pytest.raises(FileNotFoundError, match=r"'data/prompts': there is no such file .*, and no such data set"):
        load_rows("data/prompts")
