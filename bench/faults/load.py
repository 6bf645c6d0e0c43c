"""Two thousand real short jobs on the embedded cloud, bundled, and what a round of the broker costs as they
come and go."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.rows import Row
from bench.site import ROOT
from snakemake_executor_plugin_schlouder.localcloud import (
    LocalCloud,
    LocalCloudError,
    Options,
    check_machine,
)

HERE = Path("build/faults-load").resolve()
JOBS = 2000
LONGEST = 1800.0
SNAKEFILE = f"""
rule all:
    input: expand("out/{{number}}", number=range({JOBS}))
rule short:
    output: "out/{{number}}"
    resources: mem_mb=500, schlouder_walltime="1s"
    shell: "echo {{wildcards.number}} > {{output}}"
"""
NAMES = (
    f"load: {JOBS} real jobs, complete",
    "load: VMs and nodes left",
    "load: CPU of a round, last quarter / first, mean",
    "load: memory of Snakemake, growth a job",
)
GOALS = (f"{JOBS}", "0", "<= 2", "<= 20 KiB")
ROUND_GOAL, MEMORY_GOAL = 2.0, 20.0


@dataclass(frozen=True)
class Round:
    """One line of `watched.py`."""

    took: float
    used: float
    resident: int
    ended: int


def rows() -> list[Row]:
    try:
        check_machine()
    except LocalCloudError as error:
        return [Row(name, str(error), goal, None) for name, goal in zip(NAMES, GOALS, strict=True)]
    directory = HERE
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "Snakefile").write_text(SNAKEFILE)
    options = Options(name=f"load-{os.getpid()}", boot_seconds=(0, 0), share=[directory, ROOT])
    with LocalCloud.up(options, attached=True) as cloud:
        begun = time.monotonic()
        code = _run(directory, {**os.environ, **cloud.environment()})
        seconds = time.monotonic() - begun
        left = [entry.instance_id for entry in cloud.meter() if entry.ended is None]
    rounds = [_round(line) for line in (directory / "rounds").read_text().splitlines()]
    values = [
        _complete(directory, code, seconds),
        (f"{len(left)} {' '.join(left)}", not left),
        _growth_of_rounds(rounds),
        _growth_of_memory(rounds),
    ]
    return [Row(n, v, g, ok) for n, g, (v, ok) in zip(NAMES, GOALS, values, strict=True)]


def _run(directory: Path, environment: dict[str, str]) -> int:
    command = [
        *(sys.executable, "-m", "bench.faults.watched", str(directory / "rounds")),
        *("--snakefile", str(directory / "Snakefile"), "--directory", str(directory)),
        *("--executor", "schlouder", "--jobs", str(JOBS), "--quiet", "rules"),
        *("--schlouder-bundle", "on", "--schlouder-instance-types", "m5.large"),
        *("--schlouder-max-vms", "4", "--schlouder-strategy", "fastest"),
    ]
    state = {"XDG_STATE_HOME": str(directory / "state")}
    with (directory / "snakemake.log").open("w") as log:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**environment, **state},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=LONGEST,
            check=False,
        )
    return done.returncode


def _round(line: str) -> Round:
    took, used, resident, ended = line.split()
    return Round(float(took), float(used), int(resident), int(ended))


def _complete(directory: Path, code: int, seconds: float) -> tuple[str, bool]:
    made = sum(
        (directory / "out" / str(number)).exists()
        and (directory / "out" / str(number)).read_text() == f"{number}\n"
        for number in range(JOBS)
    )
    return f"{made} in {seconds:.0f} s, exit code {code}", made == JOBS and code == 0


def _quarter(rounds: Sequence[Round], number: int) -> list[Round]:
    return [r for r in rounds if number * JOBS / 4 < r.ended <= (number + 1) * JOBS / 4]


def _growth_of_rounds(rounds: Sequence[Round]) -> tuple[str, bool]:
    """Mean CPU: what is waited for, EC2, Slurm and the disk, is not the broker's."""
    first, last = _quarter(rounds, 0), _quarter(rounds, 3)
    before, after = (1000 * statistics.fmean(r.used for r in part) for part in (first, last))
    longest = max(r.took for r in rounds)
    value = f"{after / before:.2f} ({after:.1f} ms / {before:.1f} ms; the longest {longest:.2f} s)"
    return value, after / before <= ROUND_GOAL


def _growth_of_memory(rounds: Sequence[Round]) -> tuple[str, bool]:
    """From the first quarter on, when everything has been loaded."""
    first = _quarter(rounds, 0)[-1]
    last = rounds[-1]
    each = (last.resident - first.resident) / max(1, last.ended - first.ended)
    value = f"{each:.1f} KiB ({first.resident / 1024:.0f} MiB to {last.resident / 1024:.0f} MiB)"
    return value, each <= MEMORY_GOAL
