"""The journal keeps what it was told, for its owner only, and never guesses at a file it cannot read."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from snakemake_executor_plugin_schlouder import report
from snakemake_executor_plugin_schlouder.journal import Journal, RunRecord, journal_path
from snakemake_executor_plugin_schlouder.model import (
    VM,
    InstanceType,
    Need,
    SchlouderError,
    Task,
    TaskState,
    VMState,
)

RUN = RunRecord("r1", "/data", "host", 7, "us-east-1", "https://ec2", "one-vm-per-job", 1000.0)


def task(number: int, **values: object) -> Task:
    made = Task(
        f"r1-{number}", f"search chunk={number}", "search", str(number), "s", Need(1, 1), "x"
    )
    for name, value in values.items():
        setattr(made, name, value)
    return made


def machine() -> VM:
    return VM("node-1", "one-vm-per-job", InstanceType("m5.large", 2, 8192), 1000.0)


def test_a_journal_read_again_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "state" / "journal.sqlite"
    journal = Journal(path)
    journal.begin_run(RUN)
    vm = machine()
    journal.write("r1", [vm], [task(n) for n in range(12)])
    vm.state, vm.instance_id, vm.ready = VMState.READY, "i-1", 1006.0
    journal.write("r1", [vm], [task(3, state=TaskState.COMPLETE)])
    journal.close()
    again = Journal(path)
    assert [(v.name, v.state, v.instance_id, v.ready) for v in again.vms("r1")] == [
        ("node-1", "ready", "i-1", 1006.0)
    ]
    assert [t.jobid for t in again.tasks("r1")] == [str(n) for n in range(12)]
    assert again.tasks("r1")[3].state == "complete"
    assert again.runs() == [RUN]
    assert again.set_aside is None


def test_the_journal_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "state" / "journal.sqlite"
    Journal(path).begin_run(RUN)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"this is no database at all, but text " * 40, b"\0" * 4096])
def test_a_damaged_file_is_set_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(content)
    journal = Journal(path)
    assert journal.set_aside is not None
    assert journal.set_aside.read_bytes() == content
    assert journal.runs() == []


def test_a_newer_file_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    Journal(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    assert Journal(path).set_aside is not None


def test_a_journal_in_use_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    first = Journal(path)
    first.begin_run(RUN)
    second = Journal(path)
    assert second.set_aside is None
    assert second.runs() == [RUN]


def test_every_workflow_directory_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert journal_path(Path("/a")) != journal_path(Path("/b"))
    assert journal_path(Path("/a")).is_relative_to(tmp_path)


def test_the_table_shows_each_vm_with_its_tasks_real_against_planned() -> None:
    journal = Journal(":memory:")
    journal.begin_run(RUN)
    vm = machine()
    vm.state, vm.instance_id, vm.ready, vm.ended = VMState.GONE, "i-0abc", 1006.0, 1100.0
    done = task(
        1, state=TaskState.COMPLETE, vm="node-1", received=1001.0, started=1007.0, ended=1049.0
    )
    done.planned = 70.0
    unplanned = task(2, state=TaskState.RUNNING, vm="node-1", received=1001.0, started=1050.0)
    journal.write("r1", [vm], [done, unplanned, task(3)])
    text = report.as_text(report.run_report(journal, "r1"))
    assert "i-0abc - node-1 (" in text
    assert ") + 6 seconds" in text
    assert "42 s / 70 s" in text
    assert "– / –" in text  # noqa: RUF001 - what the table prints for unknown
    assert "1 of 3 jobs complete" in text
    assert "Not on any VM" in text
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_a_task_over_several_vms_is_shown_on_each() -> None:
    journal = Journal(":memory:")
    journal.begin_run(RUN)
    companion = replace(machine(), name="node-2", leader="node-1")
    done = task(1, state=TaskState.COMPLETE, vm="node-1", started=1007.0, ended=1049.0)
    journal.write("r1", [machine(), companion], [done])
    text = report.as_text(report.run_report(journal, "r1"))
    first, second = text.split("node-2 (")
    assert "companion of node-1" in second
    assert "companion" not in first
    assert first.count("search chunk=1") == second.count("search chunk=1") == 1


def test_a_vm_that_was_kept_is_in_the_books_of_both_runs() -> None:
    journal = Journal(":memory:")
    for run in ("r1", "r2"):
        journal.begin_run(replace(RUN, run=run, unit=3600.0, minimum=0.0))
    given = replace(machine(), state=VMState.HANDED_OVER, price=0.36, instance_id="i-0abc")
    given.ready, given.ended, given.kept_until = 1006.0, 1100.0, 4489.0
    taken = replace(given, state=VMState.READY, origin="r1", taken=1100.0, kept_until=None)
    taken.ended = None
    journal.write("r1", [given])
    journal.write("r2", [replace(machine(), name="s-r2-7"), taken])
    assert [vm.state for vm in journal.vms("r1")] == ["handed over"], "each run has its own record"
    left = journal.remains("r2", {given.type.name: given.type})
    assert [(vm.name, vm.origin, vm.taken) for vm in left.vms] == [
        *((given.name, "r1", 1100.0), ("s-r2-7", "", None)),
    ]
    assert left.vm_count == 7
    first = report.as_text(report.run_report(journal, "r1"))
    until = time.strftime("%H:%M:%S", time.localtime(4489))
    assert (
        f"stays for the next run until {until}; if none takes it, that costs at most 0.0000 USD"
        in first
    )
    assert "handed over, 1 unit = 0.3600 USD]" in first
    second = report.as_text(report.run_report(journal, "r2"))
    assert (
        f"kept by an earlier run since {time.strftime('%H:%M:%S', time.localtime(1100))}" in second
    )


def test_a_run_whose_vms_were_all_handed_over_has_left_nothing() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    journal = Journal(":memory:")
    journal.begin_run(replace(RUN, pid=gone.pid))
    journal.write("r1", [replace(machine(), state=VMState.HANDED_OVER)])
    assert journal.killed_runs(RUN.host) == []
    journal.write("r1", [replace(machine(), state=VMState.READY)])
    assert [record.run for record in journal.killed_runs(RUN.host)] == ["r1"]


def test_looking_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    writer = Journal(path)
    writer.begin_run(RUN)
    assert Journal.reading(path).runs() == [RUN]
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(b"no database " * 100)
    with pytest.raises(SchlouderError, match="cannot be read"):
        Journal.reading(damaged)
    assert damaged.exists()


def test_a_place_where_no_journal_can_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SchlouderError, match="XDG_STATE_HOME"):
        Journal(tmp_path / "file" / "journal.sqlite")


def test_a_failure_is_told_below_its_table_and_a_task_that_never_ran_is_on_no_vm() -> None:
    journal = Journal(":memory:")
    journal.begin_run(RUN)
    failed = task(
        1, state=TaskState.FAILED, vm="node-1", started=1.0, ended=2.0, reason="went wrong"
    )
    dropped = task(2, state=TaskState.CANCELLED, vm="node-1", reason="not started")
    journal.write("r1", [machine()], [failed, dropped])
    text = report.as_text(report.run_report(journal, "r1"))
    assert "   search chunk=1: went wrong" in text
    assert text.index("Not on any VM") < text.index("search chunk=2")


def test_a_run_lives_until_it_ended_or_its_process_is_gone() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    journal = Journal(":memory:")
    for run, host, pid in (
        ("here", "host", os.getpid()),
        ("ended", "host", os.getpid()),
        ("killed", "host", gone.pid),
        ("elsewhere", "other", gone.pid),
    ):
        journal.begin_run(replace(RUN, run=run, host=host, pid=pid))
    journal.end_run("ended", 2000.0)
    assert journal.living_runs("host") == {"here", "elsewhere"}


def test_vms_that_were_never_started_are_counted_only() -> None:
    journal = Journal(":memory:")
    journal.begin_run(RUN)
    lost, void, other = machine(), replace(machine(), name="node-2"), machine()
    lost.instance_id, lost.state, lost.reason = "i-0abc", VMState.GONE, "EC2 took it back"
    void.state, other.name = VMState.GONE, "node-3"
    journal.write("r1", [lost, void, other])
    text = report.as_text(report.run_report(journal, "r1"))
    assert "\n EC2 took it back\n nothing ran here to its end\n" in text
    assert "node-2" not in text
    assert "node-3" in text
    assert "1 VM more asked for and not started" in text


def test_two_processes_may_make_the_same_journal_at_once(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; "
        "from snakemake_executor_plugin_schlouder.journal import Journal; "
        "time.sleep(max(0.0, float(sys.argv[2]) - time.time())); "
        "print([Journal(Path(sys.argv[1], str(n), 'journal.sqlite')).set_aside for n in range(20)])"
    )
    start = str(time.time() + 1.0)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), start],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    told = [process.communicate()[0] for process in both]
    assert told == [f"{[None] * 20}\n"] * 2
