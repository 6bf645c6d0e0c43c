"""Gangs: the VMs of tasks that span several, started together, used together, given back together.

Planner and strategies know of a gang only its leader, whose tasks run on its companions too. A companion is
a VM like others, with a launch, a boot and a bill of its own, but is given no tasks. A leader counts as
booting until all its companions are up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .market.offers import Offer
from .model import VM, VMState

_ENDING = (VMState.TERMINATING, VMState.GONE)


class Gangs:
    """Which VMs belong together. A VM without companions is a gang of its own."""

    def __init__(self) -> None:
        self._members: dict[str, list[VM]] = {}
        self._standing: dict[str, list[VM]] = {}
        self._up: set[str] = set()

    def assemble(self, leader: VM, new_vm: Callable[[str, Offer, float], VM]) -> Sequence[VM]:
        """The leader and the companions it is to have, made by `new_vm`."""
        gang, offer = [leader], Offer(leader.type, leader.market, leader.price)
        while len(gang) < leader.nodes:
            vm = new_vm(leader.strategy, offer, leader.boot_planned)
            vm.leader, vm.beside = leader.name, leader.beside + len(gang)
            gang.append(vm)
        if len(gang) > 1:
            self._members[leader.name] = self._standing[leader.name] = gang
        return gang

    def adopt(self, vms: Sequence[VM]) -> None:
        """Puts together what another process has assembled."""
        named = {vm.name: vm for vm in vms}
        for vm in vms:
            if vm.leader is not None:
                gang = self._members.setdefault(vm.leader, [named[vm.leader]])
                gang.append(vm)
                gang[0].nodes = len(gang)
        self._standing.update(self._members)
        self._up.update(vm.name for vm in vms if not vm.is_booting)

    def members(self, vm: VM) -> Sequence[VM]:
        """All VMs of the gang of `vm`, the leader first."""
        return self._members.get(vm.leader or vm.name, (vm,))

    def leader(self, vm: VM) -> VM:
        return vm if vm.leader is None else self.members(vm)[0]

    def companions(self, vm: VM) -> Sequence[VM]:
        """The other VMs on which the tasks of `vm` run."""
        return self.members(vm)[1:] if vm.nodes > 1 else ()

    def joined(self, vm: VM) -> list[VM]:
        """Who is ready now that the node of `vm` is up; the leader is not before all are."""
        self._up.add(vm.name)
        leader = self.leader(vm)
        ready = [vm] if vm.leader else []
        if leader.is_booting and all(member.name in self._up for member in self.members(vm)):
            ready.append(leader)
        return ready

    def is_up(self, vm: VM) -> bool:
        """Whether its own node has joined, be it that others of its gang have not."""
        return vm.name in self._up

    def is_gone(self, vm: VM) -> bool:
        """Whether no machine on which its tasks ran can write any more."""
        return all(member.state == VMState.GONE for member in self.members(vm))

    def has_lost(self, vm: VM) -> bool:
        """Whether one of the machines on which its tasks run was lost."""
        return any(_is_lost(member) for member in self.members(vm))

    def torn(self) -> Iterator[tuple[VM, VM]]:
        """VMs that could go on but must not, because another one of their gang leaves, each with that: all
        that are still there once one was lost, else those that still take tasks."""
        for name, gang in list(self._standing.items()):
            if all(vm.state in _ENDING for vm in gang):
                del self._standing[name]
                continue
            lost = next((vm for vm in gang if _is_lost(vm)), None)
            leaver = lost or next((vm for vm in gang if not vm.is_open), None)
            if leaver is not None:
                leaving = _ENDING if lost else (VMState.DRAINING, *_ENDING)
                yield from ((vm, leaver) for vm in gang if vm.state not in leaving)


def _is_lost(vm: VM) -> bool:
    """One that EC2 is about to take back is not lost yet."""
    return bool(vm.reason) and vm.state in _ENDING
