"""Slurm that forgets, is away, or does not answer while jobs run and end: none is lost, none runs or is told
twice, and nobody waits for it longer than need be."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from workflows import Site, slurmctld, stopped, wait_for

pytestmark = pytest.mark.integration

THREE_JOBS = """
rule all:
    input: expand("out/{i}", i=range(3))
rule one:
    output: "out/{i}"
    resources: mem_mb=100
    shell: "echo >>started-{wildcards.i}; while [ ! -e go-{wildcards.i} ]; do sleep 0.1; done; touch {output}"
"""

THREE_ENDS = """
rule all:
    input: expand("out/{i}", i=["good", "bad", "killed"])
rule one:
    output: "out/{i}"
    resources: mem_mb=100
    shell:
        "echo >>started-{wildcards.i}; while [ ! -e go-{wildcards.i} ]; do sleep 0.1; done; "
        "[ {wildcards.i} != bad ] && touch {output}"
"""

REMOTE_AND_LOCAL = """
localrules: first, second
rule all:
    input: expand("out/{i}", i=range(3)), "second"
rule remote:
    output: "out/{i}"
    shell: "echo >>started-{wildcards.i}; sleep 600"
rule first:
    output: "first"
    shell: "while [ ! -e go ]; do sleep 0.1; done; touch {output}"
rule second:
    input: "first"
    output: "second"
    shell: "touch {output}"
"""


def starts(site: Site) -> dict[str, int]:
    """How often each job has begun."""
    begun = site.directory.glob("started-*")
    return {path.name.removeprefix("started-"): path.read_text().count("\n") for path in begun}


def wait_for_starts(site: Site, count: int) -> None:
    wait_for(lambda: len(starts(site)) == count, lambda: f"only {starts(site)} have begun")


def answers(site: Site) -> bool:
    """Whether slurmctld does."""
    ping = ["scontrol", "ping"]
    return subprocess.run(ping, env=site.environment, capture_output=True).returncode == 0


def test_a_restart_of_slurmctld_and_a_silent_one_lose_and_repeat_nothing(site: Site) -> None:
    site.write(THREE_JOBS)
    with site.started("--schlouder-max-vms", "2") as process:
        wait_for_starts(site, 3)
        before = slurmctld(site.cloud)
        site.slurm("scontrol", "shutdown", "slurmctld")
        (site.directory / "go-0").touch()
        wait_for(lambda: not Path(f"/proc/{before}").exists(), lambda: "slurmctld did not end")
        (site.directory / "go-1").touch()
        wait_for(lambda: answers(site), lambda: "slurmctld did not come back")
        wait_for(lambda: len(site.jobs()) < 3, lambda: f"{site.jobs()}")
        silent = slurmctld(site.cloud)
        assert silent != before
        with stopped(silent):
            (site.directory / "go-2").touch()
            time.sleep(15)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "3 of 3 jobs complete" in output
    assert starts(site) == {"0": 1, "1": 1, "2": 1}


def test_what_slurm_forgot_before_anybody_looked_counts_as_it_ended(site: Site) -> None:
    """Snakemake is stopped, as a laptop that is closed, until slurmctld has purged its jobs: MinJobAge is
    over. There is no accounting, and sacct fails; the job whose script was killed left no witness."""
    site.write(THREE_ENDS)
    sacct = site.directory / "bin/sacct"
    sacct.parent.mkdir()
    sacct.write_text(f"#!/bin/sh\ntouch {site.directory}/sacct-was-asked; exit 1\n")
    sacct.chmod(0o755)
    path = f"{sacct.parent}:{site.environment['PATH']}"
    options = ("--keep-going", "--schlouder-max-vms", "2")
    with site.configured(MinJobAge="2"), site.started(*options, PATH=path) as process:
        wait_for_starts(site, 3)
        with stopped(-process.pid):
            (site.directory / "go-good").touch()
            (site.directory / "go-bad").touch()
            wait_for(lambda: len(site.jobs()) == 1, lambda: f"{site.jobs()}")
            site.slurm("scancel", *site.jobs())
            (site.directory / "go-killed").touch()
            known = ("squeue", "--states=all", "--noheader")
            wait_for(lambda: not site.slurm(*known), lambda: site.slurm(*known))
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert output.count("Job one i=bad on VM") == 1
    assert output.count("ended with exit code 1.") == 1
    assert "2 of 3 jobs complete" in output
    assert starts(site) == {"good": 1, "bad": 1, "killed": 2}
    assert not (site.directory / "sacct-was-asked").exists()


@pytest.mark.thorough
def test_half_a_minute_without_slurm_and_ec2_loses_and_repeats_nothing(site: Site) -> None:
    """slurmctld has ended, and what would start it again is stopped, the EC2 endpoint with it."""
    site.write(THREE_JOBS)
    with site.started("--schlouder-max-vms", "2") as process:
        wait_for_starts(site, 3)
        with stopped(cloud_daemon(site)):
            site.slurm("scontrol", "shutdown", "slurmctld")
            (site.directory / "go-0").touch()
            wait_for(lambda: (site.directory / "out/0").exists(), lambda: "0 did not end")
            time.sleep(25)
            assert not answers(site)
            assert process.poll() is None
            (site.directory / "go-1").touch()
        (site.directory / "go-2").touch()
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "3 of 3 jobs complete" in output
    assert starts(site) == {"0": 1, "1": 1, "2": 1}


def test_a_silent_slurmctld_holds_up_neither_snakemake_nor_ctrl_c(site: Site) -> None:
    """Local jobs follow each other; Ctrl-C ends the VMs and says how to remove their nodes later."""
    site.write(REMOTE_AND_LOCAL)
    with site.started("--schlouder-strategy", "one-vm-per-job") as process:
        wait_for_starts(site, 3)
        with stopped(slurmctld(site.cloud)):
            time.sleep(3)
            (site.directory / "go").touch()
            wait_for(lambda: (site.directory / "second").exists(), lambda: "it waits", seconds=15)
            begun = time.monotonic()
            os.killpg(process.pid, signal.SIGINT)
            output, _ = process.communicate(timeout=60)
            assert time.monotonic() - begun < 30
            assert site.alive() == []
    assert "were not started" not in output
    (advice,) = (line for line in output.splitlines() if "Slurm still has nodes" in line)
    for command in re.findall("`(.+?)`", advice):
        wait_for(lambda: answers(site), lambda: "slurmctld does not come back")
        site.slurm(*shlex.split(command))


def cloud_daemon(site: Site) -> int:
    """The process id of what runs the embedded cloud."""
    return int(json.loads((site.cloud.folder / "state.json").read_text())["host_pid"])
