"""What was measured, executor by executor, for the eye; the ratios are rows of their own."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.runs import Results, Run, Workload

HEADINGS = (
    *("workload", "executor", "runs", "seconds (from-to)", "CPU s a job", "of it in VMs"),
    *("slurmctld CPU ms a job", "slurmctld RPCs a job"),
)


def finish(measured: Mapping[Workload, Results], path: Path) -> None:
    """Prints the medians of the runs, and writes every run. CPU: Snakemake with all it started, and
    everything in the VMs."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for workload, results in measured.items():
        for executor, runs in results.runs.items():
            table.add_row(workload.name, executor.name, str(len(runs)), *_cells(workload, runs))
        for executor, reason in results.missing.items():
            table.add_row(workload.name, executor.name, "0", reason)
    Console(width=120).print(table)
    every = [
        {"workload": workload.name, "executor": executor.name, **asdict(run)}
        for workload, results in measured.items()
        for executor, of_executor in results.runs.items()
        for run in of_executor
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(every, indent=2) + "\n")


def _cells(workload: Workload, runs: list[Run]) -> list[str]:
    def median(of: Callable[[Run], float]) -> float:
        return statistics.median(of(run) for run in runs)

    seconds = [run.seconds for run in runs]
    jobs = workload.jobs
    return [
        f"{statistics.median(seconds):.1f} ({min(seconds):.1f}-{max(seconds):.1f})",
        f"{median(lambda run: run.cpu) / jobs:.2f}",
        f"{median(lambda run: run.vms) / jobs:.2f}",
        f"{1000 * median(lambda run: run.controller) / jobs:.0f}",
        f"{median(lambda run: sum(run.requests.values())) / jobs:.2f}",
    ]
