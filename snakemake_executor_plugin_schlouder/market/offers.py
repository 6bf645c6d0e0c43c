"""The machines that may be started: what fits a task, what that costs, and what is to be had just now.

An offer is an instance type on a market; a pool of capacity is an offer in one zone. Decides on data alone:
no I/O, and the time is told.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..model import NEVER, ON_DEMAND, ONLY, PREFER, SPOT, InstanceType, Need, is_named
from .tariff import Tariff

_FIRST_PAUSE, _LONGEST_PAUSE = 180.0, 1800.0
"""Seconds a pool that had no capacity is left alone, at first and at most (Karpenter's cache; R14)."""


@dataclass(frozen=True)
class Offer:
    """`price`: USD an hour, None where nobody knows."""

    kind: InstanceType
    market: str = ON_DEMAND
    price: float | None = None


@dataclass(frozen=True)
class Demand:
    """`count` tasks alike. `alone`: each gets a VM of its own."""

    need: Need
    spot: str = NEVER
    count: int = 1
    alone: bool = False


@dataclass
class _Closed:
    """A pool that had no capacity, until a date; after that one machine is asked for as a probe."""

    until: float
    pause: float


class Offers:
    """`kinds` in the user's order of preference, which counts where prices are not known; `zones` in which
    each type can be had, by its name: one that is not named is had wherever the cloud likes. The `reserved`
    types are only for tasks that name them."""

    def __init__(
        self,
        kinds: Sequence[InstanceType],
        tariff: Tariff | None = None,
        zones: Mapping[str, Sequence[str]] | None = None,
        reserved: Collection[str] = (),
    ) -> None:
        self._kinds = tuple(kinds)
        self._reserved = reserved
        self._order = {kind.name: number for number, kind in enumerate(kinds)}
        self._tariff = tariff or Tariff.unknown()
        self._zones = zones or {}
        self._closed: dict[tuple[str, str, str], _Closed] = {}
        self._quota: dict[str, tuple[int, str]] = {}
        self._chosen: dict[Demand | tuple[Need, ...], Offer | None] = {}
        self._holds_until = math.inf

    @property
    def kinds(self) -> tuple[InstanceType, ...]:
        return self._kinds

    def price(self, kind: InstanceType, market: str, zone: str = "") -> float | None:
        """USD an hour; without a zone that of the cheapest one."""
        return self._tariff.price(kind.name, market, zone)

    # -- which one

    @functools.cached_property
    def _only(self) -> Offer | None:
        if len(self._kinds) != 1:
            return None
        return Offer(self._kinds[0], ON_DEMAND, self.price(self._kinds[0], ON_DEMAND))

    def only(self, need: Need, spot: str) -> Offer | None:
        """The one offer there is for a task like this, if there is but one and it is to be had."""
        only = None if spot != NEVER or self._closed or self._quota else self._only
        return only if only is not None and self.fits(only.kind, need) else None

    def choose(self, demand: Demand, now: float) -> Offer | None:
        """The offer under which a task like these costs least; of equal ones the largest machine that they
        fill, because fewer machines boot. None: there is none, or none to be had now."""
        self._forget_old(now)
        if demand not in self._chosen:
            self._chosen[demand] = self._cheapest(demand, now)
        return self._chosen[demand]

    def choose_one(self, needs: Iterable[Need], spot: str, now: float) -> Offer | None:
        """The cheapest single machine that fits all of these, one after the other."""
        wanted = tuple(dict.fromkeys(needs))
        fitting = [kind for kind in self._kinds if all(self.fits(kind, need) for need in wanted)]
        offers = self._on_markets(fitting, spot, now)
        return min(offers, key=lambda offer: (_known(offer.price), self._rank(offer)), default=None)

    def fits_none(self, need: Need) -> bool:
        """Whether no type that is allowed can hold it, to be had or not."""
        return not any(self.fits(kind, need) for kind in self._kinds)

    def allowed(self, need: Need) -> list[InstanceType]:
        """The types that a task that takes this may have, large enough or not."""
        return [kind for kind in self._kinds if self._may_have(need, kind)]

    def fits(self, kind: InstanceType, need: Need) -> bool:
        """Whether a machine of `kind` may be given a task that takes this."""
        return kind.fits(need) and self._may_have(need, kind)

    def _may_have(self, need: Need, kind: InstanceType) -> bool:
        if need.types:
            return is_named(need.types, kind.name)
        return kind.name not in self._reserved

    def _cheapest(self, demand: Demand, now: float) -> Offer | None:
        fitting = [kind for kind in self._kinds if self.fits(kind, demand.need)]
        offers = self._on_markets(fitting, demand.spot, now)
        return min(offers, key=lambda offer: self._cost(offer, demand), default=None)

    def _on_markets(self, kinds: Sequence[InstanceType], spot: str, now: float) -> list[Offer]:
        """Offers that are open; who only prefers spot machines gets none that costs more than the other."""
        found = []
        markets = _markets(spot)
        for kind in kinds:
            normal = self.price(kind, ON_DEMAND)
            if ON_DEMAND in markets and self.zones(kind, ON_DEMAND, now):
                found.append(Offer(kind, ON_DEMAND, normal))
            if SPOT in markets and (zones := self.zones(kind, SPOT, now)):
                price = self.price(kind, SPOT, zones[0])
                found.append(Offer(kind, SPOT, price))
        return _preferring_spot(found) if spot == PREFER else found

    def _cost(self, offer: Offer, demand: Demand) -> tuple[float, float, int]:
        """USD an hour of one task's share of the machines, rounded so that equal ones are; fewer machines;
        the user's order."""
        slots = 1 if demand.alone else slots_of(offer.kind, demand.need)
        machines = math.ceil(demand.count / slots)
        cost = _known(offer.price) * machines / demand.count
        if cost == math.inf:
            return cost, 0, self._rank(offer)
        return round(cost, 7), machines, self._rank(offer)

    def _rank(self, offer: Offer) -> int:
        return self._order[offer.kind.name]

    # -- what is to be had

    def zones(self, kind: InstanceType, market: str, now: float) -> list[str]:
        """Where machines of this offer may be asked for: the cheapest zone first, then the user's order."""
        quota = self._quota.get(market)
        if quota is not None and kind.cpus >= quota[0]:
            return []
        zones = [
            z for z in self._zones.get(kind.name, ("",)) if self._is_open(kind, market, z, now)
        ]
        return sorted(zones, key=lambda zone: _known(self.price(kind, market, zone)))

    def _is_open(self, kind: InstanceType, market: str, zone: str, now: float) -> bool:
        closed = self._closed.get((kind.name, market, zone))
        return closed is None or closed.until <= now

    def is_probe(self, kind: InstanceType, market: str, zone: str) -> bool:
        """Whether this pool had no capacity when it was asked last: one machine will tell."""
        return (kind.name, market, zone) in self._closed

    def has_none(self, kind: InstanceType, market: str, zone: str, now: float) -> None:
        """The cloud said that it has no capacity: every time, the pool is left alone for longer."""
        key = (kind.name, market, zone)
        before = self._closed.get(key)
        pause = _FIRST_PAUSE if before is None else min(_LONGEST_PAUSE, 2 * before.pause)
        if before is None or before.until <= now:
            self._closed[key] = _Closed(now + pause, pause)
        self._chosen.clear()

    def has_some(self, kind: InstanceType, market: str, zone: str) -> None:
        """The cloud started a machine there."""
        if self._closed.pop((kind.name, market, zone), None) is not None:
            self._chosen.clear()

    def quota_reached(self, kind: InstanceType, market: str, why: str) -> None:
        """The account may have no more machines of as many CPUs; smaller ones may still fit."""
        known = self._quota.get(market)
        if known is None or kind.cpus < known[0]:
            self._quota[market] = kind.cpus, why
        self._chosen.clear()

    def machine_ended(self, market: str) -> None:
        """That may have made room within a quota."""
        if self._quota.pop(market, None) is not None:
            self._chosen.clear()

    def quota_of(self, need: Need, spot: str) -> str:
        """What the cloud said of the quota that keeps a task like this from any machine; empty: there is one
        that no quota keeps it from, to be had now or later."""
        why = ""
        for kind in self._kinds:
            for market in _markets(spot) if self.fits(kind, need) else ():
                cpus, why = self._quota.get(market, (math.inf, ""))
                if kind.cpus < cpus:
                    return ""
        return why

    def next_opening(self, now: float) -> float:
        """When the first of the closed pools may be asked again; infinite: none is closed."""
        later = (closed.until for closed in self._closed.values() if closed.until > now)
        return min(later, default=math.inf)

    def _forget_old(self, now: float) -> None:
        if now >= self._holds_until or not self._chosen:
            self._chosen.clear()
            self._holds_until = self.next_opening(now)


def packed(kind: InstanceType, counts: Mapping[Need, int]) -> int:
    """How many machines hold so many tasks of each kind at a time."""
    left: Counter[Need] = Counter()
    for need, count in counts.items():
        left[need.on(kind)] += count
    machines = 0
    while left:
        filling = _filling(kind, left)
        times = min(left[need] // count for need, count in filling.items())
        for need, count in filling.items():
            left[need] -= times * count
        left = +left
        machines += times
    return machines


def _filling(kind: InstanceType, left: Mapping[Need, int]) -> Counter[Need]:
    """What one machine holds, task by task the one that fits best into what is still free."""
    found: Counter[Need] = Counter()
    free = Need(kind.cpus, kind.node_memory, kind.gpus)
    while fitting := [n for n, count in left.items() if found[n] < count and has_room(free, n)]:
        need = min(fitting, key=lambda need: misfit(kind, free, need))
        found[need] += 1
        free = Need(free.cpus - need.cpus, free.memory - need.memory, free.gpus - need.gpus)
    return +found or Counter([next(iter(left))])


def has_room(free: Need, need: Need) -> bool:
    return need.cpus <= free.cpus and need.memory <= free.memory and need.gpus <= free.gpus


def misfit(kind: InstanceType, free: Need, need: Need) -> float:
    """How far a task is from taking all that is free of a machine, in shares of it: least squares, the
    heuristic for vectors of Panigrahy et al., Heuristics for Vector Bin Packing, 2011."""
    cpus = (free.cpus - need.cpus) / kind.cpus
    memory = (free.memory - need.memory) / kind.node_memory
    gpus = (free.gpus - need.gpus) / kind.gpus if kind.gpus else 0.0
    return cpus * cpus + memory * memory + gpus * gpus


def slots_of(kind: InstanceType, need: Need) -> int:
    """How many such tasks run side by side on one machine."""
    on = need.on(kind)
    rooms = [kind.cpus // on.cpus]
    if on.memory:
        rooms.append(kind.node_memory // on.memory)
    if on.gpus:
        rooms.append(kind.gpus // on.gpus)
    return max(1, min(rooms))


def _markets(spot: str) -> tuple[str, ...]:
    """Those on which a task may have a machine that says this of spot machines."""
    return {NEVER: (ON_DEMAND,), ONLY: (SPOT,)}.get(spot, (ON_DEMAND, SPOT))


def _preferring_spot(offers: list[Offer]) -> list[Offer]:
    spot = [offer for offer in offers if offer.market == SPOT]
    if not spot:
        return offers
    normal = {offer.kind.name: offer.price for offer in offers if offer.market == ON_DEMAND}
    return [o for o in spot if _known(o.price) <= _known(normal.get(o.kind.name))] or offers


def _known(price: float | None) -> float:
    return math.inf if price is None else price
