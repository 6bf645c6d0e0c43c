"""The one loop: observe, decide, act. Owns the fleet's life cycle, the queues and the retries.

Knows neither boto3 nor subprocess nor Snakemake: it speaks to the ports `Cloud` and `Cluster` and
writes to the journal what it is about to do.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Protocol

from . import job_files, lease, order
from .bundles import Bundles, slack, take_bundle
from .gangs import Gangs
from .journal import Remains
from .launcher import Launcher, Limits
from .machines import Machines
from .market.offers import Offer, Offers
from .market.tariff import Tariff
from .model import (
    BOOTING,
    FREE_WHEN_TAKEN,
    NEVER,
    ONLY,
    PREFER,
    SPOT,
    TASK_ENDED,
    VM,
    Billing,
    InstanceType,
    Task,
    TaskState,
    VMState,
)
from .planning import Planner
from .pool import Announcement, Goal
from .prediction import BootPredictor, LearnedBoots, Walltimes
from .provision import (
    Cloud,
    CloudUnavailable,
    Instance,
    LaunchOutcome,
    NoCapacity,
    QuotaReached,
    TokenSpent,
)
from .slurm import (
    Cluster,
    ClusterUnavailable,
    ClusterView,
    JobRequest,
    JobStatus,
    NodeStatus,
    SubmissionRefused,
    SubmitOutcome,
)
from .slurm.script import (
    TIMED_OUT,
    VM_DIRECTORY,
    BundledJob,
    Exit,
    WitnessSilent,
    bundle_script,
    exit_of,
    has_begun,
    job_script,
    revoke,
    vm_log,
)
from .slurm.states import JobPhase, advice_on, failure_of, sentence_of

MAX_LOSSES = 3
"""Machines a task may lose before it counts as failed."""

RECLAIMS = 3
"""Spot machines that may be taken back under a task before it moves to one on demand."""

_LEAVING = (VMState.DRAINING, VMState.TERMINATING, VMState.GONE)
_MOVING = (*BOOTING, VMState.TERMINATING)
_NODE_MOVING = (VMState.BOOTING, VMState.DRAINING, VMState.GONE)
"""States in which the next step depends on what Slurm says of the node."""

_VOID = (TaskState.FAILED, TaskState.CANCELLED)
_CLAIMED = (
    *("command", "name", "ends_run", "limit", "planned", "is_limit", "may_bundle", "options"),
    *("strategy", "after", "level", "rank", "spot"),
)
"""What a task that goes on takes over from the one that stands for it in the new run."""

_NODES_SELDOM = 5.0
_ASK_OFTEN, _ASK_SELDOM = 2.0, 15.0
_FEW = 4
_STUCK_PATIENCE = 10.0
_ABSENT_VIEWS = 3
_ABSENT_JOB = 5.0
_ABSENT_NODE = 20.0
_LATE_SUBMISSION = 15.0
_ABSENT_DESCRIBES = 5
_CONSISTENCY_WINDOW = 120.0
_DESCRIBE_SELDOM = 15.0
_JOURNAL_PATIENCE = 300.0
_TERMINATE_PATIENCE = 60.0
_GUEST_PATIENCE = 30.0
_RELEASE_PATIENCE = 30.0
_NODE_PATIENCE = 10.0
_ORPHAN_PATIENCE = 10.0
_RELEASE_PAUSE = 0.2
_LAST_BREATH = 2.0
_CONSOLE_LINES = 15
_RECLAIM_PATIENCE = 180.0


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
    without a word from us."""

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


class Books(Protocol):
    """Where the broker writes what it is about to do."""

    def write(
        self,
        run: str,
        vms: Iterable[VM] = (),
        tasks: Iterable[Task] = (),
        events: Iterable[tuple[float, str, str]] = (),
    ) -> None: ...


class Broker:
    """`claim`, `submit`, `tick`, `stop`, `hurry` and `release` may be called from different threads."""

    def __init__(
        self,
        config: BrokerConfig,
        cloud: Cloud,
        cluster: Cluster,
        journal: Books,
        log: logging.Logger,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        boots: BootPredictor | None = None,
        walltimes: Walltimes | None = None,
        witness: Callable[[str], Exit | None] = exit_of,
        revoke: Callable[[str], bool] = revoke,
        begun: Callable[[str], bool] = has_begun,
        script: Callable[[str, str, str], str] = job_script,
    ) -> None:
        """`witness` reads how a job's script ended from the file it left, None if there is none, and raises
        WitnessSilent where that cannot be told; `revoke`
        forbids the script with this exit-code file to begin, and says whether it has begun, as `begun`
        does; `script` writes one that runs a command and leaves its exit code in a file."""
        self._config = config
        self._cloud = cloud
        self._cluster = cluster
        self._journal = journal
        self._log = log
        self._clock = clock
        self._sleep = sleep
        self._boots = boots or LearnedBoots()
        self._walltimes = walltimes or Walltimes()
        self._witness = witness
        self._revoke = revoke
        self._begun = begun
        self._script = script
        self._lock = threading.RLock()
        self._now = clock()
        self._inbox: list[Task] = []
        self._unclaimed: dict[str, Task] = {}
        self._claims = threading.RLock()
        self._claimed: list[Task] = []
        self._replaced: dict[str, list[Task]] = {}
        self._held: list[Task] = []
        self._unwritten: list[Task] = []
        self._offers = Offers(config.types, config.tariff, config.zones, config.reserved)
        self._launcher = Launcher(config.run, self._offers, config.billing, config.limits)
        self._planner = Planner(
            self._offers,
            config.billing,
            self._boots,
            self._walltimes,
            self._new_vm,
            config.goal,
            config.sharing,
            config.order,
        )
        self._waiting: list[Task] = []
        self._machines = Machines()
        self._gangs = Gangs()
        self._submitted: dict[str, Task] = {}
        self._bundles = Bundles(witness, revoke, config.exit_file)
        self._absent_jobs: dict[str, tuple[int, float]] = {}
        self._absent_nodes: dict[str, tuple[int, float]] = {}
        self._absent_vms: dict[str, int] = {}
        self._stopping = False
        self._why_stopping = "the run is being ended"
        self._is_over = False
        self._is_cancelled = False
        self._released = False
        self._vm_count = 0
        self._described = -math.inf
        self._orphans_until = -math.inf
        self._nodes_seen = -math.inf
        self._renewed = -math.inf
        self._asked = -math.inf
        self._news = self._now
        self._stuck: dict[str, float] = {}
        self._ended: list[Task] = []
        self._dirty_vms: dict[str, VM] = {}
        self._dirty_tasks: dict[str, Task] = {}
        self._events: list[tuple[float, str, str]] = []
        self._journal_failed: float | None = None
        self._told: set[str] = set()

    # -- what the executor calls

    def expect(self, tasks: Iterable[Announcement]) -> None:
        """Announces tasks that may come, so that machines can be chosen and kept with them in view."""
        self._planner.expect(tasks)

    def adopt(self, left: Remains) -> None:
        """Goes on with what a killed run of this name has left; before the first tick."""
        self._vm_count = left.vm_count
        for vm in left.vms:
            if vm.token and vm.instance_id is None:
                self._orphans_until = max(self._orphans_until, vm.requested + _CONSISTENCY_WINDOW)
        self._gangs.adopt(left.vms)
        for vm in left.vms:
            if vm.state in (VMState.PLANNED, VMState.REQUESTED):
                vm.state, vm.retry_at = VMState.PLANNED, self._now
            self._machines.add(vm)
        for task in left.tasks:
            self._unclaimed.update(dict.fromkeys(task.identity.split(), task))
            if task.state not in TASK_ENDED:
                self._adopt_submitted(task, self._vm_of(task))
        self._bundles.adopt(self._submitted.values())
        for vm in left.vms:
            vm.idle_since = self._now if vm.is_unused else None
            vm.recount(self._now)
            if vm.leader is None:
                self._planner.adopt(vm)
            self._machines.note(vm)

    def _adopt_submitted(self, task: Task, vm: VM) -> None:
        """What was to be taken back when the run was killed still is."""
        vm.active[task.key] = task
        self._submitted[task.attempt_key] = task
        is_waiting = task.state == TaskState.SUBMITTED
        task.recalled |= vm.state in (VMState.TERMINATING, VMState.GONE)
        task.recalled |= vm.state == VMState.DRAINING and is_waiting

    def has_left(self, identity: str) -> bool:
        """Whether a killed run left something that makes one of these results."""
        return any(part in self._unclaimed for part in identity.split())

    def claim(self, task: Task, changed: float, is_made: bool) -> Task | None:
        """What a killed run left that makes the same results as `task`, which is then the one to wait for.
        None: there is none, or it makes only a part of them, or in another way, or from what was `changed`
        (date) since; it is then ended before `task` begins. `is_made`: the results are there."""
        parts = task.identity.split()
        with self._claims:
            found = {id(each): each for part in parts if (each := self._unclaimed.get(part))}
            left = [each for each in found.values() if each.state not in _VOID]
            live = left[0] if len(left) == 1 else None
            if live is not None and _goes_on(live, task, changed, is_made):
                self._go_on_with(live, task)
                return live
            running = [each for each in left if each.state not in TASK_ENDED]
            if running:
                self._replaced[task.key] = running
            return None

    def _go_on_with(self, live: Task, task: Task) -> None:
        for part in live.identity.split():
            del self._unclaimed[part]
        for name in _CLAIMED:
            setattr(live, name, getattr(task, name))
        wanted = task.need
        live.need = replace(
            live.need,
            gpu_model=wanted.gpu_model,
            constraint=wanted.constraint,
            types=wanted.types,
        )
        if self._has_lost_too_many(live):
            live.spot = NEVER
        live.is_wanted = True
        self._claimed.append(live)
        if live.state == TaskState.COMPLETE:
            self._ended.append(live)

    def submit(self, tasks: Sequence[Task]) -> None:
        """Takes over these tasks. They are in the journal when this returns, or, while that cannot be
        written, before anything is done for them."""
        now = self._clock()
        for task in tasks:
            task.received = now
        try:
            self._journal.write(self._config.run, tasks=tasks)
        except sqlite3.Error:
            self._unwritten.extend(tasks)
        self._inbox.extend(tasks)

    def stop(self) -> None:
        """No further VM starts, and what Slurm has not got yet is dropped; what runs goes on."""
        self._stopping = True

    def tick(self) -> list[Task]:
        """One round. Returns the tasks that ended since the last one; raises nothing that a later
        round may mend."""
        with self._lock:
            self._now = self._clock()
            self._take_inbox()
            view = self._observe_cluster()
            self._observe_cloud()
            if view is not None:
                self._update_vms(view)
            self._keep_gangs_together()
            if view is not None:
                self._update_tasks(view)
                self._end_replaced()
                self._finish_vms(view)
            self._check_spend()
            if self._stopping:
                self._drop_unsubmitted()
            self._place_all()
            if self._flush():
                self._launch_planned()
                if view is not None:
                    self._submit_ready()
            if view is not None:
                self._retire_idle()
                self._renew_leases()
            self._flush()
            with self._claims:
                ended, self._ended = self._ended, []
            return ended

    @property
    def is_busy(self) -> bool:
        """Whether anything is going on that the next tick should see soon."""
        return bool(self._inbox or self._waiting or self._held or self._machines.alive)

    @property
    def has_news(self) -> bool:
        """Whether one of a few submitted tasks has left its exit code. Among many, whose ends come often, it
        is not looked for: they are seen soon enough. Nor is it where Slurm tells of ends as soon."""
        submitted = list(self._submitted.values())
        is_worth = self._config.asks_seldom and len(submitted) <= _FEW
        return is_worth and any(self._exit_of(task) is not None for task in submitted)

    def vms(self) -> list[VM]:
        """Every VM there was, in the order of their request."""
        return list(self._machines)

    def next_change(self) -> float:
        """When the passing of time alone makes the next tick act, without any event; infinite: never."""
        if self._machines.has(*_LEAVING):
            return self._now
        return min(self._machines.next_retirement(), self._planner.next_look())

    @property
    def is_written(self) -> bool:
        """Whether the journal has every end of a task that `tick` has returned."""
        return not self._dirty_tasks

    @property
    def is_released(self) -> bool:
        """Whether every VM of the run, if there was one, was given back."""
        return self._released or not len(self._machines)

    def log_of(self, task: Task) -> Path:
        """Where the output of a task's last attempt is; where it made none, that of its bundle."""
        own, bundle = Path(self._config.log_file(task)), Path(self._config.bundle_log(task))
        return bundle if bundle.exists() and not own.exists() else own

    def exit_file(self, task: Task) -> str:
        """That of a task's last attempt."""
        return self._config.exit_file(task)

    def hurry(self) -> None:
        """The user waits for the end: Slurm is waited for only shortly from now on, also by a round that
        another thread is in. Returns at once."""
        self._stopping = True
        self._cluster.hurry()

    def release(self) -> None:
        """Cancels what still runs and gives every VM back. Idempotent; returns when the cloud has
        confirmed it, or says what it could not do.

        A VM on which somebody else's job runs is kept: nothing of others is ever killed. A journal
        that cannot be written keeps no VM alive.
        """
        self._stopping = True
        with self._lock:
            self._now = self._clock()
            left = [vm for vm in self._machines if not vm.is_settled]
            if self._is_over or not len(self._machines):
                return
            self._drop_unsubmitted()
            foreign = self._clear_slurm()
            self._give_up_submitted()
            doomed = [vm for vm in left if vm.name not in foreign]
            self._terminate_all(doomed)
            self._released = self._await_end(doomed)
            self._flush()
            self._tell_what_is_left(left, foreign)
            self._is_over = True

    # -- observe

    def _take_inbox(self) -> None:
        while self._claimed:
            self._planner.has_come(self._claimed.pop())
        while self._unwritten:
            self._dirty(self._unwritten.pop())
        count = len(self._inbox)
        for task in self._inbox[:count]:
            self._planner.has_come(task)
            (self._held if task.key in self._replaced else self._waiting).append(task)
        del self._inbox[:count]

    def _end_replaced(self) -> None:
        """Attempts of a killed run that make their results in another way than is wanted now; the tasks
        that are to make them wait until nothing of the old attempt can write."""
        for task in list(self._held):
            left = [live for live in self._replaced[task.key] if live.state not in TASK_ENDED]
            if not left:
                self._held.remove(task)
                self._waiting.append(task)
            self._end_old([live for live in left if not live.recalled])

    def _end_old(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self._log.info(
                f"{task.name} runs since before the crash, but its inputs, parameters, code or group have "
                "changed: it is ended, and done anew."
            )
        self._recall(tasks)

    def _observe_cluster(self) -> ClusterView | None:
        if self._is_over or not self._machines.unsettled:
            return None
        if self._config.asks_seldom and not self._is_asking_due():
            return self._bundles.spread(ClusterView(is_complete=False))
        due = self._now - self._nodes_seen >= _NODES_SELDOM
        nodes = due or self._machines.has(*_NODE_MOVING)
        try:
            view = self._bundles.spread(self._cluster.view(self._config.job_name, nodes))
        except ClusterUnavailable as error:
            self._tell(f"Slurm does not answer, waiting for it: {error}", logging.WARNING)
            return None
        self._asked = self._now
        if nodes:
            self._nodes_seen = self._now
        return view

    def _is_asking_due(self) -> bool:
        """Whether Slurm has something to tell: a node is on its way, a job has left its exit code, or the
        last answer is old; the older the last news, the longer it holds."""
        pause = min(_ASK_SELDOM, max(_ASK_OFTEN, (self._now - self._news) / 10))
        if self._now - self._asked >= pause or self._machines.has(*_NODE_MOVING):
            return True
        return any(
            task.recalled or self._exit_of(task) is not None
            for task in self._submitted.values()
            if not self._bundles.holds(task)
        )

    def _observe_cloud(self) -> None:
        moving = self._machines.has(*_MOVING)
        often = self._config.describe_every
        pause = often if moving else max(often, _DESCRIBE_SELDOM)
        is_worth = self._machines.alive or self._now < self._orphans_until
        if is_worth and self._now - self._described >= pause and not self._is_over:
            self._describe()

    def _describe(self) -> bool:
        """Brings the VMs up to what the cloud says; changes nothing, and is False, if it says nothing."""
        self._described = self._now
        try:
            listed = {instance.id: instance for instance in self._cloud.instances(self._config.run)}
        except CloudUnavailable as error:
            self._tell(f"EC2 does not answer, waiting for it: {error}", logging.WARNING)
            return False
        self._end_orphans(listed.values())
        for vm in self._machines:
            if vm.instance_id is not None and vm.state != VMState.GONE:
                self._update_from_cloud(vm, listed.get(vm.instance_id))
        return True

    def _end_orphans(self, listed: Iterable[Instance]) -> None:
        """Machines of this run whose launch was never answered become their VM's, if that still waits for
        one, or are ended."""
        orphans = []
        for instance in listed:
            vm = self._machines.get(instance.node)
            if vm is None or vm.instance_id == instance.id:
                continue
            if vm.state in (VMState.PLANNED, VMState.REQUESTED):
                self._take_outcome(vm, instance)
            elif vm.instance_id is None:
                self._book_orphan(vm, instance)
            is_wanted = vm.is_open and vm.instance_id == instance.id
            if instance.is_alive and not is_wanted:
                orphans.append(instance.id)
        if orphans:
            self._try_cloud(lambda: self._cloud.terminate(orphans))

    def _book_orphan(self, vm: VM, instance: Instance) -> None:
        """A machine that came for a VM that had been given up costs what that VM would have."""
        vm.instance_id, vm.meter, vm.ended = instance.id, instance.launched, None
        vm.ending = vm.node_deleted = False
        self._move(vm, VMState.TERMINATING)
        self._note(vm, f"came too late as {instance.id}")

    def _update_from_cloud(self, vm: VM, instance: Instance | None) -> None:
        if instance is None:
            self._count_absence(vm)
            return
        self._absent_vms.pop(vm.name, None)
        if vm.meter is None:
            vm.meter = instance.launched
        if instance.is_alive:
            return
        self._dirty_vms[vm.name] = vm
        vm.meter_end = vm.meter_end or instance.ended
        if vm.is_booting and is_reclaim_of(instance.reason):
            self._lost(vm, instance.reason)
        elif vm.is_booting:
            self._boot_failed(vm, instance.reason or "the machine ended while it booted")
        elif vm.state != VMState.TERMINATING:
            self._lost(vm, instance.reason or "the machine ended")
        elif is_reclaim_of(instance.reason):
            vm.reason = instance.reason
        vm.ended = vm.ended or self._now
        vm.ending = True
        if instance.state == "terminated":
            self._close(vm)

    def _count_absence(self, vm: VM) -> None:
        """Describe lags behind launches; absence counts only when it lasts (R8, R10)."""
        seen = self._absent_vms[vm.name] = self._absent_vms.get(vm.name, 0) + 1
        old = self._now - vm.requested > _CONSISTENCY_WINDOW
        if seen >= _ABSENT_DESCRIBES and old:
            if vm.state != VMState.TERMINATING:
                self._lost(vm, "EC2 no longer lists the machine")
            self._close(vm)

    def _update_vms(self, view: ClusterView) -> None:
        for name, node in view.nodes.items():
            vm = self._machines.get(name)
            if vm is not None and vm.state == VMState.READY:
                self._update_ready(vm, node)
        for vm in self._machines.having(VMState.BOOTING):
            self._update_booting(vm, view.nodes.get(vm.name))
        if view.is_complete and self._nodes_seen == self._now:
            for vm in self._machines.having(VMState.READY):
                self._look_for_node(vm, view.nodes)

    def _look_for_node(self, vm: VM, nodes: Mapping[str, NodeStatus]) -> None:
        """A node that Slurm has no record of takes no job; its absence counts only when it lasts."""
        if vm.name in nodes:
            self._absent_nodes.pop(vm.name, None)
        elif self._stays_away(self._absent_nodes, vm.name, _ABSENT_NODE):
            self._lost(vm, "Slurm no longer has the node")

    def _stays_away(self, absent: dict[str, tuple[int, float]], name: str, patience: float) -> bool:
        """Counts one more view without `name`; whether that lasts. `absent`: views so far, and since when."""
        seen, since = absent.get(name, (0, self._now))
        absent[name] = (seen + 1, since)
        return seen + 1 >= _ABSENT_VIEWS and self._now - since >= patience

    def _update_booting(self, vm: VM, node: NodeStatus | None) -> None:
        now = self._now
        if node is not None and node.accepts_jobs:
            for ready in self._gangs.joined(vm):
                self._has_booted(ready)
        elif node is not None and (node.state.startswith("drain") or node.state == "inval"):
            self._boot_failed(vm, f"Slurm does not accept the node: {node.reason}")
        elif now - vm.requested > self._config.boot_timeout:
            self._boot_failed(
                vm,
                f"no Slurm node after {self._config.boot_timeout:.0f} s (--schlouder-boot-timeout)",
            )

    def _has_booted(self, vm: VM) -> None:
        vm.ready, vm.idle_since = self._now, self._now
        self._move(vm, VMState.READY)
        if vm.boot_time is not None:
            self._boots.learn(vm.boot_time, vm.beside)
        self._launcher.has_booted()
        self._note(vm, f"ready after {self._now - vm.requested:.0f} s")

    def _update_ready(self, vm: VM, node: NodeStatus) -> None:
        if node.state == "down":
            self._lost(vm, f"Slurm lost the node: {node.reason}")
        elif node.state.startswith("drain") and (end := reclaimed_by(node.reason)):
            self._reclaimed(vm, end)
        elif node.state.startswith("drain"):
            self._take_out(vm, f"was drained by somebody else: {node.reason}")

    def _take_out(self, vm: VM, why: str) -> None:
        """`vm` gets no further tasks, and those that have not begun there are given back; what runs ends."""
        self._requeue_planned(vm)
        self._move(vm, VMState.DRAINING)
        self._note(vm, why)
        self._recall([t for t in vm.active.values() if t.state == TaskState.SUBMITTED])

    def _reclaimed(self, vm: VM, end: float) -> None:
        """EC2 takes a spot machine back at `end`, of which the machine itself has told Slurm. What runs there
        and will not be done by then is run elsewhere at once."""
        vm.reason, vm.leaves_by = "EC2 takes the spot machine back", end
        self._log.info(
            f"{self._name(vm)}: {vm.reason} at {time.strftime('%X', time.localtime(end))}."
        )
        self._take_out(vm, vm.reason)
        running = self._gangs.leader(vm).active.values()
        self._recall([t for t in running if t.started and t.started + t.walltime > end])

    def _count_reclaim(self, task: Task) -> None:
        """One that has lost too many spot machines gets one on demand, if it may."""
        task.reclaims += 1
        if self._has_lost_too_many(task):
            task.spot = NEVER
            self._log.info(
                f"{task.name} has lost {task.reclaims} spot machines; it goes on without."
            )

    def _has_lost_too_many(self, task: Task) -> bool:
        """Whether `task` may do without spot machines, and should."""
        return task.reclaims >= self._config.reclaims and task.spot == PREFER

    def _keep_gangs_together(self) -> None:
        """Who leaves a gang takes the others along: at once if it was lost, else when nothing runs there, as
        when EC2 is about to take it back."""
        for vm, other in self._gangs.torn():
            if other.reason and other.state != VMState.DRAINING:
                self._lost(vm, f"its gang lost {other.name}: {other.reason}")
            elif vm.is_booting:
                self._requeue_planned(vm)
                self._terminate([vm])
            else:
                self._take_out(vm, f"leaves with {other.name}")

    def _update_tasks(self, view: ClusterView) -> None:
        for key, status in view.jobs.items():
            task = self._submitted.get(key)
            if task is not None:
                self._absent_jobs.pop(key, None)
                self._unless_silent(self._update_task, task, status)
        if view.is_complete:
            for key in [key for key in self._submitted if key not in view.jobs]:
                self._unless_silent(self._missing, key, self._submitted[key])
        self._cancel_strays(view)

    def _unless_silent(self, judge: Callable[..., None], *about: object) -> None:
        """What Slurm says of a job is not acted on while the other witness cannot be asked: a later round
        hears both."""
        try:
            judge(*about)
        except WitnessSilent as error:
            self._tell(f"Exit codes cannot be read, waiting for them: {error}", logging.WARNING)

    def _cancel_strays(self, view: ClusterView) -> None:
        """Submissions that were given up, because no reply came, and arrived all the same."""
        strays = [
            status.slurm_id
            for key, status in view.jobs.items()
            if key not in self._submitted and status.phase in (JobPhase.WAITING, JobPhase.RUNNING)
        ]
        if strays:
            self._try_cluster(lambda: self._cluster.cancel(strays))

    def _update_task(self, task: Task, status: JobStatus) -> None:
        task.slurm_id = status.slurm_id
        if status.phase != JobPhase.WAITING and task.started is None and status.started is not None:
            task.started = status.started
            self._vm_of(task).has_begun(task, status.started)
            self._changed(self._vm_of(task))
        if status.phase == JobPhase.RUNNING and task.state == TaskState.SUBMITTED:
            task.state = TaskState.RUNNING
            self._dirty(task)
        elif status.phase == JobPhase.SUCCEEDED:
            task.ended = status.ended
            self._judge(task, self._exit_of(task) or Exit(0))
        elif status.phase == JobPhase.FAILED and not task.recalled:
            task.ended = status.ended
            self._judge_failed(task, status)
        elif status.phase == JobPhase.DISPLACED and not task.recalled:
            self._displaced(task, sentence_of(status.state))
        elif status.phase in (JobPhase.FAILED, JobPhase.DISPLACED, JobPhase.LOST):
            self._replace(task, status)
        elif task.recalled or self._is_launch_lost(task, status):
            self._recall([task])
        elif status.phase == JobPhase.WAITING:
            self._update_waiting(task, status)

    def _is_launch_lost(self, task: Task, status: JobStatus) -> bool:
        """Slurm says that the job runs, but its node never heard of it: slurmctld was restarted between
        the two, and may take half an hour to notice. A slow prolog gets more time with every attempt."""
        return (
            status.state == "RUNNING"
            and task.started is not None
            and self._now - task.started > self._config.launch_timeout * task.attempt
            and not self._bundles.holds(task)
            and not self._begun(self._config.exit_file(task))
        )

    def _update_waiting(self, task: Task, status: JobStatus) -> None:
        """A job that ran was put back into the queue by an operator. One that Slurm will not start by
        itself stays ours, but its VM costs money: the user is told once for every rule and reason."""
        if task.state == TaskState.RUNNING:
            task.state, task.started = TaskState.SUBMITTED, None
            self._vm_of(task).recount(self._now)
            self._changed(self._vm_of(task))
            self._dirty(task)
        advice = advice_on(status.reason, status.slurm_id)
        if advice is None:
            self._stuck.pop(task.key, None)
        elif self._now - self._stuck.setdefault(task.key, self._now) >= _STUCK_PATIENCE:
            self._tell(
                f"A job of rule {task.rule} waits on {task.vm} and will not start by itself: Slurm job "
                f"{status.slurm_id}, {status.reason}: {advice}.",
                logging.WARNING,
                about=f"{task.rule} {status.reason.split(',')[0]}",
            )

    def _displaced(self, task: Task, why: str) -> None:
        """Its submission has ended for certain, and its VM is good: the task runs there again, unless its
        script was done by then."""
        left = self._exit_of(task)
        if left is not None:
            self._judge(task, left)
        else:
            self._once_more(self._vm_of(task), task, f"{why}, {_times(task.losses + 1)}")

    def _once_more(self, vm: VM, task: Task, why: str) -> None:
        """Runs `task` again, which was lost without its doing, unless that has happened too often. Spot
        machines taken back are no such loss, as long as the task can do without."""
        is_reclaim = self._is_taken_back(vm)
        if is_reclaim:
            self._count_reclaim(task)
            too_often = task.spot == ONLY and task.reclaims > self._config.reclaims
        else:
            too_often = task.losses + 1 >= MAX_LOSSES
        if too_often or self._stopping:
            self._finish(task, TaskState.FAILED, why)
        else:
            task.losses += not is_reclaim
            self._again(vm, task)

    def _replace(self, task: Task, status: JobStatus) -> None:
        """A submission has ended without the task's doing. Where the machine is the cause, the task waits
        until that is gone: it may still write. One that was taken back may have been done by then."""
        vm, left = self._vm_of(task), self._exit_of(task)
        if self._gangs.is_gone(vm):
            self._rescue(vm, task)
        elif status.phase == JobPhase.LOST:
            self._lost(vm, sentence_of(status.state))
        elif task.recalled and left is not None and left.code == 0:
            self._judge(task, left)
        elif task.recalled and vm.state not in (VMState.TERMINATING, VMState.GONE):
            self._after_recall(vm, task)
        else:
            self._lost(vm, sentence_of(status.state))

    def _after_recall(self, vm: VM, task: Task) -> None:
        """Only what had begun has lost something to a machine that EC2 takes back."""
        if task.state == TaskState.RUNNING and self._is_taken_back(vm):
            losses = task.losses + task.reclaims + 1
            self._once_more(vm, task, f"its spot machine was taken back, {_times(losses)}")
        else:
            self._again(vm, task)

    def _is_taken_back(self, vm: VM) -> bool:
        """Whether EC2 takes one of the machines on which its tasks run, or has done so."""
        return any(
            member.market == SPOT and is_reclaim_of(member.reason)
            for member in self._gangs.members(vm)
        )

    def _recall(self, tasks: Sequence[Task]) -> None:
        """Takes submissions back, so that none of them can start elsewhere or later; and with them what
        shares a Slurm job that must be cancelled for it. What becomes of their tasks is decided when Slurm
        says that they have ended: the journal knows before that it was us."""
        ending = [task for task in tasks if not self._bundles.shares_job(task)]
        beside = [other for task in ending for other in self._bundles.beside(task)]
        for task in (*tasks, *beside):
            if not task.recalled:
                task.recalled = True
                self._dirty(task)
            self._revoke(self._config.exit_file(task))
        self._flush()
        known = [task.slurm_id for task in ending if task.slurm_id is not None]
        if known:
            self._try_cluster(lambda: self._cluster.cancel(known))

    def _missing(self, key: str, task: Task) -> None:
        """Slurm does not know the submission. Unknown is neither success nor failure."""
        left = self._exit_of(task)
        if left is not None:
            task.ended = self._now
            self._judge(task, left)
        elif self._is_gone(key, task):
            vm = self._vm_of(task)
            begun = self._revoke(self._config.exit_file(task))
            if self._gangs.is_gone(vm):
                self._rescue(vm, task)
            elif task.slurm_id is None and not begun:
                self._again(vm, task)
            else:
                self._lost(vm, f"Slurm lost its job {task.slurm_id or task.attempt_key}")

    def _is_gone(self, key: str, task: Task) -> bool:
        """Absence counts only when it lasts, and, for a job that Slurm once had, when Slurm says so."""
        patience = _LATE_SUBMISSION if task.slurm_id is None else _ABSENT_JOB
        if not self._stays_away(self._absent_jobs, key, patience):
            return False
        if task.slurm_id is None:
            return True
        try:
            return not self._cluster.knows(task.slurm_id)
        except ClusterUnavailable:
            return False

    def _exit_of(self, task: Task) -> Exit | None:
        """How the script of its last attempt ended, as far as that has left it in a file."""
        return self._witness(self._config.exit_file(task))

    def _judge(self, task: Task, left: Exit) -> None:
        if left.code == 0:
            self._finish(task, TaskState.COMPLETE, "")
        elif not self._may_have_lost_a_machine(task):
            self._finish(task, TaskState.FAILED, _told(task, left))
        elif self._gangs.is_gone(self._vm_of(task)):
            self._rescue(self._vm_of(task), task)

    def _may_have_lost_a_machine(self, task: Task) -> bool:
        """Whether a task over several VMs failed because one of them was lost: the ranks on the others notice
        that before Slurm and our next look at EC2."""
        if task.need.nodes == 1:
            return False
        vm = self._vm_of(task)
        return self._gangs.has_lost(vm) or not self._describe() or self._gangs.has_lost(vm)

    def _judge_failed(self, task: Task, status: JobStatus) -> None:
        """Slurm says that the job failed. A script that left exit code 0 had done its work by then, unless
        memory ran out: that may have cost it a part of it."""
        left = self._exit_of(task)
        out_of_memory = status.state == "OUT_OF_MEMORY"
        if left is not None and (
            status.state == "FAILED" or (left.code == 0 and not out_of_memory)
        ):
            self._judge(task, left)
        else:
            why = failure_of(status.state, status.reason, task.need.memory, task.limit)
            self._finish(task, TaskState.FAILED, why)

    # -- ends of tasks and VMs

    def _finish(self, task: Task, state: TaskState, reason: str) -> None:
        """Ends a task that Slurm had."""
        self._news = self._now
        self._stuck.pop(task.key, None)
        self._submitted.pop(task.attempt_key, None)
        self._absent_jobs.pop(task.attempt_key, None)
        vm = self._machines.get(task.vm)
        if vm is not None and vm.active.pop(task.key, None) is not None:
            if vm.is_unused:
                vm.idle_since = self._now
            vm.has_ended(task, self._now)
            self._changed(vm)
        if state == TaskState.COMPLETE and task.started is not None:
            took = (task.ended or self._now) - task.started
            self._walltimes.learn(task.rule, task.planned, took)
        self._end(task, state, reason)

    def _end(self, task: Task, state: TaskState, reason: str) -> None:
        if task.state not in TASK_ENDED:
            with self._claims:
                task.state, task.reason = state, reason
                if task.is_wanted:
                    self._ended.append(task)
            self._stopping |= state == TaskState.FAILED and task.ends_run
            self._dirty(task)

    def _again(self, vm: VM, task: Task) -> None:
        """A task whose submission is void is planned anew: on its VM while that takes work, else anywhere."""
        with self._claims:
            if not task.is_wanted:
                self._finish(task, TaskState.CANCELLED, "it was not asked for again")
                return
        self._submitted.pop(task.attempt_key, None)
        self._absent_jobs.pop(task.attempt_key, None)
        vm.active.pop(task.key, None)
        task.slurm_id = task.started = task.ended = None
        if vm.is_open:
            task.state = TaskState.SCHEDULED
            vm.queue.appendleft(task)
            vm.recount(self._now)
        else:
            task.state, task.vm = TaskState.PENDING, None
            self._waiting.insert(0, task)
        self._changed(vm)
        self._dirty(task)

    def _lost(self, vm: VM, reason: str) -> None:
        """The machine is no good. It may still write, so it is ended first; its tasks wait for that
        (`_close`). What was only planned for it is planned anew at once."""
        if vm.state in (VMState.TERMINATING, VMState.GONE):
            return
        vm.reason = reason
        self._log.warning(f"{self._name(vm)} is given up: {reason}")
        self._move(vm, VMState.TERMINATING)
        self._note(vm, f"given up: {reason}")
        self._requeue_planned(vm)
        self._recall(list(vm.active.values()))
        self._try_cluster(lambda: self._cluster.fail(vm.name, "schlouder: machine lost"))
        self._terminate([vm])

    def _boot_failed(self, vm: VM, reason: str) -> None:
        console = self._cloud.console(vm.instance_id) if vm.instance_id else ""
        self._launcher.boot_failed(reason)
        self._lost(vm, reason)
        tail = "\n".join(f"    {line}" for line in console.splitlines()[-_CONSOLE_LINES:])
        if tail:
            self._log.warning(f"Console of {self._name(vm)}, last lines:\n{tail}")

    def _requeue_planned(self, vm: VM) -> None:
        for task in vm.queue:
            task.state, task.vm = TaskState.PENDING, None
            self._dirty(task)
        self._waiting[:0] = vm.queue
        vm.queue.clear()
        vm.recount(self._now)
        self._changed(vm)

    def _terminate(self, vms: Sequence[VM]) -> None:
        """Asks for the machines' end; `_describe` sees when it is done, and asks again if it is not."""
        for vm in vms:
            self._move(vm, VMState.TERMINATING)
            self._note(vm, "terminating")
        self._flush()
        ids = {vm.instance_id: vm for vm in vms if vm.instance_id is not None}
        if ids:
            try:
                self._cloud.terminate(list(ids))
                self._described = -math.inf
                for vm in ids.values():
                    vm.ended = self._now
            except CloudUnavailable as error:
                names = ", ".join(vm.name for vm in ids.values())
                self._tell(f"{names}: not ended yet, will ask again: {error}", logging.WARNING)
        for vm in vms:
            if vm.instance_id is None:
                self._close(vm)

    def _close(self, vm: VM) -> None:
        """The machine is gone for certain: nothing of it can write any more."""
        vm.ended = vm.ended or self._now
        vm.ending = True
        if vm.instance_id and self._makes_room(vm):
            self._launcher.machine_ended(vm.market)
        elif vm.instance_id is None and vm.token:
            self._orphans_until = self._now + _CONSISTENCY_WINDOW
        never_asked_for = vm.state == VMState.PLANNED and not vm.retry_at
        vm.node_deleted |= vm.instance_id is None and never_asked_for
        self._move(vm, VMState.GONE)
        self._note(vm, "gone")
        if not vm.node_deleted:
            self._try_cluster(lambda: self._cluster.fail(vm.name, "schlouder: machine gone"))

    def _makes_room(self, vm: VM) -> bool:
        """Whether its end may lift a quota: not that of a gang which was not complete, for the next one would
        be refused as well."""
        leader = self._gangs.leader(vm)
        return leader.nodes == 1 or leader.ready is not None

    def _rescue(self, vm: VM, task: Task) -> None:
        """A task whose machine went away under it runs again, unless its script was done: a failure may be
        the work of the machine's end."""
        left = self._exit_of(task)
        if left is not None and left.code == 0:
            task.ended = vm.ended
            self._judge(task, left)
        else:
            losses = task.losses + task.reclaims + 1
            why = f"its machine was lost, {_times(losses)} ({vm.reason})"
            self._once_more(vm, task, why)

    def _finish_vms(self, view: ClusterView) -> None:
        """Drained VMs are terminated; records of VMs that are no more are deleted from Slurm."""
        ending = []
        for vm in self._machines.having(*_LEAVING):
            node = view.nodes.get(vm.name)
            if vm.state == VMState.DRAINING and self._has_nothing_left(vm):
                if self._may_end(vm, node):
                    ending.append(vm)
            elif vm.state == VMState.DRAINING and node is not None and node.state == "down":
                self._lost(vm, f"Slurm lost the node: {node.reason}")
            elif vm.state == VMState.TERMINATING and self._is_overdue(vm):
                ending.append(vm)
            elif vm.state == VMState.GONE and (node is not None or not vm.node_deleted):
                self._forget_node(vm)
        if ending:
            self._terminate(ending)

    def _has_nothing_left(self, vm: VM) -> bool:
        """Whether no task runs there; those of a leader that was given up wait for the ends of its
        companions."""
        leader = self._gangs.leader(vm)
        return leader.is_unused or leader.state in (VMState.TERMINATING, VMState.GONE)

    def _may_end(self, vm: VM, node: NodeStatus | None) -> bool:
        """A VM that drains goes when no job is left on it; a drain that did not take is repeated."""
        if self._is_left_to_ec2(vm):
            return False
        if node is None or node.is_drained:
            self._delete_node(vm)
            return True
        if not node.state.startswith("drain"):
            self._try_cluster(lambda: self._cluster.drain([vm.name], "schlouder: no work left"))
        else:
            self._warn_of_guest(vm)
        return False

    def _is_left_to_ec2(self, vm: VM) -> bool:
        """Whether EC2 is about to end the machine, and will charge nothing for it then."""
        if vm.leaves_by is None or vm.uptime(vm.leaves_by) >= FREE_WHEN_TAKEN:
            return False
        return self._now < vm.leaves_by + _RECLAIM_PATIENCE

    def _forget_node(self, vm: VM) -> None:
        """Not before Slurm has ended what was pinned to it: a later node may get its place in Slurm's
        table, and with it the job."""
        if not self._gangs.leader(vm).active:
            self._delete_node(vm)

    def _is_overdue(self, vm: VM) -> bool:
        """Whether the machine must be asked again to end: nobody heard, or nothing happened."""
        return vm.ended is None or (not vm.ending and self._now - vm.ended > _TERMINATE_PATIENCE)

    def _delete_node(self, vm: VM) -> None:
        try:
            vm.node_deleted = self._cluster.delete(vm.name)
            self._machines.note(vm)
        except ClusterUnavailable as error:
            self._tell(f"Slurm does not answer: {error}", logging.WARNING)

    def _warn_of_guest(self, vm: VM) -> None:
        since = self._gangs.leader(vm).idle_since
        if since is not None and self._now - since > _GUEST_PATIENCE:
            self._tell(
                f"{self._name(vm)} is kept: a job of somebody else runs there", logging.WARNING
            )

    def _drop_unsubmitted(self) -> None:
        self._take_inbox()
        dropped = [*self._waiting, *self._held, *self._planner.take_backlog()]
        self._waiting.clear()
        self._held.clear()
        for vm in self._machines:
            dropped += vm.queue
            vm.queue.clear()
            self._changed(vm)
        for task in dropped:
            self._end(task, TaskState.CANCELLED, f"not started: {self._why_stopping}")

    # -- decide

    def _check_spend(self) -> None:
        if not self._stopping and self._launcher.is_spent(self._machines, self._now):
            self._why_stopping = "--schlouder-max-spend is used up"
            self._stopping = True
            self._log.error(f"{self._why_stopping}: nothing further is started; what runs goes on.")

    def _place_all(self) -> None:
        """Has every waiting task planned, and takes note of the outcome."""
        refusal = self._launcher.refusal
        alive = self._machines.alive
        room = 0 if self._stopping or refusal else self._config.max_vms - alive
        plan = self._planner.place(self._waiting, self._now, room, refusal, alive)
        self._waiting = plan.left
        for leader in plan.started:
            for vm in self._gangs.assemble(leader, self._new_vm):
                self._machines.add(vm)
        for task in plan.assigned:
            self._machines.note(self._vm_of(task))
            self._dirty(task)
        for task, reason in plan.failed:
            self._end(task, TaskState.FAILED, reason)
        if plan.broken:
            self._stopping, self._why_stopping = True, plan.broken
            self._log.error(f"{plan.broken}. Nothing further is started; what runs goes on.")

    def _new_vm(self, strategy: str, offer: Offer, boot_time: float) -> VM:
        self._vm_count += 1
        name = f"schlouder-{self._config.run}-{self._vm_count}"
        kind, market, price = offer.kind, offer.market, offer.price
        return VM(name, strategy, kind, self._now, boot_time, market, price)

    # -- act

    def _launch_planned(self) -> None:
        """Requested VMs are still to be launched only when the round that requested them broke off;
        the token makes asking again safe."""
        for vm in self._machines.having(VMState.PLANNED):
            if self._stopping or not (self._is_needed(vm) or self._may_have_come(vm)):
                self._close(vm)
        unlaunched = self._machines.having(VMState.PLANNED, VMState.REQUESTED)
        booting = sum(not self._gangs.is_up(vm) for vm in self._machines.having(VMState.BOOTING))
        due = self._launcher.due(unlaunched, self._machines, booting, self._now)
        if due := [vm for vm in due if self._is_needed(vm)]:
            self._launch(due)
        if self._launcher.refusal:
            self._tell(f"No further VM is started: {self._launcher.refusal}", logging.WARNING)
            for vm in self._machines.having(VMState.PLANNED):
                self._not_started(vm)

    def _is_needed(self, vm: VM) -> bool:
        return self._planner.needs(self._gangs.leader(vm))

    def _may_have_come(self, vm: VM) -> bool:
        """Whether a machine may be there for `vm`, whose launch was not answered: as long as Describe may not
        show it yet it counts towards the limits, needed or not."""
        return bool(vm.token) and self._now - vm.requested < _CONSISTENCY_WINDOW

    def _launch(self, due: Sequence[VM]) -> None:
        ready, nowhere = self._launcher.address(due, self._now)
        for vm in nowhere:
            wait = self._offers.next_opening(self._now) - self._now
            self._tell(
                f"No machine is to be had of {_offer_name(vm)}: others are tried, if any are allowed, and "
                f"this one again in {wait:.0f} s.",
                logging.WARNING,
                about=f"capacity of {_offer_name(vm)}",
            )
            self._not_started(vm)
        for vm in ready:
            vm.requested = self._now
            self._move(vm, VMState.REQUESTED)
            self._note(vm, f"requesting a {_offer_name(vm)}")
        if not ready or not self._flush():
            return
        requests = [self._launcher.request(vm) for vm in ready]
        for vm, outcome in zip(ready, self._cloud.launch(requests), strict=True):
            self._take_outcome(vm, outcome)
        self._flush()

    def _take_outcome(self, vm: VM, outcome: LaunchOutcome) -> None:
        """A VM whose token is spent had a machine that is gone: another one gets a name and a bill of its
        own."""
        may_ask_again = self._launcher.take(vm, outcome, self._now)
        if isinstance(outcome, Instance):
            vm.instance_id, vm.meter = outcome.id, outcome.launched
            self._move(vm, VMState.BOOTING)
            self._note(vm, f"is instance {outcome.id}")
        elif isinstance(outcome, TokenSpent):
            self._not_started(vm)
        elif not may_ask_again:
            self._tell(f"EC2 refuses to start {_offer_name(vm)}: {outcome}", logging.ERROR)
            self._not_started(vm)
        else:
            self._move(vm, VMState.PLANNED)
            if not isinstance(outcome, NoCapacity | QuotaReached):
                self._tell(
                    f"{vm.name} is not started yet, will ask again: {outcome}", logging.WARNING
                )
            self._note(vm, f"not started: {outcome}")

    def _not_started(self, vm: VM) -> None:
        """There will be no such machine; what was planned for it is planned anew."""
        self._requeue_planned(vm)
        self._close(vm)

    def _submit_ready(self) -> None:
        """Hands over what the VMs have room for; what was not tried stays with its VM."""
        due = self._take_due()
        if not due:
            return
        self._news = self._now
        tried = 0
        if self._flush():
            outcomes = self._cluster.submit([self._request(vm, tasks) for vm, tasks in due])
            tried = len(outcomes)
            for (vm, tasks), outcome in zip(due, outcomes, strict=False):
                self._take_reply(vm, tasks, outcome)
        for vm, tasks in reversed(due[tried:]):
            for task in reversed(tasks):
                self._again(vm, task)

    def _take_due(self) -> list[tuple[VM, list[Task]]]:
        """Moves the heads of the VMs' queues to what Slurm has, as far as there is room: what becomes one
        Slurm job each."""
        due = []
        for vm in self._machines.feedable():
            while vm.state == VMState.READY and vm.queue and self._takes_one_more(vm):
                tasks = take_bundle(vm)
                for turn, task in enumerate(tasks):
                    self._hand_over(vm, task, turn)
                    task.submission = tasks[0].attempt_key
                if len(tasks) > 1:
                    self._bundles.add(tasks)
                due.append((vm, tasks))
            self._machines.fed(vm)
        return due

    def _hand_over(self, vm: VM, task: Task, turn: int) -> None:
        task.attempt += 1
        task.state, task.recalled = TaskState.SUBMITTED, False
        task.turn, task.is_behind = turn, turn > 0
        vm.active[task.key] = task
        vm.idle_since = None
        self._machines.note(vm)
        self._submitted[task.attempt_key] = task
        self._dirty(task)

    def _takes_one_more(self, vm: VM) -> bool:
        """A task that fits beside the running ones, or else one task ahead."""
        need = vm.queue[0].need
        return vm.has_room(need) or vm.takes_ahead(need.gpus)

    def _take_reply(self, vm: VM, tasks: Sequence[Task], outcome: SubmitOutcome) -> None:
        if isinstance(outcome, ClusterUnavailable):
            self._tell(f"Slurm does not answer, waiting for it: {outcome}", logging.WARNING)
        elif isinstance(outcome, SubmissionRefused) and "Invalid node name" in str(outcome):
            self._lost(vm, "Slurm no longer has the node")
        for task in tasks:
            if isinstance(outcome, str):
                task.slurm_id = outcome
            elif isinstance(outcome, SubmissionRefused) and vm.is_open:
                self._finish(task, TaskState.FAILED, f"Slurm refused the job: {outcome}")
            self._dirty(task)

    def _request(self, vm: VM, tasks: Sequence[Task]) -> JobRequest:
        task = tasks[0]
        limits = [each.limit for each in tasks if each.limit is not None]
        return JobRequest(
            key=task.attempt_key,
            run=self._config.job_name,
            node=vm.name,
            script=self._script_of(tasks),
            cpus=task.need.cpus,
            memory=task.need.memory,
            limit=sum(limits) + slack(len(tasks)) if len(limits) == len(tasks) else None,
            workdir=self._config.workdir if self._config.shares_files else VM_DIRECTORY,
            log=self._log_on_vm(tasks),
            partition=self._config.partition,
            options=task.options,
            companions=tuple(vm.name for vm in self._gangs.companions(vm)),
        )

    def _log_on_vm(self, tasks: Sequence[Task]) -> str:
        config, task = self._config, tasks[0]
        if not config.shares_files:
            return vm_log(config.exit_file(task))
        return config.log_file(task) if len(tasks) == 1 else config.bundle_log(task)

    def _script_of(self, tasks: Sequence[Task]) -> str:
        config = self._config
        if len(tasks) == 1:
            return self._script(tasks[0].name, tasks[0].command, config.exit_file(tasks[0]))
        jobs = [
            BundledJob(t.name, t.command, config.log_file(t), config.exit_file(t), t.limit)
            for t in tasks
        ]
        return bundle_script(jobs)

    def _retire_idle(self) -> None:
        leaving = [vm for vm in self._retirable() if self._may_leave(vm)]
        for vm in leaving:
            self._move(vm, VMState.DRAINING)
            self._note(vm, "draining")
        self._flush()
        if leaving:
            names = [vm.name for vm in leaving]
            self._try_cluster(lambda: self._cluster.drain(names, "schlouder: no work left"))
        unneeded = [vm for vm in self._machines.having(VMState.BOOTING) if not self._is_needed(vm)]
        if unneeded:
            self._terminate(unneeded)

    def _retirable(self) -> list[VM]:
        """The idle VMs that may have to go now: those whose date has come, or all of them when
        somebody else waits for their place or nobody is left to use them."""
        planner = self._planner
        for vm in self._machines.newly_idle():
            left = planner.retires_in(vm, self._now)
            self._machines.retire_at(vm, self._now + max(0.0, left))
        if self._stopping or planner.is_starved or planner.has_idle_for_nothing:
            return list(self._machines.idle.values())
        return self._machines.due(self._now)

    def _may_leave(self, vm: VM) -> bool:
        if self._stopping or not self._planner.may_keep(vm):
            return True
        left = self._planner.retires_in(vm, self._now)
        if left > 0:
            self._machines.retire_at(vm, self._now + left)
        return left <= 0

    def _renew_leases(self) -> None:
        """Of every VM that has joined; one that just has need not wait, for its first lease is longer."""
        if self._now - self._renewed < self._config.lease / lease.RENEWALS:
            return
        names = [vm.name for vm in self._machines.having(VMState.READY, VMState.DRAINING)]
        given = lease.Lease(self._config.run, round(self._config.lease), round(self._now))
        if names and self._try_cluster(lambda: self._cluster.renew(names, given)):
            self._renewed = self._now

    # -- the end of the run

    def _clear_slurm(self) -> Mapping[str, list[str]]:
        """Cancels the run's jobs, stops the nodes from taking others; returns the nodes with jobs of
        somebody else, by name. A job that could not be cancelled does nothing if it begins after all."""
        names = [vm.name for vm in self._machines.having(VMState.READY, VMState.DRAINING)]
        if not self._cancel_jobs():
            for task in self._submitted.values():
                self._revoke(self._config.exit_file(task))
        self._try_cluster(lambda: self._cluster.drain(names, "schlouder: the run has ended"))
        try:
            return self._cluster.foreign_jobs(self._config.job_name)
        except ClusterUnavailable as error:
            self._log.warning(f"Slurm does not answer; VMs are given back all the same: {error}")
            return {}

    def _cancel_jobs(self) -> bool:
        """Once; False as long as Slurm has not heard of it."""
        self._is_cancelled = self._is_cancelled or self._try_cluster(
            lambda: self._cluster.cancel_run(self._config.job_name)
        )
        return self._is_cancelled

    def _give_up_submitted(self) -> None:
        for task in self._submitted.values():
            if task.started is None and self._begun(self._config.exit_file(task)):
                task.started = self._now
            self._end(task, TaskState.CANCELLED, "the run was ended")
        self._submitted.clear()
        for vm in self._machines:
            vm.active.clear()

    def _terminate_all(self, vms: Sequence[VM]) -> None:
        """In one call; machines whose launch was never answered are found by the run's tag. Those that are
        known are ended even while EC2 lists none."""
        ids = {vm.instance_id for vm in vms if vm.instance_id is not None}
        kept = {vm.instance_id for vm in self._machines} - {vm.instance_id for vm in vms}
        for vm in vms:
            if vm.state != VMState.GONE:
                self._move(vm, VMState.TERMINATING)
                self._note(vm, "terminating")
        self._flush()
        listed = self._list_alive()
        for instance in listed or ():
            unanswered = self._machines.get(instance.node)
            if unanswered is not None and unanswered.instance_id is None:
                self._book_orphan(unanswered, instance)
        ids |= {instance.id for instance in listed or ()} - kept
        try:
            if ids:
                self._cloud.terminate(sorted(ids))
        except CloudUnavailable as error:
            self._tell(f"The VMs are not ended yet: {error}", logging.WARNING)
            return
        for vm in vms:
            if vm.instance_id is not None:
                vm.ended = vm.ended or self._now
            elif listed is not None and vm.state != VMState.GONE:
                self._close(vm)

    def _list_alive(self) -> list[Instance] | None:
        """The machines of the run; None while EC2 does not tell."""
        try:
            return [i for i in self._cloud.instances(self._config.run) if i.is_alive]
        except CloudUnavailable as error:
            self._tell(f"EC2 does not list the VMs: {error}", logging.WARNING)
            return None

    def _await_end(self, vms: Sequence[VM]) -> bool:
        """Asks until the cloud says that all of them are ending and Slurm has no node of theirs; a
        machine that is ending costs nothing more, so that its last breath is waited for only shortly,
        and its node, which never did, not much longer; nor is a machine whose launch was not answered, and
        which Describe may not show yet. False if that did not come about."""
        begun = asked = self._now
        while self._now - begun < _RELEASE_PATIENCE:
            self._describe()
            self._remove_nodes(vms)
            waited, ending = self._now - begun, all(vm.ending for vm in vms)
            if waited < _ORPHAN_PATIENCE and self._now < self._orphans_until:
                ending = False
            gone = waited > _LAST_BREATH or all(vm.state == VMState.GONE for vm in vms)
            if ending and gone and all(vm.node_deleted for vm in vms):
                return True
            if ending and waited > _NODE_PATIENCE:
                return False
            self._sleep(_RELEASE_PAUSE)
            self._now = self._clock()
            if self._now - asked > self._config.describe_every:
                asked = self._now
                self._terminate_all([vm for vm in vms if not vm.ending])
        return False

    def _remove_nodes(self, vms: Sequence[VM]) -> None:
        """Not before Slurm has ended what was pinned to them, as in `_forget_node`."""
        if self._cancel_jobs():
            for vm in vms:
                if not vm.node_deleted:
                    self._remove_node(vm)

    def _remove_node(self, vm: VM) -> None:
        """A node that is still busy with our own ending jobs must be down before Slurm deletes it."""
        self._delete_node(vm)
        if not vm.node_deleted and vm.ending:
            self._try_cluster(lambda: self._cluster.fail(vm.name, "schlouder: machine gone"))
            self._delete_node(vm)

    def _tell_what_is_left(self, vms: Sequence[VM], foreign: Mapping[str, list[str]]) -> None:
        for vm in vms:
            if not vm.ending:
                self._log.warning(f"{self._name(vm)} is still there: {self._why_kept(vm, foreign)}")
        names = ",".join(vm.name for vm in vms if vm.ending and not vm.node_deleted)
        if names:
            self._log.warning(
                "Slurm still has nodes of machines that are gone; remove them with "
                f"`scancel --name={self._config.job_name}`, "
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

    # -- small change

    def _try_cluster(self, action: Callable[[], object]) -> bool:
        """For what may be left undone when Slurm is away: it is repeated or has no effect on cost. Returns
        whether it is done."""
        try:
            action()
        except ClusterUnavailable as error:
            self._tell(f"Slurm does not answer: {error}", logging.WARNING)
            return False
        return True

    def _vm_of(self, task: Task) -> VM:
        """The VM of a task that has one."""
        vm = self._machines.get(task.vm)
        assert vm is not None
        return vm

    def _name(self, vm: VM) -> str:
        return f"VM {vm.instance_id or '(not started)'} ({vm.name})"

    def _try_cloud(self, action: Callable[[], object]) -> None:
        try:
            action()
        except CloudUnavailable as error:
            self._tell(f"EC2 does not answer: {error}", logging.WARNING)

    def _move(self, vm: VM, state: VMState) -> None:
        """Gives `vm` another state, and sees that books and plans hear of it."""
        self._machines.move(vm, state)
        if state == VMState.READY:
            vm.recount(self._now)
        if vm.is_open:
            self._changed(vm)
        else:
            self._planner.closed(vm, self._now)

    def _changed(self, vm: VM) -> None:
        """What `vm` does, or is to do, has changed."""
        self._machines.note(vm)
        self._planner.changed(vm)

    def _note(self, vm: VM, what: str) -> None:
        self._dirty_vms[vm.name] = vm
        self._events.append((self._now, vm.name, what))
        self._log.debug(f"{self._name(vm)}: {what}")

    def _dirty(self, task: Task) -> None:
        self._dirty_tasks[task.key] = task

    def _flush(self) -> bool:
        """Writes down what changed. While the journal cannot be written nothing new is started, but
        what there is goes on, ends, and is given back; after a while the run is brought to its end."""
        if not (self._dirty_vms or self._dirty_tasks):
            return self._journal_failed is None
        try:
            self._journal.write(
                self._config.run,
                self._dirty_vms.values(),
                self._dirty_tasks.values(),
                self._events,
            )
        except sqlite3.Error as error:
            self._journal_fails(error)
            return False
        self._journal_failed = None
        self._dirty_vms.clear()
        self._dirty_tasks.clear()
        self._events.clear()
        return True

    def _journal_fails(self, error: sqlite3.Error) -> None:
        if self._journal_failed is None:
            self._journal_failed = self._now
        self._tell(
            f"The journal cannot be written ({error}); nothing new is started until it can.",
            logging.ERROR,
        )
        if self._now - self._journal_failed > _JOURNAL_PATIENCE and not self._stopping:
            self._stopping = True
            self._log.error("The journal stays unwritable; the run ends with what is running.")

    def _tell(self, message: str, level: int, about: str = "") -> None:
        """Says a thing once a run, however often it happens; and `about` a thing only one."""
        if (about or message) not in self._told:
            self._told.add(about or message)
            self._log.log(level, message)


def _goes_on(live: Task, task: Task, changed: float, is_made: bool) -> bool:
    """Whether what a killed run left is what `task` would do."""
    same = live.identity == task.identity and live.content == task.content
    return same and changed <= live.received and (is_made or live.state != TaskState.COMPLETE)


def _told(task: Task, left: Exit) -> str:
    """For a person, how a script ended."""
    took = left.ended - left.begun
    if left.code == TIMED_OUT and task.limit is not None and took >= task.limit:
        return failure_of("TIMEOUT", "", task.need.memory, task.limit)
    return f"ended with exit code {left.code}"


def reclaimed_by(reason: str) -> float | None:
    """When EC2 takes the machine back, if this reason, which its node gave for its drain, says so."""
    found = re.search(r"spot reclaim at (\S+)", reason)
    if found is None:
        return None
    try:
        return datetime.fromisoformat(found[1]).timestamp()
    except ValueError:
        return None


def is_reclaim_of(reason: str) -> bool:
    """Whether a machine ended for this reason because EC2 took it back."""
    return "Server.SpotInstance" in reason or "spot machine back" in reason


def _offer_name(vm: VM) -> str:
    return f"{vm.type.name}{' (spot)' if vm.market == SPOT else ''}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
