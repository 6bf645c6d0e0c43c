"""Keeps the VMs: looks at them, and does what the table in `lifecycle.py` says."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from .. import lease
from ..model import BOOTING, FREE_WHEN_TAKEN, VM, VM_ENDED, Task, TaskState, VMState
from ..provision import CloudUnavailable, Instance
from ..slurm import ClusterUnavailable, ClusterView, NodeStatus
from .desk import CONSISTENCY_WINDOW, Absences, Desk
from .lifecycle import Action, Machine, Node, Sight, decide
from .sights import (
    ended_itself,
    is_reclaim_of,
    machine_sight,
    node_sight,
    reclaimed_by,
    stray_sight,
)

LEAVING = (VMState.DRAINING, VMState.TERMINATING, VMState.GONE)
NODE_MOVING = (VMState.BOOTING, VMState.DRAINING, VMState.GONE)
"""States in which the next step depends on what Slurm says of the node."""

_MOVING = (*BOOTING, VMState.TERMINATING)
_ABSENT_NODE = 20.0
_DESCRIBE_SELDOM = 15.0
_TERMINATE_PATIENCE = 60.0
_GUEST_PATIENCE = 30.0
_CONSOLE_LINES = 15
_RECLAIM_PATIENCE = 180.0
_HEARD = 60.0
"""Seconds for which it counts that a node has answered slurmctld."""


class Keeper:
    """`take` gives a VM the machine that came of its launch; `recall` takes submissions back."""

    def __init__(
        self,
        desk: Desk,
        take: Callable[[VM, Instance], None],
        recall: Callable[[Sequence[Task]], None],
    ) -> None:
        self._desk = desk
        self._take = take
        self._recall = recall
        self._absent_nodes = Absences()
        self._absent_vms = Absences()
        self._described = -math.inf
        self._slurm_told = -math.inf
        self._heard: dict[str, float] = {}
        self._renewed = -math.inf
        self._just_joined: list[str] = []

    # -- what EC2 says

    def look_at_cloud(self) -> None:
        """Asks EC2, if it is time for that."""
        desk, often = self._desk, self._desk.config.describe_every
        moving = desk.machines.has(*_MOVING)
        pause = often if moving else max(often, _DESCRIBE_SELDOM)
        is_worth = desk.machines.alive or desk.now < desk.orphans_until
        if is_worth and desk.now - self._described >= pause and not desk.is_over:
            self.describe()

    def describe(self) -> bool:
        """Brings the VMs up to what the cloud says; changes nothing, and is False, if it says nothing."""
        desk = self._desk
        self._described = desk.now
        runs = (desk.config.run, *sorted(self._origins()))
        try:
            listed = {instance.id: instance for instance in desk.cloud.instances(*runs)}
        except CloudUnavailable as error:
            desk.tell(f"EC2 does not answer, waiting for it: {error}")
            return False
        self._end_strays(listed.values())
        for vm in desk.machines.living():
            if vm.instance_id is not None and vm.state not in VM_ENDED:
                self._update_from_cloud(vm, listed.get(vm.instance_id))
        return True

    def _origins(self) -> set[str]:
        """The runs that have started machines which are this one's now."""
        return {vm.origin for vm in self._desk.machines.living() if vm.origin}

    def _end_strays(self, listed: Iterable[Instance]) -> None:
        """Machines of this run whose launch was never answered become their VM's, if that still waits for
        one, or are ended; so are those of which EC2 knew nothing until their record was closed."""
        ending = []
        for instance in listed:
            vm = self._desk.machines.get(instance.node)
            if vm is None:
                continue
            is_known = vm.instance_id is not None
            if vm.instance_id != instance.id:
                sight = Sight(vm.state, stray_sight(instance), is_known=is_known)
            elif vm.state == VMState.GONE:
                sight = Sight(vm.state, machine_sight(instance))
            else:
                continue
            action = decide(sight)
            if action == Action.TAKE:
                self._take(vm, instance)
            elif action == Action.BOOK:
                self.book_stray(vm, instance)
            is_wanted = vm.is_open and vm.instance_id == instance.id
            if instance.is_alive and not is_wanted:
                ending.append(instance.id)
        if ending:
            self._desk.try_cloud(lambda: self._desk.cloud.terminate(ending))

    def book_stray(self, vm: VM, instance: Instance) -> None:
        """A machine that came for a VM that had been given up costs what that VM would have."""
        vm.instance_id, vm.meter, vm.ended = instance.id, instance.launched, None
        vm.ending = vm.node_deleted = False
        self._desk.move(vm, VMState.TERMINATING)
        self._desk.note(vm, f"came too late as {instance.id}")

    def _update_from_cloud(self, vm: VM, instance: Instance | None) -> None:
        if instance is None:
            machine = Machine.ABSENT if self._is_lost_from_sight(vm) else Machine.UNSEEN
            self._reconcile(vm, machine, "EC2 no longer lists the machine")
            return
        self._absent_vms.end(vm.name)
        if vm.meter is None:
            vm.meter = instance.launched
        if instance.is_alive:
            return
        self._desk.books.vm(vm)
        vm.meter_end = vm.meter_end or instance.ended or self._end_of_lease(vm, instance)
        if vm.state == VMState.TERMINATING and is_reclaim_of(instance.reason):
            vm.reason = instance.reason
        self._reconcile(vm, machine_sight(instance), instance.reason or "the machine ended")
        vm.ended = vm.ended or self._desk.now
        vm.ending = True

    def _end_of_lease(self, vm: VM, instance: Instance) -> float | None:
        """When a machine was gone at the latest that had nothing to do and ended itself while its owner was
        suspended: EC2 does not say when, and it is not billed for what came after."""
        leader = self._desk.gangs.leader(vm)
        if vm.ready is None or leader.idle_since is None or not ended_itself(instance.reason):
            return None
        config = self._desk.config
        is_heard = self._renewed >= vm.ready
        over = (self._renewed if is_heard else vm.requested + config.boot_timeout) + config.lease
        gone = max(over, leader.idle_since) + lease.NOTICED
        return gone if gone < self._desk.now else None

    def _reconcile(self, vm: VM, machine: Machine, why: str) -> None:
        """Does what follows from a machine that is not what it was; a lost one may be gone at once."""
        actions: Mapping[Action, Callable[[], None]] = {
            Action.LOSE: lambda: self.lose(vm, why, is_dead=True),
            Action.FAIL_BOOT: lambda: self._fail_boot(vm, why),
            Action.CLOSE: lambda: self.close(vm),
        }
        is_taken_back = is_reclaim_of(why)
        while act := actions.get(decide(Sight(vm.state, machine, is_taken_back=is_taken_back))):
            act()

    def _is_lost_from_sight(self, vm: VM) -> bool:
        """Describe lags behind launches; absence counts only when it lasts (R8, R10), and Slurm does not hear
        of the machine either."""
        lasts = self._absent_vms.last(vm.name, self._desk.now, CONSISTENCY_WINDOW)
        last = self._desk.now - _HEARD
        return lasts and self._slurm_told > last and not self.has_answered(vm, last)

    def has_answered(self, vm: VM, since: float) -> bool:
        """Whether slurmctld has heard of the VM's node since then."""
        return self._heard.get(vm.name, -math.inf) >= since

    # -- what Slurm says

    def update(self, view: ClusterView, is_news_of_nodes: bool) -> None:
        """VMs that boot or work. `is_news_of_nodes`: the view has all nodes there are."""
        machines = self._desk.machines
        if is_news_of_nodes:
            self._slurm_told = self._desk.now
        for name, node in view.nodes.items():
            vm = machines.get(name)
            if node.responding and node.state != "down":
                self._heard[name] = self._desk.now
            if vm is not None and vm.state == VMState.READY:
                self._absent_nodes.end(name)
                self._update_ready(vm, node_sight(node), node)
        for vm in machines.having(VMState.BOOTING):
            self._update_booting(vm, view.nodes.get(vm.name))
        if view.is_complete and is_news_of_nodes:
            for vm in machines.having(VMState.READY):
                if vm.name not in view.nodes:
                    self._look_for_node(vm)

    def _look_for_node(self, vm: VM) -> None:
        """A node that Slurm has no record of takes no job; its absence counts only when it lasts."""
        if self._absent_nodes.last(vm.name, self._desk.now, _ABSENT_NODE):
            self._update_ready(vm, Node.ABSENT, None)

    def _update_booting(self, vm: VM, node: NodeStatus | None) -> None:
        boots_for, timeout = self._desk.now - vm.requested, self._desk.config.boot_timeout
        if node is None and boots_for <= timeout:
            return
        reason = "" if node is None else node.reason
        sight = Sight(
            vm.state,
            node=node_sight(node),
            is_taken_back=reclaimed_by(reason) is not None,
            boots_for=boots_for,
            boot_timeout=timeout,
        )
        match decide(sight):
            case Action.JOIN:
                for ready in self._desk.gangs.joined(vm):
                    self._has_booted(ready)
            case Action.LOSE:
                self.lose(vm, "EC2 takes the spot machine back")
            case Action.FAIL_BOOT if sight.node in (Node.REFUSED, Node.DRAINING, Node.DRAINED):
                self._fail_boot(vm, f"Slurm does not accept the node: {reason}")
            case Action.FAIL_BOOT:
                self._fail_boot(
                    vm, f"no Slurm node after {timeout:.0f} s (--schlouder-boot-timeout)"
                )

    def _has_booted(self, vm: VM) -> None:
        desk = self._desk
        vm.ready, vm.idle_since = desk.now, desk.now
        desk.move(vm, VMState.READY)
        if vm.boot_time is not None:
            desk.boots.learn(vm.boot_time, vm.beside)
        desk.launcher.has_booted()
        self._just_joined.append(vm.name)
        desk.note(vm, f"ready after {desk.now - vm.requested:.0f} s")

    def _update_ready(self, vm: VM, seen: Node, node: NodeStatus | None) -> None:
        reason = "" if node is None else node.reason
        end = reclaimed_by(reason)
        match decide(Sight(vm.state, node=seen, is_taken_back=end is not None)):
            case Action.LOSE if seen == Node.ABSENT:
                self.lose(vm, "Slurm no longer has the node", is_dead=True)
            case Action.LOSE:
                self.lose(vm, f"Slurm lost the node: {reason}", is_dead=True)
            case Action.RECALL if end is not None:
                self._taken_back(vm, end)
            case Action.TAKE_OUT:
                self.take_out(vm, f"was drained by somebody else: {reason}")

    def take_out(self, vm: VM, why: str) -> None:
        """A VM in use gets no further tasks, and those that have not begun there are given back; what runs
        ends."""
        if vm.state != VMState.READY:
            return
        self._desk.requeue_planned(vm)
        self._desk.move(vm, VMState.DRAINING)
        self._desk.note(vm, why)
        self._recall([t for t in vm.active.values() if t.state == TaskState.SUBMITTED])

    def _taken_back(self, vm: VM, end: float) -> None:
        """EC2 takes a spot machine back at `end`, of which the machine itself has told Slurm. What runs there
        and will not be done by then is run elsewhere at once."""
        vm.reason, vm.leaves_by = "EC2 takes the spot machine back", end
        self._desk.log.info(
            f"{self._desk.name(vm)}: {vm.reason} at {time.strftime('%X', time.localtime(end))}."
        )
        self.take_out(vm, vm.reason)
        running = self._desk.gangs.leader(vm).active.values()
        self._recall([t for t in running if t.started and t.started + t.walltime > end])

    def keep_gangs_together(self) -> None:
        """Who leaves a gang takes the others along: at once if it was lost, else when nothing runs there, as
        when EC2 is about to take it back."""
        for vm, other in self._desk.gangs.torn():
            if other.reason and other.state != VMState.DRAINING:
                self.lose(vm, f"its gang lost {other.name}: {other.reason}")
            elif vm.is_booting:
                self._desk.requeue_planned(vm)
                self.end([vm])
            else:
                self.take_out(vm, f"leaves with {other.name}")

    # -- idle VMs, and the word that the others wait for

    def retire_idle(self) -> None:
        """Idle VMs whose date has come are drained, and machines that nobody waits for any more are ended
        while they boot."""
        desk = self._desk
        leaving = [vm for vm in self._retirable() if self._is_to_go(vm)]
        for vm in leaving:
            desk.move(vm, VMState.DRAINING)
            desk.note(vm, "draining")
        desk.flush()
        if leaving:
            names = [vm.name for vm in leaving]
            desk.try_cluster(lambda: desk.cluster.drain(names, "schlouder: no work left"))
        booting = desk.machines.having(VMState.BOOTING)
        sights = ((vm, Sight(vm.state, is_wanted=desk.is_needed(vm))) for vm in booting)
        self.end([vm for vm, sight in sights if decide(sight) == Action.END])

    def _retirable(self) -> list[VM]:
        """The idle VMs that may have to go now: those whose date has come, or all of them when
        somebody else waits for their place or nobody is left to use them."""
        desk, planner = self._desk, self._desk.planner
        for vm in desk.machines.newly_idle():
            left = planner.retires_in(vm, desk.now)
            desk.machines.retire_at(vm, desk.now + max(0.0, left))
        if desk.is_stopping or planner.is_starved or planner.has_idle_for_nothing:
            return list(desk.machines.idle.values())
        return desk.machines.due(desk.now)

    def _is_to_go(self, vm: VM) -> bool:
        return decide(Sight(vm.state, retires=self._may_leave(vm))) == Action.DRAIN

    def _may_leave(self, vm: VM) -> bool:
        desk = self._desk
        is_of_use = not desk.is_stopping and desk.planner.may_keep(vm)
        left = desk.planner.retires_in(vm, desk.now) if is_of_use else 0.0
        left = max(left, self._stays_for_others(vm))
        if left > 0:
            desk.machines.retire_at(vm, desk.now + left)
        return left <= 0

    def _stays_for_others(self, vm: VM) -> float:
        """Seconds for which an idle VM is worth keeping for the next run, where it stands in nobody's way."""
        desk, config = self._desk, self._desk.config
        if not desk.keeps_vms or desk.planner.is_starved or vm.nodes > 1:
            return 0.0
        idle_for = desk.now - (desk.now if vm.idle_since is None else vm.idle_since)
        return config.keep.left(config.billing, vm.uptime(desk.now), idle_for)

    def renew_leases(self) -> None:
        """Of every VM that has joined, and at once of those that just have: their first lease is long."""
        desk = self._desk
        is_due = desk.now - self._renewed >= desk.config.lease / lease.RENEWALS
        up = desk.machines.having(VMState.READY, VMState.DRAINING)
        names = [vm.name for vm in up] if is_due else self._just_joined
        given = lease.Lease(desk.config.run, round(desk.config.lease), round(desk.now))
        if names and desk.try_cluster(lambda: desk.cluster.renew(names, given)):
            self._just_joined = []
            if is_due:
                self._renewed = desk.now

    @property
    def leases_end(self) -> float:
        """The date until which the VMs stay by the last word that they have had."""
        return self._renewed + self._desk.config.lease

    # -- the end of a VM

    def finish(self, view: ClusterView) -> None:
        """Drained VMs are ended; records of VMs that are no more are deleted from Slurm."""
        ending = []
        for vm in self._desk.machines.having(*LEAVING):
            node = view.nodes.get(vm.name)
            match decide(self._sight_of_leaving(vm, node)):
                case Action.END if vm.state == VMState.DRAINING:
                    self.delete_node(vm)
                    ending.append(vm)
                case Action.END:
                    ending.append(vm)
                case Action.LOSE if node is not None:
                    self.lose(vm, f"Slurm lost the node: {node.reason}", is_dead=True)
                case Action.DRAIN_AGAIN:
                    self._drain_again(vm.name)
                case Action.MIND_GUEST:
                    self._warn_of_guest(vm)
                case Action.FORGET:
                    self.delete_node(vm)
        self.end(ending)

    def _sight_of_leaving(self, vm: VM, node: NodeStatus | None) -> Sight:
        """A node stays until Slurm has ended what was pinned to it: a later node may get its place in Slurm's
        table, and with it the job."""
        return Sight(
            vm.state,
            node=node_sight(node),
            is_used=not self._has_nothing_left(vm),
            is_left_to_ec2=self._is_left_to_ec2(vm),
            is_overdue=self._is_overdue(vm),
            is_bound=bool(self._desk.gangs.leader(vm).active),
            has_node=node is not None or not vm.node_deleted,
        )

    def _has_nothing_left(self, vm: VM) -> bool:
        """Whether no task runs there; those of a leader that was given up wait for the ends of its
        companions."""
        leader = self._desk.gangs.leader(vm)
        return leader.is_unused or leader.state in (VMState.TERMINATING, VMState.GONE)

    def _is_left_to_ec2(self, vm: VM) -> bool:
        """Whether EC2 is about to end the machine, and will charge nothing for it then."""
        if vm.leaves_by is None or vm.uptime(vm.leaves_by) >= FREE_WHEN_TAKEN:
            return False
        return self._desk.now < vm.leaves_by + _RECLAIM_PATIENCE

    def _is_overdue(self, vm: VM) -> bool:
        """Whether the machine must be asked again to end: nobody heard, or nothing happened."""
        waited = math.inf if vm.ended is None else self._desk.now - vm.ended
        return waited == math.inf or (not vm.ending and waited > _TERMINATE_PATIENCE)

    def _drain_again(self, name: str) -> None:
        cluster = self._desk.cluster
        self._desk.try_cluster(lambda: cluster.drain([name], "schlouder: no work left"))

    def _warn_of_guest(self, vm: VM) -> None:
        since = self._desk.gangs.leader(vm).idle_since
        if since is not None and self._desk.now - since > _GUEST_PATIENCE:
            self._desk.tell(f"{self._desk.name(vm)} is kept: a job of somebody else runs there")

    def lose(self, vm: VM, reason: str, is_dead: bool = False) -> None:
        """The machine is no good. It may still write, so it is ended first; its tasks wait for that
        (`close`). What was only planned for it is planned anew at once. One on which a job of somebody else
        may run is emptied instead, and ended when that has: to be called again until then. `is_dead`: EC2 or
        Slurm say that nothing runs there."""
        if vm.state in (VMState.TERMINATING, VMState.GONE):
            return
        desk = self._desk
        is_up = vm.state in (VMState.READY, VMState.DRAINING)
        if is_up and not is_dead and self._may_have_guest(vm):
            self.take_out(vm, reason)
            self._recall(list(vm.active.values()))
            return
        vm.reason = reason
        desk.log.warning(f"{desk.name(vm)} is given up: {reason}")
        desk.move(vm, VMState.TERMINATING)
        desk.note(vm, f"given up: {reason}")
        desk.requeue_planned(vm)
        self._recall(list(vm.active.values()))
        desk.try_cluster(lambda: desk.cluster.fail(vm.name, "schlouder: machine lost"))
        self.end([vm])

    def _may_have_guest(self, vm: VM) -> bool:
        """Whether a job of somebody else runs there, for all that is known."""
        desk = self._desk
        try:
            guests = desk.cluster.foreign_jobs(desk.config.job_name).get(vm.name)
        except ClusterUnavailable as error:
            desk.tell(f"Slurm does not answer: {error}")
            return True
        if guests:
            desk.tell(
                f"{desk.name(vm)} is no good any more, but kept until Slurm job {', '.join(guests)} of "
                "somebody else has ended there"
            )
        return bool(guests)

    def _fail_boot(self, vm: VM, reason: str) -> None:
        desk = self._desk
        console = desk.cloud.console(vm.instance_id) if vm.instance_id else ""
        desk.launcher.boot_failed(reason)
        self.lose(vm, reason)
        tail = "\n".join(f"    {line}" for line in console.splitlines()[-_CONSOLE_LINES:])
        if tail:
            desk.log.warning(f"Console of {desk.name(vm)}, last lines:\n{tail}")

    def end(self, vms: Collection[VM]) -> None:
        """Asks for the machines' end; `describe` sees when it is done, and asks again if it is not."""
        desk = self._desk
        for vm in vms:
            desk.move(vm, VMState.TERMINATING)
            desk.note(vm, "terminating")
        desk.flush()
        ids = {vm.instance_id: vm for vm in vms if vm.instance_id is not None}
        if ids:
            try:
                desk.cloud.terminate(list(ids))
                self._described = -math.inf
                for vm in ids.values():
                    vm.ended = desk.now
            except CloudUnavailable as error:
                names = ", ".join(vm.name for vm in ids.values())
                desk.tell(f"{names}: not ended yet, will ask again: {error}", logging.WARNING)
        for vm in vms:
            if vm.instance_id is None:
                self.close(vm)

    def close(self, vm: VM) -> None:
        """The machine is gone for certain: nothing of it can write any more."""
        desk = self._desk
        vm.ended = vm.ended or desk.now
        vm.ending = True
        if vm.instance_id and self._makes_room(vm):
            desk.launcher.machine_ended(vm.market)
        elif vm.instance_id is None and vm.token:
            desk.orphans_until = desk.now + CONSISTENCY_WINDOW
        never_asked_for = vm.state == VMState.PLANNED and not vm.retry_at
        vm.node_deleted |= vm.instance_id is None and never_asked_for
        desk.move(vm, VMState.GONE)
        desk.note(vm, "gone")
        if not vm.node_deleted:
            desk.try_cluster(lambda: desk.cluster.fail(vm.name, "schlouder: machine gone"))

    def _makes_room(self, vm: VM) -> bool:
        """Whether its end may lift a quota: not that of a gang which was not complete, for the next one would
        be refused as well."""
        leader = self._desk.gangs.leader(vm)
        return leader.nodes == 1 or leader.ready is not None

    def delete_node(self, vm: VM) -> None:
        """Removes Slurm's record, unless a job is still there."""
        desk = self._desk

        def delete() -> None:
            vm.node_deleted = desk.cluster.delete(vm.name)
            desk.machines.note(vm)

        desk.try_cluster(delete)
