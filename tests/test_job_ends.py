"""How jobs end on real Slurm: what is done to them, what Snakemake hears of it, what stays on disk."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Mapping

import pytest
from workflows import Site, wait_for

pytestmark = pytest.mark.integration

ENDS = """
rule all:
    input: "good", "none", "long", "cancelled", "hungry", "lost"
rule good:
    output: "good"
    shell: "touch {output}"
rule none:
    output: "none"
    shell: "true"
rule long:
    output: "long"
    resources: runtime=1
    shell: "scontrol update jobid=$SLURM_JOB_ID timelimit=0; sleep 200"
rule cancelled:
    output: "cancelled"
    shell: "scancel $SLURM_JOB_ID; sleep 200"
rule hungry:
    output: "hungry"
    resources: mem_mb=300
    shell: "python3 -c 'import time; held = bytearray(b\\"x\\") * (500 << 20); time.sleep(200)'"
rule lost:
    output: "lost"
    resources: schlouder_strategy="one-vm-per-job"
    shell:
        "if [ -e tried ]; then touch {output}; exit; fi; touch tried; "
        "scontrol update nodename=$SLURMD_NODENAME state=down reason=test; sleep 200"
"""

FIVE_ON_ONE_VM = """
rule all:
    input: expand("out/{i}", i=range(5))
rule one:
    output: "out/{i}"
    resources: mem_mb=100
    shell: "echo >>started-{wildcards.i}; while [ ! -e go-{wildcards.i} ]; do sleep 0.1; done; touch {output}"
"""


def files(site: Site) -> list[str]:
    """Everything jobs left in the folders of the runs."""
    return sorted(path.name for path in (site.directory / ".snakemake/schlouder").glob("*/*"))


def test_each_end_of_a_job_is_told_with_its_cause(site: Site) -> None:
    site.write(ENDS)
    with site.configured(
        JobAcctGatherType="jobacct_gather/linux",
        JobAcctGatherFrequency="1",
        JobAcctGatherParams="OverMemoryKill",
    ):
        done = site.run("--keep-going", "--latency-wait", "1")
    assert done.returncode == 1
    assert "ran longer than its runtime (1 min) (Slurm: TIMEOUT)" in done.stdout
    assert "was cancelled in Slurm (Slurm: CANCELLED)" in done.stdout
    assert "or used more memory than its mem_mb (Slurm: FAILED, JobLaunchFailure)" in done.stdout
    assert "Exceeded job memory limit" in done.stdout
    assert "Missing files after 1 seconds" in done.stdout
    given_up = re.findall(
        r"is given up: (its node was lost|Slurm lost the node: test)", done.stdout
    )
    assert len(given_up) == 1, "whichever is seen first, the job's end or the node's state"
    assert "2 of 6 jobs complete" in done.stdout
    assert (site.directory / "good").exists() and (site.directory / "lost").exists()
    logs = [name.partition("-")[2] for name in files(site) if name.endswith(".log")]
    assert sorted(logs) == ["cancelled.1.log", "hungry.1.log", "long.1.log", "none.1.log"]


def test_held_stopped_suspended_and_requeued_jobs_are_waited_for(site: Site) -> None:
    """Four jobs run, one is queued ahead of the only VM."""
    site.write(FIVE_ON_ONE_VM)
    options = ("--schlouder-instance-types", "m5.xlarge", "--schlouder-max-vms", "1")
    with site.started(*options, "--schlouder-strategy", "asap") as process:
        wait_for(
            lambda: len(list(site.directory.glob("started-*"))) == 4, lambda: "four did not start"
        )
        wait_for(lambda: len(site.jobs()) == 5, lambda: f"no job is queued ahead: {site.jobs()}")
        states = site.jobs()
        (held,) = [job for job, state in states.items() if state.startswith("PENDING")]
        stopped, suspended, requeued, special = [job for job in states if job != held]
        site.slurm("scontrol", "hold", held)
        site.slurm("scontrol", "suspend", suspended)
        site.slurm("scancel", "--full", "--signal=STOP", stopped)
        for job in (requeued, special):
            site.slurm("scontrol", "update", f"jobid={job}", "requeue=1")
        site.slurm("scontrol", "requeue", requeued)
        site.slurm("scontrol", "requeuehold", "State=SpecialExit", special)
        expected = {
            held: "PENDING",
            stopped: "STOPPED",
            suspended: "SUSPENDED",
            requeued: "PENDING",
            special: "SPECIAL_EXIT",
        }
        wait_for(lambda: first_words(site.jobs()) == expected, lambda: f"{site.jobs()}")
        time.sleep(18)
        assert process.poll() is None
        for number in range(5):
            (site.directory / f"go-{number}").touch()
        site.slurm("scontrol", "resume", suspended)
        site.slurm("scancel", "--full", "--signal=CONT", stopped)
        for job in (held, special):
            site.slurm("scontrol", "release", job)
        for job in (requeued, special):
            site.slurm("scontrol", "update", f"jobid={job}", "starttime=now")
        output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert "5 of 5 jobs complete" in output
    assert output.count("will not start by itself") == 2
    for job in (held, special):
        assert f"scontrol release {job}" in output
    starts = [len(path.read_text().split("\n")) - 1 for path in site.directory.glob("started-*")]
    assert sorted(starts) == [1, 1, 1, 2, 2]


def first_words(texts: Mapping[str, str]) -> dict[str, str]:
    return {key: text.split()[0] for key, text in texts.items()}


def test_an_account_the_partition_does_not_take_is_told_with_what_to_do(site: Site) -> None:
    """Slurm accepts the job and never starts it, until the operator lets it go by."""
    site.write("rule one:\n    output: 'a'\n    shell: 'touch {output}'\n")
    partition = ("scontrol", "update", "partitionname=schlouder")
    site.slurm(*partition, "allowaccounts=lab")
    try:
        with site.started("--default-resources", "slurm_account='other'") as process:
            wait_for(lambda: "account not known" in str(site.jobs()), lambda: f"{site.jobs()}")
            time.sleep(18)
            site.slurm(*partition, "allowaccounts=ALL")
            output, _ = process.communicate(timeout=120)
    finally:
        site.slurm(*partition, "allowaccounts=ALL")
    assert process.returncode == 0, output
    assert output.count("look at the rule's slurm_account") == 1


def test_files_of_successes_go_at_once_and_old_ones_after_days(site: Site) -> None:
    site.write("rule all:\n    output: 'a'\n    shell: 'touch {output}'\n")
    old = site.directory / ".snakemake/schlouder/00000001"
    old.mkdir(parents=True)
    (old / "1-a.1.log").touch()
    for path in (old / "1-a.1.log", old):
        os.utime(path, (time.time() - 3 * 86400,) * 2)
    assert site.run("--schlouder-log-days", "4").returncode == 0
    assert files(site) == ["1-a.1.log"]
    (site.directory / "a").unlink()
    assert site.run("--schlouder-log-days", "2").returncode == 0
    assert list((site.directory / ".snakemake/schlouder").iterdir()) == []
    (site.directory / "a").unlink()
    assert site.run("--schlouder-keep-logs").returncode == 0
    assert "1-all.1.log" in files(site)
    (run,) = (site.directory / ".snakemake/schlouder").iterdir()
    assert stat.S_IMODE(run.stat().st_mode) == 0o700


def test_any_wildcard_makes_a_log_that_can_be_shown(site: Site) -> None:
    site.write(
        """
LONG = "".join(str(n) for n in range(140))
VALUES = ["a b", "it's; here", 'say "hi"', "é漢%j", LONG[:150] + "/" + LONG[150:300]]
rule all:
    input: expand("out/{v}", v=VALUES)
rule one:
    output: "out/{v}"
    resources: mem_mb=100
    shell: "echo the reason; exit 3"
""",
    )
    done = site.run("--keep-going")
    assert done.returncode == 1
    assert done.stdout.count("    the reason") == 5, done.stdout
    assert "(no log at" not in done.stdout
    assert len(files(site)) == 5
