"""The end of a run: its jobs are cancelled, its VMs given back, its nodes removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..model import VM, VMState
from ..provision import CloudUnavailable, Instance
from ..slurm import ClusterUnavailable
from .attempts import Attempts
from .desk import Desk
from .keeper import Keeper

_PATIENCE = 30.0
_NODE_PATIENCE = 10.0
_ORPHAN_PATIENCE = 10.0
_PAUSE = 0.2
_LAST_BREATH = 2.0


class Ending:
    """Needs time: `sleep` waits, `clock` tells the date."""

    def __init__(
        self,
        desk: Desk,
        attempts: Attempts,
        keeper: Keeper,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        revoke: Callable[[str], bool],
    ) -> None:
        self._desk = desk
        self._attempts = attempts
        self._keeper = keeper
        self._clock = clock
        self._sleep = sleep
        self._revoke = revoke
        self._is_cancelled = False

    def release(self) -> bool:
        """Cancels what still runs and ends every VM on which nobody else's job runs; whether all of it is
        done."""
        left = [vm for vm in self._desk.machines if not vm.is_settled]
        foreign = self._clear_slurm()
        self._attempts.give_up()
        doomed = [vm for vm in left if vm.name not in foreign]
        self._end_all(doomed)
        released = self._await_end(doomed)
        self._desk.flush()
        self._tell_what_is_left(left, foreign)
        return released

    def _clear_slurm(self) -> Mapping[str, list[str]]:
        """Cancels the run's jobs, stops the nodes from taking others; returns the nodes with jobs of
        somebody else, by name. A job that could not be cancelled does nothing if it begins after all."""
        desk = self._desk
        names = [vm.name for vm in desk.machines.having(VMState.READY, VMState.DRAINING)]
        if not self.cancel_jobs():
            for task in self._attempts.submitted.values():
                self._revoke(desk.config.exit_file(task))
        desk.try_cluster(lambda: desk.cluster.drain(names, "schlouder: the run has ended"))
        try:
            return desk.cluster.foreign_jobs(desk.config.job_name)
        except ClusterUnavailable as error:
            desk.log.warning(f"Slurm does not answer; VMs are given back all the same: {error}")
            return {}

    def cancel_jobs(self) -> bool:
        """Once; False as long as Slurm has not heard of it."""
        self._is_cancelled = self._is_cancelled or self._desk.try_cluster(
            lambda: self._desk.cluster.cancel_run(self._desk.config.job_name)
        )
        return self._is_cancelled

    def _end_all(self, vms: Sequence[VM]) -> None:
        """In one call; machines whose launch was never answered are found by the run's tag. Those that are
        known are ended even while EC2 lists none."""
        desk = self._desk
        ids = {vm.instance_id for vm in vms if vm.instance_id is not None}
        others = (vm for vm in desk.machines if vm.state != VMState.GONE)
        kept = {vm.instance_id for vm in others} - {vm.instance_id for vm in vms}
        for vm in vms:
            if vm.state != VMState.GONE:
                desk.move(vm, VMState.TERMINATING)
                desk.note(vm, "terminating")
        desk.flush()
        listed = self._list_alive()
        for instance in listed or ():
            unanswered = desk.machines.get(instance.node)
            if unanswered is not None and unanswered.instance_id is None:
                self._keeper.book_stray(unanswered, instance)
        ids |= {instance.id for instance in listed or ()} - kept
        try:
            if ids:
                desk.cloud.terminate(sorted(ids))
        except CloudUnavailable as error:
            desk.tell(f"The VMs are not ended yet: {error}")
            return
        for vm in vms:
            if vm.instance_id is not None:
                vm.ended = vm.ended or desk.now
            elif listed is not None and vm.state != VMState.GONE:
                self._keeper.close(vm)

    def _list_alive(self) -> list[Instance] | None:
        """The machines of the run; None while EC2 does not tell."""
        try:
            return [i for i in self._desk.cloud.instances(self._desk.config.run) if i.is_alive]
        except CloudUnavailable as error:
            self._desk.tell(f"EC2 does not list the VMs: {error}")
            return None

    def _await_end(self, vms: Sequence[VM]) -> bool:
        """Asks until the cloud says that all of them are ending and Slurm has no node of theirs; a
        machine that is ending costs nothing more, so that its last breath is waited for only shortly,
        and its node, which never did, not much longer; nor is a machine whose launch was not answered, and
        which Describe may not show yet. False if that did not come about."""
        desk = self._desk
        begun = asked = desk.now
        while desk.now - begun < _PATIENCE:
            self._keeper.describe()
            self._remove_nodes(vms)
            waited, ending = desk.now - begun, all(vm.ending for vm in vms)
            if waited < _ORPHAN_PATIENCE and desk.now < desk.orphans_until:
                ending = False
            gone = waited > _LAST_BREATH or all(vm.state == VMState.GONE for vm in vms)
            if ending and gone and all(vm.node_deleted for vm in vms):
                return True
            if ending and waited > _NODE_PATIENCE:
                return False
            self._sleep(_PAUSE)
            desk.now = self._clock()
            if desk.now - asked > desk.config.describe_every:
                asked = desk.now
                self._end_all([vm for vm in vms if not vm.ending])
        return False

    def _remove_nodes(self, vms: Sequence[VM]) -> None:
        """Not before Slurm has ended what was pinned to them, as in `Keeper`."""
        if self.cancel_jobs():
            for vm in vms:
                if not vm.node_deleted:
                    self._remove_node(vm)

    def _remove_node(self, vm: VM) -> None:
        """A node that is still busy with our own ending jobs must be down before Slurm deletes it."""
        self._keeper.delete_node(vm)
        if not vm.node_deleted and vm.ending:
            self._desk.try_cluster(
                lambda: self._desk.cluster.fail(vm.name, "schlouder: machine gone")
            )
            self._keeper.delete_node(vm)

    def _tell_what_is_left(self, vms: Sequence[VM], foreign: Mapping[str, list[str]]) -> None:
        desk = self._desk
        for vm in vms:
            if not vm.ending:
                desk.log.warning(f"{desk.name(vm)} is still there: {self._why_kept(vm, foreign)}")
        names = ",".join(vm.name for vm in vms if vm.ending and not vm.node_deleted)
        if names:
            desk.log.warning(
                "Slurm still has nodes of machines that are gone; remove them with "
                f"`scancel --name={desk.config.job_name}`, "
                f"`scontrol update nodename={names} state=down reason=gone` and "
                f"`scontrol delete nodename={names}`"
            )

    def _why_kept(self, vm: VM, foreign: Mapping[str, list[str]]) -> str:
        if vm.name in foreign:
            jobs = ", ".join(foreign[vm.name])
            return (
                f"Slurm job {jobs} on it is not of this run; end it with "
                f"`aws ec2 terminate-instances --instance-ids {vm.instance_id}` when that job is done"
            )
        return (
            "EC2 did not confirm its end, it may go on to cost money; end it with "
            f"`aws ec2 terminate-instances --instance-ids {vm.instance_id}`"
        )
