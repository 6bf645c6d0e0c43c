"""The private munged and slurmctld of one embedded cloud."""

from __future__ import annotations

import base64
import os
import pwd
import re
import secrets
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path

PARTITION = "schlouder"
# slurmctld looks for jobs to start once a second at best. Its main scheduler stops at the first job of a
# partition that has to wait; backfill goes on to those pinned to other nodes.
SCHEDULER = "batch_sched_delay=0,sched_interval=1,default_queue_depth=1000,bf_interval=1,bf_max_job_test=1000"
FIRST_PORT = 6817
START_SECONDS = 10.0
_SIGNALS = {"stop": signal.SIGSTOP, "continue": signal.SIGCONT}

SLURM_CONF = """\
ClusterName=schlouder
SlurmctldHost={hostname}({gateway})
SlurmctldPort={port}
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={munge_socket}
StateSaveLocation={state}/slurmctld
SlurmctldPidFile={state}/slurmctld/pid
SlurmctldLogFile={state}/slurmctld.log
SlurmctldParameters={controller_parameters}
CommunicationParameters=NoCtldInAddrAny
MaxNodeCount=1024
TreeWidth=65533
ReturnToService=2
SlurmdTimeout=30
SlurmdParameters=config_overrides
SlurmdSpoolDir=/var/spool/slurmd
SlurmdPidFile=/run/slurmd.pid
SlurmdLogFile=/var/log/slurm/slurmd.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters={scheduler_parameters}
KillWait=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
PropagateResourceLimits=NONE
MailProg=/bin/true
NodeSet={partition} Feature={partition}
PartitionName={partition} Nodes={partition} Default=YES MaxTime=INFINITE State=UP
"""


class ControllerError(RuntimeError):
    """munged or slurmctld did not start; the text says which, and shows the end of its log."""


@dataclass
class Controller:
    """Runs munged and slurmctld as `uid`, who becomes SlurmUser and thereby Slurm's administrator."""

    state: Path
    gateway: IPv4Address
    uid: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _ended: set[str] = field(default_factory=set)

    @property
    def slurm_conf(self) -> Path:
        return self.state / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        return self.state / "munge" / "munge.socket"

    def start(self) -> str:
        """Starts both without waiting for slurmctld; returns the munge key in base64."""
        for name in ("munge", "slurmctld"):
            self._own(self.state / name).chmod(0o755)
        key = secrets.token_bytes(128)
        self._start_munged(key)
        self._start_slurmctld()
        return base64.b64encode(key).decode()

    def wait(self) -> None:
        """Returns when slurmctld answers a client."""
        ping = ["scontrol", "ping"]
        environment = {**os.environ, "SLURM_CONF": str(self.slurm_conf)}
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.running():
            answer = subprocess.run(ping, env=environment, capture_output=True, check=False)
            if b"is UP" in answer.stdout:
                return
            time.sleep(0.05)
        raise ControllerError(f"slurmctld did not start: {_last_line(self.state, 'slurmctld.log')}")

    def running(self) -> bool:
        """But for what `act` has ended."""
        return all(
            process.poll() is None
            for name, process in self.processes.items()
            if name not in self._ended
        )

    def restart_if_shut_down(self) -> None:
        """Starts slurmctld again, with the state it saved, after `scontrol shutdown`."""
        if self.processes["slurmctld"].poll() == 0 and "slurmctld" not in self._ended:
            self._run_slurmctld()

    def act(self, name: str, action: str) -> None:
        """`kill`s munged or slurmctld as a crash does, or `end`s it as an operator does, and `start`s it
        again with the state it had; or `stop`s it, so that it does not answer, until it is to `continue`.
        KeyError for any other word."""
        process = self.processes[name]
        if action == "start":
            {"munged": self._run_munged, "slurmctld": self._run_slurmctld}[name]()
            self._ended.discard(name)
        elif action in ("kill", "end"):
            self._ended.add(name)
            process.kill() if action == "kill" else process.terminate()
            process.wait()
        else:
            process.send_signal(_SIGNALS[action])

    def stop(self) -> None:
        """Without a farewell: slurmctld would take a second to save a state that nobody reads again."""
        for process in self.processes.values():
            process.kill()
            process.wait()

    def _start_munged(self, key: bytes) -> None:
        folder = self.state / "munge"
        key_file = folder / "munge.key"
        descriptor = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
        os.chown(key_file, self.uid, -1)
        self._run_munged()
        end = time.monotonic() + START_SECONDS
        while not self.munge_socket.exists():
            if time.monotonic() > end or not self.running():
                raise ControllerError(
                    f"munged did not start: {_last_line(self.state, 'munged.log')}"
                )
            time.sleep(0.01)

    def _run_munged(self) -> None:
        folder = self.state / "munge"
        options = {
            "key-file": folder / "munge.key",
            "socket": self.munge_socket,
            "pid-file": folder / "munged.pid",
            "seed-file": folder / "munged.seed",
        }
        command = [
            "munged",
            "--foreground",
            *(f"--{name}={path}" for name, path in options.items()),
        ]
        self._start("munged", command, "munged.log")

    def _start_slurmctld(self) -> None:
        parameters = ["enable_configless"]
        version = slurm_version()
        if version < (23, 11):
            # Later versions always take a dynamic node's address from its registration.
            parameters.append("cloud_reg_addrs")
        self._own(self.state / "slurmctld.log", directory=False)
        hostname = socket.gethostname().split(".")[0]
        self._resolve_to_gateway(hostname)
        self.slurm_conf.write_text(
            SLURM_CONF.format(
                hostname=hostname,
                gateway=self.gateway,
                port=free_port(self.gateway),
                user=pwd.getpwuid(self.uid).pw_name,
                munge_socket=self.munge_socket,
                state=self.state,
                controller_parameters=",".join(parameters),
                scheduler_parameters=SCHEDULER,
                partition=PARTITION,
            )
        )
        # slurmd always loads a cgroup plugin, and that for v2 wants a cgroup of its own; the VMs have none.
        # The one for v1 is content with none as long as nothing is to be confined.
        plugin = "disabled" if version >= (24, 5) else "cgroup/v1"
        (self.state / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        self._run_slurmctld()

    def _run_slurmctld(self) -> None:
        self._start(
            "slurmctld", ["slurmctld", "-D", "-i", "-f", str(self.slurm_conf)], "slurmctld.out"
        )

    def _resolve_to_gateway(self, hostname: str) -> None:
        """Lets slurmctld listen on the gateway address only.

        With NoCtldInAddrAny it binds to what the host's name resolves to, whatever SlurmctldHost says. The
        change is seen in this process's mount namespace only.
        """
        hosts = self.state / "hosts"
        hosts.write_text(f"{self.gateway} {hostname}\n127.0.0.1 localhost\n")
        subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)

    def _start(self, name: str, command: list[str], log: str) -> None:
        entry = pwd.getpwuid(self.uid)
        with (self.state / log).open("ab") as output:
            self.processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                user=entry.pw_uid,
                group=entry.pw_gid,
                extra_groups=os.getgrouplist(entry.pw_name, entry.pw_gid),
            )

    def _own(self, path: Path, directory: bool = True) -> Path:
        path.mkdir() if directory else path.touch()
        os.chown(path, self.uid, -1)
        return path


def slurm_version() -> tuple[int, int]:
    """Major and minor version of the slurmctld in PATH."""
    answer = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"(\d+)\.(\d+)", answer)
    if match is None:
        raise ControllerError(f"slurmctld -V says {answer.strip()!r}, which is no version")
    return int(match[1]), int(match[2])


def free_port(address: IPv4Address) -> int:
    """A port below the ephemeral range, so that nobody takes it before slurmctld does."""
    for port in range(FIRST_PORT, 32768):
        with socket.socket() as probe:
            try:
                probe.bind((str(address), port))
            except OSError:
                continue
            return port
    raise ControllerError(f"no free TCP port on {address}")


def _last_line(state: Path, log: str) -> str:
    lines = (state / log).read_text(errors="replace").splitlines()
    return lines[-1] if lines else "it wrote no log"
