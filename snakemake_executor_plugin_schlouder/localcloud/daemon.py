"""The owner of one embedded cloud: process 1 of a pid namespace that holds everything the cloud runs.

Whatever ends it, the kernel ends munged, slurmctld and all VMs with it. Reads one line of JSON from standard
input (see `Start`), writes `{"ready": true}` or `{"error": ...}` to standard output, and runs until SIGTERM.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import boto3

from snakemake_executor_plugin_schlouder.localcloud import network
from snakemake_executor_plugin_schlouder.localcloud.authorization import REGION
from snakemake_executor_plugin_schlouder.localcloud.controller import PARTITION, Controller
from snakemake_executor_plugin_schlouder.localcloud.endpoint import Endpoint
from snakemake_executor_plugin_schlouder.localcloud.hypervisor import Hypervisor, Shown
from snakemake_executor_plugin_schlouder.localcloud.meter import Billing

log = logging.getLogger(__name__)

INSTANCE_TYPE = "m5.large"
MUNGE_KEY_PARAMETER = "/schlouder/munge-key"
ROLE = "schlouder-node"
ZONES = [REGION + letter for letter in "abc"]
"""The availability zones with a subnet, the preferred one first."""


@dataclass(frozen=True)
class Start:
    """How to run the cloud. With `attached`, the end of standard input ends the cloud."""

    state: str
    host_pid: int
    uid: int
    hidden: list[str]
    shared: list[str]
    boot_seconds: list[float]
    billing_unit: int
    minimum_charge: int
    spot_price_seconds: int
    attached: bool


class Cloud:
    """Starts and stops the parts in their order, and keeps `state.json` true."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.folder = Path(start.state)
        self.facts: dict[str, Any] = {"host_pid": start.host_pid}
        self.controller: Controller | None = None
        self.hypervisor: Hypervisor | None = None

    def up(self) -> None:
        for name in ("root", "console"):
            (self.folder / name).mkdir()
        subnet = network.claim(lambda claimed: self._record(bridge=claimed.bridge))
        self.controller = Controller(self.folder, subnet.gateway, self.start.uid)
        munge_key = self.controller.start()
        billing = Billing(self.start.billing_unit, self.start.minimum_charge)
        endpoint = Endpoint(billing, self.start.spot_price_seconds)
        port = endpoint.serve(str(subnet.gateway))
        low, high = self.start.boot_seconds
        shown = Shown(self.start.hidden, self.start.shared)
        self.hypervisor = Hypervisor(subnet, self.folder, shown, (low, high), endpoint.report)
        endpoint.instances.hypervisor = self.hypervisor
        endpoint.control.controller = self.controller
        endpoint.control.hypervisor = self.hypervisor
        access = access_environment(f"http://{subnet.gateway}:{port}")
        os.environ.update(access)
        zones = create_network(subnet.cidr)
        settings = create_resources(zones, munge_key)
        self.controller.wait()
        endpoint.ec2.zones = zones
        endpoint.calls.clear()
        slurm = {"SLURM_CONF": str(self.controller.slurm_conf)}
        self._record(
            gateway=str(subnet.gateway),
            endpoint=access["AWS_ENDPOINT_URL"],
            subnets=zones,
            environment={**access, **slurm, **settings},
        )

    def down(self) -> None:
        if self.hypervisor is not None:
            self.hypervisor.stop()
        if self.controller is not None:
            self.controller.stop()

    def healthy(self) -> bool:
        if self.controller is None:
            return False
        self.controller.restart_if_shut_down()
        return self.controller.running()

    def _record(self, **facts: Any) -> None:
        """Replaces the file as a whole: readers never see half of it."""
        self.facts.update(facts)
        draft = self.folder / "state.json.new"
        draft.write_text(json.dumps(self.facts, indent=2))
        draft.replace(self.folder / "state.json")


def access_environment(url: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "schlouder-local",
        "AWS_SECRET_ACCESS_KEY": "schlouder-local",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def create_network(cidr: IPv4Network) -> dict[str, str]:
    """A VPC with one subnet in each of `ZONES`, in place of moto's, to which no VM is connected.

    Returns zone → subnet. All of them are parts of the one network that the VMs see.
    """
    ec2 = boto3.client("ec2")
    for found in ec2.describe_subnets()["Subnets"]:
        ec2.delete_subnet(SubnetId=found["SubnetId"])
    for vpc in ec2.describe_vpcs()["Vpcs"]:
        ec2.delete_vpc(VpcId=vpc["VpcId"])
    vpc_id = ec2.create_vpc(CidrBlock=str(cidr))["Vpc"]["VpcId"]
    subnets = {}
    for zone, part in zip(ZONES, cidr.subnets(prefixlen_diff=2), strict=False):
        subnet = ec2.create_subnet(VpcId=vpc_id, CidrBlock=str(part), AvailabilityZone=zone)
        subnets[zone] = subnet["Subnet"]["SubnetId"]
        ec2.modify_subnet_attribute(SubnetId=subnets[zone], MapPublicIpOnLaunch={"Value": False})
    return subnets


def create_resources(zones: dict[str, str], munge_key: str) -> dict[str, str]:
    """What an administrator prepares once in a real account; returns it as the plugin's settings."""
    ec2 = boto3.client("ec2")
    subnet = zones[ZONES[0]]
    vpc = ec2.describe_subnets(SubnetIds=[subnet])["Subnets"][0]["VpcId"]
    group = ec2.create_security_group(VpcId=vpc, GroupName=ROLE, Description="Slurm nodes")
    image = ec2.register_image(Name=ROLE, Architecture="x86_64", RootDeviceName="/dev/sda1")
    create_profile()
    boto3.client("ssm").put_parameter(
        Name=MUNGE_KEY_PARAMETER, Value=munge_key, Type="SecureString"
    )
    settings = {
        "IMAGE": image["ImageId"],
        "SUBNETS": subnet,
        "SECURITY_GROUPS": group["GroupId"],
        "INSTANCE_PROFILE": ROLE,
        "INSTANCE_TYPES": INSTANCE_TYPE,
        "REGION": REGION,
        "PARTITION": PARTITION,
        "CLUSTER_KEY": f"ssm:{MUNGE_KEY_PARAMETER}",
    }
    return {f"SNAKEMAKE_SCHLOUDER_{name}": value for name, value in settings.items()}


def create_profile() -> None:
    iam = boto3.client("iam")
    trust = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": {"Service": "ec2.amazonaws.com"},
                "Action": "sts:AssumeRole",
            }
        ],
    }
    iam.create_role(RoleName=ROLE, AssumeRolePolicyDocument=json.dumps(trust))
    iam.create_instance_profile(InstanceProfileName=ROLE)
    iam.add_role_to_instance_profile(InstanceProfileName=ROLE, RoleName=ROLE)


def watch_input(stop: threading.Event) -> None:
    # Not sys.stdin: a thread that waits in its buffer cannot be ended with the interpreter.
    while os.read(0, 1):
        pass
    stop.set()


def say(**answer: Any) -> None:
    """To the process that started the cloud, which may have gone meanwhile."""
    try:
        print(json.dumps(answer), flush=True)
    except BrokenPipeError:
        log.warning("nobody waits for the answer %s", answer)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("botocore").setLevel(logging.WARNING)
    os.umask(0o022)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = sys.stdin.readline()
    if not line:
        return 1
    start = Start(**json.loads(line))
    log.info("starting: %s", asdict(start))
    if start.attached:
        threading.Thread(target=watch_input, args=(stop,), daemon=True).start()
    cloud = Cloud(start)
    try:
        cloud.up()
        say(ready=True)
        while not stop.wait(1.0):
            if not cloud.healthy():
                log.error("munged or slurmctld ended by itself; see their logs")
                return 1
    except Exception as error:
        log.exception("the cloud did not start")
        say(error=str(error))
        return 1
    finally:
        cloud.down()
    return 0


if __name__ == "__main__":
    # Python would free moto's tables one by one first, which takes a second.
    os._exit(main())
