"""Layouts: how many VMs, until when each is to be given work, what that costs and when it ends.

A layout is found by playing the rest of a batch on VMs that stop at given dates: the VM that is free
first takes the longest task that still ends before its stop (longest processing time first, Graham
1969, on bins that close). Dates are seconds since the epoch, lengths the seconds tasks run.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from .model import Billing

_EDGE = 1e-6
_REFITS = 8
_TRIALS = 6

LARGE = 1000
"""Tasks from which on a batch counts as large."""


@dataclass(frozen=True)
class Seat:
    """A VM that there is, or one that would be `new`. `frees`: when each of the tasks that it can run side
    by side could begin; `asked`: when its meter started, or would start."""

    name: str
    frees: tuple[float, ...]
    asked: float
    new: bool = False

    @property
    def free(self) -> float:
        """When nothing of what is planned for it runs any more."""
        return max(self.frees)

    def room(self, stop: float) -> float:
        """Seconds of work that fit until `stop`."""
        return sum(max(0.0, stop - free) for free in self.frees)


@dataclass(frozen=True)
class Layout:
    """`stops`: until when each seat is to be given work. `cost` in billed seconds, `finish` the date at
    which everything ends; `left` seconds of work that found no place."""

    stops: dict[str, float] = field(default_factory=dict)
    new: int = 0
    cost: float = math.inf
    finish: float = math.inf
    left: float = math.inf

    @property
    def fits(self) -> bool:
        return self.left <= _EDGE


@dataclass(frozen=True)
class Batch:
    """What is to be laid out. `lengths`: longest first; `seats`: the VMs there are; `offers`: those that
    could be started, in order, of which the tasks that are ready can use `width`."""

    now: float
    lengths: Sequence[float]
    seats: Sequence[Seat]
    offers: Sequence[Seat]
    billing: Billing
    boot_time: float
    width: int

    @functools.cached_property
    def work(self) -> float:
        return sum(self.lengths)

    @property
    def alone(self) -> float:
        """Seconds one new VM would take for it."""
        return self.boot_time + self.work

    @property
    def has_long_units(self) -> bool:
        """Whether a unit is what VMs are filled up to, so that its end is what counts."""
        return self.billing.unit >= self.billing.quantum(self.boot_time)

    def stretched(self, factor: float) -> Batch:
        """The same with every task so many times as long."""
        return replace(self, lengths=[length * factor for length in self.lengths])

    # -- the two questions

    def fastest(self, patience: float = 0.0) -> Layout:
        """The least finish; of the VMs that could be started as few as come within `patience` s of it."""
        bounds = sorted((self._finish_bound(new), new) for new in self._choices())
        best = min(
            (self._unlimited(new) for _, new in bounds[: self._trials]),
            key=lambda layout: (layout.finish, layout.new),
        )
        limit = best.finish + patience
        few, many = min(self._choices()), best.new
        while few < many:
            middle = (few + many) // 2
            if self._ends_by(limit, middle):
                many = middle
            else:
                few = middle + 1
        return self._unlimited(many) if many < best.new else best

    def soonest(self) -> float:
        """When the fastest layout ends."""
        if self.is_large:
            return min(self._finish_bound(new) for new in self._choices())
        return self.fastest().finish

    def cheapest(self, by: float) -> Layout:
        """The least cost of all layouts that end `by` a date, and of equal ones the first to finish;
        where none is found, one that does not fit."""
        best = Layout()
        for tried, (bound, new) in enumerate(sorted(self._cost_bounds(by))):
            if best.fits and (bound > best.cost + _EDGE or tried >= self._trials):
                break
            if tried >= 4 * _TRIALS:
                break
            found = self._fit(self._seats(-new), by)
            if (found.left, found.cost, found.finish) < (best.left, best.cost, best.finish):
                best = found
        return best

    def filled(self) -> float:
        """The date by which VMs that are worth their boot would be done with it.

        Long units: the end of the unit in which all VMs the cap allows would be. Short units: when as
        many would be as each find work for their planning quantum.
        """
        if self.has_long_units:
            unit, margin = self.billing.unit, self.billing.margin
            soonest = min(self._finish_bound(new) for new in self._choices())
            return self.now + math.ceil((soonest - self.now + margin) / unit) * unit - margin
        filled = self.now + self.billing.quantum(self.boot_time)
        for new, offer in enumerate(self.offers, 1):
            done = self._finish_bound(new)
            if done - self.now < self.billing.quantum(offer.free - self.now):
                break
            filled = done
        return filled

    def paid_until(self, seat: Seat, layout: Layout) -> float:
        """How long `seat` may be given work at no further cost, where `layout` is carried out."""
        if not self.has_long_units:
            return math.inf
        unit, margin = self.billing.unit, self.billing.margin
        stop = layout.stops.get(seat.name, math.inf)
        if stop == math.inf:
            return math.inf
        units = math.ceil((stop - seat.asked + margin - _EDGE) / unit)
        return seat.asked + units * unit - margin

    # -- parts

    @property
    def is_large(self) -> bool:
        """Whether sums tell as much as playing it through."""
        return len(self.lengths) >= LARGE

    @property
    def _trials(self) -> int:
        return 1 if self.is_large else _TRIALS

    def _ends_by(self, date: float, new: int) -> bool:
        if self.is_large:
            return self._finish_bound(new) <= date
        return self._unlimited(new).finish <= date

    def _choices(self) -> Iterable[int]:
        least = 0 if self.seats else 1
        return range(least, min(len(self.offers), max(least, self.width)) + 1)

    def _seats(self, new: int) -> list[Seat]:
        return [*self.seats, *self.offers[:new]]

    def _unlimited(self, new: int) -> Layout:
        seats = self._seats(new)
        return self._play(seats, dict.fromkeys((seat.name for seat in seats), math.inf))

    def _finish_bound(self, new: int) -> float:
        """When all seats would end at once if work could be cut anywhere."""
        total, level = self.work, math.inf
        frees = sorted(free for seat in self._seats(new) for free in seat.frees)
        for count, free in enumerate(frees, 1):
            if level <= free:
                break
            total += free
            level = total / count
        return level

    def _cost_bounds(self, by: float) -> Iterator[tuple[float, int]]:
        """(billed seconds if work could be cut anywhere, -new) of the choices that could end by then."""
        seats = self._seats(len(self.offers))
        width = max((len(seat.frees) for seat in seats), default=1)
        room = _sums(seat.room(by) for seat in seats)
        if self.has_long_units:
            base, most = self._base(), width * self.billing.unit
            paid = _sums(seat.room(self._unit_end(seat, by)) for seat in seats)
        else:
            boots = _sums(min(seat.frees) - seat.asked for seat in seats)
        for new in self._choices():
            count = len(self.seats) + new
            if room[count] < self.work - _EDGE:
                continue
            if not self.has_long_units:
                yield self.work / width + boots[count], -new
                continue
            extensions = max(0, math.ceil((self.work - paid[count]) / most))
            yield base + (new + extensions) * self.billing.unit, -new

    def _base(self) -> float:
        return sum(self.billing.billed(seat.free - seat.asked) for seat in self.seats)

    def _unit_end(self, seat: Seat, by: float) -> float:
        """`by`, or earlier: the end of the unit in which `seat` becomes free, less the margin."""
        unit = self.billing.unit
        units = max(1, math.ceil((seat.free - seat.asked) / unit))
        return min(by, seat.asked + units * unit - self.billing.margin)

    def _paid(self, seats: Sequence[Seat], by: float) -> tuple[dict[str, float], float]:
        """(until when each seat is paid, seconds of work that do not fit into that)."""
        stops = {seat.name: self._unit_end(seat, by) for seat in seats}
        return stops, self.work - sum(seat.room(stops[seat.name]) for seat in seats)

    def _fit(self, seats: Sequence[Seat], by: float) -> Layout:
        if not self.has_long_units:
            return self._play(seats, dict.fromkeys((seat.name for seat in seats), by))
        stops, lacking = self._paid(seats, by)
        width = max(len(seat.frees) for seat in seats)
        found = Layout()
        for _ in range(_REFITS):
            could = self._extend(stops, lacking / width, by)
            found = self._play(seats, stops)
            lacking = found.left
            if found.fits or not could:
                break
        return found

    def _extend(self, stops: dict[str, float], lacking: float, by: float) -> bool:
        """Buys units, one seat after the other, first where the end is nearest; False: none to be had."""
        heap = [(stop, name) for name, stop in stops.items() if stop < by - _EDGE]
        heapq.heapify(heap)
        could = bool(heap)
        while lacking > 0 and heap:
            stop, name = heapq.heappop(heap)
            stops[name] = later = min(by, stop + self.billing.unit)
            lacking -= later - stop
            if later < by - _EDGE:
                heapq.heappush(heap, (later, name))
        return could

    def _play(self, seats: Sequence[Seat], stops: dict[str, float]) -> Layout:
        left, ends = play(self.lengths, seats, stops)
        used = [seat for seat in seats if not seat.new or ends[seat.name] > seat.free]
        cost = sum(self.billing.billed(ends[seat.name] - seat.asked) for seat in used)
        new = sum(seat.new for seat in used)
        return Layout(dict(stops), new, cost, max(ends.values(), default=self.now), left)


def play(
    lengths: Sequence[float], seats: Sequence[Seat], stops: dict[str, float]
) -> tuple[float, dict[str, float]]:
    """(work that found no place, last end on each seat). `lengths`: longest first."""
    rising = lengths[::-1]
    there = list(range(len(rising) + 1))
    limits = [stops[seat.name] + _EDGE for seat in seats]
    ends = [seat.free for seat in seats]
    heap = [(free, number) for number, seat in enumerate(seats) for free in seat.frees]
    heapq.heapify(heap)
    top, left = len(rising), sum(lengths)
    while heap and top:
        date, number = heap[0]
        room = limits[number] - date
        if rising[top - 1] <= room:
            at = top
            top = _still(there, top - 1)
        elif at := _still(there, bisect_right(rising, room, 0, top)):
            there[at] = at - 1
        else:
            heapq.heappop(heap)
            continue
        left -= rising[at - 1]
        end = date + rising[at - 1]
        if end > ends[number]:
            ends[number] = end
        heapq.heapreplace(heap, (end, number))
    return (left if top else 0.0), {seat.name: ends[n] for n, seat in enumerate(seats)}


def _still(there: list[int], at: int) -> int:
    """The longest task up to `at` that is still there (disjoint sets with path halving); 0: none."""
    while there[at] != at:
        there[at] = at = there[there[at]]
    return at


def _sums(values: Iterable[float]) -> list[float]:
    """Of the first n values, by n."""
    return list(itertools.accumulate(values, initial=0.0))
