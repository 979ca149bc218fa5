"""A digest tells other rows from the same ones, wherever they are."""

import gzip
import json
import shutil
import warnings
from datetime import datetime

import pytest
from data.helpers import ROWS, attach, build_tokenizer, fit
from datasets import Dataset

from remax_lightning.data import DemonstrationDataModule, PromptDataModule

CHANGES = {
    "reversed": lambda rows: rows[::-1],
    "fewer": lambda rows: rows[:-1],
    "more": lambda rows: [*rows, rows[0]],
    "another prompt": lambda rows: [*rows[:12], {**rows[12], "prompt": "Who?"}, *rows[13:]],
    "another answer": lambda rows: [*rows[:12], {**rows[12], "answer": 99}, *rows[13:]],
    "another column": lambda rows: [{**row, "extra": 1} for row in rows],
    "two rows exchanged": lambda rows: [rows[1], rows[0], *rows[2:]],
}


def digest(train, **arguments):
    return attach(PromptDataModule(train=train, **arguments)).digest


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_it_sees_a_change(write, change, streaming):
    old, new = write(ROWS, "old.jsonl"), write(CHANGES[change](ROWS), "new.jsonl")
    assert digest(old, streaming=streaming) != digest(new, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_it_does_not_depend_on_the_place(write, tmp_path, monkeypatch, streaming):
    path = write(ROWS)
    first = digest(path, streaming=streaming)
    (tmp_path / "other").mkdir()
    moved = str(shutil.copy(path, tmp_path / "other" / "moved.jsonl"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert first == digest(path, streaming=streaming) == digest(moved, streaming=streaming)


def test_rows_are_the_same_in_every_kind_of_file(write, tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    kinds = [
        write(ROWS),
        str(tmp_path / "rows.jsonl.gz"),
        str(tmp_path / "rows.parquet"),
        ROWS,
        Dataset.from_list(ROWS),
    ]
    assert len({digest(each) for each in kinds}) == 1


def test_it_is_of_the_rows_and_not_of_their_tokens(write):
    path = write(ROWS)
    assert digest(path) == digest(path, max_prompt_length=30, batch_size=2, seed=3)
    as_demonstrations = attach(DemonstrationDataModule(train=path), tokenizer=build_tokenizer(template=None))
    assert as_demonstrations.digest == digest(path)


def test_every_split_counts(write):
    path = write(ROWS)
    both = digest(path, validation=write(ROWS[:3], "a.jsonl"))
    assert len({digest(path), both, digest(path, validation=write(ROWS[1:4], "b.jsonl"))}) == 3


def test_values_without_a_form_in_json_count_by_their_type():
    class Odd:
        """Something whose text has an address."""

    rows = [[{"prompt": "a", "odd": Odd(), "raw": b"a", "day": datetime(2024, 5, day)}] for day in (1, 1, 2)]
    first, same, other = (digest(each, batch_size=1) for each in rows)
    assert first == same != other


def test_a_large_file_is_sampled_from_end_to_end(tmp_path):
    rows = [json.dumps({"prompt": f"{index} " + "fox " * 250}) for index in range(6000)]  # 6 MB
    found = []
    for number, changed in enumerate((None, 0, 5999)):
        lines = [row.replace("fox", "fax") if index == changed else row for index, row in enumerate(rows)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
        found.append(digest(str(tmp_path / f"{number}.jsonl"), streaming=True))
    assert len(set(found)) == 3


@pytest.mark.parametrize("kind", ["rows", "iterable"])
def test_streams_without_files(kind):
    def source(rows):
        return rows if kind == "rows" else Dataset.from_list(rows).to_iterable_dataset()

    digests = [digest(source(rows), streaming=True) for rows in (ROWS, ROWS, ROWS[::-1], ROWS[:-1])]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def warned(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(warning.message) for warning in caught if "digest" in str(warning.message)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_says_that_its_rows_are_others(write, tmp_path, streaming):
    old, new, held_out = write(ROWS, "old.jsonl"), write(ROWS[::-1], "new.jsonl"), write(ROWS[:4], "v.jsonl")

    def data(train, validation):
        return PromptDataModule(train=train, validation=validation, batch_size=4, streaming=streaming)

    fit(data(old, held_out), tmp_path, steps=2)

    def resume(train, validation):
        return warned(lambda: fit(data(train, validation), tmp_path, steps=3, ckpt_path=tmp_path / "step=2.ckpt"))

    assert resume(str(shutil.copy(old, tmp_path / "moved.jsonl")), held_out) == []
    (train,) = resume(new, held_out)
    assert train.startswith("the rows of data.train are not those from before the checkpoint (digest ")
    assert "training goes on at row 8 of epoch 0 of the new ones" in train
    (validation,) = resume(old, write(ROWS[1:5], "w.jsonl"))
    assert validation.startswith("the rows of data.validation are not those")
    assert "scores of earlier checkpoints do not compare" in validation


def test_a_checkpoint_without_digests_resumes(write):
    data = attach(PromptDataModule(train=write(ROWS)))
    assert warned(lambda: data.load_state_dict({"epoch": 0, "rows": 8})) == []
    assert data.position.rows == 8
