"""SQLite files in the user's state directory: on local disk, readable by their owner only.

A file that is damaged or written by a newer version is moved aside, never guessed at.
"""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

from .model import SchlouderError


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
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        return _connected(path, schema, version), None
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        aside = _moved_aside(path)
        return _connected(path, schema, version), aside


def _connected(path: Path | str, schema: str, version: int) -> sqlite3.Connection:
    """sqlite3.DatabaseError if the file is anything else than a store of this version."""
    fresh = isinstance(path, str) or not path.exists()
    if isinstance(path, Path) and fresh:
        path.touch(mode=0o600)
    db = sqlite3.connect(path, check_same_thread=False, timeout=30)
    try:
        found = db.execute("PRAGMA user_version").fetchone()[0]
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        if found == 0 and not _has_tables(db):
            db.executescript(f"BEGIN; {schema} PRAGMA user_version = {version}; COMMIT;")
        elif found != version:
            raise sqlite3.DatabaseError(f"version {found}")
        if db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("damaged")
    except sqlite3.DatabaseError:
        db.close()
        raise
    return db


def _has_tables(db: sqlite3.Connection) -> bool:
    return bool(db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


def _moved_aside(path: Path) -> Path:
    target = path.with_name(f"{path.name}.unreadable-{time.time():.0f}")
    path.rename(target)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    return target
