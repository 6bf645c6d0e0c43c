"""The VMs of a run and what is to be done about which of them, so that a round costs what has changed
and not what there is."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

from .model import VM, VM_ENDED, VMState


class Machines:
    """All VMs by name, in the order of their request; and sets of them, kept by `move` and `note`.

    `idle` are ready and have nothing to do, each with the date at which it may have to go (not companions,
    which go with their leader).
    """

    def __init__(self) -> None:
        self._all: dict[str, VM] = {}
        self._in: dict[VMState, dict[str, VM]] = {state: {} for state in VMState}
        self._living: dict[str, VM] = {}
        self._feedable: dict[str, VM] = {}
        self.idle: dict[str, VM] = {}
        self._newly_idle: dict[str, VM] = {}
        self._retirements: list[tuple[float, str, float]] = []
        self._looks: dict[str, tuple[float, float]] = {}

    def __iter__(self) -> Iterator[VM]:
        return iter(list(self._all.values()))

    def __len__(self) -> int:
        return len(self._all)

    def get(self, name: str | None) -> VM | None:
        return self._all.get(name or "")

    def add(self, vm: VM) -> None:
        self._all[vm.name] = vm
        self._enter(vm)

    def move(self, vm: VM, state: VMState) -> None:
        """Gives `vm` another state."""
        self._in[vm.state].pop(vm.name, None)
        vm.state = state
        self._enter(vm)

    def _enter(self, vm: VM) -> None:
        self._in[vm.state][vm.name] = vm
        if vm.state in VM_ENDED:
            self._living.pop(vm.name, None)
        else:
            self._living[vm.name] = vm
        self.note(vm)

    def note(self, vm: VM) -> None:
        """What is planned for `vm` or runs there has changed."""
        ready = vm.state == VMState.READY
        if ready and vm.is_unused and vm.leader is None:
            if vm.name not in self.idle:
                self._newly_idle[vm.name] = vm
            self.idle[vm.name] = vm
        else:
            self.idle.pop(vm.name, None)
        if ready and vm.queue:
            self._feedable[vm.name] = vm
        if vm.is_settled:
            self._in[vm.state].pop(vm.name, None)

    @property
    def alive(self) -> int:
        """How many are ours and not gone, and count towards the cap."""
        return len(self._living)

    def living(self) -> list[VM]:
        """Those that are ours and not gone."""
        return list(self._living.values())

    def having(self, *states: VMState) -> list[VM]:
        """VMs in one of these states; of those gone, the ones that Slurm still has."""
        return [vm for state in states for vm in self._in[state].values()]

    def has(self, *states: VMState) -> bool:
        return any(self._in[state] for state in states)

    @property
    def unsettled(self) -> bool:
        return any(self._in.values())

    # -- VMs that can be given their next task

    def feedable(self) -> list[VM]:
        """Ready VMs that may have room for the head of their queue."""
        return list(self._feedable.values())

    def fed(self, vm: VM) -> None:
        """There is nothing to hand over to `vm` until something changes there."""
        self._feedable.pop(vm.name, None)

    # -- VMs that may have to go

    def newly_idle(self) -> list[VM]:
        """Takes the idle VMs that were not when this was asked last."""
        found = [
            vm
            for vm in self._newly_idle.values()
            if vm.idle_since is not None and vm.name in self.idle
        ]
        self._newly_idle.clear()
        return found

    def retire_at(self, vm: VM, date: float) -> None:
        """An idle VM is to be looked at again at `date`."""
        assert vm.idle_since is not None
        known = self._looks.get(vm.name)
        if known is not None and known[1] == vm.idle_since and math.isclose(known[0], date):
            return
        self._looks[vm.name] = (date, vm.idle_since)
        heapq.heappush(self._retirements, (date, vm.name, vm.idle_since))

    def next_retirement(self) -> float:
        """The earliest date of an idle VM; infinite: there is none."""
        while self._retirements:
            date, name, since = self._retirements[0]
            vm = self.idle.get(name)
            if vm is not None and vm.idle_since == since:
                return date
            heapq.heappop(self._retirements)
        return math.inf

    def due(self, now: float) -> list[VM]:
        """Takes the idle VMs whose date has come."""
        found = []
        while self.next_retirement() <= now:
            name = heapq.heappop(self._retirements)[1]
            self._looks.pop(name, None)
            found.append(self.idle[name])
        return found
