"""Small honest implementations of the two ports, with a clock that only moves when it is told to.

`FakeCloud` and `FakeSlurm` share one `World`: a launched machine boots for `boot_time` seconds and then
is a Slurm node; a submitted job runs for the seconds its command names.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from snakemake_executor_plugin_schlouder.lease import Lease
from snakemake_executor_plugin_schlouder.provision import (
    CloudUnavailable,
    Instance,
    LaunchOutcome,
    LaunchRequest,
    NoCapacity,
    QuotaReached,
    Throttled,
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
    """`never_joins`: its boot hangs; `unfit`: Slurm refuses its node; `listed`: from when EC2 knows its id;
    `lease`: until when it stays without work."""

    instance: Instance
    started: float
    cpus: int
    token: str
    joined: bool = False
    ends: float | None = None
    never_joins: bool = False
    unfit: bool = False
    listed: float = -math.inf
    lease: float = math.inf


@dataclass
class SlurmJob:
    """`unlaunched`: slurmctld says that it runs, and no node has heard of it. `is_deaf`: its node has not
    heard that it was cancelled."""

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
    is_revoked: bool = False
    is_deaf: bool = False
    exit_file: str = ""

    @property
    def task(self) -> str:
        return self.request.key.rpartition(".")[0]

    def task_of(self, exit_file: str) -> str:
        """`3-rule.1.exit` is left by r1-3."""
        number = Path(exit_file).name.partition("-")[0]
        return f"{self.task.rpartition('-')[0]}-{number}"

    @property
    def turns(self) -> list[tuple[float, float, BundledJob]]:
        """The tasks of a bundle with the seconds after its begin at which each begins and ends."""
        found, begun = [], 0.0
        for one in self.bundled:
            ended = begun + _seconds_and_code(one.command)[0]
            found.append((begun, ended, one))
            begun = ended
        return found


@dataclass
class World:
    """`end_time`: seconds a machine takes to end. `revoked`: submissions whose script may not begin.

    As in Slurm, a job that is pinned to a deleted node waits for the next node that takes its place.

    Job scripts leave their marks and exit codes in files, and heed a revocation. `done`: the tasks whose
    work was really done. `notices`: seconds after which Slurm sees that a machine is gone, or
    `cut` off the network: its jobs go on to write, and nobody hears of it. `first_lease`: seconds after
    which a machine without a word from its owner and without a job ends itself. `launches_fail`: so many of
    the next jobs cannot be begun by their node.
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
    launches_fail: int = 0
    done: list[str] = field(default_factory=list)
    notices: float = math.inf
    cut: set[str] = field(default_factory=set)
    first_lease: float = math.inf

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pass_time(seconds)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for machine in self.machines.values():
            self._age(machine)
        for job in self.jobs.values():
            self._advance(job)

    def _age(self, machine: Machine) -> None:
        node = machine.instance.node
        if machine.ends is not None and machine.ends <= self.now:
            machine.instance = replace(machine.instance, state="terminated")
        ready = machine.started + self.boot_time <= self.now
        hangs = self.never_joins or machine.never_joins
        if machine.instance.is_alive and ready and not hangs and not machine.joined:
            machine.joined = True
            self._join(node, "inval" if machine.unfit else "idle")
        if machine.lease <= self.now and not self.running_on(node):
            self.kill_machine(node, "Client.InstanceInitiatedShutdown")
        if node in self.nodes and self.now - self._silent_since(machine) >= self.notices:
            self.fail_node(node)

    def _silent_since(self, machine: Machine) -> float:
        instance = machine.instance
        if instance.node in self.cut or instance.is_alive or instance.ended is None:
            return math.inf
        return instance.ended

    def _join(self, node: str, state: str) -> None:
        self.nodes[node] = state
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
        running = [task for job in self.jobs.values() for task in self.writing(job)]
        return [task for task in set(running) if running.count(task) > 1]

    def writing(self, job: SlurmJob) -> list[str]:
        """The tasks of `job` that may write at this moment."""
        nodes, begun = job.request.nodes, job.started
        if begun is None or job.is_revoked or self.now >= begun + job.walltime:
            return []
        exists = any(self.machine_of(node).instance.state != "terminated" for node in nodes)
        if not exists or (job.state not in ("RUNNING", "NODE_FAIL") and not job.is_deaf):
            return []
        if not job.bundled:
            return [job.task]
        return [
            job.task_of(one.exit_file)
            for at, until, one in job.turns
            if begun + at <= self.now < begun + until and Path(one.exit_file + BEGUN).exists()
        ]

    def machine_of(self, node: str) -> Machine:
        """The newest machine of that name; an older one's launch was never answered."""
        return [m for m in self.machines.values() if m.instance.node == node][-1]

    def kill_machine(self, node: str, reason: str = "Server.SpotInstanceTermination") -> None:
        machine = self.machine_of(node)
        if machine.instance.is_alive:
            machine.instance = replace(
                machine.instance, state="terminated", reason=reason, ended=self.now
            )

    def read_lease(self, node: str, lease: Lease) -> None:
        if self.first_lease < math.inf and self.reaches(node):
            self.machine_of(node).lease = self.now + lease.seconds

    def fail_node(self, node: str) -> None:
        """Slurm gives up the node and its jobs."""
        self.nodes[node] = "down"
        for job in self.running_on(node):
            job.state = "NODE_FAIL" if job.state == "RUNNING" else "CANCELLED"
            job.ended = self.now

    def cancel(self, job: SlurmJob) -> None:
        """A node that is cut off does not hear of it: the job stays there until Slurm gives up the node."""
        if job.state == "RUNNING" and self.cut.intersection(job.request.nodes):
            job.state, job.is_deaf = "COMPLETING", True
        elif job.state in ("PENDING", "RUNNING"):
            job.state, job.ended = "CANCELLED", self.now

    def alive(self) -> list[str]:
        return [m.instance.node for m in self.machines.values() if m.instance.is_alive]

    def _advance(self, job: SlurmJob) -> None:
        nodes = job.request.nodes
        if job.state not in ("PENDING", "RUNNING"):
            return
        if job.state == "RUNNING" and job.bundled:
            self._advance_bundle(job)
        has_room = all(self._free_cpus(node) >= job.request.cpus for node in nodes)
        if job.state == "PENDING" and has_room:
            self._begin(job)
        elif (
            job.state == "RUNNING"
            and job.started is not None
            and not job.unlaunched
            and all(self.reaches(node) for node in nodes)
            and self.now >= job.started + job.walltime
        ):
            self._end(job)

    def reaches(self, node: str) -> bool:
        return self.machine_of(node).instance.is_alive and node not in self.cut

    def _begin(self, job: SlurmJob) -> None:
        job.state, job.started = "RUNNING", self.now
        if self.launches_fail:
            self.launches_fail -= 1
            job.state, job.ended = "CANCELLED", self.now
            return
        file = job.exit_file
        has_mark = not job.bundled and Path(file + REVOKED).exists()
        job.is_revoked = job.request.key in self.revoked or has_mark
        if job.is_revoked:
            job.state, job.ended = "FAILED", self.now
        elif job.bundled:
            self._advance_bundle(job)
        else:
            Path(file + BEGUN).touch()

    def _end(self, job: SlurmJob) -> None:
        assert job.started is not None
        job.state = "COMPLETED" if job.exit_code == 0 else "FAILED"
        job.ended = job.started + job.walltime
        if not job.bundled and job.exit_code == 0:
            self.done.append(job.task)
        if not job.bundled:
            Path(job.exit_file).write_text(f"{job.exit_code}\n")

    def _advance_bundle(self, job: SlurmJob) -> None:
        """Leaves the exit-code files of the jobs that have ended by now, as `runner.py` does."""
        assert job.started is not None
        for begun, ended, one in job.turns:
            is_revoked = Path(one.exit_file + REVOKED).exists()
            has_begun = Path(one.exit_file + BEGUN).exists()
            if self.now < job.started + begun or (is_revoked and not has_begun):
                continue
            if not self.reaches(job.request.node):
                continue
            Path(one.exit_file + BEGUN).touch()
            if self.now >= job.started + ended and not Path(one.exit_file).exists():
                code = _seconds_and_code(one.command)[1]
                Path(one.exit_file).write_text(f"{code} {begun} {ended}\n")
                self.done += [job.task_of(one.exit_file)] * (code == 0)

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
        there = ("RUNNING", "COMPLETING")
        return [j for j in self.jobs.values() if node in j.request.nodes and j.state in there]


class FakeCloud:
    """`refusals` are consumed one a launch; `away` makes every call fail; the pools in `out` (type, zone,
    market) have no capacity, and a `quota` is that of a market, in CPUs.

    EC2 knows a new id only `lag` seconds after its launch, and does not list those in `hidden` until a
    date; an id that it does not list is not ended either, and that is no error (`Ec2Cloud.terminate`).
    `coming` counts what will happen to the next calls: `launch lost`, `terminate lost`: carried out, and no
    reply; `terminate idle`: a reply, and nothing done; `throttle`; and to the next machines: `partial`: the
    rest of their batch is not started, `hang`: never boot up, `unfit`: Slurm refuses the node. `foreign` are
    machines of others, and `touched` those of them that somebody tried to end.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.refusals: list[LaunchOutcome] = []
        self.out: set[tuple[str, str, str]] = set()
        self.away = False
        self.launched: list[LaunchRequest] = []
        self.terminated: list[str] = []
        self.lag = 0.0
        self.hidden: dict[str, float] = {}
        self.quota: dict[str, int] = {}
        self.coming: Counter[str] = Counter()
        self.foreign: dict[str, Instance] = {}
        self.touched: list[str] = []
        self._started: dict[str, tuple[str, ...]] = {}

    def launch(self, requests: Sequence[LaunchRequest]) -> list[LaunchOutcome]:
        calls = dict.fromkeys(request.token for request in requests)
        throttled = {token for token in calls if self._comes("throttle")}
        lost = {token for token in calls if self._comes("launch lost")}
        outcomes: list[LaunchOutcome] = []
        for request in requests:
            is_heard = request.token not in throttled
            outcome = self._launch(request) if is_heard else Throttled("RequestLimitExceeded")
            is_lost = request.token in lost and isinstance(outcome, Instance)
            outcomes.append(CloudUnavailable("timed out") if is_lost else outcome)
        return outcomes

    def _comes(self, what: str) -> bool:
        comes = self.coming[what] > 0
        self.coming[what] -= comes
        return comes

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
        batch = request.batch or (request.node,)
        if request.token not in self._started:
            if self._cpus_up(request.market) + len(batch) * request.type.cpus > self.quota.get(
                request.market, sys.maxsize
            ):
                return QuotaReached(f"VcpuLimitExceeded {request.market}")
            size = 1 if self._comes("partial") else len(batch)
            self._started[request.token] = batch[:size]
        if request.node not in self._started[request.token]:
            return NoCapacity("EC2 started only a part of the batch")
        return self._start(request)

    def _start(self, request: LaunchRequest) -> Instance:
        world = self.world
        self.launched.append(request)
        instance = Instance(
            *(f"i-{len(world.machines):04d}", request.node, request.run),
            *("pending", request.type.name, ""),
            launched=world.now,
            market=request.market,
            zone=request.zone,
        )
        world.machines[instance.id] = Machine(
            *(instance, world.now, request.type.cpus, request.token),
            never_joins=self._comes("hang"),
            unfit=self._comes("unfit"),
            listed=world.now + self.lag,
            lease=world.now + world.first_lease,
        )
        return instance

    def _cpus_up(self, market: str) -> int:
        machines = self.world.machines.values()
        return sum(m.cpus for m in machines if m.instance.is_alive and m.instance.market == market)

    def _is_known(self, machine: Machine) -> bool:
        now = self.world.now
        return machine.listed <= now and self.hidden.get(machine.instance.id, now) <= now

    def instances(self, *runs: str) -> list[Instance]:
        if self.away or self._comes("throttle"):
            raise CloudUnavailable("away")
        known = [m.instance for m in self.world.machines.values() if self._is_known(m)]
        return [one for one in (*known, *self.foreign.values()) if one.run in runs]

    def terminate(self, instance_ids: Sequence[str]) -> None:
        assert instance_ids, "an empty list means every instance to some callers"
        if self.away or self._comes("throttle"):
            raise CloudUnavailable("away")
        is_idle = self._comes("terminate idle")
        for instance_id in instance_ids:
            if instance_id in self.foreign:
                self.touched.append(instance_id)
                continue
            machine = self.world.machines[instance_id]
            assert not self.world.running_on(machine.instance.node) or self.allow_kill
            if is_idle or not self._is_known(machine):
                continue
            self._end(machine)
            self.world.pass_time(0)
            self.terminated.append(instance_id)
        if self._comes("terminate lost"):
            raise CloudUnavailable("timed out")

    def _end(self, machine: Machine) -> None:
        if machine.instance.is_alive:
            machine.instance = replace(
                machine.instance, state="shutting-down", ended=self.world.now
            )
            machine.ends = self.world.now + self.world.end_time

    allow_kill = False
    """Whether a machine with a running job may be terminated in this test."""

    def console(self, instance_id: str) -> str:
        return "boot messages"


class FakeSlurm:
    """`refuse` names tasks that sbatch rejects; `reasons` are those of nodes for their state; `away` makes
    every call fail, `away_for` those named, after `silence` seconds unless in a hurry. `remembers`: seconds
    for which it knows jobs that have ended (MinJobAge). `submit_lost`: how many of the next submissions
    arrive without a reply, `delays`: after how many seconds the next ones do. `foreign`: jobs of others by
    node; `touched`: those of them that somebody tried to end."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.away = False
        self.silence = 0.0
        self.away_for: set[str] = set()
        self.refuse: set[str] = set()
        self.forgotten: set[str] = set()
        self.quiet: set[str] = set()
        self.reasons: dict[str, str] = {}
        self.deleted: list[str] = []
        self.foreign: dict[str, list[str]] = {}
        self.most_queued = 0
        self.views = 0
        self.node_views = 0
        self.remembers = math.inf
        self.submit_lost = 0
        self.delays: list[float] = []
        self.late: list[tuple[float, JobRequest]] = []
        self.touched: list[str] = []

    def check(self) -> ClusterInfo:
        return ClusterInfo((22, 5), "head:6817", "/run/munge/munge.socket.2")

    def submit(self, jobs: Sequence[JobRequest]) -> list[SubmitOutcome]:
        if self.away:
            return [ClusterUnavailable("away")]
        outcomes: list[SubmitOutcome] = []
        for job in jobs:
            if self.delays:
                self.late.append((self.world.now + self.delays.pop(0), job))
                return [*outcomes, ClusterUnavailable("timed out")]
            outcomes.append(self._submit(job))
            if self.submit_lost:
                self.submit_lost -= 1
                return [*outcomes[:-1], ClusterUnavailable("timed out")]
        return outcomes

    def deliver(self) -> None:
        """Submissions that arrive late."""
        for entry in [entry for entry in self.late if entry[0] <= self.world.now]:
            self.late.remove(entry)
            if not self.away:
                self._submit(entry[1])

    def _submit(self, job: JobRequest) -> SubmitOutcome:
        if not self.world.nodes.keys() >= set(job.nodes):
            return SubmissionRefused("Batch job submission failed: Invalid node name specified")
        if any(word in job.script for word in self.refuse):
            return SubmissionRefused("Batch job submission failed: Invalid account")
        lines = job.script.splitlines()
        slurm_id = str(len(self.world.jobs) + 1)
        made = SlurmJob(job, slurm_id, 0.0, 0)
        if "JOBS" in lines:
            made.bundled = [BundledJob(**one) for one in json.loads(lines[-2])]
            made.walltime = sum(_seconds_and_code(one.command)[0] for one in made.bundled)
        else:
            begun = re.search(rf": >(\S+){re.escape(BEGUN)}", job.script)
            made.exit_file = begun[1] if begun else ""
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
            if job.request.run == run and self._remembers(key, job)
        }
        for name, state in self.world.nodes.items():
            if state == "draining" and not (self.world.running_on(name) or name in self.foreign):
                self.world.nodes[name] = "drained"
        known = {
            name: NodeStatus(name, state, self._hears_of(name), self.reasons.get(name, ""))
            for name, state in self.world.nodes.items()
        }
        return ClusterView(jobs, known if nodes else {})

    def _hears_of(self, node: str) -> bool:
        return node not in self.quiet and node not in self.world.cut

    def _remembers(self, key: str, job: SlurmJob) -> bool:
        is_over = job.ended is not None and self.world.now - job.ended > self.remembers
        return key not in self.forgotten and not is_over

    def cancel_run(self, run: str) -> None:
        self._answer()
        for job in self.world.jobs.values():
            if job.request.run == run:
                self.world.cancel(job)

    def knows(self, slurm_id: str, key: str) -> bool:
        self._answer()
        job = self.world.jobs.get(key)
        return job is not None and job.slurm_id == slurm_id and self._remembers(key, job)

    def cancel(self, jobs: Mapping[str, str]) -> None:
        self._answer("cancel")
        self.touched += [one for ids in self.foreign.values() for one in ids if one in jobs]
        for key, job in self.world.jobs.items():
            if jobs.get(job.slurm_id) == key and key not in self.forgotten:
                self.world.cancel(job)

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
            self.world.fail_node(node)

    def renew(self, nodes: Iterable[str], lease: Lease) -> None:
        self._answer("renew")
        for node in self.world.nodes.keys() & set(nodes):
            before = self.world.leases.get(node)
            self.world.leases[node] = lease
            if before is None or before.text != lease.text:
                self.world.read_lease(node, lease)

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
