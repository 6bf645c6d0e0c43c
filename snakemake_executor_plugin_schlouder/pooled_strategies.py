"""Strategies that keep their tasks until a VM has room, so that nothing is final before it runs."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

from .fleet import Fleet
from .layout import LARGE, Batch, Layout, Seat
from .model import VM, Task
from .pool import Pool

_PATIENCE = 0.04
"""Share of the time that the longest chain of successors takes by which the tasks before it may end later
for want of a VM: tasks that are a small part of what is left are not worth a VM each."""

_CARE = 5.0
"""How many times the doubt about estimates a deadline is kept clear of: it cannot be bought back."""

_HALVINGS = 8

_CROWD = 250
"""Of so many tasks and VMs together one task must have gone before VMs that found nothing have the rest
laid out anew: of a thousand VMs one finds nothing all the time."""

_TRUST = 0.5
"""How many times the doubt about estimates a budget is kept clear of: waiting for certainty costs time."""

_RESERVE = 0.02
"""Share of a budget that plans leave alone."""

_SLOWER = 1.2
"""How much longer than with all VMs going on a run of `cheapest` may take whose estimates were too low."""

_EXTENSIONS = 20
"""Quanta by which a plan of `cheapest` may be prolonged before it takes whatever VMs it can get."""


class Pooled:
    """A strategy that keeps its tasks until a VM has room, so that nothing is final before it runs.

    It lays the rest of the batch out on the VMs there are and could be (`layout.py`), anew whenever
    tasks have come or a good part of them has gone, with the estimates corrected by what was learned.
    """

    name: ClassVar[str] = ""
    reuses_vms: ClassVar[bool] = True
    one_type: ClassVar[bool] = False
    counts_on: ClassVar[int] = 0
    """Of the tasks that were announced and have not come, every how many-th is planned for; 0: none."""

    def __init__(self) -> None:
        self._stops: dict[str, float] = {}
        self._unnamed: list[float] = []
        self._planned_for = 0
        self._refused: set[tuple[str, float]] = set()
        self._has_refused = False
        self._is_waiting = False
        self._overdue = math.inf

    @abstractmethod
    def lay_out(self, batch: Batch, pool: Pool) -> Layout:
        """The plan for what is left of the batch."""

    def choose(self, task: Task, fleet: Fleet) -> VM | None:
        raise NotImplementedError("its tasks are picked when a VM has room")

    def missing(self, pool: Pool) -> int:
        """How many VMs are to be started now."""
        if not (pool.is_stale or self._is_outdated(pool) or self.looks_again() <= pool.fleet.now):
            return 0
        batch = _batch(pool, self.counts_on)
        layout = self.lay_out(batch, pool)
        self._stops = {seat.name: batch.paid_until(seat, layout) for seat in batch.seats}
        self._unnamed = [batch.paid_until(seat, layout) for seat in batch.offers[: layout.new]]
        self._planned_for = len(pool.backlog)
        self._has_refused = self._is_waiting = False
        ends = [pool.fleet.idle_at(vm) for vm in pool if not vm.is_unused]
        self._overdue = min(ends, default=math.inf) + max(1.0, pool.backlog.noise)
        pool.is_stale = True
        return layout.new

    def looks_again(self) -> float:
        """The date at which the plan is to be made anew although nothing has happened: what VMs without
        work leave to a busy one would begin later than planned."""
        return self._overdue if self._is_waiting else math.inf

    def pick(self, vm: VM, pool: Pool) -> Task | None:
        """What `vm`, which has room, is to run next: the longest task that ends before its stop."""
        if vm.name not in self._stops:
            self._stops[vm.name] = self._unnamed.pop(0) if self._unnamed else math.inf
        begin = pool.fleet.now if vm.free_cpus > 0 else pool.fleet.idle_at(vm)
        stop = self._stops[vm.name]
        room = stop - begin
        task = pool.backlog.longest(vm, room, room + pool.fleet.billing.margin)
        if task is None:
            task = self._too_long_for_slack(vm, room, pool)
        if task is None and (vm.name, stop) not in self._refused:
            self._refused.add((vm.name, stop))
            self._has_refused = True
        self._is_waiting |= task is None and vm.is_unused
        return task

    def _too_long_for_slack(self, vm: VM, room: float, pool: Pool) -> Task | None:
        """A task that would not fit with slack into any paid unit runs where it is expected to fit."""
        billing, boot_time = pool.fleet.billing, pool.fleet.boot_time
        whole = billing.unit - boot_time - billing.margin
        if pool.backlog.most <= whole:
            return None
        task = pool.backlog.longest(vm, room)
        return task if task is not None and pool.backlog.surely(task) > whole else None

    def _is_outdated(self, pool: Pool) -> bool:
        """A tenth of the batch has gone, or a VM came to its stop; of a large batch, whose sums are firm
        and whose layout is long to find, a third, or with a stop a fifth."""
        is_large = self._planned_for >= LARGE
        gone = self._planned_for - len(pool.backlog)
        if self._has_refused and not is_large:
            return gone >= (self._planned_for + len(pool.fleet)) // _CROWD
        part = (5 if self._has_refused else 3) if is_large else 10
        return gone >= max(1, self._planned_for // part)


class Cheapest(Pooled):
    """Least cost among the plans that are not slower than afap, which end when VMs filled up to their
    quanta would be done (`Batch.filled`). Further VMs are started only when tasks have come, machines
    were lost, or the cap leaves more room than before; where tasks take longer than they should, the
    VMs there are go on."""

    name: ClassVar[str] = "cheapest"
    counts_on: ClassVar[int] = 2
    """Too few VMs only cost time, and can still be added; too many cost money."""

    def __init__(self) -> None:
        super().__init__()
        self._by = 0.0
        self._begun = math.inf
        self._known = 0
        self._could = 0
        self._lost = 0

    def lay_out(self, batch: Batch, pool: Pool) -> Layout:
        could = pool.room + len(batch.seats)
        if could > self._could:
            self._by = 0.0
        has_more = pool.backlog.arrived > self._known or could > self._could
        if has_more or pool.lost > self._lost:
            self._known, self._could, self._lost = pool.backlog.arrived, could, pool.lost
            self._begun = min(self._begun, batch.now)
            self._by = max(self._by, _with_all(batch, pool).filled())
        elif batch.seats:
            batch = replace(batch, offers=())
        layout = batch.cheapest(self._by)
        return layout if layout.fits else self._prolonged(batch)

    def _prolonged(self, batch: Batch) -> Layout:
        """The work has turned out to be more than fits: not much slower than with all VMs going on."""
        by = self._begun + _SLOWER * (batch.soonest() - self._begun)
        for more in range(_EXTENSIONS):
            layout = batch.cheapest(by + more * batch.billing.quantum(batch.boot_time))
            if layout.fits:
                return layout
        return batch.fastest()


class Fastest(Pooled):
    """Least makespan, then least cost: a VM that would not end the workflow noticeably earlier is not
    started."""

    name: ClassVar[str] = "fastest"

    def lay_out(self, batch: Batch, pool: Pool) -> Layout:
        fastest = batch.fastest(_PATIENCE * pool.backlog.path)
        layout = batch.cheapest(fastest.finish)
        return layout if layout.fits else fastest


class Deadline(Pooled):
    """The cheapest plan that ends by the deadline, with room for estimates that are too low; without
    such a plan the fastest."""

    name: ClassVar[str] = "deadline"
    counts_on: ClassVar[int] = 1

    def lay_out(self, batch: Batch, pool: Pool) -> Layout:
        careful = batch.stretched(1 + _CARE * pool.backlog.doubt)
        by = pool.goal.deadline - pool.backlog.noise - pool.backlog.path
        layout = careful.cheapest(by)
        return layout if layout.fits else batch.fastest()


class Budget(Pooled):
    """The fastest plan that costs no more than the budget, with room for estimates that are too low.
    Without such a plan no VM is added: what is learned while one works may show that there is room."""

    name: ClassVar[str] = "budget"
    counts_on: ClassVar[int] = 1

    def lay_out(self, batch: Batch, pool: Pool) -> Layout:
        careful = batch.stretched(1 + _TRUST * pool.backlog.doubt)
        patience = _PATIENCE * pool.backlog.path
        soon, late = careful.fastest(patience).finish, batch.now + 2 * careful.alone
        best = careful.cheapest(soon)
        if self._is_affordable(best, pool):
            return best
        best = replace(careful, offers=careful.offers[: 0 if careful.seats else 1]).cheapest(late)
        for _ in range(_HALVINGS if self._is_affordable(best, pool) else 0):
            middle = (soon + late) / 2
            layout = careful.cheapest(middle)
            if self._is_affordable(layout, pool):
                best, late = layout, middle
            else:
                soon = middle
        return best

    def _is_affordable(self, layout: Layout, pool: Pool) -> bool:
        """With something kept in reserve, for a task that is late by seconds may begin a unit."""
        reserve = pool.fleet.billing.unit + _RESERVE * pool.goal.budget
        return layout.fits and layout.cost + reserve <= pool.money_left


def _with_all(batch: Batch, pool: Pool) -> Batch:
    """With all that is announced, where VMs are filled up to a planning quantum; long units are bought
    one by one, when the tasks are there."""
    if batch.has_long_units:
        return batch
    lengths = [*batch.lengths, *pool.future.lengths()]
    return replace(batch, lengths=lengths, width=len(lengths))


def _batch(pool: Pool, counts_on: int) -> Batch:
    """The pool's backlog and VMs, and as many further VMs as the cap leaves and ready tasks can use."""
    fleet = pool.fleet
    slots = pool.slots
    seats = [Seat(vm.name, vm.frees(slots, fleet.now), vm.billed_from) for vm in fleet]
    announced = len(pool.backlog) + len(pool.future)
    offers = [
        Seat(f"new {number}", (fleet.now + pool.boot_time(number),) * slots, fleet.now, True)
        for number in range(min(pool.room, announced))
    ]
    lengths = pool.backlog.lengths()
    if counts_on == 1 or (counts_on and pool.future.is_known):
        future = sorted(pool.future.lengths())
        lengths = sorted([*lengths, *future[::counts_on]], reverse=True)
    return Batch(
        fleet.now,
        lengths,
        seats,
        offers,
        fleet.billing,
        fleet.boot_time,
        math.ceil(len(pool.backlog) / slots),
    )
