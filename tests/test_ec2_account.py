"""What is asked of EC2 before the first launch, on moto's EC2 in this process."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from moto import mock_aws
from moto.moto_api._internal import moto_api_backend

from snakemake_executor_plugin_schlouder.ec2.account import Ec2Settings, throttle_pause
from snakemake_executor_plugin_schlouder.ec2.joining import Join
from snakemake_executor_plugin_schlouder.model import ON_DEMAND, InstanceType, SchlouderError
from snakemake_executor_plugin_schlouder.provision import (
    Ec2Cloud,
    Instance,
    LaunchRequest,
    client_token,
    connect,
)

REGION = "eu-west-1"
JOIN = Join("head:6817", "/run/munge/munge.socket.2", "ssm:/schlouder/munge-key")
KIND = InstanceType("m5.large", 2, 8192)


class Account:
    """With a VPC of its own beside the default one, and moto's images."""

    def __init__(self) -> None:
        self.ec2 = boto3.client("ec2", REGION)
        self.image = self.image_for("x86_64")
        self.vpc = self.ec2.create_vpc(CidrBlock="10.1.0.0/16")["Vpc"]["VpcId"]
        self.subnets = [self.subnet(self.vpc, f"10.1.{n}.0/24", n) for n in range(3)]
        reply = self.ec2.create_security_group(VpcId=self.vpc, GroupName="g", Description="d")
        self.group = reply["GroupId"]
        self.warnings: list[str] = []

    def image_for(self, architecture: str) -> str:
        filters: Any = [{"Name": "architecture", "Values": [architecture]}]
        images = self.ec2.describe_images(Filters=filters)["Images"]
        return next(image["ImageId"] for image in images if image.get("RootDeviceName"))

    def subnet(self, vpc: str, cidr: str, number: int) -> str:
        zone = f"{REGION}{'aab'[number]}"
        reply = self.ec2.create_subnet(VpcId=vpc, CidrBlock=cidr, AvailabilityZone=zone)
        return reply["Subnet"]["SubnetId"]

    def template(self, **data: Any) -> str:
        """The name of a new launch template."""
        name = f"vms-{uuid.uuid4().hex}"
        given: Any = data
        self.ec2.create_launch_template(LaunchTemplateName=name, LaunchTemplateData=given)
        return name

    def cloud(self, **settings: Any) -> Ec2Cloud:
        made = Ec2Settings(
            **{"region": REGION, "image": self.image, "types": ("m5.large",), **settings}
        )
        return connect(made, JOIN, "ann@head", self.warnings.append)

    def problem(self, **settings: Any) -> str:
        before = self.ec2.describe_instances()["Reservations"]
        with pytest.raises(SchlouderError) as caught:
            self.cloud(**settings)
        assert self.ec2.describe_instances()["Reservations"] == before
        return str(caught.value)

    def launched(self, cloud: Ec2Cloud, zone: str = "") -> Any:
        """What EC2 says of a machine of its own."""
        token = client_token("r", ("n",), KIND.name, ON_DEMAND, zone, 1)
        (outcome,) = cloud.launch([LaunchRequest("r", "n", token, KIND, zone=zone)])
        assert isinstance(outcome, Instance), outcome
        reply = self.ec2.describe_instances(InstanceIds=[outcome.id])
        return reply["Reservations"][0]["Instances"][0]


@pytest.fixture(scope="module")
def moto() -> Iterator[None]:
    """One for all tests: it takes seconds to learn all instance types."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_DEFAULT_REGION"):
            patch.delenv(name, raising=False)
        patch.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "true")
        with mock_aws():
            # moto does that itself only where no other test of this process still has it at work.
            moto_api_backend.reset()
            yield


@pytest.fixture
def account(moto: None) -> Account:
    return Account()


def test_zones_are_those_of_the_subnets_in_their_order(account: Account) -> None:
    first, second, other = account.subnets
    cloud = account.cloud(subnets=(other, first, second), security_groups=(account.group,))
    assert cloud.zones == ("eu-west-1b", "eu-west-1a")
    assert account.launched(cloud)["SubnetId"] == other
    assert account.launched(cloud, "eu-west-1a")["SubnetId"] == first


def test_without_subnets_zones_are_those_of_the_default_vpc(account: Account) -> None:
    cloud = account.cloud()
    assert cloud.zones == ("eu-west-1a", "eu-west-1b", "eu-west-1c")
    assert account.launched(cloud, "eu-west-1c")["Placement"]["AvailabilityZone"] == "eu-west-1c"


def test_subnets_of_different_vpcs_are_told_with_both(account: Account) -> None:
    vpc = account.ec2.create_vpc(CidrBlock="10.2.0.0/16")["Vpc"]["VpcId"]
    foreign = account.subnet(vpc, "10.2.0.0/24", 0)
    ours = account.subnets[0]
    assert account.problem(subnets=(ours, foreign)) == (
        f"--schlouder-subnets: {ours} is in {account.vpc}, {foreign} is in {vpc}; "
        "all must be of one VPC"
    )


def test_a_security_group_of_another_vpc_is_told_with_both(account: Account) -> None:
    default = account.ec2.describe_subnets(
        Filters=[{"Name": "default-for-az", "Values": ["true"]}]
    )["Subnets"][0]
    groups = (account.group,)
    assert f"{account.group} is in {account.vpc}, the subnets are in {default['VpcId']}" in (
        account.problem(subnets=(default["SubnetId"],), security_groups=groups)
    )
    assert f"VMs are started in {default['VpcId']}" in account.problem(security_groups=groups)


def test_everything_that_is_wrong_is_told_at_once(account: Account) -> None:
    told = account.problem(
        image="ami-00000000",
        subnets=("subnet-1", *account.subnets),
        security_groups=("sg-1",),
        key_name="none",
        launch_template="nope",
    ).splitlines()
    for setting, value in (
        ("image", "ami-00000000"),
        ("subnets", "subnet-1"),
        ("security-groups", "sg-1"),
        ("key-name", "none"),
        ("launch-template", "nope"),
    ):
        (line,) = [line for line in told if line.startswith(f"--schlouder-{setting}: '{value}'")]
        assert "NotFound" in line


def test_the_architecture_is_the_images(account: Account) -> None:
    assert account.cloud().architecture == "x86_64"
    assert (
        account.cloud(image=account.image_for("arm64"), types=("*.large", "m7")).architecture
        == "arm64"
    )


def test_a_volume_is_not_smaller_than_the_images(account: Account) -> None:
    assert account.problem(volume_size=5) == (
        "--schlouder-volume-size: 5 is not allowed; the image's own volume has 15 GiB"
    )
    instance = account.launched(account.cloud(volume_size=30, volume_encrypted=True))
    (mapping,) = instance["BlockDeviceMappings"]
    assert mapping["DeviceName"] == "/dev/sda1"
    volume = account.ec2.describe_volumes(VolumeIds=[mapping["Ebs"]["VolumeId"]])["Volumes"][0]
    assert (volume["Size"], volume["Encrypted"]) == (30, True)


def test_a_launch_template_gives_what_no_setting_gives(account: Account) -> None:
    user_data = base64.b64encode(b"#!/bin/sh\necho theirs").decode()
    template = account.template(ImageId=account.image, KeyName="theirs", UserData=user_data)
    cloud = account.cloud(image="", launch_template=template)
    assert cloud.architecture == "x86_64"
    assert account.warnings == [
        f"--schlouder-launch-template: the user data of {template} is not used; VMs run "
        "schlouder's own."
    ]
    instance = account.launched(cloud)
    assert (instance["ImageId"], instance["KeyName"]) == (account.image, "theirs")
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    reply = account.ec2.describe_instance_attribute(
        InstanceId=instance["InstanceId"], Attribute="userData"
    )
    assert b"SCHLOUDER_" in base64.b64decode(reply["UserData"]["Value"])
    account.ec2.create_key_pair(KeyName="ours")
    ours = account.launched(account.cloud(key_name="ours", launch_template=f"{template}:1"))
    assert ours["KeyName"] == "ours"


def test_a_launch_template_is_used_in_the_version_it_had_at_the_start(account: Account) -> None:
    """Another default version would make another call of the same token."""
    template = account.template(ImageId=account.image, KeyName="first")
    cloud = account.cloud(image="", launch_template=template)
    account.ec2.create_launch_template_version(
        LaunchTemplateName=template,
        LaunchTemplateData={"ImageId": account.image, "KeyName": "second"},
    )
    account.ec2.modify_launch_template(LaunchTemplateName=template, DefaultVersion="2")
    assert account.launched(cloud)["KeyName"] == "first"
    assert (
        account.launched(account.cloud(image="", launch_template=template))["KeyName"] == "second"
    )


def test_launch_templates_that_cannot_be_used_are_refused(account: Account) -> None:
    template = account.template(InstanceMarketOptions={"MarketType": "spot"})
    told = account.problem(image="", launch_template=template)
    assert f"--schlouder-launch-template: '{template}' has a purchasing option" in told
    assert "--schlouder-image: not given, and no launch template names one" in told
    interface = {"DeviceIndex": 0, "SubnetId": account.subnets[0]}
    template = account.template(NetworkInterfaces=[interface])
    told = account.problem(launch_template=template, subnets=tuple(account.subnets))
    assert f"'{template}' has network interfaces" in told
    assert account.cloud(launch_template=template).zones == ()


def test_a_question_that_is_throttled_is_repeated_for_half_a_minute_at_least() -> None:
    answer = (object(), {"Error": {"Code": "RequestLimitExceeded"}})
    pauses = [throttle_pause(answer, attempts) for attempts in range(3, 12)]
    tried = [pause for pause in pauses if pause is not None]
    assert pauses[len(tried) :] == [None] * (len(pauses) - len(tried)) != []
    assert 30 <= sum(tried) <= 90


@pytest.mark.parametrize("answer", [None, (object(), {}), (object(), {"Error": {"Code": "Other"}})])
def test_what_else_goes_wrong_is_left_to_botocore(answer: Any) -> None:
    assert throttle_pause(answer, 3) is None
