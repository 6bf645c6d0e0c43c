"""Adapter of the port `Cluster` over Slurm's commands (22.05 and later).

Argument lists are built and outputs parsed by pure functions; only `SlurmCommands._run` starts processes.
"""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..lease import Lease, parse
from ..printable import one_line, plain
from . import (
    ClusterInfo,
    ClusterUnavailable,
    ClusterUnfit,
    ClusterView,
    JobRequest,
    JobStatus,
    NodeStatus,
    SubmissionRefused,
    SubmitOutcome,
)
from .states import phase_of

COMMANDS = ("sbatch", "squeue", "sinfo", "scontrol", "scancel")
OLDEST = (22, 5)
AUTHS = ("munge", "slurm")
DEFAULT_MUNGE_SOCKET = "/run/munge/munge.socket.2"
TIMEOUT = 60.0
"""Seconds; a controller that is down lets squeue wait 18 s before it says so."""

LOOK = 0.25
"""Seconds after which whoever waits for Slurm looks whether that is still worth it."""

_HURRIED = 5.0
_REST = 3.0

SIDE_BY_SIDE = 4
"""Submissions at a time: sbatch mostly waits for the controller."""

_UNREACHABLE = ("Unable to contact slurm controller", "Socket timed out", "Connection refused")
_BROKEN = (
    *(errno.EAGAIN, errno.ECONNABORTED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH),
    *(errno.ENOTCONN, errno.EPIPE, errno.ETIMEDOUT),
)
"""What becomes of a connection to a slurmctld that ends or is restarted meanwhile."""

TRANSIENT_SUBMIT = (
    *_UNREACHABLE,
    *(os.strerror(number) for number in _BROKEN),
    *("Message send failure", "Message receive failure", "Communication "),
    *("temporarily unable", "Slurm temporarily", "in standby mode"),
    *("Zero Bytes were transmitted", "Protocol authentication error"),
)
"""Words of sbatch after which the job may have arrived, or can be submitted later."""
_JOB_FORMAT = "%i|%T|%S|%e|%k|%r"
_NODE_FORMAT = "%N|%T|%E"
_WITHHELD = (
    *("SLURM_", "SBATCH_", "SQUEUE_", "SINFO_", "SCANCEL_", "SCONTROL_", "SNAKEMAKE_PROFILE"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN"),
    *("AWS_CONTAINER_", "AWS_WEB_IDENTITY_"),
)
_NODE_FLAGS = "*~#!%$@^-+"


class NodeJob(NamedTuple):
    """A job that has begun on a node. `is_mine`: it is one of this user."""

    slurm_id: str
    name: str
    is_mine: bool = True


@dataclass(frozen=True)
class NodeRecord:
    """`is_lost`: Slurm calls the node down, and it does not respond."""

    lease: Lease | None = None
    is_lost: bool = False


def sbatch_arguments(job: JobRequest) -> list[str]:
    """The command that submits `job`; the script goes to its standard input."""
    arguments = [
        "sbatch",
        "--parsable",
        f"--job-name={job.run}",
        f"--comment={job.key}",
        f"--partition={job.partition}",
        f"--nodelist={','.join(job.nodes)}",
        f"--nodes={len(job.nodes)}",
        f"--ntasks={job.options.tasks}",
        f"--cpus-per-task={job.cpus_per_task}",
        f"--mem={job.memory}M",
        "--no-requeue",
        "--export=ALL",
        f"--chdir={job.workdir}",
        f"--output={log_pattern(job)}",
    ]
    if job.companions:
        # Or Slurm fills one node and gives the other what is left.
        arguments.append(f"--mincpus={job.cpus}")
    if job.limit is not None:
        arguments.append(f"--time={minutes(job.limit)}")
    for name in ("account", "qos", "reservation", "constraint", "gres"):
        if value := getattr(job.options, name):
            arguments.append(f"--{name}={value}")
    return [*arguments, *job.options.extra]


def log_pattern(job: JobRequest) -> str:
    """The log file as a pattern of Slurm's, in which a percent sign would be replaced."""
    return job.log.replace("%", "%%")


def minutes(limit: float) -> int:
    """A time limit in seconds as Slurm counts it."""
    return max(1, -(-int(limit) // 60))


def parse_jobs(text: str) -> dict[str, JobStatus]:
    """squeue's lines in `_JOB_FORMAT`, by submission key; jobs without a key are not ours. The reason comes
    last, for it may hold anything, such as signs that `splitlines` takes for the end of a line."""
    jobs = {}
    for line in text.split("\n"):
        fields = line.split("|", 5)
        if len(fields) == 6 and fields[4] not in ("", "(null)"):
            slurm_id, state, started, ended, key, reason = fields
            jobs[key] = JobStatus(
                key, slurm_id, phase_of(state), state, plain(reason), _time(started), _time(ended)
            )
    return jobs


def parse_nodes(text: str) -> dict[str, NodeStatus]:
    """sinfo's lines in `_NODE_FORMAT`, one node each (`--Node`), by name."""
    nodes = {}
    for line in text.split("\n"):
        fields = line.split("|", 2)
        if len(fields) == 3:
            name, state, reason = fields
            bare = state.rstrip(_NODE_FLAGS).lower()
            nodes[name] = NodeStatus(name, bare, "*" not in state, plain(reason))
    return nodes


def parse_records(text: str) -> dict[str, NodeRecord]:
    """`scontrol --oneliner show node`: all nodes, with the leases in their comments."""
    found = {}
    for line in text.split("\n"):
        name = re.match(r"NodeName=(\S+)", line)
        state = re.search(r" State=(\S+)", line)
        comment = re.search(r" Comment=(.*)", line)
        if name is not None:
            is_lost = state is not None and _is_lost(state[1])
            found[name[1]] = NodeRecord(parse(comment[1]) if comment else None, is_lost)
    return found


def _is_lost(state: str) -> bool:
    """Of a state such as `DOWN+DYNAMIC_NORM+NOT_RESPONDING`."""
    base, *flags = state.split("+")
    return base == "DOWN" and "NOT_RESPONDING" in flags


def parse_config(text: str) -> dict[str, str]:
    """`scontrol show config`: `Key = value` lines."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cluster_info(config: Mapping[str, str]) -> ClusterInfo:
    """What `scontrol show config` says, judged; raises ClusterUnfit."""
    version = _version(config.get("SLURM_VERSION", ""))
    if version < OLDEST:
        raise ClusterUnfit(
            f"Slurm: version {config.get('SLURM_VERSION') or 'unknown'} cannot add nodes while it runs; "
            "22.05 or later is needed"
        )
    if not _number(config.get("MaxNodeCount", "")):
        raise ClusterUnfit(
            "Slurm: MaxNodeCount is not set in slurm.conf, so no VM can join; set it to the highest "
            "number of nodes there may ever be, for example MaxNodeCount=1024, and restart slurmctld"
        )
    return ClusterInfo(version, _controller(config), _munge_socket(config), _auth(config))


def _controller(config: Mapping[str, str]) -> str:
    host = config.get("SlurmctldHost[0]", "")
    named = re.fullmatch(r"(?P<name>[^()]+)(?:\((?P<address>[^()]+)\))?", host)
    if named is None:
        raise ClusterUnfit(
            f"Slurm: SlurmctldHost is {host!r}; a host name or name(address) is needed"
        )
    port = config.get("SlurmctldPort", "6817").split("-")[0]
    return f"{named['address'] or named['name']}:{port}"


def _munge_socket(config: Mapping[str, str]) -> str:
    named = re.search(r"socket=([^,\s]+)", config.get("AuthInfo", ""))
    return named[1] if named else DEFAULT_MUNGE_SOCKET


def _auth(config: Mapping[str, str]) -> str:
    named = config.get("AuthType", "auth/munge").removeprefix("auth/")
    if named not in AUTHS:
        raise ClusterUnfit(
            f"Slurm: AuthType is auth/{named}, with which no VM can join; "
            f"{' and '.join(f'auth/{auth}' for auth in AUTHS)} can be used"
        )
    return named


def _version(text: str) -> tuple[int, int]:
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _time(text: str) -> float | None:
    return float(text) if text.isdigit() else None


class Patience:
    """How long Slurm is waited for, by every thread that asks it. In a hurry that is short, and once it was
    in vain nobody asks for some seconds: many questions, one for each VM say, cost little more than one."""

    def __init__(self) -> None:
        self.is_short = False
        self._rested = -math.inf

    def hurry(self) -> None:
        self.is_short = True

    def is_over(self, begun: float) -> bool:
        """Whether one who has waited since `begun` (monotonic) is to give up."""
        now = time.monotonic()
        over = now - begun > (_HURRIED if self.is_short else TIMEOUT)
        if over and self.is_short:
            self._rested = now + _REST
        return over

    def check(self) -> None:
        """Raises ClusterUnavailable while nobody is to ask."""
        if time.monotonic() < self._rested:
            raise ClusterUnavailable("no answer a moment ago")


def submit_side_by_side(
    jobs: Sequence[JobRequest],
    submit: Callable[[JobRequest], SubmitOutcome],
    width: int,
    patience: Patience,
) -> list[SubmitOutcome]:
    """Outcomes of `submit`, called `width` at a time; none is begun once Slurm has stopped answering, or in a
    hurry."""
    silent = threading.Event()

    def submitted(job: JobRequest) -> SubmitOutcome | None:
        if silent.is_set() or patience.is_short:
            return None
        outcome = submit(job)
        if isinstance(outcome, ClusterUnavailable):
            silent.set()
        return outcome

    with ThreadPoolExecutor(width) as pool:
        outcomes = list(pool.map(submitted, jobs))
    while outcomes and outcomes[-1] is None:
        outcomes.pop()
    # A job may be passed over while one behind it is under way.
    return [outcome or ClusterUnavailable("not tried") for outcome in outcomes]


class SlurmCommands:
    """The adapter. `partition` is the one whose nodes are ours. Jobs of other users are not ours whatever
    their names and comments, which anybody may choose; an operator could even cancel them: hence `--me`."""

    def __init__(self, partition: str, passed: Mapping[str, str] | None = None) -> None:
        """`passed`: variables, secrets among them, that jobs get beside our environment."""
        self.partition = partition
        self.patience = Patience()
        self._passed = passed or {}

    def check(self) -> ClusterInfo:
        missing = [command for command in COMMANDS if shutil.which(command) is None]
        if missing:
            raise ClusterUnfit(
                f"Slurm: {', '.join(missing)} not found in PATH; install Slurm's client commands "
                "(Debian and Ubuntu: apt install slurm-client)"
            )
        try:
            config = self.config()
        except ClusterUnavailable as error:
            raise ClusterUnfit(f"Slurm: slurmctld does not answer ({error})") from error
        info = cluster_info(config)
        self._check_partition()
        self._check_rights()
        return info

    def config(self) -> dict[str, str]:
        """The controller's configuration."""
        return parse_config(self._read(["scontrol", "show", "config"]))

    def environment(self) -> dict[str, str]:
        """What jobs get."""
        return _environment(self._passed)

    def _bare_environment(self) -> dict[str, str]:
        """For commands that start no job."""
        kept = _environment({})
        return {name: value for name, value in kept.items() if name not in self._passed}

    def submit(self, jobs: Sequence[JobRequest]) -> list[SubmitOutcome]:
        return submit_side_by_side(jobs, self.submit_one, SIDE_BY_SIDE, self.patience)

    def submit_one(self, job: JobRequest) -> SubmitOutcome:
        try:
            done = self._run(sbatch_arguments(job), stdin=job.script)
        except ClusterUnavailable as error:
            return error
        if done.returncode == 0:
            return done.stdout.strip().split(";")[0]
        message = last_line(done.stderr)
        if any(sign in done.stderr for sign in TRANSIENT_SUBMIT):
            return ClusterUnavailable(message)
        return SubmissionRefused(message)

    def view(self, run: str, nodes: bool = True) -> ClusterView:
        jobs = self._read(
            [
                "squeue",
                "--me",
                f"--name={run}",
                "--states=all",
                "--noheader",
                f"--format={_JOB_FORMAT}",
            ]
        )
        return ClusterView(parse_jobs(jobs), self._nodes() if nodes else {})

    def _nodes(self) -> dict[str, NodeStatus]:
        listed = self._read(
            [
                "sinfo",
                "--Node",
                f"--partition={self.partition}",
                "--noheader",
                f"--format={_NODE_FORMAT}",
            ]
        )
        return parse_nodes(listed)

    def cancel_run(self, run: str) -> None:
        self._read(["scancel", "--me", f"--name={run}"])

    def knows(self, slurm_id: str, key: str) -> bool:
        return key in self._keys([slurm_id]).values()

    def cancel(self, jobs: Mapping[str, str]) -> None:
        found = self._keys(jobs)
        if meant := [slurm_id for slurm_id, key in jobs.items() if found.get(slurm_id) == key]:
            self._read(["scancel", *meant])

    def _keys(self, slurm_ids: Iterable[str]) -> dict[str, str]:
        """Id -> key, of those that Slurm has a record of."""
        ids = ",".join(slurm_ids)
        done = self._run(
            ["squeue", f"--jobs={ids}", "--states=all", "--noheader", "--format=%A|%k"]
        )
        if done.returncode != 0 and "Invalid job id" not in done.stderr:
            raise ClusterUnavailable(last_line(done.stderr))
        return dict(line.split("|", 1) for line in done.stdout.splitlines() if "|" in line)

    def jobs_in(self, workdir: Path) -> set[str]:
        """Names of the user's jobs that wait or run in this directory."""
        listed = self._read(["squeue", "--me", "--noheader", "--format=%j|%Z"])
        jobs = (line.partition("|") for line in listed.splitlines())
        return {name for name, _, directory in jobs if directory == str(workdir)}

    def foreign_jobs(self, run: str) -> dict[str, list[str]]:
        ours = set(
            self._read(["squeue", "--me", f"--name={run}", "--noheader", "--format=%i"]).split()
        )
        listed = self._read(
            [
                "squeue",
                f"--partition={self.partition}",
                "--states=RUNNING,COMPLETING,SUSPENDED",
                "--noheader",
                "--format=%i|%N",
            ]
        )
        found: dict[str, list[str]] = {}
        for line in listed.splitlines():
            slurm_id, _, nodes = line.partition("|")
            if slurm_id not in ours:
                for node in self._expand(nodes):
                    found.setdefault(node, []).append(slurm_id)
        return found

    def drain(self, nodes: Iterable[str], reason: str) -> None:
        self._update(list(nodes), "state=drain", f"reason={reason}")

    def fail(self, node: str, reason: str) -> None:
        self._update([node], "state=down", f"reason={reason}")

    def renew(self, nodes: Iterable[str], lease: Lease) -> None:
        self._update(list(nodes), f"comment={lease.text}")

    def leases(self) -> dict[str, Lease]:
        """Those in the comments of nodes, by name; nodes without one are left out."""
        return {node: record.lease for node, record in self.all_nodes().items() if record.lease}

    def all_nodes(self) -> dict[str, NodeRecord]:
        """Every node of the cluster that Slurm shows."""
        return parse_records(self._read(["scontrol", "--oneliner", "show", "node"]))

    def jobs_on(self, nodes: Sequence[str]) -> dict[str, list[NodeJob]]:
        """Every job that has begun on these nodes, in whatever partition; an unknown node is an error."""
        if not nodes:
            return {}
        listed = self._read(
            [
                "squeue",
                f"--nodelist={','.join(nodes)}",
                "--states=RUNNING,COMPLETING,SUSPENDED",
                "--noheader",
                "--format=%i|%U|%N|%j",
            ]
        )
        found: dict[str, list[NodeJob]] = {}
        for line in listed.split("\n"):
            # The name comes last, for it may hold anything.
            fields = line.split("|", 3)
            if len(fields) == 4:
                job = NodeJob(fields[0], fields[3], fields[1] == str(os.getuid()))
                for node in self._expand(fields[2]):
                    found.setdefault(node, []).append(job)
        return found

    def foreign_names(self) -> set[str]:
        """Names of the jobs of other users that wait or run."""
        listed = self._read(["squeue", "--noheader", "--format=%U|%j"])
        jobs = (line.partition("|") for line in listed.split("\n"))
        return {name for user, _, name in jobs if name and user != str(os.getuid())}

    def delete(self, node: str) -> bool:
        done = self._run(["scontrol", "delete", f"nodename={node}"])
        if done.returncode == 0 or "Invalid node name" in done.stderr:
            return True
        self._raise_unreachable(done)
        return False

    def hurry(self) -> None:
        self.patience.hurry()

    def _expand(self, nodes: str) -> list[str]:
        """The names in a node list such as `n[1-3],m2`."""
        if "[" not in nodes:
            return nodes.split(",")
        return self._read(["scontrol", "show", "hostnames", nodes]).split()

    def _update(self, nodes: Sequence[str], *settings: str) -> None:
        """Slurm stops at the first unknown node, in an order of its own: then those that it knows are
        updated alone."""
        if not nodes or self._try_update(nodes, *settings) or len(nodes) == 1:
            return
        known = self._nodes()
        if here := [node for node in nodes if node in known]:
            self._try_update(here, *settings)

    def _try_update(self, nodes: Sequence[str], *settings: str) -> bool:
        """False: Slurm does not know one of the nodes."""
        done = self._run(["scontrol", "update", f"nodename={','.join(nodes)}", *settings])
        if done.returncode == 0:
            return True
        if "Invalid node name" in done.stderr:
            return False
        raise ClusterUnavailable(last_line(done.stderr))

    def _check_partition(self) -> None:
        done = self._run(["scontrol", "show", "partition", self.partition])
        if done.returncode != 0:
            raise ClusterUnfit(
                f"--schlouder-partition: Slurm has no partition {self.partition!r}; add it to slurm.conf: "
                f"NodeSet={self.partition} Feature=schlouder and "
                f"PartitionName={self.partition} Nodes={self.partition}"
            )

    def _check_rights(self) -> None:
        """Deleting a node that cannot exist: Slurm looks at the rights before it looks for the node."""
        done = self._run(["scontrol", "delete", f"nodename=schlouder-probe-{uuid.uuid4().hex}"])
        if "denied" in done.stderr or "Invalid user" in done.stderr:
            raise ClusterUnfit(
                f"Slurm: {last_line(done.stderr)}: no right to update and delete nodes; "
                "it takes SlurmUser, root or a Slurm operator "
                "(sacctmgr modify user NAME set adminlevel=operator)"
            )

    def _read(self, arguments: Sequence[str]) -> str:
        done = self._run(arguments)
        if done.returncode != 0:
            raise ClusterUnavailable(f"{arguments[0]}: {last_line(done.stderr)}")
        return done.stdout

    def _raise_unreachable(self, done: subprocess.CompletedProcess[str]) -> None:
        if any(sign in done.stderr for sign in _UNREACHABLE):
            raise ClusterUnavailable(last_line(done.stderr))

    def _run(self, arguments: Sequence[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Runs one command in a session of its own, so that a Ctrl-C at the terminal does not end it. Only
        sbatch, which hands them on, gets the variables that jobs are passed."""
        self.patience.check()
        with subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            env=self.environment() if arguments[0] == "sbatch" else self._bare_environment(),
        ) as process:
            try:
                output = self._talk(process, arguments[0], stdin)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(arguments, process.returncode, *output)

    def _talk(
        self, process: subprocess.Popen[str], name: str, stdin: str | None
    ) -> tuple[str, str]:
        """The two outputs of the command called `name`; ClusterUnavailable when patience is over."""
        begun = time.monotonic()
        while True:
            try:
                return process.communicate(stdin, timeout=LOOK)
            except subprocess.TimeoutExpired:
                stdin = None
            if self.patience.is_over(begun):
                raise ClusterUnavailable(f"{name}: no answer in {time.monotonic() - begun:.0f} s")


def _environment(passed: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment without what would change the meaning of our options (inside a Slurm job
    SLURM_* describes that job; SQUEUE_*, SBATCH_* and their like are options), without Snakemake's
    profile, and without cloud credentials: sbatch hands its environment on to the job. What is `passed`
    is there."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not name.startswith(_WITHHELD)
    }
    return {**kept, **passed, "SLURM_TIME_FORMAT": "%s"}


def last_line(text: str) -> str:
    """The last line that says something; below it a command may say where its help is."""
    lines = [line.strip() for line in text.splitlines()]
    told = [line for line in lines if line and not line.startswith("Try ")]
    return one_line(told[-1]) if told else "no message"
