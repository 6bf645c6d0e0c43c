"""Which machines are chosen, and where they are asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as values

from snakemake_executor_plugin_schlouder.market.offers import Demand, Offers, slots_of
from snakemake_executor_plugin_schlouder.market.tariff import Tariff
from snakemake_executor_plugin_schlouder.model import (
    NEVER,
    ON_DEMAND,
    ONLY,
    PREFER,
    SPOT,
    InstanceType,
    Need,
)

SMALL = InstanceType("c.large", 2, 4096)
LARGE = InstanceType("c.4xlarge", 16, 32768)
DEEP = InstanceType("r.large", 2, 32768)
GPU = InstanceType("g.xlarge", 4, 16384, 1, "t4")
KINDS = (LARGE, SMALL, DEEP, GPU)
PRICES = {"c.large": 0.1, "c.4xlarge": 0.8, "r.large": 0.25, "g.xlarge": 0.5}
ZONES = {kind.name: ("a", "b") for kind in KINDS}
SPOT_PRICES = {("c.large", "a"): 0.05, ("c.large", "b"): 0.03, ("c.4xlarge", "a"): 0.9}


def offers(**changes: object) -> Offers:
    prices = changes.pop("on_demand", PRICES)
    tariff = Tariff(prices, SPOT_PRICES, "a table")  # type: ignore[arg-type]
    return Offers(KINDS, tariff, ZONES, **changes)  # type: ignore[arg-type]


def chosen(there: Offers, need: Need, count: int = 1, now: float = 0.0, **more: object) -> str:
    offer = there.choose(Demand(need, count=count, **more), now)  # type: ignore[arg-type]
    return "" if offer is None else f"{offer.kind.name} {offer.market}"


@pytest.mark.parametrize(
    ("need", "count", "expected"),
    [
        (Need(1, 1000), 1, "c.large"),
        (Need(1, 1000), 16, "c.4xlarge"),
        (Need(1, 1000), 17, "c.large"),
        (Need(2, 20000), 5, "r.large"),
        (Need(4, 1000), 1, "g.xlarge"),
        (Need(4, 1000), 4, "c.4xlarge"),
        (Need(1, 1000, 1), 3, "g.xlarge"),
    ],
)
def test_a_backlog_gets_the_machines_on_which_it_costs_least(
    need: Need, count: int, expected: str
) -> None:
    assert chosen(offers(), need, count) == f"{expected} {ON_DEMAND}"


def test_a_task_that_gets_a_machine_of_its_own_gets_the_cheapest_that_fits() -> None:
    assert chosen(offers(), Need(1, 1000), 16, alone=True) == "c.large on-demand"


def test_without_prices_the_users_order_counts() -> None:
    assert chosen(offers(on_demand={}), Need(1, 1000), 100) == "c.4xlarge on-demand"


def test_types_of_a_rule_are_for_those_who_name_them() -> None:
    there = offers(reserved=("c.large", "c.4xlarge"))
    assert chosen(there, Need(1, 1000)) == "r.large on-demand"
    assert chosen(there, Need(1, 1000, types="c")) == "c.large on-demand"
    assert chosen(there, Need(1, 1000, types="?.4xlarge")) == "c.4xlarge on-demand"
    assert there.fits_none(Need(1, 1000, types="m5.large"))


def test_one_machine_for_everything_is_the_cheapest_that_fits_all() -> None:
    there = offers()
    one = there.choose_one([Need(1, 1000), Need(2, 20000)], NEVER, 0.0)
    assert one is not None and one.kind == DEEP
    assert there.choose_one([Need(16, 1000), Need(1, 1000, 1)], NEVER, 0.0) is None


@pytest.mark.parametrize(
    ("need", "spot", "expected"),
    [
        (Need(1, 1000), NEVER, "c.large on-demand"),
        (Need(1, 1000), PREFER, "c.large spot"),
        (Need(1, 1000), ONLY, "c.large spot"),
        (Need(8, 1000), PREFER, "c.4xlarge on-demand"),
        (Need(8, 1000), ONLY, "c.4xlarge spot"),
    ],
)
def test_spot_is_preferred_only_where_it_costs_less(need: Need, spot: str, expected: str) -> None:
    there = Offers((SMALL, LARGE), Tariff(PRICES, SPOT_PRICES, "a table"), ZONES)
    assert chosen(there, need, spot=spot) == expected


def test_the_cheapest_zone_comes_first_and_a_closed_one_not_at_all() -> None:
    there = offers()
    assert there.zones(SMALL, SPOT, 0.0) == ["b", "a"]
    there.has_none(SMALL, SPOT, "b", 0.0)
    assert there.zones(SMALL, SPOT, 0.0) == ["a"]
    assert there.zones(SMALL, ON_DEMAND, 0.0) == ["a", "b"]


def test_a_pool_without_capacity_is_probed_after_a_pause_that_grows() -> None:
    there = offers()
    for zone in ("a", "b"):
        there.has_none(SMALL, ON_DEMAND, zone, 0.0)
    assert chosen(there, Need(1, 1000), now=179.0) == "r.large on-demand"
    assert there.next_opening(0.0) == 180.0
    assert chosen(there, Need(1, 1000), now=180.0) == "c.large on-demand"
    assert there.is_probe(SMALL, ON_DEMAND, "a")
    there.has_none(SMALL, ON_DEMAND, "a", 180.0)
    assert there.zones(SMALL, ON_DEMAND, 539.0) == ["b"]
    there.has_some(SMALL, ON_DEMAND, "b")
    assert not there.is_probe(SMALL, ON_DEMAND, "b")
    assert there.zones(SMALL, ON_DEMAND, 540.0) == ["a", "b"]


def test_several_refusals_at_one_time_count_once() -> None:
    there = offers()
    for _ in range(5):
        there.has_none(SMALL, ON_DEMAND, "a", 0.0)
    assert there.zones(SMALL, ON_DEMAND, 180.0) == ["a", "b"]


def test_a_quota_keeps_out_machines_of_as_many_cpus_until_one_has_ended() -> None:
    there = offers()
    there.quota_reached(GPU, ON_DEMAND, "Running On-Demand G instances: 8 vCPUs")
    assert chosen(there, Need(4, 1000), 4) == ""
    assert chosen(there, Need(1, 1000)) == "c.large on-demand"
    assert "G instances" in there.quota_of(Need(4, 1000), NEVER)
    assert there.quota_of(Need(1, 1000), NEVER) == ""
    assert there.quota_of(Need(4, 1000), PREFER) == "", "spot machines have a quota of their own"
    there.machine_ended(ON_DEMAND)
    assert chosen(there, Need(4, 1000), 4) == "c.4xlarge on-demand"
    assert there.quota_of(Need(4, 1000), NEVER) == ""


@given(values.integers(1, 16), values.integers(1, 30000), values.integers(1, 200))
def test_no_other_machine_would_cost_less(cpus: int, memory: int, count: int) -> None:
    need = Need(cpus, memory)
    offer = offers().choose(Demand(need, count=count), 0.0)
    costs = {
        kind.name: -(-count // slots_of(kind, need)) * PRICES[kind.name]
        for kind in KINDS
        if kind.fits(need)
    }
    if offer is None:
        assert not costs
    else:
        assert costs[offer.kind.name] == pytest.approx(min(costs.values()))
