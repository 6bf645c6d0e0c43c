"""What every adapter of the port `Cluster` does, on real Slurm: the same tests for both. Needs root.

Those of pyslurm are skipped, with the reason, where pyslurm cannot be used.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_localcloud import Vms
from workflows import slurmctld, stopped

from snakemake_executor_plugin_schlouder.lease import Lease
from snakemake_executor_plugin_schlouder.localcloud import LocalCloud
from snakemake_executor_plugin_schlouder.model import SlurmOptions
from snakemake_executor_plugin_schlouder.slurm import (
    Cluster,
    ClusterUnavailable,
    ClusterUnfit,
    JobRequest,
    JobStatus,
    NodeStatus,
    SubmissionRefused,
)
from snakemake_executor_plugin_schlouder.slurm.cli import NodeJob, SlurmCommands
from snakemake_executor_plugin_schlouder.slurm.rpc import SlurmRpc, choose
from snakemake_executor_plugin_schlouder.slurm.script import Exit, exit_of, job_script
from snakemake_executor_plugin_schlouder.slurm.states import JobPhase, sentence_of

pytestmark = pytest.mark.integration

PARTITION = "schlouder"
NODE = "contract"
LOGGER = logging.getLogger(__name__)
ENDED = (JobPhase.SUCCEEDED, JobPhase.FAILED, JobPhase.LOST)


@pytest.fixture(scope="module")
def vms(cloud: LocalCloud) -> Iterator[Vms]:
    """The cloud's VMs, one of which has joined Slurm as NODE with 8 CPUs."""
    vms = Vms(cloud)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cloud.environment().items():
            patch.setenv(name, value)
        vms.join(NODE)
        yield vms
    vms.terminate_all()


def adapter(api: str) -> Cluster:
    commands = SlurmCommands(PARTITION, {"AWS_SESSION_TOKEN": "passed"})
    try:
        return choose(api, commands, commands.check(), LOGGER)
    except ClusterUnfit as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def adapters(vms: Vms) -> list[Cluster]:
    """Both, for what they must have in common."""
    return [adapter("cli"), adapter("pyslurm")]


@pytest.fixture(scope="module", params=["cli", "pyslurm"])
def slurm(vms: Vms, request: pytest.FixtureRequest) -> Cluster:
    return adapter(request.param)


@pytest.fixture
def run(vms: Vms) -> Iterator[str]:
    """The name of a run; its jobs are gone after the test."""
    name = f"schlouder-{uuid.uuid4().hex[:8]}"
    yield name
    vms.slurm("scancel", f"--name={name}")
    until(lambda: not vms.slurm("squeue", "-h", f"--name={name}"))


@pytest.fixture
def job(run: str, tmp_path: Path) -> JobRequest:
    """Sleeps until it is cancelled."""
    return JobRequest(
        key=f"{run}-1.1",
        run=run,
        node=NODE,
        script="#!/bin/sh\nexec sleep 1000\n",
        cpus=1,
        memory=500,
        limit=90.0,
        workdir=tmp_path,
        log=str(tmp_path / "log"),
        partition=PARTITION,
    )


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, situation()
        time.sleep(0.05)


def situation() -> str:
    """What Slurm has to say when something did not come true."""
    commands = (["squeue", "--states=all"], ["sinfo", "-N", "-o%N %T %E"], ["sdiag"])
    return "\n".join(
        subprocess.run(command, capture_output=True, text=True, check=False).stdout
        for command in commands
    )


def submit(slurm: Cluster, *jobs: JobRequest) -> list[str]:
    outcomes = slurm.submit(jobs)
    assert [type(outcome) for outcome in outcomes] == [str] * len(jobs), outcomes
    return [str(outcome) for outcome in outcomes]


def phase(slurm: Cluster, job: JobRequest) -> JobPhase | None:
    jobs = slurm.view(job.run).jobs
    return jobs[job.key].phase if job.key in jobs else None


def completed(slurm: Cluster, job: JobRequest) -> str:
    """The log of a job that is run to its end."""
    submit(slurm, job)
    until(lambda: phase(slurm, job) in ENDED)
    return Path(job.log).read_text(errors="surrogateescape")


def shown(vms: Vms, slurm_id: str) -> dict[str, str]:
    """The fields of `scontrol show job`."""
    text = vms.slurm("scontrol", "--oneliner", "show", "job", slurm_id)
    return {key: value for key, _, value in (word.partition("=") for word in text.split())}


@pytest.fixture
def node(vms: Vms) -> Iterator[str]:
    """A node of the test's own."""
    name = f"n{uuid.uuid4().hex[:8]}"
    instance_id = vms.join(name)
    yield name
    vms.ec2.terminate_instances(InstanceIds=[instance_id])
    vms.wait_for_state(instance_id, "terminated")
    SlurmCommands(PARTITION).fail(name, "test over")
    until(lambda: SlurmCommands(PARTITION).delete(name))


class TestJobs:
    def test_one_runs_and_completes(self, slurm: Cluster, job: JobRequest) -> None:
        begin = time.time()
        exit_file = f"{job.workdir}/exit"
        job = replace(job, script=job_script("a task", "echo done", exit_file))
        assert completed(slurm, job) == "done\n"
        status = slurm.view(job.run).jobs[job.key]
        assert (status.phase, status.state) == (JobPhase.SUCCEEDED, "COMPLETED")
        assert status.started is not None and status.ended is not None
        assert begin - 1 <= status.started <= status.ended <= time.time()
        assert exit_of(exit_file) == Exit(0)

    def test_one_that_fails_leaves_its_exit_code(self, slurm: Cluster, job: JobRequest) -> None:
        exit_file = f"{job.workdir}/exit"
        completed(slurm, replace(job, script=job_script("a task", "exit 7", exit_file)))
        status = slurm.view(job.run).jobs[job.key]
        assert (status.phase, status.state) == (JobPhase.FAILED, "FAILED")
        assert exit_of(exit_file) == Exit(7)

    def test_one_that_cannot_end_before_its_deadline_is_removed(
        self, slurm: Cluster, job: JobRequest
    ) -> None:
        options = SlurmOptions(extra=("--deadline=now+63",))
        submit(slurm, replace(job, key="first", cpus=8))
        submit(slurm, replace(job, cpus=8, limit=60.0, options=options))
        until(lambda: phase(slurm, job) == JobPhase.FAILED)
        state = slurm.view(job.run).jobs[job.key].state
        assert sentence_of(state) == "could not end before its deadline"

    def test_what_slurm_is_told(self, slurm: Cluster, vms: Vms, job: JobRequest) -> None:
        options = SlurmOptions(account="lab", constraint="schlouder", tasks=2)
        job = replace(job, cpus=6, options=options)
        fields = shown(vms, submit(slurm, job)[0])
        expected = {
            "JobName": job.run,
            "Comment": job.key,
            "Account": "lab",
            "Partition": PARTITION,
            "ReqNodeList": NODE,
            "NumNodes": "1",
            "NumTasks": "2",
            "CPUs/Task": "3",
            "NumCPUs": "6",
            "MinMemoryNode": "500M",
            "TimeLimit": "00:02:00",
            "Features": "schlouder",
            "Requeue": "0",
            "BatchFlag": "1",
            "OverSubscribe": "OK",
            "WorkDir": str(job.workdir),
            "StdIn": "/dev/null",
            "StdOut": job.log,
            "StdErr": job.log,
        }
        assert {key: fields.get(key) for key in expected} == expected | {
            "NumNodes": fields["NumNodes"]
        }

    def test_a_job_without_limit_gets_the_partitions(
        self, slurm: Cluster, vms: Vms, job: JobRequest
    ) -> None:
        (slurm_id,) = submit(slurm, replace(job, limit=None))
        # Slurm's backfill makes a year of it when it starts the job.
        assert shown(vms, slurm_id)["TimeLimit"] in ("UNLIMITED", "365-00:00:00")

    def test_options_of_sbatch_keep_their_place_in_a_batch(
        self, slurm: Cluster, vms: Vms, job: JobRequest
    ) -> None:
        nice = SlurmOptions(extra=("--nice=5",))
        plain, special = replace(job, key="plain"), replace(job, key="special", options=nice)
        ids = submit(slurm, plain, special, replace(plain, key="last"))
        seen = [(shown(vms, one)["Comment"], shown(vms, one)["Nice"]) for one in ids]
        assert seen == [("plain", "0"), ("special", "5"), ("last", "0")]

    def test_a_reservation_is_used(self, slurm: Cluster, vms: Vms, job: JobRequest) -> None:
        name = f"r{uuid.uuid4().hex[:8]}"
        reservation = ["nodes=" + NODE, "users=root", "starttime=now", "duration=60"]
        vms.slurm("scontrol", "create", f"reservationname={name}", *reservation)
        try:
            job = replace(job, options=SlurmOptions(reservation=name))
            (slurm_id,) = submit(slurm, job)
            assert shown(vms, slurm_id)["Reservation"] == name
        finally:
            slurm.cancel_run(job.run)
            until(lambda: phase(slurm, job) in ENDED)
            vms.slurm("scontrol", "delete", f"reservationname={name}")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"partition": "nowhere"}, "partition"),
            ({"node": "no-such-node"}, "node name"),
            ({"options": SlurmOptions(reservation="never")}, "reservation"),
            ({"options": SlurmOptions(constraint="warp-drive")}, "feature"),
            ({"options": SlurmOptions(gres="gpu:1")}, "gres"),
            ({"options": SlurmOptions(extra=("--no-such-option",))}, "option|sbatch"),
            ({"script": "no interpreter"}, "script|interpreter|sbatch"),
        ],
    )
    def test_what_slurm_will_not_have_is_refused_and_the_rest_goes_on(
        self, slurm: Cluster, job: JobRequest, change: dict[str, object], message: str
    ) -> None:
        bad = replace(job, key="bad", **change)  # type: ignore[arg-type]
        refused, taken = slurm.submit([bad, job])
        assert isinstance(refused, SubmissionRefused)
        with pytest.raises(SubmissionRefused, match=rf"(?i){message}"):
            raise refused
        assert isinstance(taken, str)
        assert set(slurm.view(job.run).jobs) == {job.key}

    @pytest.mark.parametrize(
        "name",
        [
            'it\'s "here"',
            "$(touch oops); `id` & | > x",
            "né 名前 🧬",
            "a\nb",
            "100%j %N",
            "x" * 200,
        ],
    )
    def test_names_are_only_names(self, slurm: Cluster, job: JobRequest, name: str) -> None:
        folder = job.workdir / name.replace("/", " ")
        folder.mkdir()
        script = f"#!/bin/sh\npwd; cat <<'EOF'\n{name}\nEOF\n"
        job = replace(job, workdir=folder, log=f"{folder}/{folder.name[:200]}.log", script=script)
        assert completed(slurm, job) == f"{folder}\n{name}\n"
        assert [path.name for path in folder.iterdir()] == [f"{folder.name[:200]}.log"]

    def test_a_long_script_arrives_whole(self, slurm: Cluster, job: JobRequest) -> None:
        lines = "".join(f": {number:060}\n" for number in range(5000))
        assert completed(slurm, replace(job, script=f"#!/bin/sh\n{lines}echo end\n")) == "end\n"

    def test_a_carriage_return_stays_one(self, slurm: Cluster, job: JobRequest) -> None:
        log = completed(slurm, replace(job, script="#!/bin/sh\nprintf '%s' 'a\rb' | od -An -c\n"))
        assert log.split() == ["a", r"\r", "b"]

    def test_a_batch_keeps_its_order(self, slurm: Cluster, job: JobRequest) -> None:
        jobs = [replace(job, key=f"{job.run}-{number}.1") for number in range(250)]
        ids = submit(slurm, *jobs)
        found = slurm.view(job.run).jobs
        assert [found[one.key].slurm_id for one in jobs] == ids

    def test_a_waiting_one_says_for_what(self, slurm: Cluster, job: JobRequest) -> None:
        submit(slurm, replace(job, key="first", cpus=8))
        submit(slurm, replace(job, cpus=8))
        until(lambda: slurm.view(job.run).jobs[job.key].reason in ("Resources", "Priority"))
        assert phase(slurm, job) == JobPhase.WAITING


class TestSeveralNodes:
    @pytest.fixture
    def wide(self, job: JobRequest, node: str) -> JobRequest:
        """Three tasks with two CPUs each on NODE and another one."""
        return replace(job, companions=(node,), cpus=4, options=SlurmOptions(tasks=3))

    def test_a_job_has_its_part_of_each(self, slurm: Cluster, vms: Vms, wide: JobRequest) -> None:
        fields = shown(vms, submit(slurm, wide)[0])
        expected = {
            "NumTasks": "3",
            "CPUs/Task": "2",
            "MinCPUsNode": "4",
            "MinMemoryNode": "500M",
        }
        assert {key: fields.get(key) for key in expected} == expected
        assert set(fields["ReqNodeList"].split(",")) == set(wide.nodes)
        until(lambda: phase(slurm, wide) == JobPhase.RUNNING)
        assert set(slurm.foreign_jobs("another-run")) == set(wide.nodes)

    def test_its_steps_reach_all_of_them(self, slurm: Cluster, wide: JobRequest) -> None:
        command = "echo $SLURM_NTASKS $SLURM_TASKS_PER_NODE $SLURM_JOB_CPUS_PER_NODE; srun hostname"
        script = job_script("wide", command, f"{wide.workdir}/exit")
        (shares, *hosts) = completed(slurm, replace(wide, script=script)).splitlines()
        assert shares == "3 2,1 4(x2)"
        assert len(hosts) == 3
        assert set(hosts) == set(wide.nodes)

    def test_it_is_lost_with_any_of_them(self, slurm: Cluster, wide: JobRequest) -> None:
        submit(slurm, wide)
        until(lambda: phase(slurm, wide) == JobPhase.RUNNING)
        slurm.fail(wide.companions[0], "machine lost")
        until(lambda: phase(slurm, wide) == JobPhase.LOST)


def submit_as_nobody(vms: Vms, job: JobRequest) -> list[str]:
    """The id of a job that looks like `job` and is of another user."""
    done = subprocess.run(
        [
            *("sbatch", "--parsable", f"--job-name={job.run}", f"--comment={job.key}"),
            *(f"--nodelist={NODE}", "--chdir=/tmp", "--output=/dev/null", "--wrap=sleep 100"),
        ],
        env={**os.environ, **vms.environment},
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


class TestCancel:
    def test_one(self, slurm: Cluster, job: JobRequest) -> None:
        other = replace(job, key="other")
        first, _ = submit(slurm, job, other)
        until(lambda: phase(slurm, job) == JobPhase.RUNNING)
        slurm.cancel({first: "other"})
        slurm.cancel({first: job.key})
        until(lambda: phase(slurm, job) == JobPhase.FAILED)
        assert slurm.view(job.run).jobs[job.key].state == "CANCELLED"
        assert phase(slurm, other) in (JobPhase.WAITING, JobPhase.RUNNING)
        slurm.cancel({first: job.key})

    def test_a_whole_run_and_no_other(self, slurm: Cluster, vms: Vms, job: JobRequest) -> None:
        theirs = replace(job, run=f"{job.run}x")
        submit(slurm, job, replace(job, key="second"), theirs)
        try:
            slurm.cancel_run(job.run)
            until(lambda: {s.phase for s in slurm.view(job.run).jobs.values()} == {JobPhase.FAILED})
            assert len(slurm.view(job.run).jobs) == 2
            assert phase(slurm, theirs) in (JobPhase.WAITING, JobPhase.RUNNING)
        finally:
            vms.slurm("scancel", f"--name={theirs.run}")

    @pytest.mark.skipif(os.geteuid() != 0, reason="submits as another user")
    def test_a_job_of_another_user_with_our_name_and_key_is_not_ours(
        self, slurm: Cluster, vms: Vms, job: JobRequest
    ) -> None:
        """Anybody may choose them; and an operator may cancel the jobs of all."""
        (forged,) = submit_as_nobody(vms, job)
        try:
            until(lambda: slurm.foreign_jobs(job.run) == {NODE: [forged]})
            theirs = NodeJob(forged, job.run, is_mine=False)
            assert SlurmCommands(PARTITION).jobs_on([NODE]) == {NODE: [theirs]}
            assert slurm.view(job.run).jobs == {}
            slurm.cancel_run(job.run)
            (ours,) = submit(slurm, job)
            assert slurm.view(job.run).jobs[job.key].slurm_id == ours
            slurm.cancel_run(job.run)
            until(lambda: phase(slurm, job) == JobPhase.FAILED)
            assert vms.slurm("squeue", "-hj", forged, "-o%T") == "RUNNING"
        finally:
            vms.slurm("scancel", forged)

    def test_a_job_that_never_was_is_not_known(self, slurm: Cluster, job: JobRequest) -> None:
        (slurm_id,) = submit(slurm, job)
        assert slurm.knows(slurm_id, job.key)
        assert not slurm.knows(slurm_id, f"{job.key}x")
        assert not slurm.knows("99999999", job.key)

    def test_jobs_of_others_are_told_from_ours(self, slurm: Cluster, job: JobRequest) -> None:
        (slurm_id,) = submit(slurm, job)
        until(lambda: phase(slurm, job) == JobPhase.RUNNING)
        assert slurm.foreign_jobs("another-run") == {NODE: [slurm_id]}
        assert slurm.foreign_jobs(job.run) == {}


class TestNodes:
    def test_a_node_by_what_runs_there(self, slurm: Cluster, job: JobRequest) -> None:
        until(lambda: slurm.view(job.run).nodes[NODE].state == "idle")
        assert slurm.view(job.run).nodes[NODE].accepts_jobs
        submit(slurm, job)
        until(lambda: slurm.view(job.run).nodes[NODE].state == "mixed")
        submit(slurm, replace(job, key="rest", cpus=7))
        until(lambda: slurm.view(job.run).nodes[NODE].state == "allocated")

    def test_a_drained_node_ends_its_jobs_first_and_can_then_be_deleted(
        self, slurm: Cluster, job: JobRequest, node: str
    ) -> None:
        job = replace(job, node=node)
        (slurm_id,) = submit(slurm, job)
        until(lambda: phase(slurm, job) == JobPhase.RUNNING)
        slurm.drain([node, "no-such-node"], "no work | left é")
        status = slurm.view(job.run).nodes[node]
        assert (status.state, status.reason) == ("draining", "no work | left é")
        assert not status.accepts_jobs and not status.is_drained
        assert not slurm.delete(node)
        slurm.cancel({slurm_id: job.key})
        until(lambda: slurm.view(job.run).nodes[node].is_drained)
        assert slurm.view(job.run).nodes[node].state == "drained"
        until(lambda: slurm.delete(node))
        assert node not in slurm.view(job.run).nodes

    def test_jobs_of_a_failed_node_are_lost(
        self, slurm: Cluster, job: JobRequest, node: str
    ) -> None:
        job = replace(job, node=node)
        submit(slurm, job)
        until(lambda: phase(slurm, job) == JobPhase.RUNNING)
        slurm.fail(node, "machine lost")
        until(lambda: phase(slurm, job) == JobPhase.LOST)
        assert slurm.view(job.run).jobs[job.key].state == "NODE_FAIL"

    def test_leases_are_written_on_all_nodes_that_are_there(
        self, slurm: Cluster, node: str
    ) -> None:
        first, last = Lease("r1", 7200, 17), Lease("r2", 3600, 18, kept=True)
        # Slurm takes them in the order of their names, and stops at the first that it does not know.
        slurm.renew(["a-node-that-was", NODE, node, "no-such-node"], first)
        assert leases(node) == {NODE: first, node: first}
        slurm.renew([node], last)
        slurm.renew(["no-such-node"], last)
        slurm.renew([], last)
        assert leases(node) == {NODE: first, node: last}

    def test_of_nodes_to_be_drained_one_may_be_unknown(self, slurm: Cluster, node: str) -> None:
        slurm.drain(["a-node-that-was", node], "no work left")
        until(lambda: slurm.view("no-run").nodes[node].is_drained)

    def test_nothing_is_to_be_done_about_a_node_that_is_not_there(self, slurm: Cluster) -> None:
        slurm.drain(["no-such-node"], "gone")
        slurm.drain([], "nobody")
        slurm.fail("no-such-node", "gone")
        assert slurm.delete("no-such-node")

    def test_the_controller_is_described(self, slurm: Cluster, vms: Vms) -> None:
        info = slurm.check()
        assert info.controller == f"{vms.cloud.gateway}:{vms.slurm_conf('SlurmctldPort')}"


def leases(*nodes: str) -> dict[str, Lease]:
    found = SlurmCommands(PARTITION).leases()
    return {name: found[name] for name in (NODE, *nodes) if name in found}


class TestSilence:
    @pytest.fixture
    def impatient(self, vms: Vms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Clients that wait 3 s for slurmctld."""
        conf = Path(os.environ["SLURM_CONF"]).read_text()
        (tmp_path / "slurm.conf").write_text(f"{conf}MessageTimeout=3\n")
        monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))

    @pytest.mark.parametrize("api", ["cli", "pyslurm"])
    def test_a_silent_slurmctld_is_unavailable_and_holds_up_no_other_thread(
        self, impatient: None, vms: Vms, job: JobRequest, api: str
    ) -> None:
        slurm = adapter(api)
        outcomes: list[object] = []

        def ask() -> None:
            with pytest.raises(ClusterUnavailable):
                slurm.view(job.run)
            with pytest.raises(ClusterUnavailable):
                slurm.renew([NODE], Lease("r1", 7200, 19))
            outcomes.extend(slurm.submit([job] * 50))

        asking = threading.Thread(target=ask)
        with stopped(slurmctld(vms.cloud)):
            asking.start()
            turns = 0
            while asking.is_alive():
                time.sleep(0.01)
                turns += 1
        assert turns > 100
        assert {type(outcome) for outcome in outcomes} == {ClusterUnavailable}
        assert len(outcomes) < 50, "the rest is not tried"
        until(lambda: answers(slurm, job.run))


def answers(slurm: Cluster, run: str) -> bool:
    try:
        return NODE in slurm.view(run).nodes
    except ClusterUnavailable:
        return False


class TestBoth:
    def test_give_jobs_the_same_surroundings(
        self, adapters: list[Cluster], job: JobRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever the submitting process has: odd variables, umask, limits, priority."""
        monkeypatch.setenv("LINES_AND_É", "a\nb 'c' \"d\" $(e)")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_SESSION_TOKEN", "passed")
        monkeypatch.setenv("SLURM_MEM_PER_CPU", "7")
        monkeypatch.setenv("SBATCH_ACCOUNT", "x")
        monkeypatch.setitem(os.environb, b"NOT_UTF8", b"caf\xe9")
        script = "#!/bin/sh\nenv -0 | sort -z | tr '\\0\\n' '\\n '; umask; ulimit -a; nice; cat\n"
        logs = []
        before = os.umask(0o027)
        try:
            for number, api in enumerate(("cli", "pyslurm")):
                one = replace(job, key=f"k{number}", script=script, log=f"{job.workdir}/{api}")
                logs.append(completed(adapter(api), one).splitlines())
        finally:
            os.umask(before)
        differing = ("SLURM_JOB_ID=", "SLURM_JOBID=", "SLURM_TASK_PID=")
        first, second = ([line for line in log if not line.startswith(differing)] for log in logs)
        assert first == second
        assert {"SLURM_JOB_NAME=" + job.run, "AWS_SESSION_TOKEN=passed", "0027"} <= set(first)
        assert not [line for line in first if line.startswith(("SBATCH_", "AWS_SECRET"))]

    def test_see_the_same(self, adapters: list[Cluster], job: JobRequest) -> None:
        """Waiting, running and ended jobs, and what becomes of the node meanwhile."""
        cli, rpc = adapters
        for key, limit in (("a", 90.0), ("b", None), ("c", 7200.0)):
            submit(rpc, replace(job, key=key, cpus=4, limit=limit))
        until(lambda: phase(cli, replace(job, key="b")) == JobPhase.RUNNING)
        same_view(cli, rpc, job.run)
        cli.drain([NODE], "just so")
        same_view(cli, rpc, job.run)
        cli.cancel_run(job.run)
        same_view(cli, rpc, job.run)
        until(lambda: cli.view(job.run).nodes[NODE].is_drained)
        same_view(cli, rpc, job.run)


def same_view(cli: Cluster, rpc: Cluster, run: str) -> None:
    """Tries again where something changed between the two looks."""
    views = [(parts(cli, run), parts(rpc, run)) for _ in range(10)]
    assert any(one == other for one, other in views), views[-1][0] ^ views[-1][1]


def parts(slurm: Cluster, run: str) -> set[JobStatus | NodeStatus]:
    view = slurm.view(run)
    return {*view.jobs.values(), *view.nodes.values()}


class TestLostWorker:
    def test_the_commands_take_over(
        self, adapters: list[Cluster], job: JobRequest, caplog: pytest.LogCaptureFixture
    ) -> None:
        slurm = adapter("pyslurm")
        assert isinstance(slurm, SlurmRpc)
        (worker,) = slurm._idle
        os.kill(worker._process.pid, signal.SIGKILL)
        assert NODE in slurm.view(job.run).nodes
        submit(slurm, job)
        assert "ended with code -9" in caplog.text
