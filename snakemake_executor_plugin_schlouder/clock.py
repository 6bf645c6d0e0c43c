"""The date, without steps of the system's clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SLEW = 0.05
"""Seconds a second by which the date may go faster or slower, to come to what the system's clock says."""

_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Goes on while the machine is suspended, where the system has such a clock."""


class SteadyClock:
    """Seconds since the epoch, from any thread. A clock that is set (NTP at boot, a person) must make no VM
    late, no absence long and no idle VM young: the date follows slowly."""

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = lambda: time.clock_gettime(_STEADY),
    ) -> None:
        self._wall = wall
        self._steady = steady
        self._lock = threading.Lock()
        self._seen = steady()
        self._date = wall()

    def __call__(self) -> float:
        with self._lock:
            now = self._steady()
            passed, self._seen = now - self._seen, now
            date = self._date + passed
            most = SLEW * passed
            self._date = date + min(most, max(-most, self._wall() - date))
            return self._date
