"""Starts the VMs that are planned: intent into the journal, then the launch, then what came of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from ..model import SPOT, VM, VMState
from ..provision import Instance, LaunchOutcome, NoCapacity, QuotaReached, TokenSpent
from .desk import CONSISTENCY_WINDOW, Desk
from .lifecycle import Action, Sight, decide


class Starter:
    """`close` ends the record of a VM of which there is no machine."""

    def __init__(self, desk: Desk, close: Callable[[VM], None]) -> None:
        self._desk = desk
        self._close = close

    def launch_planned(self) -> None:
        """Requested VMs are still to be launched only when the round that requested them broke off;
        the token makes asking again safe."""
        desk = self._desk
        for vm in desk.machines.having(VMState.PLANNED):
            if decide(self._sight(vm)) == Action.CLOSE:
                self._close(vm)
        unlaunched = desk.machines.having(VMState.PLANNED, VMState.REQUESTED)
        booting = sum(not desk.gangs.is_up(vm) for vm in desk.machines.having(VMState.BOOTING))
        due = desk.launcher.due(unlaunched, desk.machines, booting, desk.now)
        if due := [vm for vm in due if desk.is_needed(vm)]:
            self._launch(due)
        if desk.launcher.refusal:
            desk.tell(f"No further VM is started: {desk.launcher.refusal}")
            for vm in desk.machines.having(VMState.PLANNED):
                self._not_started(vm)

    def _sight(self, vm: VM) -> Sight:
        """A machine may be there for a VM whose launch was not answered: as long as Describe may not show it
        yet it counts towards the limits, needed or not. At the end of a run it is looked for all the same."""
        goes_on = not self._desk.is_stopping
        unseen = bool(vm.token) and self._desk.now - vm.requested < CONSISTENCY_WINDOW
        return Sight(
            vm.state,
            is_wanted=goes_on and self._desk.is_needed(vm),
            may_have_come=goes_on and unseen,
        )

    def _launch(self, due: Sequence[VM]) -> None:
        desk = self._desk
        ready, nowhere = desk.launcher.address(due, desk.now)
        for vm in nowhere:
            wait = desk.offers.next_opening(desk.now) - desk.now
            desk.tell(
                f"No machine is to be had of {_offer_name(vm)}: others are tried, if any are allowed, and "
                f"this one again in {wait:.0f} s.",
                about=f"capacity of {_offer_name(vm)}",
            )
            self._not_started(vm)
        for vm in ready:
            vm.requested = desk.now
            desk.move(vm, VMState.REQUESTED)
            desk.note(vm, f"requesting a {_offer_name(vm)}")
        if not ready or not desk.flush():
            return
        requests = [desk.launcher.request(vm) for vm in ready]
        for vm, outcome in zip(ready, desk.cloud.launch(requests), strict=True):
            self.take(vm, outcome)
        desk.flush()

    def take(self, vm: VM, outcome: LaunchOutcome) -> None:
        """A VM whose token is spent had a machine that is gone: another one gets a name and a bill of its
        own."""
        desk = self._desk
        may_ask_again = desk.launcher.take(vm, outcome, desk.now)
        if isinstance(outcome, Instance):
            vm.instance_id, vm.meter = outcome.id, outcome.launched
            desk.move(vm, VMState.BOOTING)
            desk.note(vm, f"is instance {outcome.id}")
        elif isinstance(outcome, TokenSpent):
            self._not_started(vm)
        elif not may_ask_again:
            desk.tell(f"EC2 refuses to start {_offer_name(vm)}: {outcome}", logging.ERROR)
            self._not_started(vm)
        else:
            desk.move(vm, VMState.PLANNED)
            if not isinstance(outcome, NoCapacity | QuotaReached):
                desk.tell(f"{vm.name} is not started yet, will ask again: {outcome}")
            desk.note(vm, f"not started: {outcome}")

    def _not_started(self, vm: VM) -> None:
        """There will be no such machine; what was planned for it is planned anew."""
        self._desk.requeue_planned(vm)
        self._close(vm)


def _offer_name(vm: VM) -> str:
    return f"{vm.type.name}{' (spot)' if vm.market == SPOT else ''}"
