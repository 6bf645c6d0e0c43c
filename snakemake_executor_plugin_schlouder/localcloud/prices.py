"""What the embedded cloud charges: list prices, spot price timelines, and the Price List API's view of both.

The list prices (USD an hour, Linux, us-east-1) are public ones of one day and need not be today's.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SPOT_SHARE = 0.3
SPOT_SWING = 0.1
WINDOWS_PER_VCPU = 0.046
HISTORY_SECONDS = 90 * 86400
"""DescribeSpotPriceHistory goes back 90 days (EC2 API reference)."""

# USD per vCPU and hour: within these families every size costs the same per vCPU.
PER_VCPU = {
    "c5": 0.0425,
    "c5a": 0.0385,
    "c6a": 0.03825,
    "c6g": 0.034,
    "c6i": 0.0425,
    "c7a": 0.05132,
    "c7g": 0.03625,
    "c7i": 0.044625,
    "m5": 0.048,
    "m5a": 0.043,
    "m6a": 0.0432,
    "m6g": 0.0385,
    "m6i": 0.048,
    "m7a": 0.05796,
    "m7g": 0.0408,
    "m7i": 0.0504,
    "r5": 0.063,
    "r5a": 0.0565,
    "r6a": 0.0567,
    "r6g": 0.0504,
    "r6i": 0.063,
    "r7a": 0.07608,
    "r7g": 0.05355,
    "r7i": 0.06615,
}
PER_TYPE = {
    "t2.micro": 0.0116,
    "t2.small": 0.023,
    "t2.medium": 0.0464,
    "t2.large": 0.0928,
    "t3.nano": 0.0052,
    "t3.micro": 0.0104,
    "t3.small": 0.0208,
    "t3.medium": 0.0416,
    "t3.large": 0.0832,
    "t3.xlarge": 0.1664,
    "t3.2xlarge": 0.3328,
    "g4dn.xlarge": 0.526,
    "g4dn.2xlarge": 0.752,
    "g4dn.4xlarge": 1.204,
    "g4dn.8xlarge": 2.176,
    "g4dn.12xlarge": 3.912,
    "g5.xlarge": 1.006,
    "g5.2xlarge": 1.212,
    "g5.4xlarge": 1.624,
    "p3.2xlarge": 3.06,
    "p3.8xlarge": 12.24,
}


@dataclass(frozen=True)
class Hardware:
    """What prices and products need to know of an instance type."""

    vcpus: int
    memory_mib: int
    architecture: str


class PriceList:
    """Prices of the types in `hardware`; a type whose family is in neither table has none."""

    def __init__(self, region: str, hardware: Mapping[str, Hardware]) -> None:
        self.region = region
        self._hardware = hardware
        self.types = sorted(name for name in hardware if self.on_demand(name) is not None)

    def on_demand(self, instance_type: str) -> float | None:
        """USD an hour."""
        hardware = self._hardware.get(instance_type)
        family = instance_type.partition(".")[0]
        if hardware is not None and family in PER_VCPU:
            return round(PER_VCPU[family] * hardware.vcpus, 6)
        return PER_TYPE.get(instance_type)

    def products(self) -> list[dict[str, Any]]:
        """All products, in the shape of the Price List API (AWS Billing user guide, Offer file definitions).

        Beside what a user usually means there is what a careless filter finds too: Windows, and the SKUs of
        capacity reservations, allocated (free) and unused.
        """
        return [product for name in self.types for product in self._products_of(name)]

    def _products_of(self, name: str) -> Iterator[dict[str, Any]]:
        price = self.on_demand(name)
        assert price is not None
        windows = price + WINDOWS_PER_VCPU * self._hardware[name].vcpus
        yield self._product(name, price, "Linux", "Used")
        yield self._product(name, 0.0, "Linux", "AllocatedCapacityReservation")
        yield self._product(name, price, "Linux", "UnusedCapacityReservation")
        yield self._product(name, windows, "Windows", "Used")

    def _product(self, name: str, price: float, system: str, capacity: str) -> dict[str, Any]:
        hardware = self._hardware[name]
        usage = {
            "Used": "BoxUsage",
            "UnusedCapacityReservation": "UnusedBox",
            "AllocatedCapacityReservation": "Reservation",
        }[capacity]
        sku = _digest(f"{name} {system} {capacity}")[:16].upper()
        rate = f"{sku}.JRTCKXETXF"
        dimension = {
            "unit": "Hrs",
            "endRange": "Inf",
            "description": f"${price:g} per On Demand {system} {name} Instance Hour",
            "appliesTo": [],
            "rateCode": f"{rate}.6YS6EN2CT7",
            "beginRange": "0",
            "pricePerUnit": {"USD": f"{price:.10f}"},
        }
        term = {
            "priceDimensions": {f"{rate}.6YS6EN2CT7": dimension},
            "sku": sku,
            "effectiveDate": "2026-01-01T00:00:00Z",
            "offerTermCode": "JRTCKXETXF",
            "termAttributes": {},
        }
        attributes = {
            "instanceType": name,
            "vcpu": str(hardware.vcpus),
            "memory": f"{hardware.memory_mib / 1024:g} GiB",
            "processorArchitecture": "64-bit",
            "operatingSystem": system,
            "tenancy": "Shared",
            "preInstalledSw": "NA",
            "licenseModel": "No License required",
            "capacitystatus": capacity,
            "regionCode": self.region,
            "location": "US East (N. Virginia)",
            "locationType": "AWS Region",
            "marketoption": "OnDemand",
            "operation": "RunInstances" if system == "Linux" else "RunInstances:0002",
            "usagetype": f"{usage}:{name}",
            "servicecode": "AmazonEC2",
            "servicename": "Amazon Elastic Compute Cloud",
            "currentGeneration": "Yes",
        }
        return {
            "product": {
                "productFamily": "Compute Instance",
                "attributes": attributes,
                "sku": sku,
            },
            "serviceCode": "AmazonEC2",
            "terms": {"OnDemand": {rate: term}},
            "version": "20260101000000",
            "publicationDate": "2026-01-01T00:00:00Z",
        }


_FILTERS: dict[str, Callable[[str, str], bool]] = {
    "TERM_MATCH": lambda found, wanted: found == wanted,
    "EQUALS": lambda found, wanted: found == wanted,
    "CONTAINS": lambda found, wanted: wanted in found,
    "ANY_OF": lambda found, wanted: found in wanted.split(","),
    "NONE_OF": lambda found, wanted: found not in wanted.split(","),
}


class PricingError(ValueError):
    """An error of the Price List API: its code, and a message."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def get_products(products: Sequence[dict[str, Any]], request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to GetProducts: a page of JSON texts (AWS Price List API reference, GetProducts)."""
    filters = request.get("Filters", [])
    for one in filters:
        if one.get("Type") not in _FILTERS:
            raise PricingError("InvalidParameterException", f"Filter type {one.get('Type')}")
    found = [
        json.dumps(product)
        for product in products
        if product["serviceCode"] == request.get("ServiceCode")
        and all(_passes(product, one) for one in filters)
    ]
    limit = int(request.get("MaxResults", 100))
    if not 1 <= limit <= 100:
        raise PricingError("InvalidParameterException", "MaxResults must be 1 to 100")
    try:
        start = read_token(request.get("NextToken"))
    except ValueError:
        raise PricingError("InvalidNextTokenException", "The pagination token is invalid") from None
    answer: dict[str, Any] = {"FormatVersion": "aws_v1", "PriceList": found[start : start + limit]}
    if start + limit < len(found):
        answer["NextToken"] = make_token(start + limit)
    return answer


def _passes(product: Mapping[str, Any], one: Mapping[str, str]) -> bool:
    details = product["product"]
    values = {**details["attributes"], "productFamily": details["productFamily"]}
    values |= {"ServiceCode": product["serviceCode"], "sku": details["sku"]}
    found = values.get(one["Field"])
    return found is not None and _FILTERS[one["Type"]](found, one["Value"])


@dataclass(frozen=True)
class SpotPrice:
    """The price of a pool from `time` (seconds since the epoch) until its next change."""

    time: int
    instance_type: str
    zone: str
    usd: float

    @property
    def order(self) -> tuple[int, str, str]:
        """Most recent first."""
        return -self.time, self.instance_type, self.zone


@dataclass(frozen=True)
class SpotMarket:
    """Spot prices of every pool: around 30 % of the list price, changed every `period` seconds.

    They are a function of the seed, the pool and the time, so there is nothing to keep, and every pool
    changes at a moment of its own.
    """

    prices: PriceList
    period: int
    seed: int = 0

    def at(self, instance_type: str, zone: str, time: float) -> SpotPrice:
        """The price in effect at a time; the type must have a list price."""
        offset = self._offset(instance_type, zone)
        return self._change(instance_type, zone, int(time - offset) // self.period)

    def changes(
        self, instance_type: str, zone: str, start: float, end: float
    ) -> Iterator[SpotPrice]:
        """Changes until `end`, the latest first, down to the one that was in effect at `start`.

        EC2 API reference, DescribeSpotPriceHistory: it also returns the last price change before the start.
        """
        step = int(end - self._offset(instance_type, zone)) // self.period
        while True:
            change = self._change(instance_type, zone, step)
            yield change
            if change.time <= start:
                return
            step -= 1

    def cost(self, instance_type: str, zone: str, start: int, end: int) -> float:
        """USD for the seconds from `start` to `end`: the price in effect, to the second (AWS whitepaper
        Leveraging EC2 Spot Instances, How Spot Instances work)."""
        total, until = 0.0, end
        for change in self.changes(instance_type, zone, start, end):
            since = max(change.time, start)
            total += change.usd * (until - since) / 3600
            until = since
        return total

    def _offset(self, instance_type: str, zone: str) -> int:
        return int(_digest(f"{self.seed} {instance_type} {zone}"), 16) % self.period

    def _change(self, instance_type: str, zone: str, step: int) -> SpotPrice:
        listed = self.prices.on_demand(instance_type)
        assert listed is not None
        pool = f"{self.seed} {instance_type} {zone}"
        level = _fraction(pool)
        swing = _fraction(f"{pool} {step}")
        share = SPOT_SHARE * (1 + SPOT_SWING * (2 * level - 1) + SPOT_SWING * (2 * swing - 1))
        time = step * self.period + self._offset(instance_type, zone)
        return SpotPrice(time, instance_type, zone, round(listed * share, 6))


def latest_first(timelines: Iterable[Iterator[SpotPrice]]) -> Iterator[SpotPrice]:
    """Merges the changes of several pools."""
    return heapq.merge(*timelines, key=lambda change: change.order)


def make_token(offset: int) -> str:
    return base64.urlsafe_b64encode(f"from {offset}".encode()).decode()


def read_token(token: str | None) -> int:
    """Raises ValueError for a token that `make_token` did not make."""
    if not token:
        return 0
    word, _, offset = base64.urlsafe_b64decode(token).decode().partition(" ")
    if word != "from":
        raise ValueError(token)
    return int(offset)


def page(items: Iterable[Any], start: int, limit: int) -> tuple[list[Any], str | None]:
    """The items from `start` on, `limit` at most, and the token of the next page if there is one."""
    found: list[Any] = []
    for number, item in enumerate(items):
        if number >= start + limit:
            return found, make_token(start + limit)
        if number >= start:
            found.append(item)
    return found, None


def _fraction(text: str) -> float:
    return int(_digest(text)[:12], 16) / 16**12


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
