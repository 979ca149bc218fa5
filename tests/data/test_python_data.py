"""Data sets and lists of rows given in Python behave as the same rows in a file do."""

import inspect
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
from data.helpers import PAIRS, ROWS, attach, dropped, fit, indices, train_batches
from datasets import Dataset, DatasetDict, IterableDataset
from lightning.pytorch import seed_everything

from remax_lightning.data import DemonstrationDataModule, PreferenceDataModule, PromptDataModule

KINDS = ("dataset", "rows")


def as_source(rows, kind):
    return {
        "rows": lambda: rows,
        "dataset": lambda: Dataset.from_list(rows),
        "iterable": lambda: Dataset.from_list(rows).to_iterable_dataset(num_shards=3),
    }[kind]()


def contents(batches):
    return [{name: getattr(value, "tolist", lambda v=value: v)() for name, value in batch.items()} for batch in batches]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("module", "rows"), [(PromptDataModule, ROWS), (DemonstrationDataModule, ROWS), (PreferenceDataModule, PAIRS)]
)
def test_rows_are_those_of_a_file_in_every_split(write, module, rows, kind):
    splits = {"train": rows, "validation": rows[:3], "test": rows[:4], "predict": rows[:5]}
    files = {split: write(part, f"{split}.jsonl") for split, part in splits.items()}
    objects = {split: as_source(part, kind) for split, part in splits.items()}
    expected, data = (attach(module(**sources, batch_size=4), stage=None) for sources in (files, objects))
    assert contents(train_batches(data)) == contents(train_batches(expected))
    for name in ("val", "test", "predict"):
        loaders = [getattr(each, f"{name}_dataloader")() for each in (data, expected)]
        assert contents(loaders[0]) == contents(loaders[1])


@pytest.mark.parametrize("kind", [*KINDS, "iterable"])
def test_streamed_rows_are_those_of_a_file(write, kind):
    options = {"streaming": True, "shuffle_window": 7, "batch_size": 4}
    expected = attach(PromptDataModule(train=write(ROWS), **options))
    data = attach(PromptDataModule(train=as_source(ROWS, kind), **options))
    for _ in range(2):
        assert indices(train_batches(data)) == indices(train_batches(expected))


@pytest.mark.parametrize("kind", [*KINDS, "iterable"])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_sees_the_rows_of_the_uninterrupted_one(tmp_path, kind, workers):
    def run(folder, **options):
        source = as_source(ROWS, kind)
        streaming = kind == "iterable"
        data = PromptDataModule(train=source, batch_size=4, seed=3, streaming=streaming, num_workers=workers)
        return fit(data, tmp_path / folder, steps=12, **options).seen

    whole = run("whole")
    assert run("rest", ckpt_path=tmp_path / "whole" / "step=7.ckpt") == whole[7:]


def test_sources_of_different_kinds_can_be_weighted(write):
    sources = [write(ROWS[:5]), Dataset.from_list(ROWS[5:10]), ROWS[10:]]
    data = attach(PromptDataModule(train=sources, weights=[1, 1, 2], batch_size=4))
    assert data.source_sizes == [5, 5, 10]
    assert sorted(indices(train_batches(data))) == list(range(20))


def test_a_list_of_rows_is_one_source():
    with pytest.raises(ValueError, match="one number for each source of train, got 20 for 1"):
        PromptDataModule(train=ROWS, weights=[1.0] * 20)


def test_a_formatted_data_set_gives_plain_values():
    data = attach(PromptDataModule(train=Dataset.from_list(ROWS).with_format("numpy"), batch_size=4))
    assert all(type(answer) is int for batch in train_batches(data) for answer in batch["answer"])


def test_dropped_rows_of_a_list_are_counted():
    data = PromptDataModule(train=[*ROWS, {"prompt": ""}, {"response": "no prompt"}])
    assert dropped(data) == ["train: dropped 2 of 22 rows (2 x empty prompt)"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"prompt": ["Hi"]}, r"data.test must be a file .* in Python also a datasets.Dataset .*; got dict"),
        (DatasetDict(train=Dataset.from_list(ROWS)), r"such as data\['train'\]; got DatasetDict"),
        (3, "data.test must be a file .*; got int"),
        (["a.jsonl", 3], "data.test must be a file .*; got int"),
        (["a.jsonl", {"prompt": "Hi"}], "data.test must be a file .*; got dict"),
        (Path("a.jsonl"), "data.test must be a file .*; got PosixPath"),
        (
            Dataset.from_list(ROWS).to_iterable_dataset(),
            "data.test: an IterableDataset can only be train",
        ),
    ],
)
def test_other_types_are_refused_in_one_sentence(source, message):
    with pytest.raises(TypeError, match=message):
        PromptDataModule(test=source)


def test_an_iterable_data_set_must_be_streamed():
    source = IterableDataset.from_generator(lambda: iter(ROWS))
    with pytest.raises(TypeError, match=r"data.train: an IterableDataset can only be train with streaming=True"):
        PromptDataModule(train=source)
    data = attach(PromptDataModule(train=source, streaming=True, batch_size=4))
    assert sorted(indices(train_batches(data))) == list(range(20))


def test_the_order_of_an_unset_seed_is_that_of_seed_everything(write, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")

    def order(**options):
        data = attach(PromptDataModule(train=write(ROWS), batch_size=4, validation_fraction=0.2, **options))
        return indices(train_batches(data)), indices(data.val_dataloader())

    orders = {}
    for seed in (0, 5):
        seed_everything(seed, verbose=False)
        orders[seed] = order()
        assert order(seed=3) == order(seed=3)
        assert orders[seed] == order(seed=seed)
    assert orders[0] != orders[5]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unset_seed_leaves_the_state_as_it_was(write, streaming):
    data = attach(PromptDataModule(train=write(ROWS), batch_size=8, streaming=streaming))
    batch = next(iter(data.train_dataloader()))
    data.on_before_batch_transfer(batch, 0)
    assert asdict(data.position) == {"epoch": 0, "rows": 8}


@pytest.mark.parametrize("module", [PromptDataModule, DemonstrationDataModule, PreferenceDataModule])
def test_every_argument_stands_in_the_signature(module):
    parameters = dict(inspect.signature(module).parameters)
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert {"train", "seed", "long_prompts"} <= set(parameters)
    with pytest.raises(TypeError, match=rf"{module.__name__}.*batchsize"):
        module(batchsize=3)


# fits without validation


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"val_check_interval": 100},
        {"val_check_interval": 3, "check_val_every_n_epoch": None},
        {"val_check_interval": 0.5},
        {"num_sanity_val_steps": 2},
    ],
)
def test_a_fit_without_validation_rows_does_not_validate(write, tmp_path, caplog, options):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is zero")
        recorder = fit(PromptDataModule(train=write(ROWS), batch_size=4), tmp_path, steps=7, **options)
    assert (len(recorder.seen), recorder.evaluated) == (7, [])


def test_a_fit_without_validation_rows_says_so_once(write, tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(PromptDataModule(train=write(ROWS), batch_size=4), tmp_path, steps=2)
    lines = [record.message for record in caplog.records if "validat" in record.message]
    assert len(lines) == 1
    assert "set data.validation" in lines[0]


def test_a_trainer_validates_other_data_after_a_fit_without_any(write, tmp_path):
    from data.helpers import Recorder
    from lightning.pytorch import Trainer

    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "use_distributed_sampler": False}
    trainer = Trainer(default_root_dir=tmp_path, max_steps=2, enable_checkpointing=False, **options)
    recorder = Recorder()
    trainer.fit(recorder, datamodule=PromptDataModule(train=write(ROWS), batch_size=4))
    trainer.validate(recorder, datamodule=PromptDataModule(validation=ROWS[:3]))
    assert recorder.evaluated == [[0, 1, 2]]
