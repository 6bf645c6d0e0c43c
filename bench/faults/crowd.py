"""Ten thousand tasks through the real broker in one run, a hundred VMs coming and going, and a take-over of a
large run: what a round and a task cost as they go by, on a cloud and a Slurm in memory, in virtual time."""

from __future__ import annotations

import gc
import logging
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.rows import Row
from snakemake_executor_plugin_schlouder.broker import Broker, BrokerConfig
from snakemake_executor_plugin_schlouder.journal import Journal, RunRecord
from snakemake_executor_plugin_schlouder.lease import Lease
from snakemake_executor_plugin_schlouder.model import Billing, InstanceType, Need, Task
from snakemake_executor_plugin_schlouder.provision import Instance, LaunchOutcome, LaunchRequest
from snakemake_executor_plugin_schlouder.slurm import (
    ClusterInfo,
    ClusterView,
    JobRequest,
    JobStatus,
    NodeStatus,
    SubmitOutcome,
)
from snakemake_executor_plugin_schlouder.slurm.states import JobPhase

TASKS, VMS, CPUS = 10_000, 100, 10
AT_A_TIME = 1000
"""Tasks that are handed over and have not ended: as many at the end as at the start."""

TASK_SECONDS, BOOT_SECONDS, LIFE_SECONDS = 20.0, 5.0, 200.0
REMEMBERED = 300.0
"""Seconds for which Slurm knows jobs that have ended (MinJobAge)."""

GROWTH_GOAL, MEMORY_GOAL, RECOVERY_GOAL = 2.0, 8.0, 5.0
JOURNALED = 1000
RUN, KIND = "crowd", InstanceType("large", CPUS, 1_000_000)


@dataclass
class World:
    """Both ports. A machine is up after a while, and EC2 takes it back at the end of its life; a job ends
    when its time is over."""

    now: float = 1_000_000.0
    machines: dict[str, Instance] = field(default_factory=dict)
    jobs: dict[str, tuple[JobRequest, float]] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)
    launched: int = 0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

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

    def instances(self, *runs: str) -> list[Instance]:
        """Machines that have ended are listed for an hour."""
        for id, one in list(self.machines.items()):
            if one.is_alive and one.launched and self.now - one.launched > LIFE_SECONDS:
                self._end(id, "Server.InternalError")
            elif one.ended is not None and self.now - one.ended > 3600:
                del self.machines[id]
        return list(self.machines.values())

    def _end(self, id: str, reason: str) -> None:
        one = self.machines[id]
        self.machines[id] = replace(one, state="terminated", reason=reason, ended=self.now)

    def terminate(self, instance_ids: Sequence[str]) -> None:
        for id in instance_ids:
            if self.machines[id].is_alive:
                self._end(id, "Client.UserInitiatedShutdown")

    def console(self, instance_id: str) -> str:
        return ""

    def check(self) -> ClusterInfo:
        return ClusterInfo((22, 5), "here:6817", "/run/munge/munge.socket.2")

    def submit(self, jobs: Sequence[JobRequest]) -> list[SubmitOutcome]:
        self.jobs.update({job.key: (job, self.now) for job in jobs})
        return [job.key for job in jobs]

    def view(self, run: str, nodes: bool = True) -> ClusterView:
        for key, (_, begun) in list(self.jobs.items()):
            if self.now - begun - TASK_SECONDS > REMEMBERED:
                del self.jobs[key]
        jobs = {key: self._status(key, begun) for key, (_, begun) in self.jobs.items()}
        return ClusterView(jobs, self._nodes() if nodes else {})

    def _status(self, key: str, begun: float) -> JobStatus:
        if self.now - begun < TASK_SECONDS:
            return JobStatus(key, key, JobPhase.RUNNING, "RUNNING", "None", begun, None)
        ended = begun + TASK_SECONDS
        return JobStatus(key, key, JobPhase.SUCCEEDED, "COMPLETED", "None", begun, ended)

    def _nodes(self) -> dict[str, NodeStatus]:
        return {
            name: NodeStatus(name, "mixed" if self.machines[id].is_alive else "down", True, "none")
            for name, id in self.nodes.items()
            if id in self.machines and self.now - (self.machines[id].launched or 0) >= BOOT_SECONDS
        }

    def cancel_run(self, run: str) -> None: ...

    def knows(self, slurm_id: str, key: str) -> bool:
        return slurm_id in self.jobs

    def cancel(self, jobs: Mapping[str, str]) -> None:
        for id in jobs:
            self.jobs.pop(id, None)

    def foreign_jobs(self, run: str) -> dict[str, list[str]]:
        return {}

    def drain(self, nodes: Iterable[str], reason: str) -> None: ...

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
        planned=TASK_SECONDS,
        identity=f"{number:016x}",
    )


def new_journal(folder: Path) -> Journal:
    journal = Journal(folder / "journal.sqlite")
    journal.begin_run(RunRecord(RUN, str(folder), "here", 1, "here", "here", "asap", 0.0))
    return journal


# -- load


@dataclass(frozen=True)
class Point:
    """After so many tasks have ended: CPU seconds of the round, bytes that Python holds, where that was
    looked at."""

    ended: int
    used: float
    held: int


def load_rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        points, launched = _play(Path(folder) / "timed", is_traced=False)
        traced, _ = _play(Path(folder) / "traced", is_traced=True)
    first = [p for p in points if 500 < p.ended <= 1500]
    last = [p for p in points if TASKS - 1500 < p.ended <= TASKS - 500]
    early, late = _p99(first), _p99(last)
    growth = _mean(last) / _mean(first)
    kib = _kib_a_task(traced)
    name = f"load: {TASKS:,} tasks, {launched} VMs one after the other, at most {VMS}"
    return [
        Row(f"{name}: all ended", str(points[-1].ended), str(TASKS), points[-1].ended == TASKS),
        Row(
            "load: CPU of a round about task 1,000 and about task 9,000, p99",
            f"{early * 1000:.1f} ms, {late * 1000:.1f} ms; mean {growth:.2f} x",
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


def _kib_a_task(points: Sequence[Point]) -> float:
    measured = [point for point in points if point.held and point.ended > 500]
    first, last = measured[0], measured[-1]
    return (last.held - first.held) / 1024 / (last.ended - first.ended)


def _mean(points: Sequence[Point]) -> float:
    """Ends come in waves at first, and spread out: the median round is another one then."""
    return statistics.fmean(point.used for point in points)


def _p99(points: Sequence[Point]) -> float:
    return statistics.quantiles((point.used for point in points), n=100)[-1]


def _play(folder: Path, is_traced: bool) -> tuple[list[Point], int]:
    """Rounds of a second. Memory is looked at in every twentieth, if at all: that makes rounds slow."""
    folder.mkdir()
    world = World()
    broker = broker_of(folder, world, new_journal(folder))
    points: list[Point] = []
    given = ended = 0
    if is_traced:
        tracemalloc.start()
    try:
        while ended < TASKS and world.now < 1_000_000 + 100_000:
            more = min(AT_A_TIME - (given - ended), TASKS - given)
            if more:
                broker.submit([task_of(given + n) for n in range(more)])
                given += more
            begun = time.thread_time()
            ended += len(broker.tick())
            used = time.thread_time() - begun
            held = 0
            if is_traced and len(points) % 20 == 0:
                gc.collect()
                held, _ = tracemalloc.get_traced_memory()
            points.append(Point(ended, used, held))
            world.now += 1.0
    finally:
        tracemalloc.stop()
    return points, world.launched


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
