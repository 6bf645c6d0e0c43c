"""Policies of the embedded cloud: what IAM allows, what it denies, and what a call asks it for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from snakemake_executor_plugin_schlouder.localcloud.authorization import (
    Call,
    Lookup,
    requests,
    s3_call,
)
from snakemake_executor_plugin_schlouder.localcloud.policy import (
    ANY_RESOURCE,
    Policy,
    PolicyError,
    Request,
    not_authorized,
)

EC2 = "arn:aws:ec2:us-east-1:123456789012:"
VM = EC2 + "instance/i-1"
ROLE = "arn:aws:iam::123456789012:role/schlouder-node"
OURS = {"schlouder:run": "r1"}
LOOKUP = Lookup(tags=lambda name: OURS if name == "i-1" else {}, role=lambda profile: ROLE)
LAUNCH = {
    "Action": "RunInstances",
    "ImageId": "ami-1",
    "SubnetId": "subnet-1",
    "KeyName": "mine",
    "InstanceType": "c5.large",
    "SecurityGroupId.1": "sg-1",
    "IamInstanceProfile.Name": "schlouder-node",
    "TagSpecification.1.ResourceType": "instance",
    "TagSpecification.1.Tag.1.Key": "schlouder:run",
    "TagSpecification.1.Tag.1.Value": "r1",
}


def policy(*statements: Mapping[str, Any]) -> Policy:
    return Policy.parse({"Statement": [{"Effect": "Allow", **one} for one in statements]})


def allows(
    statement: Mapping[str, Any],
    action: str = "ec2:TerminateInstances",
    resource: str = VM,
    tag_keys: list[str] | None = None,
) -> bool:
    context = {} if tag_keys is None else {"aws:tagkeys": tag_keys}
    statement = {"Action": "*", "Resource": "*", **statement}
    return policy(statement).refusal(Request(action, resource, context)) is None


class TestEvaluation:
    @pytest.mark.parametrize(
        ("action", "allowed"),
        [
            ("ec2:TerminateInstances", True),
            ("EC2:terminateinstances", True),
            ("ec2:Term*", True),
            ("ec2:Describe*", False),
            (["ec2:Describe*", "ec2:Terminate?nstances"], True),
        ],
    )
    def test_actions_may_have_wildcards_and_any_case(self, action: Any, allowed: bool) -> None:
        assert allows({"Action": action}) is allowed

    def test_resources_may_have_wildcards(self) -> None:
        assert allows({"Resource": "arn:aws:ec2:*:*:instance/*"})
        assert not allows({"Resource": "arn:aws:ec2:*:*:volume/*"})
        assert not allows({"Resource": VM.upper()})
        assert allows({"Resource": "arn:aws:ec2:*:*:volume/*"}, resource=ANY_RESOURCE)

    def test_calls_that_know_no_resource_need_the_star(self) -> None:
        assert not allows({"Resource": "arn:*"}, "ec2:DescribeInstances", "*")
        assert allows({"Resource": "*"}, "ec2:DescribeInstances", "*")

    def test_a_deny_wins(self) -> None:
        deny = {"Effect": "Deny", "Action": "ec2:Terminate*", "Resource": "*"}
        both = policy({"Action": "*", "Resource": "*"}, deny)
        reason = both.refusal(Request("ec2:TerminateInstances", VM, {}))
        assert reason == "with an explicit deny in an identity-based policy"
        assert both.refusal(Request("ec2:RunInstances", VM, {})) is None

    @pytest.mark.parametrize(
        ("operator", "wanted", "present", "allowed"),
        [
            ("StringEquals", "r1", ["r1"], True),
            ("StringEquals", ["r1", "r2"], ["r2"], True),
            ("StringEquals", "r*", ["r1"], False),
            ("StringEquals", "r1", None, False),
            ("StringLike", "r*", ["r1"], True),
            ("StringLike", "*", None, False),
            ("StringNotEquals", "r1", ["r1"], False),
            ("StringNotEquals", "r1", ["r2"], True),
            ("StringNotEquals", "r1", None, True),
            ("StringEqualsIfExists", "r1", None, True),
            ("StringEqualsIfExists", "r1", ["r2"], False),
            ("ForAllValues:StringEquals", ["a", "b"], ["a"], True),
            ("ForAllValues:StringEquals", ["a", "b"], ["a", "c"], False),
            ("ForAllValues:StringLike", "x:*", None, True),
            ("ForAnyValue:StringEquals", ["a", "b"], ["a", "c"], True),
            ("ForAnyValue:StringEquals", ["a"], None, False),
            ("Null", "true", None, True),
            ("Null", "false", None, False),
            ("Null", "false", ["x"], True),
        ],
    )
    def test_conditions(
        self, operator: str, wanted: Any, present: list[str] | None, allowed: bool
    ) -> None:
        statement = {"Condition": {operator: {"aws:TagKeys": wanted}}}
        assert allows(statement, tag_keys=present) is allowed

    @pytest.mark.parametrize(
        ("statement", "message"),
        [
            ({"Effect": "Permit"}, "Effect is 'Permit'"),
            ({"Action": []}, "needs Action"),
            ({"Principal": "*"}, "Principal is not evaluated"),
            (
                {"Condition": {"IpAddress": {"aws:SourceIp": "1.2.3.4"}}},
                "IpAddress is not evaluated",
            ),
            ({"Resource": "arn:aws:s3:::${aws:username}"}, "variables are not evaluated"),
        ],
    )
    def test_what_is_not_evaluated_is_refused(
        self, statement: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(PolicyError, match=message):
            policy({"Action": "*", "Resource": "*", **statement})

    def test_a_denial_is_told_in_iams_words(self) -> None:
        request = Request("ec2:RunInstances", EC2 + "instance/*", {})
        reason = policy({"Action": "s3:*", "Resource": "*"}).refusal(request)
        assert reason is not None
        assert not_authorized("arn:aws:iam::1:user/me", request, reason) == (
            "User: arn:aws:iam::1:user/me is not authorized to perform: ec2:RunInstances on resource: "
            "arn:aws:ec2:us-east-1:123456789012:instance/* because no identity-based policy allows the "
            "ec2:RunInstances action"
        )


class TestRequests:
    def asked(self, parameters: dict[str, str]) -> dict[tuple[str, str], Request]:
        call = Call("ec2", parameters["Action"], parameters=parameters)
        return {(one.action, one.resource): one for one in requests(call, LOOKUP)}

    def test_a_launch_asks_for_everything_it_touches(self) -> None:
        asked = self.asked(LAUNCH)
        assert set(asked) == {
            ("ec2:RunInstances", EC2 + "instance/*"),
            ("ec2:RunInstances", EC2 + "volume/*"),
            ("ec2:RunInstances", EC2 + "network-interface/*"),
            ("ec2:RunInstances", "arn:aws:ec2:us-east-1::image/ami-1"),
            ("ec2:RunInstances", EC2 + "subnet/subnet-1"),
            ("ec2:RunInstances", EC2 + "security-group/sg-1"),
            ("ec2:RunInstances", EC2 + "key-pair/mine"),
            ("ec2:CreateTags", EC2 + "instance/*"),
            ("iam:PassRole", ROLE),
        }
        tags = asked["ec2:CreateTags", EC2 + "instance/*"].context
        assert tags["ec2:createaction"] == ["RunInstances"]
        assert tags["aws:tagkeys"] == ["schlouder:run"]
        passed = asked["iam:PassRole", ROLE].context
        assert passed["iam:passedtoservice"] == ["ec2.amazonaws.com"]

    def test_request_tags_are_those_of_the_resource_that_is_tagged(self) -> None:
        asked = self.asked(LAUNCH)
        instance = asked["ec2:RunInstances", EC2 + "instance/*"].context
        volume = asked["ec2:RunInstances", EC2 + "volume/*"].context
        assert instance["aws:requesttag/schlouder:run"] == ["r1"]
        assert "aws:requesttag/schlouder:run" not in volume

    def test_a_termination_is_judged_by_the_tags_of_every_instance(self) -> None:
        asked = self.asked(
            {"Action": "TerminateInstances", "InstanceId.1": "i-1", "InstanceId.2": "i-2"}
        )
        ours = policy(
            {
                "Action": "ec2:TerminateInstances",
                "Resource": EC2 + "instance/*",
                "Condition": {"StringEquals": {"ec2:ResourceTag/schlouder:run": "r1"}},
            }
        )
        refused = [request.resource for request in asked.values() if ours.refusal(request)]
        assert refused == [EC2 + "instance/i-2"]

    @pytest.mark.parametrize(
        ("method", "path", "query", "action", "resource"),
        [
            ("GET", "/", "", "ListAllMyBuckets", "*"),
            ("GET", "/data", "list-type=2", "ListBucket", "arn:aws:s3:::data"),
            ("PUT", "/data", "", "CreateBucket", "arn:aws:s3:::data"),
            ("HEAD", "/data/a/b", "", "GetObject", "arn:aws:s3:::data/a/b"),
            ("PUT", "/data/\xc3\xbc%20", "", "PutObject", "arn:aws:s3:::data/ü%20"),
            ("POST", "/data/a", "uploads", "PutObject", "arn:aws:s3:::data/a"),
            ("DELETE", "/data/a", "uploadId=1", "AbortMultipartUpload", "arn:aws:s3:::data/a"),
            ("POST", "/data", "delete", "DeleteObject", "arn:aws:s3:::data/*"),
        ],
    )
    def test_s3_calls_ask_for_the_rights_that_they_need(
        self, method: str, path: str, query: str, action: str, resource: str
    ) -> None:
        call = s3_call(method, path, query)
        assert (call.name, call.resource) == (f"s3:{action}", resource)
