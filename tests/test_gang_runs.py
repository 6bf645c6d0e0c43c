"""MPI jobs over several VMs on real Slurm: their ranks, a VM lost under them, what is refused."""

from __future__ import annotations

import re

import pytest
from workflows import Site, wait_for

pytestmark = pytest.mark.integration

MPI = """
rule all:
    input: "out/mpi", expand("out/{i}", i=range(3))
rule mpi:
    output: "out/mpi"
    resources: mpi="srun", nodes=2, tasks=4, mem_mb=100, runtime=5
    shell: "{resources.mpi} -n {resources.tasks} sh -c 'echo $SLURM_PROCID $(hostname)' > {output}"
rule one:
    output: "out/{i}"
    shell: "hostname > {output}"
"""

PATIENT = """
rule mpi:
    output: "out"
    resources: mpi="srun", nodes=2, tasks_per_node=2
    shell:
        "srun hostname > seen.$SLURM_JOB_ID; "
        "[ -e go ] || {{ touch begun; srun sleep 1000; }}; "
        "mv seen.$SLURM_JOB_ID {output}"
"""

ATTENTIVE = """
rule mpi:
    output: "out"
    resources: mpi="srun", nodes=2, tasks=2
    shell:
        "srun sh -c 'echo $(hostname) $(hostname -I)' > seen.$SLURM_JOB_ID; "
        "grep -v $(hostname) seen.$SLURM_JOB_ID > other.$SLURM_JOB_ID; "
        "read other address < other.$SLURM_JOB_ID; "
        "[ -e begun ] || {{ mv other.$SLURM_JOB_ID begun; "
        "while timeout 1 bash -c ': <> /dev/tcp/'$address'/6818'; do sleep 0.1; done; exit 1; }}; "
        "mv seen.$SLURM_JOB_ID {output}"
"""

GROUP = """
rule all:
    input: "b"
rule mpi:
    output: "a"
    group: "together"
    resources: mpi="srun", nodes=2, tasks=2
    shell: "srun hostname > {output}"
rule after:
    input: "a"
    output: "b"
    group: "together"
    shell: "cp {input} {output}"
"""


@pytest.mark.parametrize("api", ["cli", "auto"])
def test_an_mpi_job_runs_its_ranks_on_two_vms_beside_other_jobs(site: Site, api: str) -> None:
    site.write(MPI)
    done = site.run("--schlouder-slurm-api", api)
    assert done.returncode == 0, done.stdout
    lines = (site.directory / "out" / "mpi").read_text().splitlines()
    ranks, hosts = zip(*(line.split() for line in sorted(lines)), strict=True)
    assert ranks == ("0", "1", "2", "3")
    assert sorted(hosts.count(host) for host in set(hosts)) == [2, 2]
    assert not {(site.directory / "out" / str(i)).read_text().strip() for i in range(3)} & set(
        hosts
    )
    told = re.search(
        r"(schlouder-\w+-\d+) \([^)]*\)[^[]*\[[^]]*companion of ([\w-]+)",
        " ".join(done.stdout.split()),
    )
    assert told is not None and set(told.groups()) == set(hosts), done.stdout
    assert len(re.findall(r"complete +mpi", done.stdout)) == 2, "shown on both VMs"


@pytest.mark.thorough
@pytest.mark.parametrize("killed", ["leader", "companion"])
def test_an_mpi_job_that_loses_a_vm_runs_again_on_two_others(site: Site, killed: str) -> None:
    site.write(PATIENT)
    process = site.start()
    try:
        wait_for((site.directory / "begun").exists, lambda: "the job has not begun")
        (seen,) = site.directory.glob("seen.*")
        first = sorted(set(seen.read_text().split()))
        (site.directory / "go").touch()
        lost = first[killed == "companion"]
        site.ec2().terminate_instances(InstanceIds=[site.instance_of(lost)])
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, output
    second = (site.directory / "out").read_text().split()
    assert sorted(second.count(host) for host in set(second)) == [2, 2]
    assert not set(first) & set(second)
    (other,) = set(first) - {lost}
    assert re.search(rf"VM \S+ \({lost}\) is given up: ", output), output
    assert re.search(rf"VM \S+ \({other}\) is given up: its gang lost {lost}: ", output), output


@pytest.mark.thorough
def test_ranks_that_fail_because_a_vm_was_lost_are_run_again(site: Site) -> None:
    """They notice it before Slurm does, and before the next look at EC2."""
    site.write(ATTENTIVE)
    process = site.start()
    try:
        wait_for((site.directory / "begun").exists, lambda: "the job has not begun")
        other = (site.directory / "begun").read_text().split()[0]
        site.ec2().terminate_instances(InstanceIds=[site.instance_of(other)])
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert other not in (site.directory / "out").read_text()
    assert f"its gang lost {other}: " in output


def test_a_group_with_a_job_over_several_vms_is_refused(site: Site) -> None:
    site.write(GROUP)
    before = len(site.instances())
    done = site.run()
    assert done.returncode == 1
    assert "nodes: 2 is not allowed; a job over several VMs cannot be in a group" in done.stdout
    assert "Traceback" not in done.stdout
    assert len(site.instances()) == before
