"""VMs made of Linux namespaces: one process tree, one root and one network link per EC2 instance."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from ipaddress import IPv4Address
from pathlib import Path

from snakemake_executor_plugin_schlouder.localcloud import network, vm_init
from snakemake_executor_plugin_schlouder.localcloud.imds import Machine, MetadataServer
from snakemake_executor_plugin_schlouder.localcloud.namespace import only_child

log = logging.getLogger(__name__)

UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--net"]


def clock_library() -> Path | None:
    """Debian's libfaketime, in its variant for programs with threads; None: it is not installed."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


class Event(Enum):
    """What the hypervisor tells the EC2 side about an instance."""

    RUNNING = "its init was started"
    TERMINATED = "it was ended because the EC2 side asked for it"
    POWERED_OFF = "it powered itself off"
    FAILED = "it could not be made, or its init broke"


Report = Callable[[str, Event], None]


@dataclass(frozen=True)
class Shown:
    """Directories of the host: those that VMs see empty, and those that they share with it, which may lie
    in the former."""

    hidden: Sequence[str]
    shared: Sequence[str]


@dataclass
class Hypervisor:
    """Starts and ends VMs. `report` is called from other threads, once per event and instance."""

    subnet: network.Network
    state: Path
    shown: Shown
    boot_seconds: tuple[float, float]
    report: Report
    _vms: dict[str, _VM] = field(default_factory=dict)

    def launch(self, machine: Machine) -> None:
        """Returns at once; the VM starts after a boot delay drawn from `boot_seconds`."""
        vm = _VM(self, machine, random.uniform(*self.boot_seconds))
        self._vms[machine.instance_id] = vm
        vm.start()

    def terminate(self, instance_id: str) -> None:
        """Returns at once; an unknown or ended VM is left alone."""
        if vm := self._vms.get(instance_id):
            vm.terminate()

    def notify(self, instance_id: str, notices: Mapping[str, bytes]) -> None:
        """Adds documents to the VM's metadata service; an unknown or ended VM is left alone."""
        if vm := self._vms.get(instance_id):
            vm.notices.update(notices)

    def act(self, instance_id: str, action: str) -> None:
        """`crash`es a running VM, `cut`s its link or `reconnect`s it. KeyError: there is no such VM, or
        no such action."""
        vm = self._vms[instance_id]
        if action == "crash":
            vm.crash()
        else:
            vm.switch_link({"cut": False, "reconnect": True}[action])

    def run(self, instance_id: str, command: Sequence[str]) -> str:
        """What `command` says as root in the VM, errors included; of no longer than a few seconds."""
        return self._vms[instance_id].run_in(command)

    def console(self, instance_id: str) -> bytes:
        """The last 64 KiB of the VM's console, as GetConsoleOutput gives them."""
        path = self.console_path(instance_id)
        return path.read_bytes()[-65536:] if path.exists() else b""

    def console_path(self, instance_id: str) -> Path:
        return self.state / "console" / f"{instance_id}.log"

    def forget(self, instance_id: str) -> None:
        self._vms.pop(instance_id, None)

    def stop(self) -> None:
        """Ends all VMs and returns when they are gone."""
        vms = list(self._vms.values())
        for vm in vms:
            vm.terminate()
        for vm in vms:
            vm.join()


class _VM(threading.Thread):
    """The life of one VM, from the boot delay to the removal of its link."""

    def __init__(self, hypervisor: Hypervisor, machine: Machine, delay: float) -> None:
        super().__init__(name=machine.instance_id, daemon=True)
        self.hypervisor = hypervisor
        self.machine = machine
        self.delay = delay
        self.doomed = threading.Event()
        self.lock = threading.Lock()
        self.notices: dict[str, bytes] = {}
        self.pid = 0
        self.init: int | None = None
        """A pidfd of the VM's first process while there is one: a pid could be somebody else's by now."""

    def terminate(self) -> None:
        self.doomed.set()
        with self.lock:
            self._kill_init()

    def crash(self) -> None:
        """The host under it fails: nobody asked for its end."""
        with self.lock:
            self._kill_init()

    def switch_link(self, on: bool) -> None:
        network.switch_link(network.host_link(IPv4Address(self.machine.address)), on)

    def run_in(self, command: Sequence[str]) -> str:
        with self.lock:
            if self.init is None:
                raise KeyError(f"{self.machine.instance_id} does not run")
            spaces = ["--mount", "--uts", "--ipc", "--net", "--pid"]
            done = subprocess.run(
                ["nsenter", f"--target={self.pid}", *spaces, "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=20,
            )
        return done.stdout.decode(errors="replace")

    def _kill_init(self) -> None:
        if self.init is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.init, signal.SIGKILL)

    def run(self) -> None:
        event = Event.TERMINATED
        if not self.doomed.wait(self.delay):
            try:
                event = self._live()
            except Exception:
                log.exception("VM %s", self.machine.instance_id)
                event = Event.FAILED
        self.hypervisor.forget(self.machine.instance_id)
        self.hypervisor.report(self.machine.instance_id, event)

    def _live(self) -> Event:
        process = self._spawn()
        address = IPv4Address(self.machine.address)
        metadata: MetadataServer | None = None
        try:
            pid = only_child(process.pid)
            with self.lock:
                self.pid, self.init = pid, os.pidfd_open(pid)
            if self.doomed.is_set():
                self.terminate()
            else:
                network.connect(self.hypervisor.subnet, address, pid)
                metadata = MetadataServer(self.machine, pid, self.notices)
                self.hypervisor.report(self.machine.instance_id, Event.RUNNING)
            code = process.wait()
        except Exception:
            if not self.doomed.is_set():
                raise
            code = 1
        finally:
            self._end(process)
            if metadata:
                metadata.close()
            # The kernel would do it too, but later than the next VM may get this address.
            network.delete_link(network.host_link(address))
        if self.doomed.is_set():
            return Event.TERMINATED
        return Event.POWERED_OFF if code == 0 else Event.FAILED

    def _spawn(self) -> subprocess.Popen[bytes]:
        config = {
            "scratch": str(self.hypervisor.state / "root"),
            "hostname": self.machine.hostname,
            "address": self.machine.address,
            **asdict(self.hypervisor.shown),
            "hangs": self.machine.hangs,
            "clock_off": self.machine.clock_off,
            "clock_library": str(clock_library() or ""),
        }
        init = [sys.executable, "-I", "-S", vm_init.__file__, json.dumps(config)]
        path = self.hypervisor.console_path(self.machine.instance_id)
        with path.open("ab") as console:
            return subprocess.Popen(
                [*UNSHARE, *init], stdin=subprocess.DEVNULL, stdout=console, stderr=console
            )

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Leaves no process: unshare ends after the last process of the VM's pid namespace."""
        with self.lock:
            if self.init is None:
                process.kill()
            self._kill_init()
            process.wait()
            if self.init is not None:
                os.close(self.init)
                self.init = None
