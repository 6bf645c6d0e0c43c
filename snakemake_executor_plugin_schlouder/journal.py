"""The journal: one SQLite file per workflow directory, on local disk, readable by its owner only.

It holds what the broker means to do before it does it (a VM's name and client token are committed
before RunInstances), and what became of every VM, task and attempt. `schlouder status` reads it while
a run writes it.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import store
from .model import VM, VM_ENDED, InstanceType, Need, SchlouderError, Task, TaskState, VMState

VERSION = 4

_OF_USE = (TaskState.COMPLETE, TaskState.SUBMITTED, TaskState.RUNNING)
_VM = (
    "name, strategy, instance_type, token, state, instance_id, requested, ready, ended, reason, leader, "
    "market, price, batch, zone, meter, meter_end, leaves_by, list_price, origin, taken, kept_until"
)
_TASK = (
    "key, jobid, rule, name, strategy, cpus, memory, gpus, nodes, runtime_limit, planned, state, received, "
    "started, ended, vm, attempt, slurm_id, submission, turn, identity, content, recalled, spot, reclaims"
)

_SCHEMA = """
CREATE TABLE runs (
    run TEXT PRIMARY KEY, workdir TEXT NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL,
    region TEXT NOT NULL, endpoint TEXT NOT NULL, strategy TEXT NOT NULL,
    started REAL NOT NULL, ended REAL, birth TEXT NOT NULL, unit REAL NOT NULL, minimum REAL NOT NULL,
    prices TEXT NOT NULL
) STRICT;
CREATE TABLE vms (
    name TEXT NOT NULL, run TEXT NOT NULL REFERENCES runs, strategy TEXT NOT NULL,
    instance_type TEXT NOT NULL, token TEXT NOT NULL, state TEXT NOT NULL, instance_id TEXT,
    requested REAL NOT NULL, ready REAL, ended REAL, reason TEXT NOT NULL, leader TEXT,
    market TEXT NOT NULL, price REAL, batch TEXT NOT NULL, zone TEXT NOT NULL, meter REAL, meter_end REAL,
    leaves_by REAL, list_price REAL, origin TEXT NOT NULL, taken REAL, kept_until REAL, paid REAL,
    PRIMARY KEY (run, name)
) STRICT;
CREATE TABLE tasks (
    key TEXT PRIMARY KEY, run TEXT NOT NULL REFERENCES runs, jobid TEXT NOT NULL, rule TEXT NOT NULL,
    name TEXT NOT NULL, strategy TEXT NOT NULL, cpus INTEGER NOT NULL, memory INTEGER NOT NULL,
    runtime_limit REAL, planned REAL, state TEXT NOT NULL, received REAL NOT NULL, started REAL,
    ended REAL, vm TEXT, attempt INTEGER NOT NULL, slurm_id TEXT, reason TEXT NOT NULL,
    gpus INTEGER NOT NULL, nodes INTEGER NOT NULL, submission TEXT NOT NULL, turn INTEGER NOT NULL,
    identity TEXT NOT NULL, content TEXT NOT NULL, recalled INTEGER NOT NULL,
    spot TEXT NOT NULL, reclaims INTEGER NOT NULL
) STRICT;
CREATE TABLE events (
    run TEXT NOT NULL REFERENCES runs, time REAL NOT NULL, subject TEXT NOT NULL, what TEXT NOT NULL
) STRICT;
CREATE INDEX tasks_of_run ON tasks (run);
"""


@dataclass(frozen=True)
class RunRecord:
    """One `snakemake --executor schlouder`. Times are seconds since the epoch; `birth` tells its process
    from a later one with the same number. `unit` and `minimum` (s) are what the provider bills by, `prices`
    where its prices are from."""

    run: str
    workdir: str
    host: str
    pid: int
    region: str
    endpoint: str
    strategy: str
    started: float
    ended: float | None = None
    birth: str = ""
    unit: float = 1.0
    minimum: float = 60.0
    prices: str = ""


@dataclass(frozen=True)
class VMRecord:
    name: str
    strategy: str
    instance_type: str
    state: str
    instance_id: str | None
    requested: float
    ready: float | None
    ended: float | None
    reason: str
    leader: str | None
    market: str
    price: float | None
    zone: str
    meter: float | None
    meter_end: float | None
    list_price: float | None
    paid: float | None
    origin: str = ""
    taken: float | None = None
    kept_until: float | None = None


@dataclass(frozen=True)
class TaskRecord:
    key: str
    jobid: str
    rule: str
    name: str
    state: str
    planned: float | None
    received: float
    started: float | None
    ended: float | None
    vm: str | None
    reason: str
    cpus: int


@dataclass(frozen=True)
class Remains:
    """What a killed run has left: all its VMs, in the order of their request, those that it had taken over
    first; the tasks that are complete and then those that Slurm had, both in the order in which they came;
    and the highest number of a VM that it started and of a task."""

    vms: list[VM]
    tasks: list[Task]
    vm_count: int
    task_count: int


def journal_path(workdir: Path) -> Path:
    """Where the journal of a workflow directory lives: in the user's state directory, never on the
    workflow's own, possibly shared, file system."""
    digest = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
    return store.state_directory() / digest / "journal.sqlite"


class Journal:
    """Every method is one committed transaction and may be called from any thread.

    `Journal(":memory:")` keeps nothing. A file that is damaged or written by a newer version is moved
    aside, never guessed at; `set_aside` then names where it went.
    """

    def __init__(self, path: Path | str) -> None:
        self.set_aside: Path | None = None
        self._lock = threading.Lock()
        try:
            self._db = self._open(path)
        except (OSError, sqlite3.OperationalError) as error:
            raise store.no_place_for("journal", path, error) from error

    @classmethod
    def reading(cls, path: Path) -> Journal:
        """A journal that somebody else may be writing; nothing is made, changed or moved."""
        return _ReadOnlyJournal(path)

    def _open(self, path: Path | str) -> sqlite3.Connection:
        db, self.set_aside = store.opened(path, _SCHEMA, VERSION)
        return db

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def begin_run(self, record: RunRecord) -> None:
        row = (
            record.run,
            record.workdir,
            record.host,
            record.pid,
            record.region,
            record.endpoint,
            record.strategy,
            record.started,
            record.birth,
            record.unit,
            record.minimum,
            record.prices,
        )
        with self._transaction() as db:
            db.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL, ?, ?, ?, ?)", row)

    def end_run(self, run: str, now: float) -> None:
        with self._transaction() as db:
            db.execute("UPDATE runs SET ended = ? WHERE run = ? AND ended IS NULL", (now, run))

    def note_paid(self, run: str, paid: Mapping[str, float]) -> None:
        """What VMs have really cost (USD, by name), where that differs from price times time."""
        with self._transaction() as db:
            db.executemany(
                "UPDATE vms SET paid = ? WHERE run = ? AND name = ?",
                [(usd, run, name) for name, usd in paid.items()],
            )

    def write(
        self,
        run: str,
        vms: Iterable[VM] = (),
        tasks: Iterable[Task] = (),
        events: Iterable[tuple[float, str, str]] = (),
    ) -> None:
        """Records these VMs and tasks as they are now, and events as (time, VM, what happened);
        returns when it is on the disk."""
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO events VALUES (?, ?, ?, ?)", [(run, *event) for event in events]
            )
            db.executemany(
                f"INSERT OR REPLACE INTO vms VALUES (?{', ?' * 23})",
                [_vm_row(run, vm) for vm in vms],
            )
            db.executemany(
                f"INSERT OR REPLACE INTO tasks VALUES (?{', ?' * 26})",
                [_task_row(run, task) for task in tasks],
            )

    def runs(self) -> list[RunRecord]:
        """All runs of this directory, oldest first."""
        with self._transaction() as db:
            rows = db.execute("SELECT * FROM runs ORDER BY started").fetchall()
        return [RunRecord(*row) for row in rows]

    def living_runs(self, host: str) -> set[str]:
        """Names of the runs that may still go on: not ended, and started on another host, of which nothing
        can be known here, or by a process that is there."""
        return {
            record.run
            for record in self.runs()
            if record.ended is None and (record.host != host or is_there(record))
        }

    def killed_runs(self, host: str) -> list[RunRecord]:
        """The runs that have not ended, whose process, on this host, is gone, and which may have left VMs or
        submitted tasks; the newest first."""
        with self._transaction() as db:
            left = db.execute(
                "SELECT run FROM vms WHERE state NOT IN (?, ?) "
                "UNION SELECT run FROM tasks WHERE state IN (?, ?)",
                (*VM_ENDED, TaskState.SUBMITTED, TaskState.RUNNING),
            ).fetchall()
        return [
            record
            for record in reversed(self.runs())
            if record.ended is None
            and record.host == host
            and (record.run,) in left
            and not is_there(record)
        ]

    def take_over(self, killed: RunRecord, pid: int) -> bool:
        """The process `pid` goes on with a killed run. False: another one was faster."""
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE runs SET pid = ?, birth = ? WHERE run = ? AND pid = ? AND birth = ?",
                (pid, birth_of(pid), killed.run, killed.pid, killed.birth),
            )
            return changed.rowcount == 1

    def remains(self, run: str, types: Mapping[str, InstanceType]) -> Remains:
        """What a killed run has left. `types`: all that its VMs are of, by name."""
        with self._transaction() as db:
            db.execute(
                "UPDATE tasks SET state = ?, reason = ? WHERE run = ? AND state IN (?, ?)",
                (
                    *(TaskState.CANCELLED, "the run was killed before Slurm had it", run),
                    *(TaskState.PENDING, TaskState.SCHEDULED),
                ),
            )
            vms = db.execute(f"SELECT {_VM} FROM vms WHERE run = ?", (run,)).fetchall()
            tasks = db.execute(
                f"SELECT {_TASK} FROM tasks WHERE run = ? AND state IN (?, ?, ?) "
                "ORDER BY state != ?, received",
                (run, *_OF_USE, TaskState.COMPLETE),
            ).fetchall()
            keys = db.execute("SELECT key FROM tasks WHERE run = ?", (run,)).fetchall()
        made = [_vm_of(row, types) for row in vms]
        made.sort(key=lambda vm: (not vm.origin, vm.origin, _number(vm.name)))
        return Remains(
            made,
            [_task_of(row) for row in tasks],
            max((_number(vm.name) for vm in made if not vm.origin), default=0),
            max((_number(key) for (key,) in keys), default=0),
        )

    def vms(self, run: str) -> list[VMRecord]:
        """The run's VMs in the order of their request."""
        columns = (
            "name, strategy, instance_type, state, instance_id, requested, ready, ended, reason, leader, "
            "market, price, zone, meter, meter_end, list_price, paid, origin, taken, kept_until"
        )
        with self._transaction() as db:
            rows = db.execute(
                f"SELECT {columns} FROM vms WHERE run = ? ORDER BY requested, length(name), name",
                (run,),
            ).fetchall()
        return [VMRecord(*row) for row in rows]

    def tasks(self, run: str) -> list[TaskRecord]:
        """The run's tasks in the order in which Snakemake handed them over."""
        columns = (
            "key, jobid, rule, name, state, planned, received, started, ended, vm, reason, cpus"
        )
        with self._transaction() as db:
            rows = db.execute(
                f"SELECT {columns} FROM tasks WHERE run = ? ORDER BY received, length(key), key",
                (run,),
            ).fetchall()
        return [TaskRecord(*row) for row in rows]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._db:
            yield self._db


class _ReadOnlyJournal(Journal):
    def _open(self, path: Path | str) -> sqlite3.Connection:
        if why := store.distrusted(Path(path)):
            raise SchlouderError(f"the journal {path} is not read: {why}")
        uri = f"{Path(path).resolve().as_uri()}?mode=ro"
        try:
            db = sqlite3.connect(uri, uri=True, check_same_thread=False, timeout=30)
            version = db.execute("PRAGMA user_version").fetchone()[0]
            is_whole = version != VERSION or store.is_of(db, _SCHEMA)
        except sqlite3.Error as error:
            raise SchlouderError(f"the journal {path} cannot be read: {error}") from error
        if version != VERSION:
            raise SchlouderError(
                f"the journal {path} is of version {version}, this schlouder reads {VERSION}"
            )
        if not is_whole:
            raise SchlouderError(f"the journal {path} has other tables than schlouder's")
        return db


def is_there(record: RunRecord) -> bool:
    """Whether the run's process lives; where the system does not tell its birth, its number must do."""
    if record.birth:
        return birth_of(record.pid) == record.birth
    try:
        os.kill(record.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def birth_of(pid: int) -> str:
    """The boot of the machine and the tick at which the process began: no clock that is set changes it.
    Empty: there is none, or it is dead and only waits for its parent, or the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{boot} {fields[19]}"


def _number(name: str) -> int:
    """Of the VM or the task in its run."""
    return int(name.rpartition("-")[2])


def _vm_of(row: tuple[Any, ...], types: Mapping[str, InstanceType]) -> VM:
    name, strategy, kind, token, state, instance_id, requested, ready, *rest = row
    ended, reason, leader, market, price, batch, zone, *more = rest
    meter, meter_end, leaves_by, listed, origin, taken, kept_until = more
    return VM(
        name,
        strategy,
        types[kind],
        requested,
        market=market,
        price=price,
        token=token,
        batch=tuple(batch.split()),
        zone=zone,
        meter=meter,
        meter_end=meter_end,
        leaves_by=leaves_by,
        list_price=listed,
        origin=origin,
        taken=taken,
        kept_until=kept_until,
        state=VMState(state),
        instance_id=instance_id,
        ready=ready,
        ended=ended,
        reason=reason,
        leader=leader,
        is_adopted=True,
    )


def _task_of(row: tuple[Any, ...]) -> Task:
    key, jobid, rule, name, strategy, cpus, memory, gpus, nodes, *rest = row
    limit, planned, state, received, started, ended, vm, attempt, slurm_id, *more = rest
    submission, turn, identity, content, recalled, spot, reclaims = more
    return Task(
        key,
        name,
        rule,
        jobid,
        strategy,
        Need(cpus, memory, gpus, nodes=nodes),
        command="",
        limit=limit,
        planned=planned,
        state=TaskState(state),
        received=received,
        started=started,
        ended=ended,
        vm=vm,
        attempt=attempt,
        slurm_id=slurm_id,
        submission=submission,
        turn=turn,
        identity=identity,
        content=content,
        recalled=bool(recalled),
        is_wanted=False,
        spot=spot,
        reclaims=reclaims,
    )


def _vm_row(run: str, vm: VM) -> tuple[object, ...]:
    return (
        vm.name,
        run,
        vm.strategy,
        vm.type.name,
        vm.token,
        vm.state.value,
        vm.instance_id,
        vm.requested,
        vm.ready,
        vm.ended,
        vm.reason,
        vm.leader,
        vm.market,
        vm.price,
        " ".join(vm.batch),
        vm.zone,
        vm.meter,
        vm.meter_end,
        vm.leaves_by,
        vm.list_price,
        vm.origin,
        vm.taken,
        vm.kept_until,
        None,
    )


def _task_row(run: str, task: Task) -> tuple[object, ...]:
    return (
        task.key,
        run,
        task.jobid,
        task.rule,
        task.name.encode(errors="backslashreplace").decode(),
        task.strategy,
        task.need.cpus,
        task.need.memory,
        task.limit,
        task.expected if task.planned is None else task.planned,
        task.state.value,
        task.received,
        task.started,
        task.ended,
        task.vm,
        task.attempt,
        task.slurm_id,
        task.reason,
        task.need.gpus,
        task.need.nodes,
        task.submission,
        task.turn,
        task.identity,
        task.content,
        task.recalled,
        task.spot,
        task.reclaims,
    )
