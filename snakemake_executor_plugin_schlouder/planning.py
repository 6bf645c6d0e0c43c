"""Which VM is to run which task, and when another VM is needed: the strategies are asked, the cap is kept.

Decides on data alone: no I/O, and the time is told. The broker acts on the `Plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from . import strategies
from .model import VM, Billing, Fleet, InstanceType, Need, Task, TaskState
from .prediction import BootPredictor


@dataclass
class Plan:
    """What became of the tasks that waited: `assigned` to a VM, `left` for later, or `failed` with a
    reason. `started` are VMs that are to be requested, `broken` a strategy's error that ends the run."""

    assigned: list[Task] = field(default_factory=list)
    left: list[Task] = field(default_factory=list)
    failed: list[tuple[Task, str]] = field(default_factory=list)
    started: list[VM] = field(default_factory=list)
    broken: str = ""


@dataclass
class _Round:
    """What holds while the tasks of one round are placed; VMs started in it count at once."""

    now: float
    room: int
    refusal: str
    booting: int
    plan: Plan = field(default_factory=Plan)
    pools: dict[tuple[str, str], list[VM]] = field(default_factory=dict)

    def pool(self, strategy: str, kind: InstanceType) -> list[VM]:
        return self.pools.setdefault((strategy, kind.name), [])

    def start(self, vm: VM) -> None:
        self.plan.started.append(vm)
        self.pool(vm.strategy, vm.type).append(vm)
        self.room -= 1
        self.booting += 1


class Planner:
    """Keeps the strategies of a run and what is known of the tasks to come.

    `new_vm` makes a VM of a strategy and a type with the given predicted boot time.
    """

    def __init__(
        self,
        types: Sequence[InstanceType],
        billing: Billing,
        boots: BootPredictor,
        new_vm: Callable[[str, InstanceType, float], VM],
    ) -> None:
        self._types = types
        self._billing = billing
        self._boots = boots
        self._new_vm = new_vm
        self._strategies: dict[str, strategies.Strategy] = {}
        self._expected: dict[str, list[Need]] = {}

    def expect(self, needs: Iterable[tuple[str, Need]]) -> None:
        """Announces tasks that may come, as (strategy, need)."""
        for strategy, need in needs:
            self._expected.setdefault(strategy, []).append(need)

    def strategy(self, name: str) -> strategies.Strategy:
        if name not in self._strategies:
            self._strategies[name] = strategies.make(name)
        return self._strategies[name]

    def retires_in(self, vm: VM, vms: Iterable[VM], now: float) -> float:
        """Seconds until an idle VM of `vms` should go."""
        idle_for = now - (vm.idle_since if vm.idle_since is not None else now)
        boot_time = self._boots.predict(sum(1 for other in vms if other.is_booting))
        return self._billing.retires_in(vm.uptime(now), idle_for, boot_time)

    def place(
        self, waiting: Sequence[Task], vms: Mapping[str, VM], now: float, room: int, refusal: str
    ) -> Plan:
        """Gives every waiting task to a VM, as its strategy says. `room`: how many VMs may be started;
        `refusal`: why none can be, if that is for good."""
        round_ = _Round(now, room, refusal, sum(1 for vm in vms.values() if vm.is_booting))
        for vm in vms.values():
            if vm.is_open:
                round_.pool(vm.strategy, vm.type).append(vm)
        for task in waiting:
            kind = self._type_for(task)
            if kind is None:
                reason = too_big(f"rule {task.rule}", task.need, self._types)
                round_.plan.failed.append((task, reason))
            else:
                self._place(task, kind, round_)
        return round_.plan

    def _place(self, task: Task, kind: InstanceType, round_: _Round) -> None:
        plan, pool = round_.plan, round_.pool(task.strategy, kind)
        boot_time = self._boots.predict(round_.booting)
        fleet = Fleet(pool, round_.now, boot_time, round_.room > 0, self._billing)
        try:
            vm = self._ask(task, fleet)
        except Exception as error:
            plan.broken = f"strategy {task.strategy!r} failed: {error!r}"
            plan.failed.append((task, plan.broken))
            return
        if vm is None and round_.room > 0:
            vm = self._new_vm(task.strategy, kind, boot_time)
            round_.start(vm)
        vm = vm or fleet.idle_first()
        if vm is not None:
            _assign(task, vm)
            plan.assigned.append(task)
        elif round_.refusal:
            plan.failed.append((task, f"no VM can be started: {round_.refusal}"))
        else:
            plan.left.append(task)

    def _ask(self, task: Task, fleet: Fleet) -> VM | None:
        chosen = self.strategy(task.strategy).choose(task, fleet)
        if chosen is not None and not any(chosen is vm for vm in fleet.vms):
            raise ValueError(f"it chose {chosen!r}, which is no VM of its fleet")
        return chosen

    def _type_for(self, task: Task) -> InstanceType | None:
        """The first allowed type that fits the task; for a one-type strategy, the first that fits
        everything known to use it, else as if there were only this task."""
        needs = [task.need]
        if self.strategy(task.strategy).one_type:
            needs += self._expected.get(task.strategy, [])
        for wanted in (needs, [task.need]):
            for kind in self._types:
                if all(kind.fits(need) for need in wanted):
                    return kind
        return None


def too_big(what: str, need: Need, types: Sequence[InstanceType]) -> str:
    """The message for a rule or task that no allowed type can hold."""
    offers = ", ".join(f"{kind.name} ({kind.cpus} cpus, {kind.node_memory} MiB)" for kind in types)
    return (
        f"{what} needs {need.cpus} cpus and {need.memory} MiB; the allowed instance types offer {offers}. "
        "Lower threads or mem_mb, or allow a larger type with --schlouder-instance-types"
    )


def _assign(task: Task, vm: VM) -> None:
    """A task that states no memory takes its CPUs' share of the machine's."""
    memory = task.need.memory or vm.type.node_memory * task.need.cpus // vm.type.cpus
    task.need = Need(task.need.cpus, memory)
    task.state, task.vm = TaskState.SCHEDULED, vm.name
    vm.queue.append(task)
