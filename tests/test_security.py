"""What others may do to us, and what they may learn: the lines of docs/security.md that have no test
elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import shutil
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from workflows import Site, as_nobody, vm_pids, wait_for

from snakemake_executor_plugin_schlouder import report
from snakemake_executor_plugin_schlouder.broker.sights import reclaimed_by
from snakemake_executor_plugin_schlouder.history import History
from snakemake_executor_plugin_schlouder.job_files import folder, make_folder, tail
from snakemake_executor_plugin_schlouder.journal import Journal, RunRecord, journal_path
from snakemake_executor_plugin_schlouder.lease import parse
from snakemake_executor_plugin_schlouder.localcloud.vm_init import PRIVATE
from snakemake_executor_plugin_schlouder.market.answers import Answers
from snakemake_executor_plugin_schlouder.market.tables import Table, prices_of, types_of
from snakemake_executor_plugin_schlouder.model import (
    VM,
    InstanceType,
    Need,
    SchlouderError,
    Task,
    TaskState,
    VMState,
)
from snakemake_executor_plugin_schlouder.printable import one_line, plain
from snakemake_executor_plugin_schlouder.recording import Recorder, decoded, read
from snakemake_executor_plugin_schlouder.slurm.cli import COMMANDS, parse_jobs, parse_nodes
from snakemake_executor_plugin_schlouder.slurm.script import exit_of

NOBODY = 65534
RUN = RunRecord("r1", "/data", "host", 7, "us-east-1", "https://ec2", "one-vm-per-job", 1000.0)
SECRET = b"what a link leads to\n"
ATTACK = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x1b[0m\r\x9b31m\u202e[/bold] :bomb: [link=file:///x]y"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
Store = Callable[[Path], Any]


# -- the threat model

MODEL = Path(__file__).parents[1] / "docs" / "security.md"


def test_every_line_of_the_threat_model_names_tests_that_exist() -> None:
    rows = [line.split(" | ") for line in MODEL.read_text().splitlines() if line.startswith("| ")]
    promises = [row[-1] for row in rows if not row[0].endswith("may try")]
    assert len(promises) > 15
    for promise in promises:
        module = ""
        named = re.findall(r"(test_\w+)?(?:::(test_\w+))?", promise)
        for file, test in (pair for pair in named if any(pair)):
            module = file or module
            text = (Path(__file__).parent / f"{module}.py").read_text()
            assert f"def {test}" in text, f"{module}::{test}"


# -- files and directories


def is_private(path: Path) -> bool:
    return not stat.S_IMODE(path.lstat().st_mode) & 0o077


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_what_is_private_is_so_from_its_creation(
    tmp_path: Path, open_umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rights that are only mended later would leave a moment in which others can open the file."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for module, name in ((Path, "chmod"), (os, "chmod"), (os, "fchmod")):
        monkeypatch.setattr(module, name, lambda *_: None)
    journal = Journal(journal_path(tmp_path))
    journal.begin_run(RUN)
    history = History(tmp_path / "state" / "schlouder" / "history.sqlite")
    history.add()
    Recorder(tmp_path / "run.jsonl", logging.getLogger("test")).close()
    make_folder(folder(tmp_path) / "00000001")
    Answers(tmp_path / "cache", "r", "e", time.time).put({"q": 1})
    made = [path for path in (tmp_path / "state" / "schlouder").rglob("*") if path.is_file()]
    assert {path.name.rpartition("sqlite")[2] for path in made} == {"", "-wal", "-shm"}
    cached = list((tmp_path / "cache").iterdir())
    private = [*made, *cached, journal_path(tmp_path).parent, tmp_path / "run.jsonl"]
    for path in (*private, folder(tmp_path) / "00000001", tmp_path / "cache"):
        assert is_private(path), path


def a_directory(path: Path) -> None:
    path.mkdir()
    (path / "x").touch()


def a_link(path: Path) -> None:
    target = path.with_name("target")
    target.write_bytes(SECRET)
    path.symlink_to(target)


def a_pipe(path: Path) -> None:
    os.mkfifo(path, 0o600)


def of_another_user(path: Path) -> None:
    Journal(path).close()
    os.chown(path, NOBODY, NOBODY)


def that_others_may_write(path: Path) -> None:
    Journal(path).close()
    path.chmod(0o660)


def with_a_log_that_is_a_link(path: Path) -> None:
    Journal(path).close()
    History(path.with_name("h")).close()
    path.with_name("target").write_bytes(SECRET)
    path.with_name(path.name + "-wal").symlink_to(path.with_name("target"))


def changed_by(*statements: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        stores: dict[str, Store] = {"journal": Journal, "history": History}
        stores[path.stem](path).close()
        with sqlite3.connect(path) as db:
            for statement in statements:
                db.execute(statement)
        db.close()

    return change


def a_text(path: Path) -> None:
    path.write_text("no database\n" * 400)


def truncated(path: Path) -> None:
    journal = Journal(path)
    journal.begin_run(RUN)
    journal.close()
    path.write_bytes(path.read_bytes()[:5000])


BAD_STORES: dict[str, Callable[[Path], None]] = {
    "a directory": a_directory,
    "a link": a_link,
    "a link to nothing": lambda path: path.symlink_to("/nonexistent/x"),
    "a pipe": a_pipe,
    "a text": a_text,
    "truncated": truncated,
    "another version": changed_by("PRAGMA user_version = 99"),
    "no version": changed_by("PRAGMA user_version = 0"),
    "another table": changed_by("CREATE TABLE more (x)"),
    "a trigger": changed_by(
        "CREATE TABLE more (x)",
        "CREATE TRIGGER t AFTER INSERT ON more BEGIN DELETE FROM more; END",
    ),
    "a view": changed_by("CREATE VIEW v AS SELECT 1"),
    "others may write it": that_others_may_write,
    "its log is a link": with_a_log_that_is_a_link,
}
OF_OTHERS = {"of another user": of_another_user}


@pytest.mark.parametrize("store", [Journal, History])
@pytest.mark.parametrize("what", [*BAD_STORES, pytest.param("of another user", marks=as_root)])
def test_a_store_that_is_not_ours_or_no_store_is_set_aside_as_it_is(
    tmp_path: Path, store: Store, what: str
) -> None:
    path = tmp_path / f"{store.__name__.lower()}.sqlite"
    {**BAD_STORES, **OF_OTHERS}[what](path)
    before = path.lstat()
    opened = store(path)
    assert opened.set_aside is not None
    after = opened.set_aside.lstat()
    assert (after.st_ino, after.st_uid, after.st_size) == (
        before.st_ino,
        before.st_uid,
        before.st_size,
    )
    assert path.is_file() and not path.is_symlink() and is_private(path)
    if (tmp_path / "target").exists():
        assert (tmp_path / "target").read_bytes() == SECRET
    opened.close()
    assert store(path).set_aside is None


@pytest.mark.parametrize("what", [*BAD_STORES, pytest.param("of another user", marks=as_root)])
def test_status_reads_no_journal_that_is_not_ours_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = journal_path(tmp_path)
    path.parent.mkdir(parents=True)
    {**BAD_STORES, **OF_OTHERS}[what](path)
    before = {each.name: each.lstat().st_ino for each in path.parent.iterdir()}
    with pytest.raises(SchlouderError) as caught:
        report.show(tmp_path, None)
    assert len(str(caught.value).splitlines()) == 1
    after = {each.name: each.lstat().st_ino for each in path.parent.iterdir()}
    assert {name: after.get(name) for name in before} == before
    assert not set(after) - set(before) - {"journal.sqlite-wal", "journal.sqlite-shm"}


@as_root
@pytest.mark.parametrize("is_link", [False, True])
def test_a_state_directory_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_link: bool
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    theirs = tmp_path / "schlouder"
    if is_link:
        (tmp_path / "elsewhere").mkdir()
        theirs.symlink_to(tmp_path / "elsewhere")
    else:
        theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(
        SchlouderError, match=r"schlouder belongs to the user nobody; .*XDG_STATE_HOME"
    ):
        Journal(journal_path(tmp_path))
    assert not list(theirs.iterdir())


def test_a_state_directory_that_others_may_enter_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = journal_path(tmp_path)
    path.parent.mkdir(parents=True)
    for directory in (path.parent, path.parent.parent):
        directory.chmod(0o777)
    Journal(path).close()
    assert is_private(path.parent) and is_private(path.parent.parent)


def test_a_state_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)

    def open_it() -> int:
        try:
            Journal(tmp_path / "new" / "journal.sqlite")
        except SchlouderError as error:
            print(error, file=sys.stderr)
            return 7
        return 0

    code, told = as_nobody(open_it)
    assert code == 7, told
    assert "cannot be opened" in told and "XDG_STATE_HOME" in told and len(told.splitlines()) == 1


@pytest.mark.parametrize("at", ["schlouder", "schlouder/00000001"])
def test_a_link_where_exit_codes_are_to_be_is_refused(tmp_path: Path, at: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / ".snakemake" / at).parent.mkdir(parents=True)
    (tmp_path / ".snakemake" / at).symlink_to(elsewhere)
    with pytest.raises(SchlouderError, match="is a link; remove it"):
        make_folder(folder(tmp_path) / "00000001")


@as_root
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    place = folder(tmp_path) / "00000001"
    place.mkdir(parents=True)
    os.chown(place, NOBODY, NOBODY)
    with pytest.raises(SchlouderError, match="is of another user"):
        make_folder(place)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / ".snakemake").write_text("")
    with pytest.raises(SchlouderError, match=r"cannot be made: .*; it takes a workflow directory"):
        make_folder(folder(tmp_path) / "00000001")


@pytest.mark.parametrize("plant", [a_link, a_pipe, pytest.param(of_another_user, marks=as_root)])
def test_an_exit_code_that_somebody_else_may_have_left_is_none(
    tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    path = tmp_path / "1-a.1.exit"
    plant(path)
    if path.is_file() and not path.is_symlink():
        path.write_text("0\n")
    (tmp_path / "target").write_text("0\n")
    assert exit_of(str(path)) is None


# -- recordings and tables


@pytest.mark.parametrize("plant", [a_link, a_pipe, pytest.param(of_another_user, marks=as_root)])
def test_a_recording_goes_into_no_file_that_others_read(
    tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    path = tmp_path / "run.jsonl"
    plant(path)
    size = path.lstat().st_size
    with pytest.raises(SchlouderError, match=r"--schlouder-record: .*run.jsonl cannot be written"):
        Recorder(path, logging.getLogger("test"))
    assert path.lstat().st_size == size
    if path.is_symlink():
        assert path.read_bytes() == SECRET


def test_a_recording_that_was_open_to_others_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("old\n" * 100)
    path.chmod(0o666)
    Recorder(path, logging.getLogger("test")).close()
    assert is_private(path) and path.read_text() == ""


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\xff\xfe", b"[]", b"{}\n{}", b"null\nnull", b"[" * 100_000),
        *(b'["run", 1, 2, 3]', b'["run", 999, null, null]', b'["tick", null, null, null]'),
    ],
)
def test_what_is_no_recording_is_one_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(SchlouderError) as caught:
        read(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("plant", [a_directory, a_pipe, lambda path: None])
def test_what_is_no_file_is_no_recording(tmp_path: Path, plant: Callable[[Path], None]) -> None:
    plant(tmp_path / "x")
    with pytest.raises(SchlouderError, match="cannot be read"):
        read(tmp_path / "x")


@pytest.mark.parametrize(
    "value",
    [
        *(
            {"is": "Popen", "of": [["touch", "hacked"]]},
            {"is": "os.system", "of": ["touch hacked"]},
        ),
        *({"is": "eval", "of": ["1"]}, {"is": "__import__", "of": ["os"]}),
    ],
)
def test_a_recording_makes_nothing_but_records(value: object) -> None:
    assert type(decoded(value)) is RuntimeError


@pytest.mark.parametrize(
    "value",
    [{}, {"is": "Task"}, {"is": "dict", "of": []}, {"is": "Need", "with": {"x": 1}}, {"is": ["x"]}],
)
def test_a_record_that_no_recorder_writes_is_told(value: object) -> None:
    with pytest.raises(SchlouderError, match="of no recording"):
        decoded(value)


@pytest.mark.parametrize(
    "text",
    [
        *("", "\0", "a\0b,c\n", "x" * 200_000, "instance_type\n", '"', "\x1b]0;owned\x07,b\n1,2\n"),
        *(
            "instance_type,vcpus,memory_mib,usd_per_hour\n" + row
            for row in ("\x1b[2J,2,2,1", "-x,2,2,1")
        ),
        *(
            "instance_type,vcpus,memory_mib,usd_per_hour\n" + row
            for row in ("a b,2,2,1", '"a,b",2,2,1')
        ),
        *(
            "instance_type,vcpus,memory_mib,usd_per_hour\n" + row
            for row in ("../x$(id),2,2,1", "a,,,")
        ),
    ],
)
def test_a_bad_table_is_one_error_fit_for_a_terminal(text: str) -> None:
    table = Table("--schlouder-prices", "p.csv", text)
    for make in (lambda: prices_of(table, "r"), lambda: types_of(table)):
        with pytest.raises(SchlouderError, match=r"^--schlouder-prices: p.csv") as caught:
            make()
        assert str(caught.value).replace("\n", "").isprintable()
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("plant", [a_link, a_pipe, a_directory, that_others_may_write])
def test_prices_that_somebody_else_may_have_kept_are_asked_for_again(
    tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    known = Answers(tmp_path, "r", "e", time.time)
    known.put({"q": 1})
    assert Answers(tmp_path, "r", "e", time.time).get("q", 1e9) is not None
    (path,) = tmp_path.iterdir()
    kept = path.read_text()
    path.unlink()
    plant(path)
    if plant is a_link:
        (tmp_path / "target").write_text(kept)
    if plant is that_others_may_write:
        path.write_text(kept)
    assert Answers(tmp_path, "r", "e", time.time).get("q", 1e9) is None


# -- what others write, shown


def test_nothing_that_others_write_does_anything_to_a_terminal(tmp_path: Path) -> None:
    assert plain("caf\u00e9 \u2713\n\tx") == "caf\u00e9 \u2713\n\tx"
    assert plain("\x1b[31mred\x1b[0m") == "red"
    for text in (plain(ATTACK), one_line(f"{ATTACK}\nnext")):
        assert text.isprintable() and "owned" in text
    log = tmp_path / "x.log"
    log.write_text(f"10%\r20%\r\n{ATTACK}\nlast\n")
    shown = tail(log)
    assert shown.replace("\n", "").isprintable()
    assert [line.strip() for line in shown.splitlines()][1:3] == ["10%", "20%"]


def test_names_and_reasons_in_the_report_are_shown_as_they_are() -> None:
    journal = Journal(":memory:")
    journal.begin_run(RUN)
    vm = VM("n-1", "s", InstanceType("m5.large", 2, 8192), 1000.0)
    vm.state, vm.instance_id, vm.ready, vm.reason = VMState.READY, "i-1", 1006.0, ATTACK
    task = Task("r1-1", f"a {ATTACK}", ATTACK, "1", "s", Need(1, 1), "x")
    task.state, task.vm, task.started, task.ended = TaskState.FAILED, "n-1", 1007.0, 1009.0
    task.reason = ATTACK
    journal.write("r1", [vm], [task])
    text = report.as_text(report.run_report(journal, "r1"))
    assert text.replace("\n", "").isprintable()
    assert "[/bold]" in text and ":bomb:" in text


@pytest.mark.parametrize("reason", [ATTACK, "a|b|c|COMPLETED|r1-2.1|x", "(null)", "", "%i|%T"])
def test_a_reason_says_nothing_but_itself(reason: str) -> None:
    (job,) = parse_jobs(f"7|PENDING|N/A|N/A|r1-1.1|{reason}\n").values()
    assert (job.slurm_id, job.state, job.reason) == ("7", "PENDING", plain(reason))
    (node,) = parse_nodes(f"n1|idle|{reason}\n").values()
    assert (node.name, node.state, node.reason) == ("n1", "idle", plain(reason))


@pytest.mark.parametrize(
    "text",
    [
        *("", "schlouder", "schlouder run= lease=1 at=1", "schlouder run=r lease=-1 at=1"),
        *(f"schlouder run=r lease={'9' * 5000} at=1", "schlouder run=r lease=1e9 at=1"),
        *("schlouder run=r;reboot lease=1 at=1", "schlouder run=\x1b[2J lease=1 at=1"),
        *("notschlouder run=r lease=1 at=1", "schlouder run=r lease=1 at=1keptx"),
        *("schlouder run=r lease=\u0663 at=1", f"schlouder run=r lease=1 at={'9' * 99}"),
    ],
)
def test_a_comment_that_is_no_lease_is_none(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    "text",
    ["", "spot reclaim at ", "spot reclaim at never", "spot reclaim at 0001-01-01T00:00", ATTACK],
)
def test_a_reason_that_is_no_reclaim_is_none(text: str) -> None:
    assert reclaimed_by(text) is None


# -- secrets

MARKED = r"""
envvars: "MARKED_TOKEN"
rule all:
    input: "one"
rule one:
    output: "one"
    shell:
        "printf %s \"$MARKED_TOKEN\" | sha256sum > {output}; touch begun;"
        " for i in $(seq 600); do [ -e end ] && break; sleep 0.1; done"
"""

RECORDING_COMMAND = """#!/bin/sh
{{ printf '%s ' "$0" "$@"; echo; env; }} >>{log}/$(basename "$0").seen
exec {real} "$@"
"""
"""Stands before a command of Slurm's: nothing that it is given is missed."""


class Processes(threading.Thread):
    """Which command lines, and whose environments, have held which secret."""

    def __init__(self, secrets: dict[str, bytes]) -> None:
        super().__init__(daemon=True)
        self.secrets = secrets
        self.arguments: set[tuple[str, str]] = set()
        self.environments: set[tuple[str, str]] = set()
        self.seen = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.2):
            for process in Path("/proc").glob("[0-9]*"):
                self._look_at(process)

    def _look_at(self, process: Path) -> None:
        try:
            command = (process / "cmdline").read_bytes()
            environment = (process / "environ").read_bytes()
        except OSError:
            return
        self.seen += 1
        words = command.decode(errors="replace").split("\0")
        for name, secret in self.secrets.items():
            if secret in command:
                self.arguments.add((name, words[0]))
            if secret in environment:
                self.environments.add((name, " ".join(words[:3])))


def holding(
    secrets: dict[str, bytes], base: Path, roots: list[Path], since: float = 0.0
) -> set[tuple[str, str]]:
    """Which files below `roots`, each on one file system, changed after `since`, hold which secret: its name,
    and the file's as seen from `base`, with N for numbers."""
    found = set()
    for root in roots:
        for folder_, directories, names in os.walk(root):
            device = os.lstat(folder_).st_dev
            directories[:] = [d for d in directories if _device(Path(folder_, d)) == device]
            for path in (Path(folder_, name) for name in names):
                text = _content(path, since)
                found |= {
                    (name, re.sub(r"\d+", "N", str(path.relative_to(base))))
                    for name, secret in secrets.items()
                    if secret in text
                }
    return found


def _device(path: Path) -> int:
    try:
        return path.lstat().st_dev
    except OSError:
        return -1


def _content(path: Path, since: float) -> bytes:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_ctime < since:
            return b""
        return path.read_bytes()
    except OSError:
        return b""


def recording_commands(site: Site) -> Path:
    """Slurm's commands in front of the real ones; where they note what they were given."""
    place = site.directory.parent / f"{site.directory.name}-commands"
    place.mkdir()
    for name in COMMANDS:
        text = RECORDING_COMMAND.format(log=place, real=shutil.which(name))
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    site.environment["PATH"] = f"{place}{os.pathsep}{site.environment['PATH']}"
    return place


def told_about(site: Site) -> bytes:
    """All that EC2 and Slurm tell anybody who asks."""
    told = [json.dumps(site.instances(), default=str).encode()]
    for instance in site.instances():
        answer = site.ec2().describe_instance_attribute(
            InstanceId=instance["InstanceId"], Attribute="userData"
        )
        told.append(base64.b64decode(answer["UserData"].get("Value", "")))
    for what in ("job", "node", "partition", "config"):
        told.append(site.slurm("scontrol", "--details", "show", what).encode())
    told.append(site.slurm("squeue", "--format=%all").encode())
    return b"\n".join(told)


@pytest.mark.integration
@as_root
def test_no_secret_is_anywhere_but_where_it_is_needed(site: Site) -> None:
    """A run with marked secrets; then everything that holds a byte of it is searched."""
    munge_key = (site.cloud.folder / "munge" / "munge.key").read_bytes()
    marked = {name: f"MARK-{name}-{os.urandom(8).hex()}" for name in ("aws", "session", "passed")}
    secrets = {name: mark.encode() for name, mark in marked.items()}
    secrets |= {"munge": munge_key, "munge in base64": base64.b64encode(munge_key)}
    commands = recording_commands(site)
    site.write(MARKED)
    access = {
        "AWS_SECRET_ACCESS_KEY": marked["aws"],
        "AWS_SESSION_TOKEN": marked["session"],
        "MARKED_TOKEN": marked["passed"],
    }
    kept = [site.directory, site.cloud.folder]
    processes = Processes(secrets)
    processes.start()
    with site.started("--schlouder-record", "run.jsonl", "--schlouder-keep-logs", **access) as run:
        wait_for((site.directory / "begun").exists, lambda: "the job does not begin")
        told = told_about(site)
        (vm,) = vm_pids(site.cloud)
        root = Path(f"/proc/{vm}/root")
        own = [root / name for name in ("etc", "var", "root", "dev/shm", *PRIVATE)]
        on_vm = holding(secrets, root, own, (site.cloud.folder / "munge/munge.key").stat().st_mtime)
        alive = holding(secrets, Path("/"), kept)
        (site.directory / "end").touch()
        output, _ = run.communicate(timeout=120)
    processes.over.set()
    processes.join()
    assert run.returncode == 0, output
    assert processes.seen > 100
    digest = hashlib.sha256(secrets["passed"]).hexdigest()
    assert (site.directory / "one").read_text().split()[0] == digest, "the job has not got it"

    assert not [name for name, secret in secrets.items() if secret in told + output.encode()]
    assert processes.arguments == set()
    ours = {(name, command) for name, command in processes.environments if name != "passed"}
    assert {name for name, _ in ours} == {"aws", "session"}, "nothing was seen"
    assert all(re.search(r" -m snakemake|/cbc ", command) for _, command in ours), ours
    assert not [c for n, c in processes.environments if n == "passed" and "slurmctld" in c]
    for name in COMMANDS:
        seen = (
            (commands / f"{name}.seen").read_bytes()
            if (commands / f"{name}.seen").exists()
            else b""
        )
        held = {secret for secret in secrets if secrets[secret] in seen}
        assert held == ({"passed"} if name == "sbatch" else set()), name

    left = alive | holding(secrets, Path("/"), kept)
    cloud = re.sub(r"\d+", "N", str(site.cloud.folder.relative_to("/")))
    assert left == {
        ("munge", f"{cloud}/munge/munge.key"),
        ("passed", f"{cloud}/slurmctld/hash.N/job.N/environment"),
    }
    assert on_vm == {("munge", "etc/munge/munge.key")}
    assert stat.S_IMODE((site.cloud.folder / "munge/munge.key").stat().st_mode) == 0o400
