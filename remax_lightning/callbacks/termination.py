"""SIGTERM as an exception, wherever in a step it comes, but only where the state of training is whole."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment


class Terminated(SystemExit):
    """The process was told to end by SIGTERM; its exit status is 143, as the shell reports it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class Termination:
    """Raises :class:`Terminated` in the main thread on SIGTERM, at once or as soon as it is allowed.

    Where processes can only save together it is left to the caller to ask what is requested, at the end of a step.
    Lightning itself waits for the end of the batch, which in a rollout is minutes away, saves nothing and exits with 0.
    """

    def __init__(self) -> None:
        self.is_requested, self.is_allowed, self.at_once = False, False, True
        self._is_child = False

    def start(self, trainer: Trainer, *, at_once: bool) -> None:
        """Take over SIGTERM from Lightning, until its teardown puts back what was there before the fit.

        Args:
            trainer: The trainer.
            at_once: Interrupt a step; otherwise SIGTERM is only noted.

        Under SLURM's automatic requeue Lightning lets SIGTERM pass, since it saves on another signal: that stays so.
        """
        self.is_requested, self.is_allowed, self.at_once = False, True, at_once
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            return
        # processes that Lightning has started are ended by their parent, after it has saved
        self._is_child = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, signum: int, frame: Any) -> None:
        self.is_requested = not self._is_child
        if self.is_allowed:
            self._raise_if_requested()

    def _raise_if_requested(self) -> None:
        if self.is_requested and self.at_once:
            self.is_allowed = False
            raise Terminated

    def forbid(self) -> None:
        """Make SIGTERM wait: the state is about to change."""
        self.is_allowed = False

    def allow(self) -> None:
        """Let SIGTERM interrupt again; if one has been waiting, it does now.

        Raises:
            Terminated: If one has been waiting.
        """
        self.is_allowed = True
        self._raise_if_requested()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Make SIGTERM wait for the end of a block."""
        self.forbid()
        yield
        self.allow()


def end_children(trainer: Trainer) -> None:
    """End the processes that Lightning has started for the other devices; they may wait for this one for ever."""
    launcher = trainer.strategy.launcher
    if hasattr(launcher, "procs"):
        launcher.kill(signal.SIGKILL)  # type: ignore[union-attr]
