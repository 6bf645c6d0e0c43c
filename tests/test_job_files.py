"""Names of job files, and what is removed of them and what is not."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from rig import Rig

from snakemake_executor_plugin_schlouder.executor import Executor
from snakemake_executor_plugin_schlouder.job_files import (
    Sweeper,
    bundle_log_name,
    exit_name,
    folder,
    log_name,
    names_to_remove,
    tail,
)
from snakemake_executor_plugin_schlouder.model import Need, Task, TaskState

RUN = "0123abcd"
TASK = Task(
    key=f"{RUN}-17",
    name="search chunk=3",
    rule="search",
    jobid="4",
    strategy="asap",
    need=Need(1, 1000),
    command="",
    attempt=2,
    state=TaskState.COMPLETE,
)
OLD = time.time() - 11 * 86400


def run_folder(workdir: Path, run: str = RUN, *names: str) -> Path:
    made = folder(workdir) / run
    made.mkdir(parents=True)
    for name in names:
        (made / name).write_text("x")
    return made


def age(path: Path) -> None:
    """Makes everything below `path`, and itself, eleven days old."""
    for inside in (*path.rglob("*"), path):
        os.utime(inside, (OLD, OLD), follow_symlinks=False)


def swept(workdir: Path, living: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    sweeper = Sweeper(workdir, "ffffffff")
    sweeper.remove_old(10, living)
    sweeper.close(everything=False)


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()} if path.exists() else set()


def test_a_log_is_named_after_rule_and_wildcards() -> None:
    assert log_name(TASK) == "17-search-chunk=3.2.log"
    assert exit_name(TASK, 1) == "17-search.1.exit"


@pytest.mark.parametrize(
    "wildcards", ["i=" + "x" * 300, "i=a b;$(rm) 'q' \"d\"/../é漢", "i=%j\\n\n", "", "i=\udcff"]
)
def test_any_wildcard_makes_a_plain_short_name(tmp_path: Path, wildcards: str) -> None:
    rule = "r" * 300
    names = [
        log_name(replace(TASK, name=f"{rule} {wildcards}", rule=rule)),
        exit_name(replace(TASK, rule=rule), 1) + ".revoked",
    ]
    for name in names:
        assert len(name.encode()) < 200
        assert not set(name) & set(" ;$()'\"/\\%\n")
        (tmp_path / name).touch()


def test_the_log_of_a_bundle_is_found_by_all_of_it(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_vms=1)
    tasks = rig.give(
        4, "one-vm-for-all", seconds=8, planned=8.0, may_bundle=True, need=Need(2, 1000)
    )
    rig.run(12)
    (job,) = rig.world.jobs.values()
    assert len(job.bundled) == 4
    assert {rig.config.bundle_log(task) for task in tasks} == {job.request.log}
    Path(job.request.log).touch()
    Path(rig.config.log_file(tasks[2])).touch()
    logs = [rig.broker.log_of(task) for task in tasks]
    assert [str(log) == job.request.log for log in logs] == [True, True, False, True]


def test_two_tries_of_one_job_share_no_file() -> None:
    again = replace(TASK, key=f"{RUN}-18")
    assert log_name(again) != log_name(TASK)
    assert exit_name(again, 1) != exit_name(TASK, 1)


def test_a_success_leaves_only_what_revokes_its_submissions(tmp_path: Path) -> None:
    files = [f"17-search.{n}.exit{end}" for n in (1, 2) for end in ("", ".begun", ".part")]
    logs = ["17-search-chunk=3.1.log", "17-search-chunk=3.2.log", "17-bundle.1.log.bundle"]
    others = {"17-search.1.exit.revoked", "18-search.1.exit", "18-search-chunk=4.1.log"}
    made = run_folder(tmp_path, RUN, *files, *logs, *others)
    sweeper = Sweeper(tmp_path, RUN)
    sweeper.remove(names_to_remove(TASK))
    sweeper.close(everything=False)
    assert names(made) == others


def test_a_failure_leaves_its_logs() -> None:
    failed = names_to_remove(replace(TASK, state=TaskState.FAILED))
    assert failed
    assert not [name for name in failed if name.endswith(".log")]


def test_at_the_end_of_a_run_marks_go_and_the_folder_if_it_is_empty(tmp_path: Path) -> None:
    made = run_folder(tmp_path, RUN, "1-a.1.exit", "1-a.1.exit.begun", "1-a.1.log", "mine.txt")
    (made / bundle_log_name(f"{RUN}-1.2")).touch()
    Sweeper(tmp_path, RUN).close(everything=True)
    assert names(made) == {"1-a.1.log", "1-bundle.2.log.bundle", "mine.txt"}
    empty = run_folder(tmp_path, "00000000", "1-a.1.exit")
    Sweeper(tmp_path, "00000000").close(everything=True)
    assert not empty.exists()


def test_old_runs_go_and_young_and_living_ones_stay(tmp_path: Path) -> None:
    old = run_folder(tmp_path, "00000001", "1-a-i=1.1.log", "1-a.1.exit.revoked")
    living = run_folder(tmp_path, "00000002", "1-a.1.log")
    young = run_folder(tmp_path, "00000003", "1-a.1.log")
    age(old)
    age(living)
    os.utime(young / "1-a.1.log", (OLD, OLD))
    swept(tmp_path, {"00000002"})
    assert not old.exists()
    assert names(living) == names(young) == {"1-a.1.log"}


def test_what_is_not_ours_stays_in_an_old_run(tmp_path: Path) -> None:
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "1-a.1.log").write_text("x")
    old = run_folder(tmp_path, "00000001", "1-a.1.log", "notes.txt", "1-a.1.log.gz")
    (old / "2-a.1.log").symlink_to(outside / "1-a.1.log")
    (old / "3-a.1.log").mkdir()
    (folder(tmp_path) / "00000002").symlink_to(outside)
    other = run_folder(tmp_path, "results", "1-a.1.log")
    for path in (old, other, outside):
        age(path)
    swept(tmp_path)
    assert names(old) == {"notes.txt", "1-a.1.log.gz", "2-a.1.log", "3-a.1.log"}
    assert names(other) == {"1-a.1.log"}
    assert names(outside) == {"1-a.1.log"}


def test_a_folder_of_all_runs_that_is_a_link_is_left_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    old = elsewhere / "00000001"
    old.mkdir(parents=True)
    (old / "1-a.1.log").touch()
    age(elsewhere)
    folder(tmp_path).parent.mkdir()
    folder(tmp_path).symlink_to(elsewhere)
    swept(tmp_path)
    assert names(old) == {"1-a.1.log"}


def test_removing_what_is_not_there_raises_nothing_and_ends(tmp_path: Path) -> None:
    sweeper = Sweeper(tmp_path, RUN)
    sweeper.remove(["1-a.1.log"])
    run_folder(tmp_path, RUN, "2-a.1.log")
    sweeper.remove(["1-a.1.log", "2-a.1.log"])
    sweeper.remove_old(10, ())
    sweeper.close(everything=True)
    assert names(folder(tmp_path)) == set()


def test_giving_an_order_does_not_wait_for_a_thousand_jobs_files(tmp_path: Path) -> None:
    tasks = [replace(TASK, key=f"{RUN}-{n}") for n in range(1000)]
    made = run_folder(tmp_path, RUN, *(log_name(task) for task in tasks))
    sweeper = Sweeper(tmp_path, RUN)
    begun = time.thread_time()
    sweeper.remove(name for task in tasks for name in names_to_remove(task))
    assert time.thread_time() - begun < 0.2
    sweeper.close(everything=False)
    assert names(made) == set()


def test_the_end_of_a_log_is_shown_and_a_missing_one_named(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert str(log) in tail(log)
    log.write_bytes(b"first\n" + b"\xff line\n" * 30_000 + b"last\n")
    shown = tail(log).splitlines()
    assert len(shown) == 31
    assert shown[-1] == "    last"
    assert "first" not in tail(log)


@pytest.mark.parametrize("keep", [False, True])
def test_files_are_needed_until_the_journal_has_the_end_of_their_job(
    monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    removed: list[str] = []
    executor = Executor.__new__(Executor)
    broker = Mock(is_written=False)
    for name, value in (
        ("_to_sweep", []),
        ("_sweeper", Mock(remove=removed.extend)),
        ("_config", Mock(keep_logs=keep)),
    ):
        monkeypatch.setattr(executor, name, value, raising=False)
    failed = replace(TASK, key=f"{RUN}-18", state=TaskState.FAILED)
    executor._sweep(broker, [TASK, failed])
    assert removed == []
    broker.is_written = True
    executor._sweep(broker, [])
    kept = [] if keep else names_to_remove(TASK)
    assert removed == kept + names_to_remove(failed)
    executor._sweep(broker, [])
    assert removed == kept + names_to_remove(failed)
