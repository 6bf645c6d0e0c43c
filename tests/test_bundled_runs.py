"""Bundles on real Slurm: one start of Snakemake for many jobs, each with its own end, log and times."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import pytest
from workflows import Site

from snakemake_executor_plugin_schlouder.journal import journal_path

pytestmark = pytest.mark.integration

SECOND = 1.0
"""Slurm's own times are whole seconds."""

SHORT_JOBS = """
rule all:
    input: expand("out/{i}.txt", i=range(12))
rule one:
    output: "out/{i}.txt"
    resources: schlouder_walltime="3s"
    shell: "echo it is {wildcards.i}; echo $SLURM_JOB_ID >{output}"
"""

BAD_JOBS = """
rule all:
    input: expand("out/{i}.txt", i=["good", "it's $(me)", "fails", "empty", "slow", "last"])
rule one:
    output: "out/{i}.txt"
    resources:
        schlouder_walltime="3s", runtime=lambda wildcards: 1 if wildcards.i == "slow" else 10
    run:
        print("this is", wildcards.i)
        if wildcards.i == "fails":
            raise ValueError("went wrong")
        if wildcards.i != "empty":
            open(output[0], "w").write(wildcards.i)
"""


def test_short_jobs_share_slurm_jobs_and_are_accounted_for_one_by_one(site: Site) -> None:
    site.write(SHORT_JOBS)
    done = site.run("--schlouder-bundle", "on", "--schlouder-max-vms", "1", "--schlouder-keep-logs")
    assert done.returncode == 0, done.stdout
    written = [path.read_text() for path in (site.directory / "out").glob("*.txt")]
    assert len(written) == 12
    assert len(set(written)) <= 6, "several in one Slurm job"
    logs = list(site.directory.glob(".snakemake/schlouder/*/*.log"))
    assert sum("it is 7\n" in log.read_text() for log in logs) == 1
    forked = [log for log in logs if "Command: snakemake " in log.read_text()]
    assert len(forked) >= 6, "by the Snakemake that is loaded already"
    assert len(re.findall(r"complete +one i=\d+", done.stdout)) == 12
    for spans in _spans(site).values():
        for moment, _ in spans:
            side_by_side = sum(begun <= moment < ended - SECOND for begun, ended in spans)
            assert side_by_side <= 2, "as many as the VM has CPUs"


def test_one_that_fails_fails_alone_whatever_its_name(site: Site) -> None:
    site.write(BAD_JOBS)
    done = site.run("--schlouder-bundle", "on", "--schlouder-max-vms", "1", "--keep-going")
    assert done.returncode != 0
    made = {path.stem for path in (site.directory / "out").glob("*.txt")}
    assert made == {"good", "it's $(me)", "slow", "last"}
    assert "went wrong" in done.stdout
    assert "ended with exit code 1" in done.stdout


def test_a_rule_may_ask_for_it_alone(site: Site) -> None:
    site.write(SHORT_JOBS.replace('walltime="3s"', 'walltime="3s", schlouder_bundle=1'))
    done = site.run("--schlouder-max-vms", "1")
    assert done.returncode == 0, done.stdout
    written = {path.read_text() for path in (site.directory / "out").glob("*.txt")}
    assert len(written) <= 6


def _spans(site: Site) -> dict[str, list[tuple[float, float]]]:
    """VM -> begin and end of each of its tasks, from the journal."""
    (path,) = Path(site.environment["XDG_STATE_HOME"]).rglob(journal_path(site.directory).name)
    with sqlite3.connect(path) as books:
        rows = books.execute("SELECT vm, started, ended FROM tasks").fetchall()
    found: dict[str, list[tuple[float, float]]] = {}
    for vm, started, ended in rows:
        found.setdefault(vm, []).append((started, ended))
    return found
