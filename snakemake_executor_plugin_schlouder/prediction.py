"""Predictors: how long a boot and a task will take."""

from __future__ import annotations

import math
import random
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

from .model import DEFAULT_BOOT_TIME, estimate_of


class BootPredictor(Protocol):
    def predict(self, booting: int) -> float:
        """Seconds from request to ready of a VM requested now, while `booting` others boot."""
        ...

    def learn(self, seconds: float, booting: int = 0) -> None:
        """A boot took `seconds`; `booting` others booted when it was requested."""
        ...


@dataclass(frozen=True)
class LinearBoots:
    """The rule of the original Schlouder: `base` s for the first VM and `step` s more for each one that
    boots beside it."""

    base: float
    step: float

    def predict(self, booting: int) -> float:
        return float(round(self.base + self.step * (booting + 1)))

    def learn(self, seconds: float, booting: int = 0) -> None:
        """The rule is given, not learned."""


class LearnedBoots:
    """A given rule, corrected by the boots that were measured.

    What is learned is by how many seconds boots miss the rule; the median of the latest ones corrects
    it, so that a boot that hung changes nothing.
    """

    def __init__(self, rule: BootPredictor | None = None) -> None:
        self._rule = rule or LinearBoots(DEFAULT_BOOT_TIME, 0.0)
        self._misses: deque[float] = deque(maxlen=_LATEST_BOOTS)
        self._correction: float | None = 0.0
        self._longest = 0.0
        self._most_booting = 0

    @property
    def state(self) -> list[float]:
        """All that was learned of the default rule, for `of`."""
        return [self._longest, float(self._most_booting), *self._misses]

    @classmethod
    def of(cls, state: Sequence[float]) -> LearnedBoots:
        found = cls()
        if state:
            found._longest, found._most_booting = state[0], int(state[1])
            found._misses.extend(state[2:])
            found._correction = None if state[2:] else 0.0
        return found

    def learn(self, seconds: float, booting: int = 0) -> None:
        """A boot took `seconds`; `booting` others booted when it was requested."""
        self._misses.append(seconds - self._rule.predict(booting))
        self._longest = max(self._longest, seconds)
        self._most_booting = max(self._most_booting, booting)
        self._correction = None

    def predict(self, booting: int) -> float:
        """Never beyond the longest boot measured: strategies act on it, and a rule for many boots at
        once may be far off where the cloud boots them side by side."""
        expected = self.expected(booting)
        return min(expected, self._longest) if self._misses else expected

    def expected(self, booting: int) -> float:
        """The corrected rule alone: also for more VMs booting at once than ever did."""
        if self._correction is None:
            self._correction = statistics.median(self._misses)
        return max(_SHORTEST_BOOT, self._rule.predict(booting) + self._correction)

    def draw(self, booting: int, chance: random.Random, growth: float = 1.0) -> float:
        """A boot as it may turn out around what is expected. `growth` scales what the rule adds for
        more VMs booting at once than were ever seen to."""
        seen = self._rule.predict(min(booting, self._most_booting))
        beyond = self._rule.predict(booting) - seen
        miss = chance.choice(self._misses) if self._misses else 0.0
        return max(_SHORTEST_BOOT, seen + growth * beyond + miss)


_LATEST_BOOTS = 200
_SHORTEST_BOOT = 1.0

PRIOR_SPREAD = 0.1
"""Standard deviation of walltimes nothing is known of, as a share of the estimate."""

_PRIOR_TASKS = 3.0
_PRIOR_SLOPE = 0.1

_OUTLIER = 5.0
_HUNG = 20.0
_FEW = 10

_REFIT = 1.02
"""A line is fitted anew when this times the tasks it rests on have ended."""


@dataclass
class _Sums:
    """Over the ended tasks of a rule: count, and sums of estimates x and walltimes y. `weight`: of how
    many tasks with exact estimates the belief in the users is worth."""

    weight: float = 0.0
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
        self._fitted_with: dict[str, float] = {}
        self._all = _Sums()

    @property
    def state(self) -> dict[str, list[float]]:
        """All that was learned, for `of`; the sums over all rules under the empty name."""
        sums = {"": self._all, **self._sums}
        return {rule: list(astuple(found)) for rule, found in sums.items()}

    @classmethod
    def of(cls, state: Mapping[str, Sequence[float]]) -> Walltimes:
        found = cls()
        found._sums = {rule: _Sums(*values) for rule, values in state.items()}
        found._all = found._sums.pop("", _Sums())
        return found

    def learn(self, rule: str, estimate: float | None, took: float) -> None:
        """A task of `rule` took `took` s."""
        x = estimate_of(estimate)
        y = self._trimmed(rule, x, took)
        weight = _PRIOR_TASKS if estimate is not None else 0.0
        known = self._sums.get(rule) or _Sums(weight)
        for sums in (known, self._all):
            sums.n += 1
            sums.x += x
            sums.y += y
            sums.xx += x * x
            sums.xy += x * y
            sums.yy += y * y
        self._sums[rule] = known
        if known.n > _REFIT * self._fitted_with.get(rule, 0.0):
            self._lines.pop(rule, None)

    def _trimmed(self, rule: str, estimate: float, took: float) -> float:
        """A task that hung says little about the others: it counts as far as it may be noise."""
        line = self.line(rule)
        if line is None:
            return min(took, _HUNG * estimate) if estimate > 0 else took
        expected = line(estimate)
        if self._sums[rule].n < _FEW:
            return min(took, _HUNG * max(expected, estimate, 1.0))
        if abs(took - expected) <= _OUTLIER * line.noise:
            return took
        reach = _OUTLIER * line.spread(estimate)
        return min(expected + reach, max(expected - reach, took))

    def line(self, rule: str) -> Line | None:
        """From estimate to walltime; None before anything was learned."""
        if rule not in self._lines and rule in self._sums:
            self._lines[rule] = _fitted(self._sums[rule])
            self._fitted_with[rule] = self._sums[rule].n
        return self._lines.get(rule)

    def expected(self, rule: str, estimate: float | None) -> float:
        """Seconds a task of `rule` is taken to run."""
        x = estimate_of(estimate)
        line = self.line(rule)
        return x if line is None else line(x)

    def knows(self, rule: str) -> bool:
        return rule in self._sums

    def spread(self, rule: str) -> float:
        """Standard deviation of the walltimes of `rule` around what is expected, as a share of it."""
        line = self.line(rule)
        if line is None:
            return PRIOR_SPREAD
        mean = self._sums[rule].x / self._sums[rule].n
        return line.noise / line(mean) if line(mean) else PRIOR_SPREAD

    @property
    def learned(self) -> float:
        """How many tasks were seen to end."""
        return self._all.n

    def foreseen(self, rule: str, estimate: float | None) -> float:
        """As `expected`; of a rule nothing is known of, the estimates are taken to be as wrong as those
        of all others together."""
        x = estimate_of(estimate)
        line = self.line(rule)
        if line is not None:
            return line(x)
        return x * self._all.y / self._all.x if self._all.x else x


def _fitted(sums: _Sums) -> Line:
    x = sums.x / sums.n
    slope = max(1.0, _PRIOR_SLOPE * sums.xx / sums.n)
    a11, a12 = sums.n + sums.weight, sums.x + sums.weight * x
    a22 = sums.xx + sums.weight * x * x + slope
    b1, b2 = sums.y + sums.weight * x, sums.xy + sums.weight * x * x + slope
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
