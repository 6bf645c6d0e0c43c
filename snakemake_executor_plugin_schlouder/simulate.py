"""Simulated ports and a virtual clock under the same broker that runs live.

Events (a task arrives, a boot ends, a task ends) move the clock; the broker looks every `period`
seconds, but only rounds in which something happened, or in which time alone changes a decision, are
played. Tasks share a VM as far as their CPUs and memory fit into its type; with one core, as in the
recorded runs, one runs at a time.
"""

from __future__ import annotations

import gc
import heapq
import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .broker import Broker, BrokerConfig
from .lease import Lease
from .market.tariff import Tariff
from .model import Billing, InstanceType, SchlouderError, Task, TaskState
from .order import SUBMISSION, checked
from .pool import Announcement, Goal
from .prediction import BootPredictor, Walltimes
from .provision import Instance, LaunchOutcome, LaunchRequest
from .slurm import ClusterInfo, ClusterView, JobRequest, JobStatus, NodeStatus, SubmitOutcome
from .slurm.states import JobPhase
from .tasklist import RecordedBoot, TaskList

ONE_CORE = InstanceType("one-core", 1, 4096)
_ALONE = (0, None)
_SILENT = logging.getLogger("schlouder.simulation")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False


@dataclass(frozen=True)
class Lags:
    """Seconds that pass between events: `notice` from a task's end until the broker can see it,
    `release` from then until tasks that waited for it are handed over."""

    notice: float = 0.0
    release: float = 0.0


@dataclass(frozen=True)
class Scenario:
    """What a simulation needs besides the tasks. `boots` predicts; what boots really take comes from
    the task list, in the order of the requests, and for further VMs from `real_boots`, or else from the
    prediction. `walltimes`: what is known of the users' estimates beforehand. `order`: that of the
    waiting tasks, where the strategy has none of its own."""

    strategy: str
    max_vms: int
    billing: Billing
    boots: BootPredictor
    period: float = 1.0
    real_boots: BootPredictor | None = None
    walltimes: Walltimes | None = None
    goal: Goal = field(default_factory=Goal)
    order: str = SUBMISSION
    types: tuple[InstanceType, ...] = (ONE_CORE,)
    tariff: Tariff = field(default_factory=Tariff.unknown)
    lags: Lags = Lags()


@dataclass(frozen=True)
class Outcome:
    """`units` and `billed` (s) are summed over the VMs, `busy` (s) over the VMs of all tasks;
    `makespan` is the date at which the last task ended, `usd` what the VMs cost, None where nobody knows."""

    vms: int
    units: int
    billed: float
    uptime: float
    busy: float
    makespan: float
    usd: float | None = None

    @property
    def idle_share(self) -> float:
        """Share of the paid time in which nothing ran."""
        return 1 - self.busy / self.billed if self.billed else 0.0


@dataclass
class _Node:
    """A VM, `cpus` and `memory` of which are free; `waiting` holds jobs for which there is no room."""

    instance: Instance
    cpus: int
    memory: int
    waiting: deque[JobRequest] = field(default_factory=deque)
    up: bool = False
    drained: bool = False

    @property
    def status(self) -> NodeStatus:
        return NodeStatus(self.instance.node, "drained" if self.drained else "idle", True, "")


class _World:
    """The ports `Cloud` and `Cluster` in one: machines, nodes and jobs in virtual time. A view holds
    what has changed since the last one."""

    def __init__(
        self, tasks: TaskList, boots: BootPredictor, walltimes: dict[str, float], lags: Lags
    ) -> None:
        self.now = 0.0
        self.events: list[tuple[float, int, str, str]] = []
        self.nodes: dict[str, _Node] = {}
        self.ended: dict[str, float] = {}
        self._recorded = tasks.boots
        self._boots = boots
        self._walltimes = walltimes
        self._lags = lags
        self._count = 0
        self._booting = 0
        self._instances: dict[str, _Node] = {}
        self._changed_jobs: dict[str, JobStatus] = {}
        self._changed_nodes: dict[str, _Node] = {}
        self._running: dict[str, tuple[JobRequest, float]] = {}

    def clock(self) -> float:
        return self.now

    def push(self, date: float, kind: str, name: str) -> None:
        self._count += 1
        heapq.heappush(self.events, (date, self._count, kind, name))

    # -- Cloud

    def launch(self, requests: Sequence[LaunchRequest]) -> list[LaunchOutcome]:
        return [self._launch(request) for request in requests]

    def _launch(self, request: LaunchRequest) -> Instance:
        number = len(self.nodes)
        boot = self._boot(number)
        started = max(self.now, boot.provisioned)
        ready = started + boot.seconds + boot.lag
        instance = Instance(
            f"i-{number}", request.node, "", "running", request.type.name, "", started
        )
        node = _Node(instance, request.type.cpus, request.type.node_memory)
        self.nodes[request.node] = self._instances[instance.id] = node
        self._booting += 1
        self.push(ready, "up", request.node)
        return instance

    def _boot(self, index: int) -> RecordedBoot:
        if index < len(self._recorded):
            return self._recorded[index]
        return RecordedBoot(self._boots.predict(self._booting))

    def instances(self, *runs: str) -> list[Instance]:
        return [node.instance for node in self.nodes.values()]

    def terminate(self, instance_ids: Sequence[str]) -> None:
        for instance_id in instance_ids:
            node = self._instances[instance_id]
            node.instance = replace(node.instance, state="terminated")

    def console(self, instance_id: str) -> str:
        return ""

    # -- Cluster

    def check(self) -> ClusterInfo:
        return ClusterInfo((22, 5), "", "")

    def submit(self, jobs: Sequence[JobRequest]) -> list[SubmitOutcome]:
        for job in jobs:
            node = self.nodes[job.node]
            node.waiting.append(job)
            self._fill(node)
        return [job.key for job in jobs]

    def view(self, run: str, nodes: bool = True) -> ClusterView:
        jobs, self._changed_jobs = self._changed_jobs, {}
        changed, self._changed_nodes = self._changed_nodes, {}
        return ClusterView(
            jobs, {name: node.status for name, node in changed.items()}, is_complete=False
        )

    def cancel_run(self, run: str) -> None: ...

    def knows(self, slurm_id: str, key: str) -> bool:
        return True

    def cancel(self, jobs: Mapping[str, str]) -> None: ...

    def foreign_jobs(self, run: str) -> dict[str, list[str]]:
        return {}

    def drain(self, nodes: Iterable[str], reason: str) -> None:
        for name in nodes:
            self.nodes[name].drained = True
            self._changed_nodes[name] = self.nodes[name]

    def fail(self, node: str, reason: str) -> None: ...

    def renew(self, nodes: Iterable[str], lease: Lease) -> None: ...

    def delete(self, node: str) -> bool:
        return True

    def hurry(self) -> None: ...

    # -- time

    def happen(self, kind: str, name: str) -> str | None:
        """An event: the node `name` is up, or the submission `name` has ended or been seen to have ended;
        returns the task the broker can now see to have ended."""
        if kind == "up":
            node = self.nodes[name]
            node.up = True
            self._booting -= 1
            self._changed_nodes[name] = node
            return None
        return self._finish(name) if kind == "end" else self._show_end(name)

    def _fill(self, node: _Node) -> None:
        """Starts what has room, first come first served."""
        while node.waiting:
            job = node.waiting[0]
            if job.cpus > node.cpus or job.memory > node.memory:
                return
            node.cpus -= job.cpus
            node.memory -= job.memory
            self._start(node.waiting.popleft())

    def _start(self, job: JobRequest) -> None:
        self._running[job.key] = job, self.now
        self._changed_jobs[job.key] = JobStatus(
            job.key, job.key, JobPhase.RUNNING, "RUNNING", "", self.now, None
        )
        self.push(self.now + self._walltimes[_task_of(job.key)], "end", job.key)

    def _finish(self, key: str) -> str | None:
        job, _ = self._running[key]
        node = self.nodes[job.node]
        node.cpus += job.cpus
        node.memory += job.memory
        self.ended[_task_of(key)] = self.now
        seen = None
        if self._lags.notice:
            self.push(self.now + self._lags.notice, "seen", key)
        else:
            seen = self._show_end(key)
        self._fill(node)
        return seen

    def _show_end(self, key: str) -> str:
        _, begun = self._running.pop(key)
        task = _task_of(key)
        self._changed_jobs[key] = JobStatus(
            key, key, JobPhase.SUCCEEDED, "COMPLETED", "", begun, self.ended[task]
        )
        return task


class _NoBooks:
    """A simulation leaves nothing behind."""

    def write(self, run: str, *changes: object, **more: object) -> None: ...


class Simulation:
    """One run of a task list under one scenario; `run` plays it to the last VM's end."""

    def __init__(self, tasks: TaskList, scenario: Scenario) -> None:
        self._tasks = {task.name: task for task in tasks.tasks}
        self._scenario = scenario
        self._places = tasks.places
        self._order = {task.name: number for number, task in enumerate(tasks.tasks)}
        self._waits = {task.name: set(task.after) for task in tasks.tasks if task.after}
        self._followers: dict[str, list[str]] = {}
        for task in tasks.tasks:
            for name in task.after:
                self._followers.setdefault(name, []).append(task.name)
        walltimes = {task.name: task.real for task in tasks.tasks}
        real_boots = scenario.real_boots or scenario.boots
        self._world = _World(tasks, real_boots, walltimes, scenario.lags)
        config = BrokerConfig(
            run="sim",
            workdir=Path("/nonexistent"),
            partition="",
            types=scenario.types,
            max_vms=scenario.max_vms,
            billing=scenario.billing,
            boot_timeout=math.inf,
            describe_every=math.inf,
            goal=scenario.goal,
            order=checked(scenario.order),
            tariff=scenario.tariff,
            slurm_is_true=True,
        )
        self.broker = Broker(
            config,
            self._world,
            self._world,
            _NoBooks(),
            _SILENT,
            clock=self._world.clock,
            boots=scenario.boots,
            walltimes=scenario.walltimes,
            witness=lambda path: None,
            revoke=lambda path: False,
            script=lambda name, command, path: "",
        )
        self.broker.expect(
            Announcement(scenario.strategy, task.rule, task.need, task.predicted)
            for task in tasks.tasks
        )

    def run(self) -> Outcome:
        for task in self._tasks.values():
            if not task.after:
                self._world.push(task.submission, "arrive", task.name)
        while (date := self._next_round()) is not None:
            self._play_until(date)
            self._world.now = date
            for ended in self.broker.tick():
                if ended.state != TaskState.COMPLETE:
                    raise SchlouderError(f"{ended.name}: {ended.reason}")
        left = self._tasks.keys() - self._world.ended.keys()
        if left:
            raise SchlouderError(
                f"{len(left)} of {len(self._tasks)} tasks never start under {self._scenario.strategy}, "
                f"{min(left)} among them"
            )
        return self._outcome()

    def _next_round(self) -> float | None:
        """The next date of the broker's clock at which there is something to do."""
        event = self._world.events[0][0] if self._world.events else math.inf
        date = min(self.broker.next_change(), event)
        if date == math.inf:
            return None
        period = self._scenario.period
        after = self._world.now + period if self._world.now or self._world.nodes else 0.0
        return max(after, math.ceil(date / period - 1e-9) * period)

    def _play_until(self, date: float) -> None:
        arrived: list[str] = []
        while self._world.events and self._world.events[0][0] <= date:
            self._world.now, _, kind, name = heapq.heappop(self._world.events)
            if kind == "arrive":
                arrived.append(name)
            elif (ended := self._world.happen(kind, name)) is not None:
                self._release(ended, arrived, date)
        if arrived:
            arrived.sort(key=self._order.__getitem__)
            self.broker.submit([self._task(name) for name in arrived])

    def _release(self, ended: str, arrived: list[str], date: float) -> None:
        """Tasks that waited for `ended` only, and were submitted, may start now."""
        for name in self._followers.get(ended, ()):
            self._waits[name].discard(ended)
            if not self._waits[name]:
                submission = self._tasks[name].submission
                if self._scenario.lags.release:
                    submission = max(submission, date + self._scenario.lags.release)
                if submission <= date:
                    arrived.append(name)
                else:
                    self._world.push(submission, "arrive", name)

    def _task(self, name: str) -> Task:
        recorded = self._tasks[name]
        level, rank = self._places.get(name, _ALONE)
        return Task(
            key=name,
            name=name,
            rule=recorded.rule,
            jobid=name,
            strategy=self._scenario.strategy,
            need=recorded.need,
            command="",
            planned=recorded.predicted,
            after=recorded.after,
            level=level,
            rank=rank,
        )

    def _outcome(self) -> Outcome:
        billing = self._scenario.billing
        used = [
            (vm, vm.uptime(vm.ended))
            for vm in self.broker.vms()
            if vm.ended is not None and vm.instance_id is not None
        ]
        uptimes = [uptime for _, uptime in used]
        prices = [vm.price for vm, _ in used]
        usd = (
            sum(billing.billed(up) / 3600 * (vm.price or 0.0) for vm, up in used)
            if None not in prices
            else None
        )
        return Outcome(
            vms=len(uptimes),
            units=sum(billing.units(uptime) for uptime in uptimes),
            billed=sum(billing.billed(uptime) for uptime in uptimes),
            uptime=sum(uptimes),
            busy=sum(task.real * task.need.nodes for task in self._tasks.values()),
            makespan=max(self._world.ended.values()),
            usd=usd,
        )


def _task_of(key: str) -> str:
    """The task of a submission's key, `TASK.ATTEMPT`."""
    return key.rpartition(".")[0]


def simulate(tasks: TaskList, scenario: Scenario) -> Outcome:
    """Plays the list once. Nothing of it refers to itself in a circle, and the collector of such circles
    would look at every task again and again; it pauses."""
    paused = gc.isenabled()
    gc.disable()
    try:
        return Simulation(tasks, scenario).run()
    finally:
        if paused:
            gc.enable()
