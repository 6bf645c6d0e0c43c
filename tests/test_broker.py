"""The broker against the fakes: what it promises about tasks, VMs and money, in virtual time."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from fakes import witness
from rig import SMALL, Rig

from snakemake_executor_plugin_schlouder import strategies
from snakemake_executor_plugin_schlouder.broker import MAX_LOSSES
from snakemake_executor_plugin_schlouder.costs import bill_of
from snakemake_executor_plugin_schlouder.fleet import Fleet
from snakemake_executor_plugin_schlouder.journal import Journal
from snakemake_executor_plugin_schlouder.model import (
    VM,
    Billing,
    InstanceType,
    Need,
    Task,
    TaskState,
    VMState,
)
from snakemake_executor_plugin_schlouder.pool import Announcement
from snakemake_executor_plugin_schlouder.provision import (
    CloudUnavailable,
    Instance,
    LaunchRefused,
    TokenSpent,
)
from snakemake_executor_plugin_schlouder.slurm import (
    ClusterUnavailable,
    JobRequest,
    SubmitOutcome,
)
from snakemake_executor_plugin_schlouder.slurm.script import Exit, exit_of


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_no_vm_starts_before_the_first_task(rig: Rig) -> None:
    rig.run(100)
    assert rig.cloud.launched == []


def test_one_vm_per_job_starts_a_vm_for_every_task(rig: Rig) -> None:
    rig.give(5)
    rig.run(60)
    assert rig.states() == [TaskState.COMPLETE] * 5
    assert len(rig.cloud.launched) == 5


def test_one_vm_for_all_runs_everything_on_one_vm_and_fills_its_cpus(rig: Rig) -> None:
    rig.give(6, strategy="one-vm-for-all", seconds=20)
    rig.run(3 * 20 + 20)
    assert rig.states() == [TaskState.COMPLETE] * 6
    assert len(rig.cloud.launched) == 1


def test_strategies_do_not_take_each_others_vms(rig: Rig) -> None:
    rig.give(2, strategy="one-vm-for-all")
    rig.give(2, strategy="one-vm-per-job")
    rig.run(60)
    nodes = {key: task.vm for key, task in rig.ended.items()}
    assert nodes["r1-1"] == nodes["r1-2"]
    assert len(set(nodes.values())) == 3


def test_the_cap_holds_over_all_strategies(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_vms=3)
    rig.give(7)
    rig.give(3, strategy="one-vm-for-all")
    rig.run(400)
    assert rig.states() == [TaskState.COMPLETE] * 10
    assert rig.most_alive <= 3


def test_a_cap_of_one_serves_two_strategies_one_after_the_other(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_vms=1)
    rig.give(1, strategy="one-vm-for-all")
    rig.give(1, strategy="one-vm-per-job")
    rig.run(200)
    assert rig.states() == [TaskState.COMPLETE] * 2
    assert rig.most_alive == 1


def test_slurm_gets_at_most_one_task_ahead_of_each_vm(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_vms=2)
    rig.give(20, need=Need(2, 1000))
    rig.run(400)
    assert rig.states() == [TaskState.COMPLETE] * 20
    assert rig.slurm.most_queued <= 2


@pytest.mark.parametrize("strategy", ["one-vm-for-all", "fastest"])
def test_tasks_with_gpus_take_turns_and_others_run_beside_them(
    tmp_path: Path, strategy: str
) -> None:
    rig = Rig(tmp_path, types=(InstanceType("g4dn.12xlarge", 8, 65536, 4, "t4"),), max_vms=1)
    with_gpu = {task.key for task in rig.give(3, strategy, need=Need(1, 1000, 1), seconds=20)}
    rig.give(3, strategy, need=Need(1, 1000), seconds=20)
    most: dict[bool, int] = {True: 0, False: 0}
    for _ in range(120):
        rig.run(1)
        running = [
            job.task in with_gpu for vm in rig.world.nodes for job in rig.world.running_on(vm)
        ]
        most = {kind: max(most[kind], running.count(kind)) for kind in most}
    assert rig.states() == [TaskState.COMPLETE] * 6
    assert most == {True: 1, False: 3}


def test_a_task_gets_a_vm_on_which_its_constraint_holds(rig: Rig) -> None:
    rig.give(1, need=Need(1, 1000, constraint="avx|m5.4xlarge"))
    rig.run(60)
    assert [request.type.name for request in rig.cloud.launched] == ["m5.4xlarge"]
    (failed,) = rig.give(1, need=Need(1, 1000, constraint="avx"))
    rig.run(2)
    assert "constraint: 'avx' names avx, which no VM has" in rig.ended[failed.key].reason


def test_an_idle_vm_is_given_back_and_its_node_deleted(rig: Rig) -> None:
    rig.give(1, strategy="one-vm-for-all", seconds=5)
    rig.run(20)
    assert len(rig.world.alive()) == 1
    rig.run(60)
    assert rig.world.alive() == []
    assert rig.world.nodes == {}


def test_a_vm_that_no_job_can_use_again_goes_at_once(rig: Rig) -> None:
    rig.give(1, seconds=5)
    rig.run(22)
    assert rig.world.alive() == []


def test_with_long_units_an_idle_vm_stays_until_its_unit_is_nearly_over(tmp_path: Path) -> None:
    rig = Rig(tmp_path, billing=Billing(3600, 0, 50))
    rig.give(1, strategy="one-vm-for-all", seconds=5)
    rig.run(3500, step=10)
    assert len(rig.world.alive()) == 1
    rig.run(80, step=5)
    assert rig.world.alive() == []


def test_a_failing_job_fails_alone_with_its_exit_code(rig: Rig) -> None:
    good, bad = rig.give(1)[0], rig.give(1, code=3)[0]
    witness(rig.config.files, f"{bad.jobid}-rule.1", 3)
    rig.run(60)
    assert rig.ended[good.key].state == TaskState.COMPLETE
    assert rig.ended[bad.key].state == TaskState.FAILED
    assert rig.ended[bad.key].reason == "ended with exit code 3"


def test_a_success_that_its_witness_denies_is_a_failure(rig: Rig) -> None:
    (task,) = rig.give(1)
    rig.witness = lambda exit_file: Exit(9)
    rig.run(60)
    assert rig.ended[task.key].reason == "ended with exit code 9"


def test_a_success_without_an_exit_code_is_done_again_elsewhere(rig: Rig) -> None:
    """slurmctld has taken the end of another job for it: the script goes on, its machine is ended first."""
    (task,) = rig.give(1, seconds=300)
    rig.run(20)
    rig.world.jobs[task.attempt_key].state = "COMPLETED"
    rig.run(80)
    assert task.key not in rig.ended
    rig.cloud.allow_kill = True
    rig.run(500)
    assert rig.states() == [TaskState.COMPLETE]
    assert (task.attempt, task.losses) == (2, 1)
    assert rig.world.done == [task.key]


def test_an_exit_code_that_comes_late_counts(rig: Rig) -> None:
    (task,) = rig.give(1, seconds=20)
    rig.witness = lambda exit_file: None
    rig.run(70)
    assert task.key not in rig.ended
    rig.witness = exit_of
    rig.run(5)
    assert (rig.states(), task.attempt) == ([TaskState.COMPLETE], 1)


def test_a_job_that_slurmd_could_not_launch_runs_on_another_vm(rig: Rig) -> None:
    """As where the disk of its VM is full."""
    (task,) = rig.give(1)
    rig.run(5)
    rig.world.launches_fail = 1
    rig.run(60)
    first, second = rig.broker.vms()
    assert first.state == VMState.GONE
    assert rig.states() == [TaskState.COMPLETE]
    assert (task.attempt, task.losses, task.vm) == (2, 1, second.name)


def test_machines_of_which_ec2_knows_nothing_live_while_slurm_hears_of_them(rig: Rig) -> None:
    rig.give(2, seconds=600)
    rig.run(150)
    rig.cloud.hidden = dict.fromkeys(rig.world.machines, rig.world.now + 300)
    rig.run(600)
    assert rig.states() == [TaskState.COMPLETE] * 2
    assert len(rig.broker.vms()) == 2


def test_a_machine_that_shows_itself_after_its_record_was_closed_is_ended(rig: Rig) -> None:
    rig.give(2, seconds=600)
    rig.run(150)
    (id_, *_) = rig.world.machines
    rig.cloud.allow_kill = True
    rig.world.nodes["schlouder-r1-1"] = "down"
    rig.cloud.hidden = {id_: rig.world.now + 200}
    rig.run(180)
    assert rig.broker.vms()[0].state == VMState.GONE
    assert rig.world.machines[id_].instance.is_alive
    rig.run(120)
    assert not rig.world.machines[id_].instance.is_alive
    assert rig.broker.vms()[0].state == VMState.GONE


def test_no_job_of_somebody_else_is_ended_with_a_vm_that_is_no_good(rig: Rig) -> None:
    (task,) = rig.give(1, seconds=300)
    rig.run(20)
    (vm,) = rig.broker.vms()
    rig.slurm.foreign = {vm.name: ["77"]}
    rig.slurm.forgotten.add(task.attempt_key)
    rig.run(60)
    assert vm.state == VMState.DRAINING
    assert rig.world.machines["i-0000"].instance.is_alive
    rig.slurm.foreign.clear()
    rig.cloud.allow_kill = True
    rig.run(500)
    assert rig.states() == [TaskState.COMPLETE]


def test_what_ran_on_a_vm_that_is_cut_off_waits_for_a_word_of_it(rig: Rig) -> None:
    """Slurm calls the cancelled job ended, but its script goes on."""
    (task,) = rig.give(1, seconds=300)
    rig.run(20)
    (vm,) = rig.broker.vms()
    rig.world.jobs[task.attempt_key].state = "CANCELLED"
    task.recalled = True
    rig.slurm.quiet.add(vm.name)
    rig.world.pass_time(1)
    rig.run(30)
    assert task.attempt == 1
    rig.slurm.quiet.clear()
    rig.run(10)
    assert task.attempt == 2


def test_a_vm_that_has_just_joined_hears_of_its_owner_at_once(rig: Rig) -> None:
    rig.give(1, seconds=300)
    rig.run(30)
    rig.give(1, seconds=300)
    rig.run(20)
    first, second = (rig.world.leases[vm.name].written for vm in rig.broker.vms())
    assert first < second <= first + 40


def test_a_job_that_slurm_refuses_fails_alone(rig: Rig) -> None:
    good, bad = rig.give(2)
    rig.slurm.refuse = {bad.name + "\n"}
    rig.run(60)
    assert rig.ended[good.key].state == TaskState.COMPLETE
    assert "Invalid account" in rig.ended[bad.key].reason


def test_a_task_too_big_for_every_type_fails_with_the_offers(rig: Rig) -> None:
    (task,) = rig.give(1, need=Need(17, 1000))
    rig.run(5)
    assert "m5.4xlarge (16 cpus" in rig.ended[task.key].reason
    assert rig.cloud.launched == []


def test_the_one_vm_fits_every_rule_known_to_use_it(rig: Rig) -> None:
    rig.broker.expect(
        Announcement("one-vm-for-all", "rule", Need(cpus, 100), None) for cpus in (1, 8)
    )
    rig.give(1, strategy="one-vm-for-all")
    rig.run(5)
    assert [request.type.name for request in rig.cloud.launched] == ["m5.4xlarge"]


def test_intent_is_in_the_journal_before_the_launch(rig: Rig) -> None:
    seen: list[tuple[str, str]] = []
    launch = rig.cloud.launch

    def spy(requests):  # type: ignore[no-untyped-def]
        seen.extend((vm.name, vm.state) for vm in rig.journal.vms("r1"))
        return launch(requests)

    rig.cloud.launch = spy  # type: ignore[method-assign]
    rig.give(1)
    rig.run(2)
    assert seen == [("schlouder-r1-1", "requested")]


def test_a_launch_without_answer_is_repeated_with_the_same_token(rig: Rig) -> None:
    tokens: list[str] = []
    launch = rig.cloud.launch

    def spy(requests):  # type: ignore[no-untyped-def]
        tokens.extend(request.token for request in requests)
        return launch(requests)

    rig.cloud.launch = spy  # type: ignore[method-assign]
    rig.cloud.refusals = [CloudUnavailable("RequestLimitExceeded: slow down")]
    rig.give(1)
    rig.run(60)
    assert len(tokens) == 2
    assert len(set(tokens)) == 1
    assert rig.states() == [TaskState.COMPLETE]


def test_a_spent_token_is_replaced(rig: Rig) -> None:
    rig.cloud.refusals = [TokenSpent("terminated")]
    rig.give(1)
    rig.run(60)
    assert rig.states() == [TaskState.COMPLETE]


def test_a_refused_launch_fails_the_tasks_with_the_cloud_s_words(rig: Rig) -> None:
    rig.cloud.refusals = [LaunchRefused("UnauthorizedOperation: you may not")]
    rig.give(1)
    rig.run(5)
    assert "UnauthorizedOperation" in next(iter(rig.ended.values())).reason


def test_after_a_refused_launch_the_vms_there_are_take_the_work(rig: Rig) -> None:
    rig.give(1, seconds=30)
    rig.run(2)
    rig.cloud.refusals = [LaunchRefused("VcpuLimitExceeded: no more")] * 2
    rig.give(2, seconds=5)
    rig.run(90)
    assert rig.states() == [TaskState.COMPLETE] * 3
    assert len(rig.cloud.launched) == 1


def test_a_task_whose_machine_died_runs_again_elsewhere(rig: Rig) -> None:
    (task,) = rig.give(1, seconds=50)
    rig.run(20)
    rig.world.kill_machine("schlouder-r1-1")
    rig.run(120)
    assert rig.ended[task.key].state == TaskState.COMPLETE
    assert rig.ended[task.key].attempt == 2
    assert rig.world.alive() == []
    assert rig.world.nodes == {}


def test_a_task_is_not_run_again_before_its_lost_machine_is_terminated(rig: Rig) -> None:
    """Fencing: the node is down for Slurm, but the machine may still write."""
    (task,) = rig.give(1, seconds=50)
    rig.run(20)
    rig.cloud.allow_kill = True
    rig.cloud.away = True
    rig.world.nodes["schlouder-r1-1"] = "down"
    rig.run(60)
    assert task.attempt == 1
    rig.cloud.away = False
    rig.run(120)
    assert rig.ended[task.key].state == TaskState.COMPLETE
    assert task.attempt == 2


def test_a_task_that_loses_every_machine_fails_in_the_end(rig: Rig) -> None:
    (task,) = rig.give(1, seconds=50)
    for number in range(1, MAX_LOSSES + 1):
        rig.run(20)
        rig.world.kill_machine(f"schlouder-r1-{number}")
        rig.run(20)
    rig.run(20)
    assert rig.ended[task.key].state == TaskState.FAILED
    assert "machine was lost" in rig.ended[task.key].reason
    assert len(rig.cloud.launched) == MAX_LOSSES


def test_a_result_written_before_the_machine_died_counts(rig: Rig) -> None:
    (task,) = rig.give(1, seconds=50)
    rig.run(20)
    witness(rig.config.files, f"{task.jobid}-rule.1", 0)
    rig.world.kill_machine("schlouder-r1-1")
    rig.run(20)
    assert rig.ended[task.key].state == TaskState.COMPLETE
    assert task.attempt == 1


def test_a_vm_that_never_joins_is_given_up_and_after_three_no_more_are_tried(rig: Rig) -> None:
    rig.world.never_joins = True
    (task,) = rig.give(1)
    rig.run(400)
    assert rig.ended[task.key].state == TaskState.FAILED
    assert "3 VMs in a row did not join Slurm" in rig.ended[task.key].reason
    assert len(rig.cloud.launched) == 3
    assert rig.world.alive() == []


def test_nothing_is_lost_or_destroyed_while_slurm_is_away(rig: Rig) -> None:
    rig.give(2, seconds=40)
    rig.run(20)
    rig.slurm.away = True
    rig.run(600, step=5)
    assert rig.ended == {}
    assert len(rig.world.alive()) == 2
    rig.slurm.away = False
    rig.run(60)
    assert rig.states() == [TaskState.COMPLETE] * 2


def test_nothing_is_lost_or_destroyed_while_ec2_is_away(rig: Rig) -> None:
    rig.give(2, seconds=40)
    rig.run(20)
    rig.cloud.away = True
    rig.run(30)
    rig.give(1, seconds=5)
    rig.run(300, step=5)
    rig.cloud.away = False
    rig.run(120)
    assert rig.states() == [TaskState.COMPLETE] * 3
    assert rig.world.alive() == []


def test_a_job_slurm_forgot_is_neither_success_nor_failure(rig: Rig) -> None:
    rig.cloud.allow_kill = True
    (task,) = rig.give(1, seconds=30)
    rig.run(20)
    rig.slurm.forgotten.add(task.attempt_key)
    rig.run(120)
    assert rig.ended[task.key].state == TaskState.COMPLETE
    assert task.attempt == 2


def test_a_job_slurm_forgot_counts_when_its_witness_tells(rig: Rig) -> None:
    (task,) = rig.give(1, seconds=30)
    rig.run(20)
    rig.slurm.forgotten.add(task.attempt_key)
    witness(rig.config.files, f"{task.jobid}-rule.1", 0)
    rig.run(5)
    assert rig.ended[task.key].state == TaskState.COMPLETE


def test_stop_drops_what_slurm_has_not_got_and_lets_the_rest_end(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_vms=1)
    rig.give(5, need=Need(2, 1000), seconds=30)
    rig.run(20)
    rig.broker.stop()
    rig.run(120)
    assert sorted(rig.states()) == [TaskState.CANCELLED] * 3 + [TaskState.COMPLETE] * 2
    assert rig.world.alive() == []


def test_release_gives_everything_back_whatever_state_it_is_in(rig: Rig) -> None:
    rig.give(3, seconds=500)
    rig.run(20)
    rig.give(2)
    rig.run(1)
    rig.give(1)
    rig.broker.release()
    assert rig.world.alive() == []
    assert rig.world.nodes == {}
    rig.tick()
    assert rig.states() == [TaskState.CANCELLED] * 6


def test_release_twice_is_release_once(rig: Rig) -> None:
    rig.give(2, seconds=500)
    rig.run(20)
    rig.broker.release()
    terminated = list(rig.cloud.terminated)
    rig.broker.release()
    assert rig.cloud.terminated == terminated


def lose_launch_replies(rig: Rig) -> None:
    """Machines start from now on, and nobody hears of it."""
    launch = rig.cloud.launch

    def lose_the_reply(requests):  # type: ignore[no-untyped-def]
        launch(requests)
        return [CloudUnavailable("connection lost") for _ in requests]

    rig.cloud.launch = lose_the_reply  # type: ignore[method-assign]


def test_release_finds_a_machine_whose_launch_was_never_answered(rig: Rig) -> None:
    lose_launch_replies(rig)
    rig.give(1)
    rig.run(1)
    assert len(rig.world.alive()) == 1
    rig.broker.release()
    assert rig.world.alive() == []


def test_the_books_know_a_machine_that_nobody_heard_of_before_the_release(rig: Rig) -> None:
    """Its launch was not answered, and its VM had been given up since."""
    lose_launch_replies(rig)
    rig.give(1)
    rig.tick()
    rig.cloud.away = True
    rig.broker.stop()
    rig.run(10)
    assert [vm.state.value for vm in rig.broker.vms()] == ["gone"]
    rig.cloud.away = False
    rig.world.end_time = 1000.0
    rig.broker.release()
    (vm,) = rig.journal.vms("r1")
    machine = rig.world.machine_of(vm.name)
    assert (vm.instance_id, vm.meter_end) == (machine.instance.id, machine.instance.ended)


def test_release_ends_machines_though_slurm_is_away(rig: Rig) -> None:
    rig.cloud.allow_kill = True
    rig.give(2, seconds=500)
    rig.run(20)
    rig.slurm.away = True
    rig.broker.release()
    assert rig.world.alive() == []


def test_release_waits_neither_long_nor_again_for_a_slurm_that_is_away(rig: Rig) -> None:
    """Twenty nodes cannot be deleted; the machines are gone, and a job that comes late does not begin."""
    rig.cloud.allow_kill = True
    rig.give(20, seconds=500)
    rig.run(20)
    rig.slurm.away, rig.slurm.silence = True, 18.0
    before = rig.world.now
    rig.broker.hurry()
    for _ in range(3):
        rig.broker.release()
        rig.tick()
    assert rig.world.now - before < 20
    assert rig.world.alive() == []
    assert rig.states() == [TaskState.CANCELLED] * 20
    assert len(rig.world.revoked) == 20


def test_a_vm_with_somebody_else_s_job_is_kept(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.give(1, seconds=5)
    rig.run(12)
    rig.slurm.foreign = {"schlouder-r1-1": ["77"]}
    rig.run(60)
    rig.broker.release()
    assert rig.world.alive() == ["schlouder-r1-1"]
    assert "Slurm job 77" in caplog.text


def test_a_machine_whose_launch_was_given_up_is_ended_all_the_same(rig: Rig) -> None:
    """The reply is lost, then the task is dropped: no VM of ours stands for the machine any more."""
    lose_launch_replies(rig)
    rig.give(1)
    rig.run(1)
    rig.broker.stop()
    rig.run(3)
    rig.broker.release()
    assert rig.world.alive() == []


def test_a_submission_without_reply_is_looked_for_before_it_is_made_again(rig: Rig) -> None:
    submit = rig.slurm.submit

    def lose_the_reply(jobs: Sequence[JobRequest]) -> list[SubmitOutcome]:
        submit(jobs)
        rig.slurm.submit = submit  # type: ignore[method-assign]
        return [ClusterUnavailable("timed out")]

    rig.slurm.submit = lose_the_reply  # type: ignore[method-assign]
    (task,) = rig.give(1)
    rig.run(60)
    assert rig.ended[task.key].state == TaskState.COMPLETE
    assert len(rig.world.jobs) == 1


def test_a_submission_that_arrives_after_it_was_given_up_is_cancelled(rig: Rig) -> None:
    submit, late = rig.slurm.submit, []

    def delay(jobs: Sequence[JobRequest]) -> list[SubmitOutcome]:
        late.append(jobs)
        rig.slurm.submit = submit  # type: ignore[method-assign]
        return [ClusterUnavailable("timed out")]

    rig.slurm.submit = delay  # type: ignore[method-assign]
    (task,) = rig.give(1, seconds=30)
    rig.run(30)
    assert task.attempt == 2
    submit(late[0])
    rig.run(60)
    late_job = rig.world.jobs[f"{task.key}.1"]
    assert late_job.state in ("CANCELLED", "FAILED")
    assert late_job.started in (None, late_job.ended)
    assert rig.ended[task.key].state == TaskState.COMPLETE


def test_a_launch_that_took_long_to_get_through_does_not_count_as_a_slow_boot(rig: Rig) -> None:
    rig.cloud.away = True
    rig.give(1)
    rig.run(300, step=5)
    rig.cloud.away = False
    rig.run(120)
    assert rig.states() == [TaskState.COMPLETE]
    assert len(rig.cloud.launched) == 1


def breaks(journal: Journal) -> Callable[[], None]:
    """Makes every write fail; returns what mends it."""
    write = journal.write

    def fail(*_values: object, **_named: object) -> None:
        raise sqlite3.OperationalError("disk full")

    def mend() -> None:
        journal.write = write  # type: ignore[method-assign]

    journal.write = fail  # type: ignore[method-assign]
    return mend


def test_nothing_starts_while_the_journal_cannot_be_written(rig: Rig) -> None:
    rig.give(1)
    mend = breaks(rig.journal)
    rig.run(5)
    assert rig.cloud.launched == []
    mend()
    rig.run(60)
    assert rig.states() == [TaskState.COMPLETE]


def test_what_runs_ends_and_is_reported_though_the_journal_cannot_be_written(rig: Rig) -> None:
    rig.give(2, seconds=30)
    rig.run(20)
    breaks(rig.journal)
    rig.run(60)
    assert rig.states() == [TaskState.COMPLETE] * 2
    assert rig.world.alive() == []


def test_a_journal_that_stays_unwritable_ends_the_run(rig: Rig) -> None:
    rig.give(1)
    breaks(rig.journal)
    rig.run(400)
    assert rig.states() == [TaskState.CANCELLED]


def test_a_journal_that_cannot_be_written_keeps_no_vm_alive(rig: Rig) -> None:
    rig.give(2, seconds=500)
    rig.run(20)
    breaks(rig.journal)
    rig.broker.release()
    assert rig.world.alive() == []
    assert rig.world.nodes == {}


def test_a_task_queued_ahead_on_a_lost_machine_is_recalled_before_it_runs_elsewhere(
    tmp_path: Path,
) -> None:
    """Its old submission must never start, or the task would run twice."""
    rig = Rig(tmp_path, max_vms=1)
    rig.give(3, need=Need(2, 1000), seconds=40)
    rig.run(20)
    ahead = [job for job in rig.world.jobs.values() if job.state == "PENDING"]
    assert len(ahead) == 1
    rig.world.kill_machine("schlouder-r1-1")
    rig.run(300)
    assert rig.states() == [TaskState.COMPLETE] * 3
    assert ahead[0].state == "CANCELLED"
    assert ahead[0].request.key in rig.world.revoked


def test_a_node_drained_by_hand_gives_its_waiting_job_back(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_vms=2)
    rig.give(1, need=Need(2, 1000), seconds=60, strategy="one-vm-for-all")
    rig.give(1, need=Need(2, 1000), seconds=60, strategy="one-vm-for-all")
    rig.run(20)
    rig.world.nodes["schlouder-r1-1"] = "draining"
    rig.run(5)
    assert [job.state for job in rig.world.jobs.values()] == ["RUNNING", "CANCELLED"]
    rig.run(60)
    rig.world.nodes["schlouder-r1-1"] = "drained"
    rig.run(120)
    assert rig.states() == [TaskState.COMPLETE] * 2
    assert [task.losses for task in rig.ended.values()] == [0, 0]


def test_a_drain_that_did_not_get_through_is_repeated(rig: Rig) -> None:
    drain, calls = rig.slurm.drain, []

    def fail_once(nodes: Iterable[str], reason: str) -> None:
        calls.append(reason)
        if len(calls) == 1:
            raise ClusterUnavailable("away")
        drain(nodes, reason)

    rig.slurm.drain = fail_once  # type: ignore[method-assign]
    rig.give(1, seconds=5)
    rig.give(1, seconds=300)
    rig.run(60)
    assert rig.world.alive() == ["schlouder-r1-2"]


def test_a_node_that_was_resumed_by_hand_is_drained_again(rig: Rig) -> None:
    rig.give(1, seconds=5)
    rig.give(1, seconds=300)
    rig.slurm.foreign = {"schlouder-r1-1": ["9"]}
    rig.run(30)
    rig.slurm.foreign = {}
    rig.world.nodes["schlouder-r1-1"] = "idle"
    rig.run(10)
    assert rig.world.alive() == ["schlouder-r1-2"]


def test_release_removes_the_nodes_of_machines_that_take_a_minute_to_end(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """As on EC2: the call returns while they are shutting down, and Slurm has no node of theirs."""
    rig.world.end_time = 60.0
    rig.cloud.allow_kill = True
    rig.give(2, seconds=500)
    rig.run(20)
    before = rig.world.now
    rig.broker.release()
    assert rig.world.now - before < 10
    assert rig.world.alive() == []
    assert rig.world.nodes == {}
    assert caplog.text == ""


def test_a_node_that_slurm_will_not_give_up_is_told_with_the_way_to_remove_it(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.cloud.allow_kill = True
    rig.give(1, seconds=500)
    rig.run(20)
    rig.slurm.delete = lambda node: False  # type: ignore[method-assign]
    rig.broker.release()
    assert rig.world.alive() == []
    assert "scontrol delete nodename=schlouder-r1-1" in caplog.text


def test_lost_replies_do_not_count_as_lost_machines(rig: Rig) -> None:
    submit, calls = rig.slurm.submit, []

    def fail_thrice(jobs: Sequence[JobRequest]) -> list[SubmitOutcome]:
        calls.append(jobs)
        if len(calls) <= 3:
            return [ClusterUnavailable("temporarily unable")]
        return submit(jobs)

    rig.slurm.submit = fail_thrice  # type: ignore[method-assign]
    (task,) = rig.give(1, seconds=100)
    rig.run(80)
    rig.world.kill_machine("schlouder-r1-1")
    rig.run(300)
    assert rig.ended[task.key].state == TaskState.COMPLETE
    assert task.losses == 1


class Raising(strategies.Asap):
    """A user's strategy with a bug."""

    def choose(self, task: Task, fleet: Fleet) -> VM | None:
        raise KeyError("oh")


class Inventing(strategies.Asap):
    """A user's strategy that hands out a VM nobody has."""

    def choose(self, task: Task, fleet: Fleet) -> VM | None:
        return VM("mine", "s", SMALL, 0.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [("test_broker:Raising", "KeyError('oh')"), ("test_broker:Inventing", "no VM of its fleet")],
)
def test_a_users_strategy_that_fails_is_named_and_ends_the_run_cleanly(
    rig: Rig, name: str, message: str
) -> None:
    running = rig.give(1, seconds=30)[0]
    rig.run(15)
    bad = rig.give(3, strategy=name)
    rig.run(60)
    assert rig.ended[running.key].state == TaskState.COMPLETE
    assert message in rig.ended[bad[0].key].reason
    assert name in rig.ended[bad[0].key].reason
    assert len(rig.ended) == 4
    assert rig.world.alive() == []


def test_tasks_are_taken_over_though_the_journal_cannot_be_written(rig: Rig) -> None:
    write = rig.journal.write
    breaks(rig.journal)
    rig.give(1)
    rig.run(20)
    assert rig.cloud.launched == [], "nothing is started that the journal does not know"
    rig.journal.write = write  # type: ignore[method-assign]
    rig.run(60)
    assert rig.states() == [TaskState.COMPLETE]
    assert [record.state for record in rig.journal.tasks("r1")] == ["complete"]


def test_a_vm_whose_node_slurm_has_lost_is_replaced(rig: Rig) -> None:
    rig.cloud.allow_kill = True
    rig.give(1, strategy="one-vm-for-all", seconds=5)
    rig.run(17)
    rig.world.nodes.clear()
    rig.give(1, strategy="one-vm-for-all", seconds=5)
    rig.run(120)
    assert rig.states() == [TaskState.COMPLETE] * 2
    assert len(rig.cloud.launched) == 2


def test_a_task_taken_back_waits_for_the_end_of_a_node_that_failed(rig: Rig) -> None:
    """Its node was drained by somebody, and failed while Slurm did not answer."""
    rig.cloud.allow_kill = True
    rig.world.end_time = 60
    rig.give(seconds=200)
    while "r1-1.1" not in rig.world.jobs:
        rig.tick()
        rig.world.pass_time(0.5)
    rig.slurm.away = True
    rig.run(5)
    rig.world.nodes["schlouder-r1-1"] = "drained"
    rig.world.jobs["r1-1.1"].state = "NODE_FAIL"
    rig.slurm.away = False
    for _ in range(40):
        rig.tick()
        rig.world.pass_time(1)
        assert rig.world.twice_at_a_time() == []


def test_what_is_known_is_ended_while_ec2_lists_nothing(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    def silent(_run: str) -> list[Instance]:
        raise CloudUnavailable("the right ec2:DescribeInstances is missing")

    rig.give(2, seconds=500)
    rig.run(20)
    rig.cloud.allow_kill = True
    rig.cloud.instances = silent  # type: ignore[method-assign,assignment]
    rig.broker.release()
    assert rig.world.alive() == []
    assert "ec2:DescribeInstances" in caplog.text


def test_what_ec2_did_not_end_goes_on_to_cost(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    def refused(_ids: Sequence[str]) -> None:
        raise CloudUnavailable("the right ec2:TerminateInstances is missing")

    rig.give(1, seconds=500)
    rig.run(20)
    rig.cloud.terminate = refused  # type: ignore[method-assign,assignment]
    rig.broker.release()
    (vm,) = rig.broker.vms()
    assert vm.ended is None
    assert "aws ec2 terminate-instances --instance-ids i-0000" in caplog.text


def test_machines_that_go_at_the_same_time_are_ended_by_one_call(rig: Rig) -> None:
    calls: list[list[str]] = []
    terminate = rig.cloud.terminate

    def spy(instance_ids: Sequence[str]) -> None:
        calls.append(list(instance_ids))
        terminate(instance_ids)

    rig.cloud.terminate = spy  # type: ignore[method-assign]
    rig.give(6, seconds=30)
    rig.run(200)
    assert rig.states() == [TaskState.COMPLETE] * 6
    assert [len(call) for call in calls] == [6]


LEASE_OVER = "schlouder: the lease is over"
ITSELF = "Client.InstanceInitiatedShutdown: Instance initiated shutdown"


def test_a_vm_whose_lease_ran_out_while_its_owner_slept_ends_what_runs_and_gets_no_more(
    tmp_path: Path,
) -> None:
    """It had drained itself, and then found a job: that is waited for."""
    rig = Rig(tmp_path, max_vms=2)
    rig.give(3, need=Need(2, 1000), seconds=900, strategy="one-vm-for-all")
    rig.run(20)
    rig.world.pass_time(700)
    rig.world.nodes["schlouder-r1-1"] = "draining"
    rig.slurm.reasons["schlouder-r1-1"] = LEASE_OVER
    rig.run(10)
    first, second = rig.broker.vms()
    assert first.state == VMState.DRAINING
    assert not first.queue and len(first.active) == 1
    assert [job.state for job in rig.world.jobs.values()][:2] == ["RUNNING", "CANCELLED"]
    rig.run(240)
    rig.world.kill_machine("schlouder-r1-1", ITSELF)
    rig.run(2000)
    assert rig.states() == [TaskState.COMPLETE] * 3
    assert [task.losses for task in rig.ended.values()] == [0, 0, 0]
    assert first.state == second.state == VMState.GONE


def test_a_vm_that_ended_itself_while_its_owner_slept_is_not_billed_for_the_sleep(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path, max_vms=2, billing=Billing(unit=3600, minimum=0))
    rig.give(1, seconds=30)
    rig.run(60)
    (vm,) = rig.broker.vms()
    assert vm.ready is not None and vm.is_unused
    rig.world.nodes["schlouder-r1-1"] = "drained"
    rig.slurm.reasons["schlouder-r1-1"] = LEASE_OVER
    rig.world.kill_machine("schlouder-r1-1", ITSELF)
    rig.world.pass_time(5 * 3600)
    rig.give(1, seconds=30)
    rig.run(100)
    assert rig.states() == [TaskState.COMPLETE] * 2
    assert vm.state == VMState.GONE
    record = rig.journal.vms("r1")[0]
    assert bill_of(record, [], rig.config.billing, rig.world.now).units == 1


def test_a_machine_that_ec2_does_not_list_for_a_minute_lives(rig: Rig) -> None:
    """However old it is, and however often EC2 is asked because another one boots."""
    rig.give(1, seconds=400)
    rig.run(200)
    rig.cloud.hidden["i-0000"] = rig.world.now + 60
    rig.world.boot_time = 90
    rig.give(1, seconds=20)
    rig.run(300)
    assert rig.states() == [TaskState.COMPLETE, TaskState.COMPLETE]
    assert len(rig.world.jobs) == 2
