"""The port `Cluster`: what the broker needs of Slurm, and the plain records that cross it.

Two adapters: `cli.py` over Slurm's commands, `rpc.py` over pyslurm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..lease import Lease
from ..model import SchlouderError, SlurmOptions
from .states import JobPhase

APIS = ("auto", "cli", "pyslurm")
"""What `--schlouder-slurm-api` can be; `rpc.choose` makes the adapter."""


class ClusterUnavailable(Exception):
    """Slurm did not answer. Says nothing about jobs or nodes; ask again later."""


class SubmissionRefused(Exception):
    """Slurm will not take this job as it is; the message is Slurm's own."""


class ClusterUnfit(SchlouderError):
    """This Slurm cannot be used at all; the message says why and what to do."""


@dataclass(frozen=True)
class ClusterInfo:
    """What a VM must know to join: the controller as `host:port`, the munge socket of slurm.conf, and how
    the cluster's machines know each other: `auth` is munge or slurm."""

    version: tuple[int, int]
    controller: str
    munge_socket: str
    auth: str = "munge"


@dataclass(frozen=True, slots=True)
class JobRequest:
    """One submission. `key` travels as the comment, `run` is the job name: both find the job again
    when the reply to the submission is lost. It runs on `node` and on its `companions`; `cpus` and
    `memory` (MiB) are those of each, for the tasks of the options that it gets. `limit` in seconds."""

    key: str
    run: str
    node: str
    script: str
    cpus: int
    memory: int
    limit: float | None
    workdir: Path
    log: str
    partition: str
    options: SlurmOptions = field(default_factory=SlurmOptions)
    companions: tuple[str, ...] = ()

    @property
    def nodes(self) -> tuple[str, ...]:
        return (self.node, *self.companions)

    @property
    def tasks_per_node(self) -> int:
        """The most tasks that one node gets."""
        return -(-self.options.tasks // len(self.nodes))

    @property
    def cpus_per_task(self) -> int:
        return self.cpus // self.tasks_per_node


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What Slurm says of one submission. `started`/`ended` are seconds since the epoch."""

    key: str
    slurm_id: str
    phase: JobPhase
    state: str
    reason: str
    started: float | None
    ended: float | None


@dataclass(frozen=True)
class NodeStatus:
    """`state` is Slurm's word in lower case without flags; `responding` is False for `idle*`."""

    name: str
    state: str
    responding: bool
    reason: str

    @property
    def accepts_jobs(self) -> bool:
        return self.responding and self.state in ("idle", "mixed", "allocated", "completing")

    @property
    def is_drained(self) -> bool:
        """Out of service and without any job."""
        return self.state in ("drained", "down")


@dataclass(frozen=True)
class ClusterView:
    """One reading of the controller: this run's submissions by key, and, if asked for, the partition's
    nodes by name.
    One that is not complete holds what has changed since the last one; only a complete one can show
    that something is missing."""

    jobs: Mapping[str, JobStatus] = field(default_factory=dict)
    nodes: Mapping[str, NodeStatus] = field(default_factory=dict)
    is_complete: bool = True


SubmitOutcome = str | SubmissionRefused | ClusterUnavailable
"""Slurm's id; or Slurm will not have the job; or no reply came, and it may have arrived or not."""


class Cluster(Protocol):
    """Every call but `submit` raises ClusterUnavailable when Slurm does not answer."""

    def check(self) -> ClusterInfo:
        """Whether this Slurm can be used; raises ClusterUnfit if not."""
        ...

    def submit(self, jobs: Sequence[JobRequest]) -> list[SubmitOutcome]:
        """Hands the jobs over, and says in their order what came of it. The list is shorter than `jobs`
        where Slurm stopped answering: the rest was not tried."""
        ...

    def view(self, run: str, nodes: bool = True) -> ClusterView:
        """All jobs named `run` that Slurm still knows, and, with `nodes`, all nodes of the partition."""
        ...

    def cancel_run(self, run: str) -> None:
        """Cancels every job named `run`."""
        ...

    def knows(self, slurm_id: str, key: str) -> bool:
        """Whether Slurm has a record of the job that was submitted with this key and got this id; a job is
        not gone because a list lacks it. A slurmctld that has lost its last jobs gives their ids to others.
        """
        ...

    def cancel(self, jobs: Mapping[str, str]) -> None:
        """Cancels the jobs with these ids, as long as they have these keys; ended ones are no error."""
        ...

    def foreign_jobs(self, run: str) -> dict[str, list[str]]:
        """Node name -> ids of jobs there that are not named `run`."""
        ...

    def drain(self, nodes: Iterable[str], reason: str) -> None:
        """No new job starts there; a node that is unknown is no error."""
        ...

    def fail(self, node: str, reason: str) -> None:
        """The machine is lost: its jobs end now with NODE_FAIL."""
        ...

    def renew(self, nodes: Iterable[str], lease: Lease) -> None:
        """Writes `lease` into the comments of these nodes; one that is unknown is no error."""
        ...

    def delete(self, node: str) -> bool:
        """Removes the node's record. False: it still has a job, ask again; an unknown node is True."""
        ...

    def hurry(self) -> None:
        """Somebody waits for the end of the run: from now on Slurm is given seconds to answer, also by a
        call that another thread has under way. Returns at once."""
        ...
