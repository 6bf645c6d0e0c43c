"""Workflows on machines of several types, zones and markets, on the embedded cloud: what is chosen, what EC2
takes back, and whether the books say what the provider's meter does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from workflows import PATIENCE, Site, node_of, wait_for

from snakemake_executor_plugin_schlouder.costs import Account, account
from snakemake_executor_plugin_schlouder.journal import Journal, VMRecord, journal_path
from snakemake_executor_plugin_schlouder.lease import NOTICED
from snakemake_executor_plugin_schlouder.localcloud.faults import Faults
from snakemake_executor_plugin_schlouder.model import ON_DEMAND, SPOT, Billing
from snakemake_executor_plugin_schlouder.slurm.cli import parse_records

pytestmark = pytest.mark.integration

SNAKEFILE = """
rule all:
    input: expand("{rule}.{n}", rule=["narrow", "wide"], n=range(2)), "spot.0"

rule narrow:
    output: "narrow.{n}"
    resources: mem_mb=500
    shell: "sleep 1; touch {output}"

rule wide:
    output: "wide.{n}"
    threads: 4
    resources: mem_mb=500
    shell: "sleep 1; touch {output}"

rule spot:
    output: "spot.{n}"
    resources: mem_mb=500
    shell: "sleep 1; touch {output}"
"""

LONG = """
rule all:
    input: "long"

rule long:
    output: "long"
    resources: mem_mb=500
    shell: "date +%s >> began; sleep 14; touch {output}"
"""


@pytest.fixture(autouse=True)
def no_faults_left(site: Site) -> Iterator[None]:
    yield
    site.cloud.inject(Faults())


def run_of(site: Site) -> tuple[Journal, str]:
    journal = Journal.reading(_journal(site))
    return journal, journal.runs()[-1].run


def _journal(site: Site) -> Path:
    home = Path(site.environment["XDG_STATE_HOME"])
    (path,) = home.rglob(f"{journal_path(site.directory).parent.name}/journal.sqlite")
    return path


def vms_of(site: Site) -> list[VMRecord]:
    journal, run = run_of(site)
    return journal.vms(run)


def books_of(site: Site) -> Account:
    journal, run = run_of(site)
    record = journal.runs()[-1]
    billing = Billing(record.unit, record.minimum)
    return account(journal.vms(run), journal.tasks(run), billing, time.time())


def assert_books_equal_the_meter(site: Site) -> None:
    ids = {vm.name: vm.instance_id for vm in vms_of(site)}
    metered = {entry.instance_id: entry for entry in site.cloud.meter()}
    spent = books_of(site)
    assert spent.bills
    for bill in spent.bills:
        entry = metered[ids[bill.name] or ""]
        assert (bill.seconds, bill.billed) == (entry.seconds, entry.billed_seconds), entry
        assert bill.usd == pytest.approx(entry.usd, abs=1e-6), entry


def test_each_rule_runs_where_it_costs_least_and_the_books_equal_the_meter(site: Site) -> None:
    site.write(SNAKEFILE)
    done = site.run(
        *("--schlouder-instance-types", "m5.large,m5.xlarge,r5.2xlarge"),
        *("--preemptible-rules", "spot"),
    )
    assert done.returncode == 0, done.stdout
    used = {(vm.instance_type, vm.market) for vm in vms_of(site)}
    assert used == {("m5.large", ON_DEMAND), ("m5.xlarge", ON_DEMAND), ("m5.large", SPOT)}
    assert_books_equal_the_meter(site)
    assert "Prices: on-demand: Price List API" in done.stdout
    assert "Spot machines saved" in done.stdout
    (cost,) = (line for line in done.stdout.splitlines() if line.startswith("Cost: "))
    assert f"Cost: {books_of(site).units} units of 1 s" in cost


def test_a_job_whose_spot_machine_is_taken_back_runs_again(site: Site) -> None:
    """The machine itself tells Slurm of EC2's notice; the job cannot end in time and starts elsewhere."""
    site.write(LONG)
    with site.started("--schlouder-spot", "only") as snakemake:
        began = site.directory / "began"
        wait_for(began.exists, lambda: "the job does not begin")
        (first,) = site.alive()
        site.cloud.reclaim(first, notice=12.0)
        output, _ = snakemake.communicate(timeout=PATIENCE)
    assert snakemake.returncode == 0, output
    assert "EC2 takes the spot machine back" in output
    assert len(began.read_text().splitlines()) == 2
    taken, second = vms_of(site)
    assert (taken.instance_id, taken.market, second.market) == (first, SPOT, SPOT)
    assert second.requested < (taken.ended or 0.0)
    assert_books_equal_the_meter(site)
    assert books_of(site).bills[0].usd == 0.0


def test_a_cloud_that_is_only_like_ec2(site: Site) -> None:
    """No types, prices, launch templates, dry runs and tags in the launch."""
    table = site.directory / "types.csv"
    table.write_text("instance_type,vcpus,memory_mib\nm5.large,2,8192\n")
    site.write(LONG.replace("sleep 14", "true"))
    unknown = [
        *("DescribeInstanceTypes", "DescribeInstanceTypeOfferings", "DescribeSpotPriceHistory"),
        *("DescribeLaunchTemplates", "DescribeLaunchTemplateVersions", "pricing:GetProducts"),
    ]
    site.cloud.inject(Faults(missing=unknown, no_tags_on_create=True))
    refused = site.run()
    assert refused.returncode != 0
    assert "--schlouder-type-table" in refused.stdout
    assert site.alive() == []
    done = site.run("--schlouder-type-table", str(table))
    assert done.returncode == 0, done.stdout
    assert "VMs are started one by one and tagged right after that" in done.stdout
    assert "at unknown prices" in done.stdout
    assert_units_equal_the_meter(site)


def assert_units_equal_the_meter(site: Site) -> None:
    ids = {vm.name: vm.instance_id for vm in vms_of(site)}
    metered = {entry.instance_id: entry for entry in site.cloud.meter()}
    for bill in books_of(site).bills:
        assert bill.billed == metered[ids[bill.name] or ""].billed_seconds


def test_where_one_zone_has_no_capacity_the_next_is_used(site: Site) -> None:
    site.write(LONG.replace("sleep 14", "true"))
    subnets = site.ec2().describe_subnets()["Subnets"]
    ordered = sorted(subnets, key=lambda subnet: str(subnet["AvailabilityZone"]))
    zones = [str(subnet["AvailabilityZone"]) for subnet in ordered]
    site.cloud.inject(Faults(capacity={f"*/{zone}/*": 0 for zone in zones[:-1]}))
    ids = ",".join(str(subnet["SubnetId"]) for subnet in ordered)
    done = site.run("--schlouder-subnets", ids)
    assert done.returncode == 0, done.stdout
    assert [vm.zone for vm in vms_of(site)] == [zones[-1]]


def test_a_limit_below_the_first_machine_is_told_before_it_starts(site: Site) -> None:
    site.write(LONG)
    before = len(site.instances())
    one_vm = ("--schlouder-strategy", "one-vm-for-all", "--schlouder-spot", "prefer")
    done = site.run("--schlouder-max-spend", "0.0001", *one_vm)
    assert done.returncode != 0
    assert "one-vm-for-all with --schlouder-spot" in done.stdout
    assert "no VM can be started: --schlouder-max-spend of 0.0001 USD" in done.stdout
    assert len(site.instances()) == before


def test_three_runs_in_an_hour_use_one_vm_and_cost_one_hour(site: Site) -> None:
    """Workflows of their own, of one user; the second and the third find the VM of the first."""
    before = {instance["InstanceId"] for instance in site.instances()}
    sites = [replace(site, directory=site.directory / name) for name in ("a", "b", "c")]
    hourly = ("--schlouder-btu", "3600", "--schlouder-min-charge", "0", "--schlouder-keep", "paid")
    try:
        for each in sites:
            each.directory.mkdir()
            each.write(LONG.replace("sleep 14", "hostname >&2"))
            done = each.run(*hourly, "--schlouder-strategy", "asap")
            assert done.returncode == 0, done.stdout
            assert "stays for the next run until" in done.stdout
        (started,) = {instance["InstanceId"] for instance in site.instances()} - before
        assert site.alive() == [started]
        for each in sites[1:]:
            assert [vm.instance_id for vm in vms_of(each)] == [started]
        (bill,) = [entry for entry in site.cloud.meter() if entry.instance_id == started]
        books = [books_of(each) for each in sites]
        assert [account.units for account in books] == [1, 0, 0]
        assert sum(account.billed for account in books) == Billing(3600, 0).billed(bill.seconds)
        assert sum(account.usd or 0.0 for account in books) == pytest.approx(bill.usd_per_hour)
        (record,) = parse_records(site.slurm("scontrol", "--oneliner", "show", "node")).values()
        lease = record.lease
        assert lease is not None and lease.kept and lease.run == run_of(sites[-1])[1]
        assert bill.launched + 3000 < lease.until <= bill.launched + 3600 - 50 - NOTICED
    finally:
        end_by_hand(site, [i for i in site.alive() if i not in before])


def end_by_hand(site: Site, instances: list[str]) -> None:
    nodes = [node_of(i) for i in site.instances() if i["InstanceId"] in instances]
    if instances:
        site.ec2().terminate_instances(InstanceIds=instances)
    for node in nodes:
        site.slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=by hand")
        site.slurm("scontrol", "delete", f"nodename={node}")
