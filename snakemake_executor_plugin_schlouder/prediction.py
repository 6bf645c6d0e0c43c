"""Predictors: how long a boot and a task will take."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Protocol

from .model import DEFAULT_BOOT_TIME, DEFAULT_WALLTIME


class BootPredictor(Protocol):
    def predict(self, booting: int) -> float:
        """Seconds from request to ready of a VM requested now, while `booting` others boot."""
        ...

    def learn(self, seconds: float) -> None:
        """A boot was measured."""
        ...


@dataclass
class MeasuredBoots:
    """The median of the boots measured so far."""

    _boots: list[float] = field(default_factory=list)

    def predict(self, booting: int) -> float:
        return statistics.median(self._boots) if self._boots else DEFAULT_BOOT_TIME

    def learn(self, seconds: float) -> None:
        self._boots.append(seconds)


@dataclass(frozen=True)
class LinearBoots:
    """The rule of the original Schlouder: `base` s for the first VM and `step` s more for each one that
    boots beside it."""

    base: float
    step: float

    def predict(self, booting: int) -> float:
        return float(round(self.base + self.step * (booting + 1)))

    def learn(self, seconds: float) -> None:
        """The rule is given, not learned."""


PRIOR_SPREAD = 0.1
"""Standard deviation of walltimes nothing is known of, as a share of the estimate."""

_PRIOR_TASKS = 3.0
_PRIOR_SLOPE = 0.1


@dataclass
class _Sums:
    """Over the ended tasks of a rule: count, and sums of estimates x and walltimes y."""

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0


@dataclass(frozen=True)
class Line:
    """walltime = offset + factor * estimate, give or take `noise`; seconds. `doubt` holds the elements
    (1,1), (1,2), (2,2) of the inverse normal matrix: how little offset and factor are known."""

    offset: float = 0.0
    factor: float = 1.0
    noise: float = 0.0
    doubt: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __call__(self, estimate: float) -> float:
        return max(0.0, self.offset + self.factor * estimate)

    def spread(self, estimate: float) -> float:
        """Standard deviation of a walltime around its expectation; larger where nothing was seen yet."""
        d11, d12, d22 = self.doubt
        return self.noise * math.sqrt(1 + d11 + estimate * (2 * d12 + d22 * estimate))


class Walltimes:
    """What is learned of users' estimates, rule by rule, while tasks end.

    A line through (estimate, walltime) by least squares, for users tend to forget what every task
    costs at its start. A few imagined tasks with exact estimates keep the first results from
    swinging its level, and a weak pull towards factor 1 holds where all estimates are alike.
    """

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}
        self._lines: dict[str, Line] = {}
        self._all = _Sums()

    def learn(self, rule: str, estimate: float | None, took: float) -> None:
        """A task of `rule` took `took` s."""
        x = DEFAULT_WALLTIME if estimate is None else estimate
        for sums in (self._sums.setdefault(rule, _Sums()), self._all):
            sums.n += 1
            sums.x += x
            sums.y += took
            sums.xx += x * x
            sums.xy += x * took
            sums.yy += took * took
        self._lines.pop(rule, None)

    def line(self, rule: str) -> Line | None:
        """From estimate to walltime; None before anything was learned."""
        if rule not in self._lines and rule in self._sums:
            self._lines[rule] = _fitted(self._sums[rule])
        return self._lines.get(rule)

    def expected(self, rule: str, estimate: float | None) -> float:
        """Seconds a task of `rule` is taken to run."""
        x = DEFAULT_WALLTIME if estimate is None else estimate
        line = self.line(rule)
        return x if line is None else line(x)

    @property
    def learned(self) -> float:
        """How many tasks were seen to end."""
        return self._all.n

    def foreseen(self, rule: str, estimate: float | None) -> float:
        """As `expected`; of a rule nothing is known of, the estimates are taken to be as wrong as those
        of all others together."""
        x = DEFAULT_WALLTIME if estimate is None else estimate
        line = self.line(rule)
        if line is not None:
            return line(x)
        return x * self._all.y / self._all.x if self._all.x else x


def _fitted(sums: _Sums) -> Line:
    x = sums.x / sums.n
    slope = _PRIOR_SLOPE * sums.xx / sums.n
    a11, a12 = sums.n + _PRIOR_TASKS, sums.x + _PRIOR_TASKS * x
    a22 = sums.xx + _PRIOR_TASKS * x * x + slope
    b1, b2 = sums.y + _PRIOR_TASKS * x, sums.xy + _PRIOR_TASKS * x * x + slope
    det = a11 * a22 - a12 * a12
    offset = (a22 * b1 - a12 * b2) / det
    factor = max(0.1, (a11 * b2 - a12 * b1) / det)
    residues = (
        sums.yy
        - 2 * (offset * sums.y + factor * sums.xy)
        + offset * (offset * sums.n + 2 * factor * sums.x)
        + factor * factor * sums.xx
    )
    prior = _PRIOR_TASKS * (PRIOR_SPREAD * x) ** 2
    noise = math.sqrt((max(0.0, residues) + prior) / (sums.n + _PRIOR_TASKS))
    return Line(offset, factor, noise, (a22 / det, -a12 / det, a11 / det))
