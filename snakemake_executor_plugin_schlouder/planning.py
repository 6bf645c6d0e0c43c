"""Which VM is to run which task, and when another VM is needed: the strategies are asked, the cap is kept.

Decides on data alone: no I/O, and the time is told. The broker acts on the `Plan`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from . import order, strategies
from .fleet import Fleet
from .market.offers import Demand, Offer, Offers
from .model import (
    NEVER,
    ON_DEMAND,
    ONLY,
    SPOT,
    VM,
    Billing,
    InstanceType,
    Need,
    Task,
    TaskState,
    VMState,
)
from .pool import Announcement, Backlog, Future, Goal, Pool
from .pooled_strategies import Pooled
from .prediction import BootPredictor, Walltimes

_SIZES_SHOWN = 6
"""Most types whose sizes a message tells."""


@dataclass
class Plan:
    """What became of the tasks that waited: `assigned` to a VM, `left` for later, or `failed` with a
    reason. `started` are VMs that are to be requested, `broken` a strategy's error that ends the run."""

    assigned: list[Task] = field(default_factory=list)
    left: list[Task] = field(default_factory=list)
    failed: list[tuple[Task, str]] = field(default_factory=list)
    started: list[VM] = field(default_factory=list)
    broken: str = ""


class Wanted(NamedTuple):
    """A machine that tasks of a strategy look for: the name of its type, and its market."""

    strategy: str
    type: str
    market: str


class Planner:
    """Keeps the pools of a run: per strategy, offer and gang width the VMs, and what waits for them.

    `new_vm` makes a VM of a strategy and an offer with the given predicted boot time. `order` is that of
    the waiting tasks, where their strategy has none of its own.
    """

    def __init__(
        self,
        offers: Offers,
        billing: Billing,
        boots: BootPredictor,
        walltimes: Walltimes,
        new_vm: Callable[[str, Offer, float], VM],
        goal: Goal,
        sharing: bool = True,
        order: str = order.SUBMISSION,
    ) -> None:
        self._offers = offers
        self._billing = billing
        self._boots = boots
        self._walltimes = walltimes
        self._new_vm = new_vm
        self._goal = goal
        self._sharing = sharing
        self._order = order
        self._checked: dict[str, strategies.Strategy] = {}
        self._expected: dict[str, set[Need]] = {}
        self._counts: Counter[tuple[str, Need, str]] = Counter()
        self._futures: dict[str, Future] = {}
        self._pools: dict[tuple[str, str, str, int], Pool] = {}
        self._pool_of: dict[str, Pool] = {}
        self._booting: set[str] = set()
        self._adopted: dict[str, VM] = {}
        self._left = 0
        self._opens = math.inf
        self._spent = 0.0

    # -- what the broker tells

    def expect(self, tasks: Iterable[Announcement]) -> None:
        """Announces tasks that may come."""
        for task in tasks:
            self._expected.setdefault(task.strategy, set()).add(task.need)
            self._counts[task.strategy, task.need, task.spot] += 1
            self._future_of(task.strategy).announce(task)

    def _future_of(self, strategy: str) -> Future:
        return self._futures.setdefault(strategy, Future(self._walltimes))

    def has_come(self, task: Task) -> None:
        """A task was handed over for the first time."""
        self._future_of(task.strategy).has_come(task)

    def adopt(self, vm: VM) -> None:
        """A VM that another process began: it is used before another of its pool is started."""
        if not vm.is_open:
            self._spend(vm, vm.ended or vm.requested)
            return
        pool = self._pool_of_offer(vm.strategy, Offer(vm.type, vm.market, vm.price), vm.nodes)
        self._pool_of[vm.name] = pool
        if vm.is_unused:
            self._adopted[vm.name] = vm
        if vm.is_booting:
            self._booting.add(vm.name)
        pool.fleet.add(vm)
        self.changed(vm)

    def changed(self, vm: VM) -> None:
        """What `vm` does, or is to do, has changed."""
        pool = self._pool_of.get(vm.name)
        if pool is not None and pool.is_pooled:
            if pool.takes_more(vm):
                pool.touched[vm.name] = vm
        elif pool is not None:
            pool.fleet.update(vm)
        if not vm.is_booting:
            self._booting.discard(vm.name)

    def closed(self, vm: VM, now: float) -> None:
        """`vm` takes no more tasks."""
        self._adopted.pop(vm.name, None)
        pool = self._pool_of.pop(vm.name, None)
        if pool is not None:
            pool.fleet.remove(vm)
            self._spend(vm, now)
            pool.touched.pop(vm.name, None)
            pool.lost += bool(vm.reason)
            pool.is_stale = True
        self._booting.discard(vm.name)

    def _spend(self, vm: VM, now: float) -> None:
        self._spent += self._billed(vm, now) if vm.instance_id else 0.0

    def take_backlog(self) -> list[Task]:
        """Gives out every task that has no VM yet, for good."""
        return [task for pool in self._pools.values() for task in pool.backlog.clear()]

    # -- what the broker asks

    def strategy(self, name: str) -> strategies.Strategy:
        """The strategy of this name, for its properties."""
        if name not in self._checked:
            self._checked[name] = strategies.make(name)
        return self._checked[name]

    @property
    def is_starved(self) -> bool:
        """Whether tasks find no VM because others have taken the room."""
        return self._left > 0 or any(pool.is_starved for pool in self._pools.values())

    @property
    def has_idle_for_nothing(self) -> bool:
        """Whether idle VMs wait for tasks that will not come: all that were announced are here, and
        units are too short to wait for the end of one."""
        return self._billing.unit <= self._boot_time() and not any(self._futures.values())

    def looks_for(self, now: float) -> Counter[Wanted]:
        """The machines that the announced tasks will look for, and of each kind how many could be used: one
        for each task, or a single one where all tasks of a strategy go to one machine after the other."""
        found: Counter[Wanted] = Counter()
        for (name, need, spot), count in self._counts.items():
            offer = self._offer(name, need, spot, now) if need.nodes == 1 else None
            if offer is not None:
                wanted = Wanted(name, offer.kind.name, offer.market)
                found[wanted] = 1 if self.strategy(name).one_type else found[wanted] + count
        return found

    def next_look(self) -> float:
        """When the passing of time alone makes a plan void; infinite: never."""
        pools = [pool for pool in self._pools.values() if pool.is_pooled and pool.backlog]
        looks = min((_pooled(pool).looks_again() for pool in pools), default=math.inf)
        return min(looks, self._opens) if self._left or self.is_starved else looks

    def needs(self, vm: VM) -> bool:
        """Whether a VM that is not up yet is worth waiting for."""
        pool = self._pool_of.get(vm.name)
        if vm.name in self._adopted and any(self._futures.values()):
            return True
        return not vm.is_unused or (pool is not None and len(pool.backlog) > 0)

    def may_keep(self, vm: VM) -> bool:
        """Whether an idle VM can still be of use to its own pool, and stands in no other's way."""
        pool = self._pool_of[vm.name]
        if not pool.strategy.reuses_vms or self._left > 0:
            return False
        return not any(other.is_starved for other in self._pools.values() if other is not pool)

    def retires_in(self, vm: VM, now: float) -> float:
        """Seconds until an idle VM should go; with units shorter than a boot at once when nothing is
        left that could use it."""
        idle_for = now - (vm.idle_since if vm.idle_since is not None else now)
        pool = self._pool_of.get(vm.name)
        if self.has_idle_for_nothing and (pool is None or not pool.backlog):
            return self._billing.minimum - vm.uptime(now)
        return self._billing.retires_in(vm.uptime(now), idle_for, self._boot_time())

    def place(
        self, waiting: Sequence[Task], now: float, room: int, refusal: str, alive: int
    ) -> Plan:
        """Gives every waiting task to a VM, as its strategy says. `room`: how many VMs may be started;
        `refusal`: why none can be, if that is for good; `alive`: how many there are, those that leave
        included: their ends may make room within a quota."""
        round_ = _Round(now, room, refusal, alive)
        waiting = [*self._withdrawn(now), *waiting]
        for task in waiting:
            task.need = task.asked or task.need
        for task in self._in_order(waiting, now):
            pool = self._pool_for(task, round_)
            if pool is None:
                self._refuse(task, round_)
                continue
            if not self._sharing:
                kind = pool.kind
                task.asked = task.need
                task.need = replace(task.need, cpus=kind.cpus, memory=kind.node_memory)
            if pool.is_pooled:
                self._keep(task, pool)
            else:
                self._place(task, pool, round_)
        for pool in self._pools.values():
            if pool.is_pooled:
                self._arrange_safely(pool, round_)
        self._left = len(round_.plan.left)
        self._opens = self._offers.next_opening(now)
        return round_.plan

    # -- what is to be had

    def _withdrawn(self, now: float) -> list[Task]:
        """Tasks that wait for VMs of an offer which is not to be had any more, and can have another."""
        found: list[Task] = []
        for pool in self._pools.values():
            if pool.backlog and not self._is_open(pool, now):
                movable = [task for task in pool.backlog if self._offer_for(task, now)]
                found += [pool.backlog.take(task) for task in movable]
        return found

    def _is_open(self, pool: Pool, now: float) -> bool:
        return bool(self._offers.zones(pool.kind, pool.market, now))

    def _refuse(self, task: Task, round_: _Round) -> None:
        """No machine for `task`: none can ever hold it, or there are none now."""
        plan = round_.plan
        if self._offers.fits_none(task.need):
            reason = too_big(f"rule {task.rule}", task.need, self._offers.allowed(task.need))
            plan.failed.append((task, reason))
        elif refusal := self._refusal_of(task, round_):
            plan.failed.append((task, f"no VM can be started: {refusal}"))
        else:
            plan.left.append(task)

    def _refusal_of(self, task: Task, round_: _Round) -> str:
        """Why there will be no VM for `task`; empty: there may be one."""
        if round_.refusal or round_.alive:
            return round_.refusal
        return self._offers.quota_of(task.need, task.spot)

    # -- the order of the tasks

    def _in_order(self, waiting: Sequence[Task], now: float) -> Sequence[Task]:
        """The tasks of every pool in its strategy's order; the turns of the pools stay."""
        if len(waiting) < 2:
            return waiting
        names = {task.strategy for task in waiting}
        if all(self._order_of(name) == order.SUBMISSION for name in names):
            return waiting
        for task in waiting:
            self._expect(task)
        return order.in_turns(
            waiting,
            lambda task: (task.strategy, self._offer_for(task, now), task.need.nodes),
            lambda task: self._order_of(task.strategy),
        )

    def _order_of(self, name: str) -> str:
        """A strategy's own order, else the user's; pooled ones pick their tasks themselves."""
        strategy = self.strategy(name)
        if isinstance(strategy, Pooled):
            return order.SUBMISSION
        own: str | None = getattr(strategy, "order", None)
        return own or self._order

    def _expect(self, task: Task) -> None:
        """The user's word counts; where there is none, or only a limit, what was learned of the rule."""
        if task.planned is None or task.is_limit:
            task.expected = self._walltimes.expected(task.rule, task.planned)

    # -- strategies that choose a VM for each task

    def _place(self, task: Task, pool: Pool, round_: _Round) -> None:
        plan = round_.plan
        self._expect(task)
        self._look(pool, round_)
        try:
            vm = self._ask(task, pool)
        except Exception as error:
            plan.broken = f"strategy {task.strategy!r} failed: {error!r}"
            plan.failed.append((task, plan.broken))
            return
        vm = vm or self._take_adopted(pool)
        if vm is None and self._room_for(pool, round_) > 0:
            vm = self._start(pool, round_)
        vm = vm or pool.fleet.idle_first()
        if vm is not None:
            self._assign(task, vm, pool, round_)
        else:
            self._refuse(task, round_)

    def _room_for(self, pool: Pool, round_: _Round) -> int:
        """How many VMs of `pool` may be started, each with its companions."""
        return round_.room // pool.nodes if self._is_open(pool, round_.now) else 0

    def _take_adopted(self, pool: Pool) -> VM | None:
        """One that was begun before, and has nothing to do."""
        for name, vm in self._adopted.items():
            if self._pool_of[name] is pool and vm.is_unused:
                return self._adopted.pop(name)
        return None

    def _ask(self, task: Task, pool: Pool) -> VM | None:
        chosen = pool.strategy.choose(task, pool.fleet)
        if chosen is not None and chosen not in pool.fleet:
            raise ValueError(f"it chose {chosen!r}, which is no VM of its fleet")
        return chosen

    # -- strategies that keep the tasks until a VM has room

    def _keep(self, task: Task, pool: Pool) -> None:
        pool.backlog.add(task)
        pool.is_stale = True

    def _arrange_safely(self, pool: Pool, round_: _Round) -> None:
        try:
            self._arrange(pool, round_)
        except Exception as error:
            round_.plan.broken = f"strategy {pool.strategy.name!r} failed: {error!r}"

    def _arrange(self, pool: Pool, round_: _Round) -> None:
        """Starts the VMs the pool's plan wants, and gives tasks to those that have room."""
        if not pool.backlog:
            pool.is_starved = False
            self._help_others(pool, round_)
            pool.touched.clear()
            return
        looks_again = _pooled(pool).looks_again() <= round_.now
        if not (pool.is_stale or pool.touched or looks_again):
            return
        if not len(pool.fleet) and self._room_for(pool, round_) <= 0:
            self._give_up(pool, round_)
            return
        self._look(pool, round_)
        missing = _pooled(pool).missing(pool)
        if missing == 0 and not len(pool.fleet):
            missing = 1
        while missing > 0 and self._room_for(pool, round_) > 0:
            self._start(pool, round_)
            missing -= 1
        pool.is_starved = missing > 0
        self._feed(pool, round_)

    def _give_up(self, pool: Pool, round_: _Round) -> None:
        """There is no VM and none can be started: for good, or for now."""
        pool.is_starved = True
        if round_.alive and not round_.refusal:
            return
        for task in list(pool.backlog):
            if reason := self._refusal_of(task, round_):
                pool.backlog.take(task)
                round_.plan.failed.append((task, f"no VM can be started: {reason}"))

    def _help_others(self, pool: Pool, round_: _Round) -> None:
        """Idle VMs of a pool in which nothing waits take what others cannot start VMs for."""
        idle = [vm for vm in pool.touched.values() if vm.state == VMState.READY and vm.is_unused]
        for other in self._pools.values() if idle else ():
            if other.is_starved and other.backlog and _may_help(pool, other):
                for vm in idle:
                    task = other.backlog.longest(vm) if vm.is_unused else None
                    if task is not None and self._may_take(pool, task):
                        self._assign(other.backlog.take(task), vm, pool, round_)

    def _may_take(self, pool: Pool, task: Task) -> bool:
        """Whether the VMs of `pool` are of a kind, and of a market, for `task`."""
        return _may_use(task, pool.market) and self._offers.fits(pool.kind, task.need)

    def _feed(self, pool: Pool, round_: _Round) -> None:
        """Every VM with room is asked for; one that got nothing is asked for again when the plan or
        something on it has changed. Where nothing runs at all the plan is overruled."""
        takers = list(pool.fleet) if pool.is_stale else list(pool.touched.values())
        pool.is_stale = False
        pool.touched.clear()
        for vm in takers:
            while pool.backlog and pool.takes_more(vm):
                task = _pooled(pool).pick(vm, pool)
                if task is None:
                    break
                self._assign(pool.backlog.take(task), vm, pool, round_)
        idle = [vm for vm in takers if vm.state == VMState.READY and vm.is_unused]
        if idle and pool.backlog and not pool.runs:
            self._feed_by_force(idle, pool, round_)

    def _feed_by_force(self, idle: Sequence[VM], pool: Pool, round_: _Round) -> None:
        """Every idle VM gets the longest task, whatever the plan says of its stop."""
        for vm in idle:
            longest = pool.backlog.longest(vm)
            if longest is not None:
                self._assign(pool.backlog.take(longest), vm, pool, round_)

    # -- both

    def _look(self, pool: Pool, round_: _Round) -> None:
        pool.room = self._room_for(pool, round_)
        pool.fleet.look(round_.now, self._boot_time(), pool.room > 0)
        if self._goal.budget < math.inf:
            beside = self._spent + self._spent_beside(pool, round_.now)
            pool.spent = beside - sum(vm.billed_before(self._billing) for vm in pool.fleet)

    def _spent_beside(self, pool: Pool, now: float) -> float:
        """Billed seconds of the VMs of all other pools, so far."""
        others = (other for other in self._pools.values() if other is not pool)
        return sum(self._billed(vm, now) for other in others for vm in other)

    def _billed(self, vm: VM, now: float) -> float:
        """Billed seconds of `vm` and its companions."""
        return vm.billed(self._billing, now) * vm.nodes

    def _boot_time(self, after: int = 0) -> float:
        """Predicted seconds of a boot requested after so many others now."""
        return self._boots.predict(len(self._booting) + after)

    def _start(self, pool: Pool, round_: _Round) -> VM:
        offer = Offer(pool.kind, pool.market, self._offers.price(pool.kind, pool.market))
        vm = self._new_vm(pool.strategy.name, offer, pool.fleet.boot_time)
        vm.beside, vm.nodes = len(self._booting), pool.nodes
        self._booting.add(vm.name)
        self._pool_of[vm.name] = pool
        pool.fleet.add(vm)
        round_.plan.started.append(vm)
        round_.room -= pool.nodes
        self._look(pool, round_)
        return vm

    def _assign(self, task: Task, vm: VM, pool: Pool, round_: _Round) -> None:
        task.asked = task.asked or task.need
        task.need = task.need.on(vm.type)
        task.state, task.vm = TaskState.SCHEDULED, vm.name
        vm.plan(task, round_.now)
        if not pool.is_pooled:
            pool.fleet.update(vm)
        round_.plan.assigned.append(task)

    def _pool_for(self, task: Task, round_: _Round) -> Pool | None:
        offer = self._offer_for(task, round_.now)
        if offer is None or round_.refusal:
            return self._living_pool(task)
        return self._pool_of_offer(task.strategy, offer, task.need.nodes)

    def _living_pool(self, task: Task) -> Pool | None:
        """One with VMs that can take `task`, where none can be started for it."""
        for (name, _, _, nodes), pool in self._pools.items():
            same = name == task.strategy and nodes == task.need.nodes
            if same and len(pool.fleet) and self._may_take(pool, task):
                return pool
        return None

    def _pool_of_offer(self, name: str, offer: Offer, nodes: int) -> Pool:
        key = (name, offer.kind.name, offer.market, nodes)
        if key not in self._pools:
            fleet = Fleet(self._billing)
            backlog = Backlog(self._walltimes)
            strategy = strategies.make(name)
            future = self._future_of(name)
            self._pools[key] = Pool(
                strategy,
                offer.kind,
                fleet,
                backlog,
                future,
                self._boot_time,
                self._goal,
                is_pooled=isinstance(strategy, Pooled),
                nodes=nodes,
                market=offer.market,
            )
        return self._pools[key]

    def _offer_for(self, task: Task, now: float) -> Offer | None:
        """The cheapest one for tasks like this; for a one-type strategy, one for everything known to use
        it, else as if there were only this task. None: there is none now."""
        return self._offer(task.strategy, task.need, task.spot, now)

    def _offer(self, name: str, need: Need, spot: str, now: float) -> Offer | None:
        only = self._offers.only(need, spot)
        if only is not None:
            return only
        strategy = self.strategy(name)
        if strategy.one_type:
            needs = [need, *self._expected.get(name, set())]
            if offer := self._offers.choose_one(needs, spot, now):
                return offer
        count = self._counts[name, need, spot]
        alone = not (self._sharing and strategy.reuses_vms)
        return self._offers.choose(Demand(need, spot, max(1, count), alone), now)


@dataclass
class _Round:
    """What holds while the tasks of one round are placed."""

    now: float
    room: int
    refusal: str
    alive: int
    plan: Plan = field(default_factory=Plan)


def _may_use(task: Task, market: str) -> bool:
    return task.spot != (NEVER if market == SPOT else ONLY)


def _may_help(pool: Pool, other: Pool) -> bool:
    same = (pool.strategy.name, pool.nodes) == (other.strategy.name, other.nodes)
    return same and pool.market in (ON_DEMAND, other.market)


def _pooled(pool: Pool) -> Pooled:
    assert isinstance(pool.strategy, Pooled)
    return pool.strategy


def too_big(what: str, need: Need, types: Sequence[InstanceType]) -> str:
    """The message for a rule or task that none of the types that it may have can hold."""
    setting = "schlouder_instance_type" if need.types else "--schlouder-instance-types"
    known = dict.fromkeys(feature for kind in types for feature in kind.features)
    unknown = [feature for feature in need.features if feature not in known]
    if unknown:
        return (
            f"{what}: constraint: {need.constraint!r} names {', '.join(unknown)}, which no VM has as a "
            f"feature; allowed are {', '.join(known)}"
        )
    wanted = f"{need.cpus} cpus and {need.memory} MiB{_gpus(need.gpus, need.gpu_model)}"
    if need.nodes > 1:
        wanted += f" on each of {need.nodes} VMs"
    if need.constraint:
        wanted += f", with the features {need.constraint}"
    return (
        f"{what} needs {wanted}; the allowed instance types offer {_sizes(types)}. "
        f"{_advice(need, types)} with {setting}"
    )


def _advice(need: Need, types: Sequence[InstanceType]) -> str:
    if need.gpus and not any(kind.gpus for kind in types):
        return "None of them has a GPU: allow a type that has"
    if need.gpu_model and not any(kind.gpu_model == need.gpu_model for kind in types):
        return f"None of them has a GPU {need.gpu_model}: allow a type that has"
    return "Lower what it asks for, or allow a larger type"


def _sizes(types: Sequence[InstanceType]) -> str:
    """Of many types the largest ones."""
    shown = list(types)
    if len(types) > _SIZES_SHOWN:
        shown.sort(key=lambda kind: (kind.gpus, kind.cpus, kind.memory), reverse=True)
    sizes = [
        f"{kind.name} ({kind.cpus} cpus, {kind.node_memory} MiB{_gpus(kind.gpus, kind.gpu_model)})"
        for kind in shown[:_SIZES_SHOWN]
    ]
    smaller = len(types) - len(sizes)
    return ", ".join(sizes) + (f" and {smaller} smaller ones" if smaller else "")


def _gpus(count: int, model: str) -> str:
    return f", {count} GPU{'s' * (count > 1)} {model}".rstrip() if count else ""
