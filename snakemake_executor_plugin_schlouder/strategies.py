"""Provisioning strategies: which VM runs which task, and when a new VM is worth its price.

A strategy is a small class with one method, `choose`. It decides on data alone (no I/O, no clock),
so that the same object serves a live run and a simulation.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from .model import VM, Fleet, SchlouderError, Task


class Strategy(Protocol):
    """`name` is what users write. `reuses_vms`: whether an idle VM can still get work. `one_type`: whether
    all its tasks go to machines of one type, the first that fits every one of them."""

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


_STRATEGIES: dict[str, type[Strategy]] = {cls.name: cls for cls in (OneVMForAll, OneVMPerJob)}


def known() -> list[str]:
    """The names a user may write."""
    return sorted(_STRATEGIES)


def make(name: str) -> Strategy:
    """The strategy called `name`; SchlouderError lists the known ones if there is none."""
    try:
        return _STRATEGIES[name]()
    except KeyError:
        raise SchlouderError(
            f"strategy: {name!r} is unknown; known are {', '.join(known())}"
        ) from None
