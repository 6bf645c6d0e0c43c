"""What a killed run has left, and the jobs of the new one that stand for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..model import NEVER, TASK_ENDED, Task, TaskState
from .attempts import Attempts
from .desk import Desk

_VOID = (TaskState.FAILED, TaskState.CANCELLED)
_CLAIMED = (
    *("command", "name", "ends_run", "limit", "planned", "is_limit", "may_bundle", "options"),
    *("strategy", "after", "level", "rank", "spot"),
)
"""What a task that goes on takes over from the one that stands for it in the new run."""


class Claims:
    def __init__(self, desk: Desk, attempts: Attempts) -> None:
        self._desk = desk
        self._attempts = attempts
        self._unclaimed: dict[str, Task] = {}
        self._claimed: list[Task] = []
        self._replaced: dict[str, list[Task]] = {}
        self._held: list[Task] = []

    def adopt(self, task: Task) -> None:
        """A task of the killed run, by each of the results that it makes."""
        self._unclaimed.update(dict.fromkeys(task.identity.split(), task))

    def take_claimed(self) -> list[Task]:
        """Tasks of the killed run that go on, which were claimed since this was asked last."""
        claimed = []
        while self._claimed:
            claimed.append(self._claimed.pop())
        return claimed

    def holds(self, task: Task) -> bool:
        """Whether `task` must wait for the end of what a killed run has left; it is then kept here."""
        is_held = task.key in self._replaced
        if is_held:
            self._held.append(task)
        return is_held

    @property
    def is_waiting(self) -> bool:
        return bool(self._held)

    def drop(self) -> list[Task]:
        """The tasks that wait here, which do so no longer."""
        dropped, self._held = self._held, []
        return dropped

    def has_left(self, identity: str) -> bool:
        """Whether a killed run left something that makes one of these results."""
        return any(part in self._unclaimed for part in identity.split())

    def claim(self, task: Task, changed: float, is_made: bool) -> Task | None:
        """What a killed run left that makes the same results as `task`, which is then the one to wait for.
        None: there is none, or it makes only a part of them, or in another way, or from what was `changed`
        (date) since; it is then ended before `task` begins. `is_made`: the results are there."""
        parts = task.identity.split()
        with self._attempts.claims:
            found = {id(each): each for part in parts if (each := self._unclaimed.get(part))}
            left = [each for each in found.values() if each.state not in _VOID]
            live = left[0] if len(left) == 1 else None
            if live is not None and _goes_on(live, task, changed, is_made):
                self._go_on_with(live, task)
                return live
            running = [each for each in left if each.state not in TASK_ENDED]
            if running:
                self._replaced[task.key] = running
            return None

    def _go_on_with(self, live: Task, task: Task) -> None:
        for part in live.identity.split():
            del self._unclaimed[part]
        for name in _CLAIMED:
            setattr(live, name, getattr(task, name))
        wanted = task.need
        live.need = replace(
            live.need,
            gpu_model=wanted.gpu_model,
            constraint=wanted.constraint,
            types=wanted.types,
        )
        if self._attempts.has_lost_too_many(live):
            live.spot = NEVER
        live.is_wanted = True
        self._claimed.append(live)
        if live.state == TaskState.COMPLETE:
            self._attempts.has_ended(live)

    def end_replaced(self) -> None:
        """Attempts of a killed run that make their results in another way than is wanted now; the tasks
        that are to make them wait until nothing of the old attempt can write."""
        for task in list(self._held):
            left = [live for live in self._replaced[task.key] if live.state not in TASK_ENDED]
            if not left:
                self._held.remove(task)
                self._desk.waiting.append(task)
            self._end_old([live for live in left if not live.recalled])

    def _end_old(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self._desk.log.info(
                f"{task.name} runs since before the crash, but its inputs, parameters, code or group have "
                "changed: it is ended, and done anew."
            )
        self._attempts.recall(tasks)


def _goes_on(live: Task, task: Task, changed: float, is_made: bool) -> bool:
    """Whether what a killed run left is what `task` would do."""
    same = live.identity == task.identity and live.content == task.content
    return same and changed <= live.received and (is_made or live.state != TaskState.COMPLETE)
