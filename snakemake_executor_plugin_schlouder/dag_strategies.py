"""Provisioning strategies for tasks that wait for each other: Frîncu, Genaud, Gossa 2013.

The published rules are static: the whole workflow is laid out before it runs, and VMs boot in no time.
Here a task is placed, for good, when it becomes ready. So the date at which a task could start is now;
when a VM ends its last task is predicted, boots included; and a rule sees of a level what has become
ready so far. At the cap on VMs a task that asks for a new one gets the VM idle first.

Words of the rules:

- parent VM: the one that ran the predecessor that ended last, while it is still there;
- used in a level: given a task of that level that has not ended;
- free: idle now, or predicted to be before a new VM could be up;
- exceed: a VM's life from its request, boot and margin included, grows longer than one planning
  quantum, which is the billing unit where that is long. The static rules count from the start of a
  VM's first task and leave out its waiting before the last one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

from .fleet import Fleet
from .model import TASK_ENDED, VM, Task
from .order import LEVEL, ONE_LONG_OF_LEVEL, RANK, SHORTEST_OF_LEVEL


class DagStrategy:
    """What the rules ask about predecessors and levels. Keeps every task it was asked for, because its
    VM and its end are known only later. `order`: the one in which its tasks are placed."""

    name: ClassVar[str] = ""
    reuses_vms: ClassVar[bool] = True
    one_type: ClassVar[bool] = False
    order: ClassVar[str] = RANK

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}
        self._latest: dict[tuple[str | None, int], Task] = {}
        self._longest: dict[int, Task] = {}
        self._asked: Task | None = None

    @abstractmethod
    def place(self, task: Task, fleet: Fleet) -> VM | None:
        """As `choose`."""

    def choose(self, task: Task, fleet: Fleet) -> VM | None:
        """Where the task before went is known only now: the broker has the last word."""
        if self._asked is not None:
            self._latest[self._asked.vm, self._asked.level] = self._asked
        self._asked = self._tasks[task.key] = task
        return self.place(task, fleet)

    def _parent(self, task: Task, fleet: Fleet) -> VM | None:
        before = [self._tasks[key] for key in task.after if key in self._tasks]
        last = max(before, key=lambda each: each.ended or 0.0, default=None)
        return fleet.named(last.vm) if last is not None else None

    def _unused_parent(self, task: Task, fleet: Fleet) -> VM | None:
        """The parent VM, if it is not used in the level."""
        parent = self._parent(task, fleet)
        return None if parent is None or self._is_used(parent, task.level) else parent

    def _is_used(self, vm: VM, level: int) -> bool:
        latest = self._latest.get((vm.name, level))
        return latest is not None and latest.state not in TASK_ENDED

    def _idle_by(self, date: float, level: int, fleet: Fleet) -> list[VM]:
        """The VMs predicted to be idle at `date`, and not used in `level`, in the order of their request."""
        after = math.nextafter(date, math.inf)
        return [vm for vm in fleet.idle_before(after) if not self._is_used(vm, level)]

    def _longest_beside(self, task: Task) -> Task | None:
        """The longest task of the level that is placed and has not ended; None if `task` is longer."""
        longest = self._longest.get(task.level, task)
        is_there = longest.vm is not None and longest.state not in TASK_ENDED
        if is_there and longest is not task and longest.walltime >= task.walltime:
            return longest
        self._longest[task.level] = task
        return None

    def _latest_start(self, task: Task, beside: Task, fleet: Fleet) -> float:
        """When `task` must begin to end no later than `beside`."""
        vm = fleet.named(beside.vm)
        if vm is None:
            return -math.inf
        end = fleet.idle_at(vm) if beside.started is None else beside.started + beside.walltime
        return end - vm.share(task)

    def _roomiest(self, task: Task, fleet: Fleet) -> VM | None:
        """The free VM, not used in the level, that does not exceed and has the longest lease left."""
        free = self._idle_by(fleet.now + fleet.boot_time, task.level, fleet)
        fitting = [vm for vm in free if not fleet.exceeds(vm, task)]
        return max(fitting, key=fleet.paid_left, default=None)


class StartParExceed(DagStrategy):
    """One VM for each entry task; every other task on its parent VM, whose rent is extended
    (StartParExceed). Order: upward rank.

    Online: a task whose parent VM has been given back gets a new one.
    """

    name: ClassVar[str] = "start-par-exceed"

    def place(self, task: Task, fleet: Fleet) -> VM | None:
        return self._parent(task, fleet)


class StartParNotExceed(DagStrategy):
    """As start-par-exceed, but a new VM if the parent VM would exceed (StartParNotExceed)."""

    name: ClassVar[str] = "start-par-not-exceed"

    def place(self, task: Task, fleet: Fleet) -> VM | None:
        parent = self._parent(task, fleet)
        return None if parent is None or fleet.exceeds(parent, task) else parent


class AllParExceed(DagStrategy):
    """Each parallel task of a level on a VM of its own: the parent VM if it is not used in this level;
    else a VM that would end the task no later than the level's longest one ends; else a new VM
    (AllParExceed). Order: levels, the longest task first.

    Online: for the longest task itself a free VM takes the second place. The static rule starts a new
    VM as late as it can still end with the longest task; here it starts at once.
    """

    name: ClassVar[str] = "all-par-exceed"
    order: ClassVar[str] = LEVEL

    def place(self, task: Task, fleet: Fleet) -> VM | None:
        start, longest = fleet.now + fleet.boot_time, self._longest_beside(task)
        if longest is not None:
            start = self._latest_start(task, longest, fleet)
        return self._unused_parent(task, fleet) or next(
            iter(self._idle_by(start, task.level, fleet)), None
        )


class AllParNotExceed(DagStrategy):
    """Each parallel task of a level on a VM of its own: the parent VM if it is not used in this level and
    would not exceed; else a free VM that would not, the longest lease left first; else a new VM
    (AllParNotExceed). Order: levels, the shortest task first."""

    name: ClassVar[str] = "all-par-not-exceed"
    order: ClassVar[str] = SHORTEST_OF_LEVEL

    def place(self, task: Task, fleet: Fleet) -> VM | None:
        parent = self._unused_parent(task, fleet)
        if parent is not None and not fleet.exceeds(parent, task):
            return parent
        return self._roomiest(task, fleet)


class AllPar1LnS(DagStrategy):
    """One long, n short: the longest task of a level alone on a VM; the shorter ones one after the other
    on VMs where they end no later than it does and do not exceed; else on a free VM that would not
    exceed; else on a new one (AllPar1LnS). Order: levels, the shortest task first.

    Online: the longest task of those that became ready together is placed before the short ones, which
    are held against its predicted end. Of several VMs a short task goes to the one busy longest.
    """

    name: ClassVar[str] = "all-par-1lns"
    order: ClassVar[str] = ONE_LONG_OF_LEVEL

    def place(self, task: Task, fleet: Fleet) -> VM | None:
        longest = self._longest_beside(task)
        chain = None if longest is None else self._chain(task, longest, fleet)
        return chain or self._roomiest(task, fleet)

    def _chain(self, task: Task, longest: Task, fleet: Fleet) -> VM | None:
        start = math.nextafter(self._latest_start(task, longest, fleet), math.inf)
        fitting = [
            vm
            for vm in fleet.idle_before(start)
            if vm.name != longest.vm and not fleet.exceeds(vm, task)
        ]
        return max(fitting, key=fleet.idle_at, default=None)
