"""Runs of workflows through executors, in turns: how long, at what cost of CPU and of slurmctld."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench import requests
from bench.executors import Executor
from bench.site import Site

LONGEST = 1200.0
"""Seconds after which a run is given up."""

_LAST_GRACE = 60.0
_LAST_LINES = 5


@dataclass(frozen=True)
class Workload:
    name: str
    jobs: int
    snakefile: str


@dataclass(frozen=True)
class Run:
    """`seconds`: the whole command, from its start to its exit. `main`, `vms`, `controller`: CPU seconds
    of Snakemake and all it started here, of everything in VMs, of slurmctld and its munged.
    `requests` that slurmctld answered, by type. `noticed`: seconds from the last job's exit-code file
    until Snakemake had it (ours only)."""

    seconds: float
    main: float
    vms: float
    controller: float
    requests: Mapping[str, int]
    noticed: float | None

    @property
    def cpu(self) -> float:
        return self.main + self.vms


class RunFailed(RuntimeError):
    """The message is what Snakemake said last."""


@dataclass
class Results:
    """Runs of one workload by executor, and why there is none."""

    runs: dict[Executor, list[Run]] = field(default_factory=dict)
    missing: dict[Executor, str] = field(default_factory=dict)


def in_turns(site: Site, workload: Workload, times: Mapping[Executor, int]) -> Results:
    """Runs every executor as often as `times` says, one after the other, and again from the first. One
    that fails is not tried again."""
    results = Results()
    for turn in range(max(times.values())):
        for executor in times:
            if turn < times[executor] and executor not in results.missing:
                _take_turn(site, workload, executor, turn, results)
    return results


def _take_turn(
    site: Site, workload: Workload, executor: Executor, turn: int, results: Results
) -> None:
    if executor.missing:
        results.missing[executor] = executor.missing
        return
    place = re.sub(r"\W+", "-", f"{workload.name}-{executor.name}-{turn}")
    try:
        run = one_run(site, workload, executor, site.scratch / place)
    except RunFailed as error:
        results.missing[executor] = str(error)
        subprocess.run(["scancel", "--user=root"], check=False, capture_output=True)
        site.settle()
    else:
        results.runs.setdefault(executor, []).append(run)


def one_run(site: Site, workload: Workload, executor: Executor, directory: Path) -> Run:
    """One run in a new directory, without any history of earlier ones. Raises RunFailed."""
    directory.mkdir()
    (directory / "Snakefile").write_text(workload.snakefile)
    requests.reset()
    before = site.usage()
    command = _Command(
        [executor.python, "-m", "snakemake", *executor.options],
        directory,
        {**site.environment, "XDG_STATE_HOME": str(directory / "state")},
    )
    site.settle()
    used = site.usage() - before
    return Run(
        command.seconds,
        command.cpu,
        used.vms,
        used.controller,
        requests.counted(),
        _noticed(directory, command.last_finish),
    )


def _noticed(directory: Path, finish: float) -> float | None:
    written = [path.stat().st_mtime for path in directory.glob(".snakemake/schlouder/*/*.exit")]
    return finish - max(written) if written else None


class _Command:
    """A Snakemake that was run to its end. `last_finish`: when it said so of its last job."""

    def __init__(
        self, arguments: list[str], directory: Path, environment: Mapping[str, str]
    ) -> None:
        self.last_finish = 0.0
        self._ended = threading.Event()
        begun = time.monotonic()
        self._process = subprocess.Popen(
            arguments,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        threading.Thread(target=self._watch, daemon=True).start()
        output = self._read()
        _, status, used = os.wait4(self._process.pid, 0)
        self._ended.set()
        self.seconds = time.monotonic() - begun
        self.cpu = used.ru_utime + used.ru_stime
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self.seconds > LONGEST:
            raise RunFailed(f"given up after {LONGEST:.0f} s")
        if self._process.returncode != 0:
            raise RunFailed("".join(output[-_LAST_LINES:]).strip())

    def _read(self) -> list[str]:
        assert self._process.stdout is not None
        lines = []
        try:
            with self._process.stdout as output:
                for line in output:
                    lines.append(line)
                    if line.startswith("Finished jobid"):
                        self.last_finish = time.time()
        except BaseException:
            os.killpg(self._process.pid, signal.SIGKILL)
            raise
        return lines

    def _watch(self) -> None:
        """Ends a run that takes too long, first as Ctrl-C does."""
        for patience, number in ((LONGEST, signal.SIGINT), (_LAST_GRACE, signal.SIGKILL)):
            if self._ended.wait(patience):
                return
            os.killpg(self._process.pid, number)
