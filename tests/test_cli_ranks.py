"""A rank does not wait for one that has ended before all of them have met."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import ROOT

from remax_lightning.cli_ranks import LAUNCHER, end_with_launcher, has_ended

RANK = """
import sys, time
from pathlib import Path
from remax_lightning import cli_ranks
cli_ranks.SILENCE_SECONDS = 3.0
cli_ranks.end_with_launcher()
cli_ranks.watch_start()
time.sleep(2)
Path(sys.argv[1]).write_text(str(__import__("os").getpid()))
time.sleep(100)
"""
LAUNCH = """
import os, subprocess, sys, time
from remax_lightning import cli_ranks
cli_ranks.end_with_launcher()
subprocess.Popen([sys.executable, *sys.argv[1:]], env={**os.environ, "LOCAL_RANK": "1"})
time.sleep(100)
"""


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in (LAUNCHER, "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**environment, "PYTHONPATH": str(ROOT), **variables},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(happens: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not happens() and time.monotonic() < end:
        time.sleep(0.05)
    return happens()


@pytest.mark.slow
def test_a_rank_ends_with_the_process_that_has_started_it(tmp_path: Path) -> None:
    ready, script = tmp_path / "ready", tmp_path / "rank.py"
    script.write_text(RANK)
    launcher = start("-c", LAUNCH, str(script), str(ready))
    assert wait(lambda: ready.exists() and ready.read_text() != "")
    rank = int(ready.read_text())
    assert not has_ended(rank)
    launcher.kill()
    launcher.wait()
    try:
        assert wait(lambda: has_ended(rank), 10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


def test_a_rank_that_comes_up_after_the_end_of_what_has_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    monkeypatch.setenv(LAUNCHER, str(process.pid))
    monkeypatch.setenv("LOCAL_RANK", "0")
    end_with_launcher()
    assert os.environ[LAUNCHER] == str(os.getpid())
    monkeypatch.setenv(LAUNCHER, str(process.pid))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert wait(lambda: has_ended(process.pid))
    with pytest.raises(SystemExit, match=f"process {process.pid}, which has started this rank, has ended"):
        end_with_launcher()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_ranks_see_each_other_come_up(killed: int, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "rank.py").write_text(RANK)
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = [
        start(str(tmp_path / "rank.py"), str(tmp_path / f"ready{rank}"), RANK=str(rank), **variables) for rank in (0, 1)
    ]
    try:
        assert wait(lambda: len(list(tmp_path.glob("ready*"))) == 2)
        assert [rank.poll() for rank in ranks] == [None, None]
        ranks[killed].kill()
        _, errors = ranks[1 - killed].communicate(timeout=30)
        assert ranks[1 - killed].returncode == 1
        assert ("rank 1 has come up and is gone" if killed else "rank 0 does not answer any more") in errors
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
