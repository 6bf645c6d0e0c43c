"""The books: what the VMs of a run cost, as the provider bills them, and what that was paid for.

Covers compute. Storage, addresses and transfer are not in here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .journal import TaskRecord, VMRecord
from .lease import NOTICED
from .market.tariff import SpotHistory
from .model import FREE_WHEN_TAKEN, SPOT, Billing

IDLE = "(idle, boots, lost)"
"""What no task that ended has used: the attempts that a lost VM took along, too."""


@dataclass(frozen=True)
class Bill:
    """Of one VM: seconds up, seconds on the bill, units, the share of the time up in which nothing ran, and
    USD: paid, and what the same would have cost on demand. None: nobody knows the price."""

    name: str
    seconds: float
    billed: float
    units: int
    idle: float
    usd: float | None
    normal: float | None


@dataclass(frozen=True)
class Account:
    """Of one run. `rules`: USD by rule; what nobody used stands under IDLE."""

    bills: tuple[Bill, ...]
    rules: dict[str, float] = field(default_factory=dict)

    @property
    def units(self) -> int:
        return sum(bill.units for bill in self.bills)

    @property
    def billed(self) -> float:
        return sum(bill.billed for bill in self.bills)

    @property
    def usd(self) -> float | None:
        return _sum(bill.usd for bill in self.bills)

    @property
    def saving(self) -> float | None:
        """USD that spot machines have cost less than the same on demand."""
        usd, normal = self.usd, _sum(bill.normal for bill in self.bills)
        return None if usd is None or normal is None else normal - usd

    @property
    def idle(self) -> float:
        """Share of the time up in which nothing ran."""
        up = sum(bill.seconds for bill in self.bills)
        return sum(bill.idle * bill.seconds for bill in self.bills) / up if up else 0.0


def account(
    vms: Iterable[VMRecord], tasks: Sequence[TaskRecord], billing: Billing, now: float
) -> Account:
    """What the run has cost; VMs that are still up are taken to end `now`."""
    ran: dict[str, list[TaskRecord]] = defaultdict(list)
    for task in tasks:
        if task.vm is not None and task.started is not None:
            ran[task.vm].append(task)
    bills = []
    rules: dict[str, float] = defaultdict(float)
    for vm in vms:
        if vm.instance_id is not None:
            used = ran.get(vm.leader or vm.name, [])
            bill = bill_of(vm, used, billing, now)
            bills.append(bill)
            _share_out(bill, used, now, rules)
    return Account(tuple(bills), dict(rules))


def bill_of(vm: VMRecord, used: Sequence[TaskRecord], billing: Billing, now: float) -> Bill:
    """From what the cloud says of the meter; as far as it says nothing, from what was asked of it. Of a VM
    that an earlier run has handed over, what has come to its bill since then; the idle time between the two
    with it."""
    begun = _begun(vm)
    since = begun if vm.taken is None else vm.taken
    ended = max(since, vm.meter_end or vm.ended or now)
    seconds = ended - since
    is_free = (
        vm.market == SPOT
        and vm.reason.startswith("Server.SpotInstance")
        and ended - begun < FREE_WHEN_TAKEN
    )
    before = 0 if vm.taken is None else _units(billing, since - begun)
    units = 0 if is_free else _units(billing, ended - begun) - before
    billed = units * billing.unit
    idle = 1.0 - _busy(used, since, ended) / seconds if seconds else 0.0
    usd = vm.price * billed / 3600 if vm.price is not None else None
    if vm.paid is not None and not is_free:
        usd = vm.paid
    normal = vm.list_price * billed / 3600 if vm.list_price is not None else None
    return Bill(vm.name, seconds, billed, units, idle, usd, usd if vm.market != SPOT else normal)


def _begun(vm: VMRecord) -> float:
    return vm.requested if vm.meter is None else vm.meter


def _units(billing: Billing, uptime: float) -> int:
    return max(billing.units(uptime), math.ceil(billing.minimum / billing.unit))


def keeping_bill(vm: VMRecord, billing: Billing) -> float | None:
    """USD that a VM which was handed over costs at most, beyond what the run has paid, if no run takes it.
    None: nobody knows the price."""
    begun, given, until = _begun(vm), vm.ended, vm.kept_until
    if vm.price is None or given is None or until is None:
        return None
    units = _units(billing, until + NOTICED - begun) - _units(billing, given - begun)
    return vm.price * units * billing.unit / 3600


def spot_bills(
    vms: Iterable[VMRecord], history: SpotHistory, billing: Billing, now: float
) -> dict[str, float]:
    """USD that spot machines have cost by the prices of their time, by name, as far as these are known. What
    the minimum charge or a started unit adds costs what the last second did."""
    found = {}
    for vm in vms:
        bill = bill_of(vm, (), billing, now)
        since = _begun(vm) if vm.taken is None else vm.taken
        before = 0.0 if vm.taken is None else _spot_bill(vm, history, billing, vm.taken)
        paid = _spot_bill(vm, history, billing, since + bill.seconds)
        if paid is not None and before is not None:
            found[vm.name] = paid - before if bill.units else 0.0
    return found


def _spot_bill(vm: VMRecord, history: SpotHistory, billing: Billing, end: float) -> float | None:
    """USD on the bill of a spot machine when it has been up until `end`."""
    begun = _begun(vm)
    paid = history.paid(vm.instance_type, vm.zone, begun, end)
    last = history.paid(vm.instance_type, vm.zone, end, end + 1)
    if paid is None or last is None:
        return None
    billed = _units(billing, end - begun) * billing.unit
    return paid + last * (billed - (end - begun))


def _busy(used: Iterable[TaskRecord], begun: float, ended: float) -> float:
    """Seconds in which at least one task ran."""
    total, until = 0.0, begun
    for start, end in sorted(_span(task, ended) for task in used):
        total += max(0.0, min(end, ended) - max(start, until))
        until = max(until, min(end, ended))
    return total


def _span(task: TaskRecord, now: float) -> tuple[float, float]:
    assert task.started is not None
    return task.started, now if task.ended is None else task.ended


def _share_out(bill: Bill, used: Sequence[TaskRecord], now: float, rules: dict[str, float]) -> None:
    """What a VM cost while it was busy is shared by its tasks' rules in proportion to their CPU seconds."""
    if bill.usd is None:
        return
    weights: dict[str, float] = defaultdict(float)
    for task in used:
        start, end = _span(task, now)
        weights[task.rule] += max(0.0, end - start) * task.cpus
    total = sum(weights.values())
    busy = bill.usd * (1.0 - bill.idle) if total else 0.0
    for rule, weight in weights.items():
        rules[rule] += busy * weight / total if total else 0.0
    rules[IDLE] += bill.usd - busy


def _sum(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)
