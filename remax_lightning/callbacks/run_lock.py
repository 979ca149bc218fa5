"""A lock on a run's folder, so that a second run neither removes nor replaces what a first one writes."""

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

SECONDS_TO_WRITE = 1.0
"""A lock that is still empty after this was left by a process that was killed when it made the file."""


@dataclass(frozen=True)
class Holder:
    """The process that uses a folder.

    Args:
        host: Name of its machine.
        boot: Which start of the machine it belongs to; empty where the system does not tell.
        pid: Its number.
        started: When it was started, in the system's clock ticks since the boot; 0 where the system does not tell.
        job: Its SLURM job, else empty.
        restarts: How often the job was requeued: what holds the lock from before that has ended, on any machine.
        since: When it took the lock, for people.
    """

    host: str
    boot: str
    pid: int
    started: int
    job: str
    restarts: str
    since: str

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
        job, restarts = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
        return cls(socket.gethostname(), _boot(), pid, _started(pid), job, restarts, since)

    def has_ended(self) -> bool:
        """Whether the process is known to have ended, or is this one; of another machine nothing is known."""
        here = Holder.here()
        if self.job and self.job == here.job and self.restarts != here.restarts:
            return True
        if self.host != here.host:
            return False
        if self.boot != here.boot or self.pid == here.pid:
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # another user's
        return self.started != _started(self.pid)


class RunLock:
    """A file beside a folder, whose creation is atomic on network file systems, too, that names who uses the folder.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, Path(f"{folder}.lock")
        self._content = ""  # while it is held

    def take(self) -> str | None:
        """Take the lock, unless another process has it; one that has ended loses it.

        Returns:
            Why the folder cannot be used; None if the lock is taken.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            content = self._read()
            holder = _parsed(content)
            if holder is not None and not holder.has_ended():
                return self._refusal(holder)
            if self._remove(content) and holder is not None and holder.pid != os.getpid():
                rank_zero_info(f"process {holder.pid}, which used {self.folder}, has ended: this one uses it now")
        return None

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._content:
            self._remove(self._content)
            self._content = ""

    def _create(self) -> bool:
        content = json.dumps(asdict(Holder.here())) + "\n"
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                file.write(content)
        except FileExistsError:
            return False
        self._content = content
        return True

    def _read(self) -> str:
        """The content of the lock, which may not be written yet."""
        end = time.monotonic() + SECONDS_TO_WRITE
        content = ""
        with contextlib.suppress(FileNotFoundError):
            while _parsed(content := self.path.read_text(encoding="utf-8")) is None and time.monotonic() < end:
                time.sleep(0.05)
        return content

    def _remove(self, content: str) -> bool:
        """Remove a lock with this content; whether it was there. Of several processes that try, one succeeds."""
        moved = self.path.with_name(f"{self.path.name}.{socket.gethostname()}.{os.getpid()}")
        try:
            os.rename(self.path, moved)
        except FileNotFoundError:
            return False
        is_removed = moved.read_text(encoding="utf-8") == content
        if not is_removed:  # meanwhile another process has removed that one and made its own
            with contextlib.suppress(FileExistsError):
                os.link(moved, self.path)
        moved.unlink()
        return is_removed

    def _refusal(self, holder: Holder) -> str:
        where = "on this machine" if holder.host == socket.gethostname() else f"on {holder.host}"
        known = "" if holder.host == socket.gethostname() else f"; if it is known to have ended, delete {self.path}"
        return (
            f"the run in {self.folder} is in use by process {holder.pid} {where} since {holder.since}: wait until it "
            f"has ended, or set another trainer.default_root_dir (checkpoint.dirpath){known}"
        )


def _parsed(content: str) -> Holder | None:
    """The holder that a lock names; None if it names none."""
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return ""


def _started(pid: int) -> int:
    """When a process was started; 0 where the system does not tell, -1 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return -1 if Path("/proc/self/stat").exists() else 0
    return -1 if fields[0] in "ZX" else int(fields[19])
