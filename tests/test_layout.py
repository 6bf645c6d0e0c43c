"""Layouts of a batch: bounds that hold, goals that are kept, work that is never lost."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as values

from snakemake_executor_plugin_schlouder.layout import Batch, Seat, play
from snakemake_executor_plugin_schlouder.model import Billing

HOURS = Billing(3600, 0, 50)
SECONDS = Billing(1, 60, 50)
BOOT = 60.0


def batch(*lengths: float, vms: int = 10, billing: Billing = HOURS) -> Batch:
    """A batch at date 0 that may start `vms` VMs."""
    offers = [Seat(f"new {n}", (BOOT,), 0.0, True) for n in range(vms)]
    ordered = sorted(lengths, reverse=True)
    return Batch(0.0, ordered, [], offers, billing, BOOT, len(ordered))


def test_the_fastest_layout_has_a_vm_for_every_task() -> None:
    layout = batch(300, 200, 100).fastest()
    assert (layout.new, layout.finish) == (2, BOOT + 300)


def test_a_vm_that_gains_next_to_nothing_is_not_started() -> None:
    lengths = [100.0] * 9 + [98.0]
    assert batch(*lengths).fastest().new == 10
    assert batch(*lengths, 104.0).fastest(patience=160.0).new < 10


def test_the_cheapest_layout_fills_one_hour_before_it_buys_another() -> None:
    layout = batch(*[500] * 6).cheapest(by=36000)
    assert (layout.new, layout.cost) == (1, 3600)


def test_hours_that_cost_the_same_are_bought_side_by_side() -> None:
    layout = batch(*[500] * 12).cheapest(by=36000)
    assert (layout.new, layout.cost) == (2, 7200)


def test_with_seconds_as_few_vms_as_end_in_time_are_started() -> None:
    layout = batch(*[500] * 12, billing=SECONDS).cheapest(by=3060)
    assert (layout.new, layout.finish) == (2, BOOT + 3000)
    assert layout.cost == 2 * (BOOT + 3000)


def test_what_cannot_end_in_time_does_not_fit() -> None:
    assert not batch(500, vms=1).cheapest(by=400).fits


def test_a_seat_gets_work_to_the_end_of_the_unit_that_is_paid() -> None:
    one = batch(*[500] * 6)
    layout = one.cheapest(by=36000)
    assert one.paid_until(one.offers[0], layout) == 3550


LENGTHS = values.lists(values.floats(1, 2000), min_size=1, max_size=40)
BILLINGS = values.sampled_from([HOURS, SECONDS, Billing(60, 0, 50)])


@given(LENGTHS, values.integers(1, 8))
def test_play_loses_no_work(lengths: list[float], vms: int) -> None:
    ordered = sorted(lengths, reverse=True)
    seats = [Seat(str(n), (0.0,), 0.0) for n in range(vms)]
    left, ends = play(ordered, seats, {seat.name: 1500.0 for seat in seats})
    assert left + sum(ends.values()) == pytest.approx(sum(lengths))
    assert all(end <= 1500.001 for end in ends.values())


@given(LENGTHS, values.integers(1, 8), BILLINGS)
def test_no_layout_beats_its_bounds(lengths: list[float], vms: int, billing: Billing) -> None:
    asked = batch(*lengths, vms=vms, billing=billing)
    layout = asked.fastest()
    work = sum(lengths)
    assert layout.fits
    assert layout.finish >= BOOT + max(work / vms, max(lengths)) - 1e-6
    assert layout.cost >= work - 1e-6


@given(LENGTHS, values.integers(1, 8), BILLINGS)
def test_the_cheapest_layout_by_a_date_ends_by_then_and_costs_hardly_more_than_the_fastest(
    lengths: list[float], vms: int, billing: Billing
) -> None:
    asked = batch(*lengths, vms=vms, billing=billing)
    fastest = asked.fastest()
    layout = asked.cheapest(by=fastest.finish + 1)
    if layout.fits:
        assert layout.finish <= fastest.finish + 1.001
        # Both are list schedules: with long units one may hit a cut by luck that the other misses.
        luck = billing.unit if asked.has_long_units else 0.0
        assert layout.cost <= fastest.cost + luck + 1e-6


@given(LENGTHS, values.integers(1, 8), BILLINGS)
def test_with_all_the_time_of_the_world_there_is_always_a_layout(
    lengths: list[float], vms: int, billing: Billing
) -> None:
    layout = batch(*lengths, vms=vms, billing=billing).cheapest(by=1e9)
    assert layout.fits
    assert layout.cost < math.inf
