"""One fault, what must come of it, and what came of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.faults import ledger
from bench.faults.place import last_line, launched_twice, wait
from bench.faults.scene import (
    PARTS,
    Foreigner,
    NeverStruck,
    Scene,
    at_work,
    expected,
    on_cloud,
)
from snakemake_executor_plugin_schlouder.localcloud import Faults

COMPLETE = "complete"
CLEAN_ERROR = "clean error, resumes"
"""Snakemake ends by itself, with an error that says why, and leaves no VM; started again, it completes."""

RESUMES = "resumes"
"""Snakemake is gone; started again, it completes."""

LEASE = 60
"""Seconds, where a fault is about leases. A VM's first one is longer by the boot timeout."""

LONGEST = 600.0
"""Seconds after which a Snakemake is given up."""


NO_FAULTS = Faults()


@dataclass(frozen=True)
class Fault:
    """`strike` is called when Snakemake has been started, and the gate is opened when it returns; after
    the first `free` jobs none ends before. Then `faults` and what it injected are over, unless Snakemake
    is to end with an error: then they stay until it has, and it must say `says`; `mend` then removes the
    cause.

    `what`: one line for the documentation. `set_up` is called before Snakemake is started, `last` when all is
    over, before it is judged. `leased`: VMs may stay until their lease is over, which is then LEASE
    seconds. `missing`: what this machine lacks for it; empty: nothing."""

    name: str
    what: str
    expected: str
    strike: Callable[[Scene], None]
    free: int = 4
    parts: int = PARTS
    options: Sequence[str] = ()
    boot_seconds: tuple[float, float] = (1.0, 1.0)
    faults: Faults = NO_FAULTS
    says: str = ""
    leased: bool = False
    billing_unit: int = 1
    mend: Callable[[Scene], None] = lambda scene: scene.cloud.inject(Faults())
    set_up: Callable[[Scene], None] = lambda scene: None
    last: Callable[[Scene], None] = lambda scene: None
    missing: Callable[[], str] = lambda: ""


@dataclass(frozen=True)
class Result:
    """`wrong`: in one line, why it is not as expected; empty: it is. The lists name what nobody wants:
    outputs that are not what they must be, jobs done twice, jobs of which two attempts lived at once, VMs
    launched twice, what is left of VMs, and what happened to somebody else's. `seconds`: from the first
    start of Snakemake to its last end."""

    name: str
    expected: str
    outcome: str
    wrong: str
    seconds: float
    lost: Sequence[str] = ()
    twice: Sequence[str] = ()
    at_once: Sequence[str] = ()
    launched_twice: Sequence[str] = ()
    left: Sequence[str] = ()
    touched: Sequence[str] = ()
    notes: Sequence[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        bad = (self.lost, self.twice, self.at_once, self.launched_twice, self.left, self.touched)
        return not self.wrong and not any(bad)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run(fault: Fault, directory: Path, cloud: str) -> Result:
    """Strikes in a new `directory` on a new cloud of this name. Nothing of either goes on when this returns
    or raises; logs and ledgers stay."""
    options = {"boot_seconds": fault.boot_seconds, "billing_unit": fault.billing_unit}
    with on_cloud(directory, cloud, **options) as (place, foreigner):
        scene = Scene(place, fault.options, fault.parts, fault.free)
        if fault.leased:
            first = ("--schlouder-boot-timeout", str(LEASE // 2))
            scene.options = (*fault.options, "--schlouder-lease", f"{LEASE}s", *first)
            scene.settle = 2.0 * LEASE
        with at_work(scene):
            return _struck(fault, scene, foreigner)


def _struck(fault: Fault, scene: Scene, foreigner: Foreigner) -> Result:
    begun, problems = time.monotonic(), scene.problems
    fault.set_up(scene)
    scene.cloud.inject(fault.faults)
    scene.close_gate()
    process = scene.start()
    try:
        fault.strike(scene)
    except NeverStruck as error:
        problems.append(str(error))
    scene.open_gate()
    if fault.expected == COMPLETE:
        scene.cloud.inject(Faults())
    process = scene.process or process
    code = wait(process, LONGEST)
    outcome = _outcome(fault, scene, code)
    fault.mend(scene)
    if code != 0 and fault.expected != COMPLETE:
        code = resume(scene, was_killed=code == -signal.SIGKILL)
    fault.last(scene)
    seconds = time.monotonic() - begun
    if code != 0:
        problems.append(f"exit code {code}: {last_line(scene.log)}")
    if outcome != fault.expected:
        problems.insert(0, outcome)
    return measured(
        scene, foreigner, Result(fault.name, fault.expected, outcome, "", seconds), problems
    )


def measured(scene: Scene, foreigner: Foreigner, result: Result, problems: Sequence[str]) -> Result:
    """The result with what the ledger, EC2 and Slurm tell of the scene."""
    attempts = scene.attempts()
    if "Traceback (most recent call last)" in scene.said:
        problems = [*problems, "a traceback was shown"]
    return Result(
        result.name,
        result.expected,
        result.outcome,
        "; ".join(problems),
        result.seconds,
        ledger.lost(scene.directory, expected(scene.parts)),
        scene.done_twice(),
        ledger.lived_at_once(attempts),
        launched_twice(scene.own()),
        scene.left(),
        foreigner.touched(scene.foreign),
        scene.notes,
    )


def _outcome(fault: Fault, scene: Scene, code: int) -> str:
    if code == 0:
        return COMPLETE
    if code == -signal.SIGKILL:
        return RESUMES
    if fault.says not in scene.said:
        return f"an error that does not say {fault.says!r}"
    left = scene.left(nodes=not fault.leased)
    return f"an error that leaves {', '.join(left)}" if left else CLEAN_ERROR


def resume(scene: Scene, was_killed: bool) -> int:
    """Starts Snakemake again as it asks for, without any gate; its exit code."""
    scene.open_gate()
    if was_killed:
        scene.process = scene.place.start(scene.command("--unlock"), scene.log)
        wait(scene.process, LONGEST)
    scene.start("--rerun-incomplete")
    assert scene.process is not None
    return wait(scene.process, LONGEST)


def by_name(faults: Sequence[Fault]) -> Mapping[str, Fault]:
    found = {fault.name: fault for fault in faults}
    assert len(found) == len(faults), "two faults have one name"
    return found
