"""What was measured, executor by executor, for the eye; the ratios are rows of their own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.table import Table

from bench.runs import Results, Run, Workload

HEADINGS = (
    *("workload", "executor", "runs", "seconds (from-to)", "CPU s a job", "of it in VMs"),
    *("slurmctld CPU ms a job", "slurmctld RPCs a job"),
)


def show(measured: Mapping[Workload, Results]) -> None:
    """Medians of the runs. CPU: Snakemake with all it started, and everything in the VMs."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for workload, results in measured.items():
        for executor, runs in results.runs.items():
            table.add_row(workload.name, executor.name, str(len(runs)), *_cells(workload, runs))
    Console(width=120).print(table)


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
        f"{median(lambda run: run.requests) / jobs:.2f}",
    ]
