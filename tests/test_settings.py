"""Settings and per-rule resources: what is allowed, and that every error names what was wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import datetime, timedelta
from typing import Any

import pytest
from snakemake.cli import get_argument_parser as snakemakes_parser
from snakemake_interface_executor_plugins.registry import ExecutorPluginRegistry

from snakemake_executor_plugin_schlouder import ExecutorSettings, lease
from snakemake_executor_plugin_schlouder.keeping import Keep
from snakemake_executor_plugin_schlouder.model import Billing, Need, SchlouderError
from snakemake_executor_plugin_schlouder.pool import Goal
from snakemake_executor_plugin_schlouder.settings import rule_settings, seconds, validated


def given(**values: Any) -> ExecutorSettings:
    return ExecutorSettings(**{"image": "ami-1", **values})


def test_the_defaults_are_aws_billing_and_the_strategy_that_was_measured_best() -> None:
    config = validated(given())
    assert (config.strategy, config.order) == ("fastest", "submission")
    assert config.billing == Billing(1, 60, 50)
    assert config.lease == lease.DEFAULT
    assert config.instance_types == ("m5.large",)


def test_a_job_over_more_vms_than_there_may_be_is_refused() -> None:
    config = validated(given(max_vms=3))
    asked = {"mpi": "srun", "tasks": 8}
    assert rule_settings("r", 1, {**asked, "nodes": 3}, config).need == Need(3, 0, nodes=3)
    with pytest.raises(SchlouderError) as caught:
        rule_settings("r", 1, {**asked, "nodes": 4}, config)
    assert str(caught.value) == (
        "rule r: nodes: 4 is not allowed; --schlouder-max-vms allows 3 VMs at a time"
    )


def test_lists_are_split_at_commas_and_blanks() -> None:
    config = validated(given(instance_types="a.b, c.d", security_groups="sg-1 sg-2"))
    assert config.instance_types == ("a.b", "c.d")
    assert config.security_groups == ("sg-1", "sg-2")


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("off", Keep()),
        ("paid", Keep(is_paid=True)),
        ("10m", Keep(seconds=600)),
        ("90", Keep(seconds=90)),
    ],
)
def test_vms_are_kept_as_paid_or_for_a_time(text: str, keep: Keep) -> None:
    assert validated(given(keep=text)).keep == keep
    assert not validated(given()).keep.is_on


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": "on"}, "--schlouder-keep: 'on' is no duration; allowed are positive seconds or"),
        (
            {"keep": "1m"},
            "--schlouder-keep: '1m' is not allowed; it must be more than 60s, or no run",
        ),
        (
            {"keep": "31d"},
            "--schlouder-keep: '31d' is not allowed; it must be more than 60s, or no",
        ),
        ({"keep": None}, "--schlouder-keep: '' is no duration"),
        (
            {"strategy": "cheap"},
            "--schlouder-strategy: 'cheap' is unknown; known are afap, all-par-1lns, ",
        ),
        (
            {"max_vms": 0},
            "--schlouder-max-vms: 0 is not allowed; it must be a whole number of at least 1",
        ),
        ({"max_vms": -3}, "--schlouder-max-vms: -3"),
        ({"log_days": 0}, "--schlouder-log-days: 0 is not allowed; it must be a whole number"),
        ({"log_days": None}, "--schlouder-log-days: None is not allowed"),
        (
            {"order": "size"},
            "--schlouder-order: 'size' is unknown; known are submission, rank, level",
        ),
        ({"order": None}, "--schlouder-order: '' is unknown"),
        ({"strategy": "deadline"}, "--schlouder-strategy: 'deadline' needs --schlouder-deadline"),
        ({"strategy": "budget"}, "--schlouder-strategy: 'budget' needs --schlouder-budget"),
        ({"deadline": "soon"}, "--schlouder-deadline: 'soon' is no duration"),
        ({"deadline": "2020-01-01T12:00"}, "has already passed; it must be in the future"),
        ({"budget": "-3h"}, "--schlouder-budget: '-3h' is no duration"),
        (
            {"slurm_api": "rest"},
            "--schlouder-slurm-api: 'rest' is not allowed; it is auto, cli, pyslurm",
        ),
        ({"sharing": "maybe"}, "--schlouder-sharing: 'maybe' is not allowed; it is on or off"),
        ({"btu": 0.0}, "--schlouder-btu: 0.0 is not allowed; it must be seconds above 0"),
        ({"btu": -1.0}, "--schlouder-btu: -1.0"),
        ({"btu": float("nan")}, "--schlouder-btu: nan"),
        ({"btu": float("inf")}, "--schlouder-btu: inf"),
        ({"min_charge": -1.0}, "--schlouder-min-charge: -1.0"),
        ({"margin": -1.0}, "--schlouder-margin: -1.0"),
        ({"boot_timeout": 0.0}, "--schlouder-boot-timeout: 0.0"),
        ({"lease": "29"}, "--schlouder-lease: '29' is not allowed; it must be from 30s"),
        ({"lease": "31d"}, "--schlouder-lease: '31d' is not allowed"),
        ({"lease": "soon"}, "--schlouder-lease: 'soon' is no duration; allowed are positive"),
        ({"lease": None}, "--schlouder-lease: None is no duration"),
        ({"image": None}, "--schlouder-image: not given"),
        ({"launch_template": "a b"}, "--schlouder-launch-template: 'a b' is not allowed"),
        ({"launch_template": "lt-1:x"}, "--schlouder-launch-template: 'lt-1:x' is not allowed"),
        ({"volume_size": 0}, "--schlouder-volume-size: 0 is not allowed; it must be whole GiB"),
        ({"volume_size": 65537}, "--schlouder-volume-size: 65537 is not allowed"),
        ({"tags": "a"}, "--schlouder-tags: 'a' is not allowed; it is no key=value"),
        ({"tags": "=b"}, "--schlouder-tags: '=b' is not allowed; EC2 takes keys of 1 to 128"),
        ({"tags": "k" * 129 + "="}, "is not allowed; EC2 takes keys of 1 to 128"),
        ({"tags": "k=" + "v" * 257}, "and values of 256 at most"),
        ({"tags": "k=a;b"}, "--schlouder-tags: 'k=a;b' is not allowed; EC2 takes letters, digits"),
        ({"tags": "AWS:k=v"}, "keys that begin with aws: or schlouder: are taken"),
        ({"tags": "schlouder:run=x"}, "keys that begin with aws: or schlouder: are taken"),
        ({"tags": "k=v,k=w"}, "--schlouder-tags: 'k=w' is not allowed; the key is given twice"),
        (
            {"tags": ",".join(f"k{n}=v" for n in range(47))},
            "--schlouder-tags: 47 tags are not allowed; EC2 takes 50 for a resource",
        ),
        ({"instance_types": ""}, "--schlouder-instance-types: not given"),
        ({"prices": "no.csv"}, "--schlouder-prices: there is no file 'no.csv'"),
        ({"type_table": "/tmp"}, "--schlouder-type-table: there is no file '/tmp'"),
        ({"partition": "a b"}, "--schlouder-partition: 'a b'"),
        (
            {"cluster_key": 'x"y'},
            "--schlouder-cluster-key: 'x\"y' is not allowed; it is ssm:/NAME (letters, digits and _ . - /) "
            "or secretsmanager:NAME",
        ),
        ({"cluster_key": "vault:/key"}, "--schlouder-cluster-key: 'vault:/key' is not allowed"),
        ({"cluster_key": None}, "--schlouder-cluster-key: '' is not allowed"),
        (
            {"mount": "nas:/home"},
            "--schlouder-mount: 'nas:/home' is not allowed; it is SERVER:/PATH=/MOUNTPOINT[,OPTION...]",
        ),
        ({"mount": "nas:home=/home"}, "--schlouder-mount: 'nas:home=/home' is not allowed"),
        ({"mount": "nas:/a=/a,nas:/b"}, "--schlouder-mount: 'nas:/a=/a,nas:/b' is not allowed"),
        (
            {"mount": "nas:/a=/a,$(reboot)"},
            "--schlouder-mount: 'nas:/a=/a,$(reboot)' is not allowed",
        ),
        ({"mount": "nas:/a=/usr/"}, "'nas:/a=/usr/' would hide /usr/ of the VM"),
        ({"mount": "nas:/a=/data/../etc"}, "would hide /data/../etc of the VM"),
        ({"mount": "nas:/a=/data nas:/b=/data/"}, "--schlouder-mount: /data is given twice"),
        ({"mount": "fs-0a1b:/=/data"}, "write fs-0a1b.efs.REGION.amazonaws.com"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SchlouderError) as caught:
        validated(given(**values))
    assert message in str(caught.value)


def test_what_launches_name_is_taken_apart() -> None:
    config = validated(
        given(
            image=None, launch_template="vms:$Latest", subnets="s-1,s-2", tags="a=b c, d:e=f=@,g="
        )
    )
    assert (config.image, config.launch_template) == ("", "vms:$Latest")
    assert config.subnets == ("s-1", "s-2")
    assert config.tags == (("a", "b c"), ("d:e", "f=@"), ("g", ""))


def test_all_wrong_settings_are_told_at_once() -> None:
    with pytest.raises(SchlouderError) as caught:
        validated(given(max_vms=0, btu=0.0, strategy="x", order="y"))
    assert len(str(caught.value).splitlines()) == 4


def test_resources_of_a_rule_become_its_demand() -> None:
    resources = {"mem_mb": 500, "runtime": 2, "schlouder_walltime": "70s"}
    rule = rule_settings("search", 2, resources, validated(given()))
    assert rule.need == Need(2, 500)
    assert (rule.limit, rule.planned) == (120.0, 70.0)
    assert rule.strategy == "fastest"


def test_runtime_is_a_limit_and_no_estimate() -> None:
    rule = rule_settings("r", 1, {"runtime": 3}, validated(given()))
    assert (rule.limit, rule.planned) == (180.0, None)


def test_a_deadline_is_a_time_from_now_or_a_date() -> None:
    soon = validated(given(deadline="2h")).goal.deadline
    assert soon == pytest.approx(time.time() + 7200, abs=60)
    date = datetime.now() + timedelta(days=1)
    assert validated(given(deadline=date.isoformat())).goal.deadline == date.timestamp()
    assert validated(given()).goal == Goal(float("inf"), float("inf"))


def test_a_budget_is_billed_time() -> None:
    config = validated(given(strategy="budget", budget="1.5h"))
    assert config.goal.budget == 5400


@pytest.mark.parametrize(
    ("text", "value"), [("10m", 600), ("30", 30), ("0.5h", 1800), ("30d", 2592000)]
)
def test_a_lease_is_a_duration(text: str, value: float) -> None:
    assert validated(given(lease=text)).lease == value


@pytest.mark.parametrize("name", ["deadline", "budget"])
def test_a_rule_whose_strategy_lacks_its_setting_is_named(name: str) -> None:
    with pytest.raises(SchlouderError) as caught:
        rule_settings("search", 1, {"schlouder_strategy": name}, validated(given()))
    assert f"rule search: schlouder_strategy: '{name}' needs --schlouder-{name}" in str(
        caught.value
    )


def test_a_rule_chooses_its_own_strategy() -> None:
    resources = {"schlouder_strategy": "one-vm-for-all"}
    assert rule_settings("r", 1, resources, validated(given())).strategy == "one-vm-for-all"


def test_what_snakemake_cannot_tell_yet_counts_as_not_given() -> None:
    assert rule_settings("r", 1, {"mem_mb": "<TBD>"}, validated(given())).need == Need(1, 0)


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"schlouder_strategy": "x"}, "rule r: schlouder_strategy: 'x' is unknown; known are"),
        ({"schlouder_walltime": "soon"}, "rule r: schlouder_walltime: 'soon' is no duration"),
        ({"mem_mb": -1}, "rule r: mem_mb: -1"),
        ({"runtime": -1}, "rule r: runtime: -1"),
    ],
)
def test_a_wrong_resource_names_its_rule(resources: dict[str, Any], message: str) -> None:
    with pytest.raises(SchlouderError) as caught:
        rule_settings("r", 1, resources, validated(given()))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [(70, 70), ("70", 70), ("70s", 70), ("2m", 120), ("1.5h", 5400), ("1d", 86400)],
)
def test_durations(text: object, value: float) -> None:
    assert seconds("x", text) == value


def test_snakemake_finds_the_plugin_and_the_catalog_can_print_its_settings() -> None:
    plugin = ExecutorPluginRegistry().get_plugin("schlouder")
    assert plugin.common_settings.non_local_exec
    names = {row["cliarg"] for row in json.loads(json.dumps(plugin.get_settings_info()))}
    assert {"--schlouder-strategy", "--schlouder-max-vms", "--schlouder-btu"} <= names


def test_snakemakes_parser_takes_every_setting() -> None:
    """One annotation it cannot call would break every snakemake command on the machine."""
    parser = snakemakes_parser()
    plugin = ExecutorPluginRegistry().get_plugin("schlouder")
    args = parser.parse_args(["--schlouder-max-vms", "3", "--schlouder-btu", "3600"])
    settings = plugin.get_settings(args)
    assert (settings.max_vms, settings.btu, settings.image) == (3, 3600.0, None)


def test_importing_the_plugin_loads_no_sdk() -> None:
    heavy = ["boto3", "botocore", "rich", "moto", "pyslurm"]
    code = (
        "import sys, snakemake_executor_plugin_schlouder;"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
