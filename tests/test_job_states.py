"""What the broker makes of what Slurm says of a job, on the fakes and in virtual time."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

import pytest
from fakes import SlurmJob, witness
from rig import Rig

from snakemake_executor_plugin_schlouder.broker import MAX_LOSSES
from snakemake_executor_plugin_schlouder.model import Need, TaskState


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def running_job(rig: Rig, seconds: int = 50, limit: float | None = None) -> SlurmJob:
    """The Slurm job of a task that runs for so long, begun."""
    (task,) = rig.give(1, seconds=seconds, limit=limit)
    rig.run(20)
    assert task.state == TaskState.RUNNING
    return rig.world.jobs[task.attempt_key]


def end(rig: Rig, job: SlurmJob, state: str, reason: str = "None") -> None:
    job.state, job.reason, job.ended = state, reason, rig.world.now
    if state == "COMPLETED":
        Path(job.exit_file).write_text("0\n")


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("OUT_OF_MEMORY", "used more memory than its mem_mb (1000 MiB) (Slurm: OUT_OF_MEMORY)"),
        ("TIMEOUT", "ran longer than its runtime (1 min) (Slurm: TIMEOUT)"),
        ("CANCELLED by 0", "was cancelled in Slurm by root (Slurm: CANCELLED by 0)"),
        ("DEADLINE", "could not end before its deadline (Slurm: DEADLINE)"),
    ],
)
def test_a_job_that_slurm_ended_fails_with_the_cause(rig: Rig, state: str, told: str) -> None:
    job = running_job(rig, limit=60.0)
    end(rig, job, state)
    rig.run(2)
    (task,) = rig.ended.values()
    assert (task.state, task.reason) == (TaskState.FAILED, told)


@pytest.mark.parametrize("state", ["CANCELLED", "TIMEOUT", "DEADLINE", "PREEMPTED"])
def test_a_job_that_was_done_when_slurm_ended_it_is_complete(rig: Rig, state: str) -> None:
    job = running_job(rig)
    witness(rig.config.files, "1-rule.1", 0)
    end(rig, job, state)
    rig.run(2)
    (task,) = rig.ended.values()
    assert (task.state, task.attempt) == (TaskState.COMPLETE, 1)


def test_a_job_that_ran_out_of_memory_failed_though_its_script_ended_well(rig: Rig) -> None:
    job = running_job(rig)
    witness(rig.config.files, "1-rule.1", 0)
    end(rig, job, "OUT_OF_MEMORY")
    rig.run(2)
    assert rig.states() == [TaskState.FAILED]


def test_a_preempted_job_runs_again_on_its_vm(rig: Rig) -> None:
    job = running_job(rig)
    end(rig, job, "PREEMPTED")
    rig.run(120)
    (task,) = rig.ended.values()
    assert (task.state, task.attempt) == (TaskState.COMPLETE, 2)
    assert len(rig.cloud.launched) == 1


def test_a_job_that_is_preempted_again_and_again_fails(rig: Rig) -> None:
    rig.give(1, seconds=50)
    for _ in range(MAX_LOSSES):
        rig.run(20)
        end(rig, [*rig.world.jobs.values()][-1], "PREEMPTED")
    rig.run(5)
    (task,) = rig.ended.values()
    assert task.state == TaskState.FAILED
    assert task.reason == "was preempted by another job, 3 times"


def test_a_job_an_operator_requeues_is_waited_for_and_timed_anew(rig: Rig) -> None:
    job = running_job(rig)
    (task,) = rig.broker.vms()[0].active.values()
    job.state, job.started = "PENDING", None
    rig.world.nodes[job.request.node] = "drained"
    rig.tick()
    assert (task.state, task.started) == (TaskState.SUBMITTED, None)
    rig.world.nodes[job.request.node] = "idle"
    rig.run(60)
    assert (task.state, task.attempt, task.took) == (TaskState.COMPLETE, 1, 50)


def test_a_suspended_job_is_waited_for(rig: Rig) -> None:
    job = running_job(rig)
    job.state = "SUSPENDED"
    rig.run(600, step=5)
    assert rig.ended == {}
    job.state = "RUNNING"
    rig.run(60)
    assert rig.states() == [TaskState.COMPLETE]


def test_a_held_job_is_told_once_for_its_rule_and_not_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(tmp_path, max_vms=1)
    rig.give(3, need=Need(2, 1000), seconds=20, strategy="asap")
    rig.run(20)
    jobs = list(rig.world.jobs.values())
    held = [job for job in jobs if job.state == "PENDING"]
    for job in held:
        job.reason, job.state = "JobHeldUser", "REQUEUE_HOLD"
    with caplog.at_level(logging.WARNING):
        rig.run(200)
    told = [line for line in caplog.messages if "JobHeldUser" in line]
    assert len(told) == 1
    assert f"scontrol release {held[0].slurm_id}" in told[0]
    assert "rule rule" in told[0]
    for job in held:
        job.reason, job.state = "", "PENDING"
    rig.run(200)
    assert rig.states() == [TaskState.COMPLETE] * 3
    assert all(task.attempt == 1 for task in rig.ended.values())


def test_a_reason_that_passes_soon_is_not_told(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    job = running_job(rig)
    job.reason, job.state = "ReqNodeNotAvail, UnavailableNodes:n", "PENDING"
    rig.world.nodes[job.request.node] = "reserved"
    rig.run(5)
    rig.world.nodes[job.request.node] = "idle"
    job.reason = ""
    rig.run(120)
    assert rig.states() == [TaskState.COMPLETE]
    assert "will not start by itself" not in caplog.text


def test_ten_minutes_without_slurm_that_then_knows_none_of_the_jobs(rig: Rig) -> None:
    """One job ended while Slurm was away, and was forgotten; the other one runs on."""
    ended, running = rig.give(2, seconds=1000)
    rig.run(20)
    rig.slurm.away = True
    rig.run(600, step=5)
    witness(rig.config.files, "1-rule.1", 0)
    rig.slurm.forgotten.add(ended.attempt_key)
    rig.slurm.away = False
    rig.run(2)
    assert list(rig.ended) == [ended.key]
    assert ended.state == TaskState.COMPLETE
    rig.run(600, step=5)
    assert (running.state, running.attempt) == (TaskState.COMPLETE, 1)


def test_a_job_that_slurm_lost_before_it_began_costs_no_vm(rig: Rig) -> None:
    """slurmctld was killed before it had saved the job; what runs beside it goes on."""
    lost, other = rig.give(2, seconds=300, strategy="one-vm-for-all")
    rig.run(20)
    job = rig.world.jobs[lost.attempt_key]
    job.unlaunched, job.state = True, "PENDING"
    rig.slurm.forgotten.add(lost.attempt_key)
    rig.run(700)
    assert rig.states() == [TaskState.COMPLETE] * 2
    assert (lost.attempt, other.attempt) == (2, 1)
    assert len(rig.cloud.launched) == 1


def test_a_job_whose_id_slurm_has_given_to_another_is_gone(rig: Rig) -> None:
    """slurmctld was killed before it had saved the job; the other one runs on."""
    rig.cloud.allow_kill = True
    lost, other = rig.give(2, seconds=300)
    rig.run(20)
    rig.slurm.forgotten.add(lost.attempt_key)
    assert lost.slurm_id is not None
    rig.world.jobs[other.attempt_key].slurm_id = lost.slurm_id
    rig.run(700)
    assert rig.states() == [TaskState.COMPLETE] * 2
    assert (lost.attempt, other.attempt) == (2, 1)


def test_a_job_no_node_has_heard_of_is_taken_back_and_runs_on_its_vm(tmp_path: Path) -> None:
    """slurmctld was restarted between its decision and the node's hearing of it; another job goes on."""
    rig = Rig(tmp_path, launch_timeout=100.0)
    lost, running = rig.give(2, strategy="one-vm-for-all", seconds=400)
    rig.run(20)
    rig.world.jobs[lost.attempt_key].unlaunched = True
    rig.run(80)
    assert lost.attempt == 1
    rig.run(600)
    assert rig.states() == [TaskState.COMPLETE] * 2
    assert (lost.attempt, running.attempt) == (2, 1)
    assert len(rig.cloud.launched) == 1


def test_while_nothing_moves_slurm_is_seldom_asked_for_nodes(rig: Rig) -> None:
    rig.give(1, seconds=600)
    rig.run(20)
    asked = rig.slurm.node_views
    rig.run(100)
    assert rig.slurm.node_views - asked <= 21


def test_a_node_that_is_lost_is_noticed_though_nodes_are_asked_for_seldom(rig: Rig) -> None:
    running_job(rig, seconds=600)
    rig.cloud.allow_kill = True
    rig.world.nodes["schlouder-r1-1"] = "down"
    rig.run(8)
    assert "i-0000" in rig.cloud.terminated


def test_until_the_journal_has_the_end_of_a_task_its_files_are_needed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*values: object, **more: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    job = running_job(rig)
    with monkeypatch.context() as broken:
        broken.setattr(rig.journal, "write", full)
        end(rig, job, "COMPLETED")
        rig.tick()
        assert rig.states() == [TaskState.COMPLETE]
        assert not rig.broker.is_written
    rig.tick()
    assert rig.broker.is_written
