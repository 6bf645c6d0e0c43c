"""The port `Cloud`, and `Ec2Cloud`, its adapter over boto3.

Source of the rules by number (R2, R3 ...): the failures of other elastic clusters, docs/design.md.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, Protocol

from .model import ON_DEMAND, InstanceType, SchlouderError

if TYPE_CHECKING:
    import boto3
    from botocore.config import Config
    from mypy_boto3_ec2 import EC2Client

TAG_OWNER = "schlouder:owner"
TAG_RUN = "schlouder:run"
TAG_NODE = "schlouder:node"

ALIVE = frozenset({"pending", "running", "stopping", "stopped"})
"""Instance states in which a machine costs money or may do so again."""

_LAUNCHES_AT_ONCE = 8
_TERMINATE_BATCH = 500
_DESCRIBE_PAGE = 200

_RETRIED = frozenset(
    {
        "RequestLimitExceeded",
        "Throttling",
        "ThrottlingException",
        "InternalError",
        "ServiceUnavailable",
        "Unavailable",
        "InsufficientInstanceCapacity",
        "InsufficientHostCapacity",
        "InsufficientFreeAddressesInSubnet",
        "MaxSpotInstanceCountExceeded",
    }
)
"""Error codes of RunInstances after which the same launch may work later."""


class CloudUnavailable(Exception):
    """The cloud did not answer or asked to slow down. Says nothing about instances; ask again later."""


class NoCapacity(Exception):
    """The cloud has no machine of this type, market and zone just now; others may be had (R14)."""


class QuotaReached(Exception):
    """The account may not have more machines of this kind at a time; says which quota it is."""


class LaunchRefused(Exception):
    """The cloud will not start this machine however often it is asked: rights, parameters."""


class TokenSpent(Exception):
    """The client token belongs to an instance that has ended (IdempotentInstanceTerminated), or to a
    launch with other parameters, as with settings changed since (IdempotentParameterMismatch)."""


@dataclass(frozen=True)
class LaunchRequest:
    """One machine to start for a run. `token` makes the launch idempotent, as long as it is asked for with
    the same values (R2); `node` becomes the Slurm node's name. Machines with one token are started by one
    call: `batch` names all nodes ever asked for under it, in order; empty: this one alone. An empty `zone`
    leaves the choice to the cloud."""

    run: str
    node: str
    token: str
    type: InstanceType
    market: str = ON_DEMAND
    zone: str = ""
    batch: tuple[str, ...] = ()


@dataclass(frozen=True)
class Instance:
    """One machine as the cloud sees it. `launched` is when its meter started, `ended` when it stopped, as
    far as the cloud says."""

    id: str
    node: str
    run: str
    state: str
    type: str
    reason: str
    launched: float | None = None
    ended: float | None = None
    market: str = ON_DEMAND
    zone: str = ""

    @property
    def is_alive(self) -> bool:
        return self.state in ALIVE


LaunchOutcome = Instance | CloudUnavailable | NoCapacity | QuotaReached | LaunchRefused | TokenSpent


class Cloud(Protocol):
    def launch(self, requests: Sequence[LaunchRequest]) -> list[LaunchOutcome]:
        """Starts the machines; one outcome each, in order. Never raises for a single machine."""
        ...

    def instances(self, run: str) -> list[Instance]:
        """Every machine tagged as started by `run`, ended ones included; raises CloudUnavailable."""
        ...

    def terminate(self, instance_ids: Sequence[str]) -> None:
        """Asks for the end of these machines; ids that are already gone are no error.
        It is done when `instances` says so, not when this returns (R5)."""
        ...

    def console(self, instance_id: str) -> str:
        """What the machine wrote while it booted, empty if the cloud has nothing."""
        ...


@dataclass(frozen=True)
class Join:
    """What a VM must know to join Slurm as a node."""

    controller: str
    munge_socket: str
    munge_key_parameter: str


@dataclass(frozen=True)
class Ec2Settings:
    """Where and how to launch; empty strings and tuples mean EC2's own default."""

    region: str
    image: str
    subnet: str = ""
    security_groups: tuple[str, ...] = ()
    key_name: str = ""
    instance_profile: str = ""


def client_token(
    run: str, batch: Sequence[str], type_name: str, market: str, zone: str, attempt: int
) -> str:
    """Idempotency token of one launch: everything that changes the request changes the token (R2)."""
    text = "\n".join((run, *batch, type_name, market, zone, str(attempt)))
    return hashlib.sha256(text.encode()).hexdigest()


def node_configuration(instance_type: InstanceType) -> str:
    """What slurmd -Z declares; less memory than the type has, or Slurm drains the node (R20)."""
    return (
        f"CPUs={instance_type.cpus} RealMemory={instance_type.node_memory} "
        f"Feature={','.join(instance_type.features)}"
    )


def user_data(
    join: Join, region: str, ssm_endpoint: str, node: str, instance_type: InstanceType
) -> str:
    """The script a VM runs at first boot: assignments, then `templates/join.sh` as it is."""
    assignments = {
        "SCHLOUDER_NODE": node,
        "SCHLOUDER_NODE_CONF": node_configuration(instance_type),
        "SCHLOUDER_CONTROLLER": join.controller,
        "SCHLOUDER_MUNGE_SOCKET": join.munge_socket,
        "SCHLOUDER_MUNGE_KEY_PARAMETER": join.munge_key_parameter,
        "SCHLOUDER_REGION": region,
        "SCHLOUDER_SSM_ENDPOINT": ssm_endpoint,
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in assignments.items()]
    body = resources.files(__package__).joinpath("templates/join.sh").read_text()
    return "\n".join(["#!/bin/sh", *lines, body])


class Ec2Cloud:
    """EC2 through boto3. Made by `connect`, which checks the account, the region and the settings."""

    def __init__(
        self,
        ec2: EC2Client,
        launcher: EC2Client,
        settings: Ec2Settings,
        owner: str,
        user_data: Callable[[str, InstanceType], str],
    ) -> None:
        """`launcher` must not retry by itself: capacity errors come as HTTP 500, which the SDK would
        repeat until it is throttled."""
        self._ec2 = ec2
        self._launcher = launcher
        self._settings = settings
        self._owner = owner
        self._user_data = user_data

    @property
    def region(self) -> str:
        return self._ec2.meta.region_name

    @property
    def endpoint(self) -> str:
        return self._ec2.meta.endpoint_url

    @property
    def client(self) -> EC2Client:
        return self._ec2

    def launch(self, requests: Sequence[LaunchRequest]) -> list[LaunchOutcome]:
        with ThreadPoolExecutor(_LAUNCHES_AT_ONCE) as pool:
            return list(pool.map(self._launch_one, requests))

    def instances(self, run: str) -> list[Instance]:
        return _instances(self._ec2, run)

    def terminate(self, instance_ids: Sequence[str]) -> None:
        for start in range(0, len(instance_ids), _TERMINATE_BATCH):
            self._terminate_batch(list(instance_ids[start : start + _TERMINATE_BATCH]))

    def console(self, instance_id: str) -> str:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            reply = self._ec2.get_console_output(InstanceId=instance_id)
        except (BotoCoreError, ClientError):
            return ""
        return reply.get("Output", "")

    def _launch_one(self, request: LaunchRequest) -> LaunchOutcome:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            reply = self._launcher.run_instances(**self._parameters(request))
        except ClientError as error:
            return _launch_error(error.response["Error"])
        except BotoCoreError as error:
            return CloudUnavailable(str(error))
        return _instance(reply["Instances"][0])

    def _parameters(self, request: LaunchRequest) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "ImageId": self._settings.image,
            "InstanceType": request.type.name,
            "MinCount": 1,
            "MaxCount": 1,
            "ClientToken": request.token,
            "UserData": self._user_data(request.node, request.type),
            "InstanceInitiatedShutdownBehavior": "terminate",
            "MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled"},
            "TagSpecifications": self._tags(request),
        }
        if self._settings.subnet:
            parameters["SubnetId"] = self._settings.subnet
        if self._settings.security_groups:
            parameters["SecurityGroupIds"] = list(self._settings.security_groups)
        if self._settings.key_name:
            parameters["KeyName"] = self._settings.key_name
        if self._settings.instance_profile:
            parameters["IamInstanceProfile"] = _profile(self._settings.instance_profile)
        return parameters

    def _tags(self, request: LaunchRequest) -> list[dict[str, Any]]:
        """Tags go into the launch call: a machine without them would be nobody's (R3)."""
        tags = {
            "Name": request.node,
            TAG_OWNER: self._owner,
            TAG_RUN: request.run,
            TAG_NODE: request.node,
        }
        pairs = [{"Key": key, "Value": value} for key, value in tags.items()]
        return [{"ResourceType": kind, "Tags": pairs} for kind in ("instance", "volume")]

    def _terminate_batch(self, instance_ids: list[str]) -> None:
        """One unknown id makes EC2 refuse the whole call, so that each is then asked for alone."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._ec2.terminate_instances(InstanceIds=instance_ids)
        except ClientError as error:
            if error.response["Error"]["Code"] != "InvalidInstanceID.NotFound":
                raise CloudUnavailable(str(error)) from error
            if len(instance_ids) > 1:
                for instance_id in instance_ids:
                    self._terminate_batch([instance_id])
        except BotoCoreError as error:
            raise CloudUnavailable(str(error)) from error


def connect(settings: Ec2Settings, join: Join, owner: str) -> Ec2Cloud:
    """An Ec2Cloud that can be expected to work; SchlouderError names the setting that is wrong."""
    from botocore.config import Config

    session = aws_session(settings.region)
    patient = Config(connect_timeout=5, read_timeout=20, retries={"mode": "standard"})
    single = Config(connect_timeout=5, read_timeout=60, retries={"total_max_attempts": 1})
    ec2, launcher = aws_client(session, "ec2", patient), aws_client(session, "ec2", single)
    _check_settings(ec2, settings)
    endpoint = aws_client(session, "ssm", patient).meta.endpoint_url

    def script(node: str, instance_type: InstanceType) -> str:
        return user_data(join, session.region_name, endpoint, node, instance_type)

    return Ec2Cloud(ec2, launcher, settings, owner, script)


def aws_session(region: str) -> boto3.Session:
    """A session with a region and credentials; SchlouderError says which is missing or wrong."""
    import boto3
    from botocore.exceptions import BotoCoreError

    try:
        session = boto3.Session(region_name=region or None)
        credentials = session.get_credentials()
    except BotoCoreError as error:
        raise SchlouderError(f"AWS: {error}; see `aws configure`") from error
    if not session.region_name:
        raise SchlouderError(
            "--schlouder-region: no AWS region; give it, or set AWS_DEFAULT_REGION "
            "or a region in ~/.aws/config"
        )
    if credentials is None:
        raise SchlouderError(
            "AWS: no credentials found; run `aws configure`, set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or use a machine with an instance profile"
        )
    return session


def aws_client(session: boto3.Session, service: str, config: Config) -> Any:
    from botocore.exceptions import BotoCoreError, InvalidRegionError

    try:
        return session.client(service, config=config)  # type: ignore[call-overload]
    except InvalidRegionError as error:
        raise SchlouderError(
            f"--schlouder-region: {session.region_name!r} is no AWS region such as eu-west-1"
        ) from error
    except (BotoCoreError, ValueError) as error:
        raise SchlouderError(f"AWS: {error}; check AWS_ENDPOINT_URL and ~/.aws/config") from error


def _check_settings(ec2: EC2Client, settings: Ec2Settings) -> None:
    """Asks EC2 for everything a launch would name, so that a typing error costs no VM."""
    image, subnet = settings.image, settings.subnet
    _asked("--schlouder-image", image, lambda: ec2.describe_images(ImageIds=[image])["Images"])
    if subnet:
        _asked(
            "--schlouder-subnet",
            subnet,
            lambda: ec2.describe_subnets(SubnetIds=[subnet])["Subnets"],
        )
    if settings.security_groups:
        groups = list(settings.security_groups)
        _asked(
            "--schlouder-security-groups",
            ",".join(groups),
            lambda: ec2.describe_security_groups(GroupIds=groups)["SecurityGroups"],
        )
    if settings.key_name:
        _asked(
            "--schlouder-key-name",
            settings.key_name,
            lambda: ec2.describe_key_pairs(KeyNames=[settings.key_name])["KeyPairs"],
        )


def _asked(setting: str, value: str, question: Callable[[], Iterable[Any]]) -> list[Any]:
    """The answer to one question about a setting's value; SchlouderError if there is none."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectTimeoutError,
        EndpointConnectionError,
    )

    try:
        answer = list(question())
    except (EndpointConnectionError, ConnectTimeoutError) as error:
        raise SchlouderError(
            f"AWS: EC2 cannot be reached ({error}); check the network, the region and AWS_ENDPOINT_URL"
        ) from error
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code in ("AuthFailure", "UnauthorizedOperation", "InvalidClientTokenId"):
            raise SchlouderError(f"AWS: {error}; these credentials may not do that") from error
        raise SchlouderError(
            f"{setting}: {value!r} was refused by EC2 ({code}: {_message(error)})"
        ) from error
    except BotoCoreError as error:
        raise SchlouderError(f"AWS: {error}") from error
    if not answer:
        raise SchlouderError(f"{setting}: EC2 knows no {value!r} in this region")
    return answer


def _message(error: Any) -> str:
    return str(error.response["Error"].get("Message", ""))


def _launch_error(error: Mapping[str, Any]) -> LaunchOutcome:
    code, message = error.get("Code", ""), error.get("Message", "")
    if code in ("IdempotentInstanceTerminated", "IdempotentParameterMismatch"):
        return TokenSpent(message)
    if code in _RETRIED:
        return CloudUnavailable(f"{code}: {message}")
    return LaunchRefused(f"{code}: {message}")


def _instances(ec2: EC2Client, run: str) -> list[Instance]:
    """All pages and all reservations: every RunInstances call is a reservation of its own (R6)."""
    from botocore.exceptions import BotoCoreError, ClientError

    pages = ec2.get_paginator("describe_instances").paginate(
        Filters=[{"Name": f"tag:{TAG_RUN}", "Values": [run]}],
        PaginationConfig={"PageSize": _DESCRIBE_PAGE},
    )
    try:
        return [
            _instance(described)
            for page in pages
            for reservation in page["Reservations"]
            for described in reservation["Instances"]
        ]
    except (BotoCoreError, ClientError) as error:
        raise CloudUnavailable(str(error)) from error


def _instance(described: Mapping[str, Any]) -> Instance:
    tags = {tag["Key"]: tag["Value"] for tag in described.get("Tags", [])}
    return Instance(
        described["InstanceId"],
        tags.get(TAG_NODE, ""),
        tags.get(TAG_RUN, ""),
        described["State"]["Name"],
        described["InstanceType"],
        described.get("StateReason", {}).get("Message", ""),
        described["LaunchTime"].timestamp(),
    )


def _profile(name: str) -> dict[str, str]:
    return {"Arn": name} if name.startswith("arn:") else {"Name": name}
