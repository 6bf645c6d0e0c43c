"""What the embedded cloud charges: prices, their timelines, and the meter."""

from __future__ import annotations

import json
from itertools import pairwise, takewhile
from typing import Any

import pytest

from snakemake_executor_plugin_schlouder.localcloud.faults import ON_DEMAND, SPOT
from snakemake_executor_plugin_schlouder.localcloud.meter import Billing, Usage, metered
from snakemake_executor_plugin_schlouder.localcloud.prices import (
    Hardware,
    PriceList,
    PricingError,
    SpotMarket,
    get_products,
    latest_first,
    page,
    read_token,
)

HARDWARE = {
    "c5.large": Hardware(2, 4096, "x86_64"),
    "m5.4xlarge": Hardware(16, 65536, "x86_64"),
    "t3.micro": Hardware(2, 1024, "x86_64"),
    "x9.huge": Hardware(64, 1, "x86_64"),
}
PRICES = PriceList("us-east-1", HARDWARE)
MARKET = SpotMarket(PRICES, period=100)
POOL = ("c5.large", "us-east-1a")
NOW = 1_800_000_000


def used(seconds: int, market: str = ON_DEMAND, **changes: Any) -> Usage:
    values: dict[str, Any] = {
        "instance_id": "i-1",
        "instance_type": "c5.large",
        "market": market,
        "zone": "us-east-1a",
        "launched": NOW,
        "ended": NOW + seconds,
        "interrupted": False,
    }
    return Usage(**values | changes)


class TestListPrices:
    def test_are_known_for_families_and_for_single_types(self) -> None:
        assert PRICES.on_demand("c5.large") == 0.085
        assert PRICES.on_demand("m5.4xlarge") == 0.768
        assert PRICES.on_demand("t3.micro") == 0.0104
        assert PRICES.on_demand("x9.huge") is None
        assert PRICES.types == ["c5.large", "m5.4xlarge", "t3.micro"]

    def test_one_product_remains_when_all_the_usual_filters_are_given(self) -> None:
        wanted = {
            "instanceType": "c5.large",
            "regionCode": "us-east-1",
            "operatingSystem": "Linux",
            "tenancy": "Shared",
            "preInstalledSw": "NA",
            "capacitystatus": "Used",
        }
        found = self.ask(wanted)
        assert len(found) == 1
        terms = json.loads(found[0])["terms"]["OnDemand"]
        (term,) = terms.values()
        (dimension,) = term["priceDimensions"].values()
        assert (dimension["unit"], dimension["pricePerUnit"]) == ("Hrs", {"USD": "0.0850000000"})
        del wanted["capacitystatus"]
        assert len(self.ask(wanted)) == 3

    def test_come_in_pages(self) -> None:
        request = {"ServiceCode": "AmazonEC2", "MaxResults": 5}
        first = get_products(PRICES.products(), request)
        rest = get_products(PRICES.products(), {**request, "NextToken": first["NextToken"]})
        last = get_products(PRICES.products(), {**request, "NextToken": rest["NextToken"]})
        pages = [first["PriceList"], rest["PriceList"], last["PriceList"]]
        assert [len(one) for one in pages] == [5, 5, 2]
        assert len({text for one in pages for text in one}) == 12
        assert "NextToken" not in last
        with pytest.raises(PricingError) as caught:
            get_products(PRICES.products(), {**request, "NextToken": "bad"})
        assert caught.value.code == "InvalidNextTokenException"

    def ask(self, wanted: dict[str, str]) -> list[str]:
        filters = [{"Type": "TERM_MATCH", "Field": k, "Value": v} for k, v in wanted.items()]
        request = {"ServiceCode": "AmazonEC2", "Filters": filters}
        return list(get_products(PRICES.products(), request)["PriceList"])


class TestSpotPrices:
    def test_vary_a_little_around_a_share_of_the_list_price(self) -> None:
        found = [MARKET.at(*POOL, NOW + 100 * step).usd for step in range(200)]
        assert len(set(found)) > 100
        assert all(0.085 * 0.23 < usd < 0.085 * 0.37 for usd in found)
        assert SpotMarket(PRICES, 100).at(*POOL, NOW) == MARKET.at(*POOL, NOW)
        assert SpotMarket(PRICES, 100, seed=1).at(*POOL, NOW) != MARKET.at(*POOL, NOW)

    def test_history_goes_back_to_the_price_in_effect_at_its_start(self) -> None:
        found = list(MARKET.changes(*POOL, NOW - 250, NOW))
        assert found[0] == MARKET.at(*POOL, NOW)
        assert found[-1] == MARKET.at(*POOL, NOW - 250)
        assert found[-1].time <= NOW - 250 < found[-2].time
        assert all(later.time - earlier.time == 100 for later, earlier in pairwise(found))

    def test_history_of_several_pools_is_latest_first_and_comes_in_pages(self) -> None:
        pools = [POOL, ("m5.4xlarge", "us-east-1b")]

        def history() -> Any:
            return latest_first([MARKET.changes(*pool, NOW - 300, NOW) for pool in pools])

        everything = list(history())
        assert everything == sorted(everything, key=lambda change: change.order)
        first, token = page(history(), 0, 3)
        rest, end = page(history(), read_token(token), 100)
        assert first + rest == everything
        assert end is None

    def test_cost_is_the_price_in_effect_second_by_second(self) -> None:
        by_second = sum(MARKET.at(*POOL, NOW + second).usd for second in range(350)) / 3600
        assert MARKET.cost(*POOL, NOW, NOW + 350) == pytest.approx(by_second)
        assert MARKET.cost(*POOL, NOW, NOW) == 0
        changes = takewhile(lambda one: one.time > NOW, MARKET.changes(*POOL, NOW, NOW + 350))
        assert len({change.usd for change in changes}) > 1


class TestMeter:
    @pytest.mark.parametrize(
        ("unit", "minimum", "seconds", "billed"),
        [
            (1, 60, 5, 60),
            (1, 60, 61, 61),
            (1, 0, 0, 0),
            (60, 60, 61, 120),
            (3600, 0, 1, 3600),
            (3600, 60, 3600, 3600),
            (3600, 60, 3601, 7200),
        ],
    )
    def test_bills_whole_units_and_the_minimum(
        self, unit: int, minimum: int, seconds: int, billed: int
    ) -> None:
        entry = metered(used(seconds), NOW, Billing(unit, minimum), MARKET)
        assert (entry.seconds, entry.billed_seconds) == (seconds, billed)
        assert entry.usd == pytest.approx(0.085 * billed / 3600)

    def test_runs_until_now_while_an_instance_lives(self) -> None:
        entry = metered(used(0, ended=None), NOW + 90.7, Billing(), MARKET)
        assert (entry.ended, entry.seconds) == (None, 90)

    def test_bills_spot_by_its_timeline_and_what_is_added_at_the_last_price(self) -> None:
        long = metered(used(350, SPOT), NOW, Billing(), MARKET)
        assert long.usd == pytest.approx(MARKET.cost(*POOL, NOW, NOW + 350))
        short = metered(used(10, SPOT), NOW, Billing(), MARKET)
        added = 50 * MARKET.at(*POOL, NOW + 10).usd / 3600
        assert short.usd == pytest.approx(MARKET.cost(*POOL, NOW, NOW + 10) + added)
        assert short.usd_per_hour is not None
        assert short.usd == pytest.approx(short.usd_per_hour * 60 / 3600)

    def test_what_ec2_takes_back_in_its_first_hour_is_free(self) -> None:
        early = metered(used(3599, SPOT, interrupted=True), NOW, Billing(), MARKET)
        assert (early.seconds, early.billed_seconds, early.usd) == (3599, 0, 0.0)
        late = metered(used(3600, SPOT, interrupted=True), NOW, Billing(), MARKET)
        assert late.billed_seconds == 3600

    def test_says_nothing_of_a_type_without_a_price(self) -> None:
        entry = metered(used(100, instance_type="x9.huge"), NOW, Billing(), MARKET)
        assert (entry.billed_seconds, entry.usd_per_hour, entry.usd) == (100, None, None)
