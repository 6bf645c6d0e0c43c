"""Tasks that span several VMs, on the fakes: started together, used together, given back together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import witness
from rig import BIG, SMALL, Rig
from test_takeover import killed_at, restart

from snakemake_executor_plugin_schlouder.gangs import Gangs
from snakemake_executor_plugin_schlouder.launcher import MAX_BOOT_FAILURES
from snakemake_executor_plugin_schlouder.market.offers import Offer
from snakemake_executor_plugin_schlouder.model import (
    VM,
    Billing,
    Need,
    SlurmOptions,
    Task,
    TaskState,
    VMState,
)
from snakemake_executor_plugin_schlouder.pool import Goal
from snakemake_executor_plugin_schlouder.provision import (
    CloudUnavailable,
    LaunchOutcome,
    LaunchRefused,
    LaunchRequest,
)
from snakemake_executor_plugin_schlouder.slurm import ClusterUnavailable, JobRequest, SubmitOutcome

PAIR: dict[str, Any] = {"need": Need(2, 1000, nodes=2), "options": SlurmOptions(tasks=4)}
LEADER, COMPANION = "schlouder-r1-1", "schlouder-r1-2"


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


@pytest.mark.parametrize("strategy", ["one-vm-per-job", "one-vm-for-all", "fastest", "cheapest"])
def test_a_task_over_two_vms_is_one_slurm_job_on_both(rig: Rig, strategy: str) -> None:
    (task,) = rig.give(1, strategy, **PAIR)
    rig.run(100)
    assert rig.ended[task.key].state == TaskState.COMPLETE
    (job,) = rig.world.jobs.values()
    assert job.request.nodes == (LEADER, COMPANION)
    assert (job.request.tasks_per_node, job.request.cpus_per_task) == (2, 1)
    assert len(rig.cloud.launched) == 2
    assert rig.world.alive() == []
    assert rig.world.nodes == {}


@pytest.mark.parametrize("late", [LEADER, COMPANION])
@pytest.mark.parametrize("strategy", ["one-vm-per-job", "fastest"])
def test_it_is_submitted_only_when_all_vms_are_up(rig: Rig, strategy: str, late: str) -> None:
    launch, refused = rig.cloud.launch, CloudUnavailable("slow down")

    def delay(requests: Sequence[LaunchRequest]) -> list[LaunchOutcome]:
        rig.cloud.launch = launch  # type: ignore[method-assign]
        return [refused if one.node == late else launch([one])[0] for one in requests]

    rig.cloud.launch = delay  # type: ignore[method-assign]
    rig.give(1, strategy, **PAIR)
    rig.run(11)
    assert set(rig.world.nodes) == {LEADER, COMPANION} - {late}
    assert rig.world.jobs == {}
    rig.run(10)
    assert set(rig.world.nodes) == {LEADER, COMPANION}
    assert len(rig.world.running_on(LEADER)) == len(rig.world.running_on(COMPANION)) == 1


def test_gangs_and_single_vms_do_not_take_each_others_tasks(rig: Rig) -> None:
    rig.give(2, "one-vm-for-all", **PAIR)
    rig.give(1, "one-vm-for-all")
    rig.give(1, "one-vm-for-all", need=Need(1, 1000, nodes=3), options=SlurmOptions(tasks=3))
    rig.run(150)
    assert rig.states() == [TaskState.COMPLETE] * 4
    used = {job.task: len(job.request.nodes) for job in rig.world.jobs.values()}
    assert used == {"r1-1": 2, "r1-2": 2, "r1-3": 1, "r1-4": 3}
    assert len(rig.cloud.launched) == 2 + 1 + 3


@pytest.mark.parametrize("strategy", ["one-vm-per-job", "fastest", "first-fit"])
def test_the_cap_counts_machines(tmp_path: Path, strategy: str) -> None:
    rig = Rig(tmp_path, max_vms=5)
    rig.give(4, strategy, seconds=100, **PAIR)
    rig.give(2, strategy)
    rig.run(900)
    assert rig.states() == [TaskState.COMPLETE] * 6
    assert rig.most_alive <= 5


def test_idle_vms_make_room_for_a_gang_and_gangs_for_a_vm(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_vms=2, billing=Billing(3600, 0, 50))
    for values in ({}, PAIR, {}, PAIR):
        rig.give(1, "fastest", **values)
        rig.run(60)
    assert rig.states() == [TaskState.COMPLETE] * 4
    assert rig.most_alive <= 2


def test_a_companion_stays_while_its_leader_works_and_goes_with_it(rig: Rig) -> None:
    rig.give(1, seconds=300, **PAIR)
    rig.run(250)
    assert rig.world.alive() == [LEADER, COMPANION]
    rig.run(66)
    assert rig.world.alive() == []


def test_an_idle_gang_is_kept_to_the_end_of_its_unit(tmp_path: Path) -> None:
    rig = Rig(tmp_path, billing=Billing(3600, 0, 50))
    rig.give(1, "one-vm-for-all", seconds=5, **PAIR)
    rig.run(3500, step=10)
    assert len(rig.world.alive()) == 2
    rig.run(90, step=5)
    assert rig.world.alive() == []


@pytest.mark.parametrize("lost", [LEADER, COMPANION])
def test_a_task_that_loses_one_machine_runs_again_on_two_others(rig: Rig, lost: str) -> None:
    rig.cloud.allow_kill = True
    (task,) = rig.give(1, seconds=50, **PAIR)
    rig.run(20)
    rig.world.kill_machine(lost)
    rig.run(150)
    assert rig.ended[task.key].state == TaskState.COMPLETE
    assert (task.attempt, task.losses) == (2, 1)
    first, second = (job.request.nodes for job in rig.world.jobs.values())
    assert not set(first) & set(second)
    reasons = {vm.name: vm.reason for vm in rig.journal.vms("r1") if vm.name in first}
    other = LEADER if lost == COMPANION else COMPANION
    assert reasons[lost] == "Server.SpotInstanceTermination"
    assert reasons[other] == f"its gang lost {lost}: Server.SpotInstanceTermination"
    assert rig.world.alive() == []
    assert rig.world.nodes == {}


def test_it_runs_again_only_when_all_its_machines_are_gone(rig: Rig) -> None:
    """Fencing: the machine that is left takes its time to end, and may write until then."""
    rig.cloud.allow_kill = True
    rig.world.end_time = 40.0
    (task,) = rig.give(1, seconds=100, **PAIR)
    rig.run(20)
    rig.world.kill_machine(LEADER)
    for _ in range(200):
        rig.run(1)
        assert rig.world.twice_at_a_time() == []
        if rig.world.machine_of(COMPANION).instance.state != "terminated":
            assert task.attempt == 1
    assert rig.ended[task.key].state == TaskState.COMPLETE
    assert task.attempt == 2


@pytest.mark.parametrize("ec2_is_away", [False, True])
def test_ranks_that_fail_because_a_machine_was_lost_are_no_failure(
    rig: Rig, ec2_is_away: bool
) -> None:
    """They notice it before anybody else."""
    rig.cloud.allow_kill = True
    (task,) = rig.give(1, seconds=100, **PAIR)
    rig.run(20)
    rig.world.kill_machine(COMPANION)
    fails(rig, task)
    rig.cloud.away = ec2_is_away
    rig.run(2)
    assert rig.ended == {}
    rig.cloud.away = False
    rig.run(200)
    assert rig.ended[task.key].state == TaskState.COMPLETE
    assert (task.attempt, task.losses) == (2, 1)


def test_they_are_no_failure_though_slurm_has_forgotten_them(rig: Rig) -> None:
    rig.cloud.allow_kill = True
    rig.world.end_time = 30.0
    (task,) = rig.give(1, seconds=100, **PAIR)
    rig.run(20)
    rig.world.kill_machine(COMPANION)
    fails(rig, task)
    rig.slurm.forgotten.add(task.attempt_key)
    rig.run(25)
    assert task.attempt == 1
    rig.run(200)
    assert rig.ended[task.key].state == TaskState.COMPLETE
    assert (task.attempt, task.losses) == (2, 1)


def test_ranks_that_fail_by_themselves_are_a_failure(rig: Rig) -> None:
    (task,) = rig.give(1, seconds=100, **PAIR)
    rig.run(20)
    fails(rig, task)
    rig.run(2)
    assert rig.ended[task.key].reason == "ended with exit code 7"


def fails(rig: Rig, task: Task) -> None:
    witness(rig.config.files, f"{task.jobid}-rule.{task.attempt}", 7)
    job = rig.world.jobs[task.attempt_key]
    job.state, job.ended = "FAILED", rig.world.now


def test_a_node_that_slurm_loses_takes_the_gang_along(rig: Rig) -> None:
    rig.cloud.allow_kill = True
    (task,) = rig.give(1, seconds=50, **PAIR)
    rig.run(20)
    rig.slurm.fail(COMPANION, "not responding")
    rig.run(150)
    assert rig.ended[task.key].state == TaskState.COMPLETE
    assert task.losses == 1
    assert len(rig.cloud.launched) == 4


def test_a_companion_that_does_not_boot_is_the_end_of_its_gang(rig: Rig) -> None:
    (task,) = rig.give(1, **PAIR)
    rig.run(5)
    rig.world.kill_machine(COMPANION, "Client.InstanceInitiatedShutdown")
    rig.run(100)
    assert rig.ended[task.key].state == TaskState.COMPLETE
    assert task.losses == 0
    assert len(rig.cloud.launched) == 4
    assert rig.world.alive() == []


def test_boots_that_fail_are_counted_by_gang(rig: Rig) -> None:
    rig.world.never_joins = True
    (task,) = rig.give(1, **PAIR)
    rig.run(1000, step=5)
    assert rig.ended[task.key].state == TaskState.FAILED
    assert f"{MAX_BOOT_FAILURES} VMs in a row did not join Slurm" in rig.ended[task.key].reason
    assert rig.world.alive() == []


def test_a_refused_companion_leaves_no_leader_behind(rig: Rig) -> None:
    launch = rig.cloud.launch

    def refuse_the_second(requests: Sequence[LaunchRequest]) -> list[LaunchOutcome]:
        return [*launch(requests[:1]), *(LaunchRefused("VcpuLimitExceeded") for _ in requests[1:])]

    rig.cloud.launch = refuse_the_second  # type: ignore[method-assign]
    (task,) = rig.give(1, **PAIR)
    rig.run(10)
    assert "VcpuLimitExceeded" in rig.ended[task.key].reason
    assert rig.world.alive() == []


def test_a_companion_drained_by_hand_lets_the_task_end_and_ends_the_gang(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(tmp_path, types=(SMALL,), max_vms=2)
    tasks = rig.give(2, "one-vm-for-all", seconds=60, **PAIR)
    rig.run(20)
    assert [job.state for job in rig.world.jobs.values()] == ["RUNNING", "PENDING"]
    rig.slurm.drain([COMPANION], "by hand")
    rig.run(5)
    assert [job.state for job in rig.world.jobs.values()] == ["RUNNING", "CANCELLED"]
    assert rig.world.alive() == [LEADER, COMPANION]
    rig.run(200)
    assert rig.states() == [TaskState.COMPLETE] * 2
    assert [task.losses for task in tasks] == [0, 0]
    assert len(rig.cloud.launched) == 4
    assert caplog.text == ""


def test_no_node_of_a_lost_gang_is_deleted_while_a_job_waits_for_it(rig: Rig) -> None:
    """Slurm hands the place in its table on: the job would start on whatever node joins next."""
    (task,) = rig.give(1, seconds=60, **PAIR)
    submit, cancel, fail = rig.slurm.submit, rig.slurm.cancel, rig.slurm.fail

    def reserve(jobs: Sequence[JobRequest]) -> list[SubmitOutcome]:
        rig.world.nodes[LEADER] = "reserved"
        return submit(jobs)

    rig.slurm.submit = reserve  # type: ignore[method-assign]
    rig.run(15)
    (waiting,) = rig.world.jobs.values()
    rig.world.end_time = 30.0
    rig.slurm.cancel = rig.slurm.fail = unanswered  # type: ignore[assignment]
    rig.world.kill_machine(COMPANION)
    rig.give(1, seconds=60)
    rig.run(20)
    assert (waiting.state, waiting.request.nodes) == ("PENDING", (LEADER, COMPANION))
    rig.slurm.cancel, rig.slurm.fail = cancel, fail  # type: ignore[method-assign]
    rig.run(300)
    assert rig.states() == [TaskState.COMPLETE] * 2
    assert (waiting.state, waiting.started) == ("CANCELLED", None)
    assert waiting.request.key in rig.world.revoked
    assert (task.attempt, task.losses) == (2, 1)


def unanswered(*_asked: object) -> None:
    raise ClusterUnavailable("away")


def test_stop_ends_a_gang_that_boots(rig: Rig) -> None:
    (task,) = rig.give(1, **PAIR)
    rig.run(3)
    rig.broker.stop()
    rig.run(5)
    assert rig.ended[task.key].state == TaskState.CANCELLED
    assert rig.world.alive() == []


def test_release_gives_back_the_whole_gang(rig: Rig) -> None:
    rig.give(1, seconds=500, **PAIR)
    rig.run(20)
    rig.broker.release()
    assert rig.world.alive() == []
    assert rig.world.nodes == {}


def test_a_killed_run_goes_on_with_its_gangs(tmp_path: Path) -> None:
    """Whenever it was killed: before or after any of its effects."""
    for moment in itertools.count():
        rig = Rig(tmp_path / str(moment), max_vms=5)
        rig.cloud.allow_kill = True
        tasks = [rig.give(1, "one-vm-for-all", identity=f"t{n}", **PAIR)[0] for n in range(3)]
        tasks += rig.give(1, identity="single")
        if not killed_at(rig, moment):
            assert moment > 20, "it was killed in many places"
            return
        rig.world.pass_time(7)
        rig.ended.clear()
        restart(rig, tasks)
        rig.run(3)
        keys = [claimed(rig, task) for task in tasks]
        rig.run(200)
        assert [rig.ended[key].state for key in keys] == [TaskState.COMPLETE] * 4, moment
        begun = [job.request.nodes for job in rig.world.jobs.values() if job.started is not None]
        assert sorted(len(nodes) for nodes in begun) == [1, 2, 2, 2], moment
        launched = [request.node for request in rig.cloud.launched]
        assert len(launched) == len(set(launched)), moment
        rig.broker.release()
        assert rig.world.alive() == [], moment
        assert rig.world.nodes == {}, moment


def claimed(rig: Rig, task: Task) -> str:
    """The key under which a task that is handed over again is waited for."""
    again = rig.new_task(
        **{name: getattr(task, name) for name in ("identity", "command", "strategy", "options")},
        need=replace(task.need, memory=1000),
    )
    live = rig.broker.claim(again, changed=0.0, is_made=True)
    if live is None:
        rig.broker.submit([again])
    return again.key if live is None else live.key


@pytest.mark.parametrize("late", [LEADER, COMPANION])
def test_a_gang_of_which_a_part_was_up_is_gone_on_with(rig: Rig, late: str) -> None:
    (task,) = rig.give(1, identity="t", **PAIR)
    rig.tick()
    rig.world.machine_of(late).started += 10
    rig.run(15)
    assert set(rig.world.nodes) == {LEADER, COMPANION} - {late}
    restart(rig, [task])
    key = claimed(rig, task)
    rig.run(60)
    assert rig.ended[key].state == TaskState.COMPLETE
    assert len(rig.cloud.launched) == 2


def test_an_idle_gang_that_is_gone_on_with_serves_tasks_of_its_width_only(tmp_path: Path) -> None:
    rig = Rig(tmp_path, billing=Billing(3600, 0, 50))
    rig.give(1, "one-vm-for-all", **PAIR)
    rig.run(40)
    restart(rig)
    rig.give(1, "one-vm-for-all")
    rig.give(1, "one-vm-for-all", **PAIR)
    rig.run(60)
    used = [job.request.nodes for job in rig.world.jobs.values()]
    assert set(used) == {(LEADER, COMPANION), ("schlouder-r1-3",)}
    assert len(rig.cloud.launched) == 3


def test_a_gang_that_is_gone_on_with_is_lost_as_a_whole(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.cloud.allow_kill = True
    (task,) = rig.give(1, seconds=50, identity="t", **PAIR)
    rig.run(20)
    restart(rig, [task])
    key = claimed(rig, task)
    rig.world.kill_machine(COMPANION)
    rig.run(200)
    assert rig.ended[key].state == TaskState.COMPLETE
    assert [job.request.nodes for job in rig.world.jobs.values()] == [
        (LEADER, COMPANION),
        ("schlouder-r1-3", "schlouder-r1-4"),
    ]
    assert rig.world.alive() == []


def test_tasks_over_several_vms_are_not_bundled(rig: Rig) -> None:
    rig.give(4, "one-vm-for-all", seconds=5, may_bundle=True, planned=5.0, **PAIR)
    rig.run(100)
    assert rig.states() == [TaskState.COMPLETE] * 4
    assert len(rig.world.jobs) == 4


def test_companions_cost_of_the_budget(tmp_path: Path) -> None:
    """800 s of work for one CPU each: two gangs would cost what four VMs do."""
    most = {}
    for nodes in (1, 2):
        rig = Rig(tmp_path / str(nodes), types=(SMALL,), goal=Goal(budget=1400.0))
        need, options = Need(2, 1000, nodes=nodes), SlurmOptions(tasks=2 * nodes)
        rig.give(8, "budget", seconds=100, planned=100.0, need=need, options=options)
        rig.run(1500, step=2)
        assert rig.states() == [TaskState.COMPLETE] * 8
        most[nodes] = rig.most_alive // nodes
    assert most[1] > most[2] == 1


def test_what_companions_have_cost_is_missing_from_the_budget(tmp_path: Path) -> None:
    most = {}
    for nodes in (1, 8):
        rig = Rig(tmp_path / str(nodes), types=(SMALL,), goal=Goal(budget=2000.0))
        need, options = Need(2, 1000, nodes=nodes), SlurmOptions(tasks=nodes)
        rig.give(1, seconds=150, need=need, options=options)
        rig.run(200)
        rig.most_alive = 0
        rig.give(8, "budget", seconds=100, planned=100.0, need=Need(2, 1000))
        rig.run(1500, step=2)
        assert rig.states() == [TaskState.COMPLETE] * 9
        most[nodes] = rig.most_alive
    assert most[1] > most[8]


def test_a_type_must_fit_what_each_vm_is_to_hold(rig: Rig) -> None:
    (task,) = rig.give(1, need=Need(17, 1000, nodes=2), options=SlurmOptions(tasks=34))
    rig.run(2)
    assert "needs 17 cpus and 1000 MiB on each of 2 VMs" in rig.ended[task.key].reason
    rig.give(1, need=Need(16, 1000, nodes=2), options=SlurmOptions(tasks=32))
    rig.run(2)
    assert [request.type for request in rig.cloud.launched] == [BIG, BIG]


def test_the_books_name_the_leader_of_a_companion(rig: Rig) -> None:
    rig.give(1, **PAIR)
    rig.give(1)
    rig.run(60)
    leaders = {vm.name: vm.leader for vm in rig.journal.vms("r1")}
    assert sorted(leaders.values(), key=str) == [None, None, LEADER]


def test_a_companion_that_fails_while_its_gang_drains_is_lost(tmp_path: Path) -> None:
    """What its ranks leave is then no failure of the job."""
    rig = Rig(tmp_path)
    rig.cloud.allow_kill = True
    rig.give(1, need=Need(2, 1000, nodes=3), options=SlurmOptions(tasks=3), seconds=100)
    rig.run(20)
    rig.world.nodes["schlouder-r1-2"] = "draining"
    rig.run(6)
    rig.world.nodes["schlouder-r1-3"] = "down"
    rig.run(6)
    (vm,) = [vm for vm in rig.broker.vms() if vm.name == "schlouder-r1-3"]
    assert vm.reason


class CountedVM(VM):
    """Counts how often its state is asked for."""

    looks = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "state":
            CountedVM.looks += 1
        return super().__getattribute__(name)


def test_a_gang_that_has_left_is_not_looked_at_any_more() -> None:
    def new_vm(strategy: str, offer: Offer, boot_time: float) -> VM:
        return CountedVM("b", strategy, offer.kind, 0.0)

    gangs, leader = Gangs(), CountedVM("a", "s", SMALL, 0.0, nodes=2)
    _, companion = gangs.assemble(leader, new_vm)
    leader.state, leader.reason = VMState.TERMINATING, "lost"
    assert list(gangs.torn()) == [(companion, leader)]
    companion.state = VMState.TERMINATING
    assert list(gangs.torn()) == []
    CountedVM.looks = 0
    assert list(gangs.torn()) == []
    assert CountedVM.looks == 0
    assert gangs.leader(companion) is leader
