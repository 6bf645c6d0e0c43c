"""Faults of the journal and its disk."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

from bench.faults.fault import CLEAN_ERROR, COMPLETE, RESUMES, Fault, by_name
from bench.faults.place import wait
from bench.faults.scene import PATIENCE, Scene
from snakemake_executor_plugin_schlouder.journal import VERSION, journal_path

NONSENSE = b"SQLite format 3\0" + b"nonsense " * 1000


def _journal(scene: Scene) -> Path:
    os.environ["XDG_STATE_HOME"] = scene.place.environment["XDG_STATE_HOME"]
    path = journal_path(scene.directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _small_disk(scene: Scene) -> None:
    state = Path(scene.place.environment["XDG_STATE_HOME"])
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(state)], check=True)
    scene.cleanup.callback(subprocess.run, ["umount", "--lazy", str(state)], check=False)


def _fill(scene: Scene) -> Path:
    filler = Path(scene.place.environment["XDG_STATE_HOME"]) / "filler"
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], check=False, capture_output=True
    )
    return filler


def _full_for_a_while(scene: Scene) -> None:
    scene.when_busy()
    filler = _fill(scene)
    scene.open_gate()
    scene.when(lambda: "journal cannot be written" in scene.said, "it is told")
    time.sleep(20)
    filler.unlink()


def _full_for_good(scene: Scene) -> None:
    scene.when_busy()
    _fill(scene)
    scene.open_gate()
    scene.ends_within(500)


def _free(scene: Scene) -> None:
    (Path(scene.place.environment["XDG_STATE_HOME"]) / "filler").unlink()


def _nonsense(scene: Scene) -> None:
    _journal(scene).write_bytes(NONSENSE)


def _newer(scene: Scene) -> None:
    with sqlite3.connect(_journal(scene)) as db:
        db.execute("CREATE TABLE runs (run TEXT)")
        db.execute(f"PRAGMA user_version = {VERSION + 1}")


def _is_told(scene: Scene) -> None:
    scene.when(lambda: "could not be read; it was moved to" in scene.said, "it is told")


def _killed(scene: Scene) -> None:
    assert scene.process is not None
    scene.when_busy()
    os.killpg(scene.process.pid, signal.SIGKILL)
    scene.process.wait()


def _killed_and_nonsense(scene: Scene) -> None:
    """And started again while the jobs of the killed run, of which nobody knows now, still write."""
    _killed(scene)
    path = _journal(scene)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    path.write_bytes(NONSENSE)
    wait(scene.start("--unlock"), PATIENCE)
    scene.start("--rerun-incomplete")
    scene.ends_within(PATIENCE)


def _is_unknown(scene: Scene) -> None:
    """No journal knows of the killed run any more."""
    scene.is_orphaned = True


FAULTS = by_name(
    [
        Fault(
            "journal-disk-full",
            "the disk of the journal is full for 20 s",
            COMPLETE,
            _full_for_a_while,
            set_up=_small_disk,
        ),
        Fault(
            "journal-disk-full-for-good",
            "the disk of the journal stays full: after 5 minutes the run ends with what runs",
            CLEAN_ERROR,
            _full_for_good,
            set_up=_small_disk,
            mend=_free,
            says="The journal stays unwritable",
        ),
        Fault(
            "journal-damaged",
            "the journal is nonsense at the start",
            COMPLETE,
            _is_told,
            set_up=_nonsense,
        ),
        Fault(
            "journal-newer",
            "the journal is of a newer version",
            COMPLETE,
            _is_told,
            set_up=_newer,
        ),
        Fault(
            "journal-damaged-after-kill",
            "SIGKILL, and the journal is damaged before the restart, while jobs of the killed run write",
            CLEAN_ERROR,
            _killed_and_nonsense,
            says="jobs of a run that the journal does not know",
            mend=_is_unknown,
            leased=True,
        ),
        Fault(
            "killed-at-work",
            "SIGKILL while jobs run that do not end before the restart",
            RESUMES,
            _killed,
        ),
    ]
)
