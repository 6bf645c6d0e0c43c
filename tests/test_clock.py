"""Steps of the system's clock."""

from __future__ import annotations

import time

import pytest

from snakemake_executor_plugin_schlouder.clock import SLEW, SteadyClock


class Clocks:
    def __init__(self) -> None:
        self.steady = 50.0
        self.skew = 0.0
        self.date = SteadyClock(lambda: 1000.0 + self.steady + self.skew, lambda: self.steady)

    def after(self, seconds: float) -> float:
        self.steady += seconds
        return self.date()


@pytest.mark.parametrize("step", [300.0, -300.0])
def test_a_step_is_followed_slowly(step: float) -> None:
    clocks = Clocks()
    before = clocks.after(10)
    clocks.skew = step
    rate = SLEW if step > 0 else -SLEW
    assert clocks.after(100) - before == pytest.approx(100 * (1 + rate))
    for _ in range(100):
        clocks.after(100)
    assert clocks.date() == pytest.approx(1000 + clocks.steady + step)


def test_a_clock_that_is_not_set_is_told_as_it_is() -> None:
    clocks = Clocks()
    assert clocks.after(10) == 1060.0
    assert clocks.after(3600) == 4660.0


def test_by_default_it_is_the_systems_date() -> None:
    assert abs(SteadyClock()() - time.time()) < 1.0
