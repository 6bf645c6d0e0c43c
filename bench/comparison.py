"""The same three workflows through every executor, side by side, and what must come out of it.

The times are those of the whole command. Ours rents its VMs first (boot delay 0) and gives them back;
the peers' nodes are up, and what Slurm still does after their command's end counts as CPU only.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from bench.executors import (
    BUNDLED,
    CLUSTER_GENERIC,
    LOCAL,
    OURS,
    SLURM_PLUGIN,
    Executor,
    with_pyslurm,
)
from bench.rows import Row
from bench.runs import Results, Run, Workload, in_turns
from bench.site import Site

ONE = Workload(
    "one trivial job",
    1,
    """
rule all:
    output: "1"
    resources: mem_mb=1000
    shell: "touch {output}"
""",
)

CHAIN = Workload(
    "chain of 10 trivial jobs",
    10,
    """
rule all:
    input: "10"
rule first:
    output: "1"
    resources: mem_mb=1000
    shell: "touch {output}"
rule next:
    input: lambda wildcards: str(int(wildcards.number) - 1)
    output: "{number,[2-9]|10}"
    resources: mem_mb=1000
    shell: "touch {output}"
""",
)

MANY = Workload(
    "200 one-second jobs on 8 slots",
    200,
    """
rule all:
    input: expand("out/{number}", number=range(200))
rule short:
    output: "out/{number}"
    resources: mem_mb=1000, schlouder_walltime="1s"
    shell: "sleep 1; touch {output}"
""",
)

TURNS = {ONE: 3, CHAIN: 2, MANY: 1}

NOTICE_GOAL = 2.0
"""Seconds."""


@dataclass(frozen=True)
class Quantity:
    """What is compared of a run; `text` shows one value. Goals are upper bounds of the ratio, or lower
    ones where more is better."""

    name: str
    of: Callable[[Run], float]
    text: str
    more_is_better: bool = False


SECONDS = Quantity("seconds", lambda run: run.seconds, "{:.1f} s")
THROUGHPUT = Quantity("jobs/s", lambda run: MANY.jobs / run.seconds, "{:.2f}/s", True)
CPU = Quantity("CPU s a job", lambda run: run.cpu / MANY.jobs, "{:.2f} s")
REQUESTS = Quantity(
    "slurmctld RPCs a job", lambda run: sum(run.requests.values()) / MANY.jobs, "{:.2f}"
)


@dataclass(frozen=True)
class Goal:
    """A bound of the ratio of our median to a peer's."""

    workload: Workload
    ours: Executor
    peer: Executor
    quantity: Quantity
    ratio: float

    @property
    def name(self) -> str:
        return f"{self.workload.name}, {self.quantity.name}: {self.ours.name} / {self.peer.name}"


GOALS = (
    Goal(ONE, OURS, SLURM_PLUGIN, SECONDS, 0.12),
    Goal(ONE, OURS, CLUSTER_GENERIC, SECONDS, 1.3),
    Goal(CHAIN, OURS, SLURM_PLUGIN, SECONDS, 0.10),
    Goal(CHAIN, OURS, CLUSTER_GENERIC, SECONDS, 0.9),
    Goal(MANY, BUNDLED, SLURM_PLUGIN, THROUGHPUT, 4),
    Goal(MANY, BUNDLED, CLUSTER_GENERIC, THROUGHPUT, 2),
    Goal(MANY, OURS, SLURM_PLUGIN, THROUGHPUT, 1.5),
    Goal(MANY, OURS, SLURM_PLUGIN, CPU, 0.5),
    Goal(MANY, BUNDLED, SLURM_PLUGIN, CPU, 0.2),
    Goal(MANY, OURS, SLURM_PLUGIN, REQUESTS, 0.6),
    Goal(MANY, BUNDLED, SLURM_PLUGIN, REQUESTS, 0.2),
)


def measured(site: Site, workload: Workload) -> Results:
    """All executors in turns. The slurm plugin runs once: its times are those of its 40 s polls, and
    most of the bench's. 200 jobs run once where they take minutes: they are a mean of their own."""
    turns = TURNS[workload]
    return in_turns(
        site,
        workload,
        {
            OURS: turns,
            **({BUNDLED: 2} if workload is MANY else {}),
            with_pyslurm(): turns,
            CLUSTER_GENERIC: turns,
            LOCAL: 1,
            SLURM_PLUGIN: 1,
        },
    )


def rows(workload: Workload, results: Results) -> list[Row]:
    """What was to be reached with this workload."""
    compared = [_row(goal, results) for goal in GOALS if goal.workload is workload]
    return [*compared, _notice(results)] if workload is ONE else compared


def _row(goal: Goal, results: Results) -> Row:
    sign = ">=" if goal.quantity.more_is_better else "<="
    bound = f"{sign} {goal.ratio:g}"
    for executor in (goal.ours, goal.peer):
        if executor in results.missing:
            failed = executor is goal.ours and not executor.missing
            return Row(goal.name, results.missing[executor], bound, False if failed else None)
    ours, peer = (
        statistics.median(goal.quantity.of(run) for run in results.runs[executor])
        for executor in (goal.ours, goal.peer)
    )
    ratio = ours / peer
    is_reached = ratio >= goal.ratio if goal.quantity.more_is_better else ratio <= goal.ratio
    text = goal.quantity.text
    return Row(
        goal.name, f"{ratio:.3f} ({text.format(ours)} / {text.format(peer)})", bound, is_reached
    )


def _notice(results: Results) -> Row:
    name = "end of a job until Snakemake has it, worst of the runs"
    goal = f"<= {NOTICE_GOAL:.0f} s"
    noticed = [run.noticed for run in results.runs.get(OURS, []) if run.noticed is not None]
    if not noticed:
        return Row(name, "no exit-code file was found", goal, False)
    return Row(name, f"{max(noticed):.2f} s", goal, max(noticed) <= NOTICE_GOAL)
