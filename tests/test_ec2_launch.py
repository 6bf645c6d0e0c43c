"""Launches through boto3, with the replies that EC2's documentation gives, both checked by boto3 itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.stub import ANY, Stubber

from snakemake_executor_plugin_schlouder.ec2.account import (
    PROBE_INSTANCE,
    Ec2Settings,
    Findings,
    Place,
)
from snakemake_executor_plugin_schlouder.ec2.errors import Ec2Error, quota_name
from snakemake_executor_plugin_schlouder.model import (
    ON_DEMAND,
    SPOT,
    InstanceType,
    SchlouderError,
)
from snakemake_executor_plugin_schlouder.provision import (
    CloudUnavailable,
    Ec2Cloud,
    Instance,
    LaunchOutcome,
    LaunchRefused,
    LaunchRequest,
    NoCapacity,
    QuotaReached,
    Throttled,
    TokenSpent,
    client_token,
)

KIND = InstanceType("m5.large", 2, 8192)
BATCH = ("n-1", "n-2", "n-3")
LAUNCHED = datetime(2026, 1, 31, 11, 0, tzinfo=UTC)
NETWORK = {"eu-west-1a": ("subnet-1", "subnet-2"), "eu-west-1b": ("subnet-3",)}

DENIED = (
    "You are not authorized to perform this operation. User: arn:aws:iam::111122223333:user/ann is not "
    "authorized to perform: iam:PassRole on resource: arn:aws:iam::111122223333:role/vm because no "
    "identity-based policy allows the iam:PassRole action. Encoded authorization failure message: 4GIOHlTk"
)


class Ec2:
    """A cloud whose calls meet prepared replies, in order; a call that was not prepared is an error."""

    def __init__(self, settings: Ec2Settings, zones: dict[str, tuple[str, ...]]) -> None:
        config = Config(retries={"total_max_attempts": 1})
        self.client = boto3.client("ec2", "eu-west-1", config=config)
        self.stub = Stubber(self.client)
        self.stub.activate()
        self.scripts: list[tuple[tuple[str, ...], str, str]] = []
        self.warnings: list[str] = []
        place = Place("x86_64", "/dev/xvda", {}, zones)
        self.cloud = Ec2Cloud(
            *(self.client, self.client, settings, "ann@head"),
            *(self._script, place, self.warnings.append),
        )

    def _script(self, nodes: Sequence[str], kind: InstanceType, market: str) -> str:
        self.scripts.append((tuple(nodes), kind.name, market))
        return "#!/bin/sh"

    def replies(self, *instances: dict[str, Any], **expected: Any) -> None:
        call = {**EXPECTED, **expected}
        self.stub.add_response("run_instances", {"Instances": list(instances)}, call)

    def refuses(
        self, code: str, message: str = "because", operation: str = "run_instances"
    ) -> None:
        self.stub.add_client_error(operation, code, message)

    def launch(self, *nodes: str, batch: tuple[str, ...] = (), **asked: Any) -> list[LaunchOutcome]:
        requests = [LaunchRequest("run", n, "token", KIND, batch=batch, **asked) for n in nodes]
        outcomes = self.cloud.launch(requests)
        self.stub.assert_no_pending_responses()
        return outcomes


EXPECTED: dict[str, Any] = {
    "ImageId": "ami-1",
    "InstanceType": "m5.large",
    "MinCount": 1,
    "MaxCount": ANY,
    "ClientToken": "token",
    "UserData": ANY,
    "InstanceInitiatedShutdownBehavior": "terminate",
    "MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled"},
    "TagSpecifications": ANY,
}


def described(index: int, batch: Sequence[str] = BATCH, **more: Any) -> dict[str, Any]:
    tags = {"schlouder:run": "run", "schlouder:node": " ".join(batch)}
    return {
        "InstanceId": f"i-{index}",
        "AmiLaunchIndex": index,
        "State": {"Name": "pending", "Code": 0},
        "InstanceType": "m5.large",
        "LaunchTime": LAUNCHED,
        "Placement": {"AvailabilityZone": "eu-west-1a"},
        "StateTransitionReason": "",
        "ClientToken": client_token("run", batch, "m5.large", ON_DEMAND, "", 1),
        "Tags": [{"Key": key, "Value": value} for key, value in tags.items()],
        **more,
    }


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    yield


@pytest.fixture
def ec2() -> Ec2:
    return Ec2(Ec2Settings("eu-west-1", "ami-1", types=("m5.large",)), {})


@pytest.fixture
def networked() -> Ec2:
    return Ec2(Ec2Settings("eu-west-1", "ami-1", ("subnet-1", "subnet-2", "subnet-3")), NETWORK)


def test_a_batch_is_one_call_and_its_machines_are_told_by_their_launch_index(ec2: Ec2) -> None:
    ec2.replies(described(2), described(0), described(1), MaxCount=3)
    outcomes = ec2.launch("n-3", "n-1", batch=BATCH)
    assert [(o.node, o.id, o.run) for o in outcomes if isinstance(o, Instance)] == [
        ("n-3", "i-2", "run"),
        ("n-1", "i-0", "run"),
    ]
    assert ec2.scripts == [(BATCH, "m5.large", ON_DEMAND)]


def test_what_ec2_did_not_start_of_a_batch_has_no_capacity(ec2: Ec2) -> None:
    ec2.replies(described(0), described(1), MaxCount=3)
    first, second, third = ec2.launch(*BATCH, batch=BATCH)
    assert isinstance(first, Instance)
    assert isinstance(second, Instance)
    assert isinstance(third, NoCapacity)
    assert "only 2 of 3" in str(third)


def test_asking_again_for_a_part_of_a_batch_is_the_same_call(ec2: Ec2) -> None:
    calls: list[dict[str, Any]] = []
    ec2.client.meta.events.register(
        "provide-client-params.ec2.RunInstances", lambda params, **_: calls.append(params)
    )
    for asked in (BATCH, BATCH[1:2]):
        ec2.replies(*(described(index) for index in range(3)))
        ec2.launch(*asked, batch=BATCH)
    assert calls[0] == calls[1]


def test_a_batch_whose_names_do_not_fit_into_a_tag_is_a_mistake_of_ours(ec2: Ec2) -> None:
    for batch in (("n-1", "n" * 256), ("n-2",)):
        with pytest.raises(ValueError, match="n-1"):
            ec2.launch("n-1", batch=batch)


def test_launches_of_several_tokens_do_not_share_an_outcome(ec2: Ec2) -> None:
    ec2.stub.add_response(
        "run_instances", {"Instances": [described(0, ["a"])]}, {**EXPECTED, "ClientToken": ANY}
    )
    ec2.refuses("InsufficientInstanceCapacity")
    outcomes = ec2.cloud.launch([LaunchRequest("run", name, name, KIND) for name in ("a", "b")])
    assert {type(outcome) for outcome in outcomes} == {Instance, NoCapacity}


def test_tags_of_the_user_are_on_machines_volumes_and_spot_requests() -> None:
    ec2 = Ec2(Ec2Settings("eu-west-1", "ami-1", tags=(("project", "x"), ("Name", "mine"))), {})
    tags = [
        {"Key": "Name", "Value": "mine"},
        {"Key": "project", "Value": "x"},
        {"Key": "schlouder:owner", "Value": "ann@head"},
        {"Key": "schlouder:run", "Value": "run"},
        {"Key": "schlouder:node", "Value": "n-1 n-2 n-3"},
    ]
    kinds = ("instance", "volume", "spot-instances-request")
    ec2.replies(
        described(0),
        TagSpecifications=[{"ResourceType": kind, "Tags": tags} for kind in kinds],
        InstanceMarketOptions={
            "MarketType": "spot",
            "SpotOptions": {
                "SpotInstanceType": "one-time",
                "InstanceInterruptionBehavior": "terminate",
            },
        },
    )
    assert isinstance(ec2.launch("n-1", batch=BATCH, market=SPOT)[0], Instance)
    assert ec2.scripts == [(BATCH, "m5.large", SPOT)]


def test_volumes_keys_groups_and_profiles_are_named_in_the_call() -> None:
    settings = Ec2Settings(
        *("eu-west-1", "ami-1", (), ("sg-1",), "key", "arn:aws:iam::1:instance-profile/p"),
        volume_size=40,
        volume_encrypted=True,
    )
    ec2 = Ec2(settings, {})
    volume = {"DeleteOnTermination": True, "VolumeSize": 40, "Encrypted": True}
    ec2.replies(
        described(0),
        SecurityGroupIds=["sg-1"],
        KeyName="key",
        IamInstanceProfile={"Arn": "arn:aws:iam::1:instance-profile/p"},
        BlockDeviceMappings=[{"DeviceName": "/dev/xvda", "Ebs": volume}],
    )
    assert isinstance(ec2.launch("n-1")[0], Instance)


def test_a_zone_is_asked_for_by_its_subnet(networked: Ec2) -> None:
    assert networked.cloud.zones == ("eu-west-1a", "eu-west-1b")
    networked.replies(described(0), SubnetId="subnet-3")
    assert isinstance(networked.launch("n-1", zone="eu-west-1b")[0], Instance)
    (elsewhere,) = networked.launch("n-1", zone="eu-west-1c")
    assert isinstance(elsewhere, NoCapacity)
    assert "eu-west-1c" in str(elsewhere)


def test_a_full_subnet_is_followed_by_the_next_one_of_its_zone(networked: Ec2) -> None:
    """Under another token, which is kept when the launch is asked for again."""
    tokens: list[str] = []
    networked.client.meta.events.register(
        "provide-client-params.ec2.RunInstances",
        lambda params, **_: tokens.append(params["ClientToken"]),
    )
    second = {"SubnetId": "subnet-2", "ClientToken": ANY}
    networked.refuses("InsufficientFreeAddressesInSubnet")
    networked.replies(described(0), **second)
    assert isinstance(networked.launch("n-1", zone="eu-west-1a")[0], Instance)
    networked.replies(described(0), **second)
    assert isinstance(networked.launch("n-1", zone="eu-west-1a")[0], Instance)
    assert tokens[0] == "token" != tokens[1] == tokens[2]
    assert len(tokens[1]) <= 64


def test_a_zone_whose_subnets_are_all_full_has_no_capacity(networked: Ec2) -> None:
    for _ in range(2):
        networked.refuses("InsufficientFreeAddressesInSubnet")
        networked.refuses("InsufficientFreeAddressesInSubnet")
        assert isinstance(networked.launch("n-1", zone="eu-west-1a")[0], NoCapacity)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("InsufficientInstanceCapacity", NoCapacity),
        ("InsufficientHostCapacity", NoCapacity),
        ("InsufficientReservedInstanceCapacity", NoCapacity),
        ("Unsupported", NoCapacity),
        ("SpotMaxPriceTooLow", NoCapacity),
        ("UnfulfillableCapacity", NoCapacity),
        ("RequestLimitExceeded", Throttled),
        ("Throttling", Throttled),
        ("InternalError", CloudUnavailable),
        ("ServiceUnavailable", CloudUnavailable),
        ("Unavailable", CloudUnavailable),
        ("503", CloudUnavailable),
        ("VcpuLimitExceeded", QuotaReached),
        ("InstanceLimitExceeded", QuotaReached),
        ("MaxSpotInstanceCountExceeded", QuotaReached),
        ("VolumeLimitExceeded", QuotaReached),
        ("UnauthorizedOperation", LaunchRefused),
        ("AuthFailure.ServiceLinkedRoleCreationNotPermitted", LaunchRefused),
        ("OptInRequired", LaunchRefused),
        ("PendingVerification", LaunchRefused),
        ("Blocked", LaunchRefused),
        ("InvalidParameterValue", LaunchRefused),
        ("InvalidAMIID.NotFound", LaunchRefused),
        ("UnsupportedOperation", LaunchRefused),
        ("NeverHeardOf", LaunchRefused),
        ("IdempotentInstanceTerminated", TokenSpent),
        ("IdempotentParameterMismatch", TokenSpent),
    ],
)
def test_errors_of_a_launch_are_told_apart_by_their_code(ec2: Ec2, code: str, kind: type) -> None:
    ec2.refuses(code)
    first, second = ec2.launch("n-1", "n-2", batch=BATCH)
    assert type(first) is kind
    assert first is second
    assert code in str(first)
    assert "because" in str(first)


def test_a_refused_launch_names_the_right_that_is_missing(ec2: Ec2) -> None:
    ec2.refuses("UnauthorizedOperation", DENIED)
    text = str(ec2.launch("n-1")[0])
    assert text.startswith("the right iam:PassRole on arn:aws:iam::111122223333:role/vm is missing")
    assert "schlouder init" in text
    assert "4GIOHlTk" not in text
    ec2.refuses("UnauthorizedOperation", "You are not authorized to perform this operation.")
    assert "the right ec2:RunInstances is missing" in str(ec2.launch("n-1")[0])


@pytest.mark.parametrize(
    ("type_name", "market", "name"),
    [
        ("m5.large", ON_DEMAND, "Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances"),
        ("im4gn.large", SPOT, "All Standard (A, C, D, H, I, M, R, T, Z) Spot Instance Requests"),
        ("g5.xlarge", ON_DEMAND, "Running On-Demand G and VT instances"),
        ("vt1.3xlarge", SPOT, "All G and VT Spot Instance Requests"),
        ("inf2.xlarge", ON_DEMAND, "Running On-Demand Inf instances"),
        ("p4d.24xlarge", SPOT, "All P4, P3 and P2 Spot Instance Requests"),
        ("p5.48xlarge", SPOT, "All P5 Spot Instance Requests"),
        ("p5.48xlarge", ON_DEMAND, "Running On-Demand P instances"),
        ("x2idn.16xlarge", ON_DEMAND, "Running On-Demand X instances"),
        ("hpc7a.12xlarge", ON_DEMAND, "Running On-Demand HPC instances"),
        ("u-6tb1.56xlarge", ON_DEMAND, "Running On-Demand High Memory instances"),
    ],
)
def test_a_quota_is_called_as_the_console_calls_it(type_name: str, market: str, name: str) -> None:
    assert quota_name("VcpuLimitExceeded", type_name, market) == name


def test_a_quota_that_is_used_up_is_named_with_what_to_do(ec2: Ec2) -> None:
    ec2.refuses("VcpuLimitExceeded", "You have requested more vCPU capacity than your limit of 32.")
    text = str(ec2.launch("n-1", market=SPOT)[0])
    assert "'All Standard (A, C, D, H, I, M, R, T, Z) Spot Instance Requests'" in text
    assert "limit of 32" in text
    assert "Service Quotas" in text


def test_an_instance_tells_its_node_market_zone_end_and_reason(ec2: Ec2) -> None:
    reclaimed = described(
        1,
        State={"Name": "terminated", "Code": 48},
        InstanceLifecycle="spot",
        StateTransitionReason="Server.SpotInstanceTermination (2026-01-31 12:00:00 GMT)",
        StateReason={
            "Code": "Server.SpotInstanceTermination",
            "Message": "Spot instance termination",
        },
    )
    alone = described(0, ["n-9"])
    ec2.stub.add_response(
        "describe_instances", {"Reservations": [{"Instances": [reclaimed, alone]}]}
    )
    first, second = ec2.cloud.instances("run")
    assert first == Instance(
        *("i-1", "n-2", "run", "terminated", "m5.large"),
        "Server.SpotInstanceTermination: Spot instance termination",
        LAUNCHED.timestamp(),
        LAUNCHED.timestamp() + 3600,
        SPOT,
        "eu-west-1a",
    )
    assert (second.node, second.ended, second.market, second.reason) == ("n-9", None, ON_DEMAND, "")


def test_machines_of_several_runs_are_asked_for_together_as_many_as_ec2_takes(ec2: Ec2) -> None:
    runs = [f"r{number}" for number in range(201)]
    for names in (runs[:200], runs[200:]):
        asked = {"Filters": [{"Name": "tag:schlouder:run", "Values": names}], "MaxResults": ANY}
        ec2.stub.add_response(
            "describe_instances", {"Reservations": [{"Instances": [described(0)]}]}, asked
        )
    assert len(ec2.cloud.instances(*runs)) == 2


@pytest.mark.parametrize("token", ["", "prod-0815", "run-1", "x" * 64, f"else-{'0' * 40}"])
def test_a_machine_that_somebody_has_tagged_as_ours_is_not_ours(ec2: Ec2, token: str) -> None:
    """Whoever may tag can put our tags onto any machine of the account; we would end it."""
    listed = [described(0, ["n-9"], ClientToken=token), described(1)]
    ec2.stub.add_response("describe_instances", {"Reservations": [{"Instances": listed}]})
    assert [instance.id for instance in ec2.cloud.instances("run")] == ["i-1"]


def test_a_right_that_is_withdrawn_is_named_and_throttling_is_told_apart(ec2: Ec2) -> None:
    ec2.refuses("UnauthorizedOperation", "No.", "terminate_instances")
    with pytest.raises(CloudUnavailable, match="the right ec2:TerminateInstances is missing"):
        ec2.cloud.terminate(["i-1"])
    ec2.refuses("RequestLimitExceeded", "Slow down.", "describe_instances")
    with pytest.raises(Throttled):
        ec2.cloud.instances("run")


# -- rights


def dry_runs(ec2: Ec2, *refusals: tuple[str, str] | str) -> None:
    """Prepares a dry run of RunInstances for each; a text is the action that is denied."""
    for refusal in refusals:
        code, message = (
            ("UnauthorizedOperation", denied(refusal)) if isinstance(refusal, str) else refusal
        )
        ec2.stub.add_client_error("run_instances", code, message)


def denied(action: str) -> str:
    return f"User: arn:aws:iam::1:user/ann is not authorized to perform: {action} on resource: *"


def knows_dry_runs(ec2: Ec2) -> None:
    """The first three of the calls that are not carried out."""
    ec2.stub.add_client_error("describe_instances", "DryRunOperation", "", http_status_code=412)
    ec2.stub.add_client_error("terminate_instances", "InvalidInstanceID.NotFound", "None.")
    ec2.stub.add_client_error("describe_instance_types", "DryRunOperation", "")


def test_every_missing_right_is_named_in_one_error() -> None:
    ec2 = Ec2(Ec2Settings("eu-west-1", "ami-1", instance_profile="p", types=("m5.large",)), {})
    ec2.stub.add_client_error("describe_instances", "UnauthorizedOperation", "No.")
    ec2.stub.add_client_error(
        "terminate_instances",
        "UnauthorizedOperation",
        "No.",
        expected_params={"InstanceIds": [PROBE_INSTANCE], "DryRun": True},
    )
    ec2.stub.add_client_error("describe_instance_types", "UnauthorizedOperation", "No.")
    dry_runs(ec2, "iam:PassRole", "ec2:CreateTags", "ec2:RunInstances")
    findings = Findings()
    ec2.cloud.rehearse(findings)
    ec2.stub.assert_no_pending_responses()
    with pytest.raises(SchlouderError) as caught:
        findings.check()
    (line,) = str(caught.value).splitlines()
    rights = ("DescribeInstances", "DescribeInstanceTypes", "TerminateInstances", "RunInstances")
    assert all(f"ec2:{right}" in line for right in (*rights, "CreateTags"))
    assert "iam:PassRole (on *)" in line
    assert "schlouder init" in line


def test_with_all_rights_nothing_is_found(ec2: Ec2) -> None:
    knows_dry_runs(ec2)
    dry_runs(ec2, ("DryRunOperation", "Request would have succeeded."))
    findings = Findings()
    ec2.cloud.rehearse(findings)
    findings.check()
    assert ec2.warnings == []


def test_credentials_that_hold_for_nothing_are_told_once(ec2: Ec2) -> None:
    said = "AWS was not able to validate the provided access credentials"
    for operation in ("describe_instances", "terminate_instances", "describe_instance_types"):
        ec2.refuses("AuthFailure", said, operation)
    ec2.refuses("AuthFailure", said)
    findings = Findings()
    ec2.cloud.rehearse(findings)
    assert findings.problems == [
        f"AWS: EC2 refuses these credentials or this account (AuthFailure: {said})"
    ]


def test_a_launch_that_would_be_refused_is_told_before_the_first_vm() -> None:
    ec2 = Ec2(Ec2Settings("eu-west-1", "ami-1", instance_profile="p", types=("m5.large",)), {})
    knows_dry_runs(ec2)
    dry_runs(ec2, ("InvalidParameterValue", "Invalid IAM Instance Profile name"))
    findings = Findings()
    ec2.cloud.rehearse(findings)
    with pytest.raises(SchlouderError, match=r"m5.large would be refused .*Instance Profile name"):
        findings.check()


@pytest.mark.parametrize(("place", "problems"), [(Place("x86_64"), 0), (Place(), 1)])
def test_a_wrong_architecture_is_left_to_the_catalog_where_that_knows_the_image(
    place: Place, problems: int
) -> None:
    ec2 = Ec2(Ec2Settings("eu-west-1", "ami-1", types=("m6g.large",)), {})
    ec2.cloud._place = place
    knows_dry_runs(ec2)
    dry_runs(ec2, ("InvalidParameterValue", "The architecture 'arm64' does not match"))
    findings = Findings()
    ec2.cloud.rehearse(findings)
    assert len(findings.problems) == problems


# -- clouds that are like EC2


@pytest.fixture
def bare(ec2: Ec2) -> Ec2:
    """OpenStack's ec2-api answers a parameter it does not know with TypeError."""
    ec2.stub.add_client_error("describe_instances", "TypeError", "", http_status_code=500)
    findings = Findings()
    ec2.cloud.rehearse(findings)
    findings.check()
    assert len(ec2.warnings) == 1
    return ec2


def untagged(node: str, token: str) -> dict[str, Any]:
    return {
        "InstanceId": f"i-{node}",
        "State": {"Name": "pending"},
        "InstanceType": "m5.large",
        "LaunchTime": LAUNCHED,
        "ClientToken": token,
    }


def test_without_tags_on_launch_vms_start_alone_and_are_tagged_right_after(bare: Ec2) -> None:
    left_out = ("TagSpecifications", "MetadataOptions")
    call = {k: v for k, v in EXPECTED.items() if k not in left_out}
    started = untagged("n-2", "t")
    bare.stub.add_response(
        "run_instances", {"Instances": [started]}, {**call, "MaxCount": 1, "ClientToken": ANY}
    )
    tags = [
        {"Key": "Name", "Value": "schlouder-run"},
        {"Key": "schlouder:owner", "Value": "ann@head"},
        {"Key": "schlouder:run", "Value": "run"},
        {"Key": "schlouder:node", "Value": "n-2"},
    ]
    bare.stub.add_response("create_tags", {}, {"Resources": ["i-n-2"], "Tags": tags})
    (outcome,) = bare.launch("n-2", batch=BATCH)
    assert isinstance(outcome, Instance)
    assert (outcome.node, outcome.run) == ("n-2", "run")
    assert bare.scripts == [(("n-2",), "m5.large", ON_DEMAND)]


def test_an_untagged_machine_is_known_by_its_token_and_tagged_later(bare: Ec2) -> None:
    """The reply was lost, or the machine could not be tagged then; of another process its node is unknown."""
    sent: list[str] = []
    bare.client.meta.events.register(
        "provide-client-params.ec2.RunInstances",
        lambda params, **_: sent.append(params["ClientToken"]),
    )
    bare.refuses("503")
    assert isinstance(bare.launch("n-1")[0], CloudUnavailable)
    of_other_process = client_token("run", ("n-8",), "m5.large", ON_DEMAND, "", 1)
    there = [
        untagged("n-1", sent[0]),
        untagged("n-8", of_other_process),
        untagged("foreign", client_token("other", ("n-1",), "m5.large", ON_DEMAND, "", 1)),
        untagged("by-hand", ""),
    ]
    bare.stub.add_response("describe_instances", {"Reservations": [{"Instances": there}]})
    bare.stub.add_response("create_tags", {}, {"Resources": ["i-n-1"], "Tags": ANY})
    found = bare.cloud.instances("run")
    bare.stub.assert_no_pending_responses()
    assert [(i.id, i.node, i.run) for i in found] == [("i-n-1", "n-1", "run"), ("i-n-8", "", "run")]
    bare.stub.add_response("describe_instances", {"Reservations": [{"Instances": there[1:]}]})
    found = bare.cloud.instances("run", "other")
    assert [(i.id, i.run) for i in found] == [("i-n-8", "run"), ("i-foreign", "other")]


def test_a_cloud_that_drops_tags_in_silence_is_noticed(ec2: Ec2) -> None:
    ec2.replies({**described(0), "Tags": []}, {**described(1), "Tags": []})
    for node in ("n-1", "n-2"):
        call = {"Resources": [f"i-{BATCH.index(node)}"], "Tags": ANY}
        ec2.stub.add_response("create_tags", {}, call)
    assert isinstance(ec2.launch("n-2", batch=BATCH)[0], Instance)
    assert "does not take tags; VMs are started one by one" in ec2.warnings[0]
    assert len(ec2.warnings) == 1


def test_a_cloud_without_metadata_options_is_not_asked_for_them(ec2: Ec2) -> None:
    knows_dry_runs(ec2)
    dry_runs(ec2, ("UnknownParameter", "MetadataOptions"), ("DryRunOperation", ""))
    ec2.cloud.rehearse(Findings())
    assert "does not take MetadataOptions; IMDSv2 is not demanded" in ec2.warnings[0]
    call = {k: v for k, v in EXPECTED.items() if k != "MetadataOptions"}
    ec2.stub.add_response("run_instances", {"Instances": [described(0)]}, call)
    assert isinstance(ec2.launch("n-1")[0], Instance)


def test_a_cloud_that_carries_out_dry_runs_is_not_used(ec2: Ec2) -> None:
    knows_dry_runs(ec2)
    ec2.stub.add_response("run_instances", {"Instances": [described(0)]})
    with pytest.raises(SchlouderError, match="end the machine tagged schlouder:run=rehearsal"):
        ec2.cloud.rehearse(Findings())


def test_an_error_is_read_without_what_only_administrators_can_decode() -> None:
    error = Ec2Error("RunInstances", "UnauthorizedOperation", DENIED)
    assert (error.right, error.resource) == ("iam:PassRole", "arn:aws:iam::111122223333:role/vm")
    assert str(error).endswith("allows the iam:PassRole action.")
