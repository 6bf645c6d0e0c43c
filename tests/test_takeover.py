"""A run that is killed at any moment is gone on with: no task runs twice, no VM is asked for twice."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rig import BIG, SMALL, Rig

from snakemake_executor_plugin_schlouder import reattach
from snakemake_executor_plugin_schlouder.bundles import Bundles
from snakemake_executor_plugin_schlouder.executor import check_strays
from snakemake_executor_plugin_schlouder.journal import Journal, RunRecord, birth_of
from snakemake_executor_plugin_schlouder.market.tariff import Tariff
from snakemake_executor_plugin_schlouder.model import (
    ON_DEMAND,
    PREFER,
    SPOT,
    Need,
    SchlouderError,
    Task,
    TaskState,
    VMState,
)
from snakemake_executor_plugin_schlouder.pool import Announcement
from snakemake_executor_plugin_schlouder.slurm import ClusterView, JobStatus
from snakemake_executor_plugin_schlouder.slurm.cli import SlurmCommands
from snakemake_executor_plugin_schlouder.slurm.states import JobPhase

TYPES = {kind.name: kind for kind in (SMALL, BIG)}
EFFECTS = (
    *(("cloud", name) for name in ("launch", "terminate")),
    *(("slurm", name) for name in ("submit", "drain", "delete", "cancel")),
    ("journal", "write"),
)


class Killed(BaseException):
    """SIGKILL: nothing catches it."""


def killed_at(rig: Rig, moment: int) -> bool:
    """Runs `rig` until the process is killed before (even) or after (odd) its so manieth effect. False:
    the run was over by then."""
    counter = itertools.count()

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **more: Any) -> Any:
            if next(counter) == moment:
                raise Killed
            result = call(*arguments, **more)
            if next(counter) == moment:
                raise Killed
            return result

        return wrapper

    real = [(getattr(rig, port), name) for port, name in EFFECTS]
    for port, name in real:
        setattr(port, name, guarded(getattr(port, name)))
    try:
        while rig.world.now < 1000 + 300:
            rig.tick()
            rig.world.pass_time(1)
    except Killed:
        return True
    finally:
        for port, name in real:
            delattr(port, name)
    return False


def restart(rig: Rig, ahead: Sequence[Task] = ()) -> None:
    """Another process goes on with the run, as the executor does, and has these tasks still to come."""
    left = rig.journal.remains("r1", TYPES)
    rig.broker = rig.make_broker()
    rig.broker.expect([Announcement(t.strategy, t.rule, t.need, t.planned) for t in ahead])
    rig.broker.adopt(left)
    rig.made = left.task_count


def hand_over_again(rig: Rig, tasks: Sequence[Task]) -> dict[str, str]:
    """Of every task the key under which it is waited for."""
    keys = {}
    for task in tasks:
        again = rig.new_task(identity=task.identity, command=task.command, strategy=task.strategy)
        live = rig.broker.claim(again, changed=0.0, is_made=True)
        if live is None:
            rig.broker.submit([again])
        keys[task.identity] = again.key if live is None else live.key
    return keys


def runs_of(rig: Rig, identity: str, commands: dict[str, str]) -> int:
    """How often the script of a task began."""
    jobs = rig.world.jobs.values()
    return sum(commands[identity] in job.request.script and job.started is not None for job in jobs)


def in_journal(rig: Rig, task: Task) -> str:
    return {record.key: record.state for record in rig.journal.tasks("r1")}[task.key]


@pytest.mark.parametrize("strategy", ["one-vm-per-job", "one-vm-for-all", "asap", "fastest"])
def test_killed_before_or_after_any_effect_nothing_is_done_twice(
    strategy: str, tmp_path: Path
) -> None:
    for moment in itertools.count():
        rig = Rig(tmp_path / str(moment))
        tasks = [
            *(rig.give(identity=f"t{n}", strategy=strategy, seconds=20 + n)[0] for n in range(5)),
        ]
        commands = {task.identity: task.command for task in tasks}
        if not killed_at(rig, moment):
            assert moment > 20, "it was killed in many places"
            return
        rig.world.pass_time(7)
        before = {task.identity for task in rig.ended.values()}
        ahead = [task for task in tasks if task.identity not in before]
        restart(rig, ahead)
        rig.run(3)
        keys = hand_over_again(rig, ahead)
        rig.run(200)
        for identity, key in keys.items():
            assert rig.ended[key].state == TaskState.COMPLETE, (moment, identity)
        assert [runs_of(rig, task.identity, commands) for task in tasks] == [1] * 5, moment
        nodes = [request.node for request in rig.cloud.launched]
        assert len(nodes) == len(set(nodes)), (moment, nodes)
        if strategy == "one-vm-per-job":
            assert len(nodes) == 5, (moment, nodes)
        rig.broker.release()
        assert rig.world.alive() == [], moment


def test_what_ended_while_nobody_looked_is_told_once(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    (task,) = rig.give(identity="t", seconds=20)
    rig.run(15)
    rig.world.pass_time(60)
    restart(rig)
    rig.run(2)
    keys = hand_over_again(rig, [task])
    rig.run(5)
    assert rig.ended[keys["t"]].state == TaskState.COMPLETE
    assert keys["t"] == task.key
    assert len(rig.world.jobs) == 1


def test_what_goes_on_needs_the_same_kind_of_vm_if_it_must_run_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.cloud.allow_kill = True
    (task,) = rig.give(identity="t", need=Need(1, 1000, constraint=BIG.name))
    rig.run(15)
    restart(rig)
    again = rig.new_task(
        identity="t", command=task.command, need=Need(1, 1000, constraint=BIG.name)
    )
    live = rig.broker.claim(again, changed=0.0, is_made=False)
    assert live is not None
    rig.world.kill_machine("schlouder-r1-1")
    rig.run(60)
    assert rig.ended[live.key].state == TaskState.COMPLETE
    assert {request.type for request in rig.cloud.launched} == {BIG}


def test_what_failed_meanwhile_is_run_anew(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    (task,) = rig.give(identity="t", seconds=20, code=3)
    rig.run(15)
    rig.world.pass_time(60)
    restart(rig)
    rig.run(2)
    assert in_journal(rig, task) == TaskState.FAILED
    keys = hand_over_again(rig, [replace(task, command="run 5 0")])
    rig.run(60)
    assert rig.ended[keys["t"]].state == TaskState.COMPLETE
    assert len(rig.world.jobs) == 2


def test_done_work_whose_results_are_gone_is_done_anew(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.give(identity="t", seconds=5)
    rig.run(12)
    rig.world.pass_time(60)
    restart(rig)
    rig.run(2)
    again = rig.new_task(identity="t", command="run 5 0")
    assert rig.broker.claim(again, changed=0.0, is_made=False) is None


@pytest.mark.parametrize(("content", "changed"), [("other code", 0.0), ("", 1e9)])
def test_an_attempt_that_is_out_of_date_ends_before_the_new_one_begins(
    content: str, changed: float, tmp_path: Path
) -> None:
    rig = Rig(tmp_path)
    (task,) = rig.give(identity="t", seconds=500)
    rig.run(15)
    restart(rig)
    again = rig.new_task(identity="t", content=content, command="run 5 0")
    assert rig.broker.claim(again, changed, is_made=False) is None
    rig.broker.submit([again])
    rig.run(60)
    old, new = rig.world.jobs[f"{task.key}.1"], rig.world.jobs[f"{again.key}.1"]
    assert old.state == "CANCELLED"
    assert old.ended is not None
    assert new.started is not None
    assert old.ended <= new.started
    assert rig.ended[again.key].state == TaskState.COMPLETE
    assert in_journal(rig, task) == TaskState.CANCELLED


def test_what_is_out_of_date_is_dropped_with_the_rest_when_the_run_ends(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.give(identity="t", seconds=500)
    rig.run(15)
    restart(rig)
    again = rig.new_task(identity="t", content="other", command="run 5 0")
    assert rig.broker.claim(again, 0.0, is_made=False) is None
    rig.broker.submit([again])
    rig.broker.release()
    rig.tick()
    assert rig.ended[again.key].state == TaskState.CANCELLED
    assert rig.world.alive() == []


def test_what_nobody_asks_for_again_runs_on_but_is_not_repeated(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.cloud.allow_kill = True
    lost, kept = rig.give(2, identity="", seconds=30)
    lost.identity, kept.identity = "lost", "kept"
    rig.run(15)
    restart(rig)
    (vm,) = [vm for vm in rig.broker.vms() if lost.key in vm.active]
    rig.world.kill_machine(vm.name)
    rig.run(60)
    assert in_journal(rig, lost) == TaskState.CANCELLED
    assert in_journal(rig, kept) == TaskState.COMPLETE
    assert rig.ended == {}
    assert len(rig.world.jobs) == 2


def test_bundles_go_on(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_vms=1)
    tasks = [
        rig.give(*(1, "one-vm-for-all"), identity=f"t{n}", seconds=4, planned=4.0, may_bundle=True)[
            0
        ]
        for n in range(8)
    ]
    rig.run(16)
    jobs = len(rig.world.jobs)
    assert 1 <= jobs < 8, "several in one"
    done = {task.identity for task in rig.ended.values()}
    restart(rig)
    keys = hand_over_again(rig, [task for task in tasks if task.identity not in done])
    rig.run(120)
    assert all(rig.ended[key].state == TaskState.COMPLETE for key in keys.values())
    left = [one.name for job in rig.world.jobs.values() for one in job.bundled]
    assert len(left) == len(set(left)), "none is in two bundles"


def test_vms_of_the_killed_run_count_towards_the_cap_and_are_given_back(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_vms=2)
    tasks = rig.give(2, seconds=100)
    for number, task in enumerate(tasks):
        task.identity = f"t{number}"
    rig.run(15)
    restart(rig)
    rig.give(3, seconds=5)
    rig.run(30)
    assert len(rig.cloud.launched) == 2
    rig.broker.release()
    assert all(vm.state == VMState.GONE for vm in rig.broker.vms())


def test_dates_of_a_clock_that_was_set_back_since_are_not_to_come(tmp_path: Path) -> None:
    """Or what was asked for would not be asked for again, and a boot would never take too long."""
    rig = Rig(tmp_path)
    rig.give(2, seconds=100)
    rig.run(30)
    rig.world.now -= 600
    restart(rig)
    for vm in rig.broker.vms():
        assert vm.requested == vm.ready == rig.world.now
        assert all(task.started == rig.world.now for task in vm.active.values())


def test_only_a_killed_run_that_left_something_is_taken_over(tmp_path: Path) -> None:
    """And by one process only."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    rig = Rig(tmp_path)
    rig.give(1)
    rig.run(2)
    record = RunRecord("", "/d", "host", gone.pid, "r", "e", "s", 1.0)
    for run, host, pid in (
        ("nothing-left", "host", gone.pid),
        ("alive", "host", os.getpid()),
        ("far", "other", gone.pid),
        ("killed", "host", gone.pid),
        ("ended", "host", gone.pid),
    ):
        rig.journal.begin_run(replace(record, run=run, host=host, pid=pid, birth=birth_of(pid)))
        if run != "nothing-left":
            rig.journal.write(run, [replace(vm, name=f"{run}-1") for vm in rig.broker.vms()])
    rig.journal.end_run("ended", 2.0)
    (killed,) = rig.journal.killed_runs("host")
    assert killed.run == "killed"
    assert rig.journal.take_over(killed, os.getpid())
    assert not rig.journal.take_over(killed, os.getpid())
    assert rig.journal.killed_runs("host") == []
    assert "killed" in rig.journal.living_runs("host")


def test_a_later_process_with_the_same_number_is_another_one() -> None:
    mine = birth_of(os.getpid())
    assert mine
    journal = Journal(":memory:")
    record = RunRecord("r", "/d", "host", os.getpid(), "r", "e", "s", 1.0, birth=mine)
    journal.begin_run(record)
    journal.begin_run(replace(record, run="earlier", birth=mine + "1"))
    assert journal.living_runs("host") == {"r"}


class Squeue(SlurmCommands):
    """One that lists these jobs in every directory."""

    def __init__(self, *names: str) -> None:
        super().__init__("schlouder")
        self.names = set(names)

    def jobs_in(self, workdir: Path) -> set[str]:
        return self.names


def test_nothing_begins_beside_jobs_of_a_run_whose_journal_was_lost(tmp_path: Path) -> None:
    journal = Journal(":memory:")
    journal.begin_run(RunRecord("0a1b2c3d", "/d", "host", 1, "r", "e", "s", 1.0))
    known, unknown = "schlouder-0a1b2c3d", "schlouder-4e5f6a7b"
    check_strays(Squeue(known, "my-own-job"), journal, tmp_path)
    with pytest.raises(SchlouderError, match=f"scancel --name={unknown}`"):
        check_strays(Squeue(known, unknown), journal, tmp_path)


class Part:
    """As much of a Snakemake job as `reattach` looks at."""

    def __init__(self, output: str, code: str = "x", params: Sequence[object] = ()) -> None:
        self.name, self.wildcards_dict = "rule", {"n": output}
        self.output, self.input = [output], ["in.txt"]
        self.non_derived_params = params
        self.rule = type("Rule", (), {"shellcmd": code})()

    def is_group(self) -> bool:
        return False


class Group:
    def __init__(self, jobs: list[Part]) -> None:
        self.jobs = jobs

    def is_group(self) -> bool:
        return True


def test_what_makes_two_jobs_the_same() -> None:
    same = Part("a", params=[1, object()]), Part("a", params=[1, object()])
    assert reattach.identity_of(same[0]) == reattach.identity_of(same[1])
    assert reattach.content_of(same[0]) == reattach.content_of(same[1])
    assert reattach.identity_of(same[0]) != reattach.identity_of(Part("b"))
    assert reattach.content_of(same[0]) != reattach.content_of(Part("a", params=[2]))
    of_sets = [Part("a", params=[1, [{"x", "y"}]]), Part("a", params=[1, [object()]])]
    assert {reattach.content_of(part) for part in (*same, *of_sets)} == {
        reattach.content_of(same[0])
    }
    assert reattach.content_of(same[0]) != reattach.content_of(Part("a", code="y", params=[1]))


def test_a_group_is_known_by_the_results_of_its_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order they come; and what they make for each other is no input."""
    monkeypatch.chdir(tmp_path)
    first, second = Part("in.txt"), Part("b")
    one, other = Group([first, second]), Group([second, first])
    assert reattach.identity_of(one) == reattach.identity_of(other)
    assert reattach.content_of(one) == reattach.content_of(other)
    assert set(reattach.identity_of(second).split()) < set(reattach.identity_of(one).split())
    Path("in.txt").touch()
    assert reattach.changed(second) > 0.0
    first.input = []
    assert reattach.changed(one) == 0.0


def test_inputs_have_a_date_and_outputs_are_there_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reattach.changed(Part("a")) == 0.0
    assert not reattach.is_made(Part("a"))
    Path("in.txt").touch()
    os.utime("in.txt", (5.0, 7.0))
    Path("a").touch()
    assert reattach.changed(Part("a")) == 7.0
    assert reattach.is_made(Part("a"))


def ends_as_spot_machines_do(rig: Rig, node: str) -> None:
    """EC2 has taken it back, and it has a minute more."""
    machine = rig.world.machine_of(node)
    machine.instance = replace(machine.instance, state="shutting-down", reason="spot")
    machine.ends = rig.world.now + 60


def test_nothing_runs_elsewhere_while_a_machine_lost_before_can_still_write(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.cloud.allow_kill = True
    (task,) = rig.give(identity="t", seconds=200)
    rig.run(15)
    ends_as_spot_machines_do(rig, "schlouder-r1-1")
    rig.run(16)
    restart(rig)
    keys = hand_over_again(rig, [task])
    rig.run(25)
    assert rig.world.machine_of("schlouder-r1-1").instance.state == "shutting-down"
    assert [job.request.key for job in rig.world.jobs.values() if job.started] == ["r1-1.1"]
    rig.run(400)
    assert rig.ended[keys["t"]].state == TaskState.COMPLETE


@pytest.mark.parametrize("trouble", ["its VM is lost", "its VM is drained"])
def test_what_waited_on_a_vm_that_went_is_run_elsewhere(trouble: str, tmp_path: Path) -> None:
    """Though scancel had no reply when Snakemake was killed."""
    rig = Rig(tmp_path, max_vms=1)
    rig.cloud.allow_kill = True
    tasks = [
        rig.give(1, "one-vm-for-all", identity=f"t{n}", seconds=30, need=Need(2, 1000))[0]
        for n in range(2)
    ]
    rig.run(15)
    assert rig.world.jobs["r1-2.1"].state == "PENDING"
    rig.slurm.away_for = {"cancel", "fail"}
    if trouble == "its VM is lost":
        rig.world.kill_machine("schlouder-r1-1")
    else:
        rig.world.nodes["schlouder-r1-1"] = "draining"
    rig.run(16)
    rig.slurm.away_for = set()
    restart(rig, tasks)
    keys = hand_over_again(rig, tasks)
    rig.run(400)
    assert [rig.ended[key].state for key in keys.values()] == [TaskState.COMPLETE] * 2


def test_what_is_left_of_a_group_waits_for_the_end_of_the_whole(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    (group,) = rig.give(identity="a b c", seconds=200)
    rig.run(15)
    restart(rig)
    rest = rig.new_task(identity="b c", command="run 10 0")
    one = rig.new_task(identity="c", command="run 10 0")
    for task in (rest, one):
        assert rig.broker.claim(task, 0.0, is_made=False) is None
    rig.broker.submit([rest, one])
    rig.run(60)
    old = rig.world.jobs[f"{group.key}.1"]
    assert old.state == "CANCELLED"
    assert old.ended is not None
    for task in (rest, one):
        started = rig.world.jobs[f"{task.key}.1"].started
        assert started is not None
        assert old.ended <= started
        assert rig.ended[task.key].state == TaskState.COMPLETE


def test_one_of_a_bundle_is_replaced_and_the_others_run_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_vms=1)
    short = {"planned": 8.0, "may_bundle": True, "need": Need(2, 1000)}
    tasks = [
        rig.give(1, "one-vm-for-all", identity=f"t{n}", seconds=8, **short)[0] for n in range(4)
    ]
    rig.run(14)
    assert len(next(iter(rig.world.jobs.values())).bundled) > 1
    restart(rig)
    rig.run(1)
    again = rig.new_task(identity="t0", content="new", command="run 8 0", **short)
    assert rig.broker.claim(again, 0.0, is_made=False) is None
    rig.broker.submit([again])
    keys = [again.key, *hand_over_again(rig, tasks[1:]).values()]
    rig.run(200)
    assert [rig.ended[key].state for key in keys] == [TaskState.COMPLETE] * 4


def test_a_launch_without_a_reply_leaves_no_node(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.give(1, identity="t")
    assert killed_at(rig, 5), "after the launch, before its reply is in the journal"
    rig.world.pass_time(60)
    assert rig.world.nodes
    restart(rig)
    rig.broker.release()
    rig.world.pass_time(10)
    assert rig.world.nodes == {}
    assert rig.world.alive() == []


def test_a_launch_without_a_reply_counts_towards_the_cap_though_nobody_needs_it(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path, max_vms=1)
    rig.give(1, identity="t")
    assert killed_at(rig, 5), "after the launch, before its reply is in the journal"
    listed, shown = rig.cloud.instances, rig.world.now + 20
    rig.cloud.instances = lambda *runs: listed(*runs) if rig.world.now >= shown else []  # type: ignore[method-assign]
    restart(rig)
    rig.run(2)
    (task,) = rig.give(1, "asap")
    rig.run(100)
    assert rig.ended[task.key].state == TaskState.COMPLETE
    assert rig.most_alive == 1


def test_what_has_lost_too_many_spot_machines_goes_on_without_them(tmp_path: Path) -> None:
    tariff = Tariff({SMALL.name: 0.1}, {(SMALL.name, ""): 0.03}, "a table")
    rig = Rig(tmp_path, types=(SMALL,), tariff=tariff, reclaims=1)
    rig.cloud.allow_kill = True
    (task,) = rig.give(1, identity="t", seconds=300, spot=PREFER)
    rig.run(30)
    rig.world.kill_machine("schlouder-r1-1")
    rig.run(60)
    restart(rig, [task])
    again = rig.new_task(identity="t", command=task.command, spot=PREFER)
    live = rig.broker.claim(again, 0.0, is_made=False)
    assert live is not None
    rig.world.kill_machine("schlouder-r1-2", "Server.InternalError: hardware")
    rig.run(400)
    assert rig.ended[live.key].state == TaskState.COMPLETE
    assert [request.market for request in rig.cloud.launched] == [SPOT, ON_DEMAND, ON_DEMAND]


def test_the_turns_of_a_bundle_are_not_the_order_in_which_its_tasks_came() -> None:
    told = JobStatus("j-2.1", "7", JobPhase.RUNNING, "RUNNING", "", 100.0, None)
    one = {"command": "", "state": TaskState.SUBMITTED, "attempt": 1, "submission": "j-2.1"}
    tasks = [
        Task(f"j-{number}", "t", "t", "1", "s", Need(), turn=turn, **one)  # type: ignore[arg-type]
        for number, turn in ((1, 1), (2, 0))
    ]
    bundles = Bundles(lambda _: None, lambda _: False, lambda task: task.key)
    bundles.adopt(tasks)
    jobs = bundles.spread(ClusterView({"j-2.1": told})).jobs
    assert [jobs[f"j-{number}.1"].phase for number in (2, 1)] == [
        JobPhase.RUNNING,
        JobPhase.WAITING,
    ]


def test_of_two_complete_attempts_the_newer_counts(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    for content, received in (("new", 500.0), ("old", 10.0)):
        made = {"state": TaskState.COMPLETE, "received": received, "turn": int(content == "old")}
        rig.journal.write("r1", tasks=[rig.new_task(identity="t", content=content, **made)])
    restart(rig)
    again = rig.new_task(identity="t", content="new")
    assert rig.broker.claim(again, 0.0, is_made=True) is not None


def test_claiming_waits_for_no_round(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    (task,) = rig.give(identity="t")
    rig.run(15)
    restart(rig)
    asked, answers = threading.Event(), threading.Event()
    view = rig.slurm.view

    def silent(*arguments: Any) -> Any:
        asked.set()
        answers.wait(10)
        return view(*arguments)

    rig.slurm.view = silent  # type: ignore[method-assign, assignment]
    round_ = threading.Thread(target=rig.tick)
    round_.start()
    asked.wait(10)
    again = rig.new_task(identity="t", command=task.command)
    assert rig.broker.claim(again, 0.0, is_made=False) is not None
    assert round_.is_alive()
    answers.set()
    round_.join()
