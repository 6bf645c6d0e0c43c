"""CPU seconds of the embedded cloud, from the kernel's books: /proc/PID/stat, see proc(5).

A process that has ended and was waited for is in its parent's sums. So the sums over all processes of
a tree hold everything that ever ran in it, VMs that are no more included: the kernel, the VM's first
process or the daemon has waited for each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONTROLLER = ("munged", "slurmctld")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """CPU seconds since the cloud was started: of slurmctld and its munged, and of everything in VMs
    (jobs, slurmd, munged, user data). The EC2 endpoint and the hypervisor are in neither."""

    controller: float
    vms: float

    def __sub__(self, other: Usage) -> Usage:
        return Usage(self.controller - other.controller, self.vms - other.vms)


@dataclass(frozen=True)
class Process:
    """`own` and `waited`: CPU seconds of itself, and of the children it has waited for."""

    pid: int
    parent: int
    name: str
    own: float
    waited: float


class Processes:
    """All processes of the machine at one moment."""

    def __init__(self, processes: list[Process]) -> None:
        self._by_pid = {process.pid: process for process in processes}
        self._children: dict[int, list[Process]] = {}
        for process in processes:
            self._children.setdefault(process.parent, []).append(process)

    @classmethod
    def now(cls) -> Processes:
        return cls(list(_read()))

    def usage(self, daemon: int) -> Usage:
        controller = vms = 0.0
        for child in self._children.get(daemon, []):
            seconds = sum(p.own + p.waited for p in self._tree(child))
            if child.name in CONTROLLER:
                controller += seconds
            else:
                vms += seconds
        return Usage(controller, vms + self._by_pid[daemon].waited)

    def vms(self, daemon: int) -> list[Process]:
        return [p for p in self._children.get(daemon, []) if p.name not in CONTROLLER]

    def jobs(self, daemon: int) -> list[Process]:
        """The supervisors of Slurm's jobs and steps in the VMs."""
        return [
            process
            for vm in self.vms(daemon)
            for process in self._tree(vm)
            if process.name.startswith("slurmstepd")
        ]

    def _tree(self, root: Process) -> Iterator[Process]:
        yield root
        for child in self._children.get(root.pid, []):
            yield from self._tree(child)


def _read() -> Iterator[Process]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text(errors="replace")
        except OSError:
            continue
        name, _, rest = text.partition("(")[2].rpartition(")")
        fields = rest.split()
        user, system, waited_user, waited_system = (int(ticks) for ticks in fields[11:15])
        yield Process(
            int(folder.name),
            int(fields[1]),
            name,
            (user + system) / _TICKS,
            (waited_user + waited_system) / _TICKS,
        )
