"""Launches: batches, hard limits, capacity, quotas. In virtual time, over the fakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rig import BIG, SMALL, Rig

from snakemake_executor_plugin_schlouder.launcher import BATCH, Launcher, Limits
from snakemake_executor_plugin_schlouder.market.offers import Offers
from snakemake_executor_plugin_schlouder.market.tariff import Tariff
from snakemake_executor_plugin_schlouder.model import (
    ON_DEMAND,
    ONLY,
    VM,
    Billing,
    Need,
    TaskState,
    VMState,
)
from snakemake_executor_plugin_schlouder.provision import (
    CloudUnavailable,
    LaunchOutcome,
    LaunchRequest,
    QuotaReached,
)

TARIFF = Tariff({SMALL.name: 0.10, BIG.name: 0.80}, {}, "a table")
ZONES = {SMALL.name: ("a", "b"), BIG.name: ("a",)}


def calls_of(rig: Rig) -> list[list[LaunchRequest]]:
    """What is asked for from now on, call by call."""
    calls: list[list[LaunchRequest]] = []
    launch = rig.cloud.launch

    def spy(requests: Sequence[LaunchRequest]) -> list[LaunchOutcome]:
        calls.append(list(requests))
        return launch(requests)

    rig.cloud.launch = spy  # type: ignore[method-assign]
    return calls


def test_machines_alike_are_asked_for_in_batches_under_one_token(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_vms=25)
    calls = calls_of(rig)
    rig.give(23)
    rig.run(60)
    (requests,) = calls
    batches = {request.token: request.batch for request in requests}
    assert sorted(len(batch) for batch in batches.values()) == [3, BATCH, BATCH]
    assert [name for batch in batches.values() for name in batch] == [r.node for r in requests]
    assert rig.states() == [TaskState.COMPLETE] * 23


def test_a_lost_reply_is_asked_for_again_as_the_same_batch(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    calls = calls_of(rig)
    rig.cloud.refusals = [CloudUnavailable("connection lost")] * 3
    rig.give(3)
    rig.run(60)
    first, again = calls
    assert first == again
    assert len(rig.cloud.launched) == 3


def test_a_zone_without_capacity_is_passed_over_for_the_next(tmp_path: Path) -> None:
    rig = Rig(tmp_path, tariff=TARIFF, zones=ZONES)
    rig.cloud.out = {(SMALL.name, "a", ON_DEMAND)}
    rig.give(2)
    rig.run(60)
    assert {(r.type.name, r.zone) for r in rig.cloud.launched} == {(SMALL.name, "b")}
    assert rig.states() == [TaskState.COMPLETE] * 2


@pytest.mark.parametrize("strategy", ["one-vm-per-job", "asap", "fastest", "one-vm-for-all"])
def test_where_a_type_is_not_to_be_had_the_next_one_is_taken(tmp_path: Path, strategy: str) -> None:
    rig = Rig(tmp_path, tariff=TARIFF, zones=ZONES)
    rig.cloud.out = {(SMALL.name, zone, ON_DEMAND) for zone in "ab"}
    rig.give(4, strategy)
    rig.run(200)
    assert {request.type.name for request in rig.cloud.launched} == {BIG.name}
    assert rig.states() == [TaskState.COMPLETE] * 4


def test_a_batch_has_one_token_though_some_were_asked_for_before(tmp_path: Path) -> None:
    """Every token is a launch of the whole batch."""
    rig = Rig(tmp_path, types=(SMALL,), tariff=TARIFF, zones=ZONES)
    calls = calls_of(rig)
    rig.cloud.out = {(SMALL.name, "a", ON_DEMAND)}
    rig.give(2)
    rig.tick()
    rig.give(2)
    rig.tick()
    refused, again = calls
    assert {len(request.batch) for request in again} == {4}
    assert len({request.token for request in again}) == 1
    assert {request.token for request in again}.isdisjoint(r.token for r in refused)


def test_a_run_waits_for_capacity_and_asks_with_one_machine(tmp_path: Path) -> None:
    rig = Rig(tmp_path, types=(SMALL,), zones={SMALL.name: ("a",)})
    calls = calls_of(rig)
    rig.cloud.out = {(SMALL.name, "a", ON_DEMAND)}
    rig.give(4)
    rig.run(170)
    assert not rig.ended
    assert [len(call) for call in calls] == [4]
    rig.run(60)
    assert [len(call) for call in calls] == [4, 1]
    rig.cloud.out.clear()
    rig.run(800)
    assert rig.states() == [TaskState.COMPLETE] * 4


def test_a_few_machines_where_many_were_wanted_are_enough(tmp_path: Path) -> None:
    """The others go to another type, and no task is lost or waits for ever."""
    rig = Rig(tmp_path, tariff=TARIFF, zones=ZONES)
    launch = rig.cloud.launch

    def two_at_most(requests: Sequence[LaunchRequest]) -> list[LaunchOutcome]:
        outcomes = launch(requests[:2])
        rig.cloud.out |= {(SMALL.name, zone, ON_DEMAND) for zone in "ab"}
        return [*outcomes, *launch(requests[2:])]

    rig.cloud.launch = two_at_most  # type: ignore[method-assign]
    rig.give(12, "fastest", need=Need(2, 4000))
    rig.run(400)
    assert rig.states() == [TaskState.COMPLETE] * 12
    names = [request.type.name for request in rig.cloud.launched]
    assert names.count(SMALL.name) == 2
    assert BIG.name in names


def test_a_quota_is_told_and_what_there_is_takes_the_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(tmp_path, types=(SMALL,))
    rig.give(1, "asap", seconds=30)
    rig.run(12)
    rig.cloud.refusals = [QuotaReached("Running On-Demand Standard instances: 2 vCPUs")] * 9
    rig.give(3, "asap", seconds=5, need=Need(2, 1000))
    rig.run(120)
    assert rig.states() == [TaskState.COMPLETE] * 4
    assert caplog.text.count("Running On-Demand Standard") == 1


def test_a_quota_that_leaves_no_machine_at_all_ends_the_tasks(tmp_path: Path) -> None:
    rig = Rig(tmp_path, types=(SMALL,))
    rig.cloud.refusals = [QuotaReached("VcpuLimitExceeded: none")]
    rig.give(1)
    rig.run(5)
    assert "VcpuLimitExceeded" in next(iter(rig.ended.values())).reason


class Quota:
    """Refuses whole launches that are beyond `cpus`, as EC2 does (MaxCount above the quota)."""

    def __init__(self, rig: Rig, cpus: int) -> None:
        self.rig, self.cpus = rig, cpus
        self.launch = rig.cloud.launch
        rig.cloud.launch = self.launched  # type: ignore[method-assign]

    def launched(self, requests: Sequence[LaunchRequest]) -> list[LaunchOutcome]:
        outcomes: dict[str, LaunchOutcome] = {}
        for token in dict.fromkeys(request.token for request in requests):
            batch = [request for request in requests if request.token == token]
            machines = self.rig.world.machines.values()
            used = sum(m.cpus for m in machines if m.instance.state != "terminated")
            if used + sum(request.type.cpus for request in batch) > self.cpus:
                found: list[LaunchOutcome] = [QuotaReached("VcpuLimitExceeded")] * len(batch)
            else:
                found = self.launch(batch)
            outcomes |= dict(zip((request.node for request in batch), found, strict=True))
        return [outcomes[request.node] for request in requests]


@pytest.mark.parametrize("strategy", ["one-vm-per-job", "fastest"])
def test_of_a_batch_beyond_the_quota_as_many_are_started_as_it_allows(
    tmp_path: Path, strategy: str
) -> None:
    rig = Rig(tmp_path, types=(SMALL,))
    Quota(rig, cpus=7)
    rig.give(12, strategy, seconds=300, need=Need(2, 1000))
    rig.run(30)
    assert len(rig.world.alive()) == 3
    rig.run(2000)
    assert rig.states() == [TaskState.COMPLETE] * 12


@pytest.mark.parametrize("strategy", ["asap", "fastest", "cheapest"])
def test_a_gang_beyond_the_quota_fails_and_is_not_started_over_and_over(
    tmp_path: Path, strategy: str
) -> None:
    rig = Rig(tmp_path, types=(SMALL,))
    Quota(rig, cpus=5)
    rig.give(2, strategy, need=Need(2, 1000, nodes=3))
    rig.run(60)
    assert rig.states() == [TaskState.FAILED] * 2
    assert all("VcpuLimitExceeded" in task.reason for task in rig.ended.values())
    assert len(rig.cloud.launched) == 2


def test_the_quota_of_spot_machines_fails_no_task_that_wants_none(tmp_path: Path) -> None:
    """What it waits for is capacity, and that returns."""
    rig = Rig(tmp_path, types=(SMALL,), tariff=TARIFF)
    rig.cloud.refusals = [QuotaReached("MaxSpotInstanceCountExceeded")]
    rig.give(1, spot=ONLY)
    rig.run(5)
    assert rig.states() == [TaskState.FAILED]
    rig.cloud.out = {(SMALL.name, "", ON_DEMAND)}
    rig.give(1)
    rig.run(30)
    assert len(rig.ended) == 1
    rig.cloud.out.clear()
    rig.run(300)
    assert rig.states() == [TaskState.FAILED, TaskState.COMPLETE]


def test_while_a_machine_ends_a_quota_may_still_make_room(tmp_path: Path) -> None:
    rig = Rig(tmp_path, types=(SMALL,))
    rig.world.end_time = 30.0
    Quota(rig, cpus=2)
    rig.give(1, "one-vm-per-job", seconds=60)
    rig.run(80)
    assert [vm.state for vm in rig.broker.vms()] == [VMState.TERMINATING]
    rig.give(1, "asap")
    rig.run(100)
    assert rig.states() == [TaskState.COMPLETE] * 2


def lose_replies(rig: Rig, count: int) -> None:
    """Of the next launches: the machines are started, and nobody is told."""
    launch, left = rig.cloud.launch, iter(range(count))

    def lose(requests: Sequence[LaunchRequest]) -> list[LaunchOutcome]:
        outcomes = launch(requests)
        if next(left, None) is not None:
            return [CloudUnavailable("connection lost")] * len(requests)
        return outcomes

    rig.cloud.launch = lose  # type: ignore[method-assign]


def hide_machines(rig: Rig, seconds: float) -> None:
    """Describe shows none of them for so long."""
    listed, shown = rig.cloud.instances, rig.world.now + seconds
    rig.cloud.instances = lambda *runs: listed(*runs) if rig.world.now >= shown else []  # type: ignore[method-assign]


def test_machines_whose_launch_was_not_answered_count_as_booting(tmp_path: Path) -> None:
    rig = Rig(tmp_path, limits=Limits(max_booting=2))
    lose_replies(rig, 1)
    hide_machines(rig, 20)
    rig.give(6, seconds=100)
    most = 0
    for _ in range(120):
        rig.run(1)
        most = max(most, sum(not machine.joined for machine in rig.world.machines.values()))
    assert most == 2
    assert len(rig.world.machines) == 6


def test_machines_whose_launch_was_not_answered_count_as_spent(tmp_path: Path) -> None:
    rig = Rig(tmp_path, types=(SMALL,), tariff=TARIFF, limits=Limits(max_spend=0.35))
    lose_replies(rig, 1)
    hide_machines(rig, 100)
    rig.give(2, seconds=3600, planned=3600.0, need=Need(2, 1000))
    rig.tick()
    rig.give(4, seconds=3600, planned=3600.0, need=Need(2, 1000))
    rig.run(30)
    assert len(rig.world.machines) == 3


def test_a_gang_is_complete_though_fewer_may_boot_at_a_time(tmp_path: Path) -> None:
    """Its leader, which is up and waits for the others, keeps nobody from booting."""
    rig = Rig(tmp_path, limits=Limits(max_booting=1))
    rig.give(1, need=Need(1, 1000, nodes=3))
    rig.run(100)
    assert rig.states() == [TaskState.COMPLETE]


def test_a_machine_that_came_for_a_vm_given_up_is_found_and_booked(tmp_path: Path) -> None:
    """Though no other VM is there to be looked at."""
    rig = Rig(tmp_path)
    lose_replies(rig, 1)
    hide_machines(rig, 10)
    rig.give(1)
    rig.tick()
    rig.broker.stop()
    rig.run(30)
    assert rig.world.alive() == []
    assert [vm.instance_id for vm in rig.journal.vms("r1")] == ["i-0000"]


def test_a_machine_that_died_before_its_launch_was_answered_is_booked(tmp_path: Path) -> None:
    """Its VM has no second machine: one row of the books is one machine."""
    rig = Rig(tmp_path)
    lose_replies(rig, 1)
    rig.give(1)
    rig.tick()
    rig.world.kill_machine("schlouder-r1-1", "Server.InternalError: hardware")
    rig.run(60)
    assert rig.states() == [TaskState.COMPLETE]
    booked = {vm.name: vm.instance_id for vm in rig.journal.vms("r1")}
    assert booked == {"schlouder-r1-1": "i-0000", "schlouder-r1-2": "i-0001"}


def test_a_launch_that_describe_does_not_show_yet_is_waited_for_at_the_end(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    lose_replies(rig, 1)
    rig.give(1)
    rig.tick()
    hide_machines(rig, 5)
    rig.broker.release()
    rig.world.pass_time(60)
    assert rig.world.alive() == []
    assert [vm.instance_id for vm in rig.journal.vms("r1")] == ["i-0000"]


def test_no_more_machines_boot_at_a_time_than_allowed(tmp_path: Path) -> None:
    rig = Rig(tmp_path, limits=Limits(max_booting=2))
    rig.give(7, seconds=200)
    most = 0
    for _ in range(120):
        rig.run(1)
        booting = [m for m in rig.world.machines.values() if not m.joined]
        most = max(most, len(booting))
    assert most == 2
    assert len(rig.world.machines) == 7


def test_no_machine_is_started_that_would_exceed_the_limit(tmp_path: Path) -> None:
    """An hour of SMALL costs 0.10 USD: tasks of an hour, and boots, fit three times into 0.35."""
    rig = Rig(tmp_path, types=(SMALL,), tariff=TARIFF, limits=Limits(max_spend=0.35))
    rig.give(6, seconds=3600, planned=3600.0, need=Need(2, 1000))
    rig.run(3800, step=10)
    assert len(rig.cloud.launched) == 3
    assert rig.states().count(TaskState.COMPLETE) == 3


def test_a_limit_below_the_first_machine_is_told_before_anything_is_spent(tmp_path: Path) -> None:
    rig = Rig(tmp_path, types=(SMALL,), tariff=TARIFF, limits=Limits(max_spend=0.05))
    rig.give(2, seconds=3600, planned=3600.0)
    rig.run(5)
    assert rig.cloud.launched == []
    reasons = {task.reason for task in rig.ended.values()}
    assert all("--schlouder-max-spend of 0.05 USD" in reason for reason in reasons)
    assert rig.states() == [TaskState.FAILED] * 2


def test_what_is_spent_ends_the_run_but_not_what_runs(tmp_path: Path) -> None:
    """Six tasks take 150 s instead of 50; 0.01 USD are 360 s of SMALL."""
    rig = Rig(tmp_path, types=(SMALL,), tariff=TARIFF, limits=Limits(max_spend=0.0115))
    rig.give(6, "one-vm-for-all", seconds=150, need=Need(2, 1000), planned=50.0)
    rig.run(1000)
    cancelled = [task for task in rig.ended.values() if task.state == TaskState.CANCELLED]
    assert [task.reason for task in cancelled] == [
        "not started: --schlouder-max-spend is used up"
    ] * len(cancelled)
    assert 1 <= len(cancelled) <= 3
    assert rig.states().count(TaskState.COMPLETE) == 6 - len(cancelled)
    assert rig.world.alive() == []


@pytest.mark.parametrize(("billing", "usd"), [(Billing(3600, 0), 0.10), (Billing(1, 60), 0.0125)])
def test_of_a_vm_that_was_taken_over_what_has_come_to_its_bill_since_is_spent(
    billing: Billing, usd: float
) -> None:
    """It was handed over after 3550 s; 4000 s after its start one more hour is begun, or 450 s are used."""
    vm = VM("n", "asap", SMALL, 1000.0, price=0.10, instance_id="i-1", state=VMState.READY)
    launcher = Launcher("r2", Offers((SMALL,), TARIFF), billing, Limits())
    assert launcher.spent([replace(vm, taken=4550.0)], 5000.0) == pytest.approx(usd)
    whole, first = launcher.spent([vm], 5000.0), launcher.spent([replace(vm, ended=4550.0)], 9e9)
    assert launcher.spent([replace(vm, taken=4550.0)], 5000.0) == pytest.approx(whole - first)


@pytest.mark.parametrize("quota", [1, 2, 5])
def test_within_a_quota_as_many_are_started_as_it_allows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, quota: int
) -> None:
    """EC2 starts none of a call that asks for more than the quota."""
    rig = Rig(tmp_path, types=(SMALL,))
    launch = rig.cloud.launch

    def as_ec2(requests: Sequence[LaunchRequest]) -> list[LaunchOutcome]:
        outcomes: list[LaunchOutcome] = []
        for request in requests:
            batch = [other for other in requests if other.token == request.token]
            alive = [n for n in rig.world.alive() if n not in request.batch]
            fits = len(alive) + len(batch) <= quota
            outcomes += launch([request]) if fits else [QuotaReached("VcpuLimitExceeded")]
        return outcomes

    rig.cloud.launch = as_ec2  # type: ignore[method-assign]
    rig.give(7, seconds=30)
    rig.run(400)
    assert rig.states() == [TaskState.COMPLETE] * 7
    assert rig.most_alive == quota
    assert caplog.text.count("VcpuLimitExceeded") == 1


def test_money_that_a_machine_left_over_starts_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two machines for an hour each would cost too much, but the first one takes a minute."""
    rig = Rig(tmp_path, types=(SMALL,), tariff=TARIFF, limits=Limits(max_spend=0.15))
    tasks = rig.give(2, seconds=60, planned=3600.0, need=Need(2, 1000))
    rig.run(20)
    assert len(rig.cloud.launched) == 1
    assert "No further VM is started: --schlouder-max-spend of 0.15 USD" in caplog.text
    rig.run(120)
    assert [task.state for task in tasks] == [TaskState.COMPLETE] * 2
    rig.give(1, seconds=60, planned=60.0)
    rig.run(120)
    assert rig.states() == [TaskState.COMPLETE] * 3
    assert len(rig.cloud.launched) == 2
