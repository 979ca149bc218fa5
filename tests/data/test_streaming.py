"""Training on rows that are read as they are needed."""

import gzip
import json
import pickle
import warnings
from dataclasses import asdict

import pytest
from data.helpers import PAIRS, ROWS, attach, dropped, fit, indices, real, train_batches
from datasets import Dataset

from remax_lightning.data import DemonstrationDataModule, PreferenceDataModule, PromptDataModule, readers


def stream(train, kind=PromptDataModule, **arguments):
    return kind(train=train, streaming=True, **{"shuffle_window": 8, "batch_size": 4, **arguments})


def caught(function, word):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function()
    return [str(warning.message) for warning in found if word in str(warning.message)]


def save(folder, kind):
    path = folder / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "csv":
        Dataset.from_list(ROWS).to_csv(path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    return str(path)


# which rows


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "csv"])
def test_an_epoch_has_every_row_once_and_as_it_is_when_loaded(tmp_path, kind, workers):
    path = save(tmp_path, kind)
    data = attach(stream(path, num_workers=workers))
    loaded = {example["prompt_index"]: example for example in attach(PromptDataModule(train=path)).examples["train"]}
    epochs = [train_batches(data) for _ in range(2)]
    assert [sorted(indices(batches)) for batches in epochs] == [list(range(20))] * 2
    assert indices(epochs[0]) != indices(epochs[1])
    for batch in epochs[0]:
        for row, index in enumerate(indices([batch])):
            for column in ("prompt", "response", "answer"):
                assert batch[column][row] == loaded[index][column]
            assert batch["prompt_ids"][row][batch["prompt_mask"][row]].tolist() == list(loaded[index]["prompt_ids"])


def test_rows_are_shuffled_within_their_window_by_seed_and_epoch(write):
    path = write(ROWS)

    def epoch(**arguments):
        return indices(train_batches(attach(stream(path, **arguments))))

    order = epoch()
    assert [sorted(order[start : start + 8]) for start in (0, 8, 16)] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 20)),
    ]
    assert order[:8] != sorted(order[:8])
    assert order == epoch() == epoch(num_workers=2) == epoch(batch_size=2)
    assert order != epoch(seed=1)
    assert epoch(shuffle_window=1) == list(range(20))


def test_several_sources_are_read_one_after_another(tmp_path):
    first, second = save(tmp_path, "csv"), tmp_path / "more.jsonl"
    second.write_text("".join(json.dumps({"question": row["prompt"], "answer": "x"}) + "\n" for row in ROWS))
    data = attach(stream([first, str(second), save(tmp_path, "json")], batch_size=6))
    batches = train_batches(data)
    assert sorted(indices(batches)) == list(range(60))
    assert {name for batch in batches for name in batch} >= {"prompt", "question", "response", "answer"}
    for batch in batches:
        for row, index in enumerate(indices([batch])):
            assert batch["prompt"][row] == ROWS[index % 20]["prompt"]
            assert batch["response"][row] == (None if 20 <= index < 40 else ROWS[index % 20]["response"])


def test_hub_rows_are_streamed(monkeypatch):
    calls = []

    def load(*names, split, streaming):
        calls.append((names, split, streaming))
        return Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr("remax_lightning.data.sources.check_reachable", lambda name, kind: None)
    monkeypatch.setattr("remax_lightning.data.sources.load_dataset", load)
    data = attach(stream("owner/name:train", num_workers=2))
    assert sorted(indices(train_batches(data))) == list(range(20))
    assert calls == [(("owner/name",), "train", True)]


def test_values_of_mixed_types_are_streamed_as_they_are(tmp_path):
    rows = [{"prompt": "a", "n": 1}, {"prompt": [{"role": "user", "content": "b"}], "n": "two"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (batch,) = train_batches(attach(stream(str(tmp_path / "rows.json"), shuffle_window=1, batch_size=2)))
    assert [batch["prompt"], batch["n"]] == [[row["prompt"] for row in rows], [1, "two"]]


@pytest.mark.parametrize(("kind", "rows"), [(DemonstrationDataModule, ROWS), (PreferenceDataModule, PAIRS)])
def test_demonstrations_and_preferences_are_streamed(write, kind, rows):
    path = write(rows)
    data, loaded = attach(stream(path, kind)), attach(kind(train=path))
    batches = train_batches(data)
    assert len(batches) == 5
    assert "_position" not in batches[0]
    tokens = [ids[mask].tolist() for each in batches for ids, mask in zip(*list(each.values())[:2], strict=True)]
    names = ("input_ids",) if kind is DemonstrationDataModule else ("chosen_ids", "rejected_ids")
    expected = [list(example[name]) for example in loaded.examples["train"] for name in names]
    assert sorted(tokens) == sorted(expected)


def test_limit_and_validation(write):
    data = attach(stream(write(ROWS), validation=write(ROWS[:3], "v.jsonl"), limit=10, batch_size=5))
    assert sorted(indices(train_batches(data))) == list(range(10))
    assert indices(data.val_dataloader()) == [0, 1, 2]


def test_two_ranks_share_what_one_reads(write):
    path = write([*ROWS[:5], {"prompt": ""}, *ROWS[5:]])
    alone = attach(stream(path, batch_size=6))
    ranks = [attach(stream(path, batch_size=3), rank, 2) for rank in (0, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            whole, first, second = (train_batches(data) for data in (alone, *ranks))
            assert [indices([batch])[::2] for batch in whole] == [indices([batch]) for batch in first]
            assert [indices([batch])[1::2] for batch in whole] == [indices([batch]) for batch in second]


def test_what_workers_get_can_be_pickled(write):
    """Where processes are spawned and not forked."""
    windows = attach(stream(write(ROWS))).train_dataloader().windows
    (first, *_), (again, *_) = list(windows), list(pickle.loads(pickle.dumps(windows)))
    assert first == again


def test_windows_before_the_position_are_not_parsed(write, monkeypatch):
    data = attach(stream(write(ROWS), shuffle_window=5, batch_size=5))
    data.load_state_dict({"epoch": 0, "rows": 15})
    parsed = []
    parse_line = readers.parse_line
    monkeypatch.setattr(readers, "parse_line", lambda *args: parsed.append(args[1]) or parse_line(*args))
    train_batches(data)
    assert sorted(parsed) == [16, 17, 18, 19, 20]


# what goes wrong


@pytest.mark.parametrize("workers", [0, 2])
def test_dropped_rows_are_counted_at_the_end_of_an_epoch(write, workers):
    rows = [{"prompt": " "}, *ROWS, {"prompt": None}, {"prompt": "fox " * 100}]
    data = attach(stream(write(rows), max_prompt_length=30, num_workers=workers))
    expected = (
        "train: dropped 3 of 23 rows (2 x empty prompt, 1 x prompt above 30 tokens) from row 0 to the end of epoch"
    )
    assert caught(lambda: train_batches(data), "dropped") == [f"{expected} 0"]
    assert caught(lambda: train_batches(data), "dropped") == [f"{expected} 1"]
    assert asdict(data.position) == {"epoch": 2, "rows": 0}


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_lines(tmp_path, workers):
    lines = [json.dumps(row) for row in ROWS]
    lines[12:12] = ['{"prompt": "b', "3"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    path = str(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1[34]: not .*skip_bad_rows \(now 0\)"):
        train_batches(attach(stream(path, num_workers=workers)))
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1[34]: not .*skip_bad_rows \(now 1\)"):
        train_batches(attach(stream(path, num_workers=workers, skip_bad_rows=1)))
    data, batches = attach(stream(path, num_workers=workers, skip_bad_rows=2)), []
    (message,) = caught(lambda: batches.extend(train_batches(data)), "dropped")
    assert message.startswith("train: dropped 2 of 22 rows (2 x corrupt row)")
    assert sorted(indices(batches)) == [*range(12), *range(14, 22)]


def test_incomplete_last_batch_is_left_out(write):
    data = attach(stream(write(ROWS), batch_size=6))
    assert [len(batch["prompt"]) for batch in train_batches(data)] == [6, 6, 6]
    assert asdict(data.position) == {"epoch": 1, "rows": 0}


def test_position_too_close_to_the_end_starts_the_next_epoch(write):
    whole, data = (attach(stream(write(ROWS), batch_size=10)) for _ in range(2))
    train_batches(whole)
    data.load_state_dict({"epoch": 0, "rows": 12})
    assert indices(train_batches(data)) == indices(train_batches(whole))


def test_too_few_rows_for_one_batch_is_an_error(write):
    with pytest.raises(ValueError, match="fewer usable rows than one batch of 22"):
        train_batches(attach(stream(write(ROWS), batch_size=11), world_size=2))


def test_max_steps_is_needed(write, tmp_path):
    with pytest.raises(ValueError, match=r"streaming needs trainer.max_steps"):
        fit(stream(write(ROWS)), tmp_path, epochs=1)


@pytest.mark.parametrize(("name", "value"), [("weights", [1.0]), ("validation_fraction", 0.1)])
def test_what_needs_all_rows_is_refused(write, name, value):
    with pytest.raises(ValueError, match=f"{name}.* cannot be used with streaming"):
        stream(write(ROWS), **{name: value})


def test_missing_file_and_unknown_columns_are_named_before_training(write):
    with pytest.raises(FileNotFoundError, match=r"no data at './none.jsonl'"):
        attach(stream("./none.jsonl"))
    with pytest.raises(ValueError, match=r"train: the rows have the columns \['text'\].*set prompt_column"):
        attach(stream(write([{"text": "Hi"}])))
    with pytest.raises(ValueError, match=r"no rows for train; set train"):
        attach(PromptDataModule(streaming=True))


@pytest.mark.filterwarnings("ignore:.*dropped")
def test_a_real_file():
    data = attach(stream(real("hh_harmless_train.jsonl.gz"), max_prompt_length=4000, shuffle_window=500, limit=1000))
    loaded = PromptDataModule(train=real("hh_harmless_train.jsonl.gz"), max_prompt_length=4000, limit=1000)
    dropped(loaded)
    expected = {example["prompt_index"] for example in loaded.examples["train"]}
    seen = indices(train_batches(data))
    assert len(seen) == len(set(seen)) == len(expected) // 4 * 4
    assert set(seen) <= expected
