"""How jobs end on real Slurm: what is done to them, what Snakemake hears of it, what stays on disk."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from workflows import Site, wait_for

from snakemake_executor_plugin_schlouder.localcloud import LocalCloud

pytestmark = pytest.mark.integration

ENDS = """
rule all:
    input: "good", "none", "long", "cancelled"
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
"""

THREE_ON_ONE_VM = """
rule all:
    input: expand("out/{i}", i=range(3))
rule one:
    output: "out/{i}"
    resources: mem_mb=100
    shell: "echo >>started-{wildcards.i}; while [ ! -e go-{wildcards.i} ]; do sleep 0.1; done; touch {output}"
"""


def files(site: Site) -> list[str]:
    """Everything jobs left in the folders of the runs."""
    return sorted(path.name for path in (site.directory / ".snakemake/schlouder").glob("*/*"))


def jobs(site: Site) -> dict[str, str]:
    """Slurm id -> state and reason of the jobs that have not ended."""
    lines = site.slurm("squeue", "--noheader", "--format=%i %T %r").splitlines()
    return dict(line.split(" ", 1) for line in lines)


@contextlib.contextmanager
def started(site: Site, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Snakemake at work; a test that fails meanwhile ends it as Ctrl-C does."""
    process = site.start(*options)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=60)


def answers(site: Site) -> bool:
    """Whether slurmctld does."""
    ping = ["scontrol", "ping"]
    return subprocess.run(ping, env=site.environment, capture_output=True).returncode == 0


def slurmctld(cloud: LocalCloud) -> int:
    """The process id of this cloud's controller."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if words[0].endswith("slurmctld") and f"{cloud.folder}/slurm.conf" in words:
            return int(path.parent.name)
    raise AssertionError("the cloud has no slurmctld")


def test_each_end_of_a_job_is_told_with_its_cause(site: Site) -> None:
    site.write(ENDS)
    done = site.run("--keep-going", "--latency-wait", "1")
    assert done.returncode == 1
    assert "ran longer than its runtime (1 min) (Slurm: TIMEOUT)" in done.stdout
    assert "was cancelled in Slurm (Slurm: CANCELLED)" in done.stdout
    assert "Missing files after 1 seconds" in done.stdout
    assert (site.directory / "good").exists()
    logs = [name.partition("-")[2] for name in files(site)]
    assert sorted(logs) == ["cancelled.1.log", "long.1.log", "none.1.log"]


def test_held_suspended_and_requeued_jobs_are_waited_for(site: Site) -> None:
    """Two jobs run, one is queued ahead of the only VM."""
    site.write(THREE_ON_ONE_VM)
    with started(site, "--schlouder-max-vms", "1", "--schlouder-strategy", "asap") as process:
        wait_for(
            lambda: len(list(site.directory.glob("started-*"))) == 2, lambda: "two did not start"
        )
        wait_for(lambda: len(jobs(site)) == 3, lambda: f"no job is queued ahead: {jobs(site)}")
        states = jobs(site)
        (held,) = [job for job, state in states.items() if state.startswith("PENDING")]
        suspended, requeued = [job for job in states if job != held]
        site.slurm("scontrol", "hold", held)
        site.slurm("scontrol", "suspend", suspended)
        site.slurm("scontrol", "update", f"jobid={requeued}", "requeue=1")
        site.slurm("scontrol", "requeue", requeued)
        wait_for(lambda: jobs(site)[requeued].startswith("PENDING"), lambda: f"{jobs(site)}")
        time.sleep(18)
        assert process.poll() is None
        for number in range(3):
            (site.directory / f"go-{number}").touch()
        site.slurm("scontrol", "update", f"jobid={requeued}", "starttime=now")
        site.slurm("scontrol", "resume", suspended)
        site.slurm("scontrol", "release", held)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "3 of 3 jobs complete" in output
    assert output.count("will not start by itself") == 1
    assert f"scontrol release {held}" in output
    starts = [len(path.read_text().split("\n")) - 1 for path in site.directory.glob("started-*")]
    assert sorted(starts) == [1, 1, 2]


def test_a_restart_of_slurmctld_and_a_silent_one_lose_and_repeat_nothing(site: Site) -> None:
    site.write(THREE_ON_ONE_VM)
    with started(site, "--schlouder-max-vms", "2", "--schlouder-keep-logs") as process:
        wait_for(
            lambda: len(list(site.directory.glob("started-*"))) == 3, lambda: "jobs did not start"
        )
        before = slurmctld(site.cloud)
        site.slurm("scontrol", "shutdown", "slurmctld")
        (site.directory / "go-0").touch()
        wait_for(lambda: not Path(f"/proc/{before}").exists(), lambda: "slurmctld did not end")
        (site.directory / "go-1").touch()
        wait_for(lambda: answers(site), lambda: "slurmctld did not come back")
        wait_for(lambda: len(jobs(site)) < 3, lambda: f"{jobs(site)}")
        silent = slurmctld(site.cloud)
        assert silent != before
        os.kill(silent, signal.SIGSTOP)
        try:
            (site.directory / "go-2").touch()
            time.sleep(15)
        finally:
            os.kill(silent, signal.SIGCONT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "3 of 3 jobs complete" in output
    assert len([name for name in files(site) if name.endswith(".1.log")]) == 3
    assert not [name for name in files(site) if name.endswith(".2.log")]
    assert {path.read_text() for path in site.directory.glob("started-*")} == {"\n"}


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
