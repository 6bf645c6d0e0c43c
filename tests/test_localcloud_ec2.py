"""The embedded cloud does what EC2 does every day: asked by boto3, with real VMs. Needs root."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from datetime import UTC, datetime
from io import BytesIO
from ipaddress import ip_address, ip_network
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError
from test_localcloud import SLEEP, Vms, in_vm, refusal, wait

from snakemake_executor_plugin_schlouder.localcloud import (
    Faults,
    LocalCloud,
    MeterEntry,
    Reclaims,
    Throttle,
)
from snakemake_executor_plugin_schlouder.localcloud.control import ControlError

pytestmark = pytest.mark.integration

SPOT: dict[str, Any] = {"InstanceMarketOptions": {"MarketType": "spot"}}
ASK = (
    "t=$(curl -s -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' http://169.254.169.254/latest/api/token)\n"
    'ask() { curl -s -f -H "X-aws-ec2-metadata-token: $t" http://169.254.169.254/latest/meta-data/$1; }\n'
)


def tags(found: dict[str, str]) -> list[Any]:
    pairs = [{"Key": key, "Value": value} for key, value in found.items()]
    return [{"ResourceType": "instance", "Tags": pairs}]


TAGS = tags({"schlouder:run": "r1"})


@pytest.fixture
def vms(cloud: LocalCloud) -> Iterator[Vms]:
    """The cloud's VMs; after the test there are no faults and no VMs."""
    vms = Vms(cloud)
    vms.ec2 = client(cloud, "ec2")
    yield vms
    cloud.inject(Faults())
    vms.terminate_all()


def client(cloud: LocalCloud, service: str) -> Any:
    """One that does not try again by itself."""
    environment = cloud.environment()
    return boto3.client(
        service,  # type: ignore[call-overload]
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name=environment["AWS_DEFAULT_REGION"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        config=Config(retries={"total_max_attempts": 1}),
    )


def python(vms: Vms, program: str) -> str:
    """A shell command that runs a program on a VM, with the VM's own credentials."""
    endpoint = vms.environment["AWS_ENDPOINT_URL"]
    settings = f"AWS_ENDPOINT_URL={endpoint} AWS_DEFAULT_REGION=us-east-1 LC_ALL=C.UTF-8"
    return f"{settings} {sys.executable} - <<'END'\n{program}END"


def meter_of(vms: Vms, instance_id: str) -> MeterEntry:
    return next(entry for entry in vms.cloud.meter() if entry.instance_id == instance_id)


def told_end(instance: Any) -> int:
    """The second in StateTransitionReason, since the epoch."""
    match = re.search(r"\((.*) GMT\)", instance["StateTransitionReason"])
    assert match, instance["StateTransitionReason"]
    return int(datetime.fromisoformat(match[1]).replace(tzinfo=UTC).timestamp())


class TestCapacity:
    def test_starts_what_it_can_and_its_token_stands_for_those(self, vms: Vms) -> None:
        vms.cloud.inject(Faults(capacity={"m5.large/us-east-1a/*": 2}))
        assert not +vms.cloud.struck()
        batch: dict[str, Any] = {"MinCount": 1, "MaxCount": 5, "ClientToken": "batch"}
        ids = [instance["InstanceId"] for instance in vms.launch(**batch)]
        assert len(ids) == 2
        assert vms.cloud.struck()["capacity"] == 1
        assert [instance["InstanceId"] for instance in vms.launch(**batch)] == ids
        by_token: Any = [{"Name": "client-token", "Values": ["batch"]}]
        (reservation,) = vms.ec2.describe_instances(Filters=by_token)["Reservations"]
        assert [i["AmiLaunchIndex"] for i in reservation["Instances"]] == [0, 1]
        assert {i["ClientToken"] for i in reservation["Instances"]} == {"batch"}

    def test_says_so_as_a_server_error_when_there_is_none(self, vms: Vms) -> None:
        vms.cloud.inject(Faults(capacity={"m5.*/us-east-1a/on-demand": 0}))
        with pytest.raises(ClientError) as caught:
            vms.run()
        reply = caught.value.response
        assert reply["Error"]["Code"] == "InsufficientInstanceCapacity"
        assert reply["ResponseMetadata"]["HTTPStatusCode"] == 500
        assert "choosing us-east-1b, us-east-1c" in reply["Error"]["Message"]
        assert vms.run(InstanceType="c5.large")
        elsewhere = vms.launch(SubnetId=None)[0]
        assert elsewhere["Placement"]["AvailabilityZone"] == "us-east-1b"

    def test_markets_have_pools_of_their_own(self, vms: Vms) -> None:
        vms.cloud.inject(Faults(capacity={"*/*/spot": 0}))
        assert refusal(vms.run, **SPOT) == "InsufficientInstanceCapacity"
        assert vms.run()

    def test_the_quota_counts_vcpus_of_one_market(self, vms: Vms) -> None:
        vms.cloud.inject(Faults(vcpu_quota={"on-demand": 4, "spot": 0}))
        assert refusal(vms.run, MinCount=1, MaxCount=3) == "VcpuLimitExceeded"
        vms.run(MaxCount=2)
        with pytest.raises(ClientError, match="current vCPU limit of 4 allows for the instance"):
            vms.run()
        assert refusal(vms.run, **SPOT) == "MaxSpotInstanceCountExceeded"


class TestFaults:
    def test_a_burst_of_throttling(self, vms: Vms) -> None:
        throttle = Throttle(share=1.0, period=100, seconds=100, actions=["Run*"])
        vms.cloud.inject(Faults(throttle=throttle))
        with pytest.raises(ClientError) as caught:
            vms.run()
        assert caught.value.response["Error"]["Code"] == "RequestLimitExceeded"
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 503
        assert vms.ec2.describe_instances()

    def test_a_lost_reply_is_a_closed_connection_and_a_launch(self, vms: Vms) -> None:
        vms.cloud.inject(Faults(lost_replies=1.0))
        with pytest.raises(ConnectionClosedError):
            vms.run(ClientToken="lost")
        vms.cloud.inject(Faults())
        by_token: Any = [{"Name": "client-token", "Values": ["lost"]}]
        (reservation,) = vms.ec2.describe_instances(Filters=by_token)["Reservations"]
        assert vms.run(ClientToken="lost") == reservation["Instances"][0]["InstanceId"]

    def test_a_new_instance_is_unknown_for_a_while(self, vms: Vms) -> None:
        vms.cloud.inject(Faults(describe_lag=1.0))
        instance_id = vms.run(ClientToken="late")
        assert refusal(vms.describe, instance_id) == "InvalidInstanceID.NotFound"
        gone = refusal(vms.ec2.terminate_instances, InstanceIds=[instance_id])
        assert gone == "InvalidInstanceID.NotFound"
        assert instance_id not in str(vms.ec2.describe_instances())
        assert vms.run(ClientToken="late") == instance_id
        time.sleep(1.0)
        assert vms.state(instance_id) in ("pending", "running")

    def test_a_vm_that_never_joins_runs_and_bills_and_tells_its_console(self, vms: Vms) -> None:
        vms.cloud.inject(Faults(never_join=1.0))
        instance_id = vms.run("#!/bin/sh\necho joined\n")
        wait(lambda: "user data was not run" in vms.console(instance_id), vms.console, instance_id)
        assert vms.state(instance_id) == "running"
        assert "joined" not in vms.console(instance_id)
        assert meter_of(vms, instance_id).ended is None

    def test_missing_actions_and_tags_as_on_other_clouds(self, vms: Vms) -> None:
        missing = ["DescribeInstanceTypes", "pricing:GetProducts"]
        vms.cloud.inject(Faults(missing=missing, no_tags_on_create=True))
        assert refusal(vms.ec2.describe_instance_types) == "InvalidAction"
        pricing = client(vms.cloud, "pricing")
        unknown = refusal(pricing.get_products, ServiceCode="AmazonEC2")
        assert unknown == "UnknownOperationException"
        assert refusal(vms.run, TagSpecifications=TAGS) == "UnknownParameter"
        instance_id = vms.run()
        vms.ec2.create_tags(Resources=[instance_id], Tags=[{"Key": "a", "Value": "b"}])
        assert vms.describe(instance_id)["Tags"] == [{"Key": "a", "Value": "b"}]

    def test_calls_of_ordinary_callers_are_counted(self, vms: Vms) -> None:
        vms.cloud.calls(reset=True)
        vms.join("counted")
        refusal(vms.describe, "i-00000000")
        calls = vms.cloud.calls(reset=True)
        assert (calls["ec2:RunInstances"], calls["ec2:DescribeInstances"]) == (1, 1)
        assert "ssm:GetParameter" not in calls
        assert not vms.cloud.calls()

    def test_an_order_that_makes_no_sense_is_refused(self, vms: Vms) -> None:
        with pytest.raises(ControlError, match="i-00000000 is no spot instance that is alive"):
            vms.cloud.reclaim("i-00000000")
        with pytest.raises(ControlError, match="no spot instance"):
            vms.cloud.reclaim(vms.run())


class TestSpot:
    def test_a_reclaimed_vm_finds_a_notice_and_then_ends(self, vms: Vms) -> None:
        script = (
            f"#!/bin/sh\n{ASK}echo $(ask instance-life-cycle); ask spot/instance-action || echo none\n"
            "while ! ask spot/instance-action; do sleep 0.1; done; echo\n"
            "ask spot/termination-time; echo; ask events/recommendations/rebalance; echo\nsleep 1000\n"
        )
        instance = vms.launch(script, **SPOT)[0]
        instance_id = instance["InstanceId"]
        assert instance["InstanceLifecycle"] == "spot"
        assert instance["SpotInstanceRequestId"].startswith("sir-")
        wait(lambda: "none" in vms.console(instance_id), vms.console, instance_id)
        vms.cloud.reclaim(instance_id, notice=2.0)
        wait(lambda: "noticeTime" in vms.console(instance_id), vms.console, instance_id)
        assert vms.state(instance_id) == "running"
        life_cycle, none, action, end, _ = vms.console(instance_id).splitlines()
        assert (life_cycle, none) == ("spot", "none")
        assert json.loads(action) == {"action": "terminate", "time": end}
        vms.wait_for_state(instance_id, "terminated")
        ended = vms.describe(instance_id)
        assert ended["StateReason"]["Code"] == "Server.SpotInstanceTermination"
        assert ended["StateTransitionReason"].startswith("Service initiated (")
        announced = int(datetime.fromisoformat(end).timestamp())
        assert told_end(ended) - announced in (0, 1)
        entry = meter_of(vms, instance_id)
        assert (entry.ended, entry.interrupted, entry.usd) == (told_end(ended), True, 0.0)
        vms.ec2.terminate_instances(InstanceIds=[instance_id])
        assert vms.describe(instance_id) == ended

    def test_a_share_of_them_is_reclaimed_by_itself(self, vms: Vms) -> None:
        vms.cloud.inject(Faults(reclaim=Reclaims(share=1.0, after=(0.1, 0.3), notice=0.1)))
        spot, other = vms.run(**SPOT), vms.run()
        vms.wait_for_state(spot, "terminated")
        assert meter_of(vms, spot).interrupted
        assert vms.cloud.struck()["reclaim"] == 1
        assert vms.state(other) == "running"

    def test_a_bid_below_the_price_is_refused(self, vms: Vms) -> None:
        bid = {"MarketType": "spot", "SpotOptions": {"MaxPrice": "0.001"}}
        assert refusal(vms.run, InstanceMarketOptions=bid) == "SpotMaxPriceTooLow"


class TestMeter:
    def test_agrees_with_describe_to_the_second(self, vms: Vms) -> None:
        ids = [vms.run(), vms.run(**SPOT)]
        time.sleep(1.5)
        vms.ec2.terminate_instances(InstanceIds=ids)
        time.sleep(1.1)
        vms.ec2.terminate_instances(InstanceIds=ids)
        for instance_id in ids:
            vms.wait_for_state(instance_id, "terminated")
            described, entry = vms.describe(instance_id), meter_of(vms, instance_id)
            assert described["StateTransitionReason"].startswith("User initiated (")
            assert entry.launched == described["LaunchTime"].timestamp()
            assert entry.ended == told_end(described)
            assert (entry.seconds, entry.billed_seconds) == (
                told_end(described) - entry.launched,
                60,
            )
            assert entry.zone == described["Placement"]["AvailabilityZone"]
            assert entry.market == described.get("InstanceLifecycle", "on-demand")
        assert meter_of(vms, ids[0]).usd == pytest.approx(0.096 / 60)
        spot = meter_of(vms, ids[1]).usd
        assert spot is not None and 0.2 < spot / (0.096 / 60) < 0.4

    def test_knows_when_a_vm_shut_itself_down_though_describe_does_not_tell(self, vms: Vms) -> None:
        instance_id = vms.run("#!/bin/sh\npoweroff\n")
        vms.wait_for_state(instance_id, "terminated")
        assert vms.describe(instance_id)["StateTransitionReason"] == "User initiated"
        ended = meter_of(vms, instance_id).ended
        assert ended is not None and 0 <= time.time() - ended < 10


class TestZones:
    def test_a_vm_of_every_zone_joins_slurm(self, vms: Vms) -> None:
        subnets = vms.ec2.describe_subnets()["Subnets"]
        assert {s["AvailabilityZone"]: s["SubnetId"] for s in subnets} == vms.cloud.subnets
        assert len(subnets) == 3
        for number, subnet in enumerate(subnets):
            instance_id = vms.join(f"zone-{number}", SubnetId=subnet["SubnetId"])
            described = vms.describe(instance_id)
            assert described["Placement"]["AvailabilityZone"] == subnet["AvailabilityZone"]
            address = ip_address(described["PrivateIpAddress"])
            assert address in ip_network(subnet["CidrBlock"])

    def test_a_zone_is_as_good_as_its_subnet(self, vms: Vms) -> None:
        placed = vms.launch(SubnetId=None, Placement={"AvailabilityZone": "us-east-1c"})[0]
        assert placed["SubnetId"] == vms.cloud.subnets["us-east-1c"]
        without = {"AvailabilityZone": "us-east-1f"}
        assert refusal(vms.run, SubnetId=None, Placement=without) == "InvalidInput"


class TestPrices:
    def test_spot_price_history_is_that_of_the_meter(self, vms: Vms) -> None:
        pages = vms.ec2.get_paginator("describe_spot_price_history").paginate(
            InstanceTypes=["m5.large", "c5.large"],
            ProductDescriptions=["Linux/UNIX"],
            Filters=[{"Name": "availability-zone", "Values": ["us-east-1a"]}],
            StartTime=datetime.fromtimestamp(time.time() - 3 * 3600, UTC),
            PaginationConfig={"PageSize": 2},
        )
        found = [change for page in pages for change in page["SpotPriceHistory"]]
        stamps = [change["Timestamp"] for change in found]
        assert stamps == sorted(stamps, reverse=True)
        assert {change["InstanceType"] for change in found} == {"m5.large", "c5.large"}
        assert 6 <= len(found) <= 8
        now = next(change for change in found if change["InstanceType"] == "m5.large")
        entry = meter_of(vms, vms.run(**SPOT))
        assert entry.usd_per_hour == pytest.approx(float(now["SpotPrice"]))

    def test_list_prices_come_as_texts(self, vms: Vms) -> None:
        wanted = {"instanceType": "m5.large", "operatingSystem": "Linux", "capacitystatus": "Used"}
        filters = [{"Type": "TERM_MATCH", "Field": k, "Value": v} for k, v in wanted.items()]
        pricing = client(vms.cloud, "pricing")
        (text,) = pricing.get_products(ServiceCode="AmazonEC2", Filters=filters)["PriceList"]
        product = json.loads(text)
        assert product["product"]["attributes"]["regionCode"] == "us-east-1"
        assert '"USD": "0.0960000000"' in text

    def test_instance_types_come_in_pages_and_by_pattern(self, vms: Vms) -> None:
        family: Any = [{"Name": "instance-type", "Values": ["c5.*", "m7i.*", "r5.*", "*.metal"]}]
        pages = vms.ec2.get_paginator("describe_instance_types").paginate(Filters=family)
        found = [[one["InstanceType"] for one in page["InstanceTypes"]] for page in pages]
        assert [len(page) for page in found[:-1]] == [100] * (len(found) - 1)
        names = [name for page in found for name in page]
        assert {"c5.large", "m7i.large"} < set(names)
        assert len(set(names)) == len(names)


class TestPolicy:
    def test_a_missing_right_is_named(self, vms: Vms) -> None:
        allowed = ["ec2:RunInstances", "ec2:Describe*"]
        self.allow(vms, allowed)
        self.assert_missing("ec2:CreateTags", vms)
        self.allow(vms, [*allowed, "ec2:CreateTags"])
        self.assert_missing("iam:PassRole", vms)
        self.allow(vms, [*allowed, "ec2:CreateTags", "iam:PassRole"])
        instance_id = vms.run(TagSpecifications=TAGS)
        with pytest.raises(ClientError, match=f"ec2:TerminateInstances on .*/{instance_id} bec"):
            vms.ec2.terminate_instances(InstanceIds=[instance_id])
        ssm = client(vms.cloud, "ssm")
        secret = refusal(ssm.get_parameter, Name="/schlouder/munge-key")
        assert secret == "AccessDeniedException"
        identity = client(vms.cloud, "sts").get_caller_identity()
        assert identity["Arn"] == "arn:aws:iam::123456789012:user/schlouder-local"

    def test_a_dry_run_tells_whether_the_rights_are_there(self, vms: Vms) -> None:
        assert refusal(vms.run, DryRun=True) == "DryRunOperation"
        assert refusal(vms.ec2.describe_instances, DryRun=True) == "DryRunOperation"
        assert refusal(vms.run, DryRun=True, ImageId="ami-00000000") == "InvalidAMIID.NotFound"
        vms.cloud.inject(Faults(no_tags_on_create=True, unknown_parameters=["MetadataOptions"]))
        options = {"HttpTokens": "required"}
        assert refusal(vms.run, DryRun=True, MetadataOptions=options) == "UnknownParameter"
        assert refusal(vms.run, DryRun=True, TagSpecifications=TAGS) == "UnknownParameter"
        self.allow(vms, ["ec2:Describe*"])
        assert refusal(vms.run, DryRun=True) == "UnauthorizedOperation"

    def test_vms_have_a_policy_of_their_own(self, vms: Vms) -> None:
        parameters = {
            "Effect": "Allow",
            "Action": "ssm:*",
            "Resource": "arn:aws:ssm:*:*:parameter/x*",
        }
        vms.cloud.inject(Faults(vm_policy={"Statement": parameters}))
        program = (
            "import boto3; ssm = boto3.client('ssm')\n"
            "for name in ('/schlouder/munge-key', '/xy'):\n"
            "    try: ssm.get_parameter(Name=name)\n"
            "    except ssm.exceptions.ClientError as error: print(error.response['Error'])\n"
        )
        denied, missing = in_vm(vms, python(vms, program))
        assert "AccessDeniedException" in denied
        assert "assumed-role/schlouder-node/i-" in denied
        assert "on resource: arn:aws:ssm:us-east-1:123456789012:parameter/schlouder/munge" in denied
        assert "ParameterNotFound" in missing

    def allow(self, vms: Vms, actions: list[str]) -> None:
        statement = {"Effect": "Allow", "Action": actions, "Resource": "*"}
        vms.cloud.inject(Faults(policy={"Version": "2012-10-17", "Statement": [statement]}))

    def assert_missing(self, action: str, vms: Vms) -> None:
        with pytest.raises(ClientError) as caught:
            vms.run(TagSpecifications=TAGS)
        error = caught.value.response["Error"]
        assert error["Code"] == "UnauthorizedOperation"
        assert f"no identity-based policy allows the {action} action." in error["Message"]


class TestLimits:
    @pytest.mark.parametrize(
        ("arguments", "code"),
        [
            ({"ClientToken": "x" * 65}, "InvalidParameterValue"),
            ({"UserData": "#!/bin/sh\n" + "#" * 16384}, "InvalidParameterValue"),
            ({"InstanceType": "c6g.large"}, "InvalidParameterValue"),
            ({"TagSpecifications": tags({"k" * 129: ""})}, "InvalidParameterValue"),
            ({"TagSpecifications": tags({"key": "v" * 257})}, "InvalidParameterValue"),
            ({"TagSpecifications": tags({"aws:key": ""})}, "InvalidParameterValue"),
            (
                {"TagSpecifications": tags({f"key{number}": "" for number in range(51)})},
                "TagLimitExceeded",
            ),
        ],
    )
    def test_are_those_of_ec2(self, vms: Vms, arguments: dict[str, Any], code: str) -> None:
        assert refusal(vms.run, **arguments) == code


class TestLaunchTemplate:
    def test_gives_what_the_call_does_not(self, vms: Vms) -> None:
        data: Any = {
            "ImageId": vms.environment["SNAKEMAKE_SCHLOUDER_IMAGE"],
            "InstanceType": "c5.large",
            "TagSpecifications": TAGS,
            "UserData": b64encode(SLEEP.encode()).decode(),
            "NetworkInterfaces": [{"DeviceIndex": 0, "SubnetId": vms.cloud.subnets["us-east-1b"]}],
            **SPOT,
        }
        name = f"template-{os.getpid()}"
        vms.ec2.create_launch_template(LaunchTemplateName=name, LaunchTemplateData=data)
        answer = vms.ec2.run_instances(
            LaunchTemplate={"LaunchTemplateName": name},
            MinCount=1,
            MaxCount=1,
            InstanceType="m5.large",
            UserData="#!/bin/sh\necho mine\n",
        )
        instance = answer["Instances"][0]
        assert instance["InstanceType"] == "m5.large"
        assert TAGS[0]["Tags"][0] in instance["Tags"]
        assert instance["InstanceLifecycle"] == "spot"
        assert instance["Placement"]["AvailabilityZone"] == "us-east-1b"
        instance_id = instance["InstanceId"]
        wait(lambda: "mine" in vms.console(instance_id), vms.console, instance_id)


class TestS3:
    def test_serves_large_objects_to_the_host_and_to_vms(self, vms: Vms) -> None:
        s3 = client(vms.cloud, "s3")
        s3.create_bucket(Bucket="data")
        content = os.urandom(9_000_000)
        s3.upload_fileobj(BytesIO(content), "data", "a dir/ü+%41")
        program = (
            "import boto3; s3 = boto3.client('s3')\n"
            "body = s3.get_object(Bucket='data', Key='a dir/ü+%41')['Body'].read()\n"
            "s3.put_object(Bucket='data', Key='from vm', Body=body)\n"
        )
        assert in_vm(vms, python(vms, program)) == []
        assert s3.head_object(Bucket="data", Key="from vm")["ContentLength"] == len(content)
        assert s3.get_object(Bucket="data", Key="from vm")["Body"].read() == content
