"""The whole path with real parts: Snakemake, EC2 API, VMs, Slurm jobs, and nothing left in the end."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import snakemake.common.tests
from snakemake_interface_executor_plugins.settings import ExecutorSettingsBase
from workflows import Site, as_nobody, vm_pids, wait_for

from snakemake_executor_plugin_schlouder import ExecutorSettings
from snakemake_executor_plugin_schlouder.history import History
from snakemake_executor_plugin_schlouder.localcloud import LocalCloud
from snakemake_executor_plugin_schlouder.recording import decoded, read, replay_recording
from snakemake_executor_plugin_schlouder.slurm import ClusterUnfit
from snakemake_executor_plugin_schlouder.slurm.cli import SlurmCommands

pytestmark = pytest.mark.integration

THREE_JOBS = """
rule all:
    input: expand("out/{i}.txt", i=range(3)), "out/sum.txt"
rule one:
    output: "out/{i}.txt"
    resources: schlouder_walltime="5s"
    shell: "hostname > {output}"
rule sum:
    input: expand("out/{i}.txt", i=range(3))
    output: "out/sum.txt"
    resources: schlouder_strategy="one-vm-for-all"
    shell: "cat {input} > {output}"
"""

TWO_CHAINS = """
rule all:
    input: expand("out/second-{i}.txt", i=["a", "b"])
rule first:
    output: "out/first-{i}.txt"
    resources: schlouder_walltime="5s"
    shell: "hostname > {output}"
rule second:
    input: "out/first-{i}.txt"
    output: "out/second-{i}.txt"
    resources: schlouder_walltime="5s"
    shell: "hostname > {output}"
"""

LONG_JOBS = """
rule all:
    input: expand("out/{i}.txt", i=range(4))
rule one:
    output: "out/{i}.txt"
    threads: 2
    shell: "touch started-{wildcards.i}; sleep {config[seconds]}; touch {output}"
"""


class TestSnakemakesOwnSuite(snakemake.common.tests.TestWorkflowsLocalStorageBase):
    """Snakemake's test workflows for executors: five rules, and a group."""

    __test__ = True

    @pytest.fixture(autouse=True)
    def _on_the_cloud(
        self, cloud: LocalCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.cloud = cloud
        for name, value in cloud.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)

    def get_executor(self) -> str:
        return "schlouder"

    def get_executor_settings(self) -> ExecutorSettingsBase:
        prefix = "SNAKEMAKE_SCHLOUDER_"
        given = self.cloud.environment()
        return ExecutorSettings(
            image=given[prefix + "IMAGE"],
            subnets=given[prefix + "SUBNETS"],
            security_groups=given[prefix + "SECURITY_GROUPS"],
            instance_profile=given[prefix + "INSTANCE_PROFILE"],
        )


def test_jobs_run_on_vms_of_their_strategy_and_the_table_shows_it(site: Site) -> None:
    site.write(THREE_JOBS)
    before = len(site.instances())
    done = site.run("--schlouder-strategy", "one-vm-per-job")
    assert done.returncode == 0, done.stdout
    hosts = (site.directory / "out/sum.txt").read_text().split()
    assert len(set(hosts)) == 3
    assert len(site.instances()) - before == 4
    assert "4 of 4 jobs complete" in done.stdout
    for host in hosts:
        assert f" - {host} (" in done.stdout
    assert "/ 5 s" in done.stdout
    status = subprocess.run(
        [shutil.which("schlouder", path=Path(sys.executable).parent) or "schlouder", "status"],
        cwd=site.directory,
        env=site.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "4 of 4 jobs complete" in status.stdout
    assert f" - {hosts[0]} (" in status.stdout


SIX_ALIKE = """
rule all:
    input: expand("out/{i}.txt", i=range(6))
rule one:
    output: "out/{i}.txt"
    shell: "hostname >{output}"
"""


def test_the_default_strategy_lays_the_batch_out_and_remembers_what_it_took(site: Site) -> None:
    """Two jobs at once on a VM; five minutes are assumed for the first run, seconds for the second."""
    site.write(SIX_ALIKE)
    first = site.run("--schlouder-strategy", "cheapest")
    assert first.returncode == 0, first.stdout
    assert "6 of 6 jobs complete" in first.stdout
    (site.directory / "out").rename(site.directory / "before")
    known = History(site.directory / "state" / "schlouder" / "history.sqlite")
    assert known.walltimes().expected("one", None) < 60
    assert known.boots().predict(0) < 60
    known.close()
    second = site.run()
    assert second.returncode == 0, second.stdout
    hosts = {path.read_text() for path in (site.directory / "out").glob("*.txt")}
    assert len(hosts) < 6
    assert "/ 5 m" not in second.stdout


def test_a_job_follows_the_one_it_waited_for_to_its_vm(site: Site) -> None:
    site.write(TWO_CHAINS)
    done = site.run("--schlouder-strategy", "start-par-exceed", "--schlouder-btu", "3600")
    assert done.returncode == 0, done.stdout
    hosts = {path.name: path.read_text().strip() for path in (site.directory / "out").glob("*.txt")}
    assert hosts["first-a.txt"] != hosts["first-b.txt"]
    assert hosts["second-a.txt"] == hosts["first-a.txt"]
    assert hosts["second-b.txt"] == hosts["first-b.txt"]


def test_nothing_to_be_done_starts_nothing(site: Site) -> None:
    site.write("rule all:\n    output: 'a'\n    shell: 'touch a'\n")
    assert site.run().returncode == 0
    before = len(site.instances())
    done = site.run(SNAKEMAKE_SCHLOUDER_IMAGE="ami-none", AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert done.returncode == 0, done.stdout
    assert "Nothing to be done" in done.stdout
    assert len(site.instances()) == before


def test_threads_memory_and_runtime_reach_slurm(site: Site) -> None:
    site.write(
        """
rule all:
    output: "seen"
    threads: 2
    resources: mem_mb=1234, runtime=7
    shell: "scontrol show job $SLURM_JOB_ID > {output}; echo threads={threads} >> {output}"
""",
    )
    done = site.run()
    assert done.returncode == 0, done.stdout
    seen = (site.directory / "seen").read_text()
    assert "NumCPUs=2" in seen
    assert "MinMemoryNode=1234M" in seen
    assert "TimeLimit=00:07:00" in seen
    assert "threads=2" in seen


def test_a_failing_job_shows_its_log_and_gives_its_vm_back(site: Site) -> None:
    site.write(
        """
rule all:
    input: "good", "bad"
rule good:
    output: "good"
    shell: "touch {output}"
rule bad:
    output: "bad"
    shell: "echo the reason of the failure; exit 3"
""",
    )
    done = site.run("--keep-going")
    assert done.returncode == 1
    assert (site.directory / "good").exists()
    assert "the reason of the failure" in done.stdout
    assert ": ended with exit code 1." in done.stdout
    logs = list((site.directory / ".snakemake/schlouder").glob("*/*-bad.1.log"))
    assert len(logs) == 1


def test_a_job_that_slurm_ended_says_how(site: Site) -> None:
    site.write(
        """
rule all:
    output: "a"
    shell: "scancel $SLURM_JOB_ID; sleep 60"
""",
    )
    done = site.run()
    assert done.returncode == 1
    assert "was cancelled in Slurm (Slurm: CANCELLED" in done.stdout


def test_a_job_that_sbatch_refuses_is_retried_by_snakemake(site: Site) -> None:
    shim = site.directory / "bin" / "sbatch"
    shim.parent.mkdir()
    shim.write_text(
        "#!/bin/sh\n"
        f'[ -e {site.directory}/refused ] && exec {shutil.which("sbatch")} "$@"\n'
        f"touch {site.directory}/refused\n"
        "echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1\n"
    )
    shim.chmod(0o755)
    site.write("rule all:\n    output: 'a'\n    shell: 'touch a'\n")
    done = site.run(
        *("--retries", "1", "--schlouder-slurm-api", "cli"),
        PATH=f"{shim.parent}:{site.environment['PATH']}",
    )
    assert done.returncode == 0, done.stdout
    assert "Slurm refused the job: sbatch: error" in done.stdout
    assert (site.directory / "a").exists()


def test_pyslurm_is_used_when_asked_for_or_it_says_why_not(site: Site) -> None:
    site.write("rule all:\n    output: 'a'\n    shell: 'touch a'\n")
    done = site.run("--verbose", "--schlouder-slurm-api", "pyslurm")
    if importlib.util.find_spec("pyslurm"):
        assert done.returncode == 0, done.stdout
        assert done.stdout.count("schlouder: Slurm through pyslurm") == 1
        assert (site.directory / "a").exists()
    else:
        assert done.returncode == 1
        assert "--schlouder-slurm-api: pyslurm cannot be used: pyslurm is not" in done.stdout


def start_long_jobs(site: Site, seconds: int, *options: str) -> subprocess.Popen[str]:
    """Four jobs, of which two VMs have two at work or ahead and the rest waits; returns when two run."""
    site.write(LONG_JOBS)
    process = site.start("--config", f"seconds={seconds}", "--schlouder-max-vms", "2", *options)
    wait_for(lambda: len(started(site)) == 2, lambda: "the jobs did not start")
    return process


def started(site: Site) -> list[Path]:
    return list(site.directory.glob("started-*"))


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=60)
    return output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_give_everything_back(site: Site, number: int) -> None:
    process = start_long_jobs(site, 600)
    os.killpg(process.pid, number)
    output = finish(process)
    assert process.returncode != 0
    site.assert_nothing_left()
    assert "0 of 4 jobs complete" in output


def test_a_recorded_run_is_played_again_with_the_same_decisions(site: Site) -> None:
    site.write(THREE_JOBS)
    done = site.run("--schlouder-record", "run.jsonl", "--schlouder-strategy", "asap")
    assert done.returncode == 0, done.stdout
    path = site.directory / "run.jsonl"
    played = replay_recording(path)
    assert played.is_identical, played.differences
    assert played.decisions >= 4 + 2
    (plan,) = (decoded(line.asked) for line in read(path) if line.name == "plan")
    after = {job.name: job.after for job in plan}
    assert sorted(after["sum"]) == ["one i=0", "one i=1", "one i=2"]


def test_a_second_ctrl_c_does_not_stop_the_giving_back(site: Site) -> None:
    process = start_long_jobs(site, 600)
    for _ in range(3):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
    finish(process)
    assert process.returncode != 0
    site.assert_nothing_left()


def test_ctrl_c_while_vms_boot_gives_them_back(site: Site) -> None:
    site.write(LONG_JOBS)
    before = len(site.instances())
    process = site.start("--config", "seconds=600")
    wait_for(lambda: len(site.instances()) > before, lambda: "no VM was requested")
    os.killpg(process.pid, signal.SIGINT)
    finish(process)
    assert process.returncode != 0


def test_signals_of_every_kind_in_quick_succession_leave_nothing(site: Site) -> None:
    """A closing terminal sends SIGHUP more than once, and an impatient user everything."""
    process = start_long_jobs(site, 600)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        if process.poll() is None:
            os.killpg(process.pid, number)
        time.sleep(0.05)
    finish(process)
    assert process.returncode != 0
    site.assert_nothing_left()


def test_a_vm_that_dies_runs_nothing_twice_and_loses_nothing(site: Site) -> None:
    """One VM, two jobs running and one queued ahead in Slurm, when the machine is gone."""
    site.write(
        """
rule all:
    input: expand("out/{i}.txt", i=range(4))
rule one:
    output: "out/{i}.txt"
    resources: mem_mb=100
    shell: "date +%s%N > running-{wildcards.i}-$$; sleep 6; rm running-{wildcards.i}-$$; touch {output}"
""",
    )
    process = site.start("--schlouder-max-vms", "1", "--schlouder-strategy", "asap")
    pending = ["squeue", "--states=PENDING", "--noheader", "--format=%i"]
    wait_for(
        lambda: len(list(site.directory.glob("running-*"))) == 2 and bool(site.slurm(*pending)),
        lambda: "no job is queued ahead",
    )
    (first,) = vm_pids(site.cloud)
    os.kill(first, signal.SIGKILL)
    for stale in site.directory.glob("running-*"):
        stale.unlink()
    while process.poll() is None:
        running = [path.name.split("-")[1] for path in site.directory.glob("running-*")]
        assert len(running) == len(set(running)), "a job runs twice at a time"
        time.sleep(0.2)
    output = finish(process)
    assert process.returncode == 0, output
    assert "is given up" in output
    assert "4 of 4 jobs complete" in output


def test_sigterm_lets_running_jobs_end_and_starts_nothing_more(site: Site) -> None:
    process = start_long_jobs(site, 6)
    running = {path.name.removeprefix("started-") for path in started(site)}
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode != 0
    done = {path.stem for path in (site.directory / "out").iterdir()}
    assert running <= done
    assert len(site.instances()) >= 2
    assert "Traceback" not in output


def test_after_a_final_failure_nothing_new_starts(site: Site) -> None:
    site.write(
        """
rule all:
    input: expand("out/{i}", i=range(8))
rule one:
    output: "out/{i}"
    threads: 2
    shell: "touch started-{wildcards.i}; sleep 3; exit 1"
""",
    )
    done = site.run("--schlouder-max-vms", "1", "--jobs", "1000")
    assert done.returncode == 1
    assert len(started(site)) <= 2
    assert "jobs were not started, because the run is ending" in done.stdout


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (["--schlouder-strategy", "cheapo"], {}, "--schlouder-strategy: 'cheapo' is unknown"),
        (["--schlouder-max-vms", "0"], {}, "--schlouder-max-vms: 0 is not allowed"),
        (
            ["--schlouder-record", "no/where"],
            {},
            "--schlouder-record: 'no/where' is in no directory",
        ),
        (["--schlouder-btu", "-1"], {}, "--schlouder-btu: -1.0 is not allowed"),
        (["--schlouder-image", "ami-12345678"], {}, "--schlouder-image: 'ami-12345678'"),
        (["--schlouder-subnets", "subnet-1"], {}, "--schlouder-subnets: 'subnet-1'"),
        (["--schlouder-security-groups", "sg-1"], {}, "--schlouder-security-groups: 'sg-1'"),
        (["--schlouder-key-name", "none"], {}, "--schlouder-key-name: 'none'"),
        (["--schlouder-instance-types", "x9.huge"], {}, "--schlouder-instance-types: 'x9.huge'"),
        (["--schlouder-partition", "nope"], {}, "Slurm has no partition 'nope'"),
        (
            [],
            {"SNAKEMAKE_SCHLOUDER_REGION": "", "AWS_DEFAULT_REGION": ""},
            "--schlouder-region: no AWS region",
        ),
        (
            [],
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
            "AWS: no credentials found",
        ),
        ([], {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "AWS: EC2 cannot be reached"),
        ([], {"AWS_ENDPOINT_URL": "nonsense"}, "AWS: Invalid endpoint: nonsense"),
        ([], {"AWS_SECRET_ACCESS_KEY": ""}, "AWS: Partial credentials found"),
        ([], {"AWS_PROFILE": "nope"}, "AWS: The config profile (nope) could not be found"),
        (["--schlouder-region", "us east"], {}, "--schlouder-region: 'us east' is not allowed"),
        ([], {"XDG_STATE_HOME": "/dev/null"}, "the journal /dev/null"),
    ],
)
def test_bad_input_is_one_clear_error_before_any_vm_starts(
    site: Site, options: list[str], environment: dict[str, str], message: str
) -> None:
    site.write(THREE_JOBS)
    before = len(site.instances())
    home = {"HOME": str(site.directory)}
    done = site.run(*options, **{**home, **environment})
    assert done.returncode == 1, done.stdout
    assert message in done.stdout
    assert "Traceback" not in done.stdout
    assert len(site.instances()) == before


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ("schlouder_strategy='cheapo'", "rule one: schlouder_strategy: 'cheapo' is unknown"),
        ("mem_mb=100000", "rule one needs 1 cpus and 100000 MiB; the allowed instance types"),
        ("schlouder_walltime='soon'", "rule one: schlouder_walltime: 'soon' is no duration"),
    ],
)
def test_a_bad_rule_is_one_clear_error_before_any_vm_starts(
    site: Site, resources: str, message: str
) -> None:
    site.write(THREE_JOBS.replace('schlouder_walltime="5s"', resources))
    before = len(site.instances())
    done = site.run()
    assert done.returncode == 1
    assert message in done.stdout
    assert done.stdout.count(message) == 1
    assert len(site.instances()) == before


def test_a_rule_with_too_many_threads_is_refused(site: Site) -> None:
    site.write(LONG_JOBS.replace("threads: 2", "threads: 64"))
    done = site.run("--config", "seconds=1")
    assert done.returncode == 1
    assert "rule one needs 64 cpus" in done.stdout


def test_a_small_number_of_jobs_is_warned_about(site: Site) -> None:
    site.write(LONG_JOBS)
    done = site.run("--config", "seconds=0", "--jobs", "1")
    assert done.returncode == 0
    assert "--jobs 1 lets schlouder see 1 of 4 jobs at a time" in done.stdout


def test_without_sbatch_it_says_what_to_install(site: Site, tmp_path: Path) -> None:
    site.write(THREE_JOBS)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "sh", "env"):
        (tools / name).symlink_to(shutil.which(name) or name)
    done = site.run(PATH=str(tools))
    assert done.returncode == 1
    assert "sbatch, squeue, sinfo, scontrol, scancel not found in PATH" in done.stdout


def test_a_silent_slurmctld_is_told(site: Site, tmp_path: Path) -> None:
    site.write(THREE_JOBS)
    conf = Path(site.environment["SLURM_CONF"]).read_text()
    lines = [line for line in conf.splitlines() if not line.startswith("SlurmctldPort")]
    silent = tmp_path / "slurm.conf"
    silent.write_text("\n".join([*lines, "SlurmctldPort=9", "MessageTimeout=2", ""]))
    done = site.run(SLURM_CONF=str(silent))
    assert done.returncode == 1
    assert "Slurm: slurmctld does not answer" in done.stdout


def test_without_the_right_to_delete_nodes_it_says_so(site: Site) -> None:
    """Slurm itself is asked, as a user who is no operator."""

    def check() -> int:
        os.environ.update(site.environment)
        try:
            SlurmCommands("schlouder").check()
        except ClusterUnfit as error:
            print(error, file=sys.stderr)
            return 1
        return 0

    code, said = as_nobody(check)
    assert code == 1
    assert "no right to update and delete nodes" in said
