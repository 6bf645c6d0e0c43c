"""`schlouder gc`: what is judged to have no owner, and that nothing else is ended."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from moto import mock_aws
from rich.console import Console
from rig import SMALL, Rig
from test_ec2_account import REGION
from test_localcloud import Vms
from test_takeover import hand_over_again, restart

from snakemake_executor_plugin_schlouder import cli, gc, report
from snakemake_executor_plugin_schlouder.ec2.errors import HOW_TO_GET_RIGHTS
from snakemake_executor_plugin_schlouder.gc import (
    CLOCKS,
    GRACE,
    Collector,
    Finding,
    Journals,
    LocalRun,
    Machine,
    Nodes,
    Scope,
    Status,
    Survey,
    Verdict,
    judge,
    may_end,
    stale_nodes,
)
from snakemake_executor_plugin_schlouder.init import Site, broker_policy
from snakemake_executor_plugin_schlouder.journal import Journal, RunRecord, birth_of
from snakemake_executor_plugin_schlouder.lease import Lease
from snakemake_executor_plugin_schlouder.localcloud import Faults, LocalCloud
from snakemake_executor_plugin_schlouder.localcloud.authorization import ACCOUNT
from snakemake_executor_plugin_schlouder.model import VM, SchlouderError, TaskState, VMState
from snakemake_executor_plugin_schlouder.provision import (
    CloudUnavailable,
    Instance,
    client_token,
    this_owner,
)
from snakemake_executor_plugin_schlouder.slurm import ClusterUnavailable
from snakemake_executor_plugin_schlouder.slurm.cli import NodeJob, NodeRecord, SlurmCommands

NOW = 1_000_000.0
OLD = NOW - 100_000
ME = "ann@head"
NODE = "schlouder-r1-1"
RECORD = RunRecord("r1", "/work", "head", 7, REGION, "e", "s", OLD)
LIVES = LocalRun(RECORD, is_living=True, is_gone=False)
KILLED = LocalRun(RECORD, is_living=False, is_gone=True)
ENDED = LocalRun(replace(RECORD, ended=NOW - 500), is_living=False, is_gone=True)
ELSEWHERE = LocalRun(replace(RECORD, host="other"), is_living=False, is_gone=False)
FRESH, OVER = Lease("r1", 600, int(NOW) - 10), Lease("r1", 600, int(NOW - 600 - GRACE - CLOCKS))
KEPT = Lease("r1", 3600, int(NOW) - 10, kept=True)
FORGED = NodeJob("5", "schlouder-r1", is_mine=False)
SILENT = Nodes(silence="no answer")
BOOTING = gc.BOOT_TIMEOUT + 600 + GRACE


def machine(launched: float = OLD, run: str = "r1", owner: str = ME, node: str = NODE) -> Machine:
    one = Instance("i-1", node, run, "running", "m5.large", "", launched)
    return Machine(one, owner, REGION)


def nodes(lease: Lease | None = None, **jobs: Sequence[NodeJob]) -> Nodes:
    return Nodes({NODE: lease}, {NODE: jobs["on"]} if jobs else {})


def journals(run: LocalRun | None = None, **more: Any) -> Journals:
    return Journals({"r1": run} if run else {}, **more)


@pytest.mark.parametrize(
    ("launched", "local", "told", "status"),
    [
        # An owner whose process is there, whatever else is said.
        (OLD, journals(LIVES), nodes(), Status.LIVING),
        (OLD, journals(LIVES), nodes(OVER), Status.LIVING),
        (OLD, journals(LIVES), nodes(KEPT), Status.LIVING),
        (OLD, journals(LIVES), Nodes(), Status.LIVING),
        (OLD, journals(LIVES), SILENT, Status.LIVING),
        (OLD, journals(LIVES), nodes(OVER, on=[NodeJob("5", "x")]), Status.LIVING),
        # One whose process is gone.
        (NOW - GRACE + 1, journals(KILLED), Nodes(), Status.YOUNG),
        (NOW - GRACE, journals(KILLED), Nodes(), Status.ORPHAN),
        (OLD, journals(KILLED), nodes(), Status.ORPHAN),
        (OLD, journals(KILLED), nodes(FRESH), Status.YOUNG),
        (OLD, journals(KILLED), nodes(replace(FRESH, written=int(NOW) - 239)), Status.YOUNG),
        (OLD, journals(KILLED), nodes(replace(FRESH, written=int(NOW) - 240)), Status.ORPHAN),
        (OLD, journals(KILLED), nodes(OVER), Status.ORPHAN),
        (OLD, journals(KILLED), nodes(KEPT), Status.KEPT),
        (OLD, journals(KILLED), SILENT, Status.UNKNOWN),
        # One whose run has ended.
        (NOW - 1, journals(ENDED), Nodes(), Status.YOUNG),
        (OLD, journals(ENDED), Nodes(), Status.ORPHAN),
        (OLD, journals(ENDED), nodes(KEPT), Status.KEPT),
        (OLD, journals(ENDED), nodes(replace(KEPT, written=int(NOW) - 3600)), Status.YOUNG),
        (OLD, journals(ENDED), nodes(replace(KEPT, written=int(NOW) - 3690)), Status.ORPHAN),
        (OLD, journals(ENDED), SILENT, Status.UNKNOWN),
        # One of another run since, of which only the lease is seen.
        (OLD, journals(ENDED), nodes(replace(FRESH, run="r2")), Status.LIVING),
        (OLD, journals(KILLED), nodes(replace(FRESH, run="r2")), Status.LIVING),
        # One of another host, or whose journal is not there: only its lease is believed.
        (OLD, journals(ELSEWHERE), nodes(FRESH), Status.LIVING),
        (OLD, journals(), nodes(FRESH), Status.LIVING),
        (OLD, journals(), nodes(replace(OVER, written=OVER.written + 1)), Status.YOUNG),
        (OLD, journals(), nodes(OVER), Status.ORPHAN),
        (OLD, journals(ELSEWHERE), nodes(OVER), Status.ORPHAN),
        (OLD, journals(), nodes(KEPT), Status.KEPT),
        (OLD, journals(ELSEWHERE), nodes(), Status.UNKNOWN),
        (OLD, journals(), nodes(), Status.UNKNOWN),
        (OLD, journals(), SILENT, Status.UNKNOWN),
        (NOW - BOOTING + 1, journals(), Nodes(), Status.YOUNG),
        (NOW - BOOTING, journals(), Nodes(), Status.UNKNOWN),
        (NOW + 60, journals(), nodes(OVER), Status.YOUNG),
        # A journal that cannot be read may be its owner's.
        (OLD, journals(unread=("newer",)), nodes(OVER), Status.UNKNOWN),
        (OLD, journals(unread=("newer",)), nodes(FRESH), Status.LIVING),
        (OLD, journals(unread=("newer",)), Nodes(), Status.UNKNOWN),
        (OLD, journals(KILLED, unread=("newer",)), nodes(OVER), Status.ORPHAN),
        # Jobs on it.
        (OLD, journals(KILLED), nodes(OVER, on=[NodeJob("5", "somebody")]), Status.IN_USE),
        (OLD, journals(), nodes(None, on=[NodeJob("5", "somebody")]), Status.IN_USE),
        (OLD, journals(KILLED), nodes(OVER, on=[NodeJob("5", "schlouder-r1")]), Status.ORPHAN),
        (OLD, journals(KILLED), nodes(OVER, on=[FORGED]), Status.IN_USE),
    ],
)
def test_who_owns_a_machine(launched: float, local: Journals, told: Nodes, status: Status) -> None:
    verdict = judge(machine(launched), local, told, ME, NOW)
    assert verdict.status == status, verdict.why
    assert verdict.why


def test_a_machine_that_was_kept_is_owned_by_the_run_that_has_taken_it() -> None:
    second = LocalRun(replace(RECORD, run="r2"), is_living=True, is_gone=False)
    both = {"r1": ENDED, "r2": second}
    taken = Journals(both, held={"i-1": "r2"})
    assert judge(machine(), taken, nodes(KEPT), ME, NOW).status == Status.LIVING
    renewed = nodes(replace(FRESH, run="r2"))
    assert judge(machine(), Journals(both), renewed, ME, NOW).status == Status.LIVING


def test_a_journal_that_cannot_be_read_says_nothing_of_the_machines_of_others() -> None:
    unread = journals(unread=("newer",))
    assert judge(machine(owner="bob@b"), unread, nodes(OVER), ME, NOW).status == Status.ORPHAN


def test_jobs_of_an_orphan_and_its_workflow_are_told() -> None:
    why = judge(
        machine(), journals(KILLED), nodes(OVER, on=[NodeJob("5", "schlouder-r1")]), ME, NOW
    ).why
    assert why == (
        "process 7 is gone; its workflow, started again in /work, would take it over; "
        "jobs of its own that run there: 1"
    )


@pytest.mark.parametrize(
    ("status", "unnamed", "named"),
    [
        (Status.ORPHAN, True, True),
        (Status.UNKNOWN, False, True),
        (Status.KEPT, False, True),
        (Status.YOUNG, False, False),
        (Status.LIVING, False, False),
        (Status.IN_USE, False, False),
    ],
)
def test_what_may_be_ended(status: Status, unnamed: bool, named: bool) -> None:
    verdict = Verdict(status, "")
    assert may_end(machine(), verdict, ()) == unnamed
    assert may_end(machine(), verdict, ("other",)) == unnamed
    assert may_end(machine(), verdict, ("r1",)) == named


HERE = {(REGION, "e")}


@pytest.mark.parametrize(
    ("alive", "local", "lease", "places", "ended", "stale"),
    [
        ([], journals(KILLED), OVER, HERE, (), True),
        ([], journals(ENDED), None, HERE, (), True),
        ([], journals(KILLED), FRESH, HERE, (), False),
        ([], journals(KILLED), KEPT, HERE, (), False),
        ([], journals(KILLED), replace(OVER, run="r2"), HERE, (), False),
        ([], journals(KILLED), OVER, {("elsewhere", "e")}, (), False),
        ([machine()], journals(KILLED), OVER, HERE, (), False),
        ([machine(node="schlouder-r1-2")], journals(KILLED), OVER, HERE, ("r1",), False),
        ([machine(run="r2")], journals(KILLED), OVER, HERE, (), False),
        ([], journals(LIVES), OVER, HERE, ("r1",), False),
        ([], journals(), OVER, HERE, (), False),
        ([], journals(), FRESH, HERE, ("r1",), True),
    ],
)
def test_which_nodes_have_lost_their_machine(
    alive: list[Machine],
    local: Journals,
    lease: Lease | None,
    places: set[tuple[str, str]],
    ended: tuple[str, ...],
    stale: bool,
) -> None:
    told = Nodes({NODE: lease, "node1": None, "schlouder-r1-x": None, "myschlouder-r1-1": None})
    found = stale_nodes(alive, local, told, places, ended, NOW)
    assert found == ({NODE: "r1"} if stale else {})


def with_lease(told: Nodes, node: str, run: str) -> Nodes:
    """With a lease that is not over on one more node."""
    return replace(told, leases={**told.leases, node: replace(FRESH, run=run)})


LOST = Nodes({NODE: OVER}, lost=(NODE,))
SECOND = replace(OVER, run="r2")
TAKEN = replace(LOST, leases={NODE: SECOND})
OTHER = "schlouder-r1-2"


@pytest.mark.parametrize(
    ("alive", "local", "told", "run"),
    [
        ([], journals(), LOST, "r1"),
        ([], journals(), TAKEN, "r2"),
        ([], journals(ENDED), TAKEN, "r2"),
        ([machine(run="r3", node="schlouder-r3-1")], journals(), LOST, "r1"),
        # r1 has left its machine to r3, which lives.
        ([machine(node=OTHER)], journals(), with_lease(TAKEN, OTHER, "r3"), "r2"),
        # Not lost, or not for so long.
        ([], journals(), replace(LOST, lost=()), ""),
        ([], journals(), replace(LOST, lost=(OTHER,)), ""),
        ([], journals(), replace(LOST, leases={NODE: None}), ""),
        ([], journals(), replace(LOST, leases={NODE: replace(OVER, written=OVER.written + 1)}), ""),
        ([], journals(), replace(LOST, leases={NODE: KEPT}), ""),
        # Somebody has it, or may have it.
        ([machine()], journals(), LOST, ""),
        ([machine(run="r3")], journals(), LOST, ""),
        ([machine(node="")], journals(), LOST, ""),
        ([machine(run="r2", node="")], journals(), TAKEN, ""),
        ([], journals(LIVES), LOST, ""),
        ([], Journals({"r2": LIVES}), TAKEN, ""),
        ([], journals(), with_lease(LOST, OTHER, "r1"), ""),
        ([], journals(), with_lease(TAKEN, OTHER, "r2"), ""),
        ([], journals(unread=("newer",)), LOST, ""),
        # A job is on it, or another user has jobs that may wait for it.
        ([], journals(), replace(LOST, jobs={NODE: [NodeJob("5", "x")]}), ""),
        ([], journals(), replace(LOST, jobs={NODE: [NodeJob("5", "schlouder-r1")]}), ""),
        ([], journals(), replace(LOST, foreign={"schlouder-r1"}), ""),
        ([], journals(), replace(TAKEN, foreign={"schlouder-r2"}), ""),
    ],
)
def test_which_nodes_nobody_has_told_anything_of_since(
    alive: list[Machine], local: Journals, told: Nodes, run: str
) -> None:
    assert stale_nodes(alive, local, told, (), (), NOW) == ({NODE: run} if run else {})


@pytest.mark.parametrize("name", ["node1", "schlouder-r1-x", "myschlouder-r1-1"])
def test_a_lost_node_with_a_name_of_others_stays(name: str) -> None:
    assert stale_nodes([], journals(), Nodes({name: OVER}, lost=(name,)), (), (), NOW) == {}


HOSTILE = "[red]\x1b[2J\x07\u202e\n\r[/bold]:smile: " + "x" * 400


def test_tags_are_printed_harmlessly(capsys: pytest.CaptureFixture[str]) -> None:
    one = replace(machine(run=HOSTILE, owner=HOSTILE, node=HOSTILE), region="eu\x1b[1m")
    finding = Finding(one, Verdict(Status.ORPHAN, f"its lease of run {HOSTILE} is over"), True)
    Console(force_terminal=True, color_system=None, width=100).print(
        report.leftovers(Survey((finding,), {HOSTILE: "r"}))
    )
    shown = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert "[red]" in shown and ":smile:" in shown
    assert len(shown) < 5000
    assert json.loads(json.dumps(gc.as_data(Survey((finding,)), None)))


# -- on moto's EC2, with a Slurm of which only the words are made


class Words(SlurmCommands):
    """What Slurm's commands say, and what they were asked to do."""

    def __init__(self) -> None:
        super().__init__("")
        self.leases_: dict[str, Lease | None] = {}
        self.lost: set[str] = set()
        self.jobs: dict[str, list[NodeJob]] = {}
        self.away = False
        self.done: list[tuple[str, str]] = []

    def all_nodes(self) -> dict[str, NodeRecord]:
        if self.away:
            raise ClusterUnavailable("slurmctld is away")
        return {node: NodeRecord(lease, node in self.lost) for node, lease in self.leases_.items()}

    def foreign_names(self) -> set[str]:
        return {job.name for jobs in self.jobs.values() for job in jobs if not job.is_mine}

    def jobs_on(self, nodes: Sequence[str]) -> dict[str, list[NodeJob]]:
        assert self.leases_.keys() >= set(nodes), "squeue refuses the whole question"
        return {node: self.jobs[node] for node in nodes if node in self.jobs}

    def cancel_run(self, run: str) -> None:
        self.done.append(("cancel", run))

    def fail(self, node: str, reason: str) -> None:
        self.done.append(("fail", node))

    def delete(self, node: str) -> bool:
        self.done.append(("delete", node))
        del self.leases_[node]
        return True


def write_run(state: Path, run: str, pid: int, region: str, endpoint: str) -> Path:
    """The journal of a run on this host that has not ended; returns its path."""
    path = state / "schlouder" / run / "journal.sqlite"
    kept = Journal(path)
    record = RunRecord(run, f"/work/{run}", socket.gethostname(), pid, region, endpoint, "s", 1)
    kept.begin_run(replace(record, birth=birth_of(pid) or "a boot of long ago 1"))
    kept.close()
    return path


class Account:
    """An EC2 account and this host's journals."""

    def __init__(self, state: Path, slurm: Words) -> None:
        self.ec2 = boto3.client("ec2", REGION)
        self.state = state
        self.slurm = slurm

    def launch(self, tags: Mapping[str, str], token: str = "") -> str:
        """`token`: of the launch; else the one schlouder gives."""
        pairs: Any = [{"Key": key, "Value": value} for key, value in tags.items()]
        specification: Any = [{"ResourceType": "instance", "Tags": pairs}] if tags else []
        reply = self.ec2.run_instances(
            ImageId="ami-12345678",
            InstanceType="m5.large",
            MinCount=1,
            MaxCount=1,
            TagSpecifications=specification,
            ClientToken=token
            or client_token(
                tags.get("schlouder:run", ""), [uuid.uuid4().hex], "m5.large", "on-demand", "", 1
            ),
        )
        return str(reply["Instances"][0]["InstanceId"])

    def vm(self, run: str = "r1", number: int = 1, owner: str = "") -> str:
        tags = {"schlouder:run": run, "schlouder:owner": owner or this_owner()}
        return self.launch({**tags, "schlouder:node": f"schlouder-{run}-{number}"})

    def run(self, run: str, pid: int) -> Path:
        return write_run(self.state, run, pid, REGION, self.ec2.meta.endpoint_url)

    def alive(self) -> set[str]:
        return {
            one["InstanceId"]
            for reservation in self.ec2.describe_instances()["Reservations"]
            for one in reservation["Instances"]
            if one["State"]["Name"] == "running"
        }

    def collector(self, *named: str, everybody: bool = False) -> Collector:
        return Collector(gc.connect([REGION], False), Scope(everybody, named), self.slurm)


GONE = 4_000_000
"""More than Linux numbers processes."""


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Words:
    words = Words()
    monkeypatch.setattr(gc, "SlurmCommands", lambda partition: words)
    return words


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: Words) -> Iterator[Account]:
    """In which nothing is too young."""
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "SNAKEMAKE_SCHLOUDER_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gc, "GRACE", 0.0)
    monkeypatch.setattr(gc, "_LOOK", 0.0)
    with mock_aws():
        yield Account(tmp_path / "state", slurm)


@pytest.fixture
def unpriced(monkeypatch: pytest.MonkeyPatch) -> None:
    """moto has no price list."""
    monkeypatch.setattr(gc, "costs", lambda *_: {})


def test_only_the_orphan_goes(account: Account, capsys: pytest.CaptureFixture[str]) -> None:
    account.run("dead", GONE)
    account.run("lives", os.getpid())
    orphan = account.vm("dead")
    others = {
        account.vm("lives"),
        account.vm("dead", 2, owner="bob@elsewhere"),
        account.vm("who"),
        account.launch({}),
        account.launch({"schlouder:runs": "dead", "schlouder:owner": this_owner()}),
        account.launch({"Schlouder:run": "dead", "schlouder:owner": this_owner()}),
        account.launch({"schlouder:run": "dead"}),
    }
    assert cli.main(["gc"]) == 3
    assert account.alive() == {orphan, *others}
    capsys.readouterr()
    assert cli.main(["gc", "--yes"]) == 0
    assert account.alive() == others
    told = capsys.readouterr()
    assert "deleted: 1" in told.out
    assert "the price of m5.large is unknown" in told.err
    assert "machines of other owners or without one: 2" in told.err
    assert cli.main(["gc", "--yes"]) == 0
    assert "Nothing to delete." in capsys.readouterr().out


@pytest.mark.usefixtures("unpriced")
def test_the_machines_of_others_need_to_be_asked_for(account: Account) -> None:
    account.slurm.leases_["schlouder-r1-1"] = Lease("r1", 600, 1)
    account.vm(owner="bob@elsewhere")
    untold = account.launch({"schlouder:run": "r1"})
    assert cli.main(["gc", "--yes", "--run", "r1"]) == 0
    assert len(account.alive()) == 2
    assert cli.main(["gc", "--yes", "--everybody"]) == 0
    assert account.alive() == {untold}, "without an owner it is none of ours"


@pytest.mark.usefixtures("unpriced")
def test_an_unknown_owner_must_be_named(account: Account) -> None:
    kept, named = account.vm("r1"), account.vm("r2")
    account.slurm.away = True
    assert cli.main(["gc", "--yes"]) == 0
    assert account.alive() == {kept, named}
    assert cli.main(["gc", "--yes", "--run", "r2"]) == 0
    assert account.alive() == {kept}


@pytest.mark.usefixtures("unpriced")
def test_a_living_owner_is_safe_even_if_named(account: Account) -> None:
    account.run("r1", os.getpid())
    instance = account.vm("r1")
    account.slurm.leases_["schlouder-r1-1"] = Lease("r1", 600, 1)
    assert cli.main(["gc", "--yes", "--run", "r1", "--everybody"]) == 0
    assert account.alive() == {instance}


@pytest.mark.usefixtures("unpriced")
@pytest.mark.parametrize("spoil", ["newer", "damaged", "empty"])
def test_a_journal_that_cannot_be_read_makes_owners_unknown(
    account: Account, capsys: pytest.CaptureFixture[str], spoil: str
) -> None:
    path = account.run("r1", GONE)
    if spoil == "newer":
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA user_version = 99")
    else:
        path.write_bytes(b"damaged" * 1000 if spoil == "damaged" else b"")
    before = path.read_bytes()
    instance = account.vm("r1")
    account.slurm.leases_["schlouder-r1-1"] = Lease("r1", 600, 1)
    assert cli.main(["gc", "--yes"]) == 0
    assert account.alive() == {instance}
    told = capsys.readouterr()
    assert f"the journal {path}" in told.err
    assert "owner unknown" in told.out
    assert path.read_bytes() == before


@pytest.mark.usefixtures("unpriced")
def test_a_run_that_came_back_to_life_keeps_its_machines(account: Account) -> None:
    path = account.run("r1", GONE)
    account.run("r2", GONE)
    taken, orphan = account.vm("r1"), account.vm("r2")
    collector = account.collector()
    seen = collector.survey()
    assert {finding.machine.id for finding in seen.doomed} == {taken, orphan}
    later = account.vm("r2", 2)
    back = Journal(path)
    (killed,) = back.runs()
    assert back.take_over(killed, os.getpid())
    ending = collector.end(seen)
    assert (ending.ended, ending.left, ending.problems) == ((orphan,), (), ())
    (note,) = ending.notes
    assert note.startswith(f"{taken} is left alone now: run r1 goes on")
    assert account.alive() == {taken, later}, "nobody has seen the later one"


@pytest.mark.usefixtures("unpriced")
def test_when_ec2_does_not_list_nothing_is_ended(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    account.run("r1", GONE)
    instance = account.vm("r1")
    collector = account.collector()
    seen = collector.survey()

    def away(*_: object, **__: object) -> None:
        raise CloudUnavailable("away")

    monkeypatch.setattr(gc, "describe", away)
    with pytest.raises(SchlouderError, match=f"{REGION}: EC2 does not list machines: away"):
        collector.end(seen)
    assert account.alive() == {instance}
    assert cli.main(["gc", "--yes"]) == 1


@pytest.mark.usefixtures("unpriced")
def test_what_ec2_refuses_to_end_is_told(
    account: Account, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    account.run("r1", GONE)
    instance = account.vm("r1")
    account.slurm.leases_["schlouder-r1-1"] = None
    refusal = f"the right ec2:TerminateInstances is missing; {HOW_TO_GET_RIGHTS}"

    def refuse(*_: object) -> None:
        raise CloudUnavailable(refusal)

    monkeypatch.setattr(gc, "terminate", refuse)
    monkeypatch.setattr(gc, "ENDING_TIMEOUT", 0.0)
    assert cli.main(["gc", "--yes"]) == 1
    told = capsys.readouterr().err
    assert f"not everything could be ended: {refusal}" in told
    assert f"{instance} in {REGION} was to end and is still there" in told
    assert account.slurm.done == [], "the node of a machine that is alive stays"


@pytest.mark.usefixtures("unpriced")
def test_no_call_without_an_id(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "terminate", lambda *_: pytest.fail("nothing is to be ended"))
    account.run("r1", GONE)
    account.slurm.leases_["schlouder-r1-1"] = None
    assert cli.main(["gc", "--yes"]) == 0
    assert account.slurm.done[-1] == ("delete", "schlouder-r1-1")


@pytest.mark.usefixtures("unpriced")
def test_nodes_of_machines_that_are_gone_go(account: Account) -> None:
    account.run("r1", GONE)
    account.run("lives", os.getpid())
    account.vm("r1", 1)
    account.slurm.leases_ = dict.fromkeys(
        ["schlouder-r1-1", "schlouder-r1-2", "schlouder-lives-1", "schlouder-other-1", "node1"]
    )
    assert cli.main(["gc", "--yes"]) == 0
    assert account.slurm.leases_.keys() == {
        "schlouder-r1-2",
        "schlouder-lives-1",
        "schlouder-other-1",
        "node1",
    }, "of r1-2 the user has not been told"
    assert ("cancel", "schlouder-r1") in account.slurm.done
    assert cli.main(["gc"]) == 3
    assert cli.main(["gc", "--yes"]) == 0
    assert "schlouder-r1-2" not in account.slurm.leases_


@pytest.mark.usefixtures("unpriced")
def test_nodes_that_no_journal_tells_of_go_once_they_are_lost(
    account: Account, capsys: pytest.CaptureFixture[str]
) -> None:
    over = Lease("r2", 600, 1)
    account.slurm.leases_ = {f"schlouder-r1-{number}": over for number in range(1, 4)}
    account.slurm.lost = {"schlouder-r1-1", "schlouder-r1-2"}
    account.slurm.jobs["schlouder-r1-2"] = [NodeJob("17", "somebody")]
    assert cli.main(["gc", "--yes", "--run", "r3"]) == 0
    assert "Nothing to delete." in capsys.readouterr().out
    assert cli.main(["gc"]) == 3
    assert "schlouder-r1-1" in capsys.readouterr().out
    assert cli.main(["gc", "--yes", "--run", "r1"]) == 0
    assert account.slurm.leases_.keys() == {"schlouder-r1-2", "schlouder-r1-3"}
    assert account.slurm.done[0] == ("cancel", "schlouder-r2")


@pytest.mark.usefixtures("unpriced")
@pytest.mark.parametrize("job", [NodeJob("17", "somebody"), FORGED._replace(slurm_id="17")])
def test_a_job_of_others_keeps_a_machine_and_a_node(
    account: Account, capsys: pytest.CaptureFixture[str], job: NodeJob
) -> None:
    account.run("r1", GONE)
    instance = account.vm("r1")
    account.slurm.leases_["schlouder-r1-1"] = None
    account.slurm.jobs["schlouder-r1-1"] = [job]
    assert cli.main(["gc", "--yes", "--run", "r1"]) == 0
    assert account.alive() == {instance}
    assert "in use" in capsys.readouterr().out
    account.ec2.terminate_instances(InstanceIds=[instance])
    assert cli.main(["gc", "--yes"]) == 1
    assert "the Slurm node schlouder-r1-1 is left: jobs 17 of others" in capsys.readouterr().err
    assert "schlouder-r1-1" in account.slurm.leases_


def test_a_machine_that_somebody_has_tagged_as_ours_is_not_listed(account: Account) -> None:
    tags = {"schlouder:run": "r1", "schlouder:owner": this_owner(), "schlouder:node": "n"}
    account.launch(tags, token=str(uuid.uuid4()))
    ours = account.vm()
    assert [one.id for one in gc.list_machines(account.ec2)] == [ours]


def test_hostile_tags_end_nothing_else(
    account: Account, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "BOOT_TIMEOUT", -1000.0)
    account.slurm.leases_ = {"node1": None}
    hostile = "\x9b31m[bold]\u202e" + "-" * 200
    account.launch(
        {
            "schlouder:run": hostile,
            "schlouder:owner": this_owner(),
            "schlouder:node": "node1,node2 --all",
        }
    )
    assert cli.main(["gc", "--yes", "--run", hostile]) == 0
    told = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in told.out + told.err)
    assert account.alive() == set()
    assert account.slurm.leases_ == {"node1": None}


def test_json_tells_all_and_asks_nothing(
    account: Account, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "costs", lambda machines, *_: {machines[0].id: gc.Cost(0.096, 0.2)})
    account.run("r1", GONE)
    instance = account.vm("r1")
    assert cli.main(["gc", "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    (one,) = told["machines"]
    assert (one["id"], one["status"], one["to_be_deleted"]) == (instance, "orphan", True)
    assert (one["usd_per_hour"], one["usd_so_far"]) == (0.096, 0.2)
    assert cli.main(["gc", "--json", "--yes"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["deleted"], told["left"]) == ([instance], [])


def test_costs_are_counted_in_the_units_of_the_run(account: Account) -> None:
    account.run("r1", GONE)
    account.vm("r1")
    (one,) = gc.list_machines(account.ec2)
    known = gc.read_journals(socket.gethostname(), {"r1"})
    hourly = LocalRun(replace(known.runs["r1"].record, unit=3600.0, minimum=0.0), False, True)
    booked = VM("n", "s", SMALL, 0.0, price=0.5, instance_id=one.id, state=VMState.READY)
    path = account.run("r9", GONE)
    kept = Journal(path)
    kept.write("r9", vms=[booked])
    (record,) = kept.vms("r9")
    asked = replace(known, runs={"r1": hourly}, booked={one.id: record})
    found = gc.costs([one], asked, account.ec2, one.launched + 3700, lambda _: None)
    assert found == {one.id: gc.Cost(0.5, 1.0)}


@pytest.mark.parametrize("answer", ["n", "", "y", "yes"])
@pytest.mark.usefixtures("unpriced")
def test_a_person_is_asked(account: Account, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    account.run("r1", GONE)
    account.vm("r1")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: answer)
    ends = answer.startswith("y")
    assert cli.main(["gc"]) == (0 if ends else 3)
    assert len(account.alive()) == (0 if ends else 1)


def test_all_regions(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = gc.connect([], everywhere=True)
    assert REGION in clients and len(clients) > 10
    assert {name: client.meta.region_name for name, client in clients.items()} == {
        name: name for name in clients
    }


def test_a_missing_right_is_named(
    account: Account, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(self: object, operation: str, _: object) -> None:
        raise ClientError({"Error": {"Code": "UnauthorizedOperation", "Message": "No."}}, operation)

    monkeypatch.setattr("botocore.client.BaseClient._make_api_call", denied)
    assert cli.main(["gc", "--all-regions"]) == 1
    told = capsys.readouterr().err
    assert f"the right ec2:DescribeRegions is missing; {HOW_TO_GET_RIGHTS}" in told
    assert "--region NAME does without" in told
    assert cli.main(["gc"]) == 1
    told = capsys.readouterr().err
    assert f"the right ec2:DescribeInstances is missing; {HOW_TO_GET_RIGHTS}" in told
    assert told.count("\n") == 1


def test_a_region_that_does_not_answer_is_told_and_keeps_its_nodes(
    account: Account, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gc, "costs", lambda *_: {})
    account.run("r1", GONE)
    account.vm("r1")
    account.slurm.leases_["schlouder-r1-1"] = None
    real = gc.list_machines

    def partly(ec2: Any) -> list[Machine]:
        if ec2.meta.region_name != REGION:
            raise CloudUnavailable("away")
        return real(ec2)

    monkeypatch.setattr(gc, "list_machines", partly)
    monkeypatch.setattr(gc, "ENDING_TIMEOUT", 0.0)
    assert cli.main(["gc", "--yes", "--region", REGION, "--region", "us-east-1"]) == 1
    assert "us-east-1: EC2 does not list machines: away" in capsys.readouterr().err
    assert account.alive() == set()
    assert "schlouder-r1-1" in account.slurm.leases_


def test_what_is_missing_is_one_line(
    account: Account, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    assert cli.main(["gc"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("schlouder: --region: no AWS region; give it,")
    assert told.count("\n") == 1


@pytest.mark.usefixtures("account")
def test_without_slurms_commands_owners_are_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    silence = gc.read_nodes(SlurmCommands(""), ["schlouder-r1-1"]).silence
    assert "scontrol" in silence


@pytest.mark.usefixtures("account")
def test_wrong_options_are_a_usage_error() -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["gc", "--region", REGION, "--all-regions"])
    assert caught.value.code == 2


# -- what a restart finds


def test_a_restart_does_again_what_ran_on_machines_that_were_deleted(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    done, *lost = rig.give(3, seconds=5)
    for number, task in enumerate((done, *lost)):
        task.identity, task.command = f"t{number}", f"run {5 if number == 0 else 500} 0"
    rig.run(25)
    assert rig.ended.keys() == {done.key}
    for node in rig.world.alive():
        rig.world.kill_machine(node, "Client.UserInitiatedShutdown")
        rig.slurm.fail(node, "schlouder gc: machine gone")
    rig.slurm.cancel_run("schlouder-r1")
    for node in list(rig.world.nodes):
        rig.world.remove_node(node)
    restart(rig, lost)
    rig.run(3)
    for task in lost:
        task.command = "run 5 0"
    keys = hand_over_again(rig, lost)
    rig.run(300)
    assert [rig.ended[keys[task.identity]].state for task in lost] == [TaskState.COMPLETE] * 2
    rig.broker.release()
    assert rig.world.alive() == []


# -- on the embedded cloud


@pytest.mark.integration
def test_of_five_vms_only_the_orphan_goes(
    cloud: LocalCloud,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With no more rights than `schlouder init` writes down."""
    for name, value in cloud.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gc, "GRACE", -1.0)
    vms = Vms(cloud)
    mine = {"schlouder:owner": this_owner()}
    try:
        write_run(tmp_path / "state", "dead", GONE, *place(vms))
        write_run(tmp_path / "state", "lives", os.getpid(), *place(vms))
        orphan = vms.join(
            "schlouder-dead-1",
            **tagged({**mine, "schlouder:run": "dead", "schlouder:node": "schlouder-dead-1"}),
        )
        others = [
            vms.run(**tagged({**mine, "schlouder:run": "lives"})),
            vms.run(),
            vms.run(**tagged({**mine, "schlouder:runs": "dead", "Schlouder:run": "dead"})),
            vms.run(**tagged({"schlouder:owner": "bob@there", "schlouder:run": "bobs"})),
        ]
        lease = Lease("dead", 600, int(time.time()) - 200)
        SlurmCommands("schlouder").renew(["schlouder-dead-1"], lease)
        site = Site(account=ACCOUNT, region=vms.environment["AWS_DEFAULT_REGION"])
        cloud.inject(Faults(policy=broker_policy(site)))
        assert cli.main(["gc", "--all-regions"]) == 3
        told = capsys.readouterr()
        assert "To be deleted: 1 machine, 0.0960 USD an hour, 0.0016 USD so far" in told.out
        assert told.err == "schlouder: machines of other owners or without one: 1 (--everybody)\n"
        assert vms.state(orphan) == "running"
        assert cli.main(["gc", "--all-regions", "--yes"]) == 0
        vms.wait_for_state(orphan, "terminated")
        assert [vms.state(one) for one in others] == ["running"] * 4
        assert SlurmCommands("schlouder").all_nodes() == {}
        assert cli.main(["gc"]) == 0
    finally:
        cloud.inject(Faults())
        vms.terminate_all()


def place(vms: Vms) -> tuple[str, str]:
    return vms.environment["AWS_DEFAULT_REGION"], vms.environment["AWS_ENDPOINT_URL"]


def tagged(tags: Mapping[str, str]) -> dict[str, Any]:
    """Of a launch with these tags, as schlouder does it if they name a run."""
    pairs = [{"Key": key, "Value": value} for key, value in tags.items()]
    given: dict[str, Any] = {"TagSpecifications": [{"ResourceType": "instance", "Tags": pairs}]}
    run = tags.get("schlouder:run")
    if run is not None:
        node = tags.get("schlouder:node", "")
        given["ClientToken"] = client_token(run, [node], "m5.large", "on-demand", "", 1)
    return given
