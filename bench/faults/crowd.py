"""Ten thousand tasks through the real broker in one run, a hundred VMs coming and going, and a take-over of a
large run: what a round and a task cost as they go by, on a cloud and a Slurm in memory, in virtual time.

Tasks end and machines are taken away one by one all the time, so that a round late in the run has as much to
do as an early one. A round's CPU time is that of the broker with its journal, without what the ports in
memory take for their answers: how many ended jobs Slurm remembers is Slurm's affair. That the broker reads
them counts. A pass of Python's garbage collector counts as the time of whoever allocates when it comes.
"""

from __future__ import annotations

import functools
import gc
import logging
import statistics
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from bench.rows import Row
from snakemake_executor_plugin_schlouder.broker import Broker, BrokerConfig
from snakemake_executor_plugin_schlouder.journal import Journal, RunRecord
from snakemake_executor_plugin_schlouder.lease import Lease
from snakemake_executor_plugin_schlouder.model import Billing, InstanceType, Need, Task, TaskState
from snakemake_executor_plugin_schlouder.provision import Instance, LaunchOutcome, LaunchRequest
from snakemake_executor_plugin_schlouder.slurm import (
    ClusterInfo,
    ClusterView,
    JobRequest,
    JobStatus,
    NodeStatus,
    SubmitOutcome,
)
from snakemake_executor_plugin_schlouder.slurm.states import phase_of

TASKS, VMS, CPUS = 10_000, 100, 10
AT_A_TIME = 1000
"""Tasks that are handed over and have not ended: as many at the end as at the start."""

TASK_SECONDS, LIFE_SECONDS, BOOT_SECONDS = (30, 90), (60, 1100), 5.0
"""What tasks and machines last, from and to: any of it is as likely."""

EARLY, LATE = (1000, 3000), (7000, 9000)
"""Rounds that are compared, by how many tasks have ended."""

REMEMBERED = 300.0
"""Seconds for which Slurm knows jobs that have ended (MinJobAge)."""

GROWTH_GOAL, MEMORY_GOAL, RECOVERY_GOAL = 2.0, 8.0, 5.0
JOURNALED = 1000
RUN, KIND = "crowd", InstanceType("large", CPUS, 1_000_000)


P = ParamSpec("P")
R = TypeVar("R")


def _port(port: Callable[Concatenate[World, P], R]) -> Callable[Concatenate[World, P], R]:
    """Counts the CPU seconds that the fake takes."""

    @functools.wraps(port)
    def counted(world: World, /, *args: P.args, **kwargs: P.kwargs) -> R:
        begun = time.thread_time()
        try:
            return port(world, *args, **kwargs)
        finally:
            world.used += time.thread_time() - begun

    return counted


def _lasts(name: str, bounds: tuple[int, int]) -> int:
    low, high = bounds
    return low + zlib.crc32(name.encode()) % (high - low + 1)


@dataclass
class Job:
    """`state` is how it ends, or has ended."""

    request: JobRequest
    begun: float
    ended: float
    state: str = "COMPLETED"


@dataclass
class World:
    """Both ports. A machine is up after a while, and EC2 takes it back at the end of its life, with the jobs
    that run there. Jobs begin at once: CPUs are the broker's to count. `used`: CPU seconds of the ports."""

    now: float = 1_000_000.0
    machines: dict[str, Instance] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)
    drained: set[str] = field(default_factory=set)
    launched: int = 0
    used: float = 0.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    @_port
    def launch(self, requests: Sequence[LaunchRequest]) -> list[LaunchOutcome]:
        made: list[LaunchOutcome] = []
        for request in requests:
            self.launched += 1
            instance = Instance(
                *(f"i-{self.launched}", request.node, RUN, "running", request.type.name, ""),
                launched=self.now,
            )
            self.machines[instance.id] = instance
            self.nodes[request.node] = instance.id
            made.append(instance)
        return made

    @_port
    def instances(self, *runs: str) -> list[Instance]:
        """Machines that have ended are listed for an hour."""
        for id, one in list(self.machines.items()):
            if one.ended is not None and self.now - one.ended > 3600:
                del self.machines[id]
        return list(self.machines.values())

    def take_back(self) -> None:
        """What EC2 does of its own accord."""
        for id, one in list(self.machines.items()):
            if one.is_alive and self.now - (one.launched or 0) > _lasts(id, LIFE_SECONDS):
                self._end(id, "Server.InternalError")

    def _end(self, id: str, reason: str) -> None:
        one = self.machines[id]
        self.machines[id] = replace(one, state="terminated", reason=reason, ended=self.now)
        self._end_jobs(
            (job for job in self.jobs.values() if job.request.node == one.node), "NODE_FAIL"
        )

    def _end_jobs(self, jobs: Iterable[Job], state: str) -> None:
        for job in jobs:
            if self.now < job.ended:
                job.ended, job.state = self.now, state

    @_port
    def terminate(self, instance_ids: Sequence[str]) -> None:
        for id in instance_ids:
            if self.machines[id].is_alive:
                self._end(id, "Client.UserInitiatedShutdown")

    def console(self, instance_id: str) -> str:
        return ""

    def check(self) -> ClusterInfo:
        return ClusterInfo((22, 5), "here:6817", "/run/munge/munge.socket.2")

    @_port
    def submit(self, jobs: Sequence[JobRequest]) -> list[SubmitOutcome]:
        for request in jobs:
            job = Job(request, self.now, self.now + _lasts(request.key, TASK_SECONDS))
            self.jobs[request.key] = job
            if not self.machines[self.nodes[request.node]].is_alive:
                self._end_jobs([job], "NODE_FAIL")
        return [job.key for job in jobs]

    @_port
    def view(self, run: str, nodes: bool = True) -> ClusterView:
        for key, job in list(self.jobs.items()):
            if self.now - job.ended > REMEMBERED:
                del self.jobs[key]
        jobs = {key: self._status(key, job) for key, job in self.jobs.items()}
        return ClusterView(jobs, self._nodes() if nodes else {})

    def _status(self, key: str, job: Job) -> JobStatus:
        is_over = self.now >= job.ended
        state = job.state if is_over else "RUNNING"
        ended = job.ended if is_over else None
        return JobStatus(key, key, phase_of(state), state, "None", job.begun, ended)

    def _nodes(self) -> dict[str, NodeStatus]:
        busy = {job.request.node for job in self.jobs.values() if self.now < job.ended}
        return {
            name: NodeStatus(name, self._node_state(name, name in busy), True, "none")
            for name, id in self.nodes.items()
            if self.now - (self.machines[id].launched or 0) >= BOOT_SECONDS
        }

    def _node_state(self, name: str, is_busy: bool) -> str:
        if not self.machines[self.nodes[name]].is_alive:
            return "down"
        if name in self.drained:
            return "draining" if is_busy else "drained"
        return "mixed" if is_busy else "idle"

    def cancel_run(self, run: str) -> None: ...

    def knows(self, slurm_id: str, key: str) -> bool:
        return slurm_id in self.jobs

    @_port
    def cancel(self, jobs: Mapping[str, str]) -> None:
        self._end_jobs((self.jobs[id] for id in jobs if id in self.jobs), "CANCELLED")

    def foreign_jobs(self, run: str) -> dict[str, list[str]]:
        return {}

    def drain(self, nodes: Iterable[str], reason: str) -> None:
        self.drained.update(nodes)

    def fail(self, node: str, reason: str) -> None: ...

    def renew(self, nodes: Iterable[str], lease: Lease) -> None: ...

    def delete(self, node: str) -> bool:
        self.nodes.pop(node, None)
        return True

    def hurry(self) -> None: ...


def broker_of(folder: Path, world: World, journal: Journal) -> Broker:
    config = BrokerConfig(
        run=RUN,
        workdir=folder,
        partition="schlouder",
        types=(KIND,),
        max_vms=VMS,
        billing=Billing(),
        boot_timeout=600,
    )
    config.files.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger("bench.crowd")
    log.setLevel(logging.CRITICAL)
    return Broker(config, world, world, journal, log, world.clock, world.sleep)


def task_of(number: int) -> Task:
    return Task(
        key=f"{RUN}-{number}",
        name=f"short number={number}",
        rule="short",
        jobid=str(number),
        strategy="asap",
        need=Need(1, 1000),
        command=f"{number} ".ljust(1500, "x"),
        planned=TASK_SECONDS[1],
        identity=f"{number:016x}",
    )


def new_journal(folder: Path) -> Journal:
    journal = Journal(folder / "journal.sqlite")
    journal.begin_run(RunRecord(RUN, str(folder), "here", 1, "here", "here", "asap", 0.0))
    return journal


# -- load


@dataclass(frozen=True)
class Point:
    """After so many tasks have ended: CPU seconds of the round, those of the ports apart; bytes that Python
    holds, where that was looked at."""

    ended: int
    used: float
    ports: float
    held: int


@dataclass(frozen=True)
class Load:
    """`failed`: tasks that have lost too many machines."""

    points: Sequence[Point]
    launched: int
    failed: int

    def between(self, bounds: tuple[int, int]) -> list[Point]:
        return [point for point in self.points if bounds[0] < point.ended <= bounds[1]]


def load_rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        load = _play(Path(folder) / "timed", is_traced=False)
        traced = _play(Path(folder) / "traced", is_traced=True)
    early, late = load.between(EARLY), load.between(LATE)
    growth = _mean(late) / _mean(early)
    kib = _kib_a_task(traced.points)
    ended = load.points[-1].ended
    name = f"load: {TASKS:,} tasks, {load.launched} VMs come and go, at most {VMS}"
    return [
        Row(
            f"{name}: all ended",
            f"{ended}, {load.failed} of them failed with the third VM lost",
            str(TASKS),
            ended == TASKS,
        ),
        Row(
            f"load: CPU of a round, {_span(EARLY)} and {_span(LATE)} tasks ended, without the fake ports",
            f"mean {_mean(early) * 1000:.1f} ms, {_mean(late) * 1000:.1f} ms: {growth:.2f} x; "
            f"p99 {_p99(early) * 1000:.1f} ms, {_p99(late) * 1000:.1f} ms "
            f"(ports, not counted: mean {_ports(early) * 1000:.1f} ms, {_ports(late) * 1000:.1f} ms)",
            f"mean <= {GROWTH_GOAL:g} x",
            growth <= GROWTH_GOAL,
        ),
        Row(
            "load: memory that a task leaves in the main process",
            f"{kib:.1f} KiB",
            f"<= {MEMORY_GOAL:g} KiB",
            kib <= MEMORY_GOAL,
        ),
    ]


def _span(bounds: tuple[int, int]) -> str:
    return f"{bounds[0]:,} to {bounds[1]:,}"


def _kib_a_task(points: Sequence[Point]) -> float:
    measured = [point for point in points if point.held and point.ended > 500]
    first, last = measured[0], measured[-1]
    return (last.held - first.held) / 1024 / (last.ended - first.ended)


def _mean(points: Sequence[Point]) -> float:
    return statistics.fmean(point.used for point in points)


def _ports(points: Sequence[Point]) -> float:
    return statistics.fmean(point.ports for point in points)


def _p99(points: Sequence[Point]) -> float:
    return statistics.quantiles((point.used for point in points), n=100, method="inclusive")[-1]


def _play(folder: Path, is_traced: bool) -> Load:
    """Rounds of a second. Memory is looked at in every twentieth, if at all: that makes rounds slow."""
    folder.mkdir()
    world = World()
    broker = broker_of(folder, world, new_journal(folder))
    points: list[Point] = []
    given = ended = failed = 0
    if is_traced:
        tracemalloc.start()
    try:
        while ended < TASKS and world.now < 1_000_000 + 100_000:
            more = min(AT_A_TIME - (given - ended), TASKS - given)
            if more:
                broker.submit([task_of(given + n) for n in range(more)])
                given += more
            world.take_back()
            world.used, begun = 0.0, time.thread_time()
            over = broker.tick()
            used = time.thread_time() - begun - world.used
            ended += len(over)
            failed += sum(task.state != TaskState.COMPLETE for task in over)
            held = 0
            if is_traced and len(points) % 20 == 0:
                gc.collect()
                held, _ = tracemalloc.get_traced_memory()
            points.append(Point(ended, used, world.used, held))
            world.now += 1.0
    finally:
        tracemalloc.stop()
    return Load(points, world.launched, failed)


# -- recovery


def recovery_rows() -> list[Row]:
    """From a process that opens the journal to the end of its first round."""
    with tempfile.TemporaryDirectory() as folder:
        vms, jobs, seconds, launched = _recover(Path(folder))
    return [
        Row(
            "recovery: from start to the first decision, 100 VMs and 1,000 journaled jobs",
            f"{seconds:.2f} s ({vms} VMs, {jobs} jobs, {launched} launched again)",
            f"<= {RECOVERY_GOAL:g} s, {VMS} VMs, {JOURNALED} jobs, 0 launched again",
            seconds <= RECOVERY_GOAL and (vms, jobs, launched) == (VMS, JOURNALED, 0),
        )
    ]


def _recover(folder: Path) -> tuple[int, int, float, int]:
    world = World()
    journal = new_journal(folder)
    first = broker_of(folder, world, journal)
    first.submit([task_of(number) for number in range(JOURNALED)])
    while len(world.jobs) < VMS * CPUS:
        first.tick()
        world.now += 1.0
    journal.close()
    before = world.launched
    begun = time.perf_counter()
    journal = Journal(folder / "journal.sqlite")
    left = journal.remains(RUN, {KIND.name: KIND})
    second = broker_of(folder, world, journal)
    second.adopt(left)
    again = [task_of(left.task_count + 1 + number) for number in range(JOURNALED)]
    for number, task in enumerate(again):
        task.identity = f"{number:016x}"
    second.submit([task for task in again if second.claim(task, 0.0, is_made=False) is None])
    second.tick()
    seconds = time.perf_counter() - begun
    return len(second.vms()), len(again), seconds, world.launched - before


def rows() -> list[Row]:
    return [*load_rows(), *recovery_rows()]
