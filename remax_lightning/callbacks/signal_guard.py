"""Signals that end a run, as exceptions: at any point of a step, but only while the state of training is consistent."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch import Tensor

REPEATED_SECONDS = 1.0
"""A launcher passes on what the terminal has sent already; a user who presses Ctrl-C again takes longer."""
PATIENCE_SECONDS = 15.0
"""What a step may take that all ranks have to finish together: schedulers kill 30 seconds after SIGTERM."""
REPLACED = {
    signal.SIGINT: (signal.default_int_handler,),  # not where it is ignored, as of a background job
    signal.SIGHUP: (signal.SIG_DFL,),  # not where it is ignored, as under nohup
}


class Terminated(SystemExit):
    """A signal ended the process, whose exit status is 128 plus its number, as a shell reports it.

    Args:
        signum: The signal.
    """

    def __init__(self, signum: int = signal.SIGTERM) -> None:
        super().__init__(128 + signum)


def _interruption(signum: int) -> BaseException:
    return KeyboardInterrupt() if signum == signal.SIGINT else Terminated(signum)


class Deferral(IntEnum):
    """What a signal has to wait for."""

    NONE = 0
    BATCH = 1  # the end of the batch, unless it is urgent: what follows from its optimizer step is not done yet
    ALWAYS = 2  # an update or a save that is half done


class SignalGuard:
    """Raises in the main thread on SIGTERM and SIGHUP (:class:`Terminated`) and SIGINT (``KeyboardInterrupt``).

    That is at once, or at the end of what defers it. A second signal, a second or more after the first, does not wait
    for the end of the batch. Where ranks can only save together, the caller asks for ``signum`` at the end of a step
    instead, and a signal is urgent after 15 seconds. Lightning itself waits for the end of the batch, which in a
    rollout is minutes away, saves nothing and exits with 0.
    """

    def __init__(self) -> None:
        self.signum = 0  # the first signal that has come
        self.at_once = True  # False: it is only recorded, until it is urgent
        self.deferral = Deferral.NONE
        self._is_urgent, self._is_child, self._came_at = False, False, 0.0
        self._timer: threading.Timer | None = None
        self._launcher: Any = None

    def start(self, trainer: Trainer) -> None:
        """Take over the signals from Lightning, until its teardown restores the handlers from before the run.

        Under SLURM's automatic requeue Lightning ignores SIGTERM, since it saves on another signal: that stays so.
        """
        self.signum, self.at_once, self.deferral, self._is_urgent = 0, True, Deferral.NONE, False
        environment = trainer._accelerator_connector.cluster_environment
        # ranks that Lightning has launched are ended by rank 0, after it has saved
        self._is_child = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        self._launcher = trainer.strategy.launcher
        if threading.current_thread() is not threading.main_thread():
            return
        if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue):
            signal.signal(signal.SIGTERM, self._handle)
        for signum, usual in REPLACED.items():
            if signal.getsignal(signum) in usual:
                signal.signal(signum, self._handle)

    def stop(self) -> None:
        """Expect no more signals."""
        self.deferral = Deferral.ALWAYS
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _handle(self, signum: int, frame: Any) -> None:
        if self._is_child and self.at_once:
            return
        if not self.signum:
            self.signum, self._came_at = signum, time.monotonic()
            if not self.at_once:
                self._hurry()
            if not self._is_child and not (self.at_once and self.deferral == Deferral.NONE):
                name = signal.Signals(signum).name
                # printing could meet another print of the main thread that is half done
                os.write(2, f"{name}: the step is finished and saved first; a second {name} does not wait\n".encode())
        elif time.monotonic() - self._came_at > REPEATED_SECONDS:
            self._is_urgent = True
        self._raise_if_due()

    def _hurry(self) -> None:
        """Make the signal urgent after a while, on all ranks that Lightning has launched."""
        if isinstance(self._launcher, _SubprocessScriptLauncher) and not self._is_child:
            self._launcher.kill(self.signum)
        self._timer = threading.Timer(PATIENCE_SECONDS, self._urge)
        self._timer.daemon = True
        self._timer.start()

    def _urge(self) -> None:
        self._is_urgent = True
        os.kill(os.getpid(), self.signum)  # the handler runs in the main thread

    def _raise_if_due(self) -> None:
        is_due = self._is_urgent or (self.at_once and self.deferral == Deferral.NONE)
        if self.signum and is_due and self.deferral != Deferral.ALWAYS:
            self.interrupt(self.signum)

    def of_any_rank(self, trainer: Trainer) -> int:
        """The signal that has come to this or another rank, 0 if there is none; collective."""
        signum = torch.tensor(self.signum, device=trainer.strategy.root_device)
        return int(cast(Tensor, trainer.strategy.reduce(signum, reduce_op="max")))

    def interrupt(self, signum: int) -> None:
        """Raise what a signal means; from now on nothing interrupts.

        Raises:
            KeyboardInterrupt: If it is SIGINT.
            Terminated: If it is another one.
        """
        self.stop()
        raise _interruption(signum)

    def end(self, error: BaseException) -> None:
        """Let nothing interrupt what follows an error.

        If a signal has come, it is the cause of the error: a rank that waits for the end of a step loses the others.
        """
        self.stop()
        if self.signum and not isinstance(error, Terminated | KeyboardInterrupt):
            error.__cause__ = _interruption(self.signum)

    def defer(self, to: Deferral) -> None:
        """Make signals wait.

        Raises:
            KeyboardInterrupt: If SIGINT has come and waits no longer.
            Terminated: If another one has.
        """
        self.deferral = to
        self._raise_if_due()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Make signals wait for the end of a block; an error in the block leaves them waiting.

        Raises:
            KeyboardInterrupt: At the end, if SIGINT has come.
            Terminated: At the end, if another one has.
        """
        self.deferral = Deferral.ALWAYS
        yield
        self.defer(Deferral.NONE)


class GuardedSignals(_SignalConnector):
    """Lightning's signal handlers with a guard's in their place, from the first batch of a run on.

    Before, while models are loaded, signals have their usual effect; nothing is lost then.

    Args:
        trainer: The trainer.
        guard: The guard.
    """

    def __init__(self, trainer: Trainer, guard: SignalGuard) -> None:
        super().__init__(trainer)
        self.guard = guard

    def register_signal_handlers(self) -> None:
        """Start the guard."""
        super().register_signal_handlers()
        self.guard.start(self.trainer)

    def teardown(self) -> None:
        """Stop the guard."""
        self.guard.stop()
        super().teardown()


def end_children(trainer: Trainer) -> None:
    """Kill the ranks that Lightning has launched; they may wait for this one forever."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher | _SubprocessScriptLauncher):
        launcher.kill(signal.SIGKILL)
