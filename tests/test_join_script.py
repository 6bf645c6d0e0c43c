"""The user data at work on VMs: images that lack packages, keys, mounts, names, spot notices."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from test_localcloud import Vms, wait

import snakemake_executor_plugin_schlouder
from snakemake_executor_plugin_schlouder.ec2.joining import EFS_OPTIONS, Mount, parse_mounts
from snakemake_executor_plugin_schlouder.localcloud import LocalCloud

SCRIPT = Path(snakemake_executor_plugin_schlouder.__file__).parent / "templates" / "join.sh"
PATIENCE = 120.0

BARE_IMAGE = """\
#!/bin/sh
# Makes the machine one of a stock image: nothing of Slurm and munge, and one mirror.
set -eu
dpkg --remove --force-depends slurm-wlm slurmctld slurmd slurm-client munge >/dev/null
for command in slurmd scontrol munged mount.nfs; do
    ! command -v "$command" || exit 1
done
rm -rf /etc/apt/sources.list /etc/apt/sources.list.d /var/lib/apt/lists /usr/sbin/policy-rc.d
mkdir -p /var/lib/apt/lists/partial
cp -r {mirror} /srv/mirror
chmod a+rx /srv/mirror
echo 'deb [trusted=yes] file:/srv/mirror ./' >/etc/apt/sources.list
# An upgrade of the image is under way.
python3 -c 'import fcntl, time
lock = open("/var/lib/dpkg/lock-frontend", "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
time.sleep(3)' &
exec {user_data}
"""


@pytest.fixture
def vms(cloud: LocalCloud) -> Iterator[Vms]:
    """The cloud's VMs; all of them are terminated after the test."""
    vms = Vms(cloud)
    yield vms
    vms.terminate_all()


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory the VMs see, with Debian's own packages and their index."""
    folder = tmp_path_factory.mktemp("mirror")
    (folder / "partial").mkdir()
    done = subprocess.run(
        [
            *("apt-get", "install", "--download-only", "--reinstall", "--yes"),
            *("-o", f"Dir::Cache::archives={folder}", "-o", "Debug::NoLocking=1"),
            *("--no-install-recommends", "slurmd", "slurm-client", "munge", "nfs-common"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"Debian's packages cannot be fetched: {done.stderr.strip()}")
    entries = [index_entry(package) for package in folder.glob("*.deb")]
    (folder / "Packages").write_text("\n".join(entries))
    return folder


def index_entry(package: Path) -> str:
    control = subprocess.run(
        ["dpkg-deb", "--field", package], capture_output=True, text=True, check=True
    ).stdout
    content = package.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return f"{control}Filename: ./{package.name}\nSize: {len(content)}\nSHA256: {digest}\n"


def on_a_bare_image(user_data: str, folder: Path, mirror: Path) -> str:
    """User data that makes the VM a bare one and then runs `user_data`, to the byte."""
    script = folder / "user-data"
    script.write_text(user_data)
    script.chmod(0o700)
    return BARE_IMAGE.format(mirror=mirror, user_data=script)


def wait_long(vms: Vms, instance_id: str, state: str, node: str = "") -> None:
    """Until the node is in that state of Slurm's, or without a node the instance in that of EC2's."""
    end = time.monotonic() + PATIENCE
    while state != (vms.slurm("sinfo", "-hNn", node, "-o%T") if node else vms.state(instance_id)):
        assert time.monotonic() < end, vms.console(instance_id)
        time.sleep(0.1)


def run_on(vms: Vms, node: str, folder: Path, script: str) -> str:
    """What a job writes there."""
    output = folder / f"{node}.out"
    vms.slurm(
        *("sbatch", "--wait", f"--nodelist={node}", f"-o{output}", f"--chdir={folder}"),
        f"--wrap={script}",
    )
    return output.read_text()


def why_not(vms: Vms, user_data: str) -> str:
    """What the last line of ours on the console says, after the machine has powered itself off."""
    instance_id = vms.run(user_data)
    wait_long(vms, instance_id, "terminated")
    reason = vms.describe(instance_id)["StateReason"]
    assert reason["Code"] == "Client.InstanceInitiatedShutdown"
    told = [line for line in vms.console(instance_id).splitlines() if "schlouder:" in line]
    assert len(told) == 1, vms.console(instance_id)
    return told[0]


@pytest.mark.integration
class TestBareImage:
    def test_installs_slurm_and_munge_and_joins(
        self, vms: Vms, mirror: Path, tmp_path: Path
    ) -> None:
        user_data = on_a_bare_image(vms.user_data("bare", market="spot"), tmp_path, mirror)
        instance_id = vms.run(user_data)
        wait_long(vms, instance_id, "idle", "bare")
        console = vms.console(instance_id)
        assert "Setting up slurmd" in console
        # No daemon was started before it had its key and configuration.
        assert re.search("policy-rc.d denied execution of (re)?start", console)
        count = "pgrep -c munged; pgrep -cx slurmd; ls /usr/sbin/policy-rc.d || echo gone"
        assert run_on(vms, "bare", tmp_path, count).splitlines()[::3] == ["1", "gone"]

    def test_a_mount_that_fails_is_told_before_slurm_has_the_node(
        self, vms: Vms, mirror: Path, tmp_path: Path
    ) -> None:
        mounts = (Mount(f"{vms.cloud.gateway}:/none", "/data", "retry=0,nfsvers=4.1"),)
        user_data = on_a_bare_image(vms.user_data("unfed", mounts=mounts), tmp_path, mirror)
        told = why_not(vms, user_data)
        assert f"mounting {vms.cloud.gateway}:/none on /data failed" in told
        assert vms.slurm("sinfo", "-hNn", "unfed", "-o%T") == ""

    def test_without_apt_the_missing_packages_are_named(self, vms: Vms) -> None:
        text = f"#!/bin/sh\nrm /usr/sbin/slurmd /usr/bin/apt-get\n{vms.user_data('other')}"
        assert why_not(vms, text).endswith(
            "this image lacks slurmd, and has no apt-get to install that; use another image"
        )


@pytest.mark.integration
class TestJoining:
    def test_machines_of_one_launch_take_a_name_each(self, vms: Vms) -> None:
        names = ("batch-a", "batch-b", "batch-c")
        launched = vms.launch(vms.user_data(*names), MinCount=3, MaxCount=3)
        by_index = {names[i["AmiLaunchIndex"]]: i for i in launched}
        for name, instance in by_index.items():
            wait_long(vms, instance["InstanceId"], "idle", name)
            shown = vms.slurm("scontrol", "show", "node", name)
            assert f"NodeAddr={instance['PrivateIpAddress']} " in shown

    def test_a_launch_with_fewer_names_than_machines_is_told(self, vms: Vms) -> None:
        text = vms.user_data("only").replace("SCHLOUDER_NODES=only", "SCHLOUDER_NODES=")
        assert "the launch has more machines than names" in why_not(vms, text)

    def test_the_key_may_be_in_the_secrets_manager(self, vms: Vms) -> None:
        key = (vms.cloud.folder / "munge" / "munge.key").read_bytes()
        secrets = boto3.client(
            "secretsmanager",
            endpoint_url=vms.environment["AWS_ENDPOINT_URL"],
            region_name=vms.environment["AWS_DEFAULT_REGION"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        secrets.create_secret(Name="cluster/munge", SecretBinary=key)
        instance_id = vms.run(vms.user_data("secret", key="secretsmanager:cluster/munge"))
        wait_long(vms, instance_id, "idle", "secret")

    def test_a_key_that_is_not_there_is_told(self, vms: Vms) -> None:
        told = why_not(vms, vms.user_data("keyless", key="ssm:/no/key"))
        assert "reading the cluster's key from ssm /no/key failed" in told

    def test_a_slurm_that_does_not_fit_is_told(self, vms: Vms) -> None:
        text = vms.user_data("new").replace("NEWEST_SLURMD=", "NEWEST_SLURMD=21.08 # ")
        told = why_not(vms, text)
        assert "does not fit, the controller takes 22.05 to 21.08; use another image" in told

    def test_metadata_is_closed_over_ipv6_too(self, vms: Vms, tmp_path: Path) -> None:
        if not Path("/proc/net/if_inet6").exists():
            pytest.skip("this machine has no IPv6")
        vms.join("six")
        rules = run_on(vms, "six", tmp_path, "ip -6 rule")
        assert "to fd00:ec2::254 uidrange 1-4294967294 prohibit" in rules

    def test_a_spot_notice_drains_the_node_while_its_job_goes_on(
        self, vms: Vms, tmp_path: Path
    ) -> None:
        spot = {"MarketType": "spot"}
        instance_id = vms.run(vms.user_data("spot", market="spot"), InstanceMarketOptions=spot)
        wait_long(vms, instance_id, "idle", "spot")
        wait(
            lambda: "user data ended with exit code 0" in vms.console(instance_id),
            vms.console,
            instance_id,
        )
        job = ["sbatch", "--parsable", "--nodelist=spot", "-o/dev/null", f"--chdir={tmp_path}"]
        number = vms.slurm(*job, "--wrap=sleep 30")
        wait(lambda: vms.slurm("squeue", "-hj", number, "-o%T") == "RUNNING", vms.slurm, "squeue")
        vms.cloud.reclaim(instance_id, notice=40.0)
        wait_long(vms, instance_id, "draining", "spot")
        assert vms.slurm("squeue", "-hj", number, "-o%T") == "RUNNING"
        reason = vms.slurm("sinfo", "-hNn", "spot", "-o%E")
        assert re.fullmatch(r"schlouder: spot reclaim at 20\d\d-\d\d-\d\dT[\d:]{8}Z", reason)
        vms.slurm("scancel", number)
        wait_long(vms, instance_id, "drained", "spot")


NOTICE = '{"action": "terminate", "time": "2030-01-02T03:04:05Z"}'


class Imds(BaseHTTPRequestHandler):
    """Gives each token once, and the notice at the third question."""

    asked = 0
    tokens: set[str] = set()  # noqa: RUF012

    def do_PUT(self) -> None:
        token = os.urandom(8).hex()
        self.tokens.add(token)
        self._answer(200, token)

    def do_GET(self) -> None:
        token = self.headers["X-aws-ec2-metadata-token"]
        if token not in self.tokens:
            self._answer(401)
            return
        self.tokens.discard(token)
        type(self).asked += 1
        self._answer(*((200, NOTICE) if self.asked == 3 else (404, "")))

    def _answer(self, code: int, body: str = "") -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_arguments: object) -> None:
        """Silence."""


def test_the_watcher_asks_with_new_tokens_and_repeats_the_drain_until_slurm_takes_it(
    tmp_path: Path,
) -> None:
    """The functions of the script, with a metadata service, a Slurm that fails once, and no pauses."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Imds)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    recorder(tmp_path / "scontrol", failures=1)
    shell(tmp_path, f"METADATA=127.0.0.1:{server.server_port}\nwatch_spot")
    server.shutdown()
    call = (
        "/run/slurm/conf/slurm.conf|update|nodename=n1|state=drain|"
        "reason=schlouder: spot reclaim at 2030-01-02T03:04:05Z|"
    )
    assert (tmp_path / "scontrol.calls").read_text().splitlines() == [call, call]
    assert Imds.asked == 3


@pytest.mark.parametrize(("failures", "calls", "code"), [(2, 3, 0), (9, 6, 1)])
def test_slurmd_is_started_again_as_long_as_slurmctld_may_be_restarting(
    tmp_path: Path, failures: int, calls: int, code: int
) -> None:
    recorder(tmp_path / "slurmd", failures)
    done = shell(tmp_path, "start_slurmd", code)
    started = (tmp_path / "slurmd.calls").read_text().splitlines()
    assert started == ["|-Z|-N|n1|--conf-server|head:6817|--conf|CPUs=1|"] * calls
    assert (tmp_path / "shutdown.calls").exists() == bool(code)
    assert ("n1 could not join Slurm at head:6817: slurmd does not start" in done) == bool(code)


def test_file_systems_are_mounted_one_after_the_other_with_their_options(tmp_path: Path) -> None:
    recorder(tmp_path / "mount", 0)
    recorder(tmp_path / "mkdir", 0)
    efs = "fs-1.efs.eu-west-1.amazonaws.com"
    mounts = parse_mounts(f"{efs}:/=/data nas:/a=/b,ro")
    text = "\n".join(f"{mount.source} {mount.point} {mount.options}" for mount in mounts)
    shell(tmp_path, f"SCHLOUDER_MOUNTS={shlex.quote(text)}\nmount_file_systems")
    assert (tmp_path / "mkdir.calls").read_text().splitlines() == ["|-p|/data|", "|-p|/b|"]
    assert (tmp_path / "mount.calls").read_text().splitlines() == [
        f"|-t|nfs|-o|{EFS_OPTIONS}|{efs}:/|/data|",
        "|-t|nfs|-o|ro|nas:/a|/b|",
    ]
    recorder(tmp_path / "mount", 9)
    told = shell(tmp_path, f"SCHLOUDER_MOUNTS={shlex.quote(text)}\nmount_file_systems", 1)
    assert f"mounting {efs}:/ on /data failed (1)" in told


def recorder(command: Path, failures: int) -> None:
    """A command that writes down how it is called, and fails so often."""
    command.write_text(
        '#!/bin/sh\nprintf "%s|" "$SLURM_CONF" "$@" >>"$0.calls"\necho >>"$0.calls"\n'
        f'[ "$(wc -l <"$0.calls")" -gt {failures} ]\n'
    )
    command.chmod(0o755)


def shell(folder: Path, program: str, code: int = 0) -> str:
    """Runs a program that has the functions of the script, the commands of `folder` and no pauses; what it
    says as an error. Its shutdown is only written down."""
    recorder(folder / "shutdown", failures=0)
    functions = SCRIPT.read_text().split("# A release as a number")[0]
    assignments = "SCHLOUDER_CONTROLLER=head:6817\nSCHLOUDER_NODE_CONF=CPUs=1\n"
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_CONF": ""}
    done = subprocess.run(
        ["sh"],
        input=f"{assignments}{functions}\nsleep() {{ :; }}\nNODE=n1\n{program}\n",
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=30,
    )
    assert done.returncode == code, done.stderr
    return done.stderr
