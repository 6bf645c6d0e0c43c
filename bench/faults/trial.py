"""One run of the example workflow on an embedded cloud of its own, and what it left there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3

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
from snakemake_executor_plugin_schlouder.provision import TAG_NODE

WORKFLOW = ROOT / "example_workflow"
RESULTS = ("peptides.tsv", "psms.tsv", "summary.json", "report.png")
LONGEST = 600.0
"""Seconds after which a run is given up."""

_GRACE = 60.0


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
    command = [*_snakemake(directory), "--cores", str(os.cpu_count() or 1)]
    code = _run(command, dict(os.environ), directory / "snakemake.log")
    if code != 0:
        raise RuntimeError(f"the workflow fails without faults, too: {_last_line(directory)}")
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
        return _observed(trial, cloud, directory, expected)


def _observed(
    trial: Trial, cloud: LocalCloud, directory: Path, expected: Mapping[str, bytes]
) -> Outcome:
    environment = _environment(cloud, directory)
    cloud.calls(reset=True)
    cloud.inject(trial.faults)
    begun = time.monotonic()
    code = _run(
        [*_snakemake(directory), "--executor", "schlouder", "--jobs", "100", *trial.options],
        environment,
        directory / "snakemake.log",
    )
    seconds = time.monotonic() - begun
    meter, struck, calls = cloud.meter(), cloud.struck(), cloud.calls()
    nodes = _nodes(environment)
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
        twice=_twice(cloud),
        nodes=nodes,
        billed_books=sum(bill.billed for bill in bills.values()),
        billed_meter=sum(entry.billed_seconds for entry in meter),
        usd_books=sum(bill.usd or 0.0 for bill in bills.values()),
        usd_meter=sum(entry.usd or 0.0 for entry in meter),
        worst_billed=max((billed for billed, _ in differences), default=0.0),
        worst_usd=max((usd for _, usd in differences), default=0.0),
    )


def _environment(cloud: LocalCloud, directory: Path) -> dict[str, str]:
    """That of a user's shell, who has no earlier runs; VMs may be started in all zones."""
    own = {f"XDG_{kind.upper()}_HOME": str(directory / kind) for kind in ("state", "cache")}
    subnets = {"SNAKEMAKE_SCHLOUDER_SUBNETS": ",".join(cloud.subnets.values())}
    return {**os.environ, **cloud.environment(), **subnets, **own}


def _snakemake(directory: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(WORKFLOW / "Snakefile")),
        *("--directory", str(directory)),
    ]


def _run(command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    """The exit code. What takes too long, or is interrupted, is ended as Ctrl-C does, and then for good."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            return process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            return _end(process)
        except BaseException:
            _end(process)
            raise


def _end(process: subprocess.Popen[bytes]) -> int:
    os.killpg(process.pid, signal.SIGINT)
    try:
        return process.wait(_GRACE) or 1
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def _what_is_wrong(code: int, directory: Path, expected: Mapping[str, bytes]) -> str:
    if code != 0:
        return f"exit code {code}: {_last_line(directory)}"
    found = _results(directory)
    differing = [name for name in RESULTS if found.get(name) != expected[name]]
    return f"{', '.join(differing)}: not as without faults" if differing else ""


def _results(directory: Path) -> dict[str, bytes]:
    paths = {name: directory / "results" / name for name in RESULTS}
    return {name: path.read_bytes() for name, path in paths.items() if path.exists()}


def _last_line(directory: Path) -> str:
    lines = (directory / "snakemake.log").read_text().split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def _nodes(environment: Mapping[str, str]) -> list[str]:
    command = ["sinfo", "--Node", "--noheader", "--format=%N"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def _twice(cloud: LocalCloud) -> list[str]:
    """Names of VMs that more than one instance was started for, by tag and launch index."""
    access = cloud.environment()
    ec2: Any = boto3.client(
        "ec2",
        endpoint_url=access["AWS_ENDPOINT_URL"],
        region_name=access["AWS_DEFAULT_REGION"],
        aws_access_key_id=access["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=access["AWS_SECRET_ACCESS_KEY"],
    )
    started = Counter(
        _vm_name(instance)
        for page in ec2.get_paginator("describe_instances").paginate()
        for reservation in page["Reservations"]
        for instance in reservation["Instances"]
    )
    return [name for name, count in started.items() if count > 1]


def _vm_name(instance: Mapping[str, Any]) -> str:
    tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
    return str(tags[TAG_NODE].split()[instance["AmiLaunchIndex"]])


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
