"""The port `Cloud`, and `Ec2Cloud`, its adapter over boto3.

Source of the rules by number (R2, R3 ...): the failures of other elastic clusters, docs/design.md.
"""

from __future__ import annotations

import getpass
import hashlib
import logging
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from .ec2.account import (
    PROBE_INSTANCE,
    Abilities,
    Ec2Settings,
    Findings,
    Place,
    RightMissing,
    asked,
    aws_client,
    aws_session,
    dry_run,
    patient_client,
    survey,
)
from .ec2.errors import Ec2Error, Meaning, quota_text, rights_text
from .ec2.joining import ClusterKey, Join, user_data
from .market.asking import is_aws
from .model import ON_DEMAND, SPOT, InstanceType, SchlouderError
from .printable import plain

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client

TAG_OWNER = "schlouder:owner"
TAG_RUN = "schlouder:run"
TAG_NODE = "schlouder:node"
"""The nodes of the launch that the machine comes from, in the order of their launch index."""

ALIVE = frozenset({"pending", "running", "stopping", "stopped"})
"""Instance states in which a machine costs money or may do so again."""

_LAUNCHES_AT_ONCE = 8
_TERMINATE_BATCH = 500
_DESCRIBE_PAGE = 200
_TAG_VALUE = 256
_FILTER_VALUES = 200

_NEEDING = {"iam:PassRole": "IamInstanceProfile", "ec2:CreateTags": "TagSpecifications"}
"""The parameters of RunInstances that need a right of their own."""

_log = logging.getLogger(__name__)


def this_owner() -> str:
    """What TAG_OWNER says of machines that this process starts."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


UserData = Callable[[Sequence[str], InstanceType, str], str]
"""Makes the script of one launch from its nodes, in the order of their launch index, type and market."""


class CloudUnavailable(Exception):
    """The cloud did not answer or asked to slow down. Says nothing about instances; ask again later."""


class Throttled(CloudUnavailable):
    """The cloud asks for fewer calls; it may well have machines."""


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

    def instances(self, *runs: str) -> list[Instance]:
        """Every machine tagged as started by one of these runs, ended ones included; raises
        CloudUnavailable."""
        ...

    def terminate(self, instance_ids: Sequence[str]) -> None:
        """Asks for the end of these machines; ids that are already gone are no error.
        It is done when `instances` says so, not when this returns (R5)."""
        ...

    def console(self, instance_id: str) -> str:
        """What the machine wrote while it booted, empty if the cloud has nothing."""
        ...


def client_token(
    run: str, batch: Sequence[str], type_name: str, market: str, zone: str, attempt: int
) -> str:
    """Idempotency token of one launch: everything that changes the request changes the token (R2). It begins
    with a mark of the run, by which machines are known that could not be tagged in the launch call."""
    text = "\n".join((run, *batch, "", type_name, market, zone, str(attempt)))
    return f"{_mark(run)}{_digest(text)}"


def is_launch_of_ours(described: Mapping[str, Any], endpoint: str) -> bool:
    """Whether the run that a machine's tags name has launched it, for all that can be told besides its tags:
    these can be put onto any machine of the account, the token of its launch cannot. Clouds other than AWS
    may not tell it."""
    token = described.get("ClientToken", "")
    if not token and not is_aws(endpoint):
        return True
    mark = re.escape(_mark(tags_of(described).get(TAG_RUN, "")))
    return re.fullmatch(rf"{mark}[0-9a-f]{{40}}", token) is not None


def _mark(run: str) -> str:
    """At most 24 characters of ASCII."""
    return f"{run if len(run) < 24 and run.isascii() else _digest(run)[:23]}-"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:40]


@dataclass(frozen=True)
class _Launch:
    """What one call of RunInstances depends on, and nothing else: asked again, it is the same call."""

    run: str
    nodes: tuple[str, ...]
    token: str
    type: InstanceType
    market: str
    zone: str

    @classmethod
    def of(cls, request: LaunchRequest) -> _Launch:
        nodes = request.batch or (request.node,)
        if request.node not in nodes or len(" ".join(nodes)) > _TAG_VALUE:
            raise ValueError(f"{request.node} cannot be launched in the batch {nodes}")
        return cls(request.run, nodes, request.token, request.type, request.market, request.zone)

    def node_of(self, described: Mapping[str, Any]) -> str:
        index: int = described.get("AmiLaunchIndex", 0)
        return self.nodes[index]

    def of_one(self, node: str) -> _Launch:
        return replace(self, nodes=(node,), token=self._token_for(node))

    def in_other_subnet(self, subnet: str) -> _Launch:
        return replace(self, token=self._token_for(subnet))

    def _token_for(self, difference: str) -> str:
        return f"{_mark(self.run)}{_digest(f'{self.token} {difference}')}"


class Ec2Cloud:
    """EC2 through boto3. Made by `connect`, which checks the account, the region and the settings."""

    def __init__(
        self,
        ec2: EC2Client,
        launcher: EC2Client,
        settings: Ec2Settings,
        owner: str,
        user_data: UserData,
        place: Place | None = None,
        warn: Callable[[str], None] = _log.warning,
        asker: EC2Client | None = None,
    ) -> None:
        """`launcher` must not retry by itself: capacity errors come as HTTP 500, which the SDK would
        repeat until it is throttled. `warn` tells the user what this cloud lacks. `asker` (default: `ec2`)
        is for questions before and after the run, which may take their time."""
        self._ec2 = ec2
        self._asker = asker or ec2
        self._launcher = launcher
        self._settings = settings
        self._owner = owner
        self._user_data = user_data
        self._place = place or Place()
        self._warn = warn
        self._abilities = Abilities()
        self._full_subnets: dict[str, int] = {}
        self._launches: dict[str, _Launch] = {}

    @property
    def region(self) -> str:
        return self._ec2.meta.region_name

    @property
    def endpoint(self) -> str:
        return self._ec2.meta.endpoint_url

    @property
    def zones(self) -> tuple[str, ...]:
        """The zones a launch may name; empty: unknown, and not to be named."""
        return tuple(self._place.zones)

    @property
    def architecture(self) -> str:
        """The image's, such as x86_64 or arm64; empty: unknown."""
        return self._place.architecture

    @property
    def client(self) -> EC2Client:
        """For questions before and after the run."""
        return self._asker

    def launch(self, requests: Sequence[LaunchRequest]) -> list[LaunchOutcome]:
        launches = [self._launch_of(request) for request in requests]
        each = list(dict.fromkeys(launches))
        with ThreadPoolExecutor(_LAUNCHES_AT_ONCE) as pool:
            outcomes = dict(zip(each, pool.map(self._start, each), strict=True))
        return [
            outcomes[launch][request.node]
            for launch, request in zip(launches, requests, strict=True)
        ]

    def instances(self, *runs: str) -> list[Instance]:
        if not self._abilities.tags_on_launch:
            return [
                self._recognized(described, run)
                for described in describe(self._ec2)
                if (run := _run_of(described, runs))
            ]
        found: list[Any] = []
        for start in range(0, len(runs), _FILTER_VALUES):
            names = list(runs[start : start + _FILTER_VALUES])
            found += describe(self._ec2, Filters=[{"Name": f"tag:{TAG_RUN}", "Values": names}])
        return [instance_of(each) for each in found if is_launch_of_ours(each, self.endpoint)]

    def terminate(self, instance_ids: Sequence[str]) -> None:
        terminate(self._ec2, instance_ids)

    def console(self, instance_id: str) -> str:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            reply = self._ec2.get_console_output(InstanceId=instance_id)
        except (BotoCoreError, ClientError):
            return ""
        return plain(reply.get("Output", "").replace("\r\n", "\n"))

    # -- before the first launch

    def rehearse(self, findings: Findings) -> None:
        """Asks, with calls that are not to be carried out, for the rights of a run, and learns what the cloud
        does not know of EC2."""
        first = dry_run(self._asker.describe_instances)
        if first is None or first.meaning not in (Meaning.ALLOWED, Meaning.RIGHTS):
            self._do_without(
                "dry runs: rights are not checked beforehand",
                Abilities(tags_on_launch=False, metadata_options=False),
            )
            return
        self._note(first, findings)
        self._note(dry_run(self._asker.terminate_instances, InstanceIds=[PROBE_INSTANCE]), findings)
        type_name = self._some_type(findings)
        for market in self._settings.markets:
            self._rehearse_launch(type_name, market, findings)

    def _note(self, refusal: Ec2Error | None, findings: Findings) -> None:
        if refusal is not None and refusal.meaning == Meaning.RIGHTS:
            findings.lacks(RightMissing(refusal))

    def _some_type(self, findings: Findings) -> str:
        """One that may be launched; empty: unknown. Types that do not exist are found by the catalog."""
        words = self._settings.types
        if not words:
            return ""
        for name in (word for word in words if "." in word and not re.search(r"[*?]", word)):
            self._note(dry_run(self._asker.describe_instance_types, InstanceTypes=[name]), findings)
            return name
        patterns = [word if "." in word else f"{word}.*" for word in words]
        filters: Any = [{"Name": "instance-type", "Values": patterns}]
        if self.architecture:
            name = "processor-info.supported-architecture"
            filters.append({"Name": name, "Values": [self.architecture]})
        try:
            found = asked(
                "--schlouder-instance-types",
                ", ".join(words),
                lambda: self._asker.describe_instance_types(Filters=filters)["InstanceTypes"],
            )
        except RightMissing as error:
            findings.lacks(error)
            return ""
        except SchlouderError:
            return ""
        return str(found[0]["InstanceType"])

    def _rehearse_launch(self, type_name: str, market: str, findings: Findings) -> None:
        """A launch that lacks a right is tried again without what needs that right, to find the others."""
        kind = InstanceType(type_name, 1, 1)
        launch = _Launch("rehearsal", ("rehearsal",), "", kind, market, "")
        left_out = {"ClientToken"} if type_name else {"ClientToken", "InstanceType"}
        while True:
            parameters = self._parameters(launch, next(iter(self._subnets(launch)), ""))
            trial = {name: value for name, value in parameters.items() if name not in left_out}
            refusal = dry_run(self._asker.run_instances, **trial)
            if refusal is None:
                raise SchlouderError(
                    f"AWS: the cloud at {self.endpoint} has started a machine in a call that was marked as a "
                    f"dry run, and cannot be used; end the machine tagged {TAG_RUN}=rehearsal"
                )
            if refusal.meaning == Meaning.RIGHTS:
                findings.lacks(RightMissing(refusal))
                needing = _NEEDING.get(refusal.right, "")
                if needing not in trial:
                    return
                left_out.add(needing)
            elif refusal.meaning == Meaning.UNKNOWN and self._abilities.metadata_options:
                self._do_without(
                    "MetadataOptions", replace(self._abilities, metadata_options=False)
                )
            elif refusal.meaning == Meaning.UNKNOWN and self._abilities.tags_on_launch:
                self._do_without(
                    "TagSpecifications", replace(self._abilities, tags_on_launch=False)
                )
            else:
                if self.architecture and "architecture" in str(refusal):
                    return  # The catalog tells it together with the setting.
                if refusal.meaning == Meaning.WRONG and type_name and not findings.problems:
                    findings.problems.append(f"AWS: a {type_name} would be refused ({refusal})")
                return

    def _do_without(self, what: str, abilities: Abilities) -> None:
        self._abilities = abilities
        effects = []
        if not abilities.tags_on_launch:
            effects.append("VMs are started one by one and tagged right after that")
        if not abilities.metadata_options:
            effects.append("IMDSv2 is not demanded")
        self._warn(f"The cloud at {self.endpoint} does not take {what}; {', '.join(effects)}.")

    # -- launches

    def _launch_of(self, request: LaunchRequest) -> _Launch:
        """Where tags cannot go into the launch call, every machine is launched alone, so that its node is
        known without them."""
        launch = _Launch.of(request)
        return launch if self._abilities.tags_on_launch else launch.of_one(request.node)

    def _start(self, launch: _Launch) -> Mapping[str, LaunchOutcome]:
        """One outcome for each node."""
        started = self._run_instances(launch)
        if not isinstance(started, list):
            return dict.fromkeys(launch.nodes, started)
        few = NoCapacity(f"EC2 started only {len(started)} of {len(launch.nodes)} machines")
        outcomes: dict[str, LaunchOutcome] = dict.fromkeys(launch.nodes, few)
        for described in started:
            instance = self._launched(described, launch)
            outcomes[instance.node] = instance
        return outcomes

    def _run_instances(self, launch: _Launch) -> list[Any] | LaunchOutcome:
        """The machines as EC2 describes them. A subnet without free addresses is followed by the next one of
        its zone, under a token of its own; asked again, the launch goes on where it was."""
        from botocore.exceptions import BotoCoreError, ClientError

        self._launches[launch.token] = launch
        outcome: LaunchOutcome = NoCapacity(f"no subnet is in the zone {launch.zone}")
        for number, subnet in enumerate(self._subnets(launch)):
            if number < self._full_subnets.get(launch.token, 0):
                continue
            self._full_subnets[launch.token] = number
            attempt = launch.in_other_subnet(subnet) if number else launch
            self._launches[attempt.token] = launch
            script = self._user_data(launch.nodes, launch.type, launch.market)
            parameters = self._parameters(attempt, subnet)
            try:
                return self._launcher.run_instances(**parameters, UserData=script)["Instances"]
            except ClientError as refusal:
                error = Ec2Error.of(refusal)
                outcome = _outcome(error, launch)
                if error.code != "InsufficientFreeAddressesInSubnet":
                    return outcome
            except BotoCoreError as error:
                return CloudUnavailable(str(error))
        self._full_subnets.pop(launch.token, None)
        return outcome

    def _subnets(self, launch: _Launch) -> tuple[str, ...]:
        """Those to try; an empty name leaves it to the launch template or to EC2."""
        zones = self._place.zones
        if launch.zone:
            return zones.get(launch.zone, ())
        return next(iter(zones.values()), ("",)) if self._settings.subnets else ("",)

    def _parameters(self, launch: _Launch, subnet: str) -> dict[str, Any]:
        """All but the user data."""
        settings, abilities = self._settings, self._abilities
        parameters: dict[str, Any] = {
            "ImageId": settings.image,
            "LaunchTemplate": dict(self._place.template),
            "InstanceType": launch.type.name,
            "MinCount": 1,
            "MaxCount": len(launch.nodes),
            "ClientToken": launch.token,
            "InstanceInitiatedShutdownBehavior": "terminate",
            "MetadataOptions": _IMDS_V2 if abilities.metadata_options else None,
            "TagSpecifications": self._tags_of_launch(launch) if abilities.tags_on_launch else None,
            "InstanceMarketOptions": _SPOT_OPTIONS if launch.market == SPOT else None,
            "SubnetId": subnet,
            "SecurityGroupIds": list(settings.security_groups),
            "KeyName": settings.key_name,
            "IamInstanceProfile": _profile(settings.instance_profile),
            "BlockDeviceMappings": self._volumes(),
        }
        return {name: value for name, value in parameters.items() if value}

    def _volumes(self) -> list[dict[str, Any]]:
        settings = self._settings
        if not (settings.volume_size or settings.volume_encrypted):
            return []
        volume: dict[str, Any] = {"DeleteOnTermination": True}
        if settings.volume_size:
            volume["VolumeSize"] = settings.volume_size
        if settings.volume_encrypted:
            volume["Encrypted"] = True
        return [{"DeviceName": self._place.root_device, "Ebs": volume}]

    def _tags_of_launch(self, launch: _Launch) -> list[dict[str, Any]]:
        """Tags go into the launch call: a machine without them would be nobody's (R3)."""
        kinds = ["instance", "volume"] + ["spot-instances-request"] * (launch.market == SPOT)
        tags = self._tags(launch.run, " ".join(launch.nodes))
        return [{"ResourceType": kind, "Tags": tags} for kind in kinds]

    def _tags(self, run: str, nodes: str) -> list[Any]:
        tags = {
            "Name": f"schlouder-{run}",
            **dict(self._settings.tags),
            TAG_OWNER: self._owner,
            TAG_RUN: run,
            TAG_NODE: nodes,
        }
        return [{"Key": key, "Value": value} for key, value in tags.items()]

    # -- machines

    def _launched(self, described: Mapping[str, Any], launch: _Launch) -> Instance:
        node = launch.node_of(described)
        if TAG_RUN not in tags_of(described):
            if self._abilities.tags_on_launch:
                self._do_without("tags", replace(self._abilities, tags_on_launch=False))
            self._tag(described["InstanceId"], launch.run, node)
        return replace(instance_of(described), run=launch.run, node=node)

    def _tag(self, instance_id: str, run: str, node: str) -> None:
        """Where the cloud could not do so in the launch. Until it is done the machine is known by the token
        of its launch, in this process also with its node."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._ec2.create_tags(Resources=[instance_id], Tags=self._tags(run, node))
        except (BotoCoreError, ClientError) as error:
            self._warn(f"{instance_id} ({node}) could not be tagged yet: {error}")

    def _recognized(self, described: Mapping[str, Any], run: str) -> Instance:
        """A machine of `run` whose tags may be missing still."""
        instance = replace(instance_of(described), run=run)
        launch = self._launches.get(described.get("ClientToken", ""))
        if instance.node or launch is None:
            return instance
        node = launch.node_of(described)
        if instance.is_alive:
            self._tag(instance.id, run, node)
        return replace(instance, node=node)


def describe(ec2: EC2Client, **filters: Any) -> list[Any]:
    """All pages and all reservations: every RunInstances call is a reservation of its own (R6). Raises
    CloudUnavailable."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    pages = ec2.get_paginator("describe_instances").paginate(
        **filters, PaginationConfig={"PageSize": _DESCRIBE_PAGE}
    )
    try:
        return [
            described
            for page in pages
            for reservation in page["Reservations"]
            for described in reservation["Instances"]
        ]
    except (BotoCoreError, ClientError, ResponseParserError) as error:
        raise _unavailable(error) from error


def terminate(ec2: EC2Client, instance_ids: Sequence[str]) -> None:
    """Asks for the end of these machines, as `Cloud.terminate`; raises CloudUnavailable."""
    for start in range(0, len(instance_ids), _TERMINATE_BATCH):
        _terminate_batch(ec2, list(instance_ids[start : start + _TERMINATE_BATCH]))


def _terminate_batch(ec2: EC2Client, instance_ids: list[str]) -> None:
    """One unknown id makes EC2 refuse the whole call, so that each is then asked for alone."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    try:
        ec2.terminate_instances(InstanceIds=instance_ids)
    except ClientError as error:
        if error.response["Error"]["Code"] != "InvalidInstanceID.NotFound":
            raise _unavailable(error) from error
        if len(instance_ids) > 1:
            for instance_id in instance_ids:
                _terminate_batch(ec2, [instance_id])
    except (BotoCoreError, ResponseParserError) as error:
        raise _unavailable(error) from error


def connect(
    settings: Ec2Settings, join: Join, owner: str, warn: Callable[[str], None] = _log.warning
) -> Ec2Cloud:
    """An Ec2Cloud that can be expected to work; SchlouderError names all settings that are wrong and all
    rights that are missing. `warn` is told what the cloud lacks, or does not heed."""
    from botocore.config import Config

    session = aws_session(settings.region)
    brief = Config(connect_timeout=5, read_timeout=20, retries={"mode": "standard"})
    single = Config(connect_timeout=5, read_timeout=60, retries={"total_max_attempts": 1})
    ec2, launcher = aws_client(session, "ec2", brief), aws_client(session, "ec2", single)
    asker = patient_client(session, "ec2")
    service = ClusterKey.parse(join.key).service
    endpoint = aws_client(session, service, brief).meta.endpoint_url

    def script(nodes: Sequence[str], instance_type: InstanceType, market: str) -> str:
        return user_data(join, session.region_name, endpoint, nodes, instance_type, market)

    findings = Findings()
    place = survey(asker, settings, findings, warn)
    cloud = Ec2Cloud(ec2, launcher, settings, owner, script, place, warn, asker)
    cloud.rehearse(findings)
    findings.check()
    return cloud


_IMDS_V2 = {"HttpTokens": "required", "HttpEndpoint": "enabled"}
_SPOT_OPTIONS = {
    "MarketType": "spot",
    "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
}


def _outcome(error: Ec2Error, launch: _Launch) -> LaunchOutcome:
    match error.meaning:
        case Meaning.CAPACITY:
            return NoCapacity(str(error))
        case Meaning.THROTTLED:
            return Throttled(str(error))
        case Meaning.AWAY:
            return CloudUnavailable(str(error))
        case Meaning.QUOTA:
            return QuotaReached(quota_text(error, launch.type.name, launch.market))
        case Meaning.RIGHTS:
            return LaunchRefused(rights_text(error))
        case Meaning.SPENT:
            return TokenSpent(str(error))
        case Meaning.UNKNOWN | Meaning.WRONG | Meaning.ALLOWED:
            return LaunchRefused(str(error))


def _unavailable(failure: Exception) -> CloudUnavailable:
    """`failure`: botocore's, of a call that is no launch."""
    from botocore.exceptions import ClientError

    if not isinstance(failure, ClientError):
        return CloudUnavailable(str(failure))
    error = Ec2Error.of(failure)
    if error.meaning == Meaning.THROTTLED:
        return Throttled(str(error))
    return CloudUnavailable(rights_text(error) if error.meaning == Meaning.RIGHTS else str(error))


def tags_of(described: Mapping[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in described.get("Tags", [])}


def _run_of(described: Mapping[str, Any], runs: Sequence[str]) -> str:
    """Which of these runs has started the machine, by its tag or by the token of its launch; empty: none."""
    token = described.get("ClientToken", "")
    tag = tags_of(described).get(TAG_RUN)
    return next((run for run in runs if tag == run or token.startswith(_mark(run))), "")


def instance_of(described: Mapping[str, Any]) -> Instance:
    tags = tags_of(described)
    nodes = tags.get(TAG_NODE, "").split()
    index = described.get("AmiLaunchIndex", 0) if len(nodes) > 1 else 0
    return Instance(
        described["InstanceId"],
        nodes[index] if index < len(nodes) else "",
        tags.get(TAG_RUN, ""),
        described["State"]["Name"],
        described["InstanceType"],
        _reason(described.get("StateReason", {})),
        described["LaunchTime"].timestamp(),
        _ended(described.get("StateTransitionReason", "")),
        SPOT if described.get("InstanceLifecycle") == "spot" else ON_DEMAND,
        described.get("Placement", {}).get("AvailabilityZone", ""),
    )


def _reason(told: Mapping[str, str]) -> str:
    """Code and message; EC2 mostly puts the code into the message, too."""
    code, message = told.get("Code", ""), told.get("Message", "")
    return message if code in message else f"{code}: {message}"


def _ended(transition: str) -> float | None:
    """The date in a text such as `User initiated (2026-01-31 12:00:00 GMT)`."""
    found = re.search(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)", transition)
    if found is None:
        return None
    return datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp()


def _profile(name: str) -> dict[str, str]:
    if not name:
        return {}
    return {"Arn": name} if name.startswith("arn:") else {"Name": name}
