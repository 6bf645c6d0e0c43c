"""A pool: the VMs of one strategy, offer and gang width, and the tasks that wait for them."""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .bundles import LENGTH, WORTH, fair_share, may_bundle
from .fleet import Fleet
from .market.offers import has_room, misfit, packed, slots_of
from .model import NEVER, ON_DEMAND, VM, InstanceType, Need, Task, VMState, estimate_of
from .prediction import PRIOR_SPREAD, Line, Walltimes

if TYPE_CHECKING:
    from .strategies import Strategy

SHORT = 60.0
"""Seconds up to which a running task counts as short: the next one is handed over while it runs, for
the broker's round would be felt between them."""

SURELY = 1.5
"""Standard deviations added to what a task is expected to take where its lateness would cost a unit."""

ALIKE = 0.9
"""Tasks of about the same length: the share of the longest that the others reach."""

DOUBT = 0.3
"""How far all estimates of a batch together may be off before anything was learned, as a share."""


class Backlog:
    """Tasks without a VM.

    Estimates are corrected by what was learned of their rule. The order within a rule does not depend
    on that, so that a correction costs nothing.
    """

    def __init__(self, walltimes: Walltimes) -> None:
        self._walltimes = walltimes
        self._rules: dict[str, list[tuple[float, int, Task]]] = {}
        self._count = 0
        self._size = 0
        self._needs: Counter[Need] = Counter()
        self._slots: int | None = None

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Task]:
        return (entry[2] for entries in self._rules.values() for entry in entries)

    @property
    def arrived(self) -> int:
        """How many tasks ever came."""
        return self._count

    def add(self, task: Task) -> None:
        self._count += 1
        self._size += 1
        self._needs[task.need] += 1
        self._slots = None
        estimate = estimate_of(task.planned)
        insort(self._rules.setdefault(task.rule, []), (estimate, -self._count, task))

    def take(self, task: Task) -> Task:
        """Removes `task`, and notes what it is expected to take."""
        estimate = estimate_of(task.planned)
        tasks = self._rules[task.rule]
        at = bisect_right(tasks, (estimate, math.inf)) - 1
        while tasks[at][2] is not task:
            at -= 1
        del tasks[at]
        self._size -= 1
        self._needs[task.need] -= 1
        self._slots = None
        if not tasks:
            del self._rules[task.rule]
        task.expected = self._walltimes.expected(task.rule, task.planned)
        return task

    def clear(self) -> list[Task]:
        tasks = list(self)
        self._rules.clear()
        self._needs.clear()
        self._slots = None
        self._size = 0
        return tasks

    def lengths(self) -> list[float]:
        """Seconds each task is expected to take, the longest first."""
        found: list[float] = []
        for rule, tasks in self._rules.items():
            line = self._line(rule)
            found += [line(estimate) for estimate, _, _ in tasks]
        return sorted(found, reverse=True)

    def surely(self, task: Task) -> float:
        """Seconds `task` all but surely does not exceed."""
        line = self._line(task.rule)
        return line(estimate_of(task.planned)) + SURELY * line.spread(estimate_of(task.planned))

    @property
    def most(self) -> float:
        """Seconds that all but surely no task exceeds."""
        return max((self.surely(tasks[-1][2]) for tasks in self._rules.values()), default=0.0)

    def side_by_side(self, kind: InstanceType) -> int:
        """How many of the tasks run on one VM at a time, on average."""
        if self._slots is None:
            counts = +self._needs
            if len(counts) > 1:
                self._slots = max(1, self._size // packed(kind, counts))
            else:
                self._slots = next((slots_of(kind, need) for need in counts), kind.cpus)
        return self._slots

    @property
    def doubt(self) -> float:
        """How much longer all of it may take than expected, as a share."""
        return DOUBT / math.sqrt(1 + self._walltimes.learned)

    @property
    def noise(self) -> float:
        """Seconds by which a single task may be late."""
        return SURELY * max((self._line(rule).noise for rule in self._rules), default=0.0)

    @property
    def path(self) -> float:
        """Seconds that the longest chain of successors of any task will take after it."""
        longest = 0.0
        for tasks in self._rules.values():
            for estimate, _, task in tasks:
                if task.rank is not None:
                    longest = max(longest, task.rank - estimate)
        return self._walltimes.foreseen("", longest)

    def longest(self, vm: VM, seconds: float = math.inf, surely: float = math.inf) -> Task | None:
        """The longest task that has room on `vm`, is expected to end within `seconds`, and all but
        surely within `surely`; of equal ones the first that came, and of about equal ones that take
        different things the one that fits best into what is free."""
        found, free = [], vm.free()
        for rule, tasks in self._rules.items():
            line = self._line(rule)
            task = _last_with_room(tasks, _within(tasks, line, seconds, surely), free)
            if task is not None:
                found.append((line(estimate_of(task.planned)), task))
        if not found:
            return None
        most, best = max(found, key=lambda entry: entry[0])
        if len(found) == 1 or all(task.need == best.need for _, task in found):
            return best
        alike = [task for length, task in found if length >= ALIKE * most]
        return min(alike, key=lambda task: misfit(vm.type, free, task.need))

    def _line(self, rule: str) -> Line:
        """Before anything is known of a rule its longest estimate tells how far they may be off."""
        known = self._walltimes.line(rule)
        return known or Line(noise=PRIOR_SPREAD * self._rules[rule][-1][0])


@dataclass(frozen=True)
class Announcement:
    """A task that may come; `planned` as in Task."""

    strategy: str
    rule: str
    need: Need
    planned: float | None
    spot: str = NEVER


class Future:
    """Tasks that were announced and have not come. A hint: checkpoints add to it, failures take from it."""

    def __init__(self, walltimes: Walltimes) -> None:
        self._walltimes = walltimes
        self._tasks: Counter[tuple[str, float | None, int]] = Counter()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def announce(self, task: Announcement) -> None:
        self._tasks[task.rule, task.planned, task.need.cpus] += 1
        self._size += 1

    def has_come(self, task: Task) -> None:
        key = (task.rule, task.planned, task.need.cpus)
        if key in self._tasks:
            self._size -= 1
            self._tasks[key] -= 1
            if not self._tasks[key]:
                del self._tasks[key]

    def lengths(self) -> list[float]:
        """Seconds each task will take."""
        found: list[float] = []
        for (rule, planned, _), count in self._tasks.items():
            found += [self._walltimes.foreseen(rule, planned)] * count
        return found

    @property
    def is_known(self) -> bool:
        """Whether any estimate has been seen to hold, or not."""
        return self._walltimes.learned > 0


@dataclass(frozen=True)
class Goal:
    """What the user asked for: the date by which all should be done, and what VMs may cost (billed
    seconds)."""

    deadline: float = math.inf
    budget: float = math.inf

    def allows(self, strategy: str) -> bool:
        """Whether what the strategy of this name lives by is given."""
        needed = {"deadline": self.deadline, "budget": self.budget}
        return needed.get(strategy, 0.0) < math.inf


@dataclass
class Pool:
    """`nodes` is how many machines each of its VMs stands for, as leader of a gang; where VMs are counted,
    leaders are. `touched` are the VMs on which something changed since they were last offered work,
    `is_stale` says that the plan as a whole must be made anew; `room` how many more VMs the cap allows,
    `lost` how many machines failed, and `is_starved` that fewer could be started than the plan wants.
    `boot_time(k)`: predicted boot (s) of the VM that would be requested after k others now. `spent`:
    billed seconds of all VMs of the run but its own. `is_pooled`: the strategy keeps its tasks here and
    asks every VM itself, so that the fleet's lists are not kept."""

    strategy: Strategy
    kind: InstanceType
    fleet: Fleet
    backlog: Backlog
    future: Future
    boot_time: Callable[[int], float]
    goal: Goal = Goal()
    spent: float = 0.0
    is_pooled: bool = False
    touched: dict[str, VM] = field(default_factory=dict)
    is_stale: bool = False
    is_starved: bool = False
    lost: int = 0
    room: int = 0
    nodes: int = 1
    market: str = ON_DEMAND

    def __iter__(self) -> Iterator[VM]:
        return iter(self.fleet)

    def takes_more(self, vm: VM) -> bool:
        """Whether `vm` has a CPU free, counting what is about to be handed over; or runs short tasks
        only, while there are many left for everybody."""
        if vm.state != VMState.READY:
            return False
        if vm.free_cpus > 0 or self._fills_bundles(vm):
            return True
        if vm.queue or len(self.backlog) < 2 * len(self.fleet):
            return False
        return vm.takes_ahead() and all(task.walltime <= SHORT for task in vm.active.values())

    def _fills_bundles(self, vm: VM) -> bool:
        """Whether what is planned for `vm` goes into bundles that more tasks still fit into."""
        if not vm.queue or not may_bundle(vm.queue[-1]):
            return False
        seconds = sum(task.walltime for task in vm.queue)
        worth = math.ceil(self.slots * WORTH / max(1.0, vm.queue[-1].walltime))
        share = fair_share(len(self.backlog) + len(vm.queue), len(self.fleet), worth)
        return len(vm.queue) < share and seconds < LENGTH * self.slots

    @property
    def slots(self) -> int:
        """How many tasks a VM runs side by side."""
        return 1 if self.kind.cpus == 1 else self.backlog.side_by_side(self.kind)

    @property
    def money_left(self) -> float:
        """Billed seconds that the budget leaves for the VMs there are and will be, those of companions
        not counted."""
        return (self.goal.budget - self.spent) / self.nodes

    @property
    def runs(self) -> bool:
        """Whether any of its VMs has something to do."""
        return any(not vm.is_unused for vm in self.fleet)


def _within(tasks: list[tuple[float, int, Task]], line: Line, seconds: float, surely: float) -> int:
    """How many of the shortest tasks end in time."""
    if seconds == math.inf:
        return len(tasks)

    def lateness(entry: tuple[float, int, Task]) -> float:
        length = line(entry[0])
        return max(length - seconds, length + SURELY * line.spread(entry[0]) - surely)

    if lateness(tasks[-1]) <= 0:
        return len(tasks)
    return bisect_right(tasks, 0.0, key=lateness)


def _last_with_room(tasks: list[tuple[float, int, Task]], count: int, free: Need) -> Task | None:
    """The longest of the first `count` that fits into `free`; behind a running task any will, later."""
    for at in range(count - 1, -1, -1):
        need = tasks[at][2].need
        if free.cpus <= 0 or has_room(free, need):
            return tasks[at][2]
    return None
