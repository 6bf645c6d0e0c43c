"""`schlouder gc`: machines that carry our tags and have no living owner.

The cloud is asked first, then the records: the journals of this user on this host, and Slurm's nodes with the
leases in their comments. `judge` is a pure function of what they say. An owner is called dead only by what is
seen: a process that is gone, a run that has ended, a lease that is over. Where nothing is seen the owner is
unknown, and its machines stay. The rules by number (R3, R5, R7) are those of docs/design.md.
"""

from __future__ import annotations

import re
import socket
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from .ec2.account import RightMissing, asked, aws_session, patient_client
from .journal import Journal, RunRecord, VMRecord, is_there
from .lease import DEFAULT, RENEWALS, Lease
from .market import catalog
from .market.asking import is_aws
from .model import SPOT, Billing, InstanceType, SchlouderError
from .provision import (
    ALIVE,
    TAG_OWNER,
    TAG_RUN,
    CloudUnavailable,
    Instance,
    describe,
    instance_of,
    is_launch_of_ours,
    tags_of,
    terminate,
    this_owner,
)
from .slurm import ClusterUnavailable
from .slurm.cli import NodeJob, SlurmCommands
from .store import state_directory

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client

GRACE = 90.0
"""Seconds that nothing is called an orphan after its launch, and after the last word of its owner was due:
records come later than machines (R7)."""

CLOCKS = 300.0
"""Seconds that the clock of another host may be wrong."""

BOOT_TIMEOUT = 600.0
"""Seconds; what --schlouder-boot-timeout is if nobody changes it."""

ENDING_TIMEOUT = 120.0
"""Seconds in which EC2 should say that a machine which was to end does so (R5)."""

_LOOK = 2.0
_DELETIONS = 5


class Status(StrEnum):
    LIVING = "owner lives"
    KEPT = "kept"
    YOUNG = "too young"
    IN_USE = "in use"
    """By a job that is none of ours, which is never killed."""
    UNKNOWN = "owner unknown"
    ORPHAN = "orphan"


@dataclass(frozen=True)
class Machine:
    """One that EC2 lists with the tag of a run; `owner` is its other tag, empty if it lacks that."""

    instance: Instance
    owner: str
    region: str

    @property
    def id(self) -> str:
        return self.instance.id

    @property
    def run(self) -> str:
        return self.instance.run

    @property
    def launched(self) -> float:
        return self.instance.launched or 0.0


@dataclass(frozen=True)
class LocalRun:
    """A run in a journal of this user. `is_gone`: it has ended, or its process was on this host and is not
    there."""

    record: RunRecord
    is_living: bool
    is_gone: bool

    @classmethod
    def of(cls, record: RunRecord, host: str) -> LocalRun:
        is_ours = record.host == host
        living = record.ended is None and is_ours and is_there(record)
        return cls(record, living, record.ended is not None or (is_ours and not living))


@dataclass(frozen=True)
class Journals:
    """`held`: the run that lives and has a machine, by the machine's id. `booked`: what the journals say of
    machines. `unread`: why a journal could not be read."""

    runs: Mapping[str, LocalRun] = field(default_factory=dict)
    held: Mapping[str, str] = field(default_factory=dict)
    booked: Mapping[str, VMRecord] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Nodes:
    """`leases`: of all nodes. `lost`: those that Slurm calls down, and that do not respond. `jobs`: those
    that have begun, by node; `foreign`: names of those of other users, begun or not. `silence`: why Slurm
    said nothing; empty: it did."""

    leases: Mapping[str, Lease | None] = field(default_factory=dict)
    jobs: Mapping[str, Sequence[NodeJob]] = field(default_factory=dict)
    lost: Collection[str] = ()
    foreign: Collection[str] = ()
    silence: str = ""


@dataclass(frozen=True)
class Verdict:
    """`until`: when a machine that is kept ends by itself, in seconds since the epoch."""

    status: Status
    why: str
    until: float | None = None


def judge(machine: Machine, journals: Journals, nodes: Nodes, me: str, now: float) -> Verdict:
    """Whether anybody alive owns the machine. `me`: the owner whose journals these are; `now` in seconds
    since the epoch."""
    lease = nodes.leases.get(machine.instance.node)
    living = _living(machine, lease, journals)
    if living is not None:
        return living
    verdict = _unseen(machine, lease, journals, nodes, me, now)
    foreign = _foreign_jobs(machine, lease, nodes)
    if foreign and verdict.status != Status.LIVING:
        return Verdict(Status.IN_USE, f"{verdict.why}; but of others runs there: {foreign}")
    ours = len(nodes.jobs.get(machine.instance.node, ()))
    if ours and verdict.status == Status.ORPHAN:
        return replace(verdict, why=f"{verdict.why}; jobs of its own that run there: {ours}")
    return verdict


def may_end(machine: Machine, verdict: Verdict, named: Collection[str]) -> bool:
    """`named`: the runs that the user has given by name."""
    if verdict.status in (Status.UNKNOWN, Status.KEPT):
        return machine.run in named
    return verdict.status == Status.ORPHAN


def _living(machine: Machine, lease: Lease | None, journals: Journals) -> Verdict | None:
    """By the journals of this host. A machine that was kept belongs to the run that has taken it since."""
    runs = [journals.held.get(machine.id, ""), lease.run if lease else "", machine.run]
    for run in runs:
        known = journals.runs.get(run)
        if known is not None and known.is_living:
            record = known.record
            return Verdict(
                Status.LIVING, f"run {run} goes on, process {record.pid} in {record.workdir}"
            )
    return None


def _unseen(
    machine: Machine,
    lease: Lease | None,
    journals: Journals,
    nodes: Nodes,
    me: str,
    now: float,
) -> Verdict:
    """Of a machine whose owner is not seen alive on this host."""
    if now < machine.launched + GRACE:
        return Verdict(Status.YOUNG, f"launched less than {GRACE:.0f} s ago")
    if nodes.silence:
        return Verdict(Status.UNKNOWN, f"Slurm does not tell of its lease: {nodes.silence}")
    known = journals.runs.get(lease.run if lease else machine.run)
    if lease is not None and lease.kept:
        return _by_lease(lease, now, GRACE)
    if known is not None and known.is_gone:
        return _by_death(known.record, lease, now)
    if journals.unread and machine.owner == me and not (lease and now < lease.until):
        return Verdict(Status.UNKNOWN, journals.unread[0])
    if lease is not None:
        return _by_lease(lease, now, GRACE + CLOCKS)
    if machine.instance.node not in nodes.leases:
        left = machine.launched + BOOT_TIMEOUT + DEFAULT + GRACE - now
        if left > 0:
            return Verdict(Status.YOUNG, f"no Slurm node, may be booting for {left:.0f} s more")
        return Verdict(Status.UNKNOWN, "no Slurm node and no journal here tells of its owner")
    return Verdict(Status.UNKNOWN, "no lease and no journal here tells of its owner")


def _by_lease(lease: Lease, now: float, slack: float) -> Verdict:
    """By the word of an owner elsewhere, or of one who has left."""
    if now < lease.until and lease.kept:
        return Verdict(Status.KEPT, f"run {lease.run} keeps it for the next one", lease.until)
    if now < lease.until:
        return Verdict(Status.LIVING, f"its lease of run {lease.run} is not over")
    if now < lease.until + slack:
        left = lease.until + slack - now
        return Verdict(Status.YOUNG, f"its lease is over, but clocks may differ for {left:.0f} s")
    return Verdict(Status.ORPHAN, f"its lease of run {lease.run} is over")


def _by_death(record: RunRecord, lease: Lease | None, now: float) -> Verdict:
    """The owner is gone. One that lives where this host does not see its process, as in another container,
    would renew the lease in time."""
    if lease is not None:
        left = lease.written + lease.seconds / RENEWALS + GRACE - now
        if left > 0:
            return Verdict(Status.YOUNG, f"its lease was renewed; looked at again in {left:.0f} s")
    if record.ended is not None:
        return Verdict(Status.ORPHAN, "its run has ended")
    return Verdict(
        Status.ORPHAN,
        f"process {record.pid} is gone; its workflow, started again in {record.workdir}, would take it over",
    )


def _foreign_jobs(machine: Machine, lease: Lease | None, nodes: Nodes) -> str:
    there = nodes.jobs.get(machine.instance.node, ())
    foreign = _not_of({machine.run, lease.run if lease else ""}, there)
    return ", ".join(f"job {slurm_id}" for slurm_id in foreign)


def _not_of(runs: Collection[str], jobs: Iterable[NodeJob]) -> list[str]:
    """Anybody may give a job the name of a run."""
    names = {_job_name(run) for run in runs}
    return [job.slurm_id for job in jobs if not job.is_mine or job.name not in names]


def _job_name(run: str) -> str:
    return f"schlouder-{run}"


def stale_nodes(
    alive: Iterable[Machine],
    journals: Journals,
    nodes: Nodes,
    places: Collection[tuple[str, str]],
    runs: Collection[str],
    now: float,
) -> dict[str, str]:
    """Node -> the run that had it last, of all that Slurm still has of machines that are gone: nodes with our
    names that no machine alive has, of runs that are gone. The journals say so, or the runs are among `runs`,
    whose machines were ended, or the lease is over and Slurm has lost the node. `places`: region and endpoint
    of where all machines are known."""
    alive = list(alive)
    named = {machine.instance.node for machine in alive}
    with_machines = {machine.run for machine in alive}
    living = _living_runs(alive, journals, nodes, now)
    found = {}
    for node, lease in nodes.leases.items():
        run = _run_of(node)
        if not run or node in named:
            continue
        if run not in with_machines and _is_told_gone(run, lease, journals, places, runs, now):
            found[node] = run
        elif (
            lease
            and not living & {run, lease.run}
            and _is_useless(node, run, lease, journals, nodes)
        ):
            found[node] = lease.run
    return found


def _run_of(node: str) -> str:
    """The run that gave a node its name; empty: none did."""
    named = re.fullmatch(r"schlouder-(\S+)-\d+", node)
    return named[1] if named else ""


def _is_told_gone(
    run: str,
    lease: Lease | None,
    journals: Journals,
    places: Collection[tuple[str, str]],
    runs: Collection[str],
    now: float,
) -> bool:
    known = journals.runs.get(run)
    if run in runs:
        return known is None or not known.is_living
    is_quiet = lease is None or (lease.run == run and now >= _due(lease))
    return is_quiet and known is not None and known.is_gone and _place(known.record) in places


def _is_useless(node: str, run: str, lease: Lease, journals: Journals, nodes: Nodes) -> bool:
    """Whether a node of which no living run tells is of no use. Its place, with the jobs that wait for it,
    goes to the next node: those of other users nobody here may cancel."""
    names = {_job_name(run), _job_name(lease.run)}
    has_jobs = bool(nodes.jobs.get(node)) or not names.isdisjoint(nodes.foreign)
    return node in nodes.lost and not has_jobs and not journals.unread


def _living_runs(
    alive: Iterable[Machine], journals: Journals, nodes: Nodes, now: float
) -> set[str]:
    """Those that may have an owner: their process is there, or they have a machine, or a lease that is not
    over, whatever clock it was written by."""
    leases = nodes.leases
    owners = {lease.run if (lease := leases.get(m.instance.node)) else m.run for m in alive}
    slack = GRACE + CLOCKS
    promised = {lease.run for lease in leases.values() if lease and now < lease.until + slack}
    return owners | promised | {run for run, known in journals.runs.items() if known.is_living}


def _due(lease: Lease) -> float:
    """When a kept machine has ended, or a living owner would have renewed its lease."""
    return lease.until + GRACE if lease.kept else lease.written + lease.seconds / RENEWALS + GRACE


def _place(record: RunRecord) -> tuple[str, str]:
    return record.region, record.endpoint


# -- the sources


def connect(regions: Sequence[str], everywhere: bool) -> dict[str, EC2Client]:
    """A client for each region: the given ones (none: the default one of AWS's settings), or all that the
    account has; SchlouderError says what is missing."""
    try:
        session = aws_session(regions[0] if regions else "")
        first: EC2Client = patient_client(session, "ec2")
        names = _all_regions(first) if everywhere else regions
        clients = [patient_client(session, "ec2", name) for name in names] or [first]
        return {client.meta.region_name: client for client in clients}
    except SchlouderError as error:
        raise SchlouderError(str(error).replace("--schlouder-region", "--region")) from error


def _all_regions(ec2: EC2Client) -> list[str]:
    try:
        found = asked("--all-regions", "region", lambda: ec2.describe_regions()["Regions"])
    except RightMissing as error:
        raise SchlouderError(f"--all-regions: {error}; --region NAME does without") from error
    return sorted(region["RegionName"] for region in found)


def list_machines(ec2: EC2Client) -> list[Machine]:
    """All that cost money or may do so again, have the tag of a run, which no other tag resembles enough, and
    were launched by schlouder. Raises CloudUnavailable."""
    filters = [
        {"Name": "tag-key", "Values": [TAG_RUN]},
        {"Name": "instance-state-name", "Values": sorted(ALIVE)},
    ]
    return [
        Machine(instance_of(one), tags_of(one).get(TAG_OWNER, ""), ec2.meta.region_name)
        for one in describe(ec2, Filters=filters)
        if tags_of(one).get(TAG_RUN)
        and one["State"]["Name"] in ALIVE
        and is_launch_of_ours(one, ec2.meta.endpoint_url)
    ]


def read_journals(host: str, runs: Collection[str]) -> Journals:
    """All of this user. `runs`: those of which machines are asked about."""
    found: dict[str, LocalRun] = {}
    held: dict[str, str] = {}
    booked: dict[str, VMRecord] = {}
    unread = []
    for path in sorted(state_directory().glob("*/journal.sqlite")):
        try:
            journal = Journal.reading(path)
            try:
                for known in [LocalRun.of(record, host) for record in journal.runs()]:
                    run = known.record.run
                    if run not in found or not found[run].is_living:
                        found[run] = known
                    if run in runs or known.is_living:
                        vms = {vm.instance_id: vm for vm in journal.vms(run) if vm.instance_id}
                        booked.update(vms)
                        if known.is_living:
                            held.update(dict.fromkeys(vms, run))
            finally:
                journal.close()
        except SchlouderError as error:
            unread.append(str(error))
        except (sqlite3.Error, OSError) as error:
            unread.append(f"the journal {path} cannot be read: {error}")
    return Journals(found, held, booked, tuple(unread))


def read_nodes(slurm: SlurmCommands, names: Collection[str]) -> Nodes:
    """`names`: of the nodes whose jobs matter, beside those that Slurm has lost."""
    try:
        records = slurm.all_nodes()
        lost = {
            name for name, one in records.items() if one.is_lost and one.lease and _run_of(name)
        }
        jobs = slurm.jobs_on([name for name in sorted(lost.union(names)) if name in records])
        leases = {name: one.lease for name, one in records.items()}
        return Nodes(leases, jobs, lost, slurm.foreign_names() if lost else ())
    except (ClusterUnavailable, OSError) as error:
        return Nodes(silence=str(error))


# -- what things cost


@dataclass(frozen=True)
class Cost:
    """USD an hour, and so far; None: unknown."""

    hourly: float | None = None
    so_far: float | None = None


def costs(
    machines: Sequence[Machine],
    journals: Journals,
    ec2: EC2Client,
    now: float,
    warn: Callable[[str], None],
) -> dict[str, Cost]:
    """By machine, of one region. Prices that nobody tells are those that a journal has, or unknown."""
    offered = catalog.connect(ec2, "", warn)
    types = [InstanceType(name, 1, 1) for name in sorted({m.instance.type for m in machines})]
    markets = sorted({m.instance.market for m in machines})
    try:
        tariff = offered.tariff(types, [], "", markets)
        begun = min(machine.launched for machine in machines)
        history = offered.spot_history(types, [], begun) if SPOT in markets else None
    except SchlouderError as error:
        warn(str(error))
        return {}
    found = {}
    for machine in machines:
        one, booked = machine.instance, journals.booked.get(machine.id)
        hourly = tariff.price(one.type, one.market, one.zone)
        if hourly is None and booked is not None:
            hourly = booked.price
        if one.state in ("stopping", "stopped"):
            found[one.id] = Cost(0.0)
            continue
        paid = history.paid(one.type, one.zone, machine.launched, now) if history else None
        if one.market != SPOT or paid is None:
            billed = _billing(machine, journals).billed(max(0.0, now - machine.launched))
            paid = None if hourly is None else hourly * billed / 3600
        found[one.id] = Cost(hourly, paid)
    return found


def _billing(machine: Machine, journals: Journals) -> Billing:
    known = journals.runs.get(machine.run)
    return Billing(known.record.unit, known.record.minimum) if known else Billing()


# -- one look, and what is done about it


@dataclass(frozen=True)
class Scope:
    """Whose machines are looked at. `everybody`: not only those of this user on this host; `named`: only
    those of these runs, empty: of all."""

    everybody: bool = False
    named: tuple[str, ...] = ()

    def has(self, machine: Machine) -> bool:
        """Both tags are in every launch of ours (R3), so that a machine with only one is somebody else's."""
        is_ours = bool(machine.owner) and (self.everybody or machine.owner == this_owner())
        return is_ours and (not self.named or machine.run in self.named)


@dataclass(frozen=True)
class Finding:
    machine: Machine
    verdict: Verdict
    may_end: bool
    cost: Cost = Cost()


@dataclass(frozen=True)
class Survey:
    """`nodes`: those of gone machines, with their runs. `problems`: what could not be looked at. `notes`:
    what else is worth knowing."""

    findings: tuple[Finding, ...] = ()
    nodes: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def doomed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.may_end]


@dataclass(frozen=True)
class Ending:
    """`ended`: the ids of machines of which EC2 says so; `left`: those that were to end too. `problems`: what
    was not done, and why. `notes`: what had found an owner meanwhile."""

    ended: tuple[str, ...]
    left: tuple[Machine, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass
class Collector:
    """Looks, and ends what the user has seen."""

    clients: Mapping[str, EC2Client]
    scope: Scope
    slurm: SlurmCommands = field(default_factory=lambda: SlurmCommands(""))
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep

    def survey(self, priced: bool = True, ended: Collection[str] = ()) -> Survey:
        """SchlouderError if no region could be listed. `ended`: runs whose machines were ended just now."""
        alive, problems = self._listed()
        ours = [machine for machine in alive if self.scope.has(machine)]
        journals = read_journals(socket.gethostname(), {machine.run for machine in ours})
        nodes = read_nodes(self.slurm, {machine.instance.node for machine in ours} - {""})
        now = self.clock()
        findings = []
        for machine in ours:
            verdict = judge(machine, journals, nodes, this_owner(), now)
            findings.append(Finding(machine, verdict, may_end(machine, verdict, self.scope.named)))
        notes = [*journals.unread, *self._elsewhere(journals), *self._others(alive, ours)]
        if nodes.silence:
            notes.append(f"Slurm cannot be asked: {nodes.silence}")
        if priced:
            findings = self._priced(findings, journals, now, notes)
        stale = {} if problems else self._stale(alive, journals, nodes, ended, now)
        findings.sort(key=lambda finding: (not finding.may_end, finding.machine.launched))
        return Survey(tuple(findings), stale, tuple(problems), tuple(dict.fromkeys(notes)))

    def end(self, seen: Survey) -> Ending:
        """Judges anew what the user has seen, ends what has still no owner, and waits until EC2 says so.
        SchlouderError if no region could be listed again: nothing was ended."""
        again = self.survey(priced=False)
        now = {finding.machine.id: finding for finding in again.findings}
        doomed, notes = [], []
        for machine in (finding.machine for finding in seen.doomed):
            found = now.get(machine.id)
            if found is not None and found.may_end:
                doomed.append(machine)
            elif found is not None:
                notes.append(f"{machine.id} is left alone now: {found.verdict.why}")
        problems = [*again.problems, *self._terminate(doomed)]
        left = self._await_end({machine.id for machine in doomed})
        problems += self._clean(doomed, seen.nodes)
        return Ending(
            tuple(machine.id for machine in doomed if machine.id not in left),
            tuple(machine for machine in doomed if machine.id in left),
            tuple(problems),
            tuple(notes),
        )

    def _terminate(self, doomed: Sequence[Machine]) -> list[str]:
        """Returns what EC2 refused."""
        problems = []
        for region, client in self.clients.items():
            ids = [machine.id for machine in doomed if machine.region == region]
            if ids:
                try:
                    terminate(client, ids)
                except CloudUnavailable as error:
                    problems.append(f"{region}: not everything could be ended: {error}")
        return problems

    def _clean(self, ended: Sequence[Machine], seen: Mapping[str, str]) -> list[str]:
        """Removes the Slurm nodes of these machines, and those that the user has seen, as far as they are
        still of no use; returns what stays, and why."""
        names = {machine.instance.node for machine in ended} | seen.keys()
        try:
            after = self.survey(priced=False, ended={machine.run for machine in ended})
        except SchlouderError as error:
            return [f"Slurm nodes are left: {error}"]
        return self._remove_nodes({n: run for n, run in after.nodes.items() if n in names})

    def _listed(self) -> tuple[list[Machine], list[str]]:
        alive: list[Machine] = []
        problems = []
        for region, client in self.clients.items():
            try:
                alive += list_machines(client)
            except CloudUnavailable as error:
                problems.append(f"{region}: EC2 does not list machines: {error}")
        if len(problems) == len(self.clients):
            raise SchlouderError(problems[0])
        return alive, problems

    def _priced(
        self, findings: Sequence[Finding], journals: Journals, now: float, notes: list[str]
    ) -> list[Finding]:
        found: dict[str, Cost] = {}
        for region, client in self.clients.items():
            there = [f.machine for f in findings if f.machine.region == region]
            if there:
                found |= costs(there, journals, client, now, notes.append)
        return [replace(f, cost=found.get(f.machine.id, Cost())) for f in findings]

    def _stale(
        self,
        alive: Sequence[Machine],
        journals: Journals,
        nodes: Nodes,
        ended: Collection[str],
        now: float,
    ) -> dict[str, str]:
        places = {(name, client.meta.endpoint_url) for name, client in self.clients.items()}
        stale = stale_nodes(alive, journals, nodes, places, ended, now)
        named = self.scope.named
        return {
            node: run
            for node, run in stale.items()
            if not named or run in named or _run_of(node) in named
        }

    def _elsewhere(self, journals: Journals) -> list[str]:
        """Regions that no one looked at, in which runs of this user have not ended."""
        aws = any(is_aws(client.meta.endpoint_url) for client in self.clients.values())
        regions = {
            known.record.region
            for known in journals.runs.values()
            if known.record.ended is None and is_aws(known.record.endpoint) == aws
        }
        return [
            f"a run of yours that has not ended is in {region}, which was not looked at: --region {region}"
            for region in sorted(regions - self.clients.keys())
        ]

    def _others(self, alive: Sequence[Machine], ours: Sequence[Machine]) -> list[str]:
        if self.scope.everybody or self.scope.named or len(ours) == len(alive):
            return []
        return [f"machines of other owners or without one: {len(alive) - len(ours)} (--everybody)"]

    def _await_end(self, doomed: set[str]) -> set[str]:
        """Those of which EC2 does not say in time that they are ending (R5)."""
        end = self.clock() + ENDING_TIMEOUT
        while doomed:
            try:
                alive, problems = self._listed()
            except SchlouderError as error:
                alive, problems = [], [str(error)]
            left = doomed & {machine.id for machine in alive}
            if not left and not problems:
                return left
            if self.clock() > end:
                return left if not problems else doomed
            self.sleep(_LOOK)
        return set()

    def _remove_nodes(self, nodes: Mapping[str, str]) -> list[str]:
        """Of machines that are gone; returns why one stays."""
        if not nodes:
            return []
        kept = []
        try:
            there = self.slurm.jobs_on(sorted(nodes))
            for run in sorted(set(nodes.values())):
                # Slurm hands a deleted node's place, with the jobs that wait for it, to the next node.
                self.slurm.cancel_run(_job_name(run))
            for node, run in nodes.items():
                if foreign := _not_of({run}, there.get(node, [])):
                    kept.append(
                        f"the Slurm node {node} is left: jobs {', '.join(foreign)} of others"
                    )
                elif not self._is_removed(node):
                    kept.append(f"the Slurm node {node} is left: Slurm does not delete it yet")
        except (ClusterUnavailable, OSError) as error:
            kept.append(f"not all Slurm nodes could be removed: {error}")
        return kept

    def _is_removed(self, node: str) -> bool:
        self.slurm.fail(node, "schlouder gc: machine gone")
        for _ in range(_DELETIONS):
            if self.slurm.delete(node):
                return True
            self.sleep(_LOOK)
        return False


def as_data(survey: Survey, ending: Ending | None) -> dict[str, Any]:
    """For `--json`. `ending`: None if nothing was to be ended."""
    return {
        "machines": [
            {
                "id": finding.machine.id,
                "region": finding.machine.region,
                "run": finding.machine.run,
                "node": finding.machine.instance.node,
                "owner": finding.machine.owner,
                "type": finding.machine.instance.type,
                "market": finding.machine.instance.market,
                "zone": finding.machine.instance.zone,
                "state": finding.machine.instance.state,
                "launched": finding.machine.launched,
                "usd_per_hour": finding.cost.hourly,
                "usd_so_far": finding.cost.so_far,
                "status": finding.verdict.status.value,
                "why": finding.verdict.why,
                "kept_until": finding.verdict.until,
                "to_be_deleted": finding.may_end,
            }
            for finding in survey.findings
        ],
        "nodes": dict(survey.nodes),
        "problems": [*survey.problems, *(ending.problems if ending else ())],
        "notes": [*survey.notes, *(ending.notes if ending else ())],
        "deleted": list(ending.ended) if ending else [],
        "left": [machine.id for machine in ending.left] if ending else [],
    }
