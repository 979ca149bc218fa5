"""Seconds of the phases of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.profilers import Profiler


class PhaseTimer:
    """Adds up the seconds of named phases, until they are taken."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, profiler: Profiler) -> Iterator[None]:
        """Time what is inside the context, here and in Lightning's profiler."""
        start = time.perf_counter()
        with profiler.profile(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The seconds of each phase since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds
