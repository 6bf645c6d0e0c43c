"""One run of the example workflow on an embedded cloud of its own, and what it left there."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.faults.place import Place, last_line, launched_twice, snakemake, started, wait
from bench.site import ROOT
from snakemake_executor_plugin_schlouder.costs import Bill, account
from snakemake_executor_plugin_schlouder.journal import Journal, VMRecord
from snakemake_executor_plugin_schlouder.localcloud import (
    Faults,
    LocalCloud,
    MeterEntry,
    Options,
)
from snakemake_executor_plugin_schlouder.model import Billing

SNAKEFILE = ROOT / "example_workflow" / "Snakefile"
LOG = "snakemake.log"
RESULTS = ("peptides.tsv", "psms.tsv", "summary.json", "report.png")
LONGEST = 600.0
"""Seconds after which a run is given up."""


@dataclass(frozen=True)
class Trial:
    """`options` go to Snakemake. VMs boot within `boot_seconds`, and are billed in units of `unit`
    seconds."""

    name: str
    faults: Faults
    options: Sequence[str]
    boot_seconds: tuple[float, float]
    unit: int
    spot_price_seconds: int


@dataclass(frozen=True)
class Outcome:
    """What is to be known of a run. `wrong`: in one line, why it is not complete; empty: it is. `struck`: how
    often each kind of fault happened; `launches`: calls of RunInstances, with refused ones and dry runs.
    Lists name instances (`leaked`, `unknown` to the journal), VMs that more than one instance was started
    for (`twice`), and `nodes` that Slurm still has. `seconds`: of the whole command. `billed`: seconds on
    the bill; `worst`: of the instance that is off most."""

    name: str
    wrong: str
    seconds: float
    struck: Mapping[str, int]
    launches: int
    calls: int
    vms: int
    spot_vms: int
    leaked: Sequence[str]
    unknown: Sequence[str]
    twice: Sequence[str]
    nodes: Sequence[str]
    billed_books: float
    billed_meter: int
    usd_books: float
    usd_meter: float
    worst_billed: float
    worst_usd: float


def clean_results(directory: Path) -> dict[str, bytes]:
    """What the workflow makes where nothing goes wrong: without any cloud. Raises RuntimeError."""
    directory.mkdir(parents=True)
    command = [*snakemake(SNAKEFILE, directory), "--cores", str(os.cpu_count() or 1)]
    code = wait(started(command, os.environ, directory / LOG), LONGEST)
    if code != 0:
        raise RuntimeError(f"the workflow fails without faults, too: {last_line(directory / LOG)}")
    return _results(directory)


def run(trial: Trial, directory: Path, expected: Mapping[str, bytes]) -> Outcome:
    """Runs the workflow in a new `directory`. Everything of its cloud is gone when this returns or raises."""
    directory.mkdir(parents=True)
    options = Options(
        name=f"faults-{os.getpid()}",
        boot_seconds=trial.boot_seconds,
        share=[directory, ROOT],
        billing_unit=trial.unit,
        spot_price_seconds=trial.spot_price_seconds,
    )
    with LocalCloud.up(options, attached=True) as cloud:
        return _observed(trial, Place(cloud, directory, SNAKEFILE), expected)


def _observed(trial: Trial, place: Place, expected: Mapping[str, bytes]) -> Outcome:
    cloud, directory = place.cloud, place.directory
    cloud.calls(reset=True)
    cloud.inject(trial.faults)
    begun = time.monotonic()
    code = wait(place.start(trial.options, directory / LOG), LONGEST)
    seconds = time.monotonic() - begun
    meter, struck, calls = cloud.meter(), cloud.struck(), cloud.calls()
    nodes = place.nodes()
    cloud.inject(Faults())
    vms, bills = _books(directory, time.time())
    differences = [_difference(entry, vms, bills) for entry in meter]
    return Outcome(
        name=trial.name,
        wrong=_what_is_wrong(code, directory, expected),
        seconds=seconds,
        struck=dict(struck),
        launches=calls["ec2:RunInstances"],
        calls=sum(count for name, count in calls.items() if name.startswith("ec2:")),
        vms=len(meter),
        spot_vms=sum(entry.market == "spot" for entry in meter),
        leaked=[entry.instance_id for entry in meter if entry.ended is None],
        unknown=[entry.instance_id for entry in meter if entry.instance_id not in vms],
        twice=launched_twice(place.instances()),
        nodes=nodes,
        billed_books=sum(bill.billed for bill in bills.values()),
        billed_meter=sum(entry.billed_seconds for entry in meter),
        usd_books=sum(bill.usd or 0.0 for bill in bills.values()),
        usd_meter=sum(entry.usd or 0.0 for entry in meter),
        worst_billed=max((billed for billed, _ in differences), default=0.0),
        worst_usd=max((usd for _, usd in differences), default=0.0),
    )


def _what_is_wrong(code: int, directory: Path, expected: Mapping[str, bytes]) -> str:
    if code != 0:
        return f"exit code {code}: {last_line(directory / LOG)}"
    found = _results(directory)
    differing = [name for name in RESULTS if found.get(name) != expected[name]]
    return f"{', '.join(differing)}: not as without faults" if differing else ""


def _results(directory: Path) -> dict[str, bytes]:
    paths = {name: directory / "results" / name for name in RESULTS}
    return {name: path.read_bytes() for name, path in paths.items() if path.exists()}


def _books(directory: Path, now: float) -> tuple[dict[str, VMRecord], dict[str, Bill]]:
    """The VMs of the run by instance, and its bills by VM; both empty when no run has begun."""
    paths = list((directory / "state").rglob("journal.sqlite"))
    if not paths:
        return {}, {}
    journal = Journal.reading(paths[0])
    (run,) = journal.runs()
    vms = journal.vms(run.run)
    spent = account(vms, journal.tasks(run.run), Billing(run.unit, run.minimum), now)
    journal.close()
    known = {vm.instance_id: vm for vm in vms if vm.instance_id is not None}
    return known, {bill.name: bill for bill in spent.bills}


def _difference(
    entry: MeterEntry, vms: Mapping[str, VMRecord], bills: Mapping[str, Bill]
) -> tuple[float, float]:
    """By how many seconds and USD the bill of an instance is off; one without a bill is off by all of it."""
    vm = vms.get(entry.instance_id)
    bill = None if vm is None else bills[vm.name]
    billed, usd = (0.0, None) if bill is None else (bill.billed, bill.usd)
    return abs(entry.billed_seconds - billed), abs((entry.usd or 0.0) - (usd or 0.0))
