"""The books: what VMs and rules have cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as values

from snakemake_executor_plugin_schlouder.costs import (
    IDLE,
    account,
    bill_of,
    keeping_bill,
    spot_bills,
)
from snakemake_executor_plugin_schlouder.journal import TaskRecord, VMRecord
from snakemake_executor_plugin_schlouder.market.tariff import SpotHistory
from snakemake_executor_plugin_schlouder.model import ON_DEMAND, SPOT, Billing

SECONDS = Billing(1, 60)
HOURS = Billing(3600, 0)
NOW = 9999.0


def vm(begun: float = 1000.0, ended: float | None = 1360.0, **changes: object) -> VMRecord:
    made = VMRecord(
        name="vm1",
        strategy="asap",
        instance_type="m5.large",
        state="gone",
        instance_id="i-1",
        requested=begun - 2,
        ready=begun + 30,
        ended=None if ended is None else ended + 3,
        reason="",
        leader=None,
        market=ON_DEMAND,
        price=0.36,
        zone="a",
        meter=begun,
        meter_end=ended,
        list_price=0.36,
        paid=None,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def ran(rule: str, start: float, end: float, cpus: int = 1, on: str = "vm1") -> TaskRecord:
    return TaskRecord(
        f"{rule}-{start}", "1", rule, rule, "complete", None, 0.0, start, end, on, "", cpus
    )


@pytest.mark.parametrize(
    ("billing", "seconds", "billed", "units"),
    [
        (SECONDS, 360, 360, 360),
        (SECONDS, 10, 60, 60),
        (HOURS, 3600, 3600, 1),
        (HOURS, 3601, 7200, 2),
    ],
)
def test_a_vm_is_billed_by_what_the_provider_says_of_its_meter(
    billing: Billing, seconds: float, billed: float, units: int
) -> None:
    bill = bill_of(vm(ended=1000.0 + seconds), (), billing, NOW)
    assert (bill.billed, bill.units) == (billed, units)
    assert bill.usd == pytest.approx(0.36 * billed / 3600)


def test_without_the_providers_word_a_vm_costs_from_request_to_end() -> None:
    bill = bill_of(vm(meter=None, meter_end=None), (), SECONDS, NOW)
    assert bill.seconds == 365
    assert bill_of(vm(meter_end=None, ended=None), (), SECONDS, 2000.0).seconds == 1000


def test_a_spot_machine_taken_back_in_its_first_hour_is_free() -> None:
    reason = "Server.SpotInstanceTermination: taken"
    taken = vm(market=SPOT, reason=reason, price=0.1)
    bill = bill_of(taken, (), SECONDS, NOW)
    assert (bill.units, bill.usd) == (0, 0.0)
    late = bill_of(replace(taken, meter_end=4601.0), (), SECONDS, NOW)
    assert late.units == 3601
    given_back = replace(taken, reason="EC2 takes the spot machine back")
    assert bill_of(given_back, (), SECONDS, NOW).units == 360


def test_the_idle_share_is_when_nothing_ran() -> None:
    used = [ran("a", 1060, 1180), ran("b", 1120, 1240), ran("a", 1300, 1400)]
    bill = bill_of(vm(), used, SECONDS, NOW)
    assert bill.idle == pytest.approx(1 - (180 + 60) / 360)


def test_rules_share_what_was_busy_by_their_cpu_seconds() -> None:
    used = [ran("wide", 1000, 1180, cpus=3), ran("small", 1000, 1180)]
    spent = account([vm()], used, SECONDS, NOW)
    assert spent.usd == pytest.approx(0.036)
    assert spent.rules == pytest.approx({"wide": 0.0135, "small": 0.0045, IDLE: 0.018})


def test_companions_of_a_gang_cost_what_their_leaders_tasks_do() -> None:
    companion = vm(name="vm2", leader="vm1", instance_id="i-2")
    spent = account([vm(), companion], [ran("mpi", 1000, 1360)], SECONDS, NOW)
    assert spent.rules == pytest.approx({"mpi": 0.072, IDLE: 0.0})


def test_what_was_never_started_costs_nothing_and_unknown_prices_are_no_zero() -> None:
    spent = account([vm(), vm(name="vm2", instance_id=None)], [], SECONDS, NOW)
    assert (len(spent.bills), spent.units) == (1, 360)
    assert account([vm(price=None)], [], SECONDS, NOW).usd is None


def test_spot_machines_cost_the_price_of_their_time() -> None:
    history = SpotHistory.of([("m5.large", "a", 0.0, 0.36), ("m5.large", "a", 1180.0, 0.72)])
    machine = vm(market=SPOT)
    paid = spot_bills([machine], history, SECONDS, NOW)
    assert paid == pytest.approx({"vm1": 180 * 0.0001 + 180 * 0.0002})
    spent = account([replace(machine, paid=paid["vm1"])], [], SECONDS, NOW)
    assert spent.saving == pytest.approx(0.036 - 0.054)
    short = spot_bills([vm(market=SPOT, meter_end=1010.0)], history, SECONDS, NOW)
    assert short == pytest.approx({"vm1": 60 * 0.0001})
    assert spot_bills([vm(market=SPOT, zone="b")], history, SECONDS, NOW) == {}


@given(
    values.sampled_from([SECONDS, HOURS, Billing(60, 60), Billing(3600, 60)]),
    values.lists(values.floats(0, 9000), min_size=1, max_size=5),
)
def test_runs_that_hand_a_vm_on_pay_together_what_the_provider_bills(
    billing: Billing, ends: list[float]
) -> None:
    dates = [1000 + sum(ends[: number + 1]) for number in range(len(ends))]
    handed_on = [
        replace(vm(ended=None, taken=taken), ended=end)
        for taken, end in zip([None, *dates], dates, strict=False)
    ]
    bills = [bill_of(each, (), billing, NOW) for each in handed_on]
    assert sum(bill.billed for bill in bills) == billing.billed(dates[-1] - 1000)
    assert sum(bill.seconds for bill in bills) == pytest.approx(dates[-1] - 1000)
    assert all(bill.units >= 0 for bill in bills)


def test_under_hourly_billing_the_first_run_has_paid_the_hour_that_the_next_one_uses() -> None:
    first = vm(ended=None, state="handed over")
    first = replace(first, ended=2000.0, kept_until=4490.0)
    assert bill_of(first, (), HOURS, NOW).units == 1
    assert keeping_bill(first, HOURS) == 0.0
    assert keeping_bill(first, SECONDS) == pytest.approx(2550 * 0.0001)
    assert keeping_bill(replace(first, kept_until=5000.0), HOURS) == pytest.approx(0.36)
    assert keeping_bill(replace(first, price=None), HOURS) is None
    second = vm(ended=4600.0, taken=2000.0)
    assert bill_of(second, (), HOURS, NOW).units == 0
    third = vm(ended=4601.0, taken=2000.0)
    assert bill_of(third, (), HOURS, NOW).units == 1


def test_the_idle_time_between_two_runs_is_the_second_ones() -> None:
    bill = bill_of(vm(ended=1500.0, taken=1200.0), [ran("a", 1400, 1475)], SECONDS, NOW)
    assert (bill.seconds, bill.billed, bill.idle) == (300, 300, 0.75)


def test_spot_prices_are_paid_by_the_run_of_their_time() -> None:
    history = SpotHistory.of([("m5.large", "a", 0.0, 0.36), ("m5.large", "a", 1180.0, 0.72)])
    first = replace(vm(market=SPOT), meter_end=None, ended=1180.0)
    second = vm(market=SPOT, ended=1360.0, taken=1180.0)
    assert spot_bills([first], history, SECONDS, NOW) == pytest.approx({"vm1": 180 * 0.0001})
    assert spot_bills([second], history, SECONDS, NOW) == pytest.approx({"vm1": 180 * 0.0002})


SPANS = values.lists(
    values.tuples(values.floats(0, 500), values.floats(1, 400), values.integers(1, 8)), max_size=9
)


@given(SPANS, values.floats(1, 5000))
def test_rules_and_idle_time_add_up_to_the_bill(
    spans: list[tuple[float, float, int]], seconds: float
) -> None:
    used = [
        ran(f"r{number % 3}", 1000 + start, 1000 + start + took, cpus)
        for number, (start, took, cpus) in enumerate(spans)
    ]
    spent = account([vm(ended=1000 + seconds)], used, SECONDS, NOW)
    assert sum(spent.rules.values()) == pytest.approx(spent.usd)
    assert all(usd >= -1e-9 for usd in spent.rules.values())
    assert 0 <= spent.idle <= 1
