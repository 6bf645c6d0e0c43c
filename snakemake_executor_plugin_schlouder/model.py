"""Tasks, VMs, the fleet and billing arithmetic: plain data, no clock, no I/O.

Times are seconds since the epoch, durations seconds, memory MiB.
"""

from __future__ import annotations

import functools
import math
import re
from collections import deque
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fnmatch import fnmatchcase

ON_DEMAND, SPOT = "on-demand", "spot"
"""The markets EC2 sells machines on."""

FREE_WHEN_TAKEN = 3600.0
"""Seconds within which EC2 charges nothing for a spot machine that it takes back itself (EC2 user guide,
Billing for interrupted Spot Instances)."""

NEVER, PREFER, ONLY = "never", "prefer", "only"
"""What a task says of spot machines."""

DEFAULT_WALLTIME = 300.0
"""Seconds assumed for a task nobody gave an estimate for; it only has to order queues."""

DEFAULT_BOOT_TIME = 60.0
"""Seconds a boot is predicted to take before the first one of a run was measured."""


def estimate_of(planned: float | None) -> float:
    """Seconds a task is said to take, or assumed to where nobody says."""
    return DEFAULT_WALLTIME if planned is None else planned


class SchlouderError(Exception):
    """An error to be shown to the user as it is: it names the setting, its value and what is allowed."""


class VMState(StrEnum):
    PLANNED = "planned"
    REQUESTED = "requested"
    BOOTING = "booting"
    READY = "ready"
    DRAINING = "draining"
    TERMINATING = "terminating"
    GONE = "gone"
    HANDED_OVER = "handed over"


BOOTING = (VMState.PLANNED, VMState.REQUESTED, VMState.BOOTING)
"""The states of a VM that is not up yet."""


class TaskState(StrEnum):
    PENDING = "pending"
    SCHEDULED = "scheduled"
    SUBMITTED = "submitted"
    RUNNING = "running"
    COMPLETE = "complete"
    FAILED = "failed"
    CANCELLED = "cancelled"


VM_ENDED = (VMState.GONE, VMState.HANDED_OVER)
"""The states of a VM with which its run has nothing to do any more: its machine has ended, or is kept for
another run."""


TASK_ENDED = frozenset({TaskState.COMPLETE, TaskState.FAILED, TaskState.CANCELLED})


@dataclass(frozen=True)
class InstanceType:
    """What one machine of a type offers; `memory` (MiB) is what EC2 states, not what Slurm may promise,
    `gpu_model` EC2's name of the model in lower case, `arch` (x86_64 or arm64) what its image is made for."""

    name: str
    cpus: int
    memory: int
    gpus: int = 0
    gpu_model: str = ""
    arch: str = "x86_64"

    @functools.cached_property
    def node_memory(self) -> int:
        """MiB declared to Slurm: firmware and kernel keep a part, and a node that reports less than
        it declared is drained (INVALID_REG). They keep less of a large machine; the formula is that of
        Cluster in the Cloud (python-citc), which is below what machines report."""
        return max(int(self.memory * 0.9), self.memory - int(self.memory**0.7 * 0.9 + 500))

    @property
    def features(self) -> tuple[str, ...]:
        """The features of its nodes in Slurm."""
        return ("schlouder", self.name)

    def fits(self, need: Need) -> bool:
        return (
            need.cpus <= self.cpus
            and need.memory <= self.node_memory
            and need.gpus <= self.gpus
            and need.gpu_model in ("", self.gpu_model)
            and (not need.constraint or _holds(need.constraint, self.features))
            and (not need.types or is_named(need.types, self.name))
        )


@dataclass(frozen=True)
class Need:
    """What a task takes of each of its `nodes` VMs while it runs, and what kind of VM that must be: one with
    GPUs of a model, or with features on which a `constraint` holds, such as `m5.large|m5.xlarge`, or one of
    these instance `types` (names, families and patterns, separated by commas)."""

    cpus: int = 1
    memory: int = 0
    gpus: int = 0
    gpu_model: str = ""
    constraint: str = ""
    nodes: int = 1
    types: str = ""

    def __hash__(self) -> int:
        """Needs are counted and looked up for every task, several times."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        size = self.cpus, self.memory, self.gpus, self.nodes
        return hash((size, self.gpu_model, self.constraint, self.types))

    @property
    def features(self) -> tuple[str, ...]:
        """The features its constraint names."""
        return tuple(re.findall(r"[^&|]+", self.constraint))

    def on(self, kind: InstanceType) -> Need:
        """The same on a machine of `kind`. A task that states no memory takes its CPUs' share of it.
        One with GPUs takes them all: Slurm is not told of GPUs (a node that declares some joins only with
        a gres.conf that names its devices), so nobody else could keep two tasks off the same one."""
        memory = self.memory or kind.node_memory * self.cpus // kind.cpus
        gpus = kind.gpus if self.gpus else 0
        if memory == self.memory and gpus == self.gpus:
            return self
        return replace(self, memory=memory, gpus=gpus)


@functools.lru_cache
def is_named(words: str, name: str) -> bool:
    """Whether one of the names, families and patterns in `words` stands for the instance type `name`."""
    return any(
        fnmatchcase(name, word) or name.startswith(f"{word}.")
        for word in re.split(r"[,\s]+", words)
        if word
    )


@functools.lru_cache
def _holds(constraint: str, features: tuple[str, ...]) -> bool:
    """Whether `constraint` holds where there are these features; from left to right, as Slurm reads it."""
    first, *rest = re.split("([&|])", constraint)
    holds = first in features
    for operator, name in zip(rest[::2], rest[1::2], strict=True):
        holds = holds and name in features if operator == "&" else holds or name in features
    return holds


@dataclass(frozen=True)
class SlurmOptions:
    """What a rule asks of Slurm besides CPUs, memory and time; empty: Slurm's own default. `tasks`, on
    all VMs together, share the CPUs of the need; `extra` are options of sbatch as the user wrote them."""

    account: str = ""
    qos: str = ""
    reservation: str = ""
    constraint: str = ""
    gres: str = ""
    tasks: int = 1
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Billing:
    """How a provider charges: started units of `unit` s, at least `minimum` s.

    `margin` is how long before the end of a paid unit a VM must be given back, so that the request
    is through when the next unit would start. `boot_share` is the share of a VM's life one accepts to
    pay for booting. `keeps_late` is a habit of the original Schlouder: a VM that became idle inside
    the margin was kept, and paid for another unit.
    """

    unit: float = 1.0
    minimum: float = 60.0
    margin: float = 50.0
    boot_share: float = 0.1
    keeps_late: bool = False

    def units(self, uptime: float) -> int:
        """Started units of `uptime` seconds; a VM that was started at all costs one."""
        return max(1, math.ceil(uptime / self.unit))

    def billed(self, uptime: float) -> float:
        """Seconds on the bill after `uptime` seconds."""
        return max(self.minimum, self.units(uptime) * self.unit)

    def paid_left(self, uptime: float) -> float:
        """Seconds that are already paid after `uptime` seconds and not yet used."""
        return self.billed(uptime) - uptime

    def quantum(self, boot_time: float) -> float:
        """Q, the time strategies fill a VM up to. With units longer than what a boot of `boot_time`
        seconds is worth it is the unit; with shorter ones it keeps boots at `boot_share` of a life."""
        return max(self.unit, self.minimum, boot_time / self.boot_share)

    def left_of_quantum(self, until_idle: float, quantum: float) -> float:
        """R: seconds left of the quanta begun when a VM has `until_idle` seconds from its request to
        its idle date, margin included. A unit shorter than the margin is not worth keeping clear of."""
        used = until_idle + (self.margin if self.unit > self.margin else 0.0)
        return max(1, math.ceil(used / quantum)) * quantum - used

    def exceeds(self, until_idle: float, quantum: float) -> bool:
        """Whether that is more than the first quantum, margin included as above."""
        return until_idle + (self.margin if self.unit > self.margin else 0.0) > quantum

    def retires_in(self, uptime: float, idle_for: float, boot_time: float) -> float:
        """Seconds from now until a VM that stays idle should go; 0 or less: now.

        Units longer than a boot: inside the last `margin` seconds of what is paid. Shorter units:
        once it was idle for as long as a boot takes, for waiting longer costs more than booting
        again and waiting less loses what a boot costs; but not before the minimum charge is used up.
        A unit shorter than the margin counts as such a short one too.
        """
        if self.unit <= max(boot_time, self.margin):
            return max(boot_time - idle_for, self.minimum - uptime)
        left = self.paid_left(uptime)
        late = left <= self.margin and left + idle_for <= self.margin
        if self.keeps_late and late:
            return left + self.unit - self.margin
        return left - self.margin


@dataclass(slots=True)
class Task:
    """One Snakemake job (or group job) on its way through the broker.

    `limit` is the rule's `runtime` in seconds, `planned` what the user says it takes
    (`schlouder_walltime`, else `runtime`, which `is_limit`), `expected` what was planned with,
    `attempt` counts the submissions to Slurm, `losses` the machines that were lost under it.
    `may_bundle`: it may share a Slurm job with others, and `is_behind` while it waits there for its turn.
    `recalled`: we cancelled the submission and will make another. `started` and `ended` are Slurm's
    times of the last attempt. The failure of a task with `ends_run` ends the run. `after` are the tasks
    it waited for, `level` and `rank` (s) its place in the workflow (`order.Place`), as far as known.
    `submission` names the Slurm job of its last attempt, in which it has its `turn`. `identity` tells
    which results it makes, `content` how (`reattach.py`); one that a killed run left is not `is_wanted`
    until it is handed over again. `spot`: whether it may run on a spot machine, `reclaims` how many of those
    were taken back under it. `need` is what it takes of its VM, `asked` what it was before it had one.
    """

    key: str
    name: str
    rule: str
    jobid: str
    strategy: str
    need: Need
    command: str
    ends_run: bool = False
    limit: float | None = None
    planned: float | None = None
    is_limit: bool = False
    expected: float | None = None
    state: TaskState = TaskState.PENDING
    received: float = 0.0
    started: float | None = None
    ended: float | None = None
    vm: str | None = None
    attempt: int = 0
    losses: int = 0
    recalled: bool = False
    may_bundle: bool = False
    is_behind: bool = False
    options: SlurmOptions = field(default_factory=SlurmOptions)
    slurm_id: str | None = None
    reason: str = ""
    after: tuple[str, ...] = ()
    level: int = 0
    rank: float | None = None
    submission: str = ""
    turn: int = 0
    identity: str = ""
    content: str = ""
    is_wanted: bool = True
    spot: str = NEVER
    reclaims: int = 0
    asked: Need | None = None

    @property
    def attempt_key(self) -> str:
        """Names one submission to Slurm; travels as the Slurm job's comment."""
        return f"{self.key}.{self.attempt}"

    @property
    def took(self) -> float | None:
        """Seconds it really ran."""
        return None if self.started is None or self.ended is None else self.ended - self.started

    @property
    def walltime(self) -> float:
        """Seconds it is taken to run."""
        return estimate_of(self.planned) if self.expected is None else self.expected


@dataclass(slots=True)
class VM:
    """One rented machine, which is one Slurm node; `name` is the node's name.

    `requested` is when it was asked for, `meter` and `meter_end` when the provider's meter started and
    stopped (if it has said so), `price` what it was to cost when it was asked for, `list_price` what the
    type costs on demand (USD an hour, None where nobody knows), `token`, `batch` and `zone` those of its
    launch (`LaunchRequest`), `leaves_by` when the provider takes a spot machine back, `boot_planned` the
    predicted seconds from request to ready, `beside` how many others booted then. `queue` holds what is
    planned for it, `active` what Slurm was given (by task key). `free_at` is the date at which all of it
    should be done, `unstarted` the seconds of it that have not begun. `ending` is set once the cloud itself
    says that the machine is on its way out, from when it costs nothing more; `node_deleted` once Slurm has
    no record of it any more. `is_adopted`: another process asked for it, and was killed, or is done with it.

    A VM may be handed over from run to run. `kept_until`: it was, by this run, and stays for another one
    until then. `origin` is the run that has started it (empty: this one), and `taken` the date at which the
    run before this one gave it away: what it costs from then on is this one's.

    A task may run on `nodes` machines together: on a leader, whose tasks they are, and on its companions,
    which have the leader's name as `leader` and nothing of their own in `queue` and `active`.
    """

    name: str
    strategy: str
    type: InstanceType
    requested: float
    boot_planned: float = DEFAULT_BOOT_TIME
    market: str = ON_DEMAND
    price: float | None = None
    token: str = ""
    batch: tuple[str, ...] = ()
    zone: str = ""
    beside: int = 0
    meter: float | None = None
    state: VMState = VMState.PLANNED
    instance_id: str | None = None
    ready: float | None = None
    ended: float | None = None
    idle_since: float | None = None
    launch_attempt: int = 1
    retry_at: float = 0.0
    reason: str = ""
    ending: bool = False
    node_deleted: bool = False
    queue: deque[Task] = field(default_factory=deque)
    active: dict[str, Task] = field(default_factory=dict)
    free_at: float = 0.0
    unstarted: float = 0.0
    is_adopted: bool = False
    nodes: int = 1
    leader: str | None = None
    meter_end: float | None = None
    leaves_by: float | None = None
    list_price: float | None = None
    origin: str = ""
    taken: float | None = None
    kept_until: float | None = None

    def __post_init__(self) -> None:
        self.free_at = self.requested + self.boot_planned

    @property
    def is_open(self) -> bool:
        """Whether tasks may still be given to it."""
        return self.is_booting or self.state == VMState.READY

    @property
    def is_booting(self) -> bool:
        return self.state in BOOTING

    @property
    def is_settled(self) -> bool:
        """Nothing of it is left, neither machine nor node, or it is not ours any more."""
        return self.state == VMState.HANDED_OVER or (
            self.state == VMState.GONE and self.node_deleted
        )

    @property
    def is_unused(self) -> bool:
        return not self.queue and not self.active

    @property
    def boot_time(self) -> float | None:
        """Seconds it took from its request, if that was watched."""
        return None if self.ready is None or self.is_adopted else self.ready - self.requested

    def has_room(self, need: Need) -> bool:
        """Whether `need` can run beside what runs there now."""
        return self._holds_beside(need.cpus, need.memory, need.gpus)

    def takes_ahead(self, gpus: int = 0) -> bool:
        """Whether a task may be handed over that waits for one that runs, so that Slurm has it at hand: not
        where others wait there already, nor for GPUs, of which Slurm does not know."""
        for task in self.active.values():
            if task.is_behind:
                return False
        return self._holds_beside(0, 0, gpus)

    def _holds_beside(self, cpus: int, memory: int, gpus: int) -> bool:
        for task in self.active.values():
            if not task.is_behind:
                cpus += task.need.cpus
                memory += task.need.memory
                gpus += task.need.gpus
        kind = self.type
        return cpus <= kind.cpus and memory <= kind.node_memory and gpus <= kind.gpus

    @property
    def free_cpus(self) -> int:
        """As `free`, the CPUs alone."""
        cpus = self.type.cpus
        for task in self.active.values():
            cpus -= 0 if task.is_behind else task.need.cpus
        for task in self.queue:
            cpus -= task.need.cpus
        return cpus

    def free(self) -> Need:
        """What is left beside all that runs there and is planned for it."""
        cpus, memory, gpus = self.type.cpus, self.type.node_memory, self.type.gpus
        for task in (*self.active.values(), *self.queue):
            if not task.is_behind:
                cpus -= task.need.cpus
                memory -= task.need.memory
                gpus -= task.need.gpus
        return Need(cpus, memory, gpus)

    @property
    def billed_from(self) -> float:
        """The date from which the provider counts."""
        return self.requested if self.meter is None else self.meter

    def uptime(self, now: float) -> float:
        """Seconds the provider counts."""
        return now - self.billed_from

    def billed(self, billing: Billing, now: float) -> float:
        """Seconds on this run's bill."""
        total = billing.billed(max(0.0, self.uptime(now)))
        return max(0.0, total - self.billed_before(billing))

    def billed_before(self, billing: Billing) -> float:
        """Seconds on the bills of earlier runs."""
        return 0.0 if self.taken is None else billing.billed(self.uptime(self.taken))

    def idle_at(self, now: float) -> float:
        """Predicted date at which all that is planned for it is done. What runs longer than planned
        is taken to end now."""
        return max(self.free_at, now + self.unstarted)

    def frees(self, slots: int, now: float) -> tuple[float, ...]:
        """When each of `slots` tasks side by side could begin its next one; where more than that many run
        now, those that end last stand in the way."""
        if slots == 1:
            return (self.idle_at(now),)
        up = max(now, self.requested + self.boot_planned) if self.is_booting else now
        ends = [max(now, (task.started or now) + task.walltime) for task in self.active.values()]
        ends += [up + task.walltime for task in self.queue]
        return tuple([*[up] * slots, *sorted(ends)][-slots:])

    def share(self, task: Task) -> float:
        """Seconds `task` adds to the idle date: its CPU seconds, spread over the machine's CPUs; all of
        them with GPUs, which it takes all."""
        return self._spread(task.walltime, task)

    def _spread(self, seconds: float, task: Task) -> float:
        return seconds if task.need.gpus else seconds * task.need.cpus / self.type.cpus

    def plan(self, task: Task, now: float) -> None:
        """Puts `task` at the end of the queue."""
        share = self.share(task)
        self.free_at = self.idle_at(now) + share
        self.unstarted += share
        self.queue.append(task)

    def has_begun(self, task: Task, started: float) -> None:
        """A task of `active` runs since `started`."""
        if not any(other.started for other in self.active.values() if other is not task):
            self.free_at = started + self.unstarted
        self.unstarted -= self.share(task)

    def has_ended(self, task: Task, now: float) -> None:
        """A task of `active` has left it."""
        if not task.started:
            self.unstarted -= self.share(task)
        if self.is_unused:
            self.unstarted = 0.0
        if any(other.started for other in self.active.values()):
            took = now - (task.started or now)
            self.free_at += self._spread(took - task.walltime, task)
        else:
            self.free_at = now + self.unstarted

    def recount(self, now: float) -> None:
        """Takes idle date and unstarted work anew from what is in the queue and in `active`."""
        begun = [task for task in self.active.values() if task.started]
        waiting = [task for task in self.active.values() if not task.started]
        self.unstarted = sum(self.share(task) for task in (*waiting, *self.queue))
        left = sum(
            self._spread(max(0.0, task.walltime - (now - (task.started or now))), task)
            for task in begun
        )
        up = self.requested + self.boot_planned if self.is_booting else now
        self.free_at = max(up, now) + left + self.unstarted
