"""cheapest, fastest, deadline and budget: what they promise on small batches, and on generated ones."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as values
from rig import Rig

from snakemake_executor_plugin_schlouder.model import Billing, InstanceType, TaskState
from snakemake_executor_plugin_schlouder.pool import Goal
from snakemake_executor_plugin_schlouder.prediction import LinearBoots
from snakemake_executor_plugin_schlouder.simulate import Outcome, Scenario, simulate
from snakemake_executor_plugin_schlouder.tasklist import RecordedTask, TaskList

HOURS = Billing(3600, 0, 50)
SECONDS = Billing(1, 60, 50)
POOLED = ("cheapest", "fastest", "deadline", "budget")


def batch(*reals: float, estimate: float = 1.0) -> TaskList:
    """Tasks that come at once; estimates are `estimate` times what they take."""
    return TaskList(
        tuple(RecordedTask(f"t{n}.mgf", 0, r * estimate, r) for n, r in enumerate(reals))
    )


def played(tasks: TaskList, strategy: str, billing: Billing = HOURS, **more: object) -> Outcome:
    vms = int(str(more.pop("max_vms", 10)))
    boots = LinearBoots(40, 0)
    return simulate(tasks, Scenario(strategy, vms, billing, boots, **more))  # type: ignore[arg-type]


def test_cheapest_pays_the_hours_the_work_needs_and_no_more() -> None:
    outcome = played(batch(*[500] * 60), "cheapest")
    assert outcome.units <= math.ceil(60 * 500 / 3600) + 1


def test_cheapest_is_not_fooled_by_estimates_that_are_too_low() -> None:
    """Where afap starts another hour on every VM for a task that does not end in the paid one."""
    tasks = batch(*[500 + n % 7 for n in range(80)], estimate=0.8)
    ours, afap = played(tasks, "cheapest"), played(tasks, "afap")
    assert ours.units < afap.units
    assert ours.makespan <= 1.25 * afap.makespan


def test_fastest_runs_the_longest_first() -> None:
    tasks = batch(*[100] * 12, 600)
    assert played(tasks, "fastest", max_vms=3).makespan <= 40 + 620
    assert played(tasks, "asap", max_vms=3).makespan > 800


def test_a_deadline_is_met_with_fewer_vms_than_it_would_take_to_be_fastest() -> None:
    tasks = batch(*[100] * 40)
    soon = played(tasks, "deadline", SECONDS, goal=Goal(deadline=1200))
    late = played(tasks, "deadline", SECONDS, goal=Goal(deadline=6000))
    assert soon.makespan <= 1200
    assert late.makespan <= 6000
    assert late.vms < soon.vms <= 10


def test_a_deadline_that_cannot_be_met_ends_the_run_as_soon_as_it_can() -> None:
    tasks = batch(*[100] * 40)
    assert played(tasks, "deadline", goal=Goal(deadline=50)).makespan <= 40 + 4 * 100 + 20


def test_a_budget_is_kept_and_used() -> None:
    tasks = batch(*[500] * 40)
    tight = played(tasks, "budget", goal=Goal(budget=7 * 3600))
    ample = played(tasks, "budget", goal=Goal(budget=20 * 3600))
    assert tight.units <= 7
    assert ample.units <= 20
    assert ample.makespan < tight.makespan


def test_a_budget_below_the_work_loses_no_task() -> None:
    assert played(batch(*[500] * 20), "budget", goal=Goal(budget=60)).busy == 10000


@pytest.mark.parametrize("strategy", ["fastest", "cheapest"])
@pytest.mark.parametrize(
    ("seconds", "count", "cpus", "billing", "boot", "asap"),
    [
        (3300, 3, 1, HOURS, 60, 3360),
        (7000, 4, 1, HOURS, 60, 7060),
        (10000, 6, 1, HOURS, 60, 10060),
        (1000, 3, 1, Billing(60, 60, 50), 5, 1005),
        (5000, 8, 4, HOURS, 60, 5060),
        (300, 20, 4, Billing(60, 60, 50), 5, 305),
        (600, 16, 16, HOURS, 60, 660),
    ],
)
def test_tasks_near_the_length_of_a_unit_or_side_by_side_do_not_queue_up(
    strategy: str,
    seconds: float,
    count: int,
    cpus: int,
    billing: Billing,
    boot: float,
    asap: float,
) -> None:
    scenario = Scenario(
        strategy, 20, billing, LinearBoots(boot, 0), types=(InstanceType("t", cpus, 8192),)
    )
    outcome = simulate(batch(*[seconds] * count), scenario)
    assert outcome.makespan <= asap + 5
    assert outcome.vms <= count


def test_a_budget_that_is_spent_while_a_long_task_runs_stops_nothing() -> None:
    tasks = TaskList((RecordedTask("a", 0, 3000, 3000), RecordedTask("b", 100, 100, 100)))
    assert played(tasks, "budget", goal=Goal(budget=7200)).busy == 3100


def test_cheapest_takes_the_room_that_another_strategy_leaves(tmp_path: Path) -> None:
    rig = Rig(tmp_path, types=(InstanceType("one", 1, 4096),), max_vms=10)
    rig.give(9, "one-vm-per-job", planned=300.0, seconds=300)
    rig.run(1)
    rig.give(40, "cheapest", planned=200.0, seconds=200)
    rig.run(3000)
    assert rig.states() == [TaskState.COMPLETE] * 49


def test_a_limit_is_corrected_by_what_jobs_of_the_rule_took(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    known = [rig.give(1, "asap", seconds=20, planned=600.0, is_limit=True) for _ in range(30)]
    rig.run(900)
    (later,) = rig.give(1, "asap", seconds=20, planned=600.0, is_limit=True)
    rig.tick()
    assert len(known) == 30
    assert later.walltime < 100


@pytest.mark.parametrize("strategy", POOLED)
def test_tasks_of_a_lost_vm_run_elsewhere(strategy: str, tmp_path: Path) -> None:
    rig = Rig(tmp_path, goal=Goal(10000.0, 100000.0), max_vms=2)
    rig.cloud.allow_kill = True
    rig.give(6, strategy, seconds=20)
    rig.run(15)
    rig.world.kill_machine(rig.world.alive()[0])
    rig.run(300)
    assert rig.states() == [TaskState.COMPLETE] * 6
    assert rig.world.twice_at_a_time() == []


def test_cheapest_replaces_a_machine_that_fails_while_it_boots(tmp_path: Path) -> None:
    rig = Rig(tmp_path, types=(InstanceType("one", 1, 4096),), max_vms=2)
    rig.give(60, "cheapest", planned=30.0, seconds=30)
    rig.run(3)
    assert len(rig.world.alive()) == 2
    rig.world.kill_machine(rig.world.alive()[0])
    rig.run(60)
    assert len(rig.world.alive()) == 2


def test_what_waits_for_an_overdue_task_runs_elsewhere(tmp_path: Path) -> None:
    """The short tasks are to follow on the VM that has paid time left after its first; which hangs."""
    rig = Rig(
        tmp_path, types=(InstanceType("one", 1, 4096),), max_vms=2, billing=Billing(600, 0, 10)
    )
    rig.give(1, "fastest", planned=500.0, seconds=500)
    rig.give(1, "fastest", planned=450.0, seconds=2000)
    rig.give(2, "fastest", planned=60.0, seconds=60)
    rig.run(1200)
    assert rig.states() == [TaskState.COMPLETE] * 3


def test_fastest_starts_few_vms_for_tasks_that_are_a_small_part_of_what_is_left() -> None:
    short = [RecordedTask(f"p{n}", 0, 5, 5) for n in range(20)]
    long = RecordedTask("c", 0, 3000, 3000, after=tuple(task.name for task in short))
    alone = played(TaskList(tuple(short)), "fastest", max_vms=30)
    before = played(TaskList((*short, long)), "fastest", max_vms=30)
    asap = played(TaskList((*short, long)), "asap", max_vms=30)
    assert alone.vms == 20
    assert before.vms <= 3
    assert before.makespan <= 1.04 * asap.makespan


@settings(max_examples=40, deadline=None)
@given(
    values.lists(values.integers(1, 3000), min_size=1, max_size=30),
    values.sampled_from(POOLED),
    values.sampled_from([HOURS, SECONDS, Billing(60, 0, 50)]),
    values.integers(1, 6),
    values.sampled_from([0.1, 0.8, 1.0, 3.0]),
)
def test_every_batch_ends(
    reals: list[int], strategy: str, billing: Billing, max_vms: int, estimate: float
) -> None:
    goal = Goal(5000.0, 20000.0)
    tasks = batch(*(float(real) for real in reals), estimate=estimate)
    outcome = played(tasks, strategy, billing, goal=goal, max_vms=max_vms)
    assert outcome.busy == sum(reals)
    assert outcome.makespan >= max(reals)
    assert outcome.billed >= outcome.busy
