"""What machines cost: plain data, no clock, no I/O. Prices are USD an hour, dates seconds since the epoch."""

from __future__ import annotations

import functools
import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..model import ON_DEMAND as ON_DEMAND
from ..model import SPOT as SPOT

_HOUR = 3600.0


@dataclass(frozen=True)
class Tariff:
    """Prices by type, those of spot by type and zone; the zone "" stands for all that are not named.
    `source` tells people where they come from, and of which date they are."""

    on_demand: Mapping[str, float]
    spot: Mapping[tuple[str, str], float]
    source: str

    @classmethod
    def unknown(cls, why: str = "nobody was asked") -> Tariff:
        return cls({}, {}, f"unknown: {why}")

    def price(self, kind: str, market: str = ON_DEMAND, zone: str = "") -> float | None:
        """USD an hour of a machine of this type, None if unknown; of spot without a zone: in the cheapest."""
        if market == ON_DEMAND:
            return self.on_demand.get(kind)
        if not zone:
            return self._cheapest_spot.get(kind)
        return self.spot.get((kind, zone), self.spot.get((kind, "")))

    @functools.cached_property
    def _cheapest_spot(self) -> dict[str, float]:
        cheapest: dict[str, float] = {}
        for (kind, _), price in self.spot.items():
            cheapest[kind] = min(price, cheapest.get(kind, price))
        return cheapest


@dataclass(frozen=True)
class SpotHistory:
    """The steps of the spot price by type and zone, as (date, price) in order of time."""

    steps: Mapping[tuple[str, str], tuple[tuple[float, float], ...]]

    @classmethod
    def of(cls, changes: Iterable[tuple[str, str, float, float]]) -> SpotHistory:
        """From (type, zone, date, price) in any order."""
        steps: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for kind, zone, date, price in changes:
            steps.setdefault((kind, zone), []).append((date, price))
        return cls({place: tuple(sorted(taken)) for place, taken in steps.items()})

    def paid(
        self, kind: str, zone: str, begun: float, ended: float, reclaimed: bool = False
    ) -> float | None:
        """USD that EC2 charges for a spot machine billed from `begun` to `ended`; None if the price at
        `begun` is unknown. The last known price holds on.

        One pays the spot price in effect, to the second ("How Spot Instances Work", AWS whitepaper
        "Leveraging Amazon EC2 Spot Instances at Scale"), and nothing for a machine that EC2 itself took
        back within its first hour ("Billing for interrupted Spot Instances", EC2 User Guide).
        """
        steps = self.steps.get((kind, zone), ())
        first = bisect_right(steps, (begun, math.inf)) - 1
        if first < 0:
            return None
        if reclaimed and ended - begun < _HOUR:
            return 0.0
        until = [date for date, _ in steps[first + 1 :]] + [math.inf]
        return sum(
            price * max(0.0, min(end, ended) - max(date, begun)) / _HOUR
            for (date, price), end in zip(steps[first:], until, strict=True)
        )


def listed_price(entry: str) -> float:
    """The on-demand price of an entry of the Price List API (a JSON text of its own) in USD an hour, 0 if it
    has none; ValueError if this is no such entry."""
    try:
        dimensions = [
            dimension
            for term in json.loads(entry)["terms"].get("OnDemand", {}).values()
            for dimension in term["priceDimensions"].values()
        ]
        prices = [
            float(dimension["pricePerUnit"].get("USD", 0))
            for dimension in dimensions
            if dimension["unit"] == "Hrs"
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no entry of a price list: {error!r}") from error
    return max((price for price in prices if math.isfinite(price)), default=0.0)
