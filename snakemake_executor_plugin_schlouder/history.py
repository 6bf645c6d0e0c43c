"""The history: what tasks and boots of earlier runs took. One SQLite file per user, beside the journals.

Predictors are seeded with the latest results; older ones are forgotten.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from . import store
from .prediction import BootPredictor, LearnedBoots, Walltimes

VERSION = 1

LATEST = 500
"""How many results of a rule, or boots of an instance type, predictors are seeded with."""

_KEPT = 4 * LATEST

_SCHEMA = """
CREATE TABLE walltimes (
    rule TEXT NOT NULL, strategy TEXT NOT NULL, instance_type TEXT NOT NULL,
    estimate REAL, real REAL NOT NULL, date REAL NOT NULL
) STRICT;
CREATE TABLE boots (
    instance_type TEXT NOT NULL, region TEXT NOT NULL, seconds REAL NOT NULL,
    booting INTEGER NOT NULL, date REAL NOT NULL
) STRICT;
CREATE INDEX walltimes_of_rule ON walltimes (rule, date);
CREATE INDEX boots_of_type ON boots (instance_type, date);
"""


@dataclass(frozen=True)
class Walltime:
    """A task of `rule` took `real` s where the user had said `estimate`, or nothing. `date`: when it
    ended, seconds since the epoch."""

    rule: str
    strategy: str
    instance_type: str
    estimate: float | None
    real: float
    date: float


@dataclass(frozen=True)
class Boot:
    """A VM was ready `seconds` after its request at `date`, when `booting` others were booting."""

    instance_type: str
    region: str
    seconds: float
    booting: int
    date: float


def history_path() -> Path:
    """One for all workflows of the user: a rule is known by its name."""
    return store.state_directory() / "history.sqlite"


class History:
    """Every method is one committed transaction and may be called from any thread.

    `History(":memory:")` keeps nothing. A file that is damaged or written by a newer version is moved
    aside; `set_aside` then names where it went.
    """

    def __init__(self, path: Path | str) -> None:
        self._lock = threading.Lock()
        try:
            self._db, self.set_aside = store.opened(path, _SCHEMA, VERSION)
        except (OSError, sqlite3.OperationalError) as error:
            raise store.no_place_for("history", path, error) from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def add(self, walltimes: Iterable[Walltime] = (), boots: Iterable[Boot] = ()) -> None:
        """What one run measured."""
        tasks, machines = list(walltimes), list(boots)
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO walltimes VALUES (?, ?, ?, ?, ?, ?)", [astuple(one) for one in tasks]
            )
            db.executemany(
                "INSERT INTO boots VALUES (?, ?, ?, ?, ?)", [astuple(one) for one in machines]
            )
            for rule in {one.rule for one in tasks}:
                _forget(db, "walltimes", "rule", rule)
            for kind in {one.instance_type for one in machines}:
                _forget(db, "boots", "instance_type", kind)

    def walltimes(self) -> Walltimes:
        """A predictor that has learned the latest results of every rule, oldest first."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT rule, estimate, real FROM (SELECT *, row_number() OVER"
                " (PARTITION BY rule ORDER BY date DESC) AS age FROM walltimes)"
                " WHERE age <= ? ORDER BY date",
                (LATEST,),
            ).fetchall()
        learned = Walltimes()
        for rule, estimate, real in rows:
            learned.learn(rule, estimate, real)
        return learned

    def boots(
        self,
        instance_type: str | None = None,
        region: str | None = None,
        rule: BootPredictor | None = None,
    ) -> LearnedBoots:
        """A predictor that has learned the latest boots of this type and region, or of all; `rule` is
        what it corrects."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT seconds, booting FROM boots WHERE instance_type = coalesce(?, instance_type)"
                " AND region = coalesce(?, region) ORDER BY date DESC LIMIT ?",
                (instance_type, region, LATEST),
            ).fetchall()
        learned = LearnedBoots(rule)
        for seconds, booting in reversed(rows):
            learned.learn(seconds, booting)
        return learned

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._db:
            yield self._db


def _forget(db: sqlite3.Connection, table: str, column: str, value: str) -> None:
    """Drops all but the latest rows, so that the file stays small."""
    db.execute(
        f"DELETE FROM {table} WHERE {column} = ? AND rowid NOT IN"
        f" (SELECT rowid FROM {table} WHERE {column} = ? ORDER BY date DESC LIMIT ?)",
        (value, value, _KEPT),
    )
