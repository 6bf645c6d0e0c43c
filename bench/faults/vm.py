"""Faults of single VMs: killed, cut off, full, never joining."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from bench.faults.fault import CLEAN_ERROR, COMPLETE, Fault, by_name
from bench.faults.ledger import Attempt
from bench.faults.place import node_of
from bench.faults.scene import Scene
from snakemake_executor_plugin_schlouder.localcloud import Faults
from snakemake_executor_plugin_schlouder.localcloud.hypervisor import clock_library

SLURMD_TIMEOUT = 30.0
"""Of the embedded cloud's slurm.conf: seconds after which a silent node is down."""

MUNGE_TTL = 300.0
"""Seconds between two clocks beyond which munged takes credentials for expired, or for made in the future
(munged(8), its default)."""

ONE_BY_ONE = ("--schlouder-max-booting", "1", "--schlouder-boot-timeout", "30")


def _crash(scene: Scene) -> None:
    scene.cloud.vm(scene.instance_of(scene.when_busy()[0].node), "crash")
    time.sleep(3)


def _crash_at_boot(scene: Scene) -> None:
    _first_vm(scene)
    scene.cloud.inject(Faults())
    scene.cloud.vm(str(scene.own()[0]["InstanceId"]), "crash")


def _hang_at_boot(scene: Scene) -> None:
    _first_vm(scene)
    scene.cloud.inject(Faults())


def _clock_off(scene: Scene) -> None:
    _first_vm(scene)
    scene.cloud.inject(Faults())
    vm = str(scene.own()[0]["InstanceId"])
    # Its first process may not have made its root yet.
    scene.when(lambda: abs(_seconds_off(scene, vm)) > 1, "its clock is off", 20)
    scene.notes.append(f"its clock was {_seconds_off(scene, vm):+.0f} s off")


def _seconds_off(scene: Scene, vm: str) -> float:
    return float(scene.cloud.run_in_vm(vm, "date", "+%s.%N")) - time.time()


def _right_in_jobs(scene: Scene) -> None:
    """libfaketime 0.9.10 breaks time.sleep (clock_nanosleep with TIMER_ABSTIME) where a clock is off."""
    scene.place.environment["FAKETIME"] = "+0"


def _refused(scene: Scene) -> None:
    node = node_of(scene.own()[0])
    if any(attempt.node == node for attempt in scene.attempts()):
        scene.problems.append(f"jobs ran on {node}, whose clock no munged accepts")
    said = rf"\({node}\) is given up: no Slurm node.*\nConsole of .*\({node}\)"
    if not re.search(said, scene.said):
        scene.problems.append(f"nobody was told, with its console, that {node} did not join")


def _accepted(scene: Scene) -> None:
    if not any(attempt.node == node_of(scene.own()[0]) for attempt in scene.attempts()):
        scene.problems.append("no job ran on it")


def _no_library() -> str:
    return "" if clock_library() else "libfaketime is not installed"


def _first_vm(scene: Scene) -> None:
    scene.open_gate()
    scene.when(lambda: any(one["State"]["Name"] == "running" for one in scene.own()), "a VM boots")


def _to_the_end(scene: Scene) -> None:
    scene.open_gate()
    scene.ends_within(400)


def _crash_idle(scene: Scene) -> None:
    scene.when_busy(1)
    busy = {attempt.node for attempt in scene.living()}
    idle = {attempt.node for attempt in scene.attempts()} - busy
    scene.when(lambda: idle, "a VM is idle", 1.0)
    scene.cloud.vm(scene.instance_of(min(idle)), "crash")
    time.sleep(5)


def _on(scene: Scene, node: str) -> list[Attempt]:
    return [attempt for attempt in scene.living() if attempt.node == node]


def _cut(scene: Scene, seconds: float) -> Sequence[Attempt]:
    """Returns the jobs on the VM that was cut off for so long."""
    node = scene.when_busy()[0].node
    vm, running = scene.instance_of(node), _on(scene, node)
    scene.cloud.vm(vm, "cut")
    time.sleep(seconds)
    try:
        scene.cloud.vm(vm, "reconnect")
    except Exception as error:
        scene.notes.append(f"it was gone by then ({type(error).__name__})")
    return running


def _cut_shortly(scene: Scene) -> None:
    was = {attempt.name for attempt in _cut(scene, SLURMD_TIMEOUT / 3)}
    time.sleep(5)
    if gone := was - {attempt.name for attempt in scene.living()}:
        scene.problems.append(f"{len(gone)} jobs did not survive it")


def _cut_long(scene: Scene) -> None:
    _cut(scene, 2 * SLURMD_TIMEOUT)


def _cut_and_writing(scene: Scene) -> None:
    """Nobody can end the jobs there but EC2, which takes its time."""
    scene.cloud.inject(Faults(slow_end=20.0))
    node = scene.when_busy()[0].node
    vm = scene.instance_of(node)
    scene.cloud.vm(vm, "cut")
    cut = time.monotonic()
    scene.when(lambda: not _on(scene, node), "the machine is gone")
    longest = max(attempt.last for attempt in scene.attempts() if attempt.node == node) - cut
    scene.notes.append(f"its jobs wrote for {longest:.0f} s more")


def _fill_disk(scene: Scene) -> None:
    """Where slurmd keeps scripts of jobs: none can begin there any more."""
    node = scene.when_busy()[0].node
    vm, spool = scene.instance_of(node), "/var/spool/slurmd"
    fill = f"while :; do dd if=/dev/zero bs=512 >>{spool}/filler; sleep 0.1; done"
    scene.cloud.run_in_vm(vm, "mount", "-o", "remount,size=256k", spool)
    # What ends makes room.
    scene.cloud.run_in_vm(vm, "sh", "-c", f"({fill}) </dev/null >/dev/null 2>&1 &")
    time.sleep(1)
    filled = time.monotonic()
    scene.open_gate()
    scene.ends_within(400)
    if any(one.node == node and one.begun > filled for one in scene.attempts()):
        scene.problems.append("jobs began there all the same: the disk was not full")


FAULTS = by_name(
    [
        Fault("vm-killed", "a VM dies under its jobs", COMPLETE, _crash),
        Fault(
            "vm-killed-booting",
            "a VM dies while it boots",
            COMPLETE,
            _crash_at_boot,
            options=ONE_BY_ONE,
            faults=Faults(never_join=1.0),
        ),
        Fault(
            "vm-killed-idle",
            "a VM dies while it has nothing to do, and is kept for the end of its unit",
            COMPLETE,
            _crash_idle,
            parts=8,
            free=7,
            options=("--schlouder-btu", "3600"),
            billing_unit=3600,
        ),
        Fault(
            "vm-cut",
            "a VM is cut off the network for 10 s (SlurmdTimeout is 30): its jobs run on",
            COMPLETE,
            _cut_shortly,
        ),
        Fault(
            "vm-cut-long",
            "a VM is cut off the network, and comes back after a minute",
            COMPLETE,
            _cut_long,
        ),
        Fault(
            "vm-cut-writes",
            "a VM that is cut off goes on to write until EC2 has ended it, 20 s after it was asked to",
            COMPLETE,
            _cut_and_writing,
        ),
        Fault(
            "vm-never-joins",
            "the first VM boots, and never joins",
            COMPLETE,
            _hang_at_boot,
            options=ONE_BY_ONE,
            faults=Faults(never_join=1.0),
        ),
        Fault(
            "no-vm-joins",
            "no VM ever joins: after the third nothing more is started",
            CLEAN_ERROR,
            _to_the_end,
            options=("--schlouder-boot-timeout", "15"),
            faults=Faults(never_join=1.0),
            says="3 VMs in a row did not join Slurm",
        ),
        Fault(
            "vm-clock",
            "the clock of the first VM is 5.5 minutes fast, which munge refuses (more than 5)",
            COMPLETE,
            _clock_off,
            options=ONE_BY_ONE,
            faults=Faults(clock_off=MUNGE_TTL + 30),
            set_up=_right_in_jobs,
            last=_refused,
            missing=_no_library,
        ),
        Fault(
            "vm-clock-slow",
            "the clock of the first VM is 4.5 minutes slow, which munge accepts: jobs run there",
            COMPLETE,
            _clock_off,
            options=ONE_BY_ONE,
            faults=Faults(clock_off=30 - MUNGE_TTL),
            set_up=_right_in_jobs,
            last=_accepted,
            missing=_no_library,
        ),
        Fault(
            "vm-disk-full",
            "the disk on which slurmd keeps scripts is full",
            COMPLETE,
            _fill_disk,
            options=("--schlouder-max-vms", "2"),
        ),
    ]
)
