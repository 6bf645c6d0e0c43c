"""The command-line adapter: arguments and parsers against literals, errors through a stand-in command."""

from __future__ import annotations

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from snakemake_executor_plugin_schlouder.lease import Lease
from snakemake_executor_plugin_schlouder.model import SlurmOptions
from snakemake_executor_plugin_schlouder.slurm import (
    ClusterUnavailable,
    ClusterUnfit,
    JobRequest,
    SubmissionRefused,
)
from snakemake_executor_plugin_schlouder.slurm.cli import (
    NodeJob,
    SlurmCommands,
    cluster_info,
    last_line,
    parse_config,
    parse_jobs,
    parse_nodes,
    sbatch_arguments,
)
from snakemake_executor_plugin_schlouder.slurm.script import (
    VOID,
    Exit,
    exit_of,
    job_script,
    revoke,
)
from snakemake_executor_plugin_schlouder.slurm.states import (
    JobPhase,
    advice_on,
    failure_of,
    phase_of,
    sentence_of,
)

REQUEST = JobRequest(
    key="r-1.1",
    run="schlouder-r",
    node="n1",
    script="#!/bin/sh\n",
    cpus=3,
    memory=2000,
    limit=90.0,
    workdir=Path("/data/it's here"),
    log="/data/log",
    partition="schlouder",
)

CONFIG = """\
Configuration data as of 2026-11-22T12:00:00
AuthInfo                = socket=/run/cloud/munge.socket
MaxNodeCount            = 1024
SLURM_VERSION           = 22.05.8
SlurmctldHost[0]        = head(10.1.0.1)
SlurmctldPort           = 6820-6823
"""


def test_a_job_over_several_nodes_takes_the_same_of_each() -> None:
    options = SlurmOptions(tasks=5)
    arguments = sbatch_arguments(replace(REQUEST, cpus=6, options=options, companions=("n2",)))
    assert {
        *("--nodelist=n1,n2", "--nodes=2", "--ntasks=5", "--cpus-per-task=2", "--mincpus=6"),
        "--mem=2000M",
    } <= set(arguments)


def test_a_job_is_pinned_to_its_vm_and_never_requeued_by_slurm() -> None:
    assert sbatch_arguments(REQUEST) == [
        "sbatch",
        "--parsable",
        "--job-name=schlouder-r",
        "--comment=r-1.1",
        "--partition=schlouder",
        "--nodelist=n1",
        "--nodes=1",
        "--ntasks=1",
        "--cpus-per-task=3",
        "--mem=2000M",
        "--no-requeue",
        "--export=ALL",
        "--chdir=/data/it's here",
        "--output=/data/log",
        "--time=2",
    ]


def test_jobs_are_found_by_their_key() -> None:
    text = (
        "17|COMPLETED|1790000000|1790000042|r-1.1|None\n"
        "18|PENDING|N/A|N/A|r-2.1|Resources\n"
        "19|CANCELLED by 0|1790000000|1790000001|r-3.1|a|b\n"
        "20|RUNNING|1790000000|N/A|(null)|None\n"
    )
    jobs = parse_jobs(text)
    assert sorted(jobs) == ["r-1.1", "r-2.1", "r-3.1"]
    assert jobs["r-1.1"].phase == JobPhase.SUCCEEDED
    assert (jobs["r-1.1"].started, jobs["r-1.1"].ended) == (1790000000.0, 1790000042.0)
    assert (jobs["r-2.1"].phase, jobs["r-2.1"].started) == (JobPhase.WAITING, None)
    assert (jobs["r-3.1"].phase, jobs["r-3.1"].reason) == (JobPhase.FAILED, "a|b")


def test_nodes_lose_their_flags_but_not_that_they_are_silent() -> None:
    nodes = parse_nodes("a|idle|none\nb|mixed*|none\nc|drained|Low RealMemory | twice\nd|inval|x\n")
    assert nodes["a"].accepts_jobs
    assert not nodes["b"].accepts_jobs
    assert nodes["c"].is_drained
    assert nodes["c"].reason == "Low RealMemory | twice"
    assert not nodes["d"].accepts_jobs


@pytest.mark.parametrize(
    ("state", "phase"),
    [
        ("PENDING", JobPhase.WAITING),
        ("COMPLETING", JobPhase.RUNNING),
        ("COMPLETED", JobPhase.SUCCEEDED),
        ("CANCELLED by 1000", JobPhase.FAILED),
        ("CANCELLED+", JobPhase.FAILED),
        ("TIMEOUT", JobPhase.FAILED),
        ("NODE_FAIL", JobPhase.LOST),
        ("BOOT_FAIL", JobPhase.LOST),
        ("PREEMPTED", JobPhase.DISPLACED),
        ("OUT_OF_MEMORY", JobPhase.FAILED),
        ("DEADLINE", JobPhase.FAILED),
        ("REQUEUED", JobPhase.WAITING),
        ("REQUEUE_HOLD", JobPhase.WAITING),
        ("SPECIAL_EXIT", JobPhase.WAITING),
        ("EXPEDITING", JobPhase.WAITING),
        ("LAUNCH_FAILED", JobPhase.WAITING),
        ("RECONFIG_FAIL", JobPhase.WAITING),
        ("POWER_UP_NODE", JobPhase.WAITING),
        ("STOPPED", JobPhase.RUNNING),
        ("SUSPENDED", JobPhase.RUNNING),
        ("SIGNALING", JobPhase.RUNNING),
        ("STAGE_OUT", JobPhase.RUNNING),
        ("UPDATE_DB", JobPhase.RUNNING),
        ("A_STATE_OF_THE_FUTURE", JobPhase.RUNNING),
        ("", JobPhase.RUNNING),
    ],
)
def test_what_a_state_means(state: str, phase: JobPhase) -> None:
    assert phase_of(state) == phase
    assert sentence_of(state)


@pytest.mark.parametrize(
    ("state", "reason", "limit", "text"),
    [
        ("OUT_OF_MEMORY", "OutOfMemory", 60.0, "used more memory than its mem_mb (2000 MiB)"),
        ("TIMEOUT", "TimeLimit", 5400.0, "ran longer than its runtime (90 min)"),
        ("TIMEOUT", "TimeLimit", None, "the partition's time limit (the rule has no runtime)"),
        ("CANCELLED by 0", "None", None, "was cancelled in Slurm by root (Slurm: CANCELLED by 0)"),
        ("CANCELLED by 4294967", "", None, "in Slurm by the user with id 4294967"),
        ("CANCELLED", "BeginTime", None, "was cancelled in Slurm (Slurm: CANCELLED)"),
        ("FAILED", "NonZeroExitCode", None, "non-zero exit code (Slurm: FAILED, NonZeroExitCode)"),
        ("FAILED", "JobLaunchFailure", None, "could not be launched there"),
        ("DEADLINE", "DeadLine", None, "could not end before its deadline (Slurm: DEADLINE)"),
    ],
)
def test_a_failure_says_who_ended_the_job_and_what_it_had_asked_for(
    state: str, reason: str, limit: float | None, text: str
) -> None:
    assert text in failure_of(state, reason, 2000, limit)


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("JobHeldUser", "scontrol release 17"),
        ("JobHeldAdmin", "scontrol release 17"),
        ("launch failed requeued held", "scontrol release 17"),
        ("BadConstraints", "constraint"),
        ("InvalidAccount", "slurm_account"),
        ("Job's account not known, so it can't use this partition (p allows a)", "slurm_account"),
        ("Job's QOS not permitted to use this partition (p allows a not b)", "qos"),
        ("InvalidQOS", "qos"),
        ("ReservationDeleted", "reservation"),
        ("DependencyNeverSatisfied", "dependency"),
        ("PartitionNodeLimit", "limit of the partition"),
        ("AssocGrpCPUMinutesLimit", "limit of your account"),
        ("AssociationResourceLimit", "limit of your account"),
        ("QOSMaxCpuPerUserLimit", "limit of your account"),
        ("MaxJobsPerAccount", "limit of your account"),
        ("ReqNodeNotAvail, UnavailableNodes:n1", "sinfo -R"),
        ("Nodes required for job are DOWN, DRAINED or reserved", "sinfo -R"),
    ],
)
def test_a_reason_that_does_not_pass_by_itself_comes_with_advice(reason: str, advice: str) -> None:
    assert advice in (advice_on(reason, "17") or "")


@pytest.mark.parametrize("reason", ["", "None", "Resources", "Priority", "BeginTime", "Licenses"])
def test_a_reason_that_passes_is_no_news(reason: str) -> None:
    assert advice_on(reason, "17") is None


def test_the_controller_and_its_munge_socket_are_read_from_the_configuration() -> None:
    info = cluster_info(parse_config(CONFIG))
    assert info.version == (22, 5)
    assert info.controller == "10.1.0.1:6820"
    assert info.munge_socket == "/run/cloud/munge.socket"


@pytest.mark.parametrize(("type_", "auth"), [("auth/munge", "munge"), ("auth/slurm", "slurm")])
def test_how_machines_know_each_other_is_read_from_the_configuration(type_: str, auth: str) -> None:
    assert cluster_info(parse_config(f"{CONFIG}AuthType = {type_}\n")).auth == auth


def test_a_slurm_that_vms_cannot_authenticate_with_is_refused() -> None:
    with pytest.raises(ClusterUnfit, match="AuthType is auth/none, with which no VM can join"):
        cluster_info(parse_config(f"{CONFIG}AuthType = auth/none\n"))


def test_an_old_slurm_is_refused() -> None:
    with pytest.raises(ClusterUnfit, match=r"version 21\.08\.5 .* 22\.05 or later"):
        cluster_info(parse_config(CONFIG.replace("22.05.8", "21.08.5")))


@pytest.mark.parametrize("value", ["0", "(null)", ""])
def test_a_slurm_without_room_for_nodes_is_refused(value: str) -> None:
    with pytest.raises(ClusterUnfit, match="MaxNodeCount"):
        cluster_info(parse_config(CONFIG.replace("1024", value)))


def commands(directory: Path, **scripts: str) -> None:
    """Puts shell scripts under the names of Slurm's commands."""
    for name in ("sbatch", "squeue", "sinfo", "scontrol", "scancel"):
        path = directory / name
        path.write_text(f"#!/bin/sh\n{scripts.get(name, 'exit 0')}\n")
        path.chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_missing_commands_are_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(path))
    with pytest.raises(ClusterUnfit, match="sbatch, squeue, sinfo, scontrol, scancel not found"):
        SlurmCommands("schlouder").check()


def test_a_silent_controller_is_told(path: Path) -> None:
    commands(
        path, scontrol="echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1"
    )
    with pytest.raises(ClusterUnfit, match="slurmctld does not answer"):
        SlurmCommands("schlouder").check()


def scontrol(config: str = CONFIG, partition: int = 0, delete: str = "Invalid node name") -> str:
    return (
        f'case "$*" in "show config") cat <<EOF\n{config}EOF\n;;\n'
        f'"show partition"*) exit {partition};;\n'
        f"delete*) echo '{delete}' >&2; exit 1;;\nesac"
    )


def test_a_fit_slurm_passes_its_check(path: Path) -> None:
    commands(path, scontrol=scontrol())
    assert SlurmCommands("schlouder").check().controller == "10.1.0.1:6820"


def test_an_unknown_partition_comes_with_the_lines_that_make_it(path: Path) -> None:
    commands(path, scontrol=scontrol(partition=1))
    with pytest.raises(
        ClusterUnfit, match=r"--schlouder-partition.*PartitionName=cloud Nodes=cloud"
    ):
        SlurmCommands("cloud").check()


def test_a_node_that_slurm_does_not_know_keeps_no_other_from_being_updated(path: Path) -> None:
    log = path / "updates"
    commands(
        path,
        scontrol=f'echo "$2" >>{log}; case "$2" in *gone*) echo "Invalid node name" >&2; exit 1;; esac',
        sinfo="echo 'a|idle|none'; echo 'b|idle|none'",
    )
    slurm = SlurmCommands("schlouder")
    slurm.renew(["gone", "a", "b"], Lease("r1", 600, 1))
    slurm.renew(["gone"], Lease("r1", 600, 1))
    slurm.renew([], Lease("r1", 600, 1))
    assert log.read_text().split() == ["nodename=gone,a,b", "nodename=a,b", "nodename=gone"]


def test_no_right_to_delete_nodes_is_told(path: Path) -> None:
    commands(path, scontrol=scontrol(delete="slurm_delete_node error: Access/permission denied"))
    with pytest.raises(ClusterUnfit, match="no right to update and delete nodes"):
        SlurmCommands("schlouder").check()


def test_a_refused_submission_says_why_and_a_silent_one_is_tried_again(path: Path) -> None:
    commands(path, sbatch="echo 'sbatch: error: Invalid qos specification' >&2; exit 1")
    (refused,) = SlurmCommands("schlouder").submit([REQUEST])
    assert isinstance(refused, SubmissionRefused)
    assert "Invalid qos" in str(refused)
    for words in ("Socket timed out on send/recv operation", "Transport endpoint is not connected"):
        check_it_is_tried_again(path, words)


def check_it_is_tried_again(path: Path, words: str) -> None:
    commands(path, sbatch=f"echo 'Batch job submission failed: {words}' >&2; exit 1")
    outcomes = SlurmCommands("schlouder").submit([REQUEST] * 100)
    assert {type(outcome) for outcome in outcomes} == {ClusterUnavailable}
    assert len(outcomes) < 50, "the rest is not tried"


def test_what_a_rule_asks_of_slurm_becomes_options() -> None:
    options = SlurmOptions("lab", "high", "today", "avx", "gpu:1", 2, ("--nice=5",))
    arguments = sbatch_arguments(replace(REQUEST, cpus=6, options=options))
    assert {"--ntasks=2", "--cpus-per-task=3", "--account=lab", "--qos=high"} <= set(arguments)
    assert arguments[-4:] == ["--reservation=today", "--constraint=avx", "--gres=gpu:1", "--nice=5"]


def test_a_failing_query_is_no_empty_answer(path: Path) -> None:
    commands(path, squeue="exit 1")
    with pytest.raises(ClusterUnavailable):
        SlurmCommands("schlouder").view("run")


def test_jobs_get_neither_options_in_disguise_nor_cloud_credentials(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    withheld = (
        *("SLURM_MEM_PER_CPU", "SBATCH_ACCOUNT", "SQUEUE_PARTITION", "SNAKEMAKE_PROFILE"),
        *("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_CONTAINER_AUTHORIZATION_TOKEN"),
        *("AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_WEB_IDENTITY_TOKEN_FILE"),
    )
    for name in (*withheld, "AWS_SESSION_TOKEN", "SLURM_CONF", "OTHER"):
        monkeypatch.setenv(name, "x")
    commands(path, sbatch=f"env >{path}/seen; echo '12;cluster'")
    passed = {"AWS_SESSION_TOKEN": "x", "SNAKEMAKE_STORAGE_S3_SECRET_KEY": "of a setting"}
    assert SlurmCommands("schlouder", passed).submit([REQUEST]) == ["12"]
    seen = {line.partition("=")[0] for line in (path / "seen").read_text().splitlines()}
    assert {"SLURM_CONF", "OTHER", *passed} <= seen
    assert not seen.intersection(withheld)


def test_other_peoples_jobs_are_told_from_ours_whatever_their_names(path: Path) -> None:
    ours = "case \"$*\" in *--name=run*) echo 1;; *) printf '1|n1\\n2|n2,n3\\n';; esac"
    commands(path, squeue=ours)
    assert SlurmCommands("schlouder").foreign_jobs("run") == {"n2": ["2"], "n3": ["2"]}


def test_jobs_on_nodes_are_told_with_whose_they_are(path: Path) -> None:
    mine = os.getuid()
    commands(path, squeue=f"printf '1|{mine}|n1|a|b\\n2|{mine + 1}|n1,n2|run\\n'")
    theirs = NodeJob("2", "run", is_mine=False)
    assert SlurmCommands("schlouder").jobs_on(["n1", "n2"]) == {
        "n1": [NodeJob("1", "a|b"), theirs],
        "n2": [theirs],
    }


def test_the_names_of_jobs_of_others_are_told(path: Path) -> None:
    mine = os.getuid()
    commands(path, squeue=f"printf '{mine}|ours\\n{mine + 1}|run\\n{mine + 1}|a|b\\n'")
    assert SlurmCommands("schlouder").foreign_names() == {"run", "a|b"}


def test_output_that_is_no_text_is_no_crash(path: Path) -> None:
    commands(path, sinfo="printf 'n1|idle|caf\\351\\n'")
    assert SlurmCommands("schlouder").view("run").nodes["n1"].accepts_jobs


def test_in_a_hurry_nobody_waits_long_for_a_silent_slurm(path: Path) -> None:
    """Neither who waits already, nor who asks a hundred times; and no further job is handed over."""
    commands(path, squeue="exec sleep 50", sbatch="echo 12")
    slurm = SlurmCommands("schlouder")
    begun = time.monotonic()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(slurm.view, "run")
        time.sleep(0.5)
        slurm.hurry()
        with pytest.raises(ClusterUnavailable, match=r"squeue: no answer in [56] s"):
            waiting.result()
    for _ in range(100):
        with pytest.raises(ClusterUnavailable):
            slurm.view("run")
    assert time.monotonic() - begun < 10
    assert slurm.submit([REQUEST] * 3) == []


def test_a_job_is_gone_only_when_slurm_says_so(path: Path) -> None:
    commands(path, squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert not SlurmCommands("schlouder").knows("7", "r-3.1")
    commands(path, squeue="echo '7|r-3.1'")
    assert SlurmCommands("schlouder").knows("7", "r-3.1")
    assert not SlurmCommands("schlouder").knows("7", "r-2.1"), "its id was given away again"
    commands(path, squeue="echo 'Socket timed out' >&2; exit 1")
    with pytest.raises(ClusterUnavailable):
        SlurmCommands("schlouder").knows("7", "r-3.1")


def test_jobs_in_a_directory_are_told_by_name(path: Path) -> None:
    commands(path, squeue="echo 'schlouder-1|/w/a'; echo 'mine|/w/a|b'; echo 'other|/w/a/b'")
    assert SlurmCommands("schlouder").jobs_in(Path("/w/a")) == {"schlouder-1"}
    assert SlurmCommands("schlouder").jobs_in(Path("/w/a|b")) == {"mine"}


def test_only_what_is_meant_is_cancelled(path: Path, tmp_path: Path) -> None:
    """slurmctld has lost job 7, and given its id to somebody else's."""
    told = tmp_path / "told"
    commands(path, squeue="echo '7|another'; echo '8|r-4.1'", scancel=f'echo "$@" >>{told}')
    SlurmCommands("schlouder").cancel({"7": "r-3.1", "8": "r-4.1", "9": "r-5.1"})
    assert told.read_text() == "8\n"
    SlurmCommands("schlouder").cancel({"7": "r-3.1"})
    assert told.read_text() == "8\n"


def test_a_percent_sign_in_a_path_is_no_pattern() -> None:
    arguments = sbatch_arguments(replace(REQUEST, log="/data/100%j/log"))
    assert "--output=/data/100%%j/log" in arguments


def test_a_revoked_script_does_nothing(tmp_path: Path) -> None:
    exit_file = f"{tmp_path}/x.exit"
    assert not revoke(exit_file)
    script = job_script("t", f"touch {tmp_path}/ran", exit_file)
    done = subprocess.run(["sh"], input=script, text=True, check=False)
    assert done.returncode == VOID
    assert not (tmp_path / "ran").exists()
    assert exit_of(exit_file) is None
    assert not revoke(exit_file)


def test_a_script_that_has_begun_cannot_be_revoked_and_says_so(tmp_path: Path) -> None:
    exit_file = f"{tmp_path}/x.exit"
    subprocess.run(["sh"], input=job_script("t", "true", exit_file), text=True, check=True)
    assert revoke(exit_file)


@pytest.mark.parametrize(("command", "code"), [("true", 0), ("exit 7", 7), ("false && true", 1)])
def test_the_job_script_leaves_its_exit_code(tmp_path: Path, command: str, code: int) -> None:
    exit_file = f"{tmp_path}/a 'b'.exit"
    assert exit_of(exit_file) is None
    script = job_script("task\nname", command, exit_file)
    done = subprocess.run(["sh"], input=script, text=True, check=False)
    assert done.returncode == code
    assert exit_of(exit_file) == Exit(code)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("code", [0, 1])
def test_a_script_that_slurm_ends_lives_as_long_as_its_command(code: int, tmp_path: Path) -> None:
    """Its failure is then none of the command's own."""
    command = f"trap '' TERM; touch {tmp_path}/begun; sleep 1; touch {tmp_path}/over; exit {code}"
    script = tmp_path / "script"
    script.write_text(job_script("t", command, f"{tmp_path}/x.exit"))
    with subprocess.Popen(["sh", str(script)]) as process:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        process.terminate()
    assert process.returncode == code
    assert (tmp_path / "over").exists()
    assert (exit_of(f"{tmp_path}/x.exit") is None) == (code != 0)


def test_the_message_is_what_slurm_says_last_of_the_cause() -> None:
    said = "sbatch: unrecognized option '--bogus'\nTry \"sbatch --help\" for more information\n"
    assert last_line(said) == "sbatch: unrecognized option '--bogus'"
    assert last_line("") == "no message"


def test_only_a_short_file_of_our_own_tells_how_a_script_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exit_file = tmp_path / "x.exit"
    exit_file.write_text("7 1.5 2.5\n")
    assert exit_of(str(exit_file)) == Exit(7, 1.5, 2.5)
    (tmp_path / "link").symlink_to(exit_file)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "long").write_text("7" + " " * 1000)
    (tmp_path / "bytes").write_bytes(b"\xff")
    for name in ("link", "fifo", "long", "bytes", "/dev/zero", ".", "missing"):
        assert exit_of(str(tmp_path / name)) is None
    monkeypatch.setattr(os, "getuid", lambda: exit_file.stat().st_uid + 1)
    assert exit_of(str(exit_file)) is None


def test_the_job_script_forgets_a_slurm_conf_that_is_not_on_the_node(tmp_path: Path) -> None:
    script = job_script("t", f'echo "${{SLURM_CONF-unset}}" >{tmp_path}/seen', f"{tmp_path}/x")
    subprocess.run(["sh"], input=script, text=True, check=True, env={"SLURM_CONF": "/not/there"})
    assert (tmp_path / "seen").read_text() == "unset\n"
