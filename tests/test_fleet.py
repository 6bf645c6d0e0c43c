"""The fleet's sorted lists answer as a look at every VM would."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as values

from snakemake_executor_plugin_schlouder.fleet import Fleet
from snakemake_executor_plugin_schlouder.model import VM, Billing, InstanceType, Need, Task, VMState

ONE_CORE = InstanceType("one-core", 1, 4096)
QUANTUM = 3600.0


def task(seconds: float) -> Task:
    return Task("k", "n", "r", "1", "s", Need(1, 1), "", planned=seconds)


def vm(number: int, requested: float) -> VM:
    return VM(f"vm{number}", "s", ONE_CORE, requested, 30.0, state=VMState.READY)


STEPS = values.lists(
    values.tuples(values.integers(0, 5), values.integers(1, 2000), values.integers(0, 500)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=200)
@given(STEPS, values.integers(1, 3000))
def test_questions_are_answered_as_by_a_look_at_every_vm(
    steps: list[tuple[int, int, int]], asked: int
) -> None:
    fleet = Fleet(Billing(QUANTUM, 0, 50))
    vms = [vm(number, 10.0 * number) for number in range(6)]
    for machine in vms:
        fleet.add(machine)
    now = 100.0
    for number, seconds, passed in steps:
        fleet.look(now, 60.0, may_grow=True)
        vms[number].plan(task(seconds), now)
        fleet.update(vms[number])
        now += passed
    fleet.look(now, 60.0, may_grow=True)
    dates = [machine.idle_at(now) for machine in vms]
    first = fleet.idle_first()
    assert first is not None
    assert first.idle_at(now) == min(dates)
    limit = now + asked
    assert fleet.idle_before(limit) == [
        v for v, date in zip(vms, dates, strict=True) if date < limit
    ]
    _check_tightest(fleet, vms, task(asked))


def _check_tightest(fleet: Fleet, vms: list[VM], wanted: Task) -> None:
    fitting = [machine for machine in vms if fleet.fits(machine, wanted)]
    found = fleet.tightest(wanted)
    if not fitting:
        assert found is None
        return
    assert found is not None
    least = min(fleet.paid_left(machine, wanted) for machine in fitting)
    assert abs(fleet.paid_left(found, wanted) - least) < 1e-3
