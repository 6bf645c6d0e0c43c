"""Predictors: how long a boot and a task will take."""

from __future__ import annotations

import math
import random
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from .model import DEFAULT_BOOT_TIME, DEFAULT_WALLTIME

PRIOR_TASKS = 3.0
"""How many tasks the belief in the users' estimates weighs: the first two results hardly move it."""

PRIOR_SPREAD = 0.2
"""Standard deviation of ln(real/estimate) before anything was measured."""

_OUTLIER = 3.0
"""Deviations count for at most so many spreads: one task that hung says little about the others."""

_LATEST_BOOTS = 200
_SHORTEST_BOOT = 1.0


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


@dataclass
class _Rule:
    """Sums over the results of one rule, in seconds; `estimated` and `real` over those with an estimate.
    `deviation` sums the squared deviations of ln(real/estimate) from its running `centre`."""

    results: int = 0
    total: float = 0.0
    estimates: int = 0
    estimated: float = 0.0
    real: float = 0.0
    ratios: int = 0
    centre: float = 0.0
    deviation: float = 0.0

    def bias(self) -> float:
        if self.estimated <= 0:
            return 1.0
        prior = PRIOR_TASKS * self.estimated / self.estimates
        return (prior + self.real) / (prior + self.estimated)

    def spread(self) -> float:
        prior = PRIOR_TASKS * PRIOR_SPREAD**2
        return math.sqrt((prior + self.deviation) / (PRIOR_TASKS + max(0, self.ratios - 1)))

    def add_ratio(self, ratio: float) -> None:
        """Welford's running variance of deviations cut at `_OUTLIER` spreads."""
        self.ratios += 1
        if self.ratios == 1:
            self.centre = ratio
            return
        bound = _OUTLIER * self.spread()
        step = min(bound, max(-bound, ratio - self.centre))
        self.centre += step / self.ratios
        self.deviation += step * step * (self.ratios - 1) / self.ratios


class Walltimes:
    """What real walltimes say about the users' estimates, rule by rule.

    A result is learned and a walltime predicted in constant time. Sums are unbiased: over many tasks
    of a rule, the sum of what is expected tends to the sum of what they take.
    """

    def __init__(self) -> None:
        self._rules: dict[str, _Rule] = {}

    def learn(self, rule: str, estimate: float | None, real: float) -> None:
        """A task of `rule` took `real` seconds where the user had said `estimate`, or nothing."""
        known = self._rules.setdefault(rule, _Rule())
        known.results += 1
        known.total += real
        if estimate is None:
            return
        known.estimates += 1
        known.estimated += estimate
        known.real += real
        if estimate > 0 and real > 0:
            known.add_ratio(math.log(real / estimate))

    def expected(self, rule: str, estimate: float | None) -> float:
        """Seconds; without an estimate the mean of the rule."""
        if estimate is not None:
            return estimate * self.bias(rule)
        known = self._rules.get(rule)
        return known.total / known.results if known else DEFAULT_WALLTIME

    def bias(self, rule: str) -> float:
        """Sum of real walltimes / sum of estimates, with a prior of 1."""
        known = self._rules.get(rule)
        return known.bias() if known else 1.0

    def spread(self, rule: str) -> float:
        """Standard deviation of ln(real/estimate), with a prior; single outliers hardly move it."""
        known = self._rules.get(rule)
        return known.spread() if known else PRIOR_SPREAD

    def knows(self, rule: str) -> bool:
        return rule in self._rules
