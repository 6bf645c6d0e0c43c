"""Short tasks that share a Slurm job: each is reported as it ends, and one that fails fails alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rig import Rig

from snakemake_executor_plugin_schlouder.bundles import LENGTH, SHORT, START, Bundles, fair_share
from snakemake_executor_plugin_schlouder.model import InstanceType, Need, Task, TaskState
from snakemake_executor_plugin_schlouder.slurm import ClusterView, JobStatus
from snakemake_executor_plugin_schlouder.slurm.runner import snakemake_call
from snakemake_executor_plugin_schlouder.slurm.script import (
    BEGUN,
    GRACE,
    TIMED_OUT,
    BundledJob,
    Exit,
    exit_of,
    revoke,
)
from snakemake_executor_plugin_schlouder.slurm.states import JobPhase

TWO = InstanceType("two", 2, 8192)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path, types=(TWO,), max_vms=2)


def short(rig: Rig, count: int, strategy: str = "fastest", **values: object) -> list[Task]:
    return rig.give(count, strategy, **{"seconds": 2, "planned": 2.0, "may_bundle": True} | values)


@pytest.mark.parametrize("strategy", ["fastest", "cheapest", "asap", "one-vm-for-all"])
def test_many_short_tasks_take_few_slurm_jobs(rig: Rig, strategy: str) -> None:
    short(rig, 100, strategy)
    rig.run(600)
    assert rig.states() == [TaskState.COMPLETE] * 100
    assert len(rig.world.jobs) <= 40
    assert rig.world.twice_at_a_time() == []


def test_bundling_is_asked_for_and_for_short_tasks_only(rig: Rig) -> None:
    short(rig, 10, may_bundle=False)
    short(rig, 10, planned=SHORT + 1, seconds=31)
    rig.run(300)
    assert len(rig.world.jobs) == 20


def test_every_task_is_reported_when_it_ends_and_has_its_own_times(rig: Rig) -> None:
    tasks = short(rig, 8, "one-vm-for-all", planned=5.0, seconds=5)
    rig.run(20)
    assert 2 <= len(rig.ended) < 8
    rig.run(60)
    assert sorted(round(task.took or 0) for task in tasks) == [5] * 8
    for vm in rig.broker.vms():
        mine = [task for task in tasks if task.vm == vm.name]
        for moment in {task.started or 0 for task in mine}:
            side_by_side = sum((t.started or 0) <= moment < (t.ended or 0) for t in mine)
            assert side_by_side <= TWO.cpus


def test_a_task_that_fails_fails_alone(rig: Rig) -> None:
    short(rig, 6, "one-vm-for-all")
    (bad,) = short(rig, 1, "one-vm-for-all", code=3)
    short(rig, 6, "one-vm-for-all")
    rig.run(100)
    assert bad.state == TaskState.FAILED
    assert bad.reason == "ended with exit code 3"
    assert sum(state == TaskState.COMPLETE for state in rig.states()) == 12


@pytest.mark.parametrize("state", ["FAILED", "TIMEOUT", "OUT_OF_MEMORY", "CANCELLED"])
def test_with_the_runner_only_the_task_in_turn_fails(rig: Rig, state: str) -> None:
    tasks = short(rig, 4, "one-vm-for-all", planned=8.0, seconds=8, need=Need(2, 1000))
    rig.run(14)
    (job,) = rig.world.jobs.values()
    assert len(job.bundled) == 4
    job.state, job.ended, job.bundled = state, rig.world.now, []
    rig.run(200)
    assert [task.state for task in tasks] == [TaskState.FAILED, *[TaskState.COMPLETE] * 3]
    assert [task.attempt for task in tasks] == [1, 2, 2, 2]


def test_a_task_that_had_begun_fails_with_the_runner(rig: Rig, tmp_path: Path) -> None:
    members = [replace(rig.new_task(), attempt=1, state=TaskState.RUNNING) for _ in range(3)]
    bundles = Bundles(exit_of, revoke, lambda task: f"{tmp_path}/{task.key}")
    bundles.add(members)
    for task in members[:2]:
        Path(f"{tmp_path}/{task.key}{BEGUN}").touch()
    key = members[0].attempt_key
    died = JobStatus(key, "7", JobPhase.FAILED, "OUT_OF_MEMORY", "", 100.0, 130.0)
    told = bundles.spread(ClusterView({key: died})).jobs
    assert [told[task.attempt_key].phase for task in members] == [
        *(JobPhase.FAILED, JobPhase.FAILED, JobPhase.DISPLACED)
    ]


def test_what_a_lost_machine_had_done_counts_and_the_rest_runs_elsewhere(rig: Rig) -> None:
    rig.cloud.allow_kill = True
    short(rig, 40, planned=4.0, seconds=4)
    rig.run(22)
    done = len(rig.ended)
    rig.world.kill_machine(rig.world.alive()[0])
    rig.run(600)
    assert 0 < done < 40
    assert rig.states() == [TaskState.COMPLETE] * 40
    assert rig.world.twice_at_a_time() == []


def test_a_drained_vm_ends_what_runs_and_gives_the_rest_back(rig: Rig) -> None:
    tasks = short(rig, 20, "one-vm-for-all", planned=6.0, seconds=6)
    rig.run(12)
    rig.world.nodes["schlouder-r1-1"] = "draining"
    rig.run(300)
    assert rig.states() == [TaskState.COMPLETE] * 20
    assert len({task.vm for task in tasks}) == 2
    assert all(job.state != "CANCELLED" or job.started is None for job in rig.world.jobs.values())


@pytest.mark.parametrize("may_bundle", [False, True])
def test_each_may_reach_its_limit(rig: Rig, may_bundle: bool) -> None:
    """And be given time to end, after a slow start."""
    short(rig, 8, "one-vm-for-all", limit=60.0, may_bundle=may_bundle)
    rig.run(12)
    for job in rig.world.jobs.values():
        count = len(job.bundled)
        limit = count * (60 + GRACE) + START if may_bundle else 60
        assert job.request.limit == limit


def test_a_bundle_holds_a_minute_of_work(rig: Rig) -> None:
    short(rig, 60, "one-vm-for-all", planned=20.0, seconds=20)
    rig.run(30)
    longest = max(len(job.bundled) for job in rig.world.jobs.values())
    assert longest * 20 <= LENGTH


def test_slurm_is_asked_seldom_where_files_tell_what_ends(tmp_path: Path) -> None:
    asked = []
    for seldom in (True, False):
        rig = Rig(tmp_path / str(seldom), types=(TWO,), max_vms=2, asks_seldom=seldom)
        short(rig, 200)
        rig.run(150)
        assert rig.states() == [TaskState.COMPLETE] * 200
        asked.append(rig.slurm.views)
    assert asked[0] < 0.7 * asked[1]


def test_a_share_leaves_enough_for_the_others() -> None:
    assert [fair_share(waiting, 4, least=4) for waiting in (200, 24, 8, 1, 0)] == [25, 4, 2, 1, 0]


def test_only_a_plain_call_of_snakemake_is_forked() -> None:
    plain = "cd '/a b' && /usr/bin/python -m snakemake --snakefile 'S;f' --target-jobs 'one:i=1'"
    assert snakemake_call(plain) == (
        "/a b",
        ["--snakefile", "S;f", "--target-jobs", "one:i=1"],
    )
    assert snakemake_call("/usr/bin/python -m snakemake --cores 1") == (".", ["--cores", "1"])
    for other in (f"{plain} && touch done", f"X=$HOME; {plain}", "run 1 0", plain[8:]):
        assert snakemake_call(other) is None


def run_bundle(directory: Path, command: str, limit: float | None = None) -> Exit | None:
    """How `command` ended, which is more than a plain call of Snakemake."""
    job = BundledJob("one", command, f"{directory}/log", f"{directory}/exit", limit)
    subprocess.run(
        [sys.executable, "-m", "snakemake_executor_plugin_schlouder.slurm.runner"],
        input=json.dumps([asdict(job)]),
        text=True,
        check=True,
    )
    return exit_of(job.exit_file)


def test_what_a_job_leaves_in_the_background_ends_with_it(tmp_path: Path) -> None:
    ended = run_bundle(tmp_path, f"sleep 1000 & echo $! >{tmp_path}/left; exit 3")
    assert ended is not None and ended.code == 3
    left = int((tmp_path / "left").read_text())
    assert wait_until(lambda: not is_running(left))


def test_a_job_beyond_its_limit_ends_with_all_it_started(tmp_path: Path) -> None:
    command = f"(trap '' TERM; sleep 1000) & echo $! >{tmp_path}/left; wait"
    ended = run_bundle(tmp_path, command, limit=0.5)
    assert ended is not None and ended.code == TIMED_OUT
    left = int((tmp_path / "left").read_text())
    assert wait_until(lambda: not is_running(left))


def test_a_bundle_that_slurm_ends_begins_nothing_more_and_leaves_nothing(tmp_path: Path) -> None:
    begins = f"echo $$ >>{tmp_path}/began"
    jobs = [
        BundledJob(name, f"{begins}; sleep 1000", f"{tmp_path}/log", f"{tmp_path}/{name}", None)
        for name in ("one", "two")
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "snakemake_executor_plugin_schlouder.slurm.runner"],
        stdin=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps([asdict(job) for job in jobs]))
        process.stdin.close()
        assert wait_until((tmp_path / "began").exists, patience=30)
        process.terminate()
    assert process.returncode != 0
    (began,) = (tmp_path / "began").read_text().split()
    assert not is_running(int(began))
    assert [exit_of(job.exit_file) for job in jobs] == [None, None]


def is_running(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def wait_until(holds: Callable[[], bool], patience: float = 5.0) -> bool:
    end = time.monotonic() + patience
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()
