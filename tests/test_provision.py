"""The EC2 adapter: user data and tokens as plain data, the rest against the embedded cloud's endpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from workflows import wait_for

from snakemake_executor_plugin_schlouder import provision
from snakemake_executor_plugin_schlouder.ec2.account import Ec2Settings
from snakemake_executor_plugin_schlouder.ec2.joining import Join
from snakemake_executor_plugin_schlouder.localcloud import LocalCloud
from snakemake_executor_plugin_schlouder.localcloud.faults import Faults, Throttle
from snakemake_executor_plugin_schlouder.market import catalog
from snakemake_executor_plugin_schlouder.market.tariff import Tariff
from snakemake_executor_plugin_schlouder.model import ON_DEMAND, SPOT, InstanceType, SchlouderError
from snakemake_executor_plugin_schlouder.provision import (
    CloudUnavailable,
    Ec2Cloud,
    Instance,
    LaunchRequest,
    NoCapacity,
    QuotaReached,
    Throttled,
    TokenSpent,
    client_token,
    connect,
)

JOIN = Join("head:6817", "/run/munge/munge.socket.2", "/schlouder/munge-key")
KIND = InstanceType("m5.large", 2, 8192)


def test_every_change_of_a_launch_changes_its_token() -> None:
    first = ("r", ("n", "m"), "t", ON_DEMAND, "z", 1)
    others = [
        ("r2", ("n", "m"), "t", ON_DEMAND, "z", 1),
        ("r", ("n",), "t", ON_DEMAND, "z", 1),
        ("r", ("m", "n"), "t", ON_DEMAND, "z", 1),
        ("r", ("n", "m"), "t2", ON_DEMAND, "z", 1),
        ("r", ("n", "m"), "t", SPOT, "z", 1),
        ("r", ("n", "m"), "t", ON_DEMAND, "z2", 1),
        ("r", ("n", "m"), "t", ON_DEMAND, "z", 2),
        ("long run " * 20, ("n", "m"), "t", ON_DEMAND, "z", 1),
        ("r\u00e9", ("n", "m"), "t", ON_DEMAND, "z", 1),
    ]
    tokens = {client_token(*each) for each in [first, *others]}
    assert len(tokens) == 1 + len(others)
    assert all(len(token) <= 64 and token.isascii() for token in tokens)
    assert client_token(*first) in tokens


@pytest.fixture
def settings(cloud: LocalCloud, monkeypatch: pytest.MonkeyPatch) -> Ec2Settings:
    """The embedded cloud's settings, with its environment set for boto3."""
    environment = cloud.environment()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = {name.removeprefix("SNAKEMAKE_SCHLOUDER_"): v for name, v in environment.items()}
    return Ec2Settings(
        "us-east-1",
        given["IMAGE"],
        (given["SUBNETS"],),
        (given["SECURITY_GROUPS"],),
        instance_profile=given["INSTANCE_PROFILE"],
    )


@pytest.fixture
def ec2(settings: Ec2Settings) -> Iterator[Ec2Cloud]:
    """An adapter for one run of its own; its machines are terminated in the end."""
    run = f"test{time.monotonic_ns()}"
    adapter = connect(settings, JOIN, "me@here")
    adapter.test_run = run  # type: ignore[attr-defined]
    yield adapter
    alive = [instance.id for instance in adapter.instances(run) if instance.is_alive]
    if alive:
        adapter.terminate(alive)


@pytest.fixture
def troubled(cloud: LocalCloud) -> Iterator[LocalCloud]:
    """The cloud, whose faults end with the test."""
    yield cloud
    cloud.inject(Faults())


def run_of(ec2: Ec2Cloud) -> str:
    return str(ec2.test_run)  # type: ignore[attr-defined]


def request(ec2: Ec2Cloud, number: int) -> LaunchRequest:
    run = run_of(ec2)
    node = f"{run}-{number}"
    return LaunchRequest(run, node, client_token(run, (node,), "m5.large", ON_DEMAND, "", 1), KIND)


def batch_of(ec2: Ec2Cloud, attempt: int = 1) -> list[LaunchRequest]:
    """Three machines."""
    run = run_of(ec2)
    names = tuple(f"{run}-{attempt}-{number}" for number in range(3))
    token = client_token(run, names, KIND.name, ON_DEMAND, "", attempt)
    return [LaunchRequest(run, node, token, KIND, batch=names) for node in names]


def launched(ec2: Ec2Cloud, number: int) -> Instance:
    (outcome,) = ec2.launch([request(ec2, number)])
    assert isinstance(outcome, Instance)
    return outcome


@pytest.mark.integration
def test_a_launch_carries_its_tags(ec2: Ec2Cloud) -> None:
    instance = launched(ec2, 1)
    reply = boto3.client("ec2").describe_instances(InstanceIds=[instance.id])
    (described,) = reply["Reservations"][0]["Instances"]
    tags = {tag["Key"]: tag["Value"] for tag in described["Tags"]}
    assert tags["schlouder:run"] == run_of(ec2)
    assert tags["schlouder:owner"] == "me@here"
    assert tags["schlouder:node"] == f"{run_of(ec2)}-1"
    assert tags["Name"] == f"schlouder-{run_of(ec2)}"


@pytest.mark.integration
def test_the_same_token_starts_one_machine(ec2: Ec2Cloud) -> None:
    first, second = launched(ec2, 1), launched(ec2, 1)
    assert first.id == second.id
    assert len(ec2.instances(run_of(ec2))) == 1


@pytest.mark.integration
def test_machines_of_a_batch_are_told_apart_and_not_started_twice(ec2: Ec2Cloud) -> None:
    requests = batch_of(ec2)
    first = {i.node: i.id for i in ec2.launch(requests) if isinstance(i, Instance)}
    (again,) = ec2.launch(requests[2:])
    assert isinstance(again, Instance)
    assert list(first) == [request.node for request in requests]
    assert (again.node, again.id) == (requests[2].node, first[again.node])
    assert {i.node: i.id for i in ec2.instances(run_of(ec2))} == first


@pytest.mark.integration
def test_what_a_troubled_cloud_says_of_a_launch(ec2: Ec2Cloud, troubled: LocalCloud) -> None:
    def outcomes(attempt: int, faults: Faults) -> list[type]:
        troubled.inject(faults)
        return [type(outcome) for outcome in ec2.launch(batch_of(ec2, attempt))]

    few = Faults(capacity={"m5.large/*/*": 2})
    assert outcomes(1, few) == [Instance, Instance, NoCapacity]
    assert outcomes(2, Faults(capacity={"m5.large/*/*": 0})) == [NoCapacity] * 3
    assert outcomes(3, Faults(throttle=Throttle(1.0, 1.0, 1.0))) == [Throttled] * 3
    assert outcomes(4, Faults(vcpu_quota={"on-demand": 0})) == [QuotaReached] * 3
    assert outcomes(5, Faults(lost_replies=1.0)) == [CloudUnavailable] * 3
    assert outcomes(5, Faults()) == [Instance] * 3
    assert len(ec2.instances(run_of(ec2))) == 2 + 3


@pytest.mark.integration
def test_all_rights_that_are_missing_are_named_at_once(
    settings: Ec2Settings, troubled: LocalCloud
) -> None:
    actions = ["ec2:Describe*", "ec2:RunInstances"]
    statement = {"Effect": "Allow", "Action": actions, "Resource": "*"}
    troubled.inject(Faults(policy={"Version": "2012-10-17", "Statement": [statement]}))
    with pytest.raises(SchlouderError) as caught:
        connect(settings, JOIN, "me@here")
    (line,) = str(caught.value).splitlines()
    for right in ("iam:PassRole", "ec2:CreateTags", "ec2:TerminateInstances"):
        assert f"{right} (on arn:aws:" in line
    assert "ec2:RunInstances" not in line


@pytest.mark.integration
def test_on_a_cloud_without_tags_in_the_launch_machines_are_found_all_the_same(
    settings: Ec2Settings, troubled: LocalCloud
) -> None:
    troubled.inject(
        Faults(no_tags_on_create=True, unknown_parameters=("MetadataOptions",), lost_replies=1.0)
    )
    warnings: list[str] = []
    bare = connect(settings, JOIN, "me@here", warnings.append)
    assert ["TagSpecifications" in line for line in warnings] == [False, True]
    bare.test_run = run = f"test{time.monotonic_ns()}"  # type: ignore[attr-defined]
    requests = batch_of(bare)
    assert {type(outcome) for outcome in bare.launch(requests[:1])} == {CloudUnavailable}
    names = [request.node for request in requests]
    assert [instance.node for instance in bare.instances(run)] == names[:1]
    troubled.inject(Faults(no_tags_on_create=True, unknown_parameters=("MetadataOptions",)))
    started = bare.launch(requests)
    assert [outcome.node for outcome in started if isinstance(outcome, Instance)] == names
    tagged = connect(settings, JOIN, "me@here", warnings.append).instances(run)
    assert sorted(instance.node for instance in tagged) == names
    bare.terminate([instance.id for instance in tagged])


@pytest.mark.integration
def test_describe_reads_every_page_and_reservation(
    ec2: Ec2Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provision, "_DESCRIBE_PAGE", 5)
    ids = {launched(ec2, number).id for number in range(7)}
    assert {instance.id for instance in ec2.instances(run_of(ec2))} == ids


@pytest.mark.integration
def test_terminate_ends_what_there_is_though_one_id_is_unknown(ec2: Ec2Cloud) -> None:
    instance = launched(ec2, 1)
    ec2.terminate([instance.id, "i-00000000000000000"])
    wait_for(
        lambda: [i.state for i in ec2.instances(run_of(ec2))] == ["terminated"],
        lambda: f"{ec2.instances(run_of(ec2))}",
    )
    (outcome,) = ec2.launch([request(ec2, 1)])
    assert isinstance(outcome, TokenSpent)


@pytest.mark.integration
def test_terminating_nothing_asks_nothing(ec2: Ec2Cloud) -> None:
    instance = launched(ec2, 1)
    ec2.terminate([])
    assert [i.id for i in ec2.instances(run_of(ec2)) if i.is_alive] == [instance.id]


@pytest.mark.integration
def test_a_clouds_catalog_is_asked_through_its_endpoint(
    cloud: LocalCloud, ec2: Ec2Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "with"))
    assert catalog_tariff(ec2, []).price("m5.4xlarge") == 0.768
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "without"))
    cloud.inject(Faults(missing=["pricing:*"]))
    warnings: list[str] = []
    try:
        tariff = catalog_tariff(ec2, warnings)
    finally:
        cloud.inject(Faults())
    assert tariff.price("m5.4xlarge") is None
    assert (tariff.price("m5.4xlarge", SPOT) or 0) > 0
    assert [line.partition(": ")[0] for line in warnings] == ["the price of m5.4xlarge is unknown"]
    assert {path.parent.name for path in tmp_path.rglob("*.json")} == {"schlouder"}


def catalog_tariff(ec2: Ec2Cloud, warnings: list[str]) -> Tariff:
    """What the catalog makes of the endpoint's prices; it adds its warnings."""
    asked = catalog.connect(ec2.client, "", warnings.append)
    (kind,) = asked.types(["m5.4xlarge"], "x86_64")
    assert kind == InstanceType("m5.4xlarge", 16, 65536)
    assert asked.offerings([kind], ["us-east-1a"]) == {("m5.4xlarge", "us-east-1a")}
    return asked.tariff([kind], ["us-east-1a"], "", [ON_DEMAND, SPOT])


@pytest.mark.integration
def test_an_unreachable_endpoint_is_no_empty_answer(
    settings: Ec2Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    client = boto3.client("ec2")
    cut = Ec2Cloud(client, client, settings, "o", lambda *_: "")
    with pytest.raises(CloudUnavailable):
        cut.instances("r")
    with pytest.raises(CloudUnavailable):
        cut.terminate(["i-1"])
    assert isinstance(cut.launch([LaunchRequest("r", "n", "t", KIND)])[0], CloudUnavailable)
    with pytest.raises(SchlouderError, match="EC2 cannot be reached"):
        connect(settings, JOIN, "o")


@pytest.mark.integration
def test_a_burst_of_throttling_does_not_end_a_run_before_it_begins(
    cloud: LocalCloud, settings: Ec2Settings
) -> None:
    """botocore alone gives up when it was refused three times."""
    cloud.inject(Faults(throttle=Throttle(share=1.0, period=1000.0, seconds=4.0)))
    try:
        connect(settings, JOIN, "me@here")
        assert cloud.struck()["throttle"] >= 3
    finally:
        cloud.inject(Faults())
