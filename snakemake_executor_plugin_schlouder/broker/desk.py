"""What all rooms of the broker share: what it was told, its ports and books, its machines, and the date of
this round."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import job_files, lease, order
from ..gangs import Gangs
from ..keeping import Keep
from ..launcher import Launcher, Limits
from ..machines import Machines
from ..market.offers import Offer, Offers
from ..market.tariff import Tariff
from ..model import VM, Billing, InstanceType, Task, TaskState, VMState
from ..planning import Planner
from ..pool import Goal
from ..prediction import BootPredictor, LearnedBoots, Walltimes
from ..provision import Cloud, CloudUnavailable
from ..slurm import Cluster, ClusterUnavailable
from .notebook import Books, Notebook

RECLAIMS = 3
"""Spot machines that may be taken back under a task before it moves to one on demand."""

CONSISTENCY_WINDOW = 120.0
"""Seconds after a launch for which Describe may not show its machine."""

_ABSENT_VIEWS = 3


@dataclass(frozen=True)
class BrokerConfig:
    """What the broker is told; `types` in the user's order of preference, `boot_timeout` in seconds, the
    `zones` of each type by its name; the `reserved` ones are only for tasks that name them. `reclaims`: spot
    machines that may be taken back under a task.
    `describe_every`: seconds between two looks at EC2 while machines boot or end. `order`: that of the
    waiting tasks, where their strategy has none of its own. `asks_seldom`: exit-code files tell of ends
    as soon as Slurm would, so that Slurm need not be asked every round. `launch_timeout`: seconds that a
    job may run, for Slurm, before its script begins. `shares_files`: whether the VMs see `workdir`; if not,
    exit-code files are only names, and Slurm's output stays on the VM. `lease`: seconds that a VM stays
    without a word from us. `keep`: how long idle VMs stay for the next run. `slurm_is_true`: scripts leave
    nothing, Slurm's word is enough, as in a simulation."""

    run: str
    workdir: Path
    partition: str
    types: tuple[InstanceType, ...]
    max_vms: int
    billing: Billing
    boot_timeout: float
    describe_every: float = 3.0
    goal: Goal = field(default_factory=Goal)
    sharing: bool = True
    order: str = order.SUBMISSION
    asks_seldom: bool = False
    launch_timeout: float = math.inf
    tariff: Tariff = field(default_factory=Tariff.unknown)
    zones: Mapping[str, Sequence[str]] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    reclaims: int = RECLAIMS
    reserved: tuple[str, ...] = ()
    shares_files: bool = True
    lease: float = lease.DEFAULT
    keep: Keep = field(default_factory=Keep)
    slurm_is_true: bool = False

    @property
    def job_name(self) -> str:
        """The Slurm name of every job of the run."""
        return f"schlouder-{self.run}"

    @property
    def files(self) -> Path:
        """Job logs and exit codes, on the workflow's file system."""
        return job_files.folder(self.workdir) / self.run

    def log_file(self, task: Task) -> str:
        return f"{self._files}/{job_files.log_name(task)}"

    def bundle_log(self, task: Task) -> str:
        """What the bundle of its last attempt says beside its tasks' own logs: nothing, unless it could
        not begin."""
        return f"{self._files}/{job_files.bundle_log_name(task.submission)}"

    def exit_file(self, task: Task) -> str:
        return f"{self._files}/{job_files.exit_name(task, task.attempt)}"

    @functools.cached_property
    def _files(self) -> str:
        return str(self.files)


class Desk:
    """`now` is the date of this round (s), `waiting` the tasks that no VM has, in their order;
    `is_stopping`: nothing further is started, for `why_stopping`. A machine whose launch was never answered
    may show itself until `orphans_until`. `keeps_vms`: idle ones may stay for the next run."""

    def __init__(
        self,
        config: BrokerConfig,
        cloud: Cloud,
        cluster: Cluster,
        books: Books,
        log: logging.Logger,
        now: float,
        boots: BootPredictor | None,
        walltimes: Walltimes | None,
    ) -> None:
        self.config = config
        self.cloud = cloud
        self.cluster = cluster
        self.log = log
        self.now = now
        self.books = Notebook(config.run, books, log)
        self.boots = boots or LearnedBoots()
        self.walltimes = walltimes or Walltimes()
        self.machines = Machines()
        self.gangs = Gangs()
        self.offers = Offers(config.types, config.tariff, config.zones, config.reserved)
        self.launcher = Launcher(config.run, self.offers, config.billing, config.limits)
        self.planner = Planner(
            self.offers,
            config.billing,
            self.boots,
            self.walltimes,
            self.new_vm,
            config.goal,
            config.sharing,
            config.order,
        )
        self.waiting: list[Task] = []
        self.vm_count = 0
        self.is_stopping = False
        self.why_stopping = "the run is being ended"
        self.is_over = False
        self.keeps_vms = False
        self.orphans_until = -math.inf

    def new_vm(self, strategy: str, offer: Offer, boot_time: float) -> VM:
        self.vm_count += 1
        name = f"schlouder-{self.config.run}-{self.vm_count}"
        kind, market, price = offer.kind, offer.market, offer.price
        return VM(name, strategy, kind, self.now, boot_time, market, price)

    # -- VMs and what is planned for them

    def vm_of(self, task: Task) -> VM:
        """The VM of a task that has one."""
        vm = self.machines.get(task.vm)
        assert vm is not None
        return vm

    def name(self, vm: VM) -> str:
        """For people."""
        return f"VM {vm.instance_id or '(not started)'} ({vm.name})"

    def is_needed(self, vm: VM) -> bool:
        return self.planner.needs(self.gangs.leader(vm))

    def move(self, vm: VM, state: VMState) -> None:
        """Gives `vm` another state, and sees that books and plans hear of it."""
        self.machines.move(vm, state)
        if state == VMState.READY:
            vm.recount(self.now)
        if vm.is_open:
            self.changed(vm)
        else:
            self.planner.closed(vm, self.now)

    def changed(self, vm: VM) -> None:
        """What `vm` does, or is to do, has changed."""
        self.machines.note(vm)
        self.planner.changed(vm)

    def requeue_planned(self, vm: VM) -> None:
        """What was only planned for `vm` is planned anew."""
        for task in vm.queue:
            task.state, task.vm = TaskState.PENDING, None
            self.books.task(task)
        self.waiting[:0] = vm.queue
        vm.queue.clear()
        vm.recount(self.now)
        self.changed(vm)

    # -- books and ports

    def note(self, vm: VM, what: str) -> None:
        self.books.vm(vm, (self.now, vm.name, what))
        self.log.debug(f"{self.name(vm)}: {what}")

    def flush(self) -> bool:
        """Whether all that was noted is written down."""
        done = self.books.flush(self.now)
        if not self.is_stopping and self.books.is_lost(self.now):
            self.is_stopping = True
            self.log.error("The journal stays unwritable; the run ends with what is running.")
        return done

    def tell(self, message: str, level: int = logging.WARNING, about: str = "") -> None:
        self.books.tell(message, level, about)

    def try_cluster(self, action: Callable[[], object]) -> bool:
        """For what may be left undone when Slurm is away: it is repeated or has no effect on cost. Returns
        whether it is done."""
        try:
            action()
        except ClusterUnavailable as error:
            self.tell(f"Slurm does not answer: {error}")
            return False
        return True

    def try_cloud(self, action: Callable[[], object]) -> bool:
        """The same for EC2."""
        try:
            action()
        except CloudUnavailable as error:
            self.tell(f"EC2 does not answer: {error}")
            return False
        return True


class Absences:
    """What one reading after the other lacks; that counts only when it lasts."""

    def __init__(self) -> None:
        self._since: dict[str, tuple[int, float]] = {}

    def last(self, name: str, now: float, patience: float) -> bool:
        """Counts one more reading without `name`; whether it has been missing for `patience` seconds."""
        seen, since = self._since.get(name, (0, now))
        self._since[name] = (seen + 1, since)
        return seen + 1 >= _ABSENT_VIEWS and now - since >= patience

    def end(self, name: str) -> None:
        """It was seen, or need not be looked for any more."""
        self._since.pop(name, None)
