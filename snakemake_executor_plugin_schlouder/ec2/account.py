"""What an account has of what the settings name: asked before anything is started, so that a typing
error or a missing right costs no VM."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..model import ON_DEMAND, SchlouderError
from .errors import CODES, HOW_TO_GET_RIGHTS, Ec2Error, Meaning, rights_text

if TYPE_CHECKING:
    import boto3
    from botocore.config import Config
    from mypy_boto3_ec2 import EC2Client

PROBE_INSTANCE = "i-00000000000000000"
"""An id no instance has: a policy that allows TerminateInstances by tag must allow it on this one too, or
the check of rights takes it for one that does not allow it at all."""

_PATIENT_ATTEMPTS = 10
_LONGEST_PAUSE = 10.0


@dataclass(frozen=True)
class Ec2Settings:
    """Where and how to launch; empty values mean the launch template's, or else EC2's own default.
    `launch_template` is an id or a name, both with `:version` behind them or not; `volume_size` in GiB;
    `types` (names and patterns) and `markets` are what may be launched, for the check of rights."""

    region: str
    image: str = ""
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    key_name: str = ""
    instance_profile: str = ""
    launch_template: str = ""
    volume_size: int = 0
    volume_encrypted: bool = False
    tags: tuple[tuple[str, str], ...] = ()
    types: tuple[str, ...] = ()
    markets: tuple[str, ...] = (ON_DEMAND,)


@dataclass(frozen=True)
class Place:
    """What EC2 says of the settings. `template` is what RunInstances takes as LaunchTemplate; `zones` has the
    subnets of each zone, the first to be tried first."""

    architecture: str = ""
    root_device: str = ""
    template: Mapping[str, str] = field(default_factory=dict)
    zones: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Abilities:
    """What a cloud with EC2's API takes in its launch call."""

    tags_on_launch: bool = True
    metadata_options: bool = True


class CloudAway(SchlouderError):
    """EC2 does not answer questions at all."""


class RightMissing(SchlouderError):
    def __init__(self, error: Ec2Error) -> None:
        super().__init__(f"AWS: {rights_text(error)}")
        self.right, self.resource = error.right, error.resource


class Findings:
    """Asks on after a refusal, so that everything that is wrong can be told in one error."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._missing: dict[str, str] = {}

    def asked(self, setting: str, value: str, question: Callable[[], Iterable[Any]]) -> list[Any]:
        """The answer; nothing where it is a problem."""
        try:
            return asked(setting, value, question)
        except CloudAway:
            raise
        except RightMissing as error:
            self.lacks(error)
        except SchlouderError as error:
            self.problems.append(str(error))
        return []

    def lacks(self, error: RightMissing) -> None:
        if error.right:
            self._missing.setdefault(error.right, error.resource)
        elif str(error) not in self.problems:
            self.problems.append(str(error))

    def check(self) -> None:
        """SchlouderError if there is anything wrong."""
        rights = [f"{right} (on {on})" if on else right for right, on in self._missing.items()]
        if rights:
            self.problems.append(
                f"AWS: these credentials lack rights that a run needs: {', '.join(rights)}; "
                f"{HOW_TO_GET_RIGHTS}"
            )
        if self.problems:
            raise SchlouderError("\n".join(self.problems))


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


def aws_client(session: boto3.Session, service: str, config: Config, region: str = "") -> Any:
    """`region`: another one than that of the session."""
    from botocore.exceptions import BotoCoreError, InvalidRegionError

    try:
        return session.client(  # type: ignore[call-overload]
            service, config=config, region_name=region or None
        )
    except InvalidRegionError as error:
        raise SchlouderError(
            f"--schlouder-region: {region or session.region_name!r} is no AWS region such as eu-west-1"
        ) from error
    except (BotoCoreError, ValueError) as error:
        raise SchlouderError(f"AWS: {error}; check AWS_ENDPOINT_URL and ~/.aws/config") from error


def patient_client(session: boto3.Session, service: str, region: str = "") -> Any:
    """One for questions that are asked but once: what is throttled is repeated for a minute. The buckets of
    an account are shared by all who use it, and fill up again within seconds."""
    from botocore.config import Config

    config = Config(connect_timeout=5, read_timeout=20, retries={"mode": "standard"})
    client = aws_client(session, service, config, region)
    client.meta.events.register(f"needs-retry.{service}", throttle_pause)
    return client


def throttle_pause(
    response: tuple[object, Mapping[str, Any]] | None, attempts: int, **_event: object
) -> float | None:
    """botocore's question, after its own repetitions, how many seconds to wait before the next try; None:
    there is none. `response`: the HTTP one, and what it says."""
    told = {} if response is None else response[1].get("Error", {})
    if attempts >= _PATIENT_ATTEMPTS or told.get("Code") not in CODES[Meaning.THROTTLED]:
        return None
    return min(_LONGEST_PAUSE, 2.0 ** (attempts - 1)) * random.uniform(0.5, 1.0)


def asked(setting: str, value: str, question: Callable[[], Iterable[Any]]) -> list[Any]:
    """The answer to one question about a setting's value; SchlouderError if there is none."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        answer = list(question())
    except ClientError as refusal:
        error = Ec2Error.of(refusal)
        if error.meaning is Meaning.RIGHTS:
            raise RightMissing(error) from refusal
        _check_presence(error)
        raise SchlouderError(f"{setting}: {value!r} was refused by EC2 ({error})") from refusal
    except BotoCoreError as error:
        raise _no_answer(error) from error
    if not answer:
        raise SchlouderError(f"{setting}: EC2 knows no {value!r} in this region")
    return answer


def dry_run(call: Callable[..., Any], **parameters: Any) -> Ec2Error | None:
    """What EC2 says to `call` if it is not to be done; None: it took no notice of that, and did it."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        call(**parameters, DryRun=True)
    except ClientError as refusal:
        error = Ec2Error.of(refusal)
        _check_presence(error)
        return error
    except BotoCoreError as error:
        raise _no_answer(error) from error
    return None


def _check_presence(error: Ec2Error) -> None:
    if error.meaning in (Meaning.THROTTLED, Meaning.AWAY):
        raise CloudAway(f"AWS: EC2 does not answer ({error}); try again later")


def _no_answer(error: Exception) -> SchlouderError:
    from botocore.exceptions import ConnectTimeoutError, EndpointConnectionError

    if isinstance(error, EndpointConnectionError | ConnectTimeoutError):
        return CloudAway(
            f"AWS: EC2 cannot be reached ({error}); check the network, the region and AWS_ENDPOINT_URL"
        )
    return SchlouderError(f"AWS: {error}")


def survey(
    ec2: EC2Client, settings: Ec2Settings, findings: Findings, warn: Callable[[str], None]
) -> Place:
    """Asks for everything that a launch will name."""
    reference, template = _template(ec2, settings, findings, warn)
    image = _image(ec2, settings, template, findings)
    if settings.key_name:
        key = settings.key_name
        findings.asked(
            "--schlouder-key-name",
            key,
            lambda: ec2.describe_key_pairs(KeyNames=[key])["KeyPairs"],
        )
    return Place(
        image.get("Architecture", ""),
        image.get("RootDeviceName", ""),
        reference,
        _zones(ec2, settings, template, findings),
    )


def _template(
    ec2: EC2Client, settings: Ec2Settings, findings: Findings, warn: Callable[[str], None]
) -> tuple[dict[str, str], Mapping[str, Any]]:
    """The launch template of the settings, as RunInstances is to name it, and what it says. Its version is
    the one of now: a later default would be another launch under the same token."""
    given = settings.launch_template
    if not given:
        return {}, {}
    name, _, version = given.partition(":")
    key = "LaunchTemplateId" if name.startswith("lt-") else "LaunchTemplateName"
    question: dict[str, Any] = {key: name, "Versions": [version or "$Default"]}
    setting = "--schlouder-launch-template"
    found = findings.asked(
        setting,
        given,
        lambda: ec2.describe_launch_template_versions(**question, ResolveAlias=True)[
            "LaunchTemplateVersions"
        ],
    )
    if not found:
        return {}, {}
    data = found[0]["LaunchTemplateData"]
    if data.get("InstanceMarketOptions"):
        findings.problems.append(
            f"{setting}: {given!r} has a purchasing option (InstanceMarketOptions), which no launch can "
            "take back; use a version without one, and --schlouder-spot"
        )
    if data.get("NetworkInterfaces") and (settings.subnets or settings.security_groups):
        findings.problems.append(
            f"{setting}: {given!r} has network interfaces, beside which --schlouder-subnets and "
            "--schlouder-security-groups are not allowed; give the one or the other"
        )
    if data.get("UserData"):
        warn(f"{setting}: the user data of {given} is not used; VMs run schlouder's own.")
    return {key: name, "Version": str(found[0]["VersionNumber"])}, data


def _image(
    ec2: EC2Client, settings: Ec2Settings, template: Mapping[str, Any], findings: Findings
) -> Mapping[str, Any]:
    image = settings.image or template.get("ImageId", "")
    setting = "--schlouder-image"
    if not image:
        if template or not settings.launch_template:
            findings.problems.append(
                f"{setting}: not given, and no launch template names one; the id of a machine image "
                "(ami-...) is needed"
            )
        return {}
    found = findings.asked(setting, image, lambda: ec2.describe_images(ImageIds=[image])["Images"])
    if not found:
        return {}
    _check_volume(settings, found[0], findings)
    return found[0]  # type: ignore[no-any-return]


def _check_volume(settings: Ec2Settings, image: Mapping[str, Any], findings: Findings) -> None:
    root = image.get("RootDeviceName", "")
    if not root and (settings.volume_size or settings.volume_encrypted):
        findings.problems.append(
            "--schlouder-volume-size, --schlouder-volume-encrypted: not allowed, because the image "
            f"{image.get('ImageId')} names no root device"
        )
    sizes = [
        mapping.get("Ebs", {}).get("VolumeSize", 0)
        for mapping in image.get("BlockDeviceMappings", [])
        if mapping.get("DeviceName") == root
    ]
    if settings.volume_size and max(sizes, default=0) > settings.volume_size:
        findings.problems.append(
            f"--schlouder-volume-size: {settings.volume_size} is not allowed; the image's own volume has "
            f"{max(sizes)} GiB"
        )


def _zones(
    ec2: EC2Client, settings: Ec2Settings, template: Mapping[str, Any], findings: Findings
) -> dict[str, tuple[str, ...]]:
    """The zones that can be launched in, with their subnets; none if that is the launch template's or the
    cloud's affair."""
    if template.get("NetworkInterfaces"):
        return {}
    if settings.subnets:
        by_id = {
            subnet["SubnetId"]: subnet
            for name in settings.subnets
            for subnet in findings.asked("--schlouder-subnets", name, _subnet(ec2, name))
        }
        subnets = [by_id[name] for name in settings.subnets if name in by_id]
    else:
        subnets = _default_subnets(ec2)
    _check_networks(ec2, settings, subnets, findings)
    zones: dict[str, tuple[str, ...]] = {}
    for subnet in subnets:
        zone = subnet.get("AvailabilityZone", "")
        zones[zone] = (*zones.get(zone, ()), subnet["SubnetId"])
    return zones


def _subnet(ec2: EC2Client, name: str) -> Callable[[], Iterable[Any]]:
    return lambda: ec2.describe_subnets(SubnetIds=[name])["Subnets"]


def _default_subnets(ec2: EC2Client) -> list[Any]:
    """Those of the default VPC; none where there is no such thing: EC2 then chooses, or refuses."""
    from botocore.exceptions import ClientError

    try:
        answer = ec2.describe_subnets(Filters=[{"Name": "default-for-az", "Values": ["true"]}])
    except ClientError:
        return []
    return sorted(answer["Subnets"], key=lambda subnet: subnet.get("AvailabilityZone", ""))


def _check_networks(
    ec2: EC2Client, settings: Ec2Settings, subnets: Sequence[Any], findings: Findings
) -> None:
    """Subnets and security groups of a launch must be of one VPC."""
    vpcs = {subnet.get("VpcId", ""): subnet["SubnetId"] for subnet in reversed(subnets)}
    if len(vpcs) > 1:
        told = ", ".join(f"{subnet} is in {vpc}" for vpc, subnet in reversed(vpcs.items()))
        findings.problems.append(f"--schlouder-subnets: {told}; all must be of one VPC")
    for group in settings.security_groups:
        found = findings.asked("--schlouder-security-groups", group, _group(ec2, group))
        vpc = found[0].get("VpcId", "") if found else ""
        if vpc and vpcs and vpc not in vpcs:
            there = "the subnets are" if settings.subnets else "VMs are started"
            findings.problems.append(
                f"--schlouder-security-groups: {group} is in {vpc}, {there} in {next(iter(vpcs))}; "
                "all must be of one VPC"
            )


def _group(ec2: EC2Client, name: str) -> Callable[[], Iterable[Any]]:
    return lambda: ec2.describe_security_groups(GroupIds=[name])["SecurityGroups"]
