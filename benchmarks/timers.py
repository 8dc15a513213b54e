"""Two clocks for one way of measuring: a GPU's own, by CUDA events, and the host's, for trying things out on a CPU."""

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Says how long a device works, and makes it forget what it worked on."""

    def wait(self) -> None:
        """Until the device has done all that it was given."""

    def leave_cache(self) -> None:
        """Gives the device other memory to read, more than its cache holds."""

    def mark(self) -> Any:
        """A moment in the device's work."""

    def between(self, start: Any, end: Any) -> float:
        """Seconds between two moments that have passed."""


class HostClock:
    """Work is done when the call that gives it returns."""

    def wait(self) -> None:
        pass

    def leave_cache(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def between(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """CUDA events.

    In a network a batch norm finds its data in memory, since megabytes have gone by since they were written; and the
    host is ahead of the device, where nothing makes it wait. Reading a gibibyte just before what is timed does both. It
    is read and not written, since the cache would have to write that back in the time that is measured.
    """

    LEAD = 1.5e-3  # seconds that the host needs at most for a layer's forward or backward pass

    def __init__(self) -> None:
        self._elsewhere = torch.randn(2**28, device="cuda")
        self._reads = 1
        for _ in range(3):
            self.leave_cache()
        self.wait()
        start = self.mark()
        for _ in range(5):
            self.leave_cache()
        end = self.mark()
        self.wait()
        self._reads = math.ceil(5 * self.LEAD / self.between(start, end))

    def wait(self) -> None:
        torch.cuda.synchronize()

    def leave_cache(self) -> None:
        for _ in range(self._reads):
            self._elsewhere.sum()

    def mark(self) -> torch.cuda.Event:
        moment = torch.cuda.Event(enable_timing=True)
        moment.record()
        return moment

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3


def clock_of(device: str) -> Clock:
    return CudaClock() if device == "cuda" else HostClock()


def device_seconds(clock: Clock, *passes: Callable[[Any], Any]) -> float:
    """What the device needs for some passes, each of which takes what the one before gave (the first: None).

    Each begins with its data out of the cache and with the host ahead; a pass that waits for the device loses that.
    """
    moments, given = [], None
    for one in passes:
        clock.leave_cache()
        start = clock.mark()
        given = one(given)
        moments.append((start, clock.mark()))
    clock.wait()
    return sum(clock.between(*pair) for pair in moments)


def host_seconds(clock: Clock, *passes: Callable[[Any], Any]) -> float:
    """What the host needs to get through the passes, the device idle before; it waits only where a pass makes it."""
    clock.wait()
    start, given = time.perf_counter(), None
    for one in passes:
        given = one(given)
    took = time.perf_counter() - start
    clock.wait()
    return took
