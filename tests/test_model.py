"""Billing and fleet arithmetic, with numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as values

from snakemake_executor_plugin_schlouder import strategies
from snakemake_executor_plugin_schlouder.fleet import Fleet
from snakemake_executor_plugin_schlouder.model import (
    VM,
    Billing,
    InstanceType,
    Need,
    SchlouderError,
    Task,
    VMState,
)

TYPE = InstanceType("m5.large", 2, 8192)


def task(planned: float | None = None, cpus: int = 1) -> Task:
    return Task("k", "n", "r", "1", "s", Need(cpus, 100), "true", planned=planned)


def vm(requested: float = 0.0, state: VMState = VMState.READY, boot_planned: float = 60.0) -> VM:
    name = f"vm{requested:.0f}"
    return VM(name, "s", TYPE, requested, state=state, boot_planned=boot_planned)


def plan(machine: VM, *tasks: Task, now: float = 1000.0) -> None:
    for each in tasks:
        machine.plan(each, now)


def fleet(*vms: VM, now: float = 1000.0) -> Fleet:
    found = Fleet()
    for machine in vms:
        found.add(machine)
    found.look(now, boot_time=60.0, may_grow=True)
    return found


@pytest.mark.parametrize(
    ("uptime", "units"), [(0, 1), (1, 1), (3599, 1), (3600, 1), (3600.5, 2), (7200, 2), (7201, 3)]
)
def test_started_hours(uptime: float, units: int) -> None:
    assert Billing(3600, 0).units(uptime) == units


@pytest.mark.parametrize(
    ("uptime", "billed"), [(0, 60), (59.5, 60), (60, 60), (60.5, 61), (100, 100)]
)
def test_seconds_with_a_minimum_of_sixty(uptime: float, billed: float) -> None:
    assert Billing(1, 60).billed(uptime) == billed


def test_paid_time_left_is_what_was_billed_and_not_used() -> None:
    assert Billing(3600, 0).paid_left(1000) == 2600
    assert Billing(1, 60).paid_left(10) == 50


UNITS = values.sampled_from([1.0, 60.0, 3600.0, 0.5, 1800.25])
UPTIMES = values.floats(0, 1e6, allow_nan=False)


@given(UNITS, values.sampled_from([0.0, 60.0, 600.0]), UPTIMES)
def test_a_bill_covers_the_uptime_and_not_a_unit_more(
    unit: float, minimum: float, uptime: float
) -> None:
    billing = Billing(unit, minimum)
    billed = billing.billed(uptime)
    assert billed >= max(uptime, minimum, unit) - 1e-6
    assert billed <= max(minimum, unit, uptime + unit) + 1e-6
    assert billing.paid_left(uptime) == billed - uptime


@given(values.integers(1, 10**6), values.sampled_from([1, 60, 3600]))
def test_the_end_of_a_unit_is_still_that_unit(count: int, unit: int) -> None:
    billing = Billing(unit, 0)
    assert billing.units(count * unit) == count
    assert billing.units(count * unit + 0.001) == count + 1


@given(UPTIMES, values.floats(1, 7200))
def test_what_is_left_of_a_quantum_is_less_than_one(until_idle: float, quantum: float) -> None:
    left = Billing(margin=50).left_of_quantum(until_idle, quantum)
    assert -1e-6 <= left <= quantum


@pytest.mark.parametrize(
    ("billing", "boot", "quantum"),
    [
        (Billing(3600, 0), 60, 3600),
        (Billing(1, 60), 60, 600),
        (Billing(1, 60), 2, 60),
        (Billing(1, 0, boot_share=0.5), 60, 120),
    ],
)
def test_the_planning_quantum(billing: Billing, boot: float, quantum: float) -> None:
    assert billing.quantum(boot) == quantum


def test_the_original_kept_a_vm_that_became_idle_inside_the_margin() -> None:
    original = Billing(3600, 0, 50, keeps_late=True)
    assert original.retires_in(3560, idle_for=30, boot_time=60) <= 0
    assert original.retires_in(3560, idle_for=5, boot_time=60) == 40 + 3600 - 50
    assert original.retires_in(3000, idle_for=5, boot_time=60) == 550


def test_with_hours_an_idle_vm_retires_inside_the_margin_only() -> None:
    billing = Billing(3600, 0, 50)
    assert billing.retires_in(3549, idle_for=3000, boot_time=60) > 0
    assert billing.retires_in(3550, idle_for=0, boot_time=60) <= 0
    assert billing.retires_in(3601, idle_for=3000, boot_time=60) > 0


def test_with_seconds_an_idle_vm_retires_after_the_time_of_a_boot() -> None:
    billing = Billing(1, 60)
    assert billing.retires_in(500, idle_for=39, boot_time=40) > 0
    assert billing.retires_in(500, idle_for=40, boot_time=40) <= 0


def test_an_idle_vm_stays_while_its_minimum_charge_lasts() -> None:
    billing = Billing(1, 60, 50)
    assert billing.retires_in(20, idle_for=5, boot_time=5) == 40
    assert billing.retires_in(10, idle_for=5, boot_time=0.5) == 50
    assert billing.retires_in(100, idle_for=0.25, boot_time=0.5) == 0.25


def test_a_node_declares_less_memory_than_its_type_has() -> None:
    assert TYPE.node_memory == 7372
    assert TYPE.fits(Need(2, 7372))
    assert not TYPE.fits(Need(2, 7373))
    assert not TYPE.fits(Need(3, 0))


def test_room_on_a_vm_counts_cpus_and_memory() -> None:
    machine = vm()
    machine.active = {"a": task()}
    assert machine.has_room(Need(1, 7272))
    assert not machine.has_room(Need(1, 7273))
    assert not machine.has_room(Need(2, 100))


def test_idle_date_spreads_the_work_over_the_cpus() -> None:
    machine = vm()
    plan(machine, task(100), task(60), task(40, cpus=2))
    assert machine.idle_at(now=1000) == 1000 + (100 + 60 + 80) / 2


def test_idle_date_of_a_booting_vm_starts_when_it_is_up() -> None:
    machine = vm(requested=1000, state=VMState.BOOTING, boot_planned=30.0)
    plan(machine, task(100))
    assert machine.idle_at(now=1010) == 1030 + 50


def test_idle_date_counts_only_what_is_left_of_a_running_task() -> None:
    machine = vm()
    running = task(100)
    machine.active = {"a": running}
    running.started = 950.0
    machine.recount(1000)
    assert machine.idle_at(now=1000) == 1000 + 25
    assert machine.idle_at(now=2000) == 2000


def test_one_vm_for_all_starts_one_and_then_stays_with_it() -> None:
    strategy = strategies.make("one-vm-for-all")
    first, second = vm(1), vm(2)
    assert strategy.choose(task(), fleet()) is None
    assert strategy.choose(task(), fleet(first, second)) is first


def test_one_vm_per_job_always_asks_for_a_new_one() -> None:
    assert strategies.make("one-vm-per-job").choose(task(), fleet(vm())) is None


def test_the_vm_idle_first_has_least_left_to_do() -> None:
    busy, free = vm(1), vm(2)
    plan(busy, task(100))
    assert fleet(busy, free).idle_first() is free
    assert fleet().idle_first() is None


def test_an_unknown_strategy_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        SchlouderError,
        match="known are " + ", ".join(strategies.known()),
    ):
        strategies.make("fastest-ever")


def test_a_strategy_of_the_users_own_is_named_by_module_and_class() -> None:
    assert isinstance(
        strategies.make("snakemake_executor_plugin_schlouder.strategies:Asap"), strategies.Asap
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:X", "cannot be imported"),
        ("json:NoSuchClass", "cannot be imported"),
        (":X", "cannot be imported"),
        ("json:JSONDecoder", "is no strategy; it lacks name, reuses_vms, one_type, choose"),
        ("zipfile:ZipFile", "cannot be made"),
        ("sys:exit", "is no class"),
    ],
)
def test_what_is_no_strategy_is_told(name: str, message: str) -> None:
    with pytest.raises(SchlouderError) as caught:
        strategies.make(name)
    assert message in str(caught.value)
    assert repr(name) in str(caught.value)


def test_a_package_may_offer_strategies_by_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "mine-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: mine\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[schlouder.strategies]\nmine = snakemake_executor_plugin_schlouder.strategies:Afap\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(strategies.make("mine"), strategies.Afap)


def test_a_vm_with_more_tasks_than_slots_is_free_when_those_that_end_last_are_done() -> None:
    machine = VM("vm", "s", InstanceType("m5.xlarge", 4, 16384), 0.0, state=VMState.READY)
    for seconds in (100, 200, 300, 400):
        running = task(seconds)
        running.started = 1000.0
        machine.active[str(seconds)] = running
    assert machine.frees(2, now=1000) == (1300, 1400)
    del machine.active["300"]
    assert sorted(machine.frees(4, now=1000)) == [1000, 1100, 1200, 1400]
