"""What an administrator needs to set schlouder up, as files: `schlouder init`."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from .ec2.account import PROBE_INSTANCE
from .ec2.joining import ClusterKey, Join, oldest_slurmd, parse_mounts, release_name, user_data
from .model import InstanceType, SchlouderError
from .provision import TAG_OWNER, TAG_RUN
from .slurm.cli import AUTHS, DEFAULT_MUNGE_SOCKET, OLDEST

FIRST_WITH_OWN_ADDRESSES = (23, 11)
"""From this release on slurmctld takes a dynamic node's address from its registration, and reaches such
nodes whatever TreeWidth is."""

FIRST_WITH_AUTH_SLURM = (23, 11)

READS = (
    "ec2:DescribeImages",
    "ec2:DescribeInstanceTypeOfferings",
    "ec2:DescribeInstanceTypes",
    "ec2:DescribeInstances",
    "ec2:DescribeKeyPairs",
    "ec2:DescribeLaunchTemplateVersions",
    "ec2:DescribeSecurityGroups",
    "ec2:DescribeSpotPriceHistory",
    "ec2:DescribeSubnets",
    "pricing:GetProducts",
)
"""Calls that change nothing and that IAM cannot narrow to resources."""

LOOKS_EVERYWHERE = ("ec2:DescribeRegions",)
"""What `schlouder gc --all-regions` needs besides."""

ENDS = ("ec2:GetConsoleOutput", "ec2:TerminateInstances")
"""Calls about one machine, allowed for ours only."""

PLACEHOLDERS = ("region", "account", "image", "subnets", "security_groups", "controller")
"""Fields of a `Site` of which nobody has the default."""

_KINDS_USED = (
    *("image", "key-pair", "launch-template", "network-interface", "security-group", "snapshot"),
    *("spot-instances-request", "subnet"),
)
_EXAMPLE = InstanceType("m5.large", 2, 8192)


@dataclass(frozen=True)
class Site:
    """Where schlouder is set up; the defaults are placeholders, or what most sites have."""

    region: str = "eu-west-1"
    account: str = "123456789012"
    image: str = "ami-0123456789abcdef0"
    subnets: str = "subnet-0123456789abcdef0"
    security_groups: str = "sg-0123456789abcdef0"
    controller: str = "head.example.org:6817"
    cluster_key: str = "ssm:/schlouder/munge-key"
    kms_key: str = ""
    vm_role: str = "schlouder-vm"
    partition: str = "schlouder"
    instance_types: str = "m5.large"
    mount: str = ""
    auth: str = "munge"
    slurm: str = ""
    max_nodes: int = 1024

    def __post_init__(self) -> None:
        """SchlouderError names every option that is wrong."""
        forms = {
            "account": (r"\d{12}", "it has 12 digits"),
            "image": (r"ami-[0-9a-f]+", "it is like ami-0123456789abcdef0"),
            "controller": (
                r"[^\s:]+:\d+",
                "it is HOST:PORT, with the port of slurm.conf's SlurmctldPort",
            ),
            "vm_role": (r"[A-Za-z0-9_+=,.@-]{1,64}", "it is the name of an IAM role"),
            "partition": (r"[A-Za-z0-9_.-]+", "it is the name of a Slurm partition"),
            "auth": ("|".join(AUTHS), f"it is {' or '.join(AUTHS)}"),
            "slurm": (r"(\d\d\.\d\d)?", "it is a release such as 23.11"),
            "kms_key": (r"(arn:[a-z-]+:kms:\S+)?", "it is the ARN of a KMS key"),
        }
        problems = [
            f"--{name.replace('_', '-')}: {getattr(self, name)!r} is not allowed; {allowed}"
            for name, (form, allowed) in forms.items()
            if not re.fullmatch(form, getattr(self, name))
        ]
        for check in (
            lambda: ClusterKey.parse(self.cluster_key),
            lambda: parse_mounts(self.mount),
            lambda: self.aws,
        ):
            try:
                check()
            except SchlouderError as error:
                problems.append(f"--{error}")
        if self.auth == "slurm" and self.release < FIRST_WITH_AUTH_SLURM:
            problems.append(
                f"--auth: slurm needs Slurm 23.11 or later, this is {release_name(self.release)}; see --slurm"
            )
        if self.max_nodes < 1:
            problems.append(f"--max-nodes: {self.max_nodes} is not allowed; it must be at least 1")
        if problems:
            raise SchlouderError("\n".join(problems))

    @property
    def aws(self) -> str:
        return _aws_partition(self.region)

    @property
    def key(self) -> ClusterKey:
        return ClusterKey.parse(self.cluster_key)

    @property
    def release(self) -> tuple[int, int]:
        """Of the controller: as given, else that of the Slurm installed here, else the oldest usable one."""
        found = re.search(r"(\d+)\.(\d+)", self.slurm or _installed_slurm())
        return (int(found[1]), int(found[2])) if found else OLDEST

    def arn(self, service: str, resource: str, account: str | None = None) -> str:
        owner = self.account if account is None else account
        return f"arn:{self.aws}:{service}:{self.region}:{owner}:{resource}"


def write(directory: Path, site: Site, force: bool = False) -> list[Path]:
    """Writes the files and returns their paths; SchlouderError if one is there, unless `force`."""
    texts = {directory / name: text for name, text in files(directory, site).items()}
    there = [str(path) for path in texts if path.exists()]
    if there and not force:
        raise SchlouderError(f"{', '.join(there)}: already there; --force replaces them")
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    except OSError as error:
        raise SchlouderError(f"{error.filename}: {error.strerror}") from error
    return list(texts)


def files(directory: Path, site: Site) -> dict[str, str]:
    """Name -> text of everything that is written."""
    return {
        "README.md": _readme(directory, site),
        "slurm.conf": slurm_conf(site),
        "vm-trust.json": _json(vm_trust(site)),
        "vm-policy.json": _json(vm_policy(site)),
        "broker-policy.json": _json(broker_policy(site)),
        "user-data.sh": _user_data(site),
        "profile/config.yaml": _profile(site),
    }


def slurm_conf(site: Site) -> str:
    """The lines that slurm.conf needs."""
    old = site.release < FIRST_WITH_OWN_ADDRESSES
    tree = (
        "# slurmctld speaks with every VM itself: they do not know each other.\nTreeWidth=65533\n"
    )
    return _filled(
        "slurm.conf",
        slurm=release_name(site.release),
        max_nodes=site.max_nodes,
        parameters="enable_configless,cloud_reg_addrs" if old else "enable_configless",
        tree=tree if old else "",
        partition=site.partition,
    )


def broker_policy(site: Site) -> dict[str, Any]:
    """The rights of whoever runs Snakemake and `schlouder gc`: every call of the plugin. Machines are started
    only with our tags, and ended only if they have them."""
    made = [site.arn("ec2", "instance/*"), site.arn("ec2", "volume/*")]
    request = site.arn("ec2", "spot-instances-request/*")
    return _policy(
        _allow("Look", READS, ["*"]),
        _allow("LookEverywhere", LOOKS_EVERYWHERE, ["*"]),
        _allow("LaunchWithTags", ["ec2:RunInstances"], made, StringLike=_tags("aws:RequestTag")),
        _allow("LaunchFrom", ["ec2:RunInstances"], _used(site)),
        _allow(
            "TagAtLaunch",
            ["ec2:CreateTags"],
            [*made, request],
            StringEquals={"ec2:CreateAction": "RunInstances"},
        ),
        _allow("EndOurs", ENDS, made[:1], StringLike=_tags("aws:ResourceTag")),
        # Asked for before anything is started, with a call that is not to be carried out.
        _allow(
            "AskWhetherToEnd",
            ["ec2:TerminateInstances"],
            [site.arn("ec2", f"instance/{PROBE_INSTANCE}")],
        ),
        _allow(
            "GiveRole",
            ["iam:PassRole"],
            [f"arn:{site.aws}:iam::{site.account}:role/{site.vm_role}"],
            StringEquals={"iam:PassedToService": _ec2_service(site)},
        ),
    )


def vm_policy(site: Site) -> dict[str, Any]:
    """The rights of a VM: to read the cluster's key."""
    service, name = site.key.service, site.key.name
    if service == "ssm":
        action, resource = "ssm:GetParameter", site.arn("ssm", f"parameter/{name.lstrip('/')}")
    elif name.startswith("arn:"):
        action, resource = "secretsmanager:GetSecretValue", name
    else:
        # AWS adds six random characters to a secret's name.
        action = "secretsmanager:GetSecretValue"
        resource = site.arn("secretsmanager", f"secret:{name}-??????")
    statements = [_allow("ReadClusterKey", [action], [resource])]
    if site.kms_key:
        through = {"kms:ViaService": f"{service}.{site.region}.{_domain(site)}"}
        statements.append(
            _allow("DecryptClusterKey", ["kms:Decrypt"], [site.kms_key], StringEquals=through)
        )
    return _policy(*statements)


def vm_trust(site: Site) -> dict[str, Any]:
    """Who may take the VM's role: EC2's machines."""
    principal = {"Service": _ec2_service(site)}
    return _policy({"Effect": "Allow", "Principal": principal, "Action": "sts:AssumeRole"})


def _used(site: Site) -> list[str]:
    """What a machine is made from; images and snapshots may be another account's."""
    shared = ("image", "snapshot")
    return [site.arn("ec2", f"{kind}/*", "" if kind in shared else None) for kind in _KINDS_USED]


def _tags(key: str) -> dict[str, str]:
    """A condition: these tags have a value."""
    return {f"{key}/{tag}": "?*" for tag in (TAG_OWNER, TAG_RUN)}


def _allow(
    name: str, actions: Sequence[str], on: Sequence[str], **conditions: Mapping[str, str]
) -> dict[str, Any]:
    statement = {"Sid": name, "Effect": "Allow", "Action": list(actions), "Resource": list(on)}
    return {**statement, "Condition": conditions} if conditions else statement


def _policy(*statements: Mapping[str, Any]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": list(statements)}


def _domain(site: Site) -> str:
    return "amazonaws.com.cn" if site.aws == "aws-cn" else "amazonaws.com"


def _ec2_service(site: Site) -> str:
    return f"ec2.{_domain(site)}"


def _user_data(site: Site) -> str:
    join = Join(
        site.controller,
        DEFAULT_MUNGE_SOCKET,
        site.cluster_key,
        site.auth,
        site.release,
        parse_mounts(site.mount),
    )
    endpoint = f"https://{site.key.service}.{site.region}.{_domain(site)}"
    return user_data(join, site.region, endpoint, ["schlouder-example-1"], _EXAMPLE)


def _profile(site: Site) -> str:
    settings = {
        "executor": "schlouder",
        "jobs": 200,
        "schlouder-region": site.region,
        "schlouder-image": site.image,
        "schlouder-subnets": site.subnets,
        "schlouder-security-groups": site.security_groups,
        "schlouder-instance-profile": site.vm_role,
        "schlouder-instance-types": site.instance_types,
        "schlouder-max-vms": 20,
        "schlouder-cluster-key": site.cluster_key,
        "schlouder-partition": site.partition,
        **({"schlouder-mount": site.mount} if site.mount else {}),
    }
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items())


def _readme(directory: Path, site: Site) -> str:
    file = "/etc/munge/munge.key" if site.auth == "munge" else "/etc/slurm/slurm.key"
    # Not on a command line, which every user of the machine can read.
    key = "file:///dev/stdin"
    service, name = site.key.service, site.key.name
    own = f" --key-id {site.kms_key}" if site.kms_key else ""
    if service == "ssm":
        put = f"aws ssm put-parameter --type SecureString{own} --name {name} --value {key}"
    else:
        own = own.replace("--key-id", "--kms-key-id")
        put = f"aws secretsmanager create-secret{own} --name {name} --secret-string {key}"
    return _filled(
        "README.md",
        put_key=f"sudo base64 -w0 {file} | {put}",
        vm_role=site.vm_role,
        aws=site.aws,
        account=site.account,
        partition=site.partition,
        controller=site.controller,
        service=f"{service}.{site.region}.{_domain(site)}",
        oldest=release_name(oldest_slurmd(site.release)),
        newest=release_name(site.release),
        directory=directory,
    )


def _filled(template: str, **values: object) -> str:
    text = resources.files(__package__).joinpath(f"templates/init/{template}").read_text()
    return Template(text).substitute(values)


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"


@functools.cache
def _aws_partition(region: str) -> str:
    """The partition of AWS in which the region is: aws, aws-cn, aws-us-gov ..."""
    import botocore.session
    from botocore.exceptions import UnknownRegionError

    try:
        return str(botocore.session.get_session().get_partition_for_region(region))
    except UnknownRegionError as error:
        raise SchlouderError(f"region: {region!r} is no AWS region such as eu-west-1") from error


@functools.cache
def _installed_slurm() -> str:
    """What Slurm's client says of its version, empty where there is none."""
    try:
        return subprocess.run(
            ["scontrol", "--version"], capture_output=True, text=True, check=False
        ).stdout
    except FileNotFoundError:
        return ""
