"""The EC2 service: moto's answers, and around them the behaviour that moto lacks."""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from moto.core.exceptions import ServiceException
from moto.ec2.models.instance_types import INSTANCE_TYPE_OFFERINGS, INSTANCE_TYPES
from moto.ec2.utils import filter_dict_attribute_mapping
from moto.iam.models import iam_backends
from werkzeug.wrappers import Response

from snakemake_executor_plugin_schlouder.localcloud import prices
from snakemake_executor_plugin_schlouder.localcloud.answers import error, reply, xml
from snakemake_executor_plugin_schlouder.localcloud.authorization import (
    ACCOUNT,
    REGION,
    Lookup,
    numbered,
    tags_on_create,
)
from snakemake_executor_plugin_schlouder.localcloud.faults import (
    ON_DEMAND,
    SPOT,
    best_zone,
    fulfilled,
)
from snakemake_executor_plugin_schlouder.localcloud.instances import (
    ENDED,
    Instances,
    backend,
    vcpus,
)
from snakemake_executor_plugin_schlouder.localcloud.prices import Hardware, SpotPrice

# A VM's disk is memory and ends with it, as an instance store does; EC2 refuses these for such instances too.
UNSUPPORTED = {"StopInstances", "StartInstances", "RebootInstances"}
MAY_BE_UNKNOWN = {"DescribeInstances", "TerminateInstances"}
TYPES_PER_PAGE = 100
PRICES_PER_PAGE = 1000
# EC2 API reference, Ensuring idempotency; EC2 user guide, Run commands at launch with user data, and
# Tag your resources: Tag restrictions.
MOST_TOKEN = 64
MOST_USER_DATA = 16384
MOST_TAGS, MOST_TAG_KEY, MOST_TAG_VALUE = 50, 128, 256

Parameters = dict[str, str]
Forward = Callable[[bytes], Response]
Handler = Callable[[Parameters, Forward], Response]

# Filters of DescribeInstances that moto does not know.
filter_dict_attribute_mapping.update(
    {
        "client-token": "client_token",
        "instance-lifecycle": "lifecycle",
        "spot-instance-request-id": "spot_instance_request_id",
    }
)


class LostReply(Exception):
    """The call was carried out; its caller is not to be told."""


class Refusal(Exception):
    """An error of EC2, to be answered as it is."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.answer = error(code, message, status)


@dataclass(frozen=True)
class Launch:
    """A RunInstances call that succeeded under a ClientToken."""

    parameters: Parameters
    answer: bytes
    instances: list[Any]


@dataclass
class Ec2:
    """`zones` are the availability zones with a subnet of this cloud: name → subnet, the default one
    first."""

    instances: Instances
    zones: dict[str, str] = field(default_factory=dict)
    _launches: dict[str, Launch] = field(default_factory=dict)

    def answer(self, parameters: Parameters, forward: Forward) -> Response:
        """To be called with the EC2 lock held; raises LostReply."""
        action = parameters.get("Action", "")
        if action in UNSUPPORTED:
            return error("UnsupportedOperation", f"{action} does not work on these instances.")
        handlers: dict[str, Handler] = {
            "TerminateInstances": self._terminate_instances,
            "GetConsoleOutput": self._console_output,
            "DescribeRegions": _only_region,
            "RegisterImage": _register_image,
        }
        try:
            if action == "RunInstances":
                return self._run_instances(parameters, forward)
            unknown = action in MAY_BE_UNKNOWN and self.instances.injector.knows_nothing()
            with self.instances.as_described(nothing=unknown):
                return handlers.get(action, forward_parameters)(parameters, forward)
        except Refusal as refusal:
            return refusal.answer

    def answer_unlocked(self, parameters: Parameters, forward: Forward) -> Response | None:
        """Answers what depends on nothing that changes, without the EC2 lock; None for all else."""
        handlers: dict[str, Handler] = {
            "DescribeInstanceTypes": self._instance_types,
            "DescribeSpotPriceHistory": self._spot_prices,
        }
        handler = handlers.get(parameters.get("Action", ""))
        try:
            return handler and handler(parameters, forward)
        except Refusal as refusal:
            return refusal.answer

    def rehearse(self, parameters: Parameters) -> Response:
        """The answer to a call that is not to be carried out, once it is known to be allowed.

        EC2 API reference, Common query parameters (DryRun). What is wrong with the parameters of a launch
        comes first; its capacity and its quota are not looked at.
        """
        try:
            if parameters.get("Action") == "RunInstances":
                wanted = self.resolved(parameters)
                self._check_parameters(wanted)
                backend().describe_images(ami_ids=[wanted["ImageId"]])
                self._zones_for(wanted)
        except Refusal as refusal:
            return refusal.answer
        except ServiceException as problem:
            return error(problem.code, problem.message)
        text = "Request would have succeeded, but DryRun flag is set."
        return error("DryRunOperation", text, 412)

    def resolved(self, parameters: Parameters) -> Parameters:
        """The parameters of RunInstances with those of its launch template, over which they take precedence.

        EC2 user guide, Launch instances from a launch template.
        """
        named = {
            key.removeprefix("LaunchTemplate."): value
            for key, value in parameters.items()
            if key.startswith("LaunchTemplate.")
        }
        if not named:
            return parameters
        try:
            version = backend()._get_template_from_args(named)
        except ServiceException:
            return parameters
        given = {_stem(key) for key in parameters}
        wanted = _flat_template(version.data).items()
        resolved = {**{k: v for k, v in wanted if _stem(k) not in given}, **parameters}
        resolved["LaunchTemplate.LaunchTemplateId"] = version.template.id
        return resolved

    def lookup(self) -> Lookup:
        """What authorization asks of this cloud."""

        def tags(resource: str) -> Mapping[str, str]:
            with contextlib.suppress(ServiceException):
                found = backend().describe_tags(filters={"resource-id": [resource]})
                return {tag["key"]: tag["value"] for tag in found}
            return {}

        def role(profile: str) -> str | None:
            for one in iam_backends[ACCOUNT]["aws"].instance_profiles.values():
                if profile in (one.name, one.arn) and one.roles:
                    return str(one.roles[0].arn)
            return None

        return Lookup(tags, role)

    def _run_instances(self, parameters: Parameters, forward: Forward) -> Response:
        token = parameters.get("ClientToken", "")
        injector = self.instances.injector
        if token in self._launches:
            answer = _replay(self._launches[token], parameters)
        else:
            answer, instances = self._launch(self.resolved(parameters), forward)
            if answer.status_code == 200 and token:
                self._launches[token] = Launch(parameters, answer.get_data(), instances)
        if answer.status_code == 200 and injector.loses_reply():
            raise LostReply
        return answer

    def _launch(self, wanted: Parameters, forward: Forward) -> tuple[Response, list[Any]]:
        injector = self.instances.injector
        self._check_parameters(wanted)
        market = wanted.get("InstanceMarketOptions.MarketType", ON_DEMAND)
        kind, zones = wanted.get("InstanceType", "m1.small"), self._zones_for(wanted)
        least, most = int(wanted.get("MinCount", "1")), int(wanted.get("MaxCount", "1"))
        self._check_quota(kind, market, most)
        self._check_bid(wanted, kind, zones[0], market)
        zone, count = best_zone(zones, lambda zone: injector.left(kind, zone, market), least, most)
        injector.struck["capacity"] += count < most
        if count == 0:
            raise self._no_capacity(wanted, kind, zones, market, least)
        if not any(key.endswith("SubnetId") for key in wanted):
            wanted = {**wanted, "SubnetId": self.zones[zone]}
        # moto starts MinCount instances.
        before = set(backend().reservations)
        answer = forward_parameters({**wanted, "MinCount": str(count)}, forward)
        created = [backend().reservations[name] for name in backend().reservations.keys() - before]
        if answer.status_code != 200:
            # moto registers the reservation before it looks at the subnet.
            for reservation in created:
                del backend().reservations[reservation.id]
            return _as_ec2_says(answer), []
        instances = [instance for reservation in created for instance in reservation.instances]
        _give_profile(instances, wanted)
        injector.take(kind, zone, market, count)
        self.instances.begin(instances, market)
        return _with_spot_requests(answer, instances), instances

    def _check_parameters(self, wanted: Parameters) -> None:
        faults = self.instances.injector.faults
        unknown = [*faults.unknown_parameters]
        if faults.no_tags_on_create:
            unknown.append("TagSpecification")
        if "ImageId" not in wanted:
            raise Refusal("MissingParameter", "The request must contain the parameter ImageId")
        for name in sorted({_stem(name) for name in wanted} & set(unknown)):
            raise Refusal("UnknownParameter", f"The parameter {name} is not recognized")
        _validate(wanted)

    def _zones_for(self, wanted: Parameters) -> list[str]:
        """The zones in which the launch may land, the preferred one first.

        EC2 API reference, RunInstances: a subnet decides; else the zone named, by its default subnet; else
        EC2.
        """
        subnets = [value for key, value in wanted.items() if key.endswith("SubnetId")]
        zone = wanted.get("Placement.AvailabilityZone")
        if subnets:
            with contextlib.suppress(ServiceException):
                return [str(backend().get_subnet(subnets[0]).availability_zone)]
            return list(self.zones)
        if zone is None:
            return list(self.zones)
        known = {one.name for one in backend().describe_availability_zones()}
        if zone in known and zone not in self.zones:
            raise Refusal("InvalidInput", f"No default subnet for availability zone: '{zone}'.")
        return [zone] if zone in known else list(self.zones)

    def _check_quota(self, kind: str, market: str, most: int) -> None:
        quota = self.instances.injector.faults.vcpu_quota.get(market)
        if quota is None or kind not in INSTANCE_TYPES:
            return
        if self.instances.vcpus(market) + most * vcpus(kind) > quota:
            raise _over_quota(market, quota)

    def _check_bid(self, wanted: Parameters, kind: str, zone: str, market: str) -> None:
        """EC2 API reference, SpotMarketOptions: MaxPrice."""
        bid = wanted.get("InstanceMarketOptions.SpotOptions.MaxPrice")
        if market == SPOT and bid and self.instances.spot_market.prices.on_demand(kind):
            price = self.instances.spot_market.at(kind, zone, datetime.now(UTC).timestamp()).usd
            if float(bid) < price:
                raise Refusal(
                    "SpotMaxPriceTooLow",
                    f"Your Spot request price of {bid} is lower than the minimum required Spot request "
                    f"fulfillment price of {price:g}.",
                )

    def _no_capacity(
        self, wanted: Parameters, kind: str, zones: list[str], market: str, least: int
    ) -> Refusal:
        """HTTP 500, which SDKs repeat (EC2 API reference, Error codes: InsufficientInstanceCapacity is a
        server error). The messages are those that users publish."""
        if market == SPOT:
            text = "There is no Spot capacity available that matches your request."
        elif len(zones) > 1:
            text = (
                f"We currently do not have sufficient {kind} capacity in zones with support for "
                "'gp2' volumes. Our system will be working on provisioning additional capacity."
            )
        else:
            left = self.instances.injector.left
            others = [
                zone
                for zone in self.zones
                if zone != zones[0] and fulfilled(left(kind, zone, market), least, least)
            ]
            text = (
                f"We currently do not have sufficient {kind} capacity in the Availability Zone you requested "
                f"({zones[0]}). Our system will be working on provisioning additional capacity."
            )
            if others:
                text += (
                    f" You can currently get {kind} capacity by not specifying an Availability Zone in your "
                    f"request or choosing {', '.join(others)}."
                )
        return Refusal("InsufficientInstanceCapacity", text, 500)

    def _terminate_instances(self, parameters: Parameters, forward: Forward) -> Response:
        answer = forward_parameters(parameters, forward)
        if answer.status_code == 200:
            self.instances.terminate(numbered(parameters, "InstanceId"))
        return answer

    def _console_output(self, parameters: Parameters, forward: Forward) -> Response:
        instance_id = parameters.get("InstanceId", "")
        if backend().get_instance_by_id(instance_id) is None:
            return forward_parameters(parameters, forward)
        assert self.instances.hypervisor is not None
        output = base64.b64encode(self.instances.hypervisor.console(instance_id)).decode()
        return reply(
            "GetConsoleOutput",
            f"<instanceId>{instance_id}</instanceId><timestamp>{_time(datetime.now(UTC))}</timestamp>"
            f"<output>{output}</output>",
        )

    def _instance_types(self, parameters: Parameters, forward: Forward) -> Response:
        """In pages, as EC2 (API reference, DescribeInstanceTypes: at most 100 results); moto answers all at
        once, which takes seconds."""
        names = numbered(parameters, "InstanceType")
        if names:
            if "MaxResults" in parameters:
                raise Refusal(
                    "InvalidParameterCombination",
                    "The parameter instanceTypes cannot be used with the parameter maxResults",
                )
            return forward_parameters(parameters, forward)
        try:
            described = backend().describe_instance_types(None, _filters(parameters))
        except ServiceException:
            return forward_parameters(parameters, forward)
        found = [one["InstanceType"] for one in described]
        start, limit = _page_of(parameters, TYPES_PER_PAGE)
        if not found[start:]:
            return reply("DescribeInstanceTypes", "<instanceTypeSet/>")
        shown, token = prices.page(found, start, limit)
        asked = {f"InstanceType.{number}": name for number, name in enumerate(shown, 1)}
        kept = {key: text for key, text in parameters.items() if key in ("Action", "Version")}
        answer = forward_parameters({**kept, **asked}, forward)
        if token is None or answer.status_code != 200:
            return answer
        end = "</DescribeInstanceTypesResponse>"
        text = answer.get_data(as_text=True)
        return xml(text.replace(end, f"<nextToken>{token}</nextToken>{end}"))

    def _spot_prices(self, parameters: Parameters, forward: Forward) -> Response:
        """EC2 API reference, DescribeSpotPriceHistory. Latest first, over all pools asked for."""
        filters = _filters(parameters)
        descriptions = numbered(parameters, "ProductDescription")
        descriptions += filters.get("product-description", [])
        items: Iterator[SpotPrice] = iter(())
        if not descriptions or any(text.startswith("Linux/UNIX") for text in descriptions):
            items = self._history(parameters, filters)
        start, limit = _page_of(parameters, PRICES_PER_PAGE)
        shown, token = prices.page(items, start, limit)
        content = "".join(
            f"<item><instanceType>{one.instance_type}</instanceType>"
            "<productDescription>Linux/UNIX</productDescription>"
            f"<spotPrice>{one.usd:.6f}</spotPrice>"
            f"<timestamp>{_time(datetime.fromtimestamp(one.time, UTC))}</timestamp>"
            f"<availabilityZone>{one.zone}</availabilityZone></item>"
            for one in shown
        )
        return reply(
            "DescribeSpotPriceHistory",
            f"<spotPriceHistorySet>{content}</spotPriceHistorySet><nextToken>{token or ''}</nextToken>",
        )

    def _history(
        self, parameters: Parameters, filters: dict[str, list[str]]
    ) -> Iterator[SpotPrice]:
        market = self.instances.spot_market
        now = datetime.now(UTC).timestamp()
        start = _moment(parameters.get("StartTime"), now - prices.HISTORY_SECONDS)
        start = max(start, now - prices.HISTORY_SECONDS)
        end = min(_moment(parameters.get("EndTime"), now), now)
        if start > end:
            start = end
        wanted = numbered(parameters, "InstanceType") + filters.get("instance-type", [])
        zones = filters.get("availability-zone", [])
        if "AvailabilityZone" in parameters:
            zones = [parameters["AvailabilityZone"]]
        pools = (
            (offer["InstanceType"], offer["Location"])
            for offer in INSTANCE_TYPE_OFFERINGS["availability-zone"][REGION]
            if (not wanted or offer["InstanceType"] in wanted)
            and (not zones or offer["Location"] in zones)
            and market.prices.on_demand(offer["InstanceType"]) is not None
        )
        timelines = [market.changes(*pool, start, end) for pool in pools]
        return prices.latest_first(timelines)


def hardware() -> dict[str, Hardware]:
    """Of every type that moto knows."""
    return {
        name: Hardware(
            vcpus=int(facts["VCpuInfo"]["DefaultVCpus"]),
            memory_mib=int(facts["MemoryInfo"]["SizeInMiB"]),
            architecture=facts["ProcessorInfo"]["SupportedArchitectures"][0],
        )
        for name, facts in INSTANCE_TYPES.items()
    }


def forward_parameters(parameters: Parameters, forward: Forward) -> Response:
    return forward(urlencode(parameters).encode())


def _validate(wanted: Parameters) -> None:
    """The limits of a launch that moto does not know; the messages are EC2's."""
    if len(wanted.get("ClientToken", "")) > MOST_TOKEN:
        raise _invalid(f"Client tokens have at most {MOST_TOKEN} ASCII characters")
    if len(base64.b64decode(wanted.get("UserData", ""))) > MOST_USER_DATA:
        raise _invalid(f"User data is limited to {MOST_USER_DATA} bytes")
    for tags in tags_on_create(wanted).values():
        if len(tags) > MOST_TAGS:
            text = "The maximum number of Tags for a resource has been reached."
            raise Refusal("TagLimitExceeded", text)
        for key, value in tags.items():
            if key.lower().startswith("aws:"):
                raise _invalid("Tag keys starting with 'aws:' are reserved for internal use")
            if len(key) > MOST_TAG_KEY:
                raise _invalid(f"Tag key exceeds the maximum length of {MOST_TAG_KEY} characters")
            if len(value) > MOST_TAG_VALUE:
                raise _invalid(
                    f"Tag value exceeds the maximum length of {MOST_TAG_VALUE} characters"
                )
    _check_architecture(wanted)


def _check_architecture(wanted: Parameters) -> None:
    kind, image_id = wanted.get("InstanceType", "m1.small"), wanted.get("ImageId", "")
    image = backend().amis.get(image_id)
    if image is None or not image.architecture or kind not in INSTANCE_TYPES:
        return
    supported = INSTANCE_TYPES[kind]["ProcessorInfo"]["SupportedArchitectures"]
    if image.architecture not in supported:
        raise _invalid(
            f"The architecture '{','.join(supported)}' of the specified instance type does not match the "
            f"architecture '{image.architecture}' of the specified AMI. Specify an instance type and an "
            "AMI that have matching architectures, and try again. You can use 'describe-instance-types' or "
            "'describe-images' to discover the architecture of the instance type or AMI."
        )


def _invalid(message: str) -> Refusal:
    return Refusal("InvalidParameterValue", message)


def _register_image(parameters: Parameters, forward: Forward) -> Response:
    """moto forgets the architecture."""
    answer = forward_parameters(parameters, forward)
    found = re.search(r"<imageId>(.+?)</imageId>", answer.get_data(as_text=True))
    if found and "Architecture" in parameters:
        backend().amis[found[1]].architecture = parameters["Architecture"]
    return answer


def _only_region(parameters: Parameters, forward: Forward) -> Response:
    """moto knows all of AWS's."""
    return forward_parameters({**parameters, "RegionName.1": REGION}, forward)


def _replay(launch: Launch, parameters: Parameters) -> Response:
    if parameters != launch.parameters:
        return error(
            "IdempotentParameterMismatch",
            "Arguments on this idempotent request are inconsistent with arguments used in previous requests.",
        )
    if all(instance.state in ENDED for instance in launch.instances):
        return error(
            "IdempotentInstanceTerminated",
            "Request resulted in a terminated instance, please use a different ClientToken.",
        )
    return xml(launch.answer.decode())


def _over_quota(market: str, quota: int) -> Refusal:
    """EC2 API reference, RunInstances: MaxCount may not exceed the quota. The two markets' words differ."""
    if market == SPOT:
        return Refusal("MaxSpotInstanceCountExceeded", "Max spot instance count exceeded")
    return Refusal(
        "VcpuLimitExceeded",
        f"You have requested more vCPU capacity than your current vCPU limit of {quota} allows for "
        "the instance bucket that the specified instance type belongs to. Please visit "
        "http://aws.amazon.com/contact-us/ec2-request to request an adjustment to this limit.",
    )


def _with_spot_requests(answer: Response, instances: list[Any]) -> Response:
    """moto knows the spot requests of instances only after it has answered."""
    text = answer.get_data(as_text=True)
    for instance in instances:
        if instance.lifecycle == SPOT:
            name = f"<instanceId>{instance.id}</instanceId>"
            request = f"<spotInstanceRequestId>{instance.spot_instance_request_id}</spotInstanceRequestId>"
            text = text.replace(name, name + request)
    return xml(text)


def _as_ec2_says(refusal: Response) -> Response:
    """moto passes on IAM's own code for an instance profile that does not exist."""
    if b"<Code>NoSuchEntity</Code>" not in refusal.get_data():
        return refusal
    return error("InvalidParameterValue", "Invalid IAM Instance Profile name or ARN")


def _give_profile(instances: list[Any], parameters: Parameters) -> None:
    """moto gives the instance profile to the first instance only."""
    name, arn = (parameters.get(f"IamInstanceProfile.{key}") for key in ("Name", "Arn"))
    if name or arn:
        for instance in instances[1:]:
            backend().associate_iam_instance_profile(instance.id, name, arn)


def _flat_template(data: Mapping[str, Any]) -> Parameters:
    """A launch template's data as parameters of RunInstances, as far as moto does not use them itself."""
    flat: Parameters = {}
    for name in ("ImageId", "InstanceType", "KeyName", "InstanceInitiatedShutdownBehavior"):
        if data.get(name):
            flat[name] = str(data[name])
    if data.get("UserData"):
        flat["UserData"] = str(data["UserData"])
    for name in ("IamInstanceProfile", "InstanceMarketOptions", "Placement", "MetadataOptions"):
        for key, value in (data.get(name) or {}).items():
            if isinstance(value, Mapping):
                flat.update({f"{name}.{key}.{inner}": str(text) for inner, text in value.items()})
            else:
                flat[f"{name}.{key}"] = str(value)
    for number, spec in enumerate(data.get("TagSpecifications") or [], 1):
        flat[f"TagSpecification.{number}.ResourceType"] = spec["ResourceType"]
        for place, tag in enumerate(spec["Tags"], 1):
            flat[f"TagSpecification.{number}.Tag.{place}.Key"] = tag["Key"]
            flat[f"TagSpecification.{number}.Tag.{place}.Value"] = tag.get("Value", "")
    card: Mapping[str, Any] = next(iter(data.get("NetworkInterfaces") or []), {})
    groups = data.get("SecurityGroupIds") or card.get("Groups") or []
    flat.update({f"SecurityGroupId.{number}": str(one) for number, one in enumerate(groups, 1)})
    if card.get("SubnetId"):
        flat["SubnetId"] = str(card["SubnetId"])
    return flat


def _stem(parameter: str) -> str:
    """The part of a parameter's name that a call overrides as a whole."""
    return parameter.partition(".")[0]


def _filters(parameters: Parameters) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    while name := parameters.get(f"Filter.{len(found) + 1}.Name"):
        found[name] = numbered(parameters, f"Filter.{len(found) + 1}.Value")
    return found


def _page_of(parameters: Parameters, most: int) -> tuple[int, int]:
    """Where the page starts that a call asks for, and how long it is."""
    try:
        start = prices.read_token(parameters.get("NextToken"))
    except ValueError:
        raise Refusal("InvalidNextToken", "The token is not valid.") from None
    return start, min(int(parameters.get("MaxResults") or most), most)


def _moment(text: str | None, default: float) -> float:
    if not text:
        return default
    try:
        parsed = datetime.fromisoformat(re.sub(r"Z$", "+00:00", text))
    except ValueError:
        raise Refusal("InvalidParameterValue", f"Invalid value '{text}' for a time") from None
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%S.000Z}"
