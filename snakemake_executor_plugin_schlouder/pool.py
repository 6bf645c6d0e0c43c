"""A pool: the VMs of one strategy and instance type, and the tasks that wait for them."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .fleet import Fleet
from .model import DEFAULT_WALLTIME, VM, InstanceType, Need, Task, VMState
from .prediction import Walltimes

if TYPE_CHECKING:
    from .strategies import Strategy

SHORT = 60.0
"""Seconds up to which a running task counts as short: the next one is handed over while it runs, for
the broker's round would be felt between them."""


class Backlog:
    """Tasks without a VM.

    Estimates are corrected by what was learned of their rule. The order within a rule does not depend
    on that, so that a correction costs nothing.
    """

    def __init__(self, walltimes: Walltimes) -> None:
        self._walltimes = walltimes
        self._rules: dict[str, list[tuple[float, int, Task]]] = {}
        self._cpu_seconds: dict[str, float] = {}
        self._count = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, task: Task) -> None:
        self._count += 1
        self._size += 1
        estimate = _estimate(task)
        insort(self._rules.setdefault(task.rule, []), (estimate, -self._count, task))
        known = self._cpu_seconds.get(task.rule, 0.0)
        self._cpu_seconds[task.rule] = known + estimate * task.need.cpus

    def take(self, task: Task) -> Task:
        """Removes `task`, and notes what it is expected to take."""
        estimate = _estimate(task)
        tasks = self._rules[task.rule]
        at = bisect_right(tasks, estimate, key=_length) - 1
        while tasks[at][2] is not task:
            at -= 1
        del tasks[at]
        self._size -= 1
        self._cpu_seconds[task.rule] -= estimate * task.need.cpus
        if not tasks:
            del self._rules[task.rule], self._cpu_seconds[task.rule]
        task.expected = self._walltimes.expected(task.rule, task.planned)
        return task

    def clear(self) -> list[Task]:
        tasks = [entry[2] for entries in self._rules.values() for entry in entries]
        self._rules.clear()
        self._cpu_seconds.clear()
        self._size = 0
        return tasks

    def cpu_seconds(self) -> float:
        """Expected in total."""
        return sum(work * self._walltimes.bias(rule) for rule, work in self._cpu_seconds.items())

    def spread(self) -> float:
        """Of the rule whose walltimes spread most (see `Walltimes.spread`)."""
        return max((self._walltimes.spread(rule) for rule in self._rules), default=0.0)

    def shares(self, cpus: int) -> list[float]:
        """Seconds each task adds to a VM with so many CPUs, the largest first."""
        found: list[float] = []
        for rule, tasks in self._rules.items():
            factor = self._walltimes.bias(rule) / cpus
            found += [length * factor * task.need.cpus for length, _, task in tasks]
        return sorted(found, reverse=True)

    def longest(
        self, vm: VM, seconds: float = float("inf"), over: float = float("inf")
    ) -> Task | None:
        """The longest task that has room on `vm` and is expected to end within `seconds`, and within
        `over` with all the spread of its rule added; of equal ones the first that came."""
        best, best_length, free = None, -1.0, vm.free()
        for rule, tasks in self._rules.items():
            bias = self._walltimes.bias(rule)
            limit = min(seconds, over / (1 + self._walltimes.spread(rule))) / bias
            task = _last_with_room(tasks, limit, free)
            if task is not None and _estimate(task) * bias > best_length:
                best, best_length = task, _estimate(task) * bias
        return best


@dataclass
class Pool:
    """`touched` are the VMs on which something changed since they were last offered work, `is_stale`
    says that the plan as a whole must be made anew; `room` how many more VMs the cap allows, and
    `is_starved` that fewer could be started than the plan wants. `boot_time(k)`: predicted boot (s) of
    the VM that would be requested after k others now."""

    strategy: Strategy
    kind: InstanceType
    fleet: Fleet
    backlog: Backlog
    boot_time: Callable[[int], float]
    touched: dict[str, VM] = field(default_factory=dict)
    is_stale: bool = False
    is_starved: bool = False
    room: int = 0

    def __iter__(self) -> Iterator[VM]:
        return iter(self.fleet)

    def takes_more(self, vm: VM) -> bool:
        """Whether `vm` has a CPU free, counting what is about to be handed over; or runs short tasks
        only, while there are many left for everybody."""
        if vm.state != VMState.READY:
            return False
        if vm.free().cpus > 0:
            return True
        ahead = vm.has_room(Need(0, 0)) and not vm.queue
        many = len(self.backlog) >= 2 * len(self.fleet)
        return ahead and many and all(task.walltime <= SHORT for task in vm.active.values())

    @property
    def moves(self) -> bool:
        """Whether anything runs, or is about to."""
        return any(vm.is_booting or not vm.is_unused for vm in self.fleet)


def _estimate(task: Task) -> float:
    return DEFAULT_WALLTIME if task.planned is None else task.planned


def _length(entry: tuple[float, int, Task]) -> float:
    return entry[0]


def _last_with_room(tasks: list[tuple[float, int, Task]], limit: float, free: Need) -> Task | None:
    """The longest up to `limit` that fits into `free`; behind a running task any will, later."""
    for at in range(bisect_right(tasks, limit, key=_length) - 1, -1, -1):
        need = tasks[at][2].need
        if free.cpus <= 0 or (need.cpus <= free.cpus and need.memory <= free.memory):
            return tasks[at][2]
    return None
