"""Faults of Snakemake itself."""

from __future__ import annotations

import os
import signal
import time

from bench.faults import ledger
from bench.faults.fault import CLEAN_ERROR, COMPLETE, LONGEST, RESUMES, Fault, by_name
from bench.faults.place import last_line, wait
from bench.faults.scene import Scene, expected


def _signal(scene: Scene, number: int) -> None:
    assert scene.process is not None
    os.killpg(scene.process.pid, number)


def _terminate(scene: Scene) -> None:
    """Which lets what runs come to its end, and starts nothing more."""
    busy = scene.when_busy()
    _signal(scene, signal.SIGTERM)
    time.sleep(2)
    scene.notes.append(f"{len(busy)} jobs ran then")


def _interrupt(scene: Scene) -> None:
    scene.when_busy()
    _signal(scene, signal.SIGINT)
    _ends_with_gate_closed(scene)


def _interrupt_twice(scene: Scene) -> None:
    scene.when_busy()
    _signal(scene, signal.SIGINT)
    time.sleep(0.5)
    _signal(scene, signal.SIGINT)
    _ends_with_gate_closed(scene)


def _ends_with_gate_closed(scene: Scene) -> None:
    """No job ends by itself, so that Snakemake has to end them."""
    begun = time.monotonic()
    if scene.ends_within(60):
        scene.notes.append(f"ended {time.monotonic() - begun:.0f} s later")
    else:
        scene.problems.append("did not end within 60 s")


def _left_alone(scene: Scene) -> None:
    """What runs ends; then the VMs have nothing to do, and nobody who renews their leases."""
    scene.when_busy()
    _signal(scene, signal.SIGKILL)
    scene.open_gate()
    begun = time.monotonic()
    while scene.alive() and time.monotonic() < begun + scene.settle:
        time.sleep(1)
    if left := scene.alive():
        scene.problems.append(f"{len(left)} VMs live {scene.settle:.0f} s later")
    scene.notes.append(f"the VMs have ended {time.monotonic() - begun:.0f} s later")


def _second_in_directory(scene: Scene) -> None:
    scene.when_busy()
    launched = len(scene.own())
    log = scene.directory / "second.log"
    code = wait(scene.place.start(scene.command("--rerun-incomplete"), log), 60)
    if code == 0 or "lock" not in log.read_text().lower():
        scene.problems.append(f"the second one: exit code {code}: {last_line(log)}")
    else:
        scene.notes.append("the second one met Snakemake's lock")
    if len(scene.own()) > launched:
        scene.problems.append("the second one has launched VMs")


def _second_beside(scene: Scene) -> None:
    """Its own directory, at the same time."""
    other = scene.beside("other")
    other.close_gate()
    process = other.start()
    scene.when_busy()
    other.when_busy()
    scene.open_gate()
    other.open_gate()
    code = wait(process, LONGEST)
    attempts = other.attempts()
    bad = {
        "exit code": [str(code)] if code else [],
        "lost": ledger.lost(other.directory, expected(other.parts)),
        "done twice": other.done_twice(),
        "two live": ledger.lived_at_once(attempts),
        "left": other.left(),
    }
    scene.problems.extend(
        f"other directory: {what} {found}" for what, found in bad.items() if found
    )
    nodes = {attempt.node for attempt in attempts} & {one.node for one in scene.attempts()}
    if nodes:
        scene.problems.append(f"both used {', '.join(sorted(nodes))}")


FAULTS = by_name(
    [
        Fault(
            "sigterm",
            "SIGTERM to Snakemake: what runs ends, nothing more is started",
            CLEAN_ERROR,
            _terminate,
        ),
        Fault(
            "ctrl-c", "Ctrl-C: all jobs are cancelled, all VMs given back", CLEAN_ERROR, _interrupt
        ),
        Fault(
            "ctrl-c-twice",
            "Ctrl-C, and again while VMs are being given back",
            CLEAN_ERROR,
            _interrupt_twice,
        ),
        Fault(
            "sigkill-unattended",
            "SIGKILL, and nobody starts it again until the leases are over",
            RESUMES,
            _left_alone,
            leased=True,
        ),
        Fault(
            "same-directory",
            "a second Snakemake in the same directory",
            COMPLETE,
            _second_in_directory,
        ),
        Fault(
            "two-directories",
            "two Snakemakes of one user in two directories at once",
            COMPLETE,
            _second_beside,
        ),
    ]
)
