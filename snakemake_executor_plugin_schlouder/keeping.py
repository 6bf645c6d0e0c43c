"""VMs that are kept for the next run of the same user, host and cluster: what is kept and for how long, the
store in which it waits, and what of it a run takes.

A VM has one owner at most at any instant. Its run gives it up in its journal before it is in the store, and
a run that takes it has it out of the store before it is in that one's journal. What a crash leaves in
between is nobody's, and ends when its lease does.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from . import store
from .ec2.account import Ec2Settings
from .ec2.joining import Join
from .lease import NOTICED, Lease
from .model import VM, Billing, InstanceType, VMState
from .planning import Wanted
from .provision import Cloud, Instance
from .slurm import Cluster, ClusterUnavailable, NodeStatus

VERSION = 1

NEARLY_OVER = NOTICED
"""Seconds before its end within which a VM is not taken any more: its new owner's word might come too
late."""

_FORGOTTEN = 86400.0

_SCHEMA = """
CREATE TABLE kept (
    node TEXT PRIMARY KEY, instance_id TEXT NOT NULL, origin TEXT NOT NULL, giver TEXT NOT NULL,
    strategy TEXT NOT NULL, type TEXT NOT NULL, market TEXT NOT NULL, zone TEXT NOT NULL,
    price REAL, list_price REAL, requested REAL NOT NULL, meter REAL,
    handed_over REAL NOT NULL, until REAL NOT NULL,
    controller TEXT NOT NULL, partition TEXT NOT NULL, region TEXT NOT NULL, endpoint TEXT NOT NULL,
    machine TEXT NOT NULL
) STRICT;
"""


@dataclass(frozen=True)
class Keep:
    """How long an idle VM is kept for the next run: to the end of what is paid, or for `seconds`; neither:
    not at all."""

    is_paid: bool = False
    seconds: float = 0.0

    @property
    def is_on(self) -> bool:
        return self.is_paid or self.seconds > 0

    def left(self, billing: Billing, uptime: float, idle_for: float = 0.0) -> float:
        """Seconds that a VM still stays; 0 or less: it goes."""
        if self.is_paid:
            return billing.paid_left(uptime) - billing.margin - NOTICED
        return self.seconds - idle_for

    def has_effect(self, billing: Billing) -> bool:
        """Whether any VM can be kept for long enough to be taken."""
        return self.left(billing, 0.0) > NEARLY_OVER


@dataclass(frozen=True)
class Mark:
    """What the runs that hand a VM on must have in common. `controller` is host:port, `machine` a digest of
    all that the machine was made of, and of how it is billed."""

    controller: str
    partition: str
    region: str
    endpoint: str
    machine: str

    @classmethod
    def of(
        cls,
        settings: Ec2Settings,
        join: Join,
        billing: Billing,
        partition: str,
        region: str,
        endpoint: str,
    ) -> Mark:
        made_of = replace(settings, types=(), markets=()), replace(join, first_lease=0.0)
        text = repr((*made_of, billing.unit, billing.minimum))
        digest = hashlib.sha256(text.encode()).hexdigest()
        return cls(join.controller, partition, region, endpoint, digest)


@dataclass(frozen=True)
class Kept:
    """A VM between two runs: started by `origin`, handed over by `giver`; it stays until a date. The rest is
    as in `VM`."""

    node: str
    instance_id: str
    origin: str
    giver: str
    strategy: str
    type: str
    market: str
    zone: str
    price: float | None
    list_price: float | None
    requested: float
    meter: float | None
    handed_over: float
    until: float

    @classmethod
    def of(cls, vm: VM, giver: str, now: float) -> Kept:
        """Not to be taken yet: until its lease says so it may end at any time."""
        assert vm.instance_id is not None
        return cls(
            node=vm.name,
            instance_id=vm.instance_id,
            origin=vm.origin or giver,
            giver=giver,
            strategy=vm.strategy,
            type=vm.type.name,
            market=vm.market,
            zone=vm.zone,
            price=vm.price,
            list_price=vm.list_price,
            requested=vm.requested,
            meter=vm.meter,
            handed_over=now,
            until=now,
        )

    def as_vm(self, kind: InstanceType, strategy: str, state: VMState, now: float) -> VM:
        """The same as a VM of the run that takes it."""
        return VM(
            self.node,
            strategy,
            kind,
            self.requested,
            market=self.market,
            price=self.price,
            list_price=self.list_price,
            zone=self.zone,
            meter=self.meter,
            state=state,
            instance_id=self.instance_id,
            ready=now,
            idle_since=now,
            is_adopted=True,
            origin=self.origin,
            taken=self.handed_over,
        )


_KEPT = ", ".join(part.name for part in fields(Kept))
_MARK = ", ".join(part.name for part in fields(Mark))
_MARKED = " AND ".join(f"{part.name} = ?" for part in fields(Mark))


def shelf_path() -> Path:
    """One for all workflows of the user."""
    return store.state_directory() / "kept.sqlite"


class Shelf:
    """The store: one SQLite file per user. Every method is one committed transaction, and raises
    sqlite3.Error.

    A file that is damaged or written by a newer version is moved aside; `set_aside` then names where it went.
    """

    def __init__(self, path: Path | str, mark: Mark) -> None:
        self._mark = mark
        try:
            self._db, self.set_aside = store.opened(path, _SCHEMA, VERSION)
        except (OSError, sqlite3.OperationalError) as error:
            raise store.no_place_for("store of kept VMs", path, error) from error

    def put(self, vms: Iterable[Kept], now: float) -> None:
        """Nobody takes them before `promise` says how long they stay."""
        values = ", ".join("?" * (len(fields(Kept)) + len(fields(Mark))))
        rows = [(*astuple(kept), *astuple(self._mark)) for kept in vms]
        with self._transaction() as db:
            db.execute("DELETE FROM kept WHERE until < ?", (now - _FORGOTTEN,))
            db.executemany(
                f"INSERT OR REPLACE INTO kept ({_KEPT}, {_MARK}) VALUES ({values})", rows
            )

    def promise(self, until: Mapping[str, float]) -> None:
        """These nodes stay until then."""
        with self._transaction() as db:
            db.executemany(
                "UPDATE kept SET until = ? WHERE node = ?",
                [(date, node) for node, date in until.items()],
            )

    def offered(self, now: float) -> list[Kept]:
        """What a run with this mark may take, what stays longest first."""
        with self._transaction() as db:
            rows = db.execute(
                f"SELECT {_KEPT} FROM kept WHERE until > ? AND {_MARKED} ORDER BY until DESC, node",
                (now + NEARLY_OVER, *astuple(self._mark)),
            ).fetchall()
        return [Kept(*row) for row in rows]

    def take(self, nodes: Iterable[str]) -> list[Kept]:
        """Those of the nodes that nobody else has taken; they are the caller's now."""
        with self._transaction() as db:
            return [
                Kept(*row)
                for node in nodes
                for row in db.execute(
                    f"DELETE FROM kept WHERE node = ? RETURNING {_KEPT}", (node,)
                ).fetchall()
            ]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._db:
            self._db.execute("BEGIN EXCLUSIVE")
            yield self._db


def keepable(
    idle: Iterable[VM],
    keep: Keep,
    billing: Billing,
    cluster: Cluster,
    job_name: str,
    now: float,
) -> list[VM]:
    """Of the idle VMs of a run that ends now those that can be of use to the next one, with the date until
    which they stay: Slurm uses their nodes, nobody else does. ClusterUnavailable: nothing is known of
    them."""
    lasting = [(vm, math.floor(keep.left(billing, vm.uptime(now)))) for vm in idle]
    lasting = [(vm, seconds) for vm, seconds in lasting if seconds > NEARLY_OVER]
    if not lasting:
        return []
    foreign, nodes = cluster.foreign_jobs(job_name), cluster.view(job_name).nodes
    found = []
    for vm, seconds in lasting:
        node = nodes.get(vm.name)
        if node is not None and node.accepts_jobs and vm.name not in foreign:
            vm.kept_until = now + seconds
            found.append(vm)
    return found


def promise(
    shelf: Shelf, cluster: Cluster, vms: Sequence[VM], run: str, now: float, held: float
) -> None:
    """Tells VMs that are on the shelf how long they stay, and then whoever comes. Those to which that cannot
    be told stay as long as they are `held` by their last lease, or have ended before anybody takes them."""
    for until in {vm.kept_until for vm in vms if vm.kept_until is not None}:
        alike = [vm for vm in vms if vm.kept_until == until]
        try:
            lease = Lease(run, math.floor(until - now), math.floor(now), kept=True)
            cluster.renew([vm.name for vm in alike], lease)
        except ClusterUnavailable:
            for vm in alike:
                vm.kept_until = max(now, min(until, held))
    shelf.promise({vm.name: vm.kept_until for vm in vms if vm.kept_until is not None})


def collected(
    shelf: Shelf,
    known: Collection[str],
    wanted: Counter[Wanted],
    room: int,
    types: Iterable[InstanceType],
    cloud: Cloud,
    cluster: Cluster,
    job_name: str,
    now: float,
) -> list[VM]:
    """Takes at most `room` VMs that are of use, and none of a name that is `known`, for a run that has given
    a VM away does not have it twice. One that lives, and that Slurm does not use any more, comes as one that
    is to be ended; one on which something runs is left alone. CloudUnavailable, ClusterUnavailable and
    sqlite3.Error: nothing was taken."""
    offered = [kept for kept in shelf.offered(now) if kept.node not in known]
    if not offered:
        return []
    instances = {i.id: i for i in cloud.instances(*sorted({kept.origin for kept in offered}))}
    nodes = cluster.view(job_name).nodes
    gone, broken, good = _judged(offered, instances, nodes)
    kinds = {kind.name: kind for kind in types}
    broken = [kept for kept in broken if kept.type in kinds]
    strategies = _strategies(good, wanted, room)
    mine = shelf.take([*(kept.node for kept in (*gone, *broken)), *strategies])
    ending = {kept.node for kept in broken}
    return [
        kept.as_vm(kinds[kept.type], kept.strategy, VMState.TERMINATING, now)
        if kept.node in ending
        else kept.as_vm(kinds[kept.type], strategies[kept.node], VMState.READY, now)
        for kept in mine
        if kept.node in strategies or kept.node in ending
    ]


def _judged(
    offered: Sequence[Kept],
    instances: Mapping[str, Instance],
    nodes: Mapping[str, NodeStatus],
) -> tuple[list[Kept], list[Kept], list[Kept]]:
    """Those that have ended, those that live to no use, and those that can be used; the rest is in use by
    somebody else."""
    gone, broken, good = [], [], []
    for kept in offered:
        instance, node = instances.get(kept.instance_id), nodes.get(kept.node)
        if instance is None or not instance.is_alive:
            gone.append(kept)
        elif node is None or node.is_drained or (node.state == "idle" and not node.responding):
            broken.append(kept)
        elif node.state == "idle":
            good.append(kept)
    return gone, broken, good


def _strategies(good: Sequence[Kept], wanted: Counter[Wanted], room: int) -> dict[str, str]:
    """The nodes that are of use, each with the strategy that will look for it: the one it had, if that does,
    else the one that looks for most."""
    left, found = Counter(wanted), dict[str, str]()
    for kept in good:
        takers = [w for w in left if (w.type, w.market) == (kept.type, kept.market) and left[w] > 0]
        if takers and len(found) < room:
            taker = max(takers, key=lambda w: (w.strategy == kept.strategy, left[w]))
            left[taker] -= 1
            found[kept.node] = taker.strategy
    return found
