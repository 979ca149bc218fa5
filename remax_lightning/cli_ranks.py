"""Ranks do not wait for one that has ended before all of them have met."""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

LAUNCHER = "REMAX_LIGHTNING_LAUNCHER"
"""An environment variable: number of the process whose command line other ranks may be started with."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h
SILENCE_SECONDS = 15.0
"""A rank beats once a second; one that imports or reads something large holds Python up for a while."""
MET = 1 << 40
"""More beats than there can be: the rank has met the others, and beats no more."""


def end_with_launcher() -> None:
    """Be killed when the process ends that has started this one as a further rank; on Linux.

    It would wait for that one, up to the time-out of the process group. Of processes that something else has started
    (torchrun, srun), that takes care.
    """
    launcher = os.environ.pop(LAUNCHER, "")
    if not launcher or os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[LAUNCHER] = str(os.getpid())
    elif sys.platform == "linux":
        if int(launcher) == os.getppid():
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if has_ended(int(launcher)):
            sys.exit(f"error: process {launcher}, which has started this rank, has ended")


def has_ended(process: int) -> bool:
    """Whether a process has ended, even if nobody has asked for its status yet."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def watch_start() -> None:
    """Where ranks are started one by one, with torch's environment variables, let them see each other come up.

    A rank that dies before all have met would be waited for, up to the time-out of the process group. torchrun ends the
    others by itself.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if all(name in os.environ for name in names) and int(os.environ["WORLD_SIZE"]) > 1 and not has_agent:
        Heartbeat(*(os.environ[name] for name in names)).start()


class Heartbeat(threading.Thread):
    """Shows the other ranks that this one lives, and ends it when one of them does no longer, until they have met.

    Args:
        rank: Number of this process.
        world_size: Number of processes.
        address: Where rank 0 is.
        port: Its port, on which torch's own store will listen, too.
    """

    def __init__(self, rank: str, world_size: str, address: str, port: str) -> None:
        super().__init__(daemon=True, name="heartbeat")
        self.rank, self.world_size, self.address, self.port = int(rank), int(world_size), address, int(port)
        self.seen: dict[int, tuple[int, float]] = {}  # beats of each rank, and when the last one came

    def run(self) -> None:
        """Beat once a second."""
        try:
            store = dist.TCPStore(
                self.address,
                self.port,
                self.world_size,
                is_master=self.rank == 0,
                wait_for_workers=False,
                multi_tenant=True,
            )
            while not dist.is_initialized():
                store.add(f"heartbeat/{self.rank}", 1)
                for rank in range(self.world_size):
                    self._listen(rank, store.add(f"heartbeat/{rank}", 0), time.monotonic())
                time.sleep(1)
            store.add(f"heartbeat/{self.rank}", MET)
        except dist.DistError as error:
            if not dist.is_initialized():
                _leave(f"rank 0 does not answer any more ({str(error).splitlines()[0]})")

    def _listen(self, rank: int, beats: int, now: float) -> None:
        before, since = self.seen.get(rank, (0, now))
        if beats > before:
            self.seen[rank] = beats, now
        elif 0 < beats < MET and now - since > SILENCE_SECONDS:
            _leave(f"rank {rank} has come up and is gone")


def _leave(reason: str) -> None:
    """End the process from a thread: the main thread waits in the process group's start."""
    os.write(2, f"error: {reason}; the run cannot start\n".encode())
    os._exit(1)
