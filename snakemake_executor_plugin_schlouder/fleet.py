"""The fleet of one pool, as strategies see and ask it. Pure data; the time is told.

An idle date either stands (`firm`: what runs is within its prediction) or moves with the clock
(`floating`: the VM is idle, or what runs is overdue). Sorted lists of both answer the rules' questions
without a look at every VM.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from .model import VM, Billing, Task

_Key = tuple[float, int]
_EDGE = 1e-6


@dataclass
class _Entry:
    """Where a VM stands in the lists; `number` counts the requests."""

    vm: VM
    number: int
    firm: bool = False
    date: float = 0.0
    phase: float = 0.0
    version: int = 0


@dataclass
class Fleet:
    """The open VMs of a pool, in the order of their request.

    `boot_time` is the predicted boot (s) of a VM that would be requested now; `may_grow` whether one
    could be, or the cap is reached.
    """

    billing: Billing = field(default_factory=Billing)
    now: float = 0.0
    boot_time: float = 60.0
    may_grow: bool = True
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _numbers: int = 0
    _firm: list[_Key] = field(default_factory=list)
    _floating: list[_Key] = field(default_factory=list)
    _phases: list[_Key] = field(default_factory=list)
    _overdue: list[tuple[float, int, int]] = field(default_factory=list)
    _by_number: dict[int, _Entry] = field(default_factory=dict)
    _quantum: float = 0.0

    # -- what the broker tells

    def look(self, now: float, boot_time: float, may_grow: bool) -> None:
        """Brings the fleet to a moment."""
        self.now, self.boot_time, self.may_grow = now, boot_time, may_grow
        while self._overdue and self._overdue[0][0] < now:
            _, number, version = heapq.heappop(self._overdue)
            entry = self._by_number.get(number)
            if entry is not None and entry.version == version:
                self._take_out(entry)
                self._put_in(entry)
        quantum = self.billing.quantum(boot_time)
        if quantum != self._quantum:
            self._quantum = quantum
            self._refill_phases()

    def add(self, vm: VM) -> None:
        entry = _Entry(vm, self._numbers)
        self._numbers += 1
        self._entries[vm.name] = self._by_number[entry.number] = entry
        self._put_in(entry)

    def remove(self, vm: VM) -> None:
        entry = self._entries.pop(vm.name)
        del self._by_number[entry.number]
        self._take_out(entry)

    def update(self, vm: VM) -> None:
        """The plan of `vm` has changed."""
        entry = self._entries.get(vm.name)
        if entry is not None:
            self._take_out(entry)
            self._put_in(entry)

    # -- what strategies ask

    def __iter__(self) -> Iterator[VM]:
        return (entry.vm for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, vm: object) -> bool:
        entry = self._entries.get(getattr(vm, "name", ""))
        return entry is not None and entry.vm is vm

    def first(self) -> VM | None:
        return next(iter(self), None)

    def named(self, name: str | None) -> VM | None:
        """The VM of this name, if it is here and still takes tasks."""
        entry = self._entries.get(name or "")
        return entry.vm if entry else None

    def idle_first(self) -> VM | None:
        """The VM that is predicted to be idle before the others."""
        heads = [self._by_number[keys[0][1]] for keys in (self._floating, self._firm) if keys]
        best = min(heads, key=lambda e: (e.vm.idle_at(self.now), e.number), default=None)
        return best.vm if best else None

    def idle_before(self, date: float) -> list[VM]:
        """The VMs that are idle now, or predicted to be before `date`, in the order of their request."""
        floating = bisect_left(self._floating, (date - self.now, -1))
        firm = bisect_left(self._firm, (date, -1))
        numbers = [n for _, n in self._floating[:floating]] + [n for _, n in self._firm[:firm]]
        return [self._by_number[number].vm for number in sorted(numbers)]

    def idle_at(self, vm: VM) -> float:
        """Predicted idle date of `vm`."""
        return vm.idle_at(self.now)

    def paid_left(self, vm: VM, task: Task | None = None) -> float:
        """R(v): seconds left of the quanta `vm` has begun once it is idle; R(v,t) with `task` added."""
        return self.billing.left_of_quantum(self._until_idle(vm, task), self._quantum)

    def fits(self, vm: VM, task: Task) -> bool:
        """Whether `task` ends within the quanta `vm` has begun, margin included.

        The rule R(v,t) <= R(v) as it is written also holds for tasks of a quantum or more, which begin
        quanta of their own; recorded tasks are shorter.
        """
        return vm.share(task) <= self.paid_left(vm) + _EDGE

    def exceeds(self, vm: VM, task: Task) -> bool:
        """Whether `task` would end after the first quantum of `vm`, margin included."""
        return self.billing.exceeds(self._until_idle(vm, task), self._quantum)

    def tightest(self, task: Task) -> VM | None:
        """Of the VMs in whose begun quanta `task` fits, the one with the least time left after it."""
        candidates = [self._by_number[number].vm for _, number in self._floating]
        candidates += self._tightest_firm(task)
        fitting = [vm for vm in candidates if self.fits(vm, task)]
        return min(fitting, key=lambda vm: self.paid_left(vm, task), default=None)

    def _until_idle(self, vm: VM, task: Task | None) -> float:
        """Seconds from the request of `vm` to its idle date, with `task` added."""
        until_idle = self.idle_at(vm) - vm.requested
        return until_idle if task is None else until_idle + vm.share(task)

    # -- the lists

    def _tightest_firm(self, task: Task) -> list[VM]:
        """R(v,t) is least where R(v) is least among those that are at least as long as the task."""
        if not self._phases:
            return []
        kind = self._by_number[self._phases[0][1]].vm
        at = bisect_left(self._phases, (kind.share(task) - _EDGE, -1))
        return [self._by_number[number].vm for _, number in self._phases[at : at + 2]]

    def _put_in(self, entry: _Entry) -> None:
        vm = entry.vm
        entry.version += 1
        due = vm.free_at - vm.unstarted
        entry.firm = due >= self.now
        if not entry.firm:
            entry.date = vm.unstarted
            insort(self._floating, (entry.date, entry.number))
            return
        entry.date = vm.free_at
        insort(self._firm, (entry.date, entry.number))
        self._put_phase(entry)
        heapq.heappush(self._overdue, (due, entry.number, entry.version))

    def _put_phase(self, entry: _Entry) -> None:
        if self._quantum:
            until_idle = entry.date - entry.vm.requested
            entry.phase = self.billing.left_of_quantum(until_idle, self._quantum)
            insort(self._phases, (entry.phase, entry.number))

    def _take_out(self, entry: _Entry) -> None:
        keys = self._firm if entry.firm else self._floating
        _drop(keys, (entry.date, entry.number))
        if entry.firm and self._quantum:
            _drop(self._phases, (entry.phase, entry.number))

    def _refill_phases(self) -> None:
        self._phases.clear()
        for entry in self._entries.values():
            if entry.firm:
                self._put_phase(entry)


def _drop(keys: list[_Key], key: _Key) -> None:
    del keys[bisect_right(keys, key) - 1]
