"""What the plugin adds to Snakemake's process: memory per job, all 1,000 of them submitted to Slurm.

A real broker and journal between a cloud that has every machine at once and a Slurm in which every job
runs and none ends. Counted is what Python has allocated and not given back (tracemalloc), the jobs'
commands and the little these stand-ins keep included; Snakemake's own jobs are not the plugin's.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import tracemalloc
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

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
from snakemake_executor_plugin_schlouder.slurm.states import JobPhase

JOBS = 1000
GOAL = 20.0
"""KiB a job."""

COMMAND_LENGTH = 1500
"""Characters; what Snakemake 9.27 writes for a rule job without resources of its own."""

RUN = "memory"
VMS = 4
KIND = InstanceType("large", JOBS // VMS, 1_000_000)
STRATEGY = "fastest"


def rows() -> list[Row]:
    kib = _kib_per_job()
    return [
        Row(
            "memory the plugin adds to the main process, 1,000 jobs submitted",
            f"{kib:.1f} KiB a job",
            f"<= {GOAL:.0f} KiB",
            kib <= GOAL,
        )
    ]


def _kib_per_job() -> float:
    with tempfile.TemporaryDirectory() as folder:
        world = _World()
        broker = _broker(Path(folder), world)
        broker.tick()
        gc.collect()
        tracemalloc.start()
        broker.submit([_task(number) for number in range(JOBS)])
        while len(world.jobs) < JOBS or not _all_run(broker):
            broker.tick()
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return used / 1024 / JOBS


def _all_run(broker: Broker) -> bool:
    running = [
        task
        for vm in broker.vms()
        for task in vm.active.values()
        if task.state == TaskState.RUNNING
    ]
    return len(running) == JOBS


def _broker(folder: Path, world: _World) -> Broker:
    config = BrokerConfig(
        run=RUN,
        workdir=folder,
        partition="schlouder",
        types=(KIND,),
        max_vms=VMS,
        billing=Billing(),
        boot_timeout=600,
    )
    config.files.mkdir(parents=True)
    journal = Journal(folder / "journal.sqlite")
    journal.begin_run(RunRecord(RUN, str(folder), "here", 1, "here", "here", STRATEGY, 0.0))
    return Broker(config, world, world, journal, logging.getLogger("bench.memory"))


def _task(number: int) -> Task:
    return Task(
        key=f"{RUN}-{number}",
        name=f"short number={number}",
        rule="short",
        jobid=str(number),
        strategy=STRATEGY,
        need=Need(1, 1000),
        command=f"{number} ".ljust(COMMAND_LENGTH, "x"),
    )


class _World:
    """Both ports; keeps the names of its machines and jobs."""

    def __init__(self) -> None:
        self.jobs: list[str] = []
        self._machines: list[Instance] = []

    def launch(self, requests: Sequence[LaunchRequest]) -> list[LaunchOutcome]:
        made = [Instance(f"i-{r.node}", r.node, RUN, "running", r.type.name, "") for r in requests]
        self._machines += made
        return list(made)

    def instances(self, *runs: str) -> list[Instance]:
        return self._machines

    def terminate(self, instance_ids: Sequence[str]) -> None: ...

    def console(self, instance_id: str) -> str:
        return ""

    def check(self) -> ClusterInfo:
        return ClusterInfo((22, 5), "here:6817", "/run/munge/munge.socket.2")

    def submit(self, jobs: Sequence[JobRequest]) -> list[SubmitOutcome]:
        self.jobs += [job.key for job in jobs]
        return [f"{1000 + number}" for number in range(len(jobs))]

    def view(self, run: str, nodes: bool = True) -> ClusterView:
        return ClusterView(
            {
                key: JobStatus(key, str(number), JobPhase.RUNNING, "RUNNING", "None", 1.0, None)
                for number, key in enumerate(self.jobs)
            },
            {
                machine.node: NodeStatus(machine.node, "mixed", True, "none")
                for machine in self._machines
            },
        )

    def cancel_run(self, run: str) -> None: ...

    def knows(self, slurm_id: str, key: str) -> bool:
        return True

    def cancel(self, jobs: Mapping[str, str]) -> None: ...

    def foreign_jobs(self, run: str) -> dict[str, list[str]]:
        return {}

    def drain(self, nodes: Iterable[str], reason: str) -> None: ...

    def fail(self, node: str, reason: str) -> None: ...

    def renew(self, nodes: Iterable[str], lease: Lease) -> None: ...

    def delete(self, node: str) -> bool:
        return True

    def hurry(self) -> None: ...
