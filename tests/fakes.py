"""Small honest implementations of the two ports, with a clock that only moves when it is told to.

`FakeCloud` and `FakeSlurm` share one `World`: a launched machine boots for `boot_time` seconds and then
is a Slurm node; a submitted job runs for the seconds its command names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from snakemake_executor_plugin_schlouder.lease import Lease
from snakemake_executor_plugin_schlouder.provision import (
    CloudUnavailable,
    Instance,
    LaunchOutcome,
    LaunchRequest,
    NoCapacity,
    TokenSpent,
)
from snakemake_executor_plugin_schlouder.slurm import (
    ClusterInfo,
    ClusterUnavailable,
    ClusterView,
    JobRequest,
    JobStatus,
    NodeStatus,
    SubmissionRefused,
    SubmitOutcome,
)
from snakemake_executor_plugin_schlouder.slurm.script import BEGUN, REVOKED, BundledJob
from snakemake_executor_plugin_schlouder.slurm.states import phase_of


@dataclass
class Machine:
    instance: Instance
    started: float
    cpus: int
    token: str
    joined: bool = False
    ends: float | None = None


@dataclass
class SlurmJob:
    """`unlaunched`: slurmctld says that it runs, and no node has heard of it."""

    request: JobRequest
    slurm_id: str
    walltime: float
    exit_code: int
    state: str = "PENDING"
    reason: str = ""
    started: float | None = None
    ended: float | None = None
    bundled: list[BundledJob] = field(default_factory=list)
    unlaunched: bool = False

    @property
    def task(self) -> str:
        return self.request.key.rpartition(".")[0]


@dataclass
class World:
    """`end_time`: seconds a machine takes to end. `revoked`: submissions whose script may not begin.

    As in Slurm, a job that is pinned to a deleted node waits for the next node that takes its place.
    """

    boot_time: float = 10.0
    now: float = 1000.0
    machines: dict[str, Machine] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)
    jobs: dict[str, SlurmJob] = field(default_factory=dict)
    never_joins: bool = False
    end_time: float = 0.0
    revoked: set[str] = field(default_factory=set)
    displaced: list[SlurmJob] = field(default_factory=list)
    leases: dict[str, Lease] = field(default_factory=dict)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pass_time(seconds)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for machine in self.machines.values():
            if machine.ends is not None and machine.ends <= self.now:
                machine.instance = replace(machine.instance, state="terminated")
            ready = machine.started + self.boot_time <= self.now and not self.never_joins
            if machine.instance.is_alive and ready and not machine.joined:
                machine.joined = True
                self._join(machine.instance.node)
        for job in self.jobs.values():
            self._advance(job)

    def _join(self, node: str) -> None:
        self.nodes[node] = "idle"
        for job in self.displaced:
            first, *others = (name if name in self.nodes else node for name in job.request.nodes)
            job.request = replace(job.request, node=first, companions=tuple(others))
        self.displaced.clear()

    def remove_node(self, node: str) -> None:
        if self.nodes.pop(node, None) is not None:
            self.displaced += [
                job
                for job in self.jobs.values()
                if node in job.request.nodes and job.state == "PENDING"
            ]

    def twice_at_a_time(self) -> list[str]:
        """Tasks that run more than once at this moment on machines that can still write."""
        running = [
            job.task
            for job in self.jobs.values()
            if job.started is not None
            and job.state in ("RUNNING", "NODE_FAIL")
            and any(self.machine_of(n).instance.state != "terminated" for n in job.request.nodes)
            and self.now < job.started + job.walltime
        ]
        return [task for task in set(running) if running.count(task) > 1]

    def machine_of(self, node: str) -> Machine:
        """The newest machine of that name; an older one's launch was never answered."""
        return [m for m in self.machines.values() if m.instance.node == node][-1]

    def kill_machine(self, node: str, reason: str = "Server.SpotInstanceTermination") -> None:
        machine = self.machine_of(node)
        machine.instance = replace(machine.instance, state="terminated", reason=reason)

    def alive(self) -> list[str]:
        return [m.instance.node for m in self.machines.values() if m.instance.is_alive]

    def _advance(self, job: SlurmJob) -> None:
        nodes = job.request.nodes
        if job.state == "RUNNING" and job.bundled:
            self._advance_bundle(job)
        has_room = all(self._free_cpus(node) >= job.request.cpus for node in nodes)
        if job.state == "PENDING" and has_room:
            job.state, job.started = "RUNNING", self.now
            if job.request.key in self.revoked:
                job.state, job.ended = "FAILED", self.now
        elif (
            job.state == "RUNNING"
            and job.started is not None
            and not job.unlaunched
            and all(self.machine_of(node).instance.is_alive for node in nodes)
            and self.now >= job.started + job.walltime
        ):
            job.state = "COMPLETED" if job.exit_code == 0 else "FAILED"
            job.ended = job.started + job.walltime

    def _advance_bundle(self, job: SlurmJob) -> None:
        """Leaves the exit-code files of the jobs that have ended by now, as `runner.py` does."""
        assert job.started is not None
        begun = 0.0
        for one in job.bundled:
            seconds, code = _seconds_and_code(one.command)
            ended = begun + seconds
            if Path(one.exit_file + REVOKED).exists() or self.now < job.started + begun:
                continue
            Path(one.exit_file + BEGUN).touch()
            if (
                self.now >= job.started + ended
                and self.machine_of(job.request.node).instance.is_alive
            ):
                Path(one.exit_file).write_text(f"{code} {begun} {ended}\n")
            begun = ended

    def _free_cpus(self, node: str) -> int:
        if self.nodes.get(node) not in ("idle", "mixed", "allocated"):
            return 0
        used = sum(
            job.request.cpus
            for job in self.jobs.values()
            if node in job.request.nodes and job.state == "RUNNING"
        )
        return self.machine_of(node).cpus - used

    def running_on(self, node: str) -> list[SlurmJob]:
        return [j for j in self.jobs.values() if node in j.request.nodes and j.state == "RUNNING"]


class FakeCloud:
    """`refusals` are consumed one a launch; `away` makes every call fail; the pools in `out` (type, zone,
    market) have no capacity."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.refusals: list[LaunchOutcome] = []
        self.out: set[tuple[str, str, str]] = set()
        self.away = False
        self.launched: list[LaunchRequest] = []
        self.terminated: list[str] = []

    def launch(self, requests: Sequence[LaunchRequest]) -> list[LaunchOutcome]:
        return [self._launch(request) for request in requests]

    def _launch(self, request: LaunchRequest) -> LaunchOutcome:
        if self.away:
            return CloudUnavailable("away")
        if self.refusals:
            return self.refusals.pop(0)
        for machine in self.world.machines.values():
            if (machine.token, machine.instance.node) == (request.token, request.node):
                return machine.instance if machine.instance.is_alive else TokenSpent("ended")
        if (request.type.name, request.zone, request.market) in self.out:
            return NoCapacity("InsufficientInstanceCapacity")
        self.launched.append(request)
        instance_id = f"i-{len(self.world.machines):04d}"
        instance = Instance(
            *(instance_id, request.node, request.run, "pending", request.type.name, ""),
            market=request.market,
            zone=request.zone,
        )
        self.world.machines[instance_id] = Machine(
            instance, self.world.now, request.type.cpus, request.token
        )
        return instance

    def instances(self, *runs: str) -> list[Instance]:
        if self.away:
            raise CloudUnavailable("away")
        found = [machine.instance for machine in self.world.machines.values()]
        return [instance for instance in found if instance.run in runs]

    def terminate(self, instance_ids: Sequence[str]) -> None:
        assert instance_ids, "an empty list means every instance to some callers"
        if self.away:
            raise CloudUnavailable("away")
        for instance_id in instance_ids:
            machine = self.world.machines[instance_id]
            assert not self.world.running_on(machine.instance.node) or self.allow_kill
            if machine.instance.is_alive:
                machine.instance = replace(
                    machine.instance, state="shutting-down", ended=self.world.now
                )
                machine.ends = self.world.now + self.world.end_time
            self.world.pass_time(0)
            self.terminated.append(instance_id)

    allow_kill = False
    """Whether a machine with a running job may be terminated in this test."""

    def console(self, instance_id: str) -> str:
        return "boot messages"


class FakeSlurm:
    """`refuse` names tasks that sbatch rejects; `reasons` are those of nodes for their state; `away` makes
    every call fail, `away_for` those named, after `silence` seconds unless in a hurry."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.away = False
        self.silence = 0.0
        self.away_for: set[str] = set()
        self.refuse: set[str] = set()
        self.forgotten: set[str] = set()
        self.reasons: dict[str, str] = {}
        self.deleted: list[str] = []
        self.foreign: dict[str, list[str]] = {}
        self.most_queued = 0
        self.views = 0
        self.node_views = 0

    def check(self) -> ClusterInfo:
        return ClusterInfo((22, 5), "head:6817", "/run/munge/munge.socket.2")

    def submit(self, jobs: Sequence[JobRequest]) -> list[SubmitOutcome]:
        if self.away:
            return [ClusterUnavailable("away")]
        return [self._submit(job) for job in jobs]

    def _submit(self, job: JobRequest) -> SubmitOutcome:
        if any(word in job.script for word in self.refuse):
            return SubmissionRefused("Batch job submission failed: Invalid account")
        lines = job.script.splitlines()
        slurm_id = str(len(self.world.jobs) + 1)
        made = SlurmJob(job, slurm_id, 0.0, 0)
        if "JOBS" in lines:
            made.bundled = [BundledJob(**one) for one in json.loads(lines[-2])]
            made.walltime = sum(_seconds_and_code(one.command)[0] for one in made.bundled)
        else:
            command = next(line for line in lines if line.startswith("run "))
            made.walltime, made.exit_code = _seconds_and_code(command)
        self.world.jobs[job.key] = made
        pending = [j for j in self.world.jobs.values() if j.state == "PENDING"]
        self.most_queued = max(self.most_queued, len(pending))
        self.world.pass_time(0)
        return slurm_id

    def view(self, run: str, nodes: bool = True) -> ClusterView:
        self._answer()
        self.views += 1
        self.node_views += nodes
        jobs = {
            key: JobStatus(
                *(key, job.slurm_id, phase_of(job.state), job.state, job.reason),
                *(job.started, job.ended),
            )
            for key, job in self.world.jobs.items()
            if key not in self.forgotten and job.request.run == run
        }
        for name, state in self.world.nodes.items():
            if state == "draining" and not (self.world.running_on(name) or name in self.foreign):
                self.world.nodes[name] = "drained"
        known = {
            name: NodeStatus(name, state, True, self.reasons.get(name, ""))
            for name, state in self.world.nodes.items()
        }
        return ClusterView(jobs, known if nodes else {})

    def cancel_run(self, run: str) -> None:
        self._answer()
        for job in self.world.jobs.values():
            if job.request.run == run and job.state in ("PENDING", "RUNNING"):
                job.state, job.ended = "CANCELLED", self.world.now

    def knows(self, slurm_id: str) -> bool:
        self._answer()
        return any(
            job.slurm_id == slurm_id and key not in self.forgotten
            for key, job in self.world.jobs.items()
        )

    def cancel(self, slurm_ids: Sequence[str]) -> None:
        self._answer("cancel")
        for job in self.world.jobs.values():
            if job.slurm_id in slurm_ids and job.state in ("PENDING", "RUNNING"):
                job.state, job.ended = "CANCELLED", self.world.now

    def foreign_jobs(self, run: str) -> dict[str, list[str]]:
        self._answer()
        return self.foreign

    def drain(self, nodes: Iterable[str], reason: str) -> None:
        self._answer()
        for node in nodes:
            busy = node in self.foreign or self.world.running_on(node)
            self.world.nodes[node] = "draining" if busy else "drained"

    def fail(self, node: str, reason: str) -> None:
        self._answer("fail")
        if node in self.world.nodes:
            self.world.nodes[node] = "down"
        for job in self.world.running_on(node):
            job.state, job.ended = "NODE_FAIL", self.world.now

    def renew(self, nodes: Iterable[str], lease: Lease) -> None:
        self._answer("renew")
        self.world.leases.update(dict.fromkeys(self.world.nodes.keys() & set(nodes), lease))

    def delete(self, node: str) -> bool:
        self._answer()
        if node in self.foreign or self.world.running_on(node):
            return False
        self.world.remove_node(node)
        self.deleted.append(node)
        return True

    def hurry(self) -> None:
        self.silence = 0.0

    def _answer(self, question: str = "") -> None:
        if self.away or question in self.away_for:
            self.world.pass_time(self.silence)
            raise ClusterUnavailable("away")


def _seconds_and_code(command: str) -> tuple[float, int]:
    """Of a command `run SECONDS CODE`."""
    _, seconds, code = command.split()
    return float(seconds), int(code)


def witness(directory: Path, name: str, code: int) -> None:
    """Writes the exit-code file a job script would have written."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.exit").write_text(f"{code}\n")
