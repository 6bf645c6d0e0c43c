"""The provider's own meter: what every instance of the embedded cloud would be billed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from snakemake_executor_plugin_schlouder.localcloud.faults import SPOT
from snakemake_executor_plugin_schlouder.localcloud.prices import SpotMarket

HOUR = 3600


@dataclass(frozen=True)
class Billing:
    """Seconds: usage is rounded up to whole units, and is never less than the minimum.

    Linux on EC2: 1 and 60 (EC2 user guide, Billing: per second, with a minimum of 60 seconds).
    """

    unit: int = 1
    minimum: int = 60

    def billed(self, seconds: int) -> int:
        return math.ceil(max(seconds, self.minimum) / self.unit) * self.unit


@dataclass(frozen=True)
class Usage:
    """One instance. Times are whole seconds since the epoch: LaunchTime, and when it left pending or running.

    `interrupted`: EC2 took it back.
    """

    instance_id: str
    instance_type: str
    market: str
    zone: str
    launched: int
    ended: int | None
    interrupted: bool


@dataclass(frozen=True)
class MeterEntry:
    """What the provider bills for one instance, up to now if `ended` is None.

    `usd_per_hour` is the list price, or the mean of the spot price over the billed time; None, as `usd`,
    for a type that has no price here. The clock runs from LaunchTime, which clients see; EC2's own starts
    when the instance is running, some seconds later (EC2 user guide, Instance lifecycle: pending is not
    billed), which Describe does not show.
    """

    instance_id: str
    instance_type: str
    market: str
    zone: str
    launched: int
    ended: int | None
    seconds: int
    billed_seconds: int
    usd_per_hour: float | None
    usd: float | None
    interrupted: bool


def metered(usage: Usage, now: float, billing: Billing, market: SpotMarket) -> MeterEntry:
    end = int(now) if usage.ended is None else usage.ended
    seconds = max(end - usage.launched, 0)
    billed = 0 if _is_free(usage, seconds) else billing.billed(seconds)
    price = market.prices.on_demand(usage.instance_type)
    usd = None if price is None else price * billed / HOUR
    if price is not None and usage.market == SPOT:
        usd = _spot_cost(usage, end, billed, market)
        price = usd / billed * HOUR if billed else market.at(*_pool(usage), usage.launched).usd
    return MeterEntry(
        instance_id=usage.instance_id,
        instance_type=usage.instance_type,
        market=usage.market,
        zone=usage.zone,
        launched=usage.launched,
        ended=usage.ended,
        seconds=seconds,
        billed_seconds=billed,
        usd_per_hour=price,
        usd=usd,
        interrupted=usage.interrupted,
    )


def _spot_cost(usage: Usage, end: int, billed: int, market: SpotMarket) -> float:
    """What the minimum or the unit adds to the seconds used costs what the last second did."""
    if billed == 0:
        return 0.0
    added = billed - (end - usage.launched)
    last = market.at(*_pool(usage), end).usd
    return market.cost(*_pool(usage), usage.launched, end) + added * last / HOUR


def _pool(usage: Usage) -> tuple[str, str]:
    return usage.instance_type, usage.zone


def _is_free(usage: Usage, seconds: int) -> bool:
    """EC2 user guide, Billing for interrupted Spot Instances: no charge in the first hour."""
    return usage.interrupted and seconds < HOUR
