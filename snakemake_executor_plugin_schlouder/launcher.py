"""Starting machines: within the hard limits, in batches, and what each kind of refusal means (R14, R15, R19).

Strategies want VMs; this decides which of them are asked for now, where, and whether any more are at all.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .market.offers import Offers
from .model import ON_DEMAND, VM, Billing
from .provision import (
    CloudUnavailable,
    Instance,
    LaunchOutcome,
    LaunchRefused,
    LaunchRequest,
    NoCapacity,
    QuotaReached,
    client_token,
)

MAX_BOOT_FAILURES = 3
"""Boots in a row that may fail before nothing more is launched (R15)."""

BATCH = 10
"""Machines started by one call at most: their names must fit into one tag of 256 characters."""

_BACKOFF = 60.0


@dataclass(frozen=True)
class Limits:
    """What no strategy may exceed (R19): VMs that boot at a time, and USD for all VMs of the run."""

    max_booting: int = 1_000_000
    max_spend: float = math.inf


class Launcher:
    """`refusal` is why nothing more is started: for good, or, where it is for the money, until a machine has
    ended; empty: nothing speaks against it."""

    def __init__(self, run: str, offers: Offers, billing: Billing, limits: Limits) -> None:
        self._run = run
        self._offers = offers
        self._billing = billing
        self._limits = limits
        self._boot_failures = 0
        self._batch_limits: dict[str, int] = {}
        self._is_too_dear = False
        self.refusal = ""

    # -- boots

    def has_booted(self) -> None:
        self._boot_failures = 0

    def boot_failed(self, why: str) -> None:
        """The circuit breaker: machines that never join would be paid for again and again."""
        self._boot_failures += 1
        if self._boot_failures >= MAX_BOOT_FAILURES:
            self.refusal = f"{MAX_BOOT_FAILURES} VMs in a row did not join Slurm; the last: {why}"

    # -- money

    def spent(self, vms: Iterable[VM], now: float) -> float:
        """USD on the bill so far."""
        return sum(self._cost(vm, self._end(vm, now)) for vm in vms if vm.instance_id)

    def bound(self, vms: Iterable[VM], now: float) -> float:
        """USD that these VMs will have cost when all that is planned for them is done."""
        return sum(self._cost(vm, self._until_done(vm, now)) for vm in vms)

    def _until_done(self, vm: VM, now: float) -> float:
        if vm.ended is not None:
            return vm.ended
        up = max(now, vm.requested + vm.boot_planned) if vm.is_booting else now
        longest = max((task.walltime for task in (*vm.active.values(), *vm.queue)), default=0.0)
        return max(vm.idle_at(now), up + longest)

    def _end(self, vm: VM, now: float) -> float:
        return now if vm.ended is None else vm.ended

    def _cost(self, vm: VM, until: float) -> float:
        return vm.billed(self._billing, until) / 3600 * (vm.price or 0.0)

    # -- which machines are asked for now

    def due(self, vms: Sequence[VM], all_vms: Iterable[VM], booting: int, now: float) -> list[VM]:
        """Of the VMs that are not launched yet those that may be now. One whose launch was not answered may
        have a machine: it counts, and is asked for again beside the limits. `booting`: machines that are on
        their way by an answer."""
        unanswered = sum(bool(vm.token) for vm in vms)
        waiting = [vm for vm in vms if vm.retry_at <= now]
        again = [vm for vm in waiting if vm.token]
        new = [vm for vm in waiting if not vm.token]
        room = max(0, self._limits.max_booting - booting - unanswered)
        return again + self._affordable(new[:room], all_vms, now)

    def _affordable(self, wanted: list[VM], all_vms: Iterable[VM], now: float) -> list[VM]:
        if self._limits.max_spend == math.inf or not wanted:
            return wanted
        others = [vm for vm in all_vms if vm.instance_id or (vm.token and vm.is_booting)]
        bound = self.bound(others, now)
        for count, vm in enumerate(wanted):
            bound += self.bound([vm], now)
            if bound > self._limits.max_spend:
                self._is_too_dear = True
                self.refusal = (
                    f"--schlouder-max-spend of {self._limits.max_spend:g} USD: "
                    f"{self.spent(others, now):.4g} USD are spent, and with {vm.name} ({vm.type.name}) "
                    f"it would come to {bound:.4g}"
                )
                return wanted[:count]
        return wanted

    def machine_ended(self, market: str) -> None:
        """What it did not use up of quota and money may do for another one."""
        self._offers.machine_ended(market)
        if self._is_too_dear:
            self._is_too_dear, self.refusal = False, ""

    def is_spent(self, vms: Iterable[VM], now: float) -> bool:
        """Whether the run has cost as much as it may."""
        return self._limits.max_spend < math.inf and self.spent(vms, now) >= self._limits.max_spend

    def address(self, vms: Sequence[VM], now: float) -> tuple[list[VM], list[VM]]:
        """Gives each VM zone, batch and token, unless it has them from an earlier try; (those that can be
        asked for, those for which there is no capacity anywhere). A pool that had no capacity gets one
        VM to try; the others of it stay for later."""
        ready = [vm for vm in vms if vm.token]
        none: list[VM] = []
        groups: dict[tuple[str, str, str], list[VM]] = {}
        for vm in vms:
            if vm.token:
                continue
            zones = self._offers.zones(vm.type, vm.market, now)
            if zones:
                groups.setdefault((vm.type.name, vm.market, zones[0]), []).append(vm)
            else:
                none.append(vm)
        for (_, market, zone), group in groups.items():
            if self._offers.is_probe(group[0].type, market, zone):
                group = group[:1]
            size = self._batch_limits.get(market, BATCH)
            for start in range(0, len(group), size):
                ready += self._batch(group[start : start + size], zone)
        return ready, none

    def _batch(self, vms: list[VM], zone: str) -> list[VM]:
        """One launch for all of them: those that were asked for more often than others must not get a token
        of their own, under which the whole batch would be started once more."""
        names = tuple(vm.name for vm in vms)
        attempt = max(vm.launch_attempt for vm in vms)
        for vm in vms:
            vm.launch_attempt = attempt
            vm.zone, vm.batch = zone, names
            vm.price = self._offers.price(vm.type, vm.market, zone)
            vm.list_price = self._offers.price(vm.type, ON_DEMAND)
            vm.token = self._token(vm)
        return vms

    def _token(self, vm: VM) -> str:
        return client_token(
            self._run, vm.batch, vm.type.name, vm.market, vm.zone, vm.launch_attempt
        )

    def request(self, vm: VM) -> LaunchRequest:
        return LaunchRequest(self._run, vm.name, vm.token, vm.type, vm.market, vm.zone, vm.batch)

    # -- what the cloud says

    def take(self, vm: VM, outcome: LaunchOutcome, now: float) -> bool:
        """What an outcome means for later launches of `vm` and of others; whether `vm` may still be asked
        for. EC2 starts none of a batch that exceeds a quota, though a smaller one may not."""
        may_ask_again = not isinstance(outcome, Instance | LaunchRefused | QuotaReached)
        if isinstance(outcome, Instance):
            self._offers.has_some(vm.type, vm.market, vm.zone)
        elif isinstance(outcome, NoCapacity):
            self._offers.has_none(vm.type, vm.market, vm.zone, now)
            self._anew(vm, now)
        elif isinstance(outcome, QuotaReached) and len(vm.batch) > 1:
            known = self._batch_limits.get(vm.market, BATCH)
            self._batch_limits[vm.market] = min(known, len(vm.batch) // 2)
            self._anew(vm, now)
            may_ask_again = True
        elif isinstance(outcome, QuotaReached):
            self._offers.quota_reached(vm.type, vm.market, str(outcome))
            self._anew(vm, now)
        elif isinstance(outcome, LaunchRefused):
            self.refusal = str(outcome)
        elif isinstance(outcome, CloudUnavailable):
            vm.retry_at = now + self._pause(vm)
        vm.launch_attempt += not isinstance(outcome, Instance)
        return may_ask_again

    def _anew(self, vm: VM, date: float) -> None:
        """Nothing was started under its token: the next try is another launch."""
        vm.token, vm.zone, vm.batch, vm.retry_at = "", "", (), date

    def _pause(self, vm: VM) -> float:
        """Seconds until the next try; the same for a batch, different for others."""
        spread = random.Random(f"{vm.token} {vm.launch_attempt}").uniform(0.5, 1.0)
        return min(_BACKOFF, 2.0 ** (vm.launch_attempt + 1)) * spread
