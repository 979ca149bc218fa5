"""SIGTERM as an exception, at any point of a step but only while the state of training is consistent."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment


class Terminated(SystemExit):
    """SIGTERM ended the process; its exit status is 143, as a shell reports it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class SigtermGuard:
    """Raises :class:`Terminated` in the main thread on SIGTERM: at once, or at the end of what defers it.

    Where ranks can only save together, the caller asks for ``is_requested`` at the end of a step instead. Lightning
    itself waits for the end of the batch, which in a rollout is minutes away, saves nothing and exits with 0.
    """

    def __init__(self) -> None:
        self.is_requested, self.at_once = False, True
        self._is_deferred, self._is_child = True, False

    def start(self, trainer: Trainer, *, at_once: bool) -> None:
        """Take over SIGTERM from Lightning, until its teardown restores the handler from before the fit.

        Under SLURM's automatic requeue Lightning ignores SIGTERM, since it saves on another signal: that stays so.

        Args:
            trainer: The trainer.
            at_once: Interrupt a step; otherwise SIGTERM is only recorded.
        """
        self.is_requested, self.at_once, self._is_deferred = False, at_once, False
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            return
        # ranks that Lightning has launched are ended by rank 0, after it has saved
        self._is_child = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, signum: int, frame: Any) -> None:
        self.is_requested = not self._is_child
        self._raise_if_requested()

    def _raise_if_requested(self) -> None:
        if self.is_requested and self.at_once and not self._is_deferred:
            self._is_deferred = True
            raise Terminated

    def defer(self) -> None:
        """Make SIGTERM wait for the end of the next deferred block: the state is about to change."""
        self._is_deferred = True

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Make SIGTERM wait for the end of a block; an error in the block leaves it waiting.

        Raises:
            Terminated: At the end, if SIGTERM has come.
        """
        self._is_deferred = True
        yield
        self._is_deferred = False
        self._raise_if_requested()


def end_children(trainer: Trainer) -> None:
    """Kill the ranks that Lightning has launched; they may wait for this one forever."""
    launcher = trainer.strategy.launcher
    if hasattr(launcher, "procs"):
        launcher.kill(signal.SIGKILL)  # type: ignore[union-attr]
