"""Tasks, VMs, the fleet and billing arithmetic: plain data, no clock, no I/O.

Times are seconds since the epoch, durations seconds, memory MiB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

DEFAULT_WALLTIME = 300.0
"""Seconds assumed for a task nobody gave an estimate for; it only has to order queues."""

DEFAULT_BOOT_TIME = 60.0
"""Seconds a boot is predicted to take before the first one of a run was measured."""


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


class TaskState(StrEnum):
    PENDING = "pending"
    SCHEDULED = "scheduled"
    SUBMITTED = "submitted"
    RUNNING = "running"
    COMPLETE = "complete"
    FAILED = "failed"
    CANCELLED = "cancelled"


TASK_ENDED = frozenset({TaskState.COMPLETE, TaskState.FAILED, TaskState.CANCELLED})


@dataclass(frozen=True)
class InstanceType:
    """What one machine of a type offers; `memory` (MiB) is what EC2 states, not what Slurm may promise."""

    name: str
    cpus: int
    memory: int

    @property
    def node_memory(self) -> int:
        """MiB declared to Slurm: firmware and kernel keep a part, and a node that reports less than
        it declared is drained (INVALID_REG)."""
        return int(self.memory * 0.9)

    def fits(self, need: Need) -> bool:
        return need.cpus <= self.cpus and need.memory <= self.node_memory


@dataclass(frozen=True)
class Need:
    """What a task takes of its VM while it runs."""

    cpus: int = 1
    memory: int = 0


@dataclass(frozen=True)
class Billing:
    """How a provider charges: started units of `unit` s, at least `minimum` s.

    `margin` is how long before the end of a paid unit a VM must be given back, so that the request
    is through when the next unit would start.
    """

    unit: float = 1.0
    minimum: float = 60.0
    margin: float = 50.0

    def units(self, uptime: float) -> int:
        """Started units of `uptime` seconds; a VM that was started at all costs one."""
        return max(1, math.ceil(uptime / self.unit))

    def billed(self, uptime: float) -> float:
        """Seconds on the bill after `uptime` seconds."""
        return max(self.minimum, self.units(uptime) * self.unit)

    def paid_left(self, uptime: float) -> float:
        """Seconds that are already paid after `uptime` seconds and not yet used."""
        return self.billed(uptime) - uptime

    def may_retire(self, uptime: float, idle_for: float, boot_time: float) -> bool:
        """Whether an idle VM should go now.

        Units longer than a boot: inside the last `margin` seconds of what is paid. Shorter units:
        once it was idle for as long as a boot takes, for waiting longer costs more than booting
        again and waiting less loses what a boot costs.
        """
        if self.unit > boot_time:
            return self.paid_left(uptime) <= self.margin
        return idle_for >= boot_time


@dataclass
class Task:
    """One Snakemake job (or group job) on its way through the broker.

    `limit` is the rule's `runtime` in seconds, `planned` what it is expected to take
    (`schlouder_walltime`, else `runtime`), `attempt` counts the submissions to Slurm, `losses` the
    machines that were lost under it. `started` and
    `ended` are Slurm's times of the last attempt. The failure of a task with `ends_run` ends the run.
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
    state: TaskState = TaskState.PENDING
    received: float = 0.0
    started: float | None = None
    ended: float | None = None
    vm: str | None = None
    attempt: int = 0
    losses: int = 0
    slurm_id: str | None = None
    reason: str = ""

    @property
    def attempt_key(self) -> str:
        """Names one submission to Slurm; travels as the Slurm job's comment."""
        return f"{self.key}.{self.attempt}"

    @property
    def walltime(self) -> float:
        return DEFAULT_WALLTIME if self.planned is None else self.planned


@dataclass
class VM:
    """One rented machine, which is one Slurm node; `name` is the node's name.

    `queue` holds what is planned for it, `active` what Slurm was given (by task key). `ending` is set
    once the cloud itself says that the machine is on its way out, from when it costs nothing more;
    `node_deleted` once Slurm has no record of it any more.
    """

    name: str
    strategy: str
    type: InstanceType
    token: str
    requested: float
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
    queue: list[Task] = field(default_factory=list)
    active: dict[str, Task] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        """Whether tasks may still be given to it."""
        return self.state in (VMState.PLANNED, VMState.REQUESTED, VMState.BOOTING, VMState.READY)

    @property
    def is_booting(self) -> bool:
        return self.state in (VMState.PLANNED, VMState.REQUESTED, VMState.BOOTING)

    @property
    def is_settled(self) -> bool:
        """Nothing of it is left, neither machine nor node."""
        return self.state == VMState.GONE and self.node_deleted

    @property
    def is_unused(self) -> bool:
        return not self.queue and not self.active

    @property
    def boot_time(self) -> float | None:
        return None if self.ready is None else self.ready - self.requested

    def has_room(self, need: Need) -> bool:
        """Whether `need` can run beside what runs there now."""
        cpus = sum(task.need.cpus for task in self.active.values())
        memory = sum(task.need.memory for task in self.active.values())
        return self.type.fits(Need(cpus + need.cpus, memory + need.memory))

    def idle_at(self, now: float, boot_time: float) -> float:
        """Predicted date at which all that is planned for it is done.

        Work is counted in CPU seconds and spread over its CPUs; what runs longer than planned is
        taken to end now.
        """
        start = max(now, self.requested + boot_time) if self.is_booting else now
        work = 0.0
        for task in self.active.values():
            left = task.walltime - max(0.0, now - task.started if task.started else 0.0)
            work += max(0.0, left) * task.need.cpus
        work += sum(task.walltime * task.need.cpus for task in self.queue)
        return start + work / self.type.cpus


@dataclass
class Fleet:
    """What a strategy may see and ask: the open VMs of its pool, in the order of their request."""

    vms: list[VM]
    now: float
    boot_time: float

    def __iter__(self) -> Iterator[VM]:
        return iter(self.vms)

    def first(self, fits: Callable[[VM], bool] = lambda vm: True) -> VM | None:
        return next((vm for vm in self.vms if fits(vm)), None)

    def idle_first(self) -> VM | None:
        """The VM that is predicted to be idle before the others."""
        return min(self.vms, key=lambda vm: vm.idle_at(self.now, self.boot_time), default=None)
