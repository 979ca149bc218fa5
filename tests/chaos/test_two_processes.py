"""Faults of one of two processes, and ``kill -9`` of all at random moments, under ddp and fsdp2.

The numbers are those of the list in docs/faults.md. ``--kills`` is the number of random kills of each case.
"""

import os
import random
import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
from chaos.runs import SECONDS, STEPS, Outcome, World, injected, rewarded, wait_for

from remax_lightning.checkpoints.manifest import PARTIAL_SUFFIX, manifests

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"trainer.strategy": "ddp"},
    "fsdp2": {"trainer.strategy": {"class_path": "FSDP2Strategy", "init_args": {"compute_dtype": "float32"}}},
}
PPO = {"model.class_path": "PPO", "model.num_epochs": 2, "model.num_minibatches": 2}
LAST = ("--ckpt_path", "last")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("two"))


def two(world: World, name: str, changes: dict[str, Any], *arguments: str, seconds: float = SECONDS) -> Outcome:
    return world.finish(name, world.start(name, changes, *arguments, processes=2), seconds)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_27_one_of_them_is_killed(strategy: str, world: World) -> None:
    name = f"killed_{strategy}"
    outcome = two(
        world, name, {**STRATEGIES[strategy], **injected(at="backward", action="sigkill", rank=1)}, seconds=30
    )
    assert outcome.exits[1] == -9
    assert outcome.exit not in (0, None), outcome.output
    assert outcome.lost <= (0 if strategy == "ddp" else 3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_28_one_of_them_has_an_error(strategy: str, world: World) -> None:
    name = f"error_{strategy}"
    outcome = two(world, name, {**STRATEGIES[strategy], **injected(at="backward", action="oom", rank=1)}, seconds=30)
    assert outcome.exits[1] == 1
    assert outcome.exit not in (0, None), outcome.output
    assert "CUDA out of memory" in outcome.output


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_21_all_are_interrupted(strategy: str, world: World) -> None:
    name = f"interrupted_{strategy}"
    processes = world.start(name, {**STRATEGIES[strategy], **rewarded("hangs")}, processes=2)
    wait_for((world.folder / name / "hangs").exists)
    time.sleep(0.2)
    for process in processes:
        os.kill(process.pid or 0, signal.SIGTERM)
    outcome = world.finish(name, processes, seconds=30)
    assert outcome.exits == [143, 143], outcome.output


def test_29_a_reward_fails_on_one_of_them(world: World) -> None:
    outcome = two(world, "reward_of_rank_1", rewarded("fails_on_rank_1"))
    assert outcome.exits == [0, 0], outcome.output
    assert re.search(r"rank 1.*the judge did not answer|the judge did not answer.*rank 1", outcome.output)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_30_a_gradient_of_one_of_them(strategy: str, world: World) -> None:
    name = f"gradient_{strategy}"
    outcome = two(world, name, {**STRATEGIES[strategy], **injected(at="forward", action="nan_gradient", rank=1)})
    assert outcome.exits == [0, 0], outcome.output
    assert "skipped" in outcome.output
    assert outcome.is_finite


@pytest.mark.parametrize("what", ["data", "setting"])
def test_31_they_do_not_agree(what: str, world: World) -> None:
    name = f"differs_{what}"
    rows = tiny.read_rows(world.prompts)
    other = tiny.write_rows(world.folder / "other.jsonl", rows[:16])
    changes = {"data.train": other} if what == "data" else {"model.kl_coef": 0.2}
    processes = world.start(name, {}, processes=2, of_rank_1=changes)
    outcome = world.finish(name, processes, seconds=30)
    assert all(exit not in (0, None) for exit in outcome.exits), outcome.output
    named = {"data": "the rows of the data", "setting": "model.init_args.kl_coef (0.05 on rank 0, 0.2 on rank 1)"}
    assert f"the ranks differ in {named[what]}" in outcome.output
    assert outcome.steps == 0


def test_27_one_of_them_ends_before_they_have_met(world: World) -> None:
    processes = world.start("alone", {"trainer.callbacks": []}, processes=2, environment={"PYTHONUNBUFFERED": "1"})
    log = world.folder / "alone" / "log1.txt"
    wait_for(lambda: log.exists() and "Seed set" in log.read_text(encoding="utf-8"))
    os.kill(processes[1].pid or 0, signal.SIGKILL)
    outcome = world.finish("alone", processes, seconds=45)
    assert outcome.exit not in (0, None), outcome.output


CASES = {
    "remax-1": (1, {}),
    "ppo-1": (1, PPO),
    "remax-ddp": (2, STRATEGIES["ddp"]),
    "remax-fsdp2": (2, STRATEGIES["fsdp2"]),
    "ppo-ddp": (2, {**STRATEGIES["ddp"], **PPO}),
    "ppo-fsdp2": (2, {**STRATEGIES["fsdp2"], **PPO}),
}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES)
def test_26_kill_9_at_random_moments(case: str, world: World, request: pytest.FixtureRequest) -> None:
    kills = request.config.getoption("kills")
    processes, changes = CASES[case]
    steps = (STEPS + 2 * kills) * (4 if "ppo" in case else 1)
    changes = {**changes, "checkpoint.every_n_train_steps": 1, "trainer.max_steps": steps}
    whole = world.finish(f"{case}_whole", world.start(f"{case}_whole", changes, processes=processes), 600)
    assert whole.exits == [0] * processes, whole.output
    rng, name, done = random.Random(case), f"{case}_killed", 0
    folder = world.folder / name / "checkpoints"
    while True:
        started = world.start(name, changes, *LAST, processes=processes)
        if done == kills:
            break
        before = newest_number(folder)
        moment = rng.random()
        if moment < 0.25:
            time.sleep(rng.uniform(0, 3))  # while it starts
        else:
            wait_for(partial(is_newer, folder, before))
            if moment > 0.5:
                wait_for(partial(is_saving, folder, started))
            time.sleep(rng.uniform(0, 0.05 if moment > 0.5 else 0.3))
        for process in started:
            process.kill()
        ended = world.finish(name, started)
        if ended.exits == [0] * processes:
            break
        done += 1
    outcome = world.finish(name, started, 600)
    assert outcome.exits == [0] * processes, outcome.output
    assert tiny.are_equal(outcome.weights(), whole.weights())


def newest_number(folder: Path) -> int:
    return max((manifest.number for _, manifest in manifests(folder)), default=0)


def is_newer(folder: Path, before: int) -> bool:
    return newest_number(folder) > before


def is_saving(folder: Path, started: list[Any]) -> bool:
    return any(folder.glob(f"*{PARTIAL_SUFFIX}")) or any(process.exitcode is not None for process in started)
