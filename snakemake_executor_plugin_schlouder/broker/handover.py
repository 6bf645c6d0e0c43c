"""VMs that come from an earlier run, and those that stay for the next one."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence

from .. import keeping
from ..keeping import Kept, Shelf
from ..model import VM, VMState
from ..provision import CloudUnavailable
from ..slurm import ClusterUnavailable
from .desk import Desk
from .keeper import Keeper


class HandOver:
    """`cancel_jobs` cancels the run's jobs, and says whether Slurm has heard of it."""

    def __init__(
        self, desk: Desk, keeper: Keeper, shelf: Shelf | None, cancel_jobs: Callable[[], bool]
    ) -> None:
        self._desk = desk
        self._keeper = keeper
        self._shelf = shelf
        self._cancel_jobs = cancel_jobs

    # -- the beginning of a run

    def take(self) -> list[VM]:
        """The VMs that can be used; of those that are of no use any more the end is seen to."""
        desk, found = self._desk, self._collected()
        for vm in found:
            desk.machines.add(vm)
            vm.recount(desk.now)
            desk.planner.adopt(vm)
            desk.note(vm, f"taken over, started by run {vm.origin}")
        desk.flush()
        self._keeper.renew_leases()
        return [vm for vm in found if vm.is_open]

    def _collected(self) -> list[VM]:
        if self._shelf is None:
            return []
        desk, config = self._desk, self._desk.config
        known = {vm.name for vm in desk.machines}
        wanted = desk.planner.looks_for(desk.now)
        room = config.max_vms - desk.machines.alive
        ports = desk.cloud, desk.cluster
        try:
            return keeping.collected(
                self._shelf, known, wanted, room, config.types, *ports, config.job_name, desk.now
            )
        except (CloudUnavailable, ClusterUnavailable, sqlite3.Error) as error:
            desk.tell(f"VMs that earlier runs have kept are not used: {error}")
            return []

    # -- its end

    def give(self) -> None:
        """First the journal has it that a VM is not this run's any more, then the next run may know of it."""
        desk, staying = self._desk, self._keepable()
        for vm in staying:
            vm.ended = desk.now
            desk.move(vm, VMState.HANDED_OVER)
            desk.note(vm, "handed over")
        if staying and not (desk.flush() and self._put_on_shelf(staying)):
            for vm in staying:
                vm.ended = vm.kept_until = None
                desk.move(vm, VMState.READY)
                desk.note(vm, "not handed over")

    def _keepable(self) -> list[VM]:
        """Idle VMs that can be of use to another run, with the date until which they stay."""
        desk, config = self._desk, self._desk.config
        is_spent = desk.launcher.is_spent(desk.machines, desk.now)
        if desk.is_over or not desk.keeps_vms or is_spent or not self._cancel_jobs():
            return []
        alone = [vm for vm in desk.machines.idle.values() if vm.nodes == 1]
        try:
            return keeping.keepable(
                alone, config.keep, config.billing, desk.cluster, config.job_name, desk.now
            )
        except ClusterUnavailable as error:
            desk.tell(f"Slurm does not answer; no VM is kept: {error}")
            return []

    def _put_on_shelf(self, vms: Sequence[VM]) -> bool:
        """False: it could not be done, and they are still this run's."""
        assert self._shelf is not None
        desk, run = self._desk, self._desk.config.run
        try:
            self._shelf.put([Kept.of(vm, run, desk.now) for vm in vms], desk.now)
        except sqlite3.Error as error:
            desk.tell(f"No VM is kept, it cannot be written down: {error}")
            return False
        held = self._keeper.leases_end
        try:
            keeping.promise(self._shelf, desk.cluster, vms, run, desk.now, held)
        except sqlite3.Error as error:
            desk.tell(f"No run can take the VMs that are kept: {error}")
        for vm in vms:
            desk.books.vm(vm)
        return True
