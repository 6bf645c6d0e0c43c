"""Adapter of the port `Cluster` over pyslurm, which spares a process for every submission and query.

pyslurm runs in a child process (`rpc_worker.py`). What it cannot say, and what is rare, goes through
Slurm's commands, as does everything once the child process is lost.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from snakemake_interface_executor_plugins.logging import LoggerExecutorInterface

from ..lease import Lease
from ..printable import plain
from . import (
    Cluster,
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
from .cli import (
    LOOK,
    SIDE_BY_SIDE,
    TIMEOUT,
    TRANSIENT_SUBMIT,
    Patience,
    SlurmCommands,
    last_line,
    log_pattern,
    minutes,
    submit_side_by_side,
)
from .states import phase_of

_WORTH_A_PROCESS = 100
"""Submissions that take as long as one more child process takes to start."""

_FAREWELL = 2.0
"""Seconds a child process that hangs up has to end, so that its exit code can be told."""

_WORKER = Path(__file__).with_name("rpc_worker.py")
_LIMITS = ("AS", "CORE", "CPU", "DATA", "FSIZE", "MEMLOCK", "NOFILE", "NPROC", "RSS", "STACK")
"""What PropagateResourceLimits of slurm.conf(5) can name."""


class PyslurmUnfit(Exception):
    """pyslurm cannot be used here, or no longer; the message says why."""


class _Unable(Exception):
    """pyslurm has no way to ask Slurm this."""


class _Refused(Exception):
    """Slurm's own words for why not."""


def choose(
    api: str, commands: SlurmCommands, info: ClusterInfo, logger: LoggerExecutorInterface
) -> Cluster:
    """The adapter for `--schlouder-slurm-api`. ClusterUnfit if that is `pyslurm` and it does not fit."""
    if api == "cli":
        logger.debug("schlouder: Slurm through its commands, as --schlouder-slurm-api says")
        return commands
    try:
        version = _fitting(info)
        cluster = SlurmRpc(commands, logger)
    except PyslurmUnfit as error:
        if api == "pyslurm":
            raise ClusterUnfit(
                f"--schlouder-slurm-api: pyslurm cannot be used: {error}; "
                "auto and cli use Slurm's commands"
            ) from error
        logger.debug(f"schlouder: Slurm through its commands: {error}")
        return commands
    logger.debug(f"schlouder: Slurm through pyslurm {version}: it fits the controller")
    return cluster


def _fitting(info: ClusterInfo) -> str:
    """Version of the installed pyslurm; PyslurmUnfit unless it is made for the controller's Slurm."""
    try:
        version = importlib.metadata.version("pyslurm")
    except importlib.metadata.PackageNotFoundError:
        raise PyslurmUnfit("pyslurm is not installed") from None
    line = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if line != info.version:
        raise PyslurmUnfit(
            f"pyslurm {version} is not made for the controller's Slurm "
            f"{info.version[0]}.{info.version[1]:02}"
        )
    return version


def description(job: JobRequest) -> dict[str, object]:
    """The fields of pyslurm's JobSubmitDescription that say what `cli.sbatch_arguments` says."""
    fields: dict[str, object] = {
        "name": job.run,
        "comment": job.key,
        "partitions": job.partition,
        "required_nodes": job.node,
        "nodes": 1,
        "ntasks": job.options.tasks,
        "cpus_per_task": job.cpus_per_task,
        "memory_per_node": f"{job.memory}M",
        "is_requeueable": False,
        "environment": "ALL",
        "working_directory": str(job.workdir),
        "standard_output": log_pattern(job),
    }
    if job.limit is not None:
        fields["time_limit"] = minutes(job.limit)
    options = job.options
    asked = {
        "account": options.account,
        "qos": options.qos,
        "reservations": options.reservation,
        "constraints": options.constraint,
    }
    return {**fields, **{name: value for name, value in asked.items() if value}}


def environment(job: JobRequest) -> dict[str, str]:
    """What sbatch tells a job about its own options."""
    return {
        "SLURM_JOB_NAME": job.run,
        "SLURM_CPUS_PER_TASK": str(job.cpus_per_task),
    }


def needs_sbatch(job: JobRequest) -> bool:
    """Whether only sbatch understands this: its own options and its syntax of generic resources; 0 as all
    the memory; a part of several nodes, for pyslurm takes `--mincpus` for that of all of them together; a
    script with a carriage return, which pyslurm would turn into a line feed."""
    options = job.options
    only_sbatch = options.extra or options.gres or not job.memory or job.companions
    return bool(only_sbatch or "\r" in job.script)


def node_status(name: str, state: str, reason: str) -> NodeStatus:
    """From a state such as `MIXED+DRAIN+NOT_RESPONDING`, the word that sinfo(1) has for it."""
    base, *flags = state.lower().split("+")
    busy = base in ("allocated", "mixed") or "completing" in flags
    if "invalid_reg" in flags:
        word = "inval"
    elif "drain" in flags:
        word = "draining" if busy else "drained"
    elif "fail" in flags:
        word = "failing" if busy else "fail"
    elif "completing" in flags and base != "allocated":
        word = "completing"
    elif base == "idle":
        word = next((flag for flag in ("maint", "reserved", "planned") if flag in flags), base)
    else:
        word = base
    return NodeStatus(name, word, "not_responding" not in flags, plain(reason))


def propagated(config: Mapping[str, str]) -> list[str]:
    """The resource limits that Slurm carries from the submitting process to the job (slurm.conf(5))."""
    but = config.get("PropagateResourceLimitsExcept", "(null)").upper().split(",")
    named = config.get("PropagateResourceLimits", "ALL").upper().split(",")
    if but != ["(NULL)"]:
        return [name for name in _LIMITS if name not in but]
    return [name for name in _LIMITS if name in named or named == ["ALL"]]


class WorkerProcess:
    """A child process with pyslurm in it, asked by one thread at a time. It ends with this object, or with
    this process."""

    def __init__(
        self, environment: Mapping[str, str], limits: Sequence[str], patience: Patience
    ) -> None:
        """The jobs it submits get `environment`, and those of its resource limits that `limits` names."""
        self._channel, theirs = socket.socketpair()
        self._patience = patience
        self._messages: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (ends with this object)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-X", "utf8", str(_WORKER), *limits],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._messages,
                start_new_session=True,
                env=environment,
            )
        self._rest = b""
        self._end = weakref.finalize(self, _end, self._process, self._channel)

    @property
    def is_alive(self) -> bool:
        return self._end.alive

    def ask(self, name: str, *arguments: object) -> Any:
        """One request and its reply. Raises PyslurmUnfit if the process is lost; whatever else interrupts
        this ends the process, or the next request would get this one's reply."""
        begun = time.monotonic()
        try:
            self._channel.settimeout(TIMEOUT)
            self._channel.sendall(json.dumps([name, arguments]).encode() + b"\n")
            self._channel.settimeout(LOOK)
            reply = json.loads(self._line(begun))
        except TimeoutError:
            self._end()
            raise PyslurmUnfit(f"no answer in {time.monotonic() - begun:.0f} s") from None
        except OSError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_FAREWELL)
            self._end()
            raise PyslurmUnfit(
                f"its process has ended with code {self._process.returncode}: {self._last_words()}"
            ) from None
        except BaseException:
            self._end()
            raise
        if "refused" in reply:
            raise _Refused(reply["refused"])
        if "unable" in reply:
            raise _Unable(reply["unable"])
        return reply["value"]

    def _line(self, begun: float) -> bytes:
        """The reply to what was asked at `begun`; TimeoutError when patience is over."""
        while b"\n" not in self._rest:
            try:
                received = self._channel.recv(1 << 16)
            except TimeoutError:
                if self._patience.is_over(begun):
                    raise
                continue
            if not received:
                raise ConnectionResetError
            self._rest += received
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def _last_words(self) -> str:
        self._messages.seek(0)
        return last_line(self._messages.read().decode(errors="replace"))


def _end(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    channel.close()
    process.kill()
    process.wait()


class SlurmRpc:
    """The adapter: submissions and queries by pyslurm, the rest by `commands`."""

    def __init__(self, commands: SlurmCommands, logger: LoggerExecutorInterface) -> None:
        """PyslurmUnfit if a child process cannot import pyslurm, or pyslurm gets no answer from Slurm."""
        self._commands = commands
        self._logger = logger
        self._is_lost = False
        try:
            self._limits = propagated(commands.config())
        except ClusterUnavailable as error:
            raise PyslurmUnfit(str(error)) from error
        self._idle = [self._worker()]
        try:
            self._idle[0].ask("hello")
        except (_Refused, _Unable) as error:
            raise PyslurmUnfit(str(error)) from error

    def submit(self, jobs: Sequence[JobRequest]) -> list[SubmitOutcome]:
        if self._is_lost:
            return self._commands.submit(jobs)
        width = min(SIDE_BY_SIDE, 1 + len(jobs) // _WORTH_A_PROCESS)
        return submit_side_by_side(jobs, self._submit, width, self._commands.patience)

    def view(self, run: str, nodes: bool = True) -> ClusterView:
        if self._is_lost:
            return self._commands.view(run, nodes)
        try:
            jobs = self._ask("jobs", run)
            listed = self._ask("nodes", self._commands.partition) if nodes else []
        except (_Refused, _Unable) as error:
            raise ClusterUnavailable(str(error)) from error
        except PyslurmUnfit:
            return self._commands.view(run, nodes)
        return ClusterView(
            {key: _job_status(key, *rest) for key, *rest in jobs},
            {name: node_status(name, *rest) for name, *rest in listed},
        )

    def check(self) -> ClusterInfo:
        return self._commands.check()

    def cancel_run(self, run: str) -> None:
        self._commands.cancel_run(run)

    def knows(self, slurm_id: str, key: str) -> bool:
        return self._commands.knows(slurm_id, key)

    def cancel(self, jobs: Mapping[str, str]) -> None:
        self._commands.cancel(jobs)

    def foreign_jobs(self, run: str) -> dict[str, list[str]]:
        return self._commands.foreign_jobs(run)

    def drain(self, nodes: Iterable[str], reason: str) -> None:
        self._commands.drain(nodes, reason)

    def fail(self, node: str, reason: str) -> None:
        self._commands.fail(node, reason)

    def renew(self, nodes: Iterable[str], lease: Lease) -> None:
        self._commands.renew(nodes, lease)

    def delete(self, node: str) -> bool:
        return self._commands.delete(node)

    def hurry(self) -> None:
        self._commands.hurry()

    def _submit(self, job: JobRequest) -> SubmitOutcome:
        if needs_sbatch(job):
            return self._commands.submit_one(job)
        try:
            return str(self._ask("submit", description(job), environment(job), job.script))
        except _Refused as error:
            if any(sign in str(error) for sign in TRANSIENT_SUBMIT):
                return ClusterUnavailable(str(error))
            return SubmissionRefused(str(error))
        except _Unable:
            return self._commands.submit_one(job)
        except PyslurmUnfit as error:
            return ClusterUnavailable(f"pyslurm: {error}")

    def _ask(self, name: str, *arguments: object) -> Any:
        worker = self._idle.pop() if self._idle else self._worker()
        try:
            return worker.ask(name, *arguments)
        except PyslurmUnfit as error:
            if not self._is_lost:
                self._is_lost = True
                self._logger.warning(
                    f"schlouder: pyslurm: {error}; from here on Slurm's commands are used"
                )
            raise
        finally:
            if worker.is_alive:
                self._idle.append(worker)

    def _worker(self) -> WorkerProcess:
        return WorkerProcess(self._commands.environment(), self._limits, self._commands.patience)


def _job_status(
    key: str, slurm_id: str, state: str, reason: str, started: int | None, ended: int | None
) -> JobStatus:
    times = (None if time is None else float(time) for time in (started, ended))
    return JobStatus(key, slurm_id, phase_of(state), state, plain(reason), *times)
