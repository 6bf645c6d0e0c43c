"""Runs Snakemake as a user does, on an embedded cloud, and looks at what it left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3

from snakemake_executor_plugin_schlouder.localcloud import LocalCloud
from snakemake_executor_plugin_schlouder.provision import TAG_NODE

PATIENCE = 60.0


@dataclass
class Site:
    """One workflow directory on one embedded cloud. `environment` is that of the user's shell."""

    cloud: LocalCloud
    directory: Path
    environment: dict[str, str]

    @classmethod
    def make(cls, cloud: LocalCloud, directory: Path, snakefile: str = "") -> Site:
        kept = {f"XDG_{kind.upper()}_HOME": str(directory / kind) for kind in ("state", "cache")}
        made = cls(cloud, directory, {**os.environ, **cloud.environment(), **kept})
        made.write(snakefile)
        return made

    def write(self, snakefile: str) -> None:
        (self.directory / "Snakefile").write_text(snakefile)

    def start(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        """Snakemake in a process group of its own, as a terminal would start it, even where the tests
        run under nohup."""
        return subprocess.Popen(
            [
                *("env", "--default-signal=HUP", sys.executable, "-m", "snakemake"),
                *("--executor", "schlouder", "--jobs", "50"),
                *options,
            ],
            cwd=self.directory,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )

    def run(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*options, **environment)
        try:
            output, _ = process.communicate(timeout=3 * PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    @contextlib.contextmanager
    def started(self, *options: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
        """Snakemake at work; a test that fails meanwhile ends it as Ctrl-C does."""
        process = self.start(*options, **environment)
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGCONT)
                os.killpg(process.pid, signal.SIGINT)
                process.communicate(timeout=PATIENCE)

    def ec2(self) -> Any:
        access = self.cloud.environment()
        return boto3.client(
            "ec2",
            endpoint_url=access["AWS_ENDPOINT_URL"],
            region_name=access["AWS_DEFAULT_REGION"],
            aws_access_key_id=access["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=access["AWS_SECRET_ACCESS_KEY"],
        )

    def instances(self) -> list[Mapping[str, Any]]:
        pages = self.ec2().get_paginator("describe_instances").paginate()
        return [
            instance
            for page in pages
            for reservation in page["Reservations"]
            for instance in reservation["Instances"]
        ]

    def instance_of(self, node: str) -> str:
        """The newest machine of a node."""
        found = [instance for instance in self.instances() if node_of(instance) == node]
        return str(max(found, key=lambda instance: instance["LaunchTime"])["InstanceId"])

    def alive(self) -> list[str]:
        return [i["InstanceId"] for i in self.instances() if i["State"]["Name"] != "terminated"]

    def slurm(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """Slurm id -> state and reason of the jobs that have not ended."""
        lines = self.slurm("squeue", "--noheader", "--format=%i %T %r").splitlines()
        return dict(line.split(" ", 1) for line in lines)

    @contextlib.contextmanager
    def configured(self, **settings: str) -> Iterator[None]:
        """These settings in slurm.conf, of what slurmctld takes over while it runs, and new VMs."""
        conf = Path(self.environment["SLURM_CONF"])
        before = conf.read_text()
        kept = [line for line in before.splitlines() if line.partition("=")[0] not in settings]
        try:
            conf.write_text("\n".join([*kept, *(f"{k}={v}" for k, v in settings.items()), ""]))
            self.slurm("scontrol", "reconfigure")
            yield
        finally:
            conf.write_text(before)
            self.slurm("scontrol", "reconfigure")

    def remains(self) -> dict[str, Any]:
        """Everything of VMs that is still there: instances, nodes, unfinished jobs, processes, links."""
        found = {
            "instances": self.alive(),
            "nodes": self.slurm("sinfo", "--Node", "--noheader", "--format=%N %T").split("\n")[:-1],
            "jobs": self.slurm("squeue", "--noheader", "--format=%i %T").split("\n")[:-1],
            "processes": vm_processes(self.cloud),
        }
        return {kind: left for kind, left in found.items() if left}

    def assert_nothing_left(self) -> None:
        """Within the seconds a machine takes to end."""
        wait_for(lambda: not self.remains(), lambda: f"left behind: {self.remains()}", seconds=15)


def node_of(instance: Mapping[str, Any]) -> str:
    """The tag of machines that were started together names them all; empty: it is no VM of a run."""
    tags = {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}
    names = str(tags.get(TAG_NODE, "")).split()
    return names[instance["AmiLaunchIndex"]] if names else ""


def vm_processes(cloud: LocalCloud) -> list[str]:
    """Command lines of the first processes of this cloud's VMs, and of what starts them."""
    return list(_vm_commands(cloud).values())


def vm_pids(cloud: LocalCloud) -> list[int]:
    """The first process of each of this cloud's VMs."""
    lines = _vm_commands(cloud)
    return [pid for pid, line in lines.items() if not line.startswith("unshare")]


def _vm_commands(cloud: LocalCloud) -> dict[int, str]:
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if "vm_init.py" in line and str(cloud.folder) in line:
            found[int(path.parent.name)] = line
    return found


def slurmctld(cloud: LocalCloud) -> int:
    """The process id of this cloud's controller."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if words[0].endswith("slurmctld") and f"{cloud.folder}/slurm.conf" in words:
            return int(path.parent.name)
    raise AssertionError("the cloud has no slurmctld")


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process, or with a negative number the process group, does nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def wait_for(
    condition: Callable[[], bool], why: Callable[[], str], seconds: float = PATIENCE
) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, why()
        time.sleep(0.1)


def as_nobody(function: Callable[[], int]) -> tuple[int, str]:
    """Calls `function` in a child process without privileges; returns its value and what it said as an error.

    A fork and not a new interpreter, because that may be installed where nobody may read it; for the
    same reason `function` must import nothing that is not imported yet.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writer, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        try:
            code = function()
        except BaseException:
            traceback.print_exc()
            code = 99
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text
