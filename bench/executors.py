"""The executors that are compared, each with the flags a careful user would give.

cluster-generic learns of a job's end from the marker files of its own job script, the fastest and
cheapest way it has: a status command would cost a start of squeue per job and look. The slurm plugin
asks squeue, because sacct, its default, is without accounting and lets it wait for ever. Both submit
to nodes that are up; local cores run the commands without Slurm and without a Snakemake for each.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

from bench.site import PARTITION, ROOT, SLOTS, VMS
from snakemake_executor_plugin_schlouder.model import SchlouderError
from snakemake_executor_plugin_schlouder.slurm import Cluster
from snakemake_executor_plugin_schlouder.slurm.cli import SlurmCommands
from snakemake_executor_plugin_schlouder.slurm.rpc import choose

SLURM_PLUGIN_PYTHON = ROOT / "build" / "slurm-plugin" / "bin" / "python"

SUBMIT = (
    f"sbatch --parsable --partition={PARTITION} --output=/dev/null "
    "--cpus-per-task={threads} --mem={resources.mem_mb}"
)


@dataclass(frozen=True)
class Executor:
    """A Snakemake (the interpreter it is installed for) with its options; `missing` says why it cannot
    run here."""

    name: str
    python: str
    options: tuple[str, ...]
    missing: str = ""


SLURM_PLUGIN = Executor(
    "slurm plugin",
    str(SLURM_PLUGIN_PYTHON),
    (
        *("--executor", "slurm", "--jobs", "1000", "--slurm-status-command", "squeue"),
        *("--default-resources", f"slurm_partition={PARTITION}"),
    ),
    ""
    if SLURM_PLUGIN_PYTHON.exists()
    else "the slurm plugin is not installed: tools/setup-peer build/slurm-plugin .venv",
)
CLUSTER_GENERIC = Executor(
    "cluster-generic",
    sys.executable,
    (
        *("--executor", "cluster-generic", "--jobs", "1000"),
        *("--cluster-generic-submit-cmd", SUBMIT, "--seconds-between-status-checks", "1"),
    ),
)
LOCAL = Executor("local cores", sys.executable, ("--cores", str(SLOTS)))


def schlouder(name: str, *options: str, missing: str = "") -> Executor:
    common = ("--executor", "schlouder", "--jobs", "1000", "--schlouder-max-vms", str(VMS))
    return Executor(name, sys.executable, (*common, *options), missing)


def pyslurm_adapter(commands: SlurmCommands) -> Cluster:
    """The adapter over pyslurm; SchlouderError says why there is none. Needs a running slurmctld."""
    return choose("pyslurm", commands, commands.check(), logging.getLogger("bench"))


CLI_OPTIONS = ("--schlouder-slurm-api", "cli")
OURS = schlouder("schlouder", *CLI_OPTIONS, "--schlouder-keep-logs")
"""Keeps the exit-code files, whose times tell when a job began and ended."""

BUNDLED = schlouder("schlouder, bundled", *CLI_OPTIONS, "--schlouder-bundle", "on")


def with_pyslurm() -> Executor:
    missing = ""
    try:
        pyslurm_adapter(SlurmCommands(PARTITION))
    except SchlouderError as error:
        missing = str(error)
    return schlouder("schlouder, pyslurm", "--schlouder-slurm-api", "pyslurm", missing=missing)
