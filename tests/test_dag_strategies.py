"""The strategies for DAGs, held against their rules with numbers worked out by hand.

One core a VM, hours, a margin of 50 s, boots of 40 s.
"""

from __future__ import annotations

import pytest

from snakemake_executor_plugin_schlouder import strategies
from snakemake_executor_plugin_schlouder.fleet import Fleet
from snakemake_executor_plugin_schlouder.model import (
    VM,
    Billing,
    InstanceType,
    Need,
    Task,
    TaskState,
    VMState,
)
from snakemake_executor_plugin_schlouder.prediction import LinearBoots
from snakemake_executor_plugin_schlouder.simulate import Outcome, Scenario, simulate
from snakemake_executor_plugin_schlouder.tasklist import RecordedTask, TaskList

HOURS = Billing(3600, 0, 50)
CORE = InstanceType("one-core", 1, 4096)
BOOT = 40.0


class Table:
    """A strategy with its fleet; does with its answers what the planner does."""

    def __init__(self, name: str) -> None:
        self.strategy = strategies.make(name)
        self.fleet = Fleet(HOURS)
        self.tasks: dict[str, Task] = {}
        self.vms: dict[str, VM] = {}
        self.at(0)

    def at(self, now: float) -> None:
        self.fleet.look(now, BOOT, may_grow=True)

    def give(self, key: str, seconds: float, level: int = 0, after: str = "") -> str:
        """Places a task that waited for those named by the letters of `after`; returns its VM's name."""
        task = Task(key, key, "r", key, "s", Need(), "", planned=seconds)
        task.after, task.level = tuple(after), level
        vm = self.strategy.choose(task, self.fleet) or self._new_vm()
        task.state, task.vm = TaskState.SCHEDULED, vm.name
        vm.plan(task, self.fleet.now)
        self.fleet.update(vm)
        self.tasks[key] = task
        return vm.name

    def _new_vm(self) -> VM:
        name = f"vm{len(self.vms) + 1}"
        vm = self.vms[name] = VM(name, "s", CORE, self.fleet.now, BOOT)
        self.fleet.add(vm)
        return vm

    def begin(self, key: str, date: float) -> None:
        """The VM is up and runs the task from now on."""
        self.at(date)
        task = self.tasks[key]
        vm = self.vms[task.vm or ""]
        vm.queue.remove(task)
        vm.active[key] = task
        task.started, vm.state = date, VMState.READY
        vm.has_begun(task, date)
        self.fleet.update(vm)

    def end(self, key: str, date: float) -> None:
        """The task ends now, having run if it was not seen to."""
        self.at(date)
        task = self.tasks[key]
        if task.started is None:
            self.begin(key, date)
        task.state, task.ended = TaskState.COMPLETE, date
        vm = self.vms[task.vm or ""]
        del vm.active[key]
        vm.recount(date)
        self.fleet.update(vm)


def test_start_par_exceed_starts_a_vm_for_each_entry_task() -> None:
    table = Table("start-par-exceed")
    assert [table.give(key, 100) for key in "abc"] == ["vm1", "vm2", "vm3"]


def test_start_par_exceed_stays_where_the_predecessor_that_ended_last_ran() -> None:
    table = Table("start-par-exceed")
    for key in "abc":
        table.give(key, 100)
    for key, date in (("a", 140), ("c", 190), ("b", 240)):
        table.end(key, date)
    assert table.give("d", 5000, 1, "abc") == "vm2"
    assert table.give("e", 100, 1, "ac") == "vm3"
    assert table.give("f", 100, 1, "b") == "vm2"


def test_a_task_whose_parent_vm_is_no_more_gets_a_new_one() -> None:
    table = Table("start-par-exceed")
    table.give("a", 100)
    table.end("a", 140)
    table.fleet.remove(table.vms["vm1"])
    assert table.give("b", 100, 1, "a") == "vm2"


@pytest.mark.parametrize(("seconds", "vm"), [(550, "vm1"), (551, "vm2")])
def test_start_par_not_exceed_starts_a_vm_where_the_hour_would_not_do(
    seconds: float, vm: str
) -> None:
    """The parent VM is 3000 s old, and 50 s are margin."""
    table = Table("start-par-not-exceed")
    table.give("a", 2960)
    table.end("a", 3000)
    assert table.give("b", seconds, 1, "a") == vm


def test_to_exceed_means_the_first_hour_and_not_the_one_begun() -> None:
    table = Table("start-par-not-exceed")
    table.give("a", 3960)
    table.end("a", 4000)
    assert table.give("b", 10, 1, "a") == "vm2"
    assert table.fleet.fits(table.vms["vm1"], table.tasks["b"])


def test_all_par_exceed_gives_each_task_of_a_level_a_vm_of_its_own() -> None:
    """b takes the parent VM; d would end at 240 + 400 on vm2, when b ends; c gets a new one."""
    table = Table("all-par-exceed")
    assert table.give("a", 100) == "vm1"
    assert table.give("x", 200) == "vm2"
    table.begin("x", 40)
    table.end("a", 140)
    assert table.give("b", 500, 1, "a") == "vm1"
    assert table.give("d", 400, 1, "a") == "vm2"
    assert table.give("c", 300, 1, "a") == "vm3"


def test_all_par_exceed_takes_no_vm_on_which_a_task_would_end_after_the_longest() -> None:
    table = Table("all-par-exceed")
    table.give("a", 100)
    table.give("x", 200)
    table.begin("x", 40)
    table.end("a", 140)
    table.give("b", 500, 1, "a")
    assert table.give("d", 401, 1, "a") == "vm3"


def test_a_vm_is_free_again_for_its_level_when_its_task_has_ended() -> None:
    table = Table("all-par-exceed")
    table.give("a", 100)
    table.end("a", 140)
    assert table.give("b", 500, 1, "a") == "vm1"
    table.end("b", 640)
    assert table.give("c", 600, 1, "a") == "vm1"


def test_all_par_not_exceed_takes_the_parent_vm_then_the_free_one_with_the_longest_lease() -> None:
    """vm1 and vm2 are 940 s old and idle, vm3 was requested at 500."""
    table = Table("all-par-not-exceed")
    table.give("a", 900)
    table.give("b", 900)
    table.at(500)
    table.give("c", 400)
    for key in "abc":
        table.end(key, 940)
    assert table.give("d", 100, 1, "a") == "vm1"
    assert table.give("e", 110, 1, "a") == "vm3"
    assert table.give("f", 120, 1, "a") == "vm2"
    assert table.give("g", 130, 1, "a") == "vm4"


def test_all_par_not_exceed_leaves_a_parent_vm_whose_hour_would_not_do() -> None:
    table = Table("all-par-not-exceed")
    table.give("a", 2960)
    table.at(2000)
    table.give("b", 960)
    table.end("a", 3000)
    table.end("b", 3000)
    assert table.give("c", 600, 1, "a") == "vm2"
    assert table.give("d", 3000, 1, "a") == "vm3"


def test_all_par_1lns_keeps_the_longest_alone_and_chains_the_others_beside_it() -> None:
    """The longest ends at 640; vm2 is up at 40, and 40 + 100 + 200 + 300 is no more than that."""
    table = Table("all-par-1lns")
    assert table.give("l", 600) == "vm1"
    assert [table.give(key, s) for key, s in (("a", 100), ("b", 200), ("c", 300))] == ["vm2"] * 3
    assert table.give("d", 300) == "vm3"


def test_all_par_1lns_chains_no_further_than_the_hour() -> None:
    """40 + 1800 + 1710 + 50 s are an hour; one second more is not."""
    table = Table("all-par-1lns")
    table.give("l", 5000)
    assert [table.give("a", 1800), table.give("b", 1710)] == ["vm2", "vm2"]
    table = Table("all-par-1lns")
    table.give("l", 5000)
    assert [table.give("a", 1800), table.give("b", 1711)] == ["vm2", "vm3"]


def test_all_par_1lns_does_not_hold_a_task_against_one_that_has_ended() -> None:
    table = Table("all-par-1lns")
    table.give("l", 600)
    table.end("l", 640)
    assert table.give("a", 100) == "vm1"
    assert table.give("b", 50) == "vm2"


def workflow(*rows: tuple[str, float, str]) -> TaskList:
    """Rows of name, seconds, and the letters of the tasks waited for."""
    return TaskList(tuple(RecordedTask(name, 0, s, s, tuple(after)) for name, s, after in rows))


def played(tasks: TaskList, strategy: str, max_vms: int = 20, order: str = "submission") -> Outcome:
    return simulate(tasks, Scenario(strategy, max_vms, HOURS, LinearBoots(BOOT, 0), order=order))


FORK_JOIN = workflow(
    ("a", 100, ""),
    *(("b", 100, "a"), ("c", 600, "a"), ("d", 200, "a"), ("e", 100, "a"), ("f", 200, "a")),
    ("g", 50, "bcdef"),
)
"""The longest way is a, c, g: 750 s."""


@pytest.mark.parametrize(
    ("strategy", "vms", "makespan"),
    [
        ("one-vm-per-job", 7, 3 * BOOT + 750),
        ("start-par-exceed", 1, BOOT + 100 + 1200 + 50),
        ("start-par-not-exceed", 1, BOOT + 100 + 1200 + 50),
        ("all-par-exceed", 5, BOOT + 750),
        ("all-par-not-exceed", 5, 2 * BOOT + 750),
        ("all-par-1lns", 3, BOOT + 750),
    ],
)
def test_a_fork_and_join(strategy: str, vms: int, makespan: float) -> None:
    """all-par-1lns keeps the longest way with b, e, d one after the other on a second VM, f on a third;
    all-par-not-exceed places c last, on a VM that must boot."""
    outcome = played(FORK_JOIN, strategy)
    assert (outcome.vms, outcome.makespan) == (vms, makespan)


CHAIN = workflow(("a", 1000, ""), ("b", 1000, "a"), ("c", 1000, "b"), ("d", 1000, "c"))


def test_a_chain_stays_on_one_vm_or_leaves_it_where_the_hour_would_be_exceeded() -> None:
    stays, leaves = played(CHAIN, "start-par-exceed"), played(CHAIN, "start-par-not-exceed")
    assert (stays.vms, stays.units, stays.makespan) == (1, 2, BOOT + 4000)
    assert (leaves.vms, leaves.units, leaves.makespan) == (2, 2, 2 * BOOT + 4000)


@pytest.mark.parametrize("strategy", [name for name in strategies.known() if "-par-" in name])
def test_at_the_cap_everything_is_run_all_the_same(strategy: str) -> None:
    outcome = played(FORK_JOIN, strategy, max_vms=1)
    assert (outcome.vms, outcome.makespan) == (1, BOOT + 1350)


def test_a_single_task_and_tasks_that_take_no_time_are_no_trouble() -> None:
    tasks = workflow(("a", 0, ""), ("b", 0, "a"), ("c", 0, "a"))
    for name in strategies.known():
        assert played(tasks, name).vms >= 1
