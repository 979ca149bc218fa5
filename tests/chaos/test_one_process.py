"""Faults in a run of one process, of rewards, gradients, signals and errors: the exit status, what is kept and said.

The numbers are those of the list in docs/faults.md. Every fault that ends a run is followed by a run that is
resumed without it, whose weights must be those of a run that nothing has happened to.
"""

import os
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from chaos.runs import STEPS, Outcome, World, injected, rewarded, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.chaos]


@dataclass(frozen=True)
class Fault:
    """A fault and what is expected of it.

    Args:
        number: In the list.
        name: What happens.
        changes: Of the configuration.
        exit: Exit status.
        says: Pattern of what has to be printed.
        lost: Finished steps that no checkpoint holds.
        as_clean: Whether the weights at the end are those of a run without it.
        resumes: Whether a run that is resumed without it ends like one that nothing has happened to.
    """

    number: int
    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    exit: int = 0
    says: str = ""
    lost: int = 0
    as_clean: bool = False
    resumes: bool = False


def reward_fault(number: int, function: str, **expected: Any) -> Fault:
    return Fault(number, function, rewarded(function), **expected)


def miscounting(extra: int) -> dict[str, Any]:
    return {"model.reward": {"class_path": "chaos.injections.MiscountingReward", "init_args": {"extra": extra}}}


def stopped(number: int, name: str, exit: int, at: str, action: str, batch: int = 3, **expected: Any) -> Fault:
    return Fault(number, f"{name}-{at}", injected(at=at, action=action, batch=batch), exit, resumes=True, **expected)


SAVED = r"the state is saved as .*step=\d+\.ckpt"
FAULTS = [
    reward_fault(1, "nan_row"),
    reward_fault(2, "inf_row"),
    reward_fault(2, "minus_inf_row"),
    reward_fault(3, "huge_row"),
    reward_fault(3, "overflow_row"),
    reward_fault(4, "none_row"),
    reward_fault(4, "text_row"),
    reward_fault(5, "none_batch", says="must return a list"),
    reward_fault(5, "dict_batch", says="must return"),
    reward_fault(5, "text_batch", says="must return"),
    reward_fault(5, "meta_batch", says="meta"),
    reward_fault(5, "generator", as_clean=True),
    reward_fault(6, "too_few", says="one reward a response: 4|must return .* 8, got 7"),
    reward_fault(6, "too_many", says="got 9"),
    Fault(7, "a class returns too few", miscounting(-1), says="got"),
    Fault(7, "a class returns too many", miscounting(1), says="got"),
    reward_fault(8, "raises_once", says="the judge did not answer"),
    reward_fault(8, "exits", says="SystemExit"),
    reward_fault(9, "raises_later", exit=1, says=r"the judge did not answer(.|\n)*10"),
    reward_fault(10, "raises", exit=1, says="self-check.*|the judge did not answer"),
    reward_fault(12, "column_vector", as_clean=True),
    reward_fault(13, "mutates", as_clean=True),
    reward_fault(14, "no_grad", as_clean=True),
    reward_fault(15, "disturbs", as_clean=True),
    reward_fault(16, "equal", exit=1, says="from which nothing is learned"),
    Fault(17, "nan gradient", injected(at="forward", action="nan_gradient"), says="step 4 is skipped|skipped"),
    Fault(17, "inf gradient", injected(at="forward", action="inf_gradient"), says="skipped"),
    Fault(
        18,
        "nan gradient always",
        {**injected(at="forward", action="nan_gradient", forever=True), "trainer.max_steps": 30},
        exit=1,
        says="10",
    ),
    *(stopped(19, "out of memory", 1, at, "oom", says=SAVED) for at in ("rollout", "forward", "backward")),
    *(
        stopped(20, "SIGTERM", 143, at, "sigterm", says=SAVED)
        for at in ("rollout", "forward", "backward", "optimizer", "stepped", "batch_end")
    ),
    stopped(20, "SIGTERM", 143, "validation", "sigterm", batch=0),
    *(
        stopped(21, "SIGINT", 130, at, "sigint", says=SAVED)
        for at in ("rollout", "backward", "optimizer", "stepped", "batch_end")
    ),
    stopped(21, "SIGHUP", 129, "backward", "sighup", says=SAVED),
    *(stopped(22, "SIGTERM in a save", 143, at, "sigterm") for at in ("save", "saved")),
    *(stopped(22, "SIGINT in a save", 130, at, "sigint") for at in ("save", "saved")),
    stopped(22, "kill -9 in a save", -9, "save", "sigkill", lost=5),
    stopped(22, "kill -9 in a save", -9, "saved", "sigkill"),
    stopped(23, "SIGTERM in the export", -15, "export", "sigterm"),
    stopped(23, "SIGINT in the export", 130, "exported", "sigint"),
    stopped(23, "kill -9 in the export", -9, "export", "sigkill"),
    Fault(24, "SIGTERM in the self-check", injected(at="self_check", action="sigterm"), exit=143),
    stopped(25, "error", 1, "validation", "error"),
    stopped(25, "error", 1, "batch_end", "error", says=SAVED),
    stopped(25, "error", 1, "stepped", "error", lost=4, says="interrupted half way"),
    stopped(32, "full disk", 1, "backward", "full_disk", lost=5, says="could not be written|File too large"),
    stopped(34, "read-only disk", 1, "backward", "read_only", lost=5, says="Read-only file system"),
    Fault(49, "clock back", {**injected(at="backward", action="clock_back"), "checkpoint.every_n_train_steps": 1}),
    Fault(52, "loss spike", injected(at="batch_end", action="triple_weights")),
    Fault(
        53,
        "a weight becomes nan",
        {**injected(at="batch_end", action="nan_weight"), "trainer.max_steps": 20, "checkpoint.every_n_train_steps": 1},
        exit=1,
        says="not finite",
        lost=2,
    ),
    Fault(50, "lr 1e10", {"model.optimizer.lr": 1e10, "trainer.max_steps": 20}, exit=1),
    Fault(
        51,
        "kl limit",
        {**rewarded("worse"), "model.optimizer.lr": 0.05, "model.kl": {"limit": 1.0}, "trainer.max_steps": 40},
        says="kl.limit",
    ),
    Fault(
        51,
        "exploding kl",
        {
            **rewarded("worse"),
            "model.optimizer.lr": 0.5,
            "model.sampling": {"max_new_tokens": 24},
            "trainer.max_steps": 12,
        },
        says="KL",
    ),
    Fault(
        16,
        "all rewards equal from some step on",
        {**rewarded("equal_later"), "trainer.max_steps": 20},
        says="all rewards of a step are equal, for 10 steps in a row",
    ),
    stopped(55, "a worker dies", 1, "rollout", "kill_worker"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("chaos"))


@pytest.fixture(scope="module")
def clean(world: World) -> dict[str, torch.Tensor]:
    outcome = world.run("clean", {})
    assert outcome.exit == 0, outcome.output
    assert (outcome.steps, outcome.lost) == (STEPS, 0)
    return outcome.weights()


def check(fault: Fault, outcome: Outcome) -> None:
    assert outcome.exit == fault.exit, outcome.output
    assert re.search(fault.says, outcome.output), outcome.output
    assert outcome.lost <= fault.lost, outcome.output
    assert outcome.is_finite


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.number}-{fault.name}".replace(" ", "_"))
def test_fault(fault: Fault, world: World, clean: dict[str, torch.Tensor], request: pytest.FixtureRequest) -> None:
    name = re.sub(r"\W+", "_", request.node.callspec.id)
    changes = dict(fault.changes)
    if fault.number == 55:
        changes["data.num_workers"] = 1
    outcome = world.run(name, changes)
    check(fault, outcome)
    if fault.as_clean:
        assert tiny.are_equal(outcome.weights(), clean)
    if fault.resumes:
        resumed = world.run(name, {}, "--ckpt_path", "last")
        assert resumed.exit == 0, resumed.output
        assert tiny.are_equal(resumed.weights(), clean)


@pytest.mark.parametrize(("signum", "exit"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_11_a_reward_that_hangs_is_interrupted(
    signum: signal.Signals, exit: int, world: World, clean: dict[str, torch.Tensor]
) -> None:
    name = f"hangs_{signum.name}"
    (process,) = world.start(name, rewarded("hangs"))
    wait_for((world.folder / name / "hangs").exists)
    os.kill(process.pid or 0, signum)
    outcome = world.finish(name, [process], seconds=15)
    assert outcome.exit == exit, outcome.output
    assert outcome.lost == 0
    resumed = world.run(name, {}, "--ckpt_path", "last")
    assert tiny.are_equal(resumed.weights(), clean), resumed.output


@pytest.mark.parametrize("command", ["test", "validate"])
def test_24_sigterm_in_an_evaluation(command: str, world: World) -> None:
    name = f"{command}_sigterm"
    assert world.run(name, {}).exit == 0
    place = "test" if command == "test" else "validation"
    changes = injected(at=place, action="sigterm")
    outcome = world.run(name, changes, "--ckpt_path", "last", command=command)
    assert outcome.exit == 143, outcome.output
    assert not (outcome.folder / "responses.jsonl").exists()


def test_33_a_logger_that_cannot_write(world: World, clean: dict[str, torch.Tensor]) -> None:
    folder = world.folder / "full_log" / "logs" / "version_0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").symlink_to("/dev/full")
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder.parents[1])}}
    logger["init_args"] |= {"name": "logs", "version": 0, "flush_logs_every_n_steps": 2}
    outcome = world.run("full_log", {"trainer.logger": logger})
    assert outcome.exit in (0, 1), outcome.output
    assert outcome.lost == 0


def test_48_a_second_start_in_the_folder(world: World, clean: dict[str, torch.Tensor]) -> None:
    name = "shared_folder"
    every_step = {"checkpoint.every_n_train_steps": 1}
    (first,) = world.start(name, {**rewarded("hangs"), **every_step})
    wait_for((world.folder / name / "hangs").exists)
    kept = sorted(path.name for path in (world.folder / name / "checkpoints").iterdir())
    second = world.run(name, {})
    assert second.exit not in (0, None), second.output
    assert str(first.pid) in second.output
    assert sorted(path.name for path in (world.folder / name / "checkpoints").iterdir()) == kept
    os.kill(first.pid or 0, signal.SIGKILL)
    world.finish(name, [first])
    after = world.run(name, {}, "--ckpt_path", "last")
    assert after.exit == 0, after.output
    assert tiny.are_equal(after.weights(), clean)


def test_50_a_high_rate_keeps_a_healthy_checkpoint(world: World) -> None:
    changes = {"model.optimizer.lr": 1e3, "trainer.max_steps": 20, "checkpoint.every_n_train_steps": 1}
    outcome = world.run("high_rate", changes)
    assert outcome.is_finite
    assert Path(outcome.folder / "checkpoints").exists()
