"""Prices as plain data: tariffs, what spot has cost, entries of the Price List API."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snakemake_executor_plugin_schlouder.market.tariff import (
    ON_DEMAND,
    SPOT,
    SpotHistory,
    Tariff,
    listed_price,
)

TARIFF = Tariff({"a": 1.0}, {("a", "z1"): 0.4, ("a", "z2"): 0.3, ("b", ""): 0.2}, "prices.csv")
A_DAY = SpotHistory.of(
    [
        ("a", "z1", 3600.0, 0.4),
        ("a", "z1", 0.0, 0.2),
        ("a", "z1", 7200.0, 0.1),
        ("a", "z2", 0.0, 9.0),
    ]
)


def test_a_price_is_that_of_the_market_and_the_zone() -> None:
    assert TARIFF.price("a") == TARIFF.price("a", ON_DEMAND, "z1") == 1.0
    assert TARIFF.price("a", SPOT, "z1") == 0.4
    assert TARIFF.price("b", SPOT, "z1") == 0.2


def test_spot_without_a_zone_costs_what_it_does_in_the_cheapest() -> None:
    assert TARIFF.price("a", SPOT) == 0.3
    assert TARIFF.price("b", SPOT) == 0.2


def test_what_is_not_known_has_no_price() -> None:
    assert TARIFF.price("b") is None
    assert TARIFF.price("a", SPOT, "z3") is None
    assert Tariff.unknown("no rights").price("a", SPOT) is None
    assert Tariff.unknown("no rights").source == "unknown: no rights"


def test_spot_costs_the_price_in_effect_second_by_second() -> None:
    assert A_DAY.paid("a", "z1", 0, 1800) == pytest.approx(0.1)
    assert A_DAY.paid("a", "z1", 1800, 9000) == pytest.approx(0.1 + 0.4 + 0.05)
    assert A_DAY.paid("a", "z1", 3600, 3600) == 0.0


def test_what_spot_cost_before_the_first_known_price_is_unknown() -> None:
    assert A_DAY.paid("a", "z1", -1, 100) is None
    assert A_DAY.paid("b", "z1", 0, 100) is None


def test_a_machine_that_ec2_takes_back_within_its_first_hour_costs_nothing() -> None:
    assert A_DAY.paid("a", "z1", 100, 3699, reclaimed=True) == 0.0
    assert A_DAY.paid("a", "z1", 100, 3700, reclaimed=True) == A_DAY.paid("a", "z1", 100, 3700)


@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.floats(0, 9)), min_size=1, unique_by=lambda step: step[0]
    ),
    st.integers(0, 60),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_two_parts_of_a_time_cost_what_it_costs_whole(
    steps: list[tuple[int, float]], begun: int, middle: int, ended: int
) -> None:
    begun, middle, ended = sorted((begun, middle, ended))
    history = SpotHistory.of([("a", "z", -1.0, 1.0), *(("a", "z", float(d), p) for d, p in steps)])
    parts = history.paid("a", "z", begun, middle), history.paid("a", "z", middle, ended)
    whole = history.paid("a", "z", begun, ended)
    assert None not in (*parts, whole)
    assert math.isclose(sum(filter(None, parts)), whole or 0.0, abs_tol=1e-12)


def entry(unit: str = "Hrs", **price: str) -> str:
    """In the form of the Price List API, shortened."""
    dimension = {
        "unit": unit,
        "description": "$0.096 per On Demand Linux m5.large",
        "pricePerUnit": price,
    }
    terms: dict[str, Any] = {"OnDemand": {"X.JRT": {"priceDimensions": {"X.JRT.6YS": dimension}}}}
    product = {"productFamily": "Compute Instance", "attributes": {"instanceType": "m5.large"}}
    return json.dumps({"product": product, "serviceCode": "AmazonEC2", "terms": terms})


def test_an_entry_of_the_price_list_has_a_price_in_dollars_an_hour() -> None:
    assert listed_price(entry(USD="0.0960000000")) == 0.096


def test_entries_with_other_prices_have_none() -> None:
    assert listed_price(entry(CNY="0.6")) == 0.0
    assert listed_price(entry("Quantity", USD="1")) == 0.0
    assert listed_price(entry(USD="NaN")) == 0.0
    assert listed_price(json.dumps({"product": {}, "terms": {"Reserved": {}}})) == 0.0


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"terms": {"OnDemand": {"X": 1}}}', entry(USD="x")]
)
def test_what_is_no_entry_of_a_price_list_is_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        listed_price(text)
