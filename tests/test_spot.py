"""Spot machines: who gets one, and what becomes of tasks when EC2 takes it back. In virtual time."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rig import SMALL, Rig

from snakemake_executor_plugin_schlouder.costs import account
from snakemake_executor_plugin_schlouder.market.tariff import Tariff
from snakemake_executor_plugin_schlouder.model import (
    NEVER,
    ON_DEMAND,
    ONLY,
    PREFER,
    SPOT,
    Billing,
    Need,
    SlurmOptions,
    TaskState,
)

ZONES = {SMALL.name: ("a", "b")}
TARIFF = Tariff({SMALL.name: 0.1}, {(SMALL.name, "a"): 0.04, (SMALL.name, "b"): 0.03}, "a table")


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    made = Rig(tmp_path, types=(SMALL,), tariff=TARIFF, zones=ZONES, billing=Billing())
    made.cloud.allow_kill = True
    return made


def notice(rig: Rig, node: str, seconds: float) -> None:
    """What the machine tells Slurm when its metadata service tells it of the reclaim."""
    end = datetime.fromtimestamp(rig.world.now + seconds, UTC)
    busy = any(rig.world.running_on(node))
    rig.world.nodes[node] = "draining" if busy else "drained"
    rig.slurm.reasons[node] = f"schlouder: spot reclaim at {end:%Y-%m-%dT%H:%M:%SZ}"


def take(rig: Rig, node: str) -> None:
    """EC2 ends the machine, and Slurm notices."""
    rig.world.kill_machine(node)
    rig.world.nodes[node] = "down"
    for job in rig.world.running_on(node):
        job.state, job.ended = "NODE_FAIL", rig.world.now


def running(rig: Rig) -> str:
    """A node on which something runs."""
    return next(name for name in rig.world.alive() if rig.world.running_on(name))


def markets(rig: Rig) -> list[str]:
    return [request.market for request in rig.cloud.launched]


@pytest.mark.parametrize(
    ("spot", "market", "zone"),
    [(NEVER, ON_DEMAND, "a"), (PREFER, SPOT, "b"), (ONLY, SPOT, "b")],
)
def test_a_task_runs_on_the_market_it_asks_for(rig: Rig, spot: str, market: str, zone: str) -> None:
    rig.give(1, spot=spot)
    rig.run(60)
    assert rig.states() == [TaskState.COMPLETE]
    assert [(r.market, r.zone) for r in rig.cloud.launched] == [(market, zone)]
    (vm,) = rig.broker.vms()
    assert vm.price == TARIFF.price(SMALL.name, market, zone)


def test_tasks_of_different_markets_do_not_share_machines(rig: Rig) -> None:
    tasks = [*rig.give(2, "fastest", spot=NEVER), *rig.give(2, "fastest", spot=ONLY)]
    rig.run(200)
    market = {vm.name: vm.market for vm in rig.broker.vms()}
    assert [market[task.vm or ""] for task in tasks] == [ON_DEMAND] * 2 + [SPOT] * 2


def test_an_idle_machine_on_demand_takes_nothing_that_wants_spot_machines_only(rig: Rig) -> None:
    rig.give(1, "fastest", seconds=30)
    rig.run(20)
    rig.cloud.out = {(SMALL.name, zone, SPOT) for zone in "ab"}
    (task,) = rig.give(1, "fastest", spot=ONLY)
    rig.run(100)
    assert task.vm is None or task.state == TaskState.PENDING
    rig.cloud.out.clear()
    rig.run(400)
    market = {vm.name: vm.market for vm in rig.broker.vms()}
    assert task.state == TaskState.COMPLETE
    assert market[task.vm or ""] == SPOT


def test_of_a_gang_only_the_machine_that_was_taken_is_free(rig: Rig) -> None:
    rig.give(1, seconds=500, planned=500.0, spot=ONLY, need=Need(1, 1000, nodes=2))
    rig.run(30)
    rig.world.kill_machine("schlouder-r1-2", "Server.SpotInstanceTermination: taken")
    rig.run(30)
    bills = account(rig.journal.vms("r1"), rig.journal.tasks("r1"), Billing(), rig.world.now).bills
    units = {bill.name: bill.units for bill in bills}
    assert units["schlouder-r1-2"] == 0
    assert units["schlouder-r1-1"] >= 60


def test_what_ends_before_the_reclaim_is_let_end(rig: Rig) -> None:
    (task,) = rig.give(1, seconds=60, planned=60.0, spot=ONLY)
    rig.run(20)
    node = running(rig)
    notice(rig, node, 120)
    rig.run(70)
    assert task.state == TaskState.COMPLETE
    assert (task.attempt, task.reclaims) == (1, 0)
    assert len(rig.cloud.launched) == 1


def test_what_cannot_end_before_the_reclaim_runs_elsewhere_at_once(rig: Rig) -> None:
    (task,) = rig.give(1, seconds=500, planned=500.0, spot=PREFER)
    rig.run(20)
    node = running(rig)
    notice(rig, node, 120)
    rig.run(40)
    assert task.vm != node
    assert rig.states() == []
    assert rig.world.machine_of(node).instance.is_alive
    assert rig.world.twice_at_a_time() == []
    take(rig, node)
    rig.run(600)
    assert task.state == TaskState.COMPLETE
    assert (task.attempt, task.reclaims, task.losses) == (2, 1, 0)


def test_a_machine_given_notice_gets_no_further_task(rig: Rig) -> None:
    rig.give(6, "one-vm-for-all", seconds=50, planned=50.0, spot=ONLY)
    rig.run(20)
    node = running(rig)
    notice(rig, node, 120)
    rig.run(3)
    before = {key for key, job in rig.world.jobs.items() if node in job.request.nodes}
    rig.run(30)
    after = {key for key, job in rig.world.jobs.items() if node in job.request.nodes}
    assert after == before
    rig.run(600)
    assert rig.states() == [TaskState.COMPLETE] * 6


def test_a_machine_that_is_not_free_any_more_is_not_left_to_ec2(rig: Rig) -> None:
    rig.give(1, seconds=3700, planned=3700.0, spot=ONLY)
    rig.give(1, seconds=4000, planned=4000.0)
    rig.run(3600, step=10)
    node = next(vm.name for vm in rig.broker.vms() if vm.market == SPOT)
    notice(rig, node, 120)
    rig.run(60)
    assert node in rig.world.alive(), "its task may end"
    rig.run(50)
    assert node not in rig.world.alive()


def test_a_machine_that_ec2_forgets_to_take_is_given_back(rig: Rig) -> None:
    rig.give(1, seconds=100, planned=100.0, spot=ONLY)
    rig.give(1, seconds=1000, planned=1000.0)
    rig.run(20)
    node = next(vm.name for vm in rig.broker.vms() if vm.market == SPOT)
    notice(rig, node, 120)
    rig.run(250)
    assert node in rig.world.alive()
    rig.run(100)
    assert node not in rig.world.alive()


@pytest.mark.parametrize("node", ["schlouder-r1-1", "schlouder-r1-2"])
def test_a_gang_goes_on_though_ec2_forgets_to_take_one_of_it(rig: Rig, node: str) -> None:
    rig.give(1, seconds=500, planned=500.0, spot=ONLY, need=Need(1, 1000, nodes=2))
    rig.run(30)
    notice(rig, node, 120)
    rig.run(1500)
    assert rig.states() == [TaskState.COMPLETE]
    assert rig.world.alive() == []


def test_a_machine_taken_without_notice_costs_no_retry(rig: Rig) -> None:
    (task,) = rig.give(1, seconds=100, spot=ONLY)
    for _ in range(3):
        rig.run(30)
        take(rig, running(rig))
    rig.run(200)
    assert task.state == TaskState.COMPLETE
    assert (task.reclaims, task.losses) == (3, 0)


def test_after_repeated_loss_a_task_moves_to_a_machine_on_demand(rig: Rig) -> None:
    (task,) = rig.give(1, seconds=100, spot=PREFER)
    for _ in range(3):
        rig.run(30)
        take(rig, running(rig))
    rig.run(200)
    assert task.state == TaskState.COMPLETE
    assert markets(rig) == [SPOT, SPOT, SPOT, ON_DEMAND]


def test_what_may_run_on_spot_machines_only_fails_in_the_end(rig: Rig) -> None:
    (task,) = rig.give(1, seconds=100, spot=ONLY)
    for _ in range(4):
        rig.run(30)
        take(rig, running(rig))
    rig.run(30)
    assert task.state == TaskState.FAILED
    assert "Server.SpotInstanceTermination" in task.reason


def test_where_no_spot_machine_is_to_be_had_one_on_demand_is_taken(rig: Rig) -> None:
    rig.cloud.out = {(SMALL.name, zone, SPOT) for zone in "ab"}
    rig.give(2, spot=PREFER)
    rig.run(100)
    assert rig.states() == [TaskState.COMPLETE] * 2
    assert set(markets(rig)) == {ON_DEMAND}


def test_who_wants_spot_machines_only_waits_for_them(rig: Rig) -> None:
    rig.cloud.out = {(SMALL.name, zone, SPOT) for zone in "ab"}
    rig.give(1, spot=ONLY)
    rig.run(100)
    assert rig.states() == []
    rig.cloud.out.clear()
    rig.run(200)
    assert rig.states() == [TaskState.COMPLETE]


def test_a_reclaim_while_it_boots_is_no_failed_boot(rig: Rig) -> None:
    """Four in a row: failed boots would have ended all launches."""
    rig.world.boot_time = 20.0
    rig.give(1, spot=ONLY)
    for _ in range(4):
        rig.run(10)
        rig.world.kill_machine(rig.world.alive()[0])
    rig.run(100)
    assert rig.states() == [TaskState.COMPLETE]


def test_the_configured_number_of_reclaims_counts(tmp_path: Path) -> None:
    rig = Rig(tmp_path, types=(SMALL,), tariff=TARIFF, zones=ZONES, reclaims=1)
    rig.cloud.allow_kill = True
    rig.give(1, seconds=100, spot=PREFER)
    rig.run(30)
    take(rig, running(rig))
    rig.run(200)
    assert markets(rig) == [SPOT, ON_DEMAND]


def test_the_books_know_of_an_end_that_is_not_over_when_the_run_is(rig: Rig) -> None:
    """A machine takes longer to be terminated than the run waits for; its meter has stopped before."""
    rig.world.end_time = 1000.0
    rig.give(1, seconds=500, spot=ONLY)
    rig.run(20)
    rig.broker.release()
    (vm,) = rig.journal.vms("r1")
    assert rig.world.machine_of(vm.name).instance.state == "shutting-down"
    assert vm.meter_end == rig.world.machine_of(vm.name).instance.ended is not None


def test_the_books_know_of_a_reclaim_that_came_while_the_run_ended(rig: Rig) -> None:
    """It costs nothing, although the run has asked for its end, too."""
    rig.world.end_time = 1000.0
    rig.give(1, seconds=500, planned=500.0, spot=ONLY)
    rig.run(20)
    machine = rig.world.machine_of(running(rig))
    machine.ends = math.inf
    machine.instance = replace(
        machine.instance,
        state="shutting-down",
        reason="Server.SpotInstanceTermination",
        ended=rig.world.now,
    )
    rig.broker.release()
    (vm,) = rig.journal.vms("r1")
    (bill,) = account([vm], [], Billing(), rig.world.now).bills
    assert (bill.units, bill.billed) == (0, 0)


def test_without_retries_the_next_machine_is_on_demand(tmp_path: Path) -> None:
    rig = Rig(tmp_path, types=(SMALL,), tariff=TARIFF, zones=ZONES, reclaims=0)
    rig.cloud.allow_kill = True
    rig.give(1, seconds=100, spot=PREFER)
    rig.run(30)
    take(rig, running(rig))
    rig.run(200)
    assert rig.states() == [TaskState.COMPLETE]
    assert markets(rig) == [SPOT, ON_DEMAND]


def test_a_machine_that_goes_before_slurm_has_ended_its_task_counts_once(rig: Rig) -> None:
    (task,) = rig.give(1, seconds=500, planned=500.0, spot=PREFER)
    rig.run(20)
    node = running(rig)
    rig.slurm.cancel = lambda jobs: None  # type: ignore[method-assign]
    notice(rig, node, 10)
    rig.run(10)
    take(rig, node)
    rig.run(60)
    assert (task.attempt, task.reclaims, task.losses) == (2, 1, 0)


def test_notices_are_counted_for_what_may_run_on_spot_machines_only(rig: Rig) -> None:
    (task,) = rig.give(1, seconds=500, planned=500.0, spot=ONLY)
    for _ in range(4):
        rig.run(30)
        notice(rig, running(rig), 60)
    rig.run(30)
    assert task.state == TaskState.FAILED
    assert task.reason == "its spot machine was taken back, 4 times"


GANG: dict[str, Any] = {"need": Need(2, 1000, nodes=2), "options": SlurmOptions(tasks=2)}


@pytest.mark.parametrize("number", [1, 2])
def test_a_gang_that_gets_notice_may_end_its_task(rig: Rig, number: int) -> None:
    (task,) = rig.give(1, seconds=60, planned=60.0, spot=ONLY, **GANG)
    rig.run(20)
    notice(rig, f"schlouder-r1-{number}", 120)
    rig.run(100)
    assert (task.state, task.attempt, task.reclaims) == (TaskState.COMPLETE, 1, 0)
    assert len(rig.cloud.launched) == 2


@pytest.mark.parametrize("number", [1, 2])
def test_a_task_that_its_gang_cannot_end_goes_to_another_at_once(rig: Rig, number: int) -> None:
    (task,) = rig.give(1, seconds=500, planned=500.0, spot=PREFER, **GANG)
    rig.run(20)
    node = f"schlouder-r1-{number}"
    notice(rig, node, 120)
    rig.run(40)
    assert len(rig.cloud.launched) == 4
    assert rig.world.twice_at_a_time() == []
    take(rig, node)
    rig.run(600)
    assert (task.state, task.attempt, task.reclaims) == (TaskState.COMPLETE, 2, 1)
    assert rig.world.alive() == []


@pytest.mark.parametrize("number", [1, 2])
def test_a_gang_that_is_taken_after_its_notice_is_replaced(rig: Rig, number: int) -> None:
    """The task takes longer than was thought; its ranks fail when their machine goes."""
    (task,) = rig.give(1, seconds=100, planned=30.0, spot=PREFER, **GANG)
    rig.run(20)
    node = f"schlouder-r1-{number}"
    notice(rig, node, 60)
    rig.run(60)
    assert task.attempt == 1
    take(rig, node)
    rig.run(300)
    assert (task.state, task.attempt, task.reclaims) == (TaskState.COMPLETE, 2, 1)
    assert rig.world.alive() == []
