"""A run that is stopped at any step and resumed sees the rows of one that was not, whatever its data."""

import warnings
from dataclasses import asdict

import pytest
import torch
from data.helpers import ROWS, attach, fit, train_batches

from remax_lightning.data import PromptDataModule

KINDS = ("loaded", "weighted", "streamed")
STEPS = 13  # of 4 rows: three epochs of 5 or 6 steps

pytestmark = pytest.mark.filterwarnings("ignore:.*dropped")


@pytest.fixture
def build(write):
    """A data module of a kind; some rows of its sources cannot be used."""
    few = write([{"prompt": f"Say {number}"} for number in range(6)], "few.jsonl")
    many = write([{"prompt": ""}, *ROWS[:9], {"prompt": None}, *ROWS[9:]])
    arguments = {
        "loaded": {"train": many},
        "weighted": {"train": [many, few], "weights": [1.0, 2.0]},
        "streamed": {"train": [many, few], "streaming": True, "shuffle_window": 7},
    }

    def build(kind, batch_size=4, **options):
        return PromptDataModule(batch_size=batch_size, seed=5, **arguments[kind], **options)

    return build


def steps(data, number):
    """Batches and the state after each, over as many epochs as it takes."""
    found = []
    while len(found) < number:
        for batch in data.train_dataloader():
            data.on_before_batch_transfer(batch, 0)
            found.append((batch, data.state_dict()))
            if len(found) == number:
                break
    return found


def contents(batches):
    return [(batch["prompt_index"].tolist(), batch["prompt_ids"].tolist(), batch["prompt"]) for batch, _ in batches]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_from_every_step(build, kind, workers):
    whole = steps(attach(build(kind)), STEPS)
    assert len({str(state) for _, state in whole}) == STEPS
    assert whole[-1][1]["epoch"] == 2
    for step in range(STEPS) if workers == 0 else (1, 5, 9):
        data = attach(build(kind, num_workers=workers))
        data.load_state_dict(whole[step][1])
        assert contents(steps(data, STEPS - step - 1)) == contents(whole[step + 1 :])


@pytest.mark.parametrize("kind", KINDS)
def test_from_two_processes_to_one(build, kind):
    whole = steps(attach(build(kind)), STEPS)
    ranks = [steps(attach(build(kind, batch_size=2), rank, 2), STEPS) for rank in (0, 1)]
    for step in range(STEPS):
        (whole_batch, state), (first, first_state), (second, second_state) = (each[step] for each in (whole, *ranks))
        assert state == first_state == second_state
        assert (
            torch.stack([first["prompt_index"], second["prompt_index"]], 1).flatten().equal(whole_batch["prompt_index"])
        )
    data = attach(build(kind))
    data.load_state_dict(ranks[0][5][1])
    assert contents(steps(data, STEPS - 6)) == contents(whole[6:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_of_a_trainer(build, tmp_path, kind, workers):
    whole = fit(build(kind), tmp_path / "whole", steps=STEPS)
    assert len(whole.seen) == STEPS
    assert whole.seen == [ids for ids, *_ in contents(steps(attach(build(kind)), STEPS))]
    for step in range(1, STEPS) if workers == 0 else (5, 9):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*dataloader is not resumable.*")
            checkpoint = tmp_path / "whole" / f"step={step}.ckpt"
            data = build(kind, num_workers=workers)
            assert fit(data, tmp_path / "rest", steps=STEPS, ckpt_path=checkpoint).seen == whole.seen[step:]


def test_streamed_with_a_limit_on_the_batches_and_validations(build, write, tmp_path):
    validation = write(ROWS[:3], "v.jsonl")

    def run(name, **options):
        data = build("streamed", validation=validation)
        limits = {"limit_train_batches": 4, "val_check_interval": 2}
        return fit(data, tmp_path / name, steps=STEPS, **limits, **options)

    whole = run("whole")
    assert whole.seen == [ids for ids, *_ in contents(steps(attach(build("streamed")), STEPS))]
    for step in (2, 3, 4, 7, 8):
        assert run("rest", ckpt_path=tmp_path / "whole" / f"step={step}.ckpt").seen == whole.seen[step:]


def test_second_fit_of_a_stream_begins_anew(build, tmp_path):
    data = build("streamed")
    assert fit(data, tmp_path / "a", steps=7).seen == fit(data, tmp_path / "b", steps=7).seen


def test_steps_of_the_last_epoch_are_those_of_train_batches(build):
    data = attach(build("streamed"))
    assert len(train_batches(data)) == 6
    assert asdict(data.position) == {"epoch": 1, "rows": 0}
