"""The embedded cloud, for real: Slurm, the EC2 endpoint and VMs. Needs root."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore.exceptions import ClientError
from workflows import as_nobody

import snakemake_executor_plugin_schlouder
import snakemake_executor_plugin_schlouder.localcloud.run
from snakemake_executor_plugin_schlouder import cli
from snakemake_executor_plugin_schlouder.ec2.joining import Join, node_configuration, user_data
from snakemake_executor_plugin_schlouder.localcloud import (
    STATE_ROOT,
    LocalCloud,
    LocalCloudError,
    Options,
    down,
)
from snakemake_executor_plugin_schlouder.localcloud.controller import slurm_version
from snakemake_executor_plugin_schlouder.localcloud.network import host_link
from snakemake_executor_plugin_schlouder.model import InstanceType

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client
    from mypy_boto3_ec2.type_defs import InstanceTypeDef

PACKAGE = Path(snakemake_executor_plugin_schlouder.__file__).parent
SLEEP = "#!/bin/sh\nexec sleep 1000\n"
NODE_CONF = "CPUs=8 RealMemory=16000 Feature=schlouder"
KIND = InstanceType("m5.large", 2, 8192)
NAMESPACES = ("mnt", "net", "pid", "uts", "ipc")


def own(name: str) -> str:
    """The name of a cloud that no other run of these tests uses."""
    return f"{name}-{os.getpid()}"


class Vms:
    """Launches instances of one cloud and looks at them."""

    def __init__(self, cloud: LocalCloud) -> None:
        self.cloud = cloud
        self.environment = cloud.environment()
        self.ec2: EC2Client = boto3.client(
            "ec2",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            region_name=self.environment["AWS_DEFAULT_REGION"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    def run(self, user_data: str = SLEEP, **arguments: Any) -> str:
        """The id of one new instance."""
        return self.launch(user_data, **arguments)[0]["InstanceId"]

    def launch(self, user_data: str = SLEEP, **arguments: Any) -> list[InstanceTypeDef]:
        """What RunInstances answers, for one new instance."""
        defaults: dict[str, Any] = {
            "ImageId": self.environment["SNAKEMAKE_SCHLOUDER_IMAGE"],
            "SubnetId": self.environment["SNAKEMAKE_SCHLOUDER_SUBNETS"],
            "InstanceType": "m5.large",
            "IamInstanceProfile": {"Name": "schlouder-node"},
            "InstanceInitiatedShutdownBehavior": "terminate",
            "MinCount": 1,
            "MaxCount": 1,
            "UserData": user_data,
        }
        chosen = {key: value for key, value in {**defaults, **arguments}.items() if value}
        return self.ec2.run_instances(**chosen)["Instances"]

    def join(self, node: str, conf: str = NODE_CONF, **arguments: Any) -> str:
        """The id of a new instance that joins Slurm, and is idle when this returns."""
        user_data = self.user_data(node).replace(node_configuration(KIND), conf)
        instance_id = self.run(user_data, **arguments)
        wait(lambda: self.slurm("sinfo", "-hNn", node, "-o%T") == "idle", self.console, instance_id)
        return instance_id

    def user_data(self, *nodes: str, market: str = "on-demand", **join: Any) -> str:
        facts = {
            "controller": f"{self.cloud.gateway}:{self.slurm_conf('SlurmctldPort')}",
            "munge_socket": self.slurm_conf("AuthInfo").removeprefix("socket="),
            "key": self.environment["SNAKEMAKE_SCHLOUDER_CLUSTER_KEY"],
            "slurm": slurm_version(),
        }
        region = self.environment["SNAKEMAKE_SCHLOUDER_REGION"]
        endpoint = self.environment["AWS_ENDPOINT_URL"]
        return user_data(Join(**{**facts, **join}), region, endpoint, nodes, KIND, market)

    def slurm_conf(self, key: str) -> str:
        lines = Path(self.environment["SLURM_CONF"]).read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)[key]

    def slurm(self, *command: str) -> str:
        environment = {**os.environ, **self.environment}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    def describe(self, instance_id: str) -> Any:
        answer = self.ec2.describe_instances(InstanceIds=[instance_id])
        return answer["Reservations"][0]["Instances"][0]

    def state(self, instance_id: str) -> str:
        return str(self.describe(instance_id)["State"]["Name"])

    def console(self, instance_id: str) -> str:
        return self.ec2.get_console_output(InstanceId=instance_id)["Output"]

    def wait_for_state(self, instance_id: str, state: str) -> None:
        wait(lambda: self.state(instance_id) == state, self.console, instance_id)

    def terminate_all(self) -> None:
        for reservation in self.ec2.describe_instances()["Reservations"]:
            ids = [instance["InstanceId"] for instance in reservation["Instances"]]
            self.ec2.terminate_instances(InstanceIds=ids)
            for instance_id in ids:
                self.wait_for_state(instance_id, "terminated")
        nodes = self.slurm("sinfo", "-hN", "-o%N").split()
        if nodes:
            self.slurm("scontrol", "delete", f"nodename={','.join(nodes)}")


def wait(condition: Callable[[], bool], explain: Callable[[Any], str], about: Any) -> None:
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, explain(about)
        time.sleep(0.02)


@pytest.fixture
def vms(cloud: LocalCloud) -> Iterator[Vms]:
    """The cloud's VMs; all of them are terminated after the test."""
    vms = Vms(cloud)
    yield vms
    vms.terminate_all()


def in_vm(vms: Vms, script: str) -> list[str]:
    """The lines that a shell script writes to the console of a new VM, without the last, which is its end."""
    instance_id = vms.run(f"#!/bin/sh\n{script}\n")
    wait(lambda: "user data ended" in vms.console(instance_id), vms.console, instance_id)
    return vms.console(instance_id).splitlines()[:-1]


@pytest.mark.integration
class TestVm:
    def test_joins_as_a_dynamic_node_and_runs_a_job_pinned_to_it(
        self, vms: Vms, tmp_path: Path
    ) -> None:
        instance_id = vms.join("node-a")
        output = tmp_path / "job.out"
        script = "hostname; ip -4 -o address show eth0; echo cpus=$SLURM_CPUS_ON_NODE"
        job = ["sbatch", "--wait", "--nodelist=node-a", "-c8", f"-o{output}", f"--chdir={tmp_path}"]
        start = time.monotonic()
        vms.slurm(*job, f"--wrap={script}")
        assert time.monotonic() - start < 15
        hostname, address, cpus = output.read_text().splitlines()
        assert hostname == "node-a"
        assert f" {vms.describe(instance_id)['PrivateIpAddress']}/20 " in address
        assert cpus == "cpus=8"

    def test_may_be_bigger_than_this_machine(self, vms: Vms) -> None:
        vms.join("big", "CPUs=96 RealMemory=700000 Feature=schlouder")
        assert vms.slurm("sinfo", "-hNn", "big", "-o%c %m %T") == "96 700000 idle"

    def test_next_job_of_a_node_starts_when_one_ends(self, vms: Vms, tmp_path: Path) -> None:
        vms.join("busy")
        job = ["sbatch", "--nodelist=busy", "-c8", "-o/dev/null", f"--chdir={tmp_path}"]
        start = time.monotonic()
        for number in range(3):
            vms.slurm(*job, f"--wrap=touch {tmp_path}/{number}")
        wait(lambda: len(list(tmp_path.iterdir())) == 3, vms.slurm, "squeue")
        assert time.monotonic() - start < 15

    def test_sees_shared_directories_and_keeps_all_else_to_itself(
        self, vms: Vms, tmp_path: Path
    ) -> None:
        private = Path(f"/usr/local/schlouder-test-{os.getpid()}")
        in_vm(vms, f"touch {private} {tmp_path}/shared /etc/schlouder-test /run/schlouder-test")
        assert (tmp_path / "shared").exists()
        assert not private.exists()
        assert not Path("/etc/schlouder-test").exists()

    def test_does_not_see_the_munge_key_of_the_host(self, vms: Vms) -> None:
        assert in_vm(vms, "find /etc/munge /etc/slurm /run /var/log -type f") == []

    def test_user_data_does_not_hold_the_munge_key(self, vms: Vms) -> None:
        key = (vms.cloud.folder / "munge" / "munge.key").read_bytes()
        instance_id = vms.run(vms.user_data("secret"))
        answer = vms.ec2.describe_instance_attribute(InstanceId=instance_id, Attribute="userData")
        assert base64.b64encode(key).decode() not in vms.user_data("secret")
        assert base64.b64decode(answer["UserData"]["Value"]).decode() == vms.user_data("secret")

    def test_without_instance_profile_says_why_it_cannot_join_and_ends_itself(
        self, vms: Vms
    ) -> None:
        instance_id = vms.run(vms.user_data("poor"), IamInstanceProfile=None)
        vms.wait_for_state(instance_id, "terminated")
        assert "no instance profile" in vms.console(instance_id)
        reason = vms.describe(instance_id)["StateReason"]
        assert reason["Code"] == "Client.InstanceInitiatedShutdown"

    def test_stays_up_when_user_data_fails(self, vms: Vms) -> None:
        instance_id = vms.run("#!/bin/sh\necho oh no >&2\nexit 3\n")
        wait(lambda: "exit code 3" in vms.console(instance_id), vms.console, instance_id)
        assert vms.console(instance_id).startswith("oh no\n")
        assert vms.state(instance_id) == "running"

    def test_stops_instead_of_terminating_when_asked_to(self, vms: Vms) -> None:
        instance_id = vms.run("#!/bin/sh\npoweroff\n", InstanceInitiatedShutdownBehavior="stop")
        vms.wait_for_state(instance_id, "stopped")

    def test_leaves_no_process_behind(self, vms: Vms) -> None:
        marker = f"31{os.getpid()}"
        instance_id = vms.run(f"#!/bin/sh\nsetsid sleep {marker} &\nsleep {marker}\n")
        wait(lambda: processes_with(marker) == 2, vms.console, instance_id)
        vms.ec2.terminate_instances(InstanceIds=[instance_id])
        vms.wait_for_state(instance_id, "terminated")
        assert processes_with(marker) == 0


def processes_with(argument: str) -> int:
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += argument.encode() in path.read_bytes().split(b"\0")
        except OSError:
            continue
    return found


@pytest.mark.integration
class TestMetadata:
    def test_needs_a_session_token(self, vms: Vms) -> None:
        url = "http://169.254.169.254/latest"
        status = "curl -s -o /dev/null -w '%{http_code}\\n'"
        lines = in_vm(
            vms,
            f"{status} {url}/meta-data/instance-id\n"
            f"{status} -X PUT {url}/api/token\n"
            f"t=$(curl -s -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' {url}/api/token)\n"
            f'{status} -H "X-aws-ec2-metadata-token: $t" {url}/meta-data/instance-id\n'
            f'{status} -H "X-aws-ec2-metadata-token: $t" {url}/meta-data/spot/instance-action\n',
        )
        assert lines == ["401", "400", "200", "404"]

    def test_is_closed_to_jobs_of_users_once_the_node_has_joined(
        self, vms: Vms, tmp_path: Path
    ) -> None:
        vms.join("closed")
        ask = "curl -s -m1 -o /dev/null -w '%{http_code} ' http://169.254.169.254/latest/; :"
        as_user = f"setpriv --reuid 65534 --regid 65534 --clear-groups sh -c {shlex.quote(ask)}"
        job = ["sbatch", "--wait", "--nodelist=closed", f"-o{tmp_path}/out", f"--chdir={tmp_path}"]
        vms.slurm(*job, f"--wrap={ask}; {as_user}")
        assert (tmp_path / "out").read_text() == "401 000 "


@pytest.mark.integration
class TestEc2:
    def test_is_pending_then_running_then_terminated(self, vms: Vms) -> None:
        instance = vms.launch()[0]
        assert instance["State"]["Name"] == "pending"
        instance_id = instance["InstanceId"]
        vms.wait_for_state(instance_id, "running")
        vms.ec2.terminate_instances(InstanceIds=[instance_id])
        assert vms.state(instance_id) in ("shutting-down", "terminated")
        vms.wait_for_state(instance_id, "terminated")

    def test_gives_as_many_instances_as_asked_for(self, vms: Vms) -> None:
        answer = vms.ec2.run_instances(
            ImageId=vms.environment["SNAKEMAKE_SCHLOUDER_IMAGE"], MinCount=1, MaxCount=3
        )
        assert len({i["PrivateIpAddress"] for i in answer["Instances"]}) == 3

    def test_same_token_gives_the_same_instance(self, vms: Vms) -> None:
        assert vms.run(ClientToken="a") == vms.run(ClientToken="a")

    def test_same_token_with_other_parameters_is_refused(self, vms: Vms) -> None:
        vms.run(ClientToken="b")
        assert refusal(vms.run, ClientToken="b", InstanceType="m5.xlarge") == (
            "IdempotentParameterMismatch"
        )

    def test_token_of_a_terminated_instance_is_refused(self, vms: Vms) -> None:
        instance_id = vms.run(ClientToken="c")
        vms.ec2.terminate_instances(InstanceIds=[instance_id])
        assert refusal(vms.run, ClientToken="c") == "IdempotentInstanceTerminated"

    def test_refuses_what_does_not_exist(self, vms: Vms) -> None:
        assert refusal(vms.run, ImageId="ami-00000000") == "InvalidAMIID.NotFound"
        assert refusal(vms.run, SubnetId="subnet-00000000") == "InvalidSubnetID.NotFound"
        assert refusal(vms.run, InstanceType="m5.tiny").startswith("Invalid")
        assert refusal(vms.run, IamInstanceProfile={"Name": "nobody"}).startswith("Invalid")
        assert refusal(vms.console, "i-00000000").startswith("InvalidInstanceID")
        assert (
            vms.ec2.describe_instances(
                Filters=[{"Name": "instance-state-name", "Values": ["pending", "running"]}]
            )["Reservations"]
            == []
        )

    def test_a_launch_that_was_refused_leaves_its_token_free(self, vms: Vms) -> None:
        refusal(vms.run, ClientToken="d", SubnetId="subnet-00000000")
        assert vms.run(ClientToken="d")


def refusal(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(ClientError) as caught:
        call(*arguments, **keywords)
    return str(caught.value.response["Error"]["Code"])


@pytest.mark.integration
class TestSeveralClouds:
    def test_two_run_side_by_side(self, cloud: LocalCloud) -> None:
        with LocalCloud.up(Options(own("second"), (0.0, 0.0), [PACKAGE])) as second:
            assert second.gateway != cloud.gateway
            assert {cloud.name, second.name} <= {one.name for one in LocalCloud.all()}
            one, two = Vms(cloud), Vms(second)
            one.join("same-name")
            two.join("same-name")
            one.terminate_all()
            assert two.slurm("sinfo", "-hN", "-o%N %T") == "same-name idle"
        assert LocalCloud.find(second.name) is None

    def test_a_name_that_is_up_is_refused(self, cloud: LocalCloud) -> None:
        with pytest.raises(LocalCloudError, match="already up"):
            LocalCloud.up(Options(cloud.name, (0.0, 0.0), [PACKAGE]))


@dataclass(frozen=True)
class Traces:
    """What a running cloud has made on this machine, and when (seconds since boot) that was looked at."""

    names: frozenset[str]
    uptime: float


def traces(cloud: LocalCloud) -> Traces:
    namespaces = namespaces_of(descendants(facts(cloud)["host_pid"]))
    # 20 of the 32 bits in the name of a VM's link are the cloud's.
    links = host_link(IPv4Address(cloud.gateway))[:-3]
    marks = (str(cloud.folder), facts(cloud)["bridge"], links)
    found = {name for name in files_links_and_mounts() if any(mark in name for mark in marks)}
    found |= namespaces - namespaces_of([Path("/proc/self")])
    return Traces(frozenset(found), uptime())


def wait_until_gone(made: Traces) -> None:
    """Patient, because the kernel dismantles the network of a killed VM in its own time."""
    for kind in ("file", "link", "namespace net", "namespace pid", "namespace mnt"):
        assert any(name.startswith(kind) for name in made.names), kind

    def left() -> set[str]:
        # The kernel gives the numbers of namespaces away again; younger processes are somebody else's.
        old = [path for path in Path("/proc").glob("[0-9]*") if born(path) <= made.uptime]
        return (files_links_and_mounts() | namespaces_of(old)) & made.names

    wait(lambda: not left(), lambda _: str(left()), "")


def files_links_and_mounts() -> set[str]:
    links = json.loads(subprocess.run(["ip", "-j", "link"], capture_output=True, check=True).stdout)
    return {
        *(f"file {path}" for path in STATE_ROOT.glob("*")),
        *(f"link {link['ifname']}" for link in links),
        *(f"mount {line}" for line in Path("/proc/mounts").read_text().splitlines()),
    }


def namespaces_of(processes: Iterable[Path]) -> set[str]:
    found = set()
    for process in processes:
        for name in NAMESPACES:
            with contextlib.suppress(OSError):
                found.add(f"namespace {(process / 'ns' / name).readlink()}")
    return found


def uptime() -> float:
    return float(Path("/proc/uptime").read_text().split()[0])


def born(process: Path) -> float:
    """Seconds from the machine's boot to the start of a process; infinite when it has gone."""
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("inf")
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> Iterator[Path]:
    yield Path(f"/proc/{pid}")
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            yield from descendants(int(child))


def facts(cloud: LocalCloud) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((cloud.folder / "state.json").read_text())
    return facts


@pytest.mark.integration
class TestCleanUp:
    @pytest.fixture(autouse=True)
    def _needs_what_a_cloud_needs(self, cloud: LocalCloud) -> None:
        """Skips where the cloud fixture does."""

    def test_down_leaves_nothing(self) -> None:
        cloud = LocalCloud.up(Options(own("down"), (0.0, 0.0), [PACKAGE]))
        Vms(cloud).join("node-a")
        made = traces(cloud)
        cloud.down()
        cloud.down()
        wait_until_gone(made)

    @pytest.mark.parametrize("next_name", ["killed", "other"])
    def test_a_killed_owner_takes_all_with_it_and_the_next_command_sweeps(
        self, next_name: str
    ) -> None:
        cloud = LocalCloud.up(Options(own("killed"), (0.0, 0.0), [PACKAGE]))
        Vms(cloud).join("node-a")
        made = traces(cloud)
        os.kill(facts(cloud)["host_pid"], signal.SIGKILL)
        wait(lambda: LocalCloud.find(own("killed")) is None, str, "still alive")
        down(own(next_name))
        wait_until_gone(made)

    def test_a_cloud_ends_with_the_process_it_is_attached_to(self) -> None:
        runner = start_run(own("attached"), "echo up; exec sleep 1000")
        cloud = LocalCloud.find(own("attached"))
        assert cloud is not None
        Vms(cloud).join("node-a")
        made = traces(cloud)
        os.killpg(runner.pid, signal.SIGKILL)
        runner.wait()
        down(own("attached"))
        wait_until_gone(made)


def start_run(name: str, script: str) -> subprocess.Popen[str]:
    """`schlouder local run` of a shell script, which has said its first line when this returns."""
    command = [sys.executable, "-m", cli.__name__, "local", "run", "--name", name]
    options = ["--boot-seconds", "0", "--share", str(PACKAGE)]
    process = subprocess.Popen(
        [*command, *options, "--", "sh", "-c", script],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.integration
class TestRun:
    @pytest.fixture(autouse=True)
    def _needs_what_a_cloud_needs(self, cloud: LocalCloud) -> None:
        """Skips where the cloud fixture does."""

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_passes_signals_on_and_takes_the_cloud_down(self, number: signal.Signals) -> None:
        trap = "trap 'sleep 0.3; exit 9' INT TERM; echo up; while :; do sleep 0.1; done"
        runner = start_run(own("signal"), trap)
        runner.send_signal(number)
        time.sleep(0.5)
        runner.send_signal(signal.SIGINT)
        assert runner.wait(timeout=15) == 9
        assert not (STATE_ROOT / own("signal")).exists()

    def test_runs_the_command_as_the_user_behind_sudo(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SUDO_UID", "65534")
        script = (
            "id -un; echo $HOME $USER; scontrol show config | grep SlurmUser; scontrol ping; exit 7"
        )
        runner = start_run(own("sudo"), f"echo up; {script}")
        assert runner.stdout is not None
        lines = runner.stdout.read().splitlines()
        assert runner.wait(timeout=15) == 7
        assert lines[0] == "nobody"
        assert lines[1].endswith(" nobody")
        assert "nobody(65534)" in lines[2]
        assert "UP" in lines[3]


class TestMessages:
    """One clear line, before anything is created."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--boot-seconds", "soon"], "'soon' is neither a number"),
            (["--boot-seconds", "8-3"], "8-3 is no range"),
            (["--share", "/does/not/exist"], "/does/not/exist is not a directory"),
            (["--share", "/"], "share a directory below it"),
            (["--share", "/srv", "--no-share"], "--share and --no-share exclude each other"),
            (["--name", "Cloud 9"], "'Cloud 9' is not allowed"),
        ],
    )
    def test_wrong_options(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["local", "up", *arguments]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert message in lines[0]

    @pytest.mark.parametrize("command", [["up"], ["run", "--", "true"], ["down"]])
    def test_without_root(self, command: list[str]) -> None:
        assert as_nobody(lambda: cli.main(["local", *command])) == (
            1,
            "schlouder: schlouder local needs root to make network namespaces; run it with sudo\n",
        )

    def test_missing_programs_name_their_packages(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setenv("PATH", "/nowhere")
        assert cli.main(["local", "up"]) == 1
        assert "apt install curl iproute2 munge slurm-client slurmctld slurmd util-linux" in (
            capsys.readouterr().err
        )

    @pytest.mark.skipif(os.geteuid() != 0, reason="changes its user, which needs root")
    def test_nothing_to_end_is_no_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["local", "down", "--name", "nobody-made-this"]) == 0
        assert capsys.readouterr().out == "nothing is up\n"
