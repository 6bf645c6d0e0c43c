"""What a call asks IAM for: its actions, the resources they are done to, and what conditions may look at.

Source: Service authorization reference, Actions, resources, and condition keys for Amazon EC2 (and S3,
Systems Manager, IAM); EC2 user guide, Grant permission to tag resources during creation; IAM user guide,
Grant permissions to pass a role to a service.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from snakemake_executor_plugin_schlouder.localcloud.policy import ANY_RESOURCE, Request

REGION = "us-east-1"
ACCOUNT = "123456789012"

_KINDS = {
    "ami": "image",
    "eni": "network-interface",
    "i": "instance",
    "lt": "launch-template",
    "sg": "security-group",
    "sir": "spot-instances-request",
    "subnet": "subnet",
    "vol": "volume",
}
_ON_INSTANCES = frozenset({"TerminateInstances", "GetConsoleOutput", "ModifyInstanceAttribute"})
_ON_ANYTHING = frozenset({"CreateTags", "DeleteTags"})

Parameters = Mapping[str, str]
Tags = Mapping[str, str]


@dataclass(frozen=True)
class Lookup:
    """What the cloud knows that is not in the call: tags of a resource, and the role of an instance
    profile's name or ARN."""

    tags: Callable[[str], Tags]
    role: Callable[[str], str | None]


@dataclass(frozen=True)
class Call:
    """One call of one service. `action` is IAM's name for it; `resource` an ARN where that is easy to
    tell."""

    service: str
    action: str
    resource: str = ANY_RESOURCE
    parameters: Parameters = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.service}:{self.action}"


def s3_call(method: str, path: str, query: str) -> Call:
    """S3 has no names of actions on the wire; these are the rights that its operations need.

    `path` is as WSGI gives it: decoded, its bytes as Latin-1.
    """
    bucket, _, key = path.encode("latin-1").decode().lstrip("/").partition("/")
    if not bucket:
        return Call("s3", "ListAllMyBuckets", "*")
    arn = f"arn:aws:s3:::{bucket}"
    if not key:
        if method == "POST":
            return Call("s3", "DeleteObject", f"{arn}/*")
        if "location" in query.split("&"):
            return Call("s3", "GetBucketLocation", arn)
        actions = {"PUT": "CreateBucket", "DELETE": "DeleteBucket"}
        return Call("s3", actions.get(method, "ListBucket"), arn)
    if "uploadId=" in query and method == "DELETE":
        return Call("s3", "AbortMultipartUpload", f"{arn}/{key}")
    actions = {"PUT": "PutObject", "POST": "PutObject", "DELETE": "DeleteObject"}
    return Call("s3", actions.get(method, "GetObject"), f"{arn}/{key}")


def parameter_arn(name: str) -> str:
    return f"arn:aws:ssm:{REGION}:{ACCOUNT}:parameter/{name.lstrip('/')}"


def requests(call: Call, lookup: Lookup) -> Iterator[Request]:
    """All that has to be allowed for the call; a RunInstances call must resolve its launch template first."""
    if call.service != "ec2":
        yield Request(call.name, call.resource, _common())
    elif call.action == "RunInstances":
        yield from _run_instances(call.parameters, lookup)
    elif call.action in _ON_INSTANCES:
        for instance_id in numbered(call.parameters, "InstanceId") or [
            call.parameters.get("InstanceId", "*")
        ]:
            yield _on_resource(call.name, instance_id, lookup, {})
    elif call.action in _ON_ANYTHING:
        tags = _pairs(call.parameters, "Tag")
        for resource in numbered(call.parameters, "ResourceId"):
            yield _on_resource(call.name, resource, lookup, tags)
    elif call.action.startswith("Describe"):
        # They cannot be restricted to resources: only `*` allows them.
        yield Request(call.name, "*", _common())
    else:
        yield Request(call.name, ANY_RESOURCE, _common())


def _run_instances(parameters: Parameters, lookup: Lookup) -> Iterator[Request]:
    """One for every resource of the launch, ec2:CreateTags for what it tags, and iam:PassRole."""
    created = tags_on_create(parameters)
    profile = parameters.get("IamInstanceProfile.Name") or parameters.get("IamInstanceProfile.Arn")
    launch = {
        "ec2:instancetype": [parameters.get("InstanceType", "m1.small")],
        "ec2:instancemarkettype": [parameters.get("InstanceMarketOptions.MarketType", "on-demand")],
    }
    for kind in ("instance", "volume", "network-interface"):
        context = {**_common(), **launch, **_request_tags(created.get(kind, {}))}
        yield Request("ec2:RunInstances", _arn(kind, "*"), context)
    for used in _used(parameters):
        context = {**_common(), **_resource_tags(lookup.tags(used))}
        yield Request("ec2:RunInstances", _arn_of(used), context)
    if key := parameters.get("KeyName"):
        yield Request("ec2:RunInstances", _arn("key-pair", key), _common())
    for kind, tags in created.items():
        context = {**_common(), **_request_tags(tags), "ec2:createaction": ["RunInstances"]}
        yield Request("ec2:CreateTags", _arn(kind, "*"), context)
    if profile:
        context = {**_common(), "iam:passedtoservice": ["ec2.amazonaws.com"]}
        yield Request("iam:PassRole", lookup.role(profile) or ANY_RESOURCE, context)


def _used(parameters: Parameters) -> Iterator[str]:
    """Ids of what exists already and takes part in a launch."""
    for name in ("ImageId", "SubnetId", "LaunchTemplate.LaunchTemplateId"):
        if name in parameters:
            yield parameters[name]
    yield from numbered(parameters, "SecurityGroupId")


def tags_on_create(parameters: Parameters) -> dict[str, dict[str, str]]:
    """Resource type → tags, from TagSpecification.N."""
    found: dict[str, dict[str, str]] = {}
    number = 1
    while kind := parameters.get(f"TagSpecification.{number}.ResourceType"):
        found[kind] = _pairs(parameters, f"TagSpecification.{number}.Tag")
        number += 1
    return found


def numbered(parameters: Parameters, name: str) -> list[str]:
    """The values of NAME.1, NAME.2 and so on."""
    found: list[str] = []
    while (value := parameters.get(f"{name}.{len(found) + 1}")) is not None:
        found.append(value)
    return found


def _pairs(parameters: Parameters, name: str) -> dict[str, str]:
    found: dict[str, str] = {}
    while (key := parameters.get(f"{name}.{len(found) + 1}.Key")) is not None:
        found[key] = parameters.get(f"{name}.{len(found) + 1}.Value", "")
    return found


def _on_resource(action: str, resource: str, lookup: Lookup, tags: Tags) -> Request:
    context = {**_common(), **_resource_tags(lookup.tags(resource)), **_request_tags(tags)}
    return Request(action, _arn_of(resource), context)


def _common() -> dict[str, list[str]]:
    return {"aws:requestedregion": [REGION], "ec2:region": [REGION]}


def _request_tags(tags: Tags) -> dict[str, list[str]]:
    context = {f"aws:requesttag/{key}".lower(): [value] for key, value in tags.items()}
    return {**context, "aws:tagkeys": list(tags)} if tags else {}


def _resource_tags(tags: Tags) -> dict[str, list[str]]:
    prefixes = ("aws:resourcetag", "ec2:resourcetag")
    return {f"{one}/{key}".lower(): [value] for one in prefixes for key, value in tags.items()}


def _arn_of(resource: str) -> str:
    kind = _KINDS.get(resource.partition("-")[0])
    return _arn(kind, resource) if kind else ANY_RESOURCE


def _arn(kind: str, resource: str) -> str:
    # Images may be another account's, so their ARNs name none.
    account = "" if kind == "image" else ACCOUNT
    return f"arn:aws:ec2:{REGION}:{account}:{kind}/{resource}"
