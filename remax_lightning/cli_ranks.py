"""Ranks that Lightning's launcher starts end with the process that started them, also before they have met."""

import ctypes
import os
import signal
import sys
from pathlib import Path

LAUNCHER = "REMAX_LIGHTNING_LAUNCHER"
"""An environment variable: number of the process whose command line other ranks may be started with."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h


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
