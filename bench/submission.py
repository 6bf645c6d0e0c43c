"""Submission alone: 1,000 jobs handed to slurmctld, to a node that is drained, so that none starts."""

from __future__ import annotations

import statistics
import subprocess
import time

from bench.executors import pyslurm_adapter
from bench.rows import Row
from bench.site import PARTITION, PEER_NODES, Site
from snakemake_executor_plugin_schlouder.model import SchlouderError
from snakemake_executor_plugin_schlouder.slurm import Cluster, JobRequest
from snakemake_executor_plugin_schlouder.slurm.cli import SlurmCommands
from snakemake_executor_plugin_schlouder.slurm.script import job_script

JOBS = 1000
ROUNDS = 3
CLI_GOAL = 100.0
"""Submissions a second."""

RATIO_GOAL = 3.0
NODE = PEER_NODES[0]
RUN = "bench-submission"


def rows(site: Site) -> list[Row]:
    commands = SlurmCommands(PARTITION)
    adapters: dict[str, Cluster] = {"cli": commands}
    missing = ""
    try:
        adapters["pyslurm"] = pyslurm_adapter(commands)
    except SchlouderError as error:
        missing = str(error)
    rates = _rates(site, commands, adapters)
    cli = rates["cli"]
    first = Row("1,000 submissions, cli", f"{cli:.0f}/s", f">= {CLI_GOAL:.0f}/s", cli >= CLI_GOAL)
    name, goal = "1,000 submissions, pyslurm / cli", f">= {RATIO_GOAL:.0f}"
    if missing:
        return [first, Row(name, missing, goal, None)]
    ratio = rates["pyslurm"] / cli
    value = f"{ratio:.2f} ({rates['pyslurm']:.0f}/s / {cli:.0f}/s)"
    return [first, Row(name, value, goal, ratio >= RATIO_GOAL)]


def _rates(site: Site, commands: SlurmCommands, adapters: dict[str, Cluster]) -> dict[str, float]:
    """Median submissions per second of each adapter, measured in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in adapters}
    commands.drain([NODE], "bench: no job is to start")
    try:
        for _ in range(ROUNDS):
            for name, adapter in adapters.items():
                seconds[name].append(_submit(site, adapter))
                commands.cancel_run(RUN)
    finally:
        subprocess.run(["scontrol", "update", f"nodename={NODE}", "state=resume"], check=True)
    return {name: JOBS / statistics.median(values) for name, values in seconds.items()}


def _submit(site: Site, adapter: Cluster) -> float:
    """Seconds for all of them; RuntimeError if slurmctld has not taken every one."""
    requests = [_request(site, number) for number in range(JOBS)]
    begun = time.monotonic()
    outcomes = adapter.submit(requests)
    seconds = time.monotonic() - begun
    refused = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    if refused or len(outcomes) < JOBS:
        raise RuntimeError(f"{JOBS - len(outcomes)} jobs not tried, refused: {refused[:3]}")
    return seconds


def _request(site: Site, number: int) -> JobRequest:
    file = f"{site.scratch}/{number}"
    return JobRequest(
        key=f"{RUN}-{number}.1",
        run=RUN,
        node=NODE,
        script=job_script(f"short number={number}", "true", f"{file}.exit"),
        cpus=1,
        memory=1000,
        limit=None,
        workdir=site.scratch,
        log=f"{file}.log",
        partition=PARTITION,
    )
