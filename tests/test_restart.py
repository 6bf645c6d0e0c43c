"""Snakemake is killed with SIGKILL and started again, on real Slurm and the embedded cloud."""

from __future__ import annotations

import base64
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from workflows import Site, wait_for

from snakemake_executor_plugin_schlouder.lease import Lease
from snakemake_executor_plugin_schlouder.slurm.cli import parse_records

pytestmark = pytest.mark.integration

JOBS = 6
WORKFLOW = """
rule all:
    input: expand("out/{i}.txt", i=range(6))
rule one:
    output: "out/{i}.txt"
    params: pause=PAUSE
    resources: mem_mb=100
    shell:
        "echo $SLURM_JOB_ID >>runs.{wildcards.i}; echo begun >{output}; sleep {params.pause}; "
        "echo done >>{output}"
"""


GROUP = """
rule second:
    input: "first.txt"
    output: "second.txt"
    group: "both"
    shell: "echo begin >>trace; sleep 20; echo end >>trace; touch {output}"
rule first:
    output: "first.txt"
    group: "both"
    shell: "echo once >>runs.first; touch {output}"
"""


def workflow(pause: int) -> str:
    """Six jobs that write down every run of theirs, and take so many seconds."""
    return WORKFLOW.replace("PAUSE", str(pause))


def kill_when(site: Site, condition: Callable[[], bool], *options: str) -> None:
    """Starts the workflow, and kills Snakemake at this moment."""
    process = site.start("--schlouder-max-vms", "2", *options)
    wait_for(condition, lambda: f"{site.directory}: it never came to that")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def restart(site: Site, *options: str) -> str:
    """As Snakemake itself says: unlock, then run again what is incomplete."""
    unlocked = site.run("--unlock")
    assert unlocked.returncode == 0, unlocked.stdout
    done = site.run("--schlouder-max-vms", "2", "--rerun-incomplete", *options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def files(site: Site, pattern: str) -> list[Path]:
    return sorted(site.directory.glob(pattern))


def runs(site: Site) -> list[int]:
    """How often each job was begun."""
    return [len(path.read_text().split()) for path in files(site, "runs.*")]


def leases(site: Site) -> dict[str, Lease]:
    found = parse_records(site.slurm("scontrol", "--oneliner", "show", "node"))
    return {node: record.lease for node, record in found.items() if record.lease}


def user_data(site: Site, instance_id: str) -> str:
    asked = {"InstanceId": instance_id, "Attribute": "userData"}
    answer = site.ec2().describe_instance_attribute(**asked)
    return base64.b64decode(answer["UserData"]["Value"]).decode()


@pytest.mark.parametrize("moment", ["a VM boots", "a job is done"])
def test_killed_and_started_again_every_job_runs_once_and_no_vm_is_started_twice(
    site: Site, moment: str
) -> None:
    site.write(workflow(2))
    moments: dict[str, Callable[[], bool]] = {
        "a VM boots": lambda: bool(site.alive()),
        "a job is done": lambda: any("done" in f.read_text() for f in files(site, "out/*")),
    }
    before = len(site.instances())
    kill_when(site, moments[moment])
    said = restart(site)
    assert "was killed; this one goes on" in said
    assert runs(site) == [1] * JOBS
    assert all(file.read_text() == "begun\ndone\n" for file in files(site, "out/*"))
    assert len(site.instances()) - before <= 2, "those of the killed run are used"
    assert len(re.findall(r"complete +one i=\d", said)) == JOBS, "one table for all of it"


def test_what_ended_in_the_meantime_is_not_run_again(site: Site) -> None:
    site.write(workflow(2))
    settings = ("--schlouder-lease", "2h", "--schlouder-boot-timeout", "700")
    kill_when(site, lambda: bool(files(site, "runs.*") and leases(site)), *settings)
    assert {lease.seconds for lease in leases(site).values()} == {7200}
    assert all("SCHLOUDER_FIRST_LEASE=7900\n" in user_data(site, one) for one in site.alive())
    wait_for(lambda: not site.slurm("squeue", "--noheader"), lambda: "jobs still run")
    made = len(files(site, "runs.*"))
    assert made > 0
    restart(site)
    assert runs(site) == [1] * JOBS


def test_bundled_jobs_go_on(site: Site) -> None:
    site.write(workflow(2).replace("mem_mb=100", 'mem_mb=100, schlouder_walltime="3s"'))
    bundle = ("--schlouder-bundle", "on")
    kill_when(site, lambda: len(files(site, "runs.*")) > 1, *bundle)
    restart(site, *bundle)
    assert runs(site) == [1] * JOBS


def test_an_attempt_with_other_parameters_is_ended_before_the_new_one_begins(site: Site) -> None:
    site.write(workflow(300))
    kill_when(site, lambda: len(files(site, "runs.*")) > 2)
    begun = len(files(site, "runs.*"))
    site.write(workflow(0))
    started = time.monotonic()
    restart(site)
    assert time.monotonic() - started < 60, "nobody waits for what is not wanted any more"
    twice = runs(site).count(2)
    assert begun <= twice, "what Slurm had may still begin after the count"
    assert sorted(runs(site)) == [1] * (JOBS - twice) + [2] * twice
    assert all(file.read_text() == "begun\ndone\n" for file in files(site, "out/*"))


def test_what_is_left_of_a_group_is_not_begun_beside_the_whole(site: Site) -> None:
    """The rest of it is a group of its own now, which makes the same file."""
    site.write(GROUP)
    kill_when(site, (site.directory / "trace").exists)
    said = restart(site)
    assert "is ended, and done anew" in said
    assert (site.directory / "trace").read_text().split() == ["begin", "begin", "end"]
    assert runs(site) == [1], "what was done stays done"


def test_a_run_that_goes_on_can_be_ended_with_ctrl_c(site: Site) -> None:
    """The fixture sees that nothing is left, neither of it nor of the killed one."""
    site.write(workflow(300))
    kill_when(site, lambda: bool(files(site, "runs.*")))
    assert site.alive()
    assert site.run("--unlock").returncode == 0
    process = site.start("--schlouder-max-vms", "2", "--rerun-incomplete")
    wait_for(lambda: bool(site.slurm("squeue", "--noheader", "--states=running")), lambda: "no job")
    time.sleep(5)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert site.alive() == []
