"""From the moment a VM's node can take jobs until its first job runs.

Slurm's own times are whole seconds. Here a thread looks at the nodes many times a second, and a node
counts as up from the last look that did not show it so: the figure errs upwards, by one look. A job
runs from the mark its script leaves before anything else (file times of one kernel, a few ms).
"""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from pathlib import Path

from bench.executors import OURS
from bench.rows import Row
from bench.runs import RunFailed, Workload, one_run
from bench.site import PARTITION, Site
from snakemake_executor_plugin_schlouder.journal import Journal
from snakemake_executor_plugin_schlouder.slurm.cli import parse_nodes

NAME = "node up until its first job runs, median"
GOAL = 1.0
ROUNDS = 4
LOOK = 0.05
"""Seconds between two looks."""

SINFO = ("sinfo", "--Node", f"--partition={PARTITION}", "--noheader", "--format=%N|%T|%E")

WORKLOAD = Workload(
    "a job on each VM",
    4,
    """
rule all:
    input: expand("{number}", number=range(4))
rule one:
    output: "{number}"
    threads: 2
    resources: mem_mb=1000, schlouder_strategy="one-vm-per-job"
    shell: "hostname >{output}"
""",
)


def rows(site: Site) -> list[Row]:
    goal = f"<= {GOAL:.0f} s"
    seconds: list[float] = []
    try:
        for number in range(ROUNDS):
            seconds += _delays(site, site.scratch / f"start-{number}")
    except RunFailed as error:
        return [Row(NAME, str(error), goal, False)]
    middle = statistics.median(seconds)
    text = f"{middle:.2f} s ({min(seconds):.2f}-{max(seconds):.2f}, {len(seconds)} nodes)"
    return [Row(NAME, text, goal, middle <= GOAL)]


def _delays(site: Site, directory: Path) -> list[float]:
    """One for each VM of one run, on which only one job ran."""
    with _Watch() as watch:
        one_run(site, WORKLOAD, OURS, directory)
    (path,) = directory.glob("state/schlouder/*/journal.sqlite")
    journal = Journal.reading(path)
    (run,) = journal.runs()
    files = directory / ".snakemake" / "schlouder" / run.run
    return [
        (files / f"{task.key.rpartition('-')[2]}-{task.rule}.1.exit.begun").stat().st_mtime
        - watch.up[task.vm]
        for task in journal.tasks(run.run)
        if task.vm is not None
    ]


class _Watch:
    """Looks at the nodes until the block ends; `up`: since when each could take jobs."""

    def __enter__(self) -> _Watch:
        self.up: dict[str, float] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        before = time.time()
        while not self._done.wait(LOOK):
            begun = time.time()
            for node in parse_nodes(subprocess.check_output(SINFO, text=True)).values():
                if node.accepts_jobs:
                    self.up.setdefault(node.name, before)
            before = begun
