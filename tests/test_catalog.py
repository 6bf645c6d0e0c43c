"""Types and prices: against moto where it does a call as EC2 does, else against replies in EC2's form."""

from __future__ import annotations

import io
import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from botocore.compat import HTTPHeaders
from botocore.config import Config
from moto import mock_aws

from snakemake_executor_plugin_schlouder.market.answers import DAY, KEPT
from snakemake_executor_plugin_schlouder.market.catalog import Catalog
from snakemake_executor_plugin_schlouder.market.tariff import ON_DEMAND, SPOT, Tariff
from snakemake_executor_plugin_schlouder.model import InstanceType, SchlouderError

REGION = "us-east-1"
NOW = 1_795_392_000.0
"""2026-11-23 00:00 UTC."""

M5 = InstanceType("m5.large", 2, 8192)
C7I = InstanceType("c7i.large", 2, 4096)
PRICES = "instance_type,usd_per_hour\nm5.large,0.096\nc7i.large,0.08925\n"

Reply = tuple[int, str]


class _Raw(io.BytesIO):
    def stream(self, **_options: Any) -> Iterator[bytes]:
        yield self.read()


@dataclass
class World:
    """A catalog, its clock, what it has warned of, and the requests it sent, by call. `replies` are sent back
    in the network's stead; calls without any reach moto, or end in a failure where moto has none."""

    cache: Path
    endpoint: str = ""
    type_table: str = ""
    now: float = NOW
    replies: dict[str, Callable[[dict[str, Any]], Reply]] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    price_list_region: str = ""

    def catalog(self, region: str = REGION) -> Catalog:
        ec2 = self._client("ec2", region)
        return Catalog(
            ec2, self._pricing, self.cache, lambda: self.now, self.warnings.append, self.type_table
        )

    def asked(self, call: str) -> list[dict[str, Any]]:
        return [parameters for name, parameters in self.requests if name == call]

    def _pricing(self, region: str) -> Any:
        self.price_list_region = region
        return self._client("pricing", region)

    def _client(self, service: str, region: str) -> Any:
        client = boto3.client(
            service,  # type: ignore[call-overload]
            region_name=region,
            endpoint_url=self.endpoint or None,
            aws_access_key_id="a",
            aws_secret_access_key="b",
            config=Config(retries={"total_max_attempts": 1}),
        )
        client.meta.events.register_first(f"before-send.{service}.*", self._send)
        return client

    def _send(self, request: Any, event_name: str, **_more: Any) -> AWSResponse | None:
        _, service, call = event_name.split(".")
        body = request.body.decode() if isinstance(request.body, bytes) else request.body
        parameters = json.loads(body) if service == "pricing" else parse_qs(body)
        self.requests.append((call, parameters))
        if call not in self.replies:
            if service == "pricing":
                raise AssertionError("nobody may ask for prices here")
            return None
        status, text = self.replies[call](parameters)
        return AWSResponse(request.url, status, HTTPHeaders(), _Raw(text.encode()))


@pytest.fixture(scope="module", autouse=True)
def _moto() -> Iterator[None]:
    os.environ.setdefault("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")
    with mock_aws():
        yield


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "cache")


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> World:
    """For questions about types only; what one test has asked the next one need not."""
    return World(tmp_path_factory.mktemp("known"))


def error(code: str, message: str = "because") -> Callable[[Any], Reply]:
    """As EC2 sends it."""
    text = (
        f"<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors>"
        "<RequestID>1</RequestID></Response>"
    )
    return lambda _: (400, text)


def names(types: Sequence[InstanceType]) -> list[str]:
    return [kind.name for kind in types]


# -- types


def test_a_name_a_pattern_and_a_family_come_in_the_users_order(known: World) -> None:
    types = known.catalog().types(["m5.large", "c7i.*large", "m6a", "m?i.large"], "x86_64")
    shown = names(types)
    assert shown[0] == "m5.large"
    family = [
        "c7i.large",
        "c7i.xlarge",
        "c7i.2xlarge",
        "c7i.4xlarge",
        "c7i.8xlarge",
        "c7i.12xlarge",
    ]
    assert shown[1:7] == family
    assert shown.index("c7i.48xlarge") < shown.index("m6a.large") < shown.index("m6a.48xlarge")
    assert shown.index("m6a.48xlarge") < shown.index("m7i.large")
    assert len(set(shown)) == len(shown)


def test_a_type_is_what_ec2_says_of_it(known: World) -> None:
    found = known.catalog().types(["t3.micro", "g4dn.xlarge", "g5.12xlarge", "t2.micro"], "x86_64")
    assert found == [
        InstanceType("t3.micro", 2, 1024),
        InstanceType("g4dn.xlarge", 4, 16384, 1, "t4"),
        InstanceType("g5.12xlarge", 48, 196608, 4, "a10g"),
        InstanceType("t2.micro", 1, 1024),
    ]
    assert known.catalog().types(["m6g.large"], "arm64") == [
        InstanceType("m6g.large", 2, 8192, arch="arm64")
    ]


def test_a_pattern_without_a_family_means_types_for_sustained_computing(known: World) -> None:
    shown = names(known.catalog().types(["*.large"], "x86_64"))
    assert "c7i.large" in shown
    assert not {"t3.large", "m4.large", "m6g.large"} & set(shown)


def test_a_family_that_is_named_is_meant_with_all_its_types(known: World) -> None:
    assert "t3.large" in names(known.catalog().types(["t3"], "x86_64"))
    assert "c7i.metal-24xl" in names(known.catalog().types(["c7i.*"], "x86_64"))
    assert "m4.large" in names(known.catalog().types(["m4.*"], "x86_64"))


def refused(world: World, *words: str, arch: str = "x86_64") -> str:
    with pytest.raises(SchlouderError) as caught:
        world.catalog().types(words, arch)
    return str(caught.value)


def test_words_that_match_nothing_are_told_at_once_with_near_misses(known: World) -> None:
    first, second, third = refused(known, "m5.lage", "m5.large", "c77i.*", "zz9").splitlines()
    assert first.startswith(
        "--schlouder-instance-types: 'm5.lage' is no instance type of us-east-1; "
    )
    assert "m5.large" in first.partition("near misses: ")[2]
    assert "'c77i.*' matches no instance type" in second
    assert "c7i" in second.partition("near misses: ")[2]
    assert third.startswith("--schlouder-instance-types: 'zz9' is no instance type of us-east-1")


def test_a_word_of_a_rule_is_told_as_such(known: World) -> None:
    with pytest.raises(
        SchlouderError, match=r"^schlouder_instance_type: 'm5\.lage' is no instance"
    ):
        known.catalog().market(["m5.large"], ["m5.lage"], "x86_64", [], "", [ON_DEMAND])


def test_a_type_of_another_architecture_is_an_error_if_named_and_left_out_of_a_pattern(
    known: World,
) -> None:
    assert refused(known, "m6g.large") == (
        "--schlouder-instance-types: 'm6g.large' has the wrong architecture for the image: arm64, but "
        "the image is for x86_64; leave it out, or give another --schlouder-image"
    )
    assert "'m6g.*' matches only types of the wrong architecture" in refused(known, "m6g.*")
    arm = known.catalog().types(["m?g.large"], "arm64")
    assert {kind.arch for kind in arm} == {"arm64"}


def test_a_pattern_with_nothing_but_burstable_types_says_how_to_get_them(known: World) -> None:
    assert "matches only burstable, bare-metal and previous-generation types (t" in refused(
        known, "t?.large"
    )


def test_an_image_of_unknown_architecture_forbids_nothing(known: World) -> None:
    assert names(known.catalog().types(["m6g.large", "m5.large"], "")) == ["m6g.large", "m5.large"]


def test_types_of_vms_there_are_need_not_be_allowed(known: World) -> None:
    assert names(known.catalog().named(["m5.large", "m6g.large"])) == ["m5.large", "m6g.large"]
    with pytest.raises(SchlouderError, match=r"has no type m5\.lage, but an earlier run"):
        known.catalog().named(["m5.lage"])


def test_nothing_is_asked_about_no_types(world: World) -> None:
    catalog = world.catalog()
    assert catalog.named([]) == [] and catalog.offerings([], ["us-east-1a"]) == set()
    assert world.requests == []


def test_only_the_types_that_are_needed_are_asked_for(world: World) -> None:
    world.catalog().types(["m5.large", "c7i.*"], "x86_64")
    (asked,) = world.asked("DescribeInstanceTypes")
    assert asked["Filter.1.Name"] == ["instance-type"]
    assert (asked["Filter.1.Value.1"], asked["Filter.1.Value.2"]) == (["m5.large"], ["c7i.*"])


def described(*types: str) -> str:
    """DescribeInstanceTypes in EC2's form, shortened."""
    items = "".join(
        f"<item><instanceType>{name}</instanceType><currentGeneration>true</currentGeneration>"
        "<processorInfo><supportedArchitectures><item>i386</item><item>x86_64</item>"
        "</supportedArchitectures></processorInfo><vCpuInfo><defaultVCpus>2</defaultVCpus></vCpuInfo>"
        "<memoryInfo><sizeInMiB>8192</sizeInMiB></memoryInfo></item>"
        for name in types
    )
    return f"<instanceTypeSet>{items}</instanceTypeSet>"


def page(call: str, content: str, token: str = "") -> Reply:
    return 200, f"<{call}Response>{content}<nextToken>{token}</nextToken></{call}Response>"


def two_pages(call: str, first: str, second: str) -> Callable[[dict[str, Any]], Reply]:
    def reply(parameters: dict[str, Any]) -> Reply:
        return page(call, second) if "NextToken" in parameters else page(call, first, "more")

    return reply


def test_all_pages_are_read_and_i386_is_not_preferred(world: World) -> None:
    call = "DescribeInstanceTypes"
    world.replies[call] = two_pages(call, described("a1.large"), described("a2.large"))
    assert world.catalog().types(["a*"], "x86_64") == [
        InstanceType("a1.large", 2, 8192),
        InstanceType("a2.large", 2, 8192),
    ]


# -- what is kept on disk


def cached(world: World) -> Path:
    (path,) = world.cache.iterdir()
    return path


def answering(world: World) -> World:
    world.replies["DescribeInstanceTypes"] = lambda _: page(
        "DescribeInstanceTypes", described("m5.large")
    )
    return world


def test_types_are_asked_for_once_a_week(world: World) -> None:
    answering(world)
    for age, questions in ((0, 1), (KEPT - 1, 1), (KEPT + 1, 2)):
        world.now = NOW + age
        world.catalog().types(["m5.large"], "x86_64")
        assert len(world.asked("DescribeInstanceTypes")) == questions


def test_the_cache_is_its_owners_alone(world: World) -> None:
    answering(world).catalog().types(["m5.large"], "x86_64")
    assert stat.S_IMODE(cached(world).stat().st_mode) == 0o600
    assert stat.S_IMODE(world.cache.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\xfe",
        b"[1]",
        b'{"types m5.large": 3}',
        b'{"types m5.large": [1795392000, null]}',
        b'{"types m5.large": [1795392000, [{"kind": {"name": "m5.large"}, "is_common": true}]]}',
        b'{"types m5.large": [1999999999, []]}',
    ],
)
def test_a_damaged_cache_is_as_good_as_none(world: World, damage: bytes) -> None:
    answering(world).catalog().types(["m5.large"], "x86_64")
    cached(world).write_bytes(damage)
    assert world.catalog().types(["m5.large"], "x86_64") == [M5]
    assert len(world.asked("DescribeInstanceTypes")) == 2
    assert world.catalog().types(["m5.large"], "x86_64") == [M5]
    assert len(world.asked("DescribeInstanceTypes")) == 2


def test_without_a_place_for_a_cache_everything_is_asked_for(world: World) -> None:
    world.cache = Path("/dev/null/cache")
    assert answering(world).catalog().types(["m5.large"], "x86_64") == [M5]


def test_every_region_and_endpoint_has_a_cache_of_its_own(world: World) -> None:
    answering(world)
    world.catalog().types(["m5.large"], "x86_64")
    world.catalog("eu-west-1").types(["m5.large"], "x86_64")
    world.endpoint = "http://cloud.example:8773"
    world.catalog().types(["m5.large"], "x86_64")
    assert len(world.asked("DescribeInstanceTypes")) == len(list(world.cache.iterdir())) == 3


def test_caches_that_nobody_uses_any_more_are_removed(world: World) -> None:
    world.cache.mkdir()
    old, recent, foreign = (world.cache / name for name in ("a.json", "b.json", "c.txt"))
    for path in (old, recent, foreign):
        path.touch()
        os.utime(path, (time.time(), world.now - (DAY if path == recent else 2 * KEPT)))
    answering(world).catalog().types(["m5.large"], "x86_64")
    assert (old.exists(), recent.exists(), foreign.exists()) == (False, True, True)


# -- zones


def test_a_type_is_offered_in_some_zones(world: World) -> None:
    trn1 = InstanceType("trn1.2xlarge", 8, 32768)
    zones = [f"{REGION}{letter}" for letter in "abcdef"]
    found = world.catalog().offerings([M5, trn1], zones)
    assert ("m5.large", "us-east-1a") in found
    assert 0 < sum(kind == "trn1.2xlarge" for kind, _ in found) < len(zones)
    assert world.catalog().offerings([M5], ["us-east-1a"]) == {("m5.large", "us-east-1a")}


def test_where_nobody_tells_the_zones_every_type_is_tried_in_all(world: World) -> None:
    world.replies["DescribeInstanceTypeOfferings"] = error("UnauthorizedOperation")
    assert world.catalog().offerings([M5, C7I], ["a"]) == {("m5.large", "a"), ("c7i.large", "a")}
    assert world.warnings == [
        "these credentials lack the right ec2:DescribeInstanceTypeOfferings (UnauthorizedOperation); "
        "every type counts as offered in every zone."
    ]


# -- prices


def price_list(**prices: str) -> Callable[[dict[str, Any]], Reply]:
    """GetProducts with the on-demand price of each type, on a second page, after an unused capacity block."""

    def reply(parameters: dict[str, Any]) -> Reply:
        terms = {f["Field"]: f["Value"] for f in parameters["Filters"]}
        assert terms == {
            "instanceType": terms["instanceType"],
            "regionCode": REGION,
            "operatingSystem": "Linux",
            "tenancy": "Shared",
            "preInstalledSw": "NA",
            "capacitystatus": "Used",
        }
        price = prices.get(terms["instanceType"].replace(".", "_"))
        if "NextToken" in parameters:
            return 200, json.dumps({"FormatVersion": "aws_v1", "PriceList": [product(price)]})
        free = [product("0.0000000000")] if price else []
        more = {"NextToken": "x"} if price else {}
        return 200, json.dumps({"FormatVersion": "aws_v1", "PriceList": free, **more})

    return reply


def product(price: str | None) -> str:
    dimension = {
        "unit": "Hrs",
        "beginRange": "0",
        "endRange": "Inf",
        "pricePerUnit": {"USD": price},
    }
    offer = {"sku": "X", "offerTermCode": "JRTCKXETXF", "priceDimensions": {"X.J.6": dimension}}
    return json.dumps({"product": {"sku": "X"}, "terms": {"OnDemand": {"X.JRTCKXETXF": offer}}})


def test_on_demand_prices_are_those_of_the_price_list(world: World) -> None:
    world.replies["GetProducts"] = price_list(m5_large="0.0960000000", c7i_large="0.0892500000")
    tariff = world.catalog().tariff([M5, C7I], [], "", [ON_DEMAND])
    assert tariff == Tariff(
        {"m5.large": 0.096, "c7i.large": 0.08925}, {}, "Price List API, 2026-11-23"
    )
    assert world.warnings == []


def test_prices_are_asked_for_once_a_day_and_keep_their_date(world: World) -> None:
    world.replies["GetProducts"] = price_list(m5_large="0.096", c7i_large="0.089")
    world.catalog().tariff([M5], [], "", [ON_DEMAND])
    world.now = NOW + 0.9 * DAY
    tariff = world.catalog().tariff([M5, C7I], [], "", [ON_DEMAND])
    assert (tariff.price("m5.large"), tariff.price("c7i.large")) == (0.096, 0.089)
    assert tariff.source == "Price List API, 2026-11-23"
    assert len(world.asked("GetProducts")) == 4
    world.now = NOW + 1.1 * DAY
    assert world.catalog().tariff([M5], [], "", [ON_DEMAND]).source.endswith("2026-11-24")


@pytest.mark.parametrize(
    ("region", "at"),
    [
        ("us-west-2", "us-east-1"),
        ("eu-west-3", "eu-central-1"),
        ("ap-northeast-1", "ap-south-1"),
        ("cn-north-1", "cn-northwest-1"),
    ],
)
def test_the_price_list_is_asked_where_there_is_one(world: World, region: str, at: str) -> None:
    world.replies["GetProducts"] = lambda _: (200, '{"PriceList": []}')
    tariff = world.catalog(region).tariff([M5], [], "", [ON_DEMAND])
    assert world.price_list_region == at
    assert tariff.source == "unknown: the Price List API has none in USD"


def test_a_type_without_a_price_is_told_and_the_others_have_theirs(world: World) -> None:
    world.replies["GetProducts"] = price_list(m5_large="0.096")
    tariff = world.catalog().tariff([M5, C7I], [], "", [ON_DEMAND])
    assert (tariff.price("m5.large"), tariff.price("c7i.large")) == (0.096, None)
    assert world.warnings == [
        "the price of c7i.large is unknown: the Price List API has none in USD. Prices can also be "
        "given in a table with --schlouder-prices."
    ]


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (
            (400, '{"__type": "AccessDeniedException", "message": "User is not authorized"}'),
            "these credentials lack the right pricing:GetProducts (AccessDeniedException)",
        ),
        ((404, "not here"), "GetProducts failed (HTTP 404)"),
        ((500, "<!doctype html>"), "GetProducts failed (HTTP 500)"),
        ((200, '{"PriceList": ["{}"]}'), "the answer to GetProducts cannot be read"),
    ],
)
def test_without_a_price_list_the_run_goes_on_with_one_line(
    world: World, reply: Reply, why: str
) -> None:
    world.replies["GetProducts"] = lambda _: reply
    tariff = world.catalog().tariff([M5, C7I], [], "", [ON_DEMAND])
    assert tariff.price("m5.large") is None
    assert tariff.source.startswith(f"unknown: {why}")
    (line,) = world.warnings
    assert line.startswith(f"the price of m5.large, c7i.large is unknown: {why}")
    assert "--schlouder-prices" in line and "\n" not in line


def test_the_users_table_is_taken_as_it_is_and_nobody_asked(world: World, tmp_path: Path) -> None:
    (tmp_path / "prices.csv").write_text(PRICES)
    tariff = world.catalog().tariff([M5, C7I], [], str(tmp_path / "prices.csv"), [ON_DEMAND])
    assert (tariff.price("m5.large"), tariff.source) == (0.096, "prices.csv")
    assert world.requests == []


def test_a_hole_in_the_users_table_is_an_error(world: World, tmp_path: Path) -> None:
    path = tmp_path / "prices.csv"
    path.write_text(PRICES.replace("m5.large", "m5.xlarge"))
    with pytest.raises(SchlouderError) as caught:
        world.catalog().tariff([M5, C7I], [], str(path), [ON_DEMAND])
    assert str(caught.value) == (
        f"--schlouder-prices: {path}: no on-demand price of m5.large, which may be used; add it, or "
        "change --schlouder-instance-types"
    )
    path.write_text("instance_type,market,zone,usd_per_hour\nm5.large,spot,a,1\n")
    with pytest.raises(SchlouderError, match=r"no spot price of m5\.large in b, which"):
        world.catalog().tariff([M5], ["a", "b"], str(path), [SPOT])


def test_a_table_that_cannot_be_read_is_an_error(world: World, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(SchlouderError, match=r"--schlouder-prices: .* cannot be read"):
            world.catalog().tariff([M5], [], str(path), [ON_DEMAND])
    world.type_table = str(tmp_path / "none.csv")
    with pytest.raises(SchlouderError, match=r"--schlouder-type-table: .* cannot be read"):
        world.catalog()


# -- spot


def change(kind: str, zone: str, price: str, at: str) -> str:
    return (
        f"<item><instanceType>{kind}</instanceType><productDescription>Linux/UNIX</productDescription>"
        f"<spotPrice>{price}</spotPrice><timestamp>{at}</timestamp>"
        f"<availabilityZone>{zone}</availabilityZone></item>"
    )


def spot_pages(first: str, second: str) -> Callable[[dict[str, Any]], Reply]:
    call = "DescribeSpotPriceHistory"
    pages = (f"<spotPriceHistorySet>{changes}</spotPriceHistorySet>" for changes in (first, second))
    return two_pages(call, *pages)


CHANGES = spot_pages(
    change("m5.large", "us-east-1a", "0.040000", "2026-11-22T22:00:00.000Z")
    + change("m5.large", "us-east-1b", "0.035000", "2026-11-20T00:00:00.000Z"),
    change("m5.large", "us-east-1a", "0.030000", "2026-11-21T00:00:00.000Z"),
)


def test_the_spot_price_is_the_newest_of_every_zone(world: World) -> None:
    world.replies["DescribeSpotPriceHistory"] = CHANGES
    tariff = world.catalog().tariff([M5], ["us-east-1a", "us-east-1b"], "", [SPOT])
    assert tariff.price("m5.large", SPOT, "us-east-1a") == 0.04
    assert tariff.price("m5.large", SPOT) == 0.035
    assert tariff.source == "DescribeSpotPriceHistory, 2026-11-23 00:00 UTC"
    asked = world.asked("DescribeSpotPriceHistory")[0]
    assert asked["StartTime"] == asked["EndTime"] == ["2026-11-23T00:00:00Z"]
    assert asked["ProductDescription.1"] == ["Linux/UNIX"]
    assert asked["Filter.1.Value.2"] == ["us-east-1b"]


def test_what_spot_has_cost_follows_from_the_history(world: World) -> None:
    world.replies["DescribeSpotPriceHistory"] = CHANGES
    history = world.catalog().spot_history([M5], [], NOW - DAY)
    assert history.paid("m5.large", "us-east-1a", NOW - 3 * 3600, NOW - 3600) == pytest.approx(0.07)
    assert history.paid("m5.large", "us-east-1b", NOW - 3600, NOW) == pytest.approx(0.035)
    assert world.asked("DescribeSpotPriceHistory")[0]["StartTime"] == ["2026-11-22T00:00:00Z"]


def test_spot_prices_are_not_kept(world: World) -> None:
    world.replies["DescribeSpotPriceHistory"] = CHANGES
    world.catalog().tariff([M5], [], "", [SPOT])
    assert not world.cache.exists()


def test_both_markets_are_told_with_their_sources(world: World, tmp_path: Path) -> None:
    world.replies["DescribeSpotPriceHistory"] = CHANGES
    (tmp_path / "prices.csv").write_text(PRICES)
    tariff = world.catalog().tariff([M5], [], str(tmp_path / "prices.csv"), [ON_DEMAND, SPOT])
    assert (tariff.price("m5.large"), tariff.price("m5.large", SPOT)) == (0.096, 0.035)
    assert tariff.source == (
        "on-demand: prices.csv; spot: DescribeSpotPriceHistory, 2026-11-23 00:00 UTC"
    )


def test_without_a_history_spot_prices_are_unknown(world: World) -> None:
    world.replies["DescribeSpotPriceHistory"] = error("UnauthorizedOperation")
    tariff = world.catalog().tariff([M5], [], "", [SPOT])
    assert tariff.source.startswith("unknown: these credentials lack the right ec2:DescribeSpotPr")
    assert world.catalog().spot_history([M5], [], NOW).paid("m5.large", "a", NOW, NOW + 1) is None
    assert len(world.warnings) == 2


# -- clouds that are like EC2


@pytest.fixture
def other(world: World) -> World:
    world.endpoint = "http://cloud.example:8773/services/compute"
    missing = error("InvalidAction", "The action is not valid for this web service.")
    for call in ("Types", "TypeOfferings"):
        world.replies[f"DescribeInstance{call}"] = missing
    world.replies["DescribeSpotPriceHistory"] = missing
    world.replies["GetProducts"] = lambda _: (404, "")
    return world


@pytest.mark.parametrize(
    "reply",
    [
        error("InvalidAction"),
        error("UnsupportedOperation"),
        lambda _: (200, "this is no XML"),
        lambda _: (404, "not found"),
        lambda _: page("DescribeInstanceTypes", "<instanceTypeSet><item/></instanceTypeSet>"),
        lambda _: page(
            "DescribeInstanceTypes", "<instanceTypeDetails><item/></instanceTypeDetails>"
        ),
    ],
)
def test_a_cloud_that_does_not_describe_its_types_needs_a_table(
    other: World, reply: Callable[[Any], Reply]
) -> None:
    other.replies["DescribeInstanceTypes"] = reply
    message = refused(other, "m1.small")
    assert "--schlouder-type-table, columns instance_type, vcpus, memory_mib and" in message


def test_credentials_that_may_not_ask_are_no_reason_for_a_table(world: World) -> None:
    world.replies["DescribeInstanceTypes"] = error("UnauthorizedOperation")
    assert refused(world, "m5.large") == (
        "AWS: these credentials lack the right ec2:DescribeInstanceTypes (UnauthorizedOperation)"
    )


def test_with_a_table_of_types_nobody_is_asked(other: World, tmp_path: Path) -> None:
    other.type_table = str(tmp_path / "types.csv")
    Path(other.type_table).write_text(
        "instance_type,vcpus,memory_mib,arch,gpus,gpu_model,usd_per_hour\n"
        "SCS-2V-8,2,8192,,,,0.05\nm1.small,1,2048,,,,0.02\nm1.big,4,8192,,1,A100,0.9\n"
        "arm.small,1,2048,arm64,,,0.01\n"
    )
    catalog = other.catalog()
    types = catalog.types(["m1", "SCS-2V-8"], "x86_64")
    assert types == [
        InstanceType("m1.small", 1, 2048),
        InstanceType("m1.big", 4, 8192, 1, "a100"),
        InstanceType("SCS-2V-8", 2, 8192),
    ]
    assert names(catalog.types(["*"], "arm64")) == ["arm.small"]
    assert catalog.named(["m1.big"]) == [types[1]]
    assert catalog.offerings(types[:1], ["nova"]) == {("m1.small", "nova")}
    tariff = catalog.tariff(types, ["nova"], "", [ON_DEMAND])
    assert (tariff.price("m1.big"), tariff.source) == (0.9, "types.csv")
    assert other.requests == [] and other.warnings == []
    assert "near misses: m1.small" in refused(other, "m1.smal")


def test_a_cloud_without_zones_and_prices_is_used_without_them(other: World) -> None:
    catalog = other.catalog()
    assert catalog.offerings([M5], []) == {("m5.large", "")}
    tariff = catalog.tariff([M5], [], "", [ON_DEMAND, SPOT])
    assert tariff.source.startswith(
        "unknown: GetProducts failed (HTTP 404); this cloud has no call"
    )
    assert (tariff.price("m5.large"), tariff.price("m5.large", SPOT)) == (None, None)
    assert len(other.warnings) == 3


def test_another_clouds_machines_have_not_awss_prices(other: World) -> None:
    catalog = other.catalog()
    other.endpoint = ""
    tariff = catalog.tariff([M5], [], "", [ON_DEMAND])
    assert "is not AWS, whose price list is the only one known" in tariff.source
    assert other.asked("GetProducts") == []
