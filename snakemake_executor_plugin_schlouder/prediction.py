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


_PRIOR_TASKS = 3.0
_PRIOR_SPREAD = 0.1


@dataclass
class _Ratios:
    """Sums over the tasks of a rule: estimates, what they took, logarithms of the ratio."""

    estimated: float = 0.0
    took: float = 0.0
    count: int = 0
    logs: float = 0.0
    squares: float = 0.0


class Walltimes:
    """What was learned of users' estimates, rule by rule, while tasks ended.

    A few imagined tasks with exact estimates keep the first results from swinging it.
    """

    def __init__(self) -> None:
        self._rules: dict[str, _Ratios] = {}
        self._bias: dict[str, float] = {}

    def learn(self, rule: str, estimate: float | None, took: float) -> None:
        """A task of `rule` took `took` s."""
        estimate = DEFAULT_WALLTIME if estimate is None else estimate
        if estimate <= 0 or took <= 0:
            return
        ratios = self._rules.setdefault(rule, _Ratios())
        ratios.estimated += estimate
        ratios.took += took
        ratios.count += 1
        log = math.log(took / estimate)
        ratios.logs += log
        ratios.squares += log * log
        prior = _PRIOR_TASKS * ratios.estimated / ratios.count
        self._bias[rule] = (ratios.took + prior) / (ratios.estimated + prior)

    def bias(self, rule: str) -> float:
        """By what estimates of `rule` are to be multiplied."""
        return self._bias.get(rule, 1.0)

    def spread(self, rule: str) -> float:
        """Standard deviation of ln(walltime / estimate)."""
        ratios = self._rules.get(rule)
        if ratios is None:
            return _PRIOR_SPREAD
        mean = ratios.logs / ratios.count
        around = max(0.0, ratios.squares - ratios.count * mean * mean)
        return math.sqrt((around + _PRIOR_TASKS * _PRIOR_SPREAD**2) / (ratios.count + _PRIOR_TASKS))

    def expected(self, rule: str, estimate: float | None) -> float:
        """Seconds a task of `rule` is taken to run."""
        return (DEFAULT_WALLTIME if estimate is None else estimate) * self.bias(rule)
