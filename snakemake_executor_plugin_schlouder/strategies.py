"""Provisioning strategies: which VM runs which task, and when a new VM is worth its price.

A strategy is a small class with one method, `choose`. It decides on data alone (no I/O, no clock),
so that the same object serves a live run and a simulation.
"""

from __future__ import annotations

import functools
import importlib
from typing import ClassVar, Protocol

from .dag_strategies import (
    AllPar1LnS,
    AllParExceed,
    AllParNotExceed,
    StartParExceed,
    StartParNotExceed,
)
from .fleet import Fleet
from .model import VM, SchlouderError, Task
from .order import is_known as is_known_order
from .pooled_strategies import Budget, Cheapest, Deadline, Fastest
from .printable import one_line, shown

ENTRY_POINTS = "schlouder.strategies"
"""The group under which packages offer strategies of their own."""


class Strategy(Protocol):
    """`name` is what users write. `reuses_vms`: whether an idle VM can still get work. `one_type`: whether
    all its tasks go to machines of one type, the first that fits every one of them. Where a strategy has
    an attribute `order` (`order.py`), its tasks are placed in that order, whatever the user has set."""

    name: ClassVar[str]
    reuses_vms: ClassVar[bool]
    one_type: ClassVar[bool]

    def choose(self, task: Task, fleet: Fleet) -> VM | None:
        """The VM of `fleet` that is to run `task`; None asks for a new one.

        At the cap on VMs the broker gives a task that asked for a new one to the VM idle first,
        which is the rule of every classic strategy. An assignment is final.
        """
        ...


class OneVMForAll:
    """The one VM; start it if there is none. Least cost, longest makespan (OneVM4All)."""

    name: ClassVar[str] = "one-vm-for-all"
    reuses_vms: ClassVar[bool] = True
    one_type: ClassVar[bool] = True

    def choose(self, task: Task, fleet: Fleet) -> VM | None:
        return fleet.first()


class OneVMPerJob:
    """Always a new VM. Least waiting, highest cost (OneVMperTask)."""

    name: ClassVar[str] = "one-vm-per-job"
    reuses_vms: ClassVar[bool] = False
    one_type: ClassVar[bool] = False

    def choose(self, task: Task, fleet: Fleet) -> VM | None:
        return None


class Asap:
    """As soon as possible: a VM that is idle before a new one could be up, of these the one with the
    least paid time left after the task; else a new one. Aims at the makespan."""

    name: ClassVar[str] = "asap"
    reuses_vms: ClassVar[bool] = True
    one_type: ClassVar[bool] = False

    def choose(self, task: Task, fleet: Fleet) -> VM | None:
        if not fleet.may_grow:
            return fleet.idle_first()
        ready = fleet.now + fleet.boot_time
        soon = fleet.idle_before(ready)
        return min(soon, key=lambda vm: fleet.paid_left(vm, task), default=None)


class Afap:
    """As full as possible: a VM in whose paid time the task still fits, of these the one it fits best;
    else a new one. Aims at the cost; best-fit bin packing on billing units."""

    name: ClassVar[str] = "afap"
    reuses_vms: ClassVar[bool] = True
    one_type: ClassVar[bool] = False

    def choose(self, task: Task, fleet: Fleet) -> VM | None:
        return fleet.tightest(task)


class FirstFit:
    """As afap, but the first VM in which the task fits."""

    name: ClassVar[str] = "first-fit"
    reuses_vms: ClassVar[bool] = True
    one_type: ClassVar[bool] = False

    def choose(self, task: Task, fleet: Fleet) -> VM | None:
        return next((vm for vm in fleet if fleet.fits(vm, task)), None)


class WorstFit:
    """As afap, but the VM that keeps most paid time."""

    name: ClassVar[str] = "worst-fit"
    reuses_vms: ClassVar[bool] = True
    one_type: ClassVar[bool] = False

    def choose(self, task: Task, fleet: Fleet) -> VM | None:
        fitting = [vm for vm in fleet if fleet.fits(vm, task)]
        return max(fitting, key=lambda vm: fleet.paid_left(vm, task), default=None)


_BUILT_IN: tuple[type[Strategy], ...] = (
    *(OneVMForAll, OneVMPerJob, Asap, Afap, FirstFit, WorstFit),
    *(Cheapest, Fastest, Deadline, Budget),
    *(StartParExceed, StartParNotExceed, AllParExceed, AllParNotExceed, AllPar1LnS),
)
_STRATEGIES = {cls.name: cls for cls in _BUILT_IN}


def known() -> list[str]:
    """The names of the built-in strategies."""
    return sorted(_STRATEGIES)


def make(name: str) -> Strategy:
    """The strategy a user named: a built-in one, `module:Class`, or the name of an entry point of the
    group `schlouder.strategies`. SchlouderError says what is wrong with the name."""
    found = _find(name)
    try:
        strategy = found()
    except Exception as error:
        raise SchlouderError(f"strategy: {shown(name)} cannot be made: {error!r}") from error
    missing = [part for part in _PARTS if not hasattr(strategy, part)]
    if missing:
        raise SchlouderError(
            f"strategy: {shown(name)} is no strategy; it lacks {', '.join(missing)}"
        )
    own_order = getattr(strategy, "order", None)
    if own_order is not None and not is_known_order(own_order):
        raise SchlouderError(f"strategy: {shown(name)} has an unknown order: {own_order!r}")
    return strategy


_LONGEST_REASON = 200
_PARTS = ("name", "reuses_vms", "one_type", "choose")


@functools.cache
def _find(name: str) -> type[Strategy]:
    """Looked up once: every job asks, and reading the entry points takes milliseconds."""
    return _STRATEGIES.get(name) or (_imported(name) if ":" in name else _entry_point(name))


def _imported(name: str) -> type[Strategy]:
    module, _, attribute = name.partition(":")
    try:
        found: type[Strategy] = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        why = one_line(str(error))[:_LONGEST_REASON]
        raise SchlouderError(f"strategy: {shown(name)} cannot be imported: {why}") from error
    if not isinstance(found, type):
        raise SchlouderError(f"strategy: {shown(name)} is no class")
    return found


def _entry_point(name: str) -> type[Strategy]:
    from importlib.metadata import entry_points

    points = entry_points(group=ENTRY_POINTS)
    if name not in points.names:
        names = ", ".join([*known(), *sorted(points.names)])
        raise SchlouderError(
            f"strategy: {shown(name)} is unknown; known are {names}; or give your own as module:Class"
        )
    try:
        found: type[Strategy] = points[name].load()
    except Exception as error:
        raise SchlouderError(f"strategy: {shown(name)} cannot be imported: {error!r}") from error
    return found
