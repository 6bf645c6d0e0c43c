"""SQLite files in the user's state directory: on local disk, readable by their owner only.

A file that is damaged, written by another version, or that somebody else may have written is moved aside,
never guessed at.
"""

from __future__ import annotations

import functools
import os
import pwd
import sqlite3
import time
from pathlib import Path
from stat import S_ISREG

from .model import SchlouderError

_PARTS = ("", "-wal", "-shm", "-journal")
"""Endings of the files that SQLite keeps for a store."""

_WRITABLE = 0o022
"""Rights by which others than the owner may write."""


def state_directory() -> Path:
    """Where all that is kept between runs lives."""
    state_home = os.environ.get("XDG_STATE_HOME")
    return Path(state_home or Path.home() / ".local" / "state") / "schlouder"


def cache_directory() -> Path:
    """Where what can be asked for again is kept for some days."""
    cache_home = os.environ.get("XDG_CACHE_HOME")
    return Path(cache_home or Path.home() / ".cache") / "schlouder"


def no_place_for(what: str, path: Path | str, error: Exception) -> SchlouderError:
    """The message for a store that cannot be had at all."""
    return SchlouderError(
        f"the {what} {path} cannot be opened: {error}; give a directory on a local disk that "
        "you can write to in XDG_STATE_HOME"
    )


def opened(path: Path | str, schema: str, version: int) -> tuple[sqlite3.Connection, Path | None]:
    """A connection to a store of this version, made with `schema` where there is none (`":memory:"` keeps
    nothing), and where an unreadable file went. OSError or sqlite3.OperationalError if none can be had."""
    if not isinstance(path, Path):
        return _connected(path, schema, version), None
    for directory in (state_directory(), path.parent):
        if path.is_relative_to(directory):
            make_private(directory)
    if distrusted(path):
        aside = _moved_aside(path)
        return _connected(path, schema, version), aside
    try:
        return _connected(path, schema, version), None
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        aside = _moved_aside(path)
        return _connected(path, schema, version), aside


def distrusted(path: Path) -> str:
    """Why a store is not read, as far as can be seen without opening it; empty: it is fit, or not there."""
    for suffix in _PARTS:
        part = path.with_name(path.name + suffix)
        try:
            status = part.lstat()
        except FileNotFoundError:
            continue
        if not S_ISREG(status.st_mode):
            return f"{part.name} is no regular file"
        if status.st_uid != os.geteuid():
            return f"{part.name} belongs to {_user(status.st_uid)}"
        if status.st_mode & _WRITABLE:
            return f"others may write {part.name}"
    return ""


def is_of(db: sqlite3.Connection, schema: str) -> bool:
    """Whether the database has the tables of `schema`, and nothing else."""
    return _tables(db) == _tables_of(schema)


@functools.cache
def _tables_of(schema: str) -> frozenset[tuple[object, ...]]:
    db = sqlite3.connect(":memory:")
    db.executescript(schema)
    try:
        return _tables(db)
    finally:
        db.close()


def _tables(db: sqlite3.Connection) -> frozenset[tuple[object, ...]]:
    """What is in a database, and the columns of its tables."""
    things = db.execute(
        "SELECT type, name, tbl_name FROM sqlite_master WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    ).fetchall()
    columns = db.execute(
        'SELECT m.name, c.name, c.type, c."notnull", c.pk FROM sqlite_master AS m'
        " JOIN pragma_table_info(m.name) AS c WHERE m.type = 'table'"
    ).fetchall()
    return frozenset((*things, *columns))


def make_private(directory: Path) -> None:
    """Makes it, or closes it to others. PermissionError if it is somebody else's, who could put files
    there."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = directory.stat()
    for owner in (directory.lstat().st_uid, status.st_uid):
        if owner != os.geteuid():
            raise PermissionError(f"{directory} belongs to {_user(owner)}")
    if status.st_mode & 0o077:
        directory.chmod(0o700)


def _user(uid: int) -> str:
    try:
        return f"the user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"the user with id {uid}"


def _connected(path: Path | str, schema: str, version: int) -> sqlite3.Connection:
    """sqlite3.DatabaseError if the file is anything else than a store of this version."""
    if isinstance(path, Path):
        path.touch(mode=0o600)
        path.chmod(0o600)
    db = sqlite3.connect(path, check_same_thread=False, timeout=30)
    try:
        _use_wal(db)
        db.execute("PRAGMA synchronous = FULL")
        with db:
            # Somebody else may be making it just now.
            db.execute("BEGIN EXCLUSIVE")
            _make_if_new(db, schema, version)
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found != version:
            raise sqlite3.DatabaseError(f"version {found}")
        if db.execute("PRAGMA quick_check").fetchone()[0] != "ok" or not is_of(db, schema):
            raise sqlite3.DatabaseError("damaged")
    except sqlite3.DatabaseError:
        db.close()
        raise
    return db


def _use_wal(db: sqlite3.Connection) -> None:
    """SQLite itself does not wait for its turn to do this, as it does with everything else."""
    for left in reversed(range(100)):
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if not left:
                raise
            time.sleep(0.05)


def _make_if_new(db: sqlite3.Connection, schema: str, version: int) -> None:
    if db.execute("PRAGMA user_version").fetchone()[0] == 0 and not _tables(db):
        for statement in schema.split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {version}")


def _moved_aside(path: Path) -> Path:
    target = path.with_name(f"{path.name}.unreadable-{time.time():.0f}")
    if os.path.lexists(path):
        path.rename(target)
    for suffix in _PARTS[1:]:
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    return target
