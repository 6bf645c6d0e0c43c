"""Predictors: how long a boot will take."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Protocol

from .model import DEFAULT_BOOT_TIME


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
