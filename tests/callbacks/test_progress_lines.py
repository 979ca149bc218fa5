"""What a run says of its progress: lines by steps and by time, each metric once, and which limit ended it."""

import io
import logging
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import tiny
from rich.console import Console

from remax_lightning.callbacks import ProgressLines, StepBar, progress_lines


@pytest.fixture
def policy(tmp_path: Path) -> str:
    return tiny.save_model(tmp_path / "policy")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged on rank 0."""
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        yield caplog


def fit(policy: str, folder: Path, callback: ProgressLines | StepBar, steps: int, **options: Any) -> None:
    """A run of up to three steps an epoch, with validation rows."""
    data = tiny.prompt_data(folder, batch_size=2)
    data.sources["validation"] = data.sources["train"]
    defaults = {"check_val_every_n_epoch": None, "val_check_interval": 1000}
    tiny.fit(tiny.remax(policy), data, folder, steps, callbacks=[callback], **{**defaults, **options})


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]


def steps_of(printed: list[str]) -> list[int]:
    return [int(re.match(r"step (\d+)", line)[1]) for line in printed]  # type: ignore[index]


def test_lines_by_steps_and_the_last(policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(policy, tmp_path, ProgressLines(every_n_steps=2), 5)
    printed = lines(capsys)
    assert steps_of(printed) == [2, 4, 5]
    assert all("/5  " in line and "train/reward" in line for line in printed)
    assert ["left" in line for line in printed] == [True, True, False]


def test_lines_by_time(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = count(0, 8)  # at each look at the clock
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: float(next(seconds)))
    fit(policy, tmp_path, ProgressLines(every_n_steps=1000, every_n_seconds=30.0), 7)
    printed = steps_of(lines(capsys))
    assert len(printed) >= 2
    assert printed[-1] == 7


def test_the_time_left(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = ProgressLines(every_n_steps=1)
    trainer = tiny.trainer(tmp_path, steps=40)
    callback.start, callback.first_step = 100.0, 10
    assert callback._time_left(160.0, 30, 40) == ", 0:00:30 left"  # 20 steps took a minute
    assert callback._time_left(160.0, 40, 40) == ""
    assert callback._time_left(160.0, 30, None) == ""
    assert progress_lines.total_steps(trainer) == 40


def test_a_validation_is_printed_once(policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(policy, tmp_path, ProgressLines(every_n_steps=1), 4, val_check_interval=2)
    printed = lines(capsys)
    validations = [line for line in printed if "val/" in line]
    assert steps_of(validations) == [2, 4]
    assert all("val/reward" in line and "train/" not in line for line in validations)
    assert steps_of([line for line in printed if "train/" in line]) == [1, 2, 3, 4]


def test_no_lines(policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(policy, tmp_path, ProgressLines(every_n_steps=0, every_n_seconds=1e-9), 3, val_check_interval=1)
    assert lines(capsys) == []


def test_epochs_that_end_a_run_before_its_steps(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], said: pytest.LogCaptureFixture
) -> None:
    fit(policy, tmp_path, ProgressLines(), 100, max_epochs=2)
    assert steps_of(lines(capsys)) == [4]
    assert "the run ended at step 4 of trainer.max_steps=100, since trainer.max_epochs=2; set" in said.text


def test_a_run_that_validates_nothing(policy: str, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    fit(policy, tmp_path, ProgressLines(), 3)
    assert (
        "the run ended at step 3 before its first validation; lower trainer.val_check_interval (now 1000)" in said.text
    )
    assert "max_epochs" not in said.text


def test_a_run_that_ends_as_it_should_says_nothing(policy: str, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    fit(policy, tmp_path, ProgressLines(), 3, val_check_interval=2)
    assert "the run ended" not in said.text


@pytest.mark.parametrize(("options", "total", "done"), [({}, 5, 5), ({"max_epochs": 2}, 2, 2)])
def test_the_bar_counts_steps_where_they_end_the_run(
    policy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    total: int,
    done: int,
) -> None:
    monkeypatch.setattr(
        "lightning.pytorch.callbacks.progress.rich_progress.get_console",
        lambda: Console(file=io.StringIO(), force_terminal=True),
    )
    bar = StepBar()
    fit(policy, tmp_path, bar, 5, enable_progress_bar=True, **options)
    assert bar.progress is not None
    task = bar.progress.tasks[0]
    assert (task.total, task.completed) == (total, done)
    assert ("Step" if total == 5 else "Epoch 1") in task.description


@pytest.mark.parametrize("options", [{"every_n_steps": -1}, {"every_n_seconds": 0.0}])
def test_arguments_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        ProgressLines(**options)
