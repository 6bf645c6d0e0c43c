"""The books of a run's VMs."""

from __future__ import annotations

import math

from snakemake_executor_plugin_schlouder.machines import Machines
from snakemake_executor_plugin_schlouder.model import VM, InstanceType, VMState


def idle(machines: Machines, name: str) -> VM:
    vm = VM(name, "s", InstanceType("one", 1, 4096), 0.0, state=VMState.READY)
    vm.idle_since = 10.0
    machines.add(vm)
    return vm


def test_a_vm_that_is_looked_at_every_round_is_noted_once() -> None:
    machines = Machines()
    vm = idle(machines, "a")
    for _ in range(1000):
        machines.retire_at(vm, 60.0)
    assert machines.due(60.0) == [vm]
    assert machines.due(60.0) == []


def test_a_vm_is_due_at_the_earliest_date_and_again_when_it_was_kept() -> None:
    machines = Machines()
    vm = idle(machines, "a")
    machines.retire_at(vm, 60.0)
    assert machines.next_retirement() == 60.0
    assert machines.due(59.0) == []
    assert machines.due(60.0) == [vm]
    machines.retire_at(vm, 60.0)
    assert machines.due(60.0) == [vm]


def test_a_vm_that_got_work_is_not_due() -> None:
    machines = Machines()
    vm = idle(machines, "a")
    machines.retire_at(vm, 60.0)
    machines.move(vm, VMState.DRAINING)
    assert machines.next_retirement() == math.inf


def test_a_vm_that_comes_back_is_counted_again() -> None:
    """As one does whose machine came after it had been given up."""
    machines, vm = Machines(), VM("a", "s", InstanceType("one", 1, 4096), 0.0)
    machines.add(vm)
    for state, alive in ((VMState.GONE, 0), (VMState.TERMINATING, 1), (VMState.GONE, 0)):
        machines.move(vm, state)
        assert machines.alive == alive


def test_vms_that_have_ended_are_not_among_those_to_be_looked_at() -> None:
    machines, kind = Machines(), InstanceType("one", 1, 4096)
    ended, handed_over, up = (VM(name, "s", kind, 0.0) for name in "abc")
    for vm in (ended, handed_over, up):
        machines.add(vm)
    machines.move(ended, VMState.GONE)
    machines.move(handed_over, VMState.HANDED_OVER)
    machines.move(up, VMState.READY)
    assert machines.living() == [up]
    machines.move(ended, VMState.TERMINATING)
    assert machines.living() == [up, ended]
    assert list(machines) == [ended, handed_over, up]
