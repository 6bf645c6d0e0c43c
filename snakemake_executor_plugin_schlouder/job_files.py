"""The files jobs leave in the workflow's directory: their names, and their removal.

All of a run are in `.snakemake/schlouder/RUN`: a log for every attempt, and the exit-code file with its
markers (`slurm/script.py`). The logs of failed jobs stay until they are old.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from .model import SchlouderError, Task, TaskState
from .objects import Objects
from .printable import plain
from .slurm.script import markers

_LONGEST = 80
"""Characters of a rule's name, and of its wildcards, in a file name; file systems allow 255 bytes in all."""

_TAIL_BYTES = 65536
_TAIL_LINES = 30
_PATIENCE = 10.0
_DAY = 86400.0
_ODD = re.compile(r"[^A-Za-z0-9.=]+")
_RUN = re.compile(r"[0-9a-f]{8}")
_OURS = re.compile(
    r"\d+-[A-Za-z0-9_.=-]+\.\d+\.(log(\.bundle)?|exit(\.done)?(\.part|\.begun|\.revoked)?)"
)
_STAYING = (".log", ".log.bundle", ".revoked")
"""Endings of what is ours and stays at the end of a run: those of successes are gone by then."""


def folder(workdir: Path) -> Path:
    """Where the folders of all runs are."""
    return workdir / ".snakemake" / "schlouder"


def log_name(task: Task) -> str:
    """File name of the log of a task's current attempt: its number in the run, rule and wildcards, as far
    as they are ASCII and short, and the attempt."""
    wildcards = _plain(task.name[len(task.rule) :])
    words = [_number(task), task.rule[:_LONGEST], wildcards[:_LONGEST]]
    return f"{'-'.join(word for word in words if word)}.{task.attempt}.log"


def bundle_log_name(submission: str) -> str:
    """File name of the log of a bundle's Slurm job, which the attempt key of its first task names."""
    number, _, attempt = submission.rpartition("-")[2].partition(".")
    return f"{number}-bundle.{attempt}.log.bundle"


def exit_name(task: Task, attempt: int) -> str:
    """File name of the exit code of one attempt."""
    return f"{_number(task)}-{task.rule[:_LONGEST]}.{attempt}.exit"


def names_to_remove(task: Task) -> list[str]:
    """What is of no use any more when the journal has the end of `task`: exit codes and marks of all
    attempts, the logs where it succeeded. Marks that revoke a submission stay: it may come late."""
    attempts = range(1, task.attempt + 1)
    names = [name for attempt in attempts for name in markers(exit_name(task, attempt))]
    if task.state == TaskState.COMPLETE:
        log = log_name(task).removesuffix(f".{task.attempt}.log")
        names += [f"{log}.{attempt}.log" for attempt in attempts]
        names += [bundle_log_name(f"{task.key}.{attempt}") for attempt in attempts]
    return names


def tail(log: Path) -> str:
    """The end of a job's log, indented, for an error message; nothing in it does anything to a terminal."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = _lines(file.read().decode(errors="replace"))
    except OSError:
        return f"    (no log at {log})\n"
    shown = "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:])
    return f"Last lines of {log}:\n{shown}\n"


def _lines(text: str) -> list[str]:
    """A progress bar begins a line anew with every carriage return."""
    return plain(re.sub("\r+\n?", "\n", text)).removesuffix("\n").split("\n")


def make_folder(place: Path) -> None:
    """Makes the folder of a run, for its owner alone. SchlouderError if that cannot be, or if a link leads
    elsewhere: what is written there says how jobs have ended."""
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_link = place.is_symlink() or place.parent.is_symlink()
        is_ours = place.stat().st_uid == os.geteuid()
        if is_ours and not is_link:
            place.chmod(0o700)
    except OSError as error:
        raise SchlouderError(
            f"the folder {place} cannot be made: {error.strerror}; it takes a workflow directory that you "
            "can write to"
        ) from error
    if is_link or not is_ours:
        raise SchlouderError(
            f"the folder {place} is {'a link' if is_link else 'of another user'}; remove it"
        )


class Sweeper:
    """Removes files, and objects where jobs leave those instead, in a thread of its own, so that a slow file
    system holds nobody up. Raises nothing: what cannot be removed stays."""

    def __init__(self, workdir: Path, run: str, objects: Objects | None = None) -> None:
        self._folder = folder(workdir)
        self._run = run
        self._objects = objects
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="schlouder-sweeper", daemon=True)
        self._thread.start()

    def remove(self, names: Iterable[str]) -> None:
        """Removes these files of the run."""
        given, objects = list(names), self._objects
        self._orders.put(lambda: self._remove(given))
        if objects is not None:
            self._orders.put(lambda: objects.remove(given))

    def remove_old(self, days: float, living: Collection[str]) -> None:
        """Removes the files of runs in which nothing was made or removed for so many days; not of the
        `living` ones, nor of other users, who cannot be seen to live."""
        self._orders.put(lambda: self._remove_old(time.time() - days * _DAY, living))

    def close(self, everything: bool) -> None:
        """Ends the thread, within seconds. `everything`: nothing of the run can run or be run again, so
        that all objects go, and all marks but those that revoke, and the folder if it is empty then."""
        if everything and self._objects is not None:
            self._orders.put(self._objects.clear)
        if everything:
            self._orders.put(self._remove_marks)
        self._orders.put(None)
        self._thread.join(_PATIENCE)

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            with contextlib.suppress(OSError):
                order()

    def _remove(self, names: Iterable[str]) -> None:
        with _opened(self._folder / self._run) as place:
            _unlink(place, names)

    def _remove_marks(self) -> None:
        path = self._folder / self._run
        with _opened(path) as place:
            left = [name for name in _names(place) if _OURS.fullmatch(name)]
            _unlink(place, [name for name in left if not name.endswith(_STAYING)])
        path.rmdir()

    def _remove_old(self, before: float, living: Collection[str]) -> None:
        with _opened(self._folder) as place:
            for run in _names(place):
                if _RUN.fullmatch(run) and run not in (*living, self._run):
                    with contextlib.suppress(OSError):
                        _remove_run(place, run, before)


def _remove_run(place: int, run: str, before: float) -> None:
    """Removes the folder `run` of the folder `place`, except for what is not ours."""
    with _opened(run, place) as inside:
        status = os.fstat(inside)
        if status.st_mtime >= before or status.st_uid != os.getuid():
            return
        with os.scandir(inside) as entries:
            old = [
                entry.name
                for entry in entries
                if _OURS.fullmatch(entry.name)
                and entry.is_file(follow_symlinks=False)
                and entry.stat(follow_symlinks=False).st_mtime < before
            ]
        _unlink(inside, old)
    os.rmdir(run, dir_fd=place)


@contextlib.contextmanager
def _opened(path: Path | str, place: int | None = None) -> Iterator[int]:
    """A folder, which is no symbolic link, as a descriptor: what is removed by it is in that folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _names(place: int) -> list[str]:
    with os.scandir(place) as entries:
        return [entry.name for entry in entries]


def _unlink(place: int, names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=place)


def _number(task: Task) -> str:
    """What tells a task from all others of its run."""
    return task.key.rpartition("-")[2]


def _plain(text: str) -> str:
    """`text` in characters that every file system and every shell takes as they are."""
    return _ODD.sub("_", text).strip("_")
