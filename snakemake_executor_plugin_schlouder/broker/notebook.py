"""What goes into the journal, and what the user is told."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable
from typing import Protocol

from ..model import VM, Task

_PATIENCE = 300.0


class Books(Protocol):
    """Where the broker writes what it is about to do."""

    def write(
        self,
        run: str,
        vms: Iterable[VM] = (),
        tasks: Iterable[Task] = (),
        events: Iterable[tuple[float, str, str]] = (),
    ) -> None: ...


class Notebook:
    """Collects what has changed, until `flush` writes it down in one transaction."""

    def __init__(self, run: str, books: Books, log: logging.Logger) -> None:
        self._run = run
        self._books = books
        self._log = log
        self._vms: dict[str, VM] = {}
        self._tasks: dict[str, Task] = {}
        self._events: list[tuple[float, str, str]] = []
        self._failed: float | None = None
        self._told: set[str] = set()

    def vm(self, vm: VM, event: tuple[float, str, str] | None = None) -> None:
        """`vm` has changed; `event`: date, VM, what happened."""
        self._vms[vm.name] = vm
        if event is not None:
            self._events.append(event)

    def task(self, task: Task) -> None:
        self._tasks[task.key] = task

    def take(self, tasks: Iterable[Task]) -> bool:
        """Writes these down at once; False if that cannot be done now."""
        try:
            self._books.write(self._run, tasks=tasks)
        except sqlite3.Error:
            return False
        return True

    @property
    def has_all_tasks(self) -> bool:
        """Whether all that is known of tasks is on the disk."""
        return not self._tasks

    def flush(self, now: float) -> bool:
        """Writes down what changed. While that is not possible nothing new is to be started, but what there
        is goes on, ends, and is given back."""
        if not (self._vms or self._tasks):
            return self._failed is None
        try:
            self._books.write(self._run, self._vms.values(), self._tasks.values(), self._events)
        except sqlite3.Error as error:
            self._fails(error, now)
            return False
        self._failed = None
        self._vms.clear()
        self._tasks.clear()
        self._events.clear()
        return True

    def _fails(self, error: sqlite3.Error, now: float) -> None:
        if self._failed is None:
            self._failed = now
        self.tell(
            f"The journal cannot be written ({error}); nothing new is started until it can.",
            logging.ERROR,
        )

    def is_lost(self, now: float) -> bool:
        """Whether the journal has been unwritable for so long that the run should come to its end."""
        return self._failed is not None and now - self._failed > _PATIENCE

    def tell(self, message: str, level: int, about: str = "") -> None:
        """Says a thing once a run, however often it happens; and `about` a thing only one."""
        if (about or message) not in self._told:
            self._told.add(about or message)
            self._log.log(level, message)
