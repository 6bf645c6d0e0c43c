"""The user's tables of prices and types: what may be in them, and that every error names file and line."""

from __future__ import annotations

import pytest

from snakemake_executor_plugin_schlouder.market.tables import Prices, Table, prices_of, types_of
from snakemake_executor_plugin_schlouder.model import InstanceType, SchlouderError

REGION = "us-east-1"
BOTH = """instance_type,vcpus,memory_mib,arch,gpus,usd_per_hour
m5.large,2,8192,x86_64,0,0.096
m6g.large,2,8192,arm64,0,0.077
g4dn.xlarge,4,16384,x86_64,1,0.526
"""


def prices(text: str) -> Prices:
    return prices_of(Table("--schlouder-prices", "p.csv", text), REGION)


def refusal(text: str) -> str:
    with pytest.raises(SchlouderError) as caught:
        prices(text)
    return str(caught.value)


def test_one_table_serves_for_prices_and_for_types() -> None:
    assert prices(BOTH) == Prices({"m5.large": 0.096, "m6g.large": 0.077, "g4dn.xlarge": 0.526}, {})
    assert types_of(Table("--schlouder-type-table", "p.csv", BOTH)) == [
        InstanceType("m5.large", 2, 8192),
        InstanceType("m6g.large", 2, 8192, arch="arm64"),
        InstanceType("g4dn.xlarge", 4, 16384, 1),
    ]


def test_spot_prices_hold_in_a_zone_or_in_all_others() -> None:
    table = "instance_type,market,zone,usd_per_hour\na,,,1\na,spot,,.3\na,spot,z1,2e-1\n"
    assert prices(table) == Prices({"a": 1.0}, {("a", ""): 0.3, ("a", "z1"): 0.2})


def test_rows_of_other_regions_do_not_count_and_those_of_ours_come_first() -> None:
    table = f"region,instance_type,usd_per_hour\n{REGION},a,1\n,a,2\n,b,3\neu-west-1,c,4\n"
    assert prices(table) == Prices({"a": 1.0, "b": 3.0}, {})


def test_spreadsheets_may_write_marks_blanks_quotes_and_empty_lines() -> None:
    assert prices('\ufeffusd_per_hour, instance_type\r\n"0.5", a\r\n,\r\n') == Prices(
        {"a": 0.5}, {}
    )


@pytest.mark.parametrize("price", ["-1", "nan", "inf", "1e999", "$0.1", "cheap", "1_0", "0x1"])
def test_a_price_is_a_number_that_can_be_paid(price: str) -> None:
    assert refusal(f"instance_type,usd_per_hour\na,1\nb,{price}\n") == (
        f"--schlouder-prices: p.csv, line 3: usd_per_hour: {price!r} is no price; it is a number of at "
        "least 0"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", ", line 1: no column instance_type, usd_per_hour; needed are"),
        ("instance_type;usd_per_hour\na;1\n", ", line 1: no column instance_type, usd_per_hour"),
        ("instance_type,usd_per_hour\na,\n", ", line 2: usd_per_hour: empty"),
        ("instance_type,usd_per_hour\na\n", ", line 2: usd_per_hour: empty"),
        ("instance_type,usd_per_hour\n,1\n", ", line 2: instance_type: empty"),
        ("instance_type,usd_per_hour\na,0,096\n", ", line 2: 3 cells for 2 columns; the decimals"),
        (
            "instance_type,usd_per_hour\na,1\nb,1\na,1\n",
            ", line 4: on-demand a is in line 2 already",
        ),
        (
            "instance_type,usd_per_hour,market\na,1,Spot\n",
            ", line 2: market: 'Spot' is not allowed",
        ),
        ("instance_type,usd_per_hour,zone\na,1,z1\n", ", line 2: zone: 'z1'; only spot prices"),
        ("instance_type,usd_per_hour\na,\0\n", ", line"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(text: str, problem: str) -> None:
    assert refusal(text).startswith(f"--schlouder-prices: p.csv{problem}")


def test_all_wrong_lines_are_told_at_once_but_not_hundreds() -> None:
    text = refusal("instance_type,usd_per_hour\n" + "a,-1\n" * 100).splitlines()
    assert text[0] == "--schlouder-prices: p.csv:"
    assert [line.split(":")[0].strip() for line in text[1:-1]] == [f"line {n}" for n in range(2, 7)]
    assert text[-1].strip() == "and 95 more"


def test_gpus_have_the_name_that_rules_use() -> None:
    text = "instance_type,vcpus,memory_mib,gpus,gpu_model\nbig,8,64000,2,Radeon Pro V520\nplain,1,900,,\n"
    assert types_of(Table("--schlouder-type-table", "t.csv", text)) == [
        InstanceType("big", 8, 64000, 2, "radeon_pro_v520"),
        InstanceType("plain", 1, 900),
    ]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("a,0,100", "vcpus: '0' is not allowed; it is a whole number from 1"),
        ("a,1,1.5", "memory_mib: '1.5' is not allowed"),
        ("a,1,", "memory_mib: '' is not allowed"),
        ("a,1,100,sparc", "arch: 'sparc' is not allowed; it is x86_64 or arm64"),
        ("a,1,100,,-1", "gpus: '-1' is not allowed; it is a whole number from 0"),
    ],
)
def test_a_wrong_type_is_told_with_file_and_line(row: str, problem: str) -> None:
    table = Table(
        "--schlouder-type-table", "t.csv", f"instance_type,vcpus,memory_mib,arch,gpus\n{row}\n"
    )
    with pytest.raises(SchlouderError) as caught:
        types_of(table)
    assert str(caught.value).startswith(f"--schlouder-type-table: t.csv, line 2: {problem}")
