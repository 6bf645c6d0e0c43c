"""What goes wrong in a cloud every day, as data, and the dice that decide when it does.

Nothing here knows of a server or a clock: times are passed in. The same seed and the same order of
questions of one kind give the same answers, whatever is asked of the other kinds in between.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from snakemake_executor_plugin_schlouder.localcloud.policy import Policy

ON_DEMAND, SPOT = "on-demand", "spot"
MARKETS = (ON_DEMAND, SPOT)


class FaultError(ValueError):
    """One line: which field of Faults is wrong, what it holds, what is allowed."""


@dataclass(frozen=True)
class Throttle:
    """RequestLimitExceeded in bursts: `share` of the EC2 calls in the first `seconds` of every `period`
    seconds.

    `actions` are names or patterns of EC2 actions; EC2 has one bucket of tokens per action and account (EC2
    API reference, Request throttling).
    """

    share: float = 0.0
    period: float = 30.0
    seconds: float = 5.0
    actions: Sequence[str] = ("*",)


@dataclass(frozen=True)
class Reclaims:
    """`share` of the spot VMs is reclaimed: between `after[0]` and `after[1]` seconds after it runs it gets
    a notice, and `notice` seconds later it is gone (EC2 user guide, Spot Instance interruption notices:
    120)."""

    share: float = 0.0
    after: tuple[float, float] = (0.0, 3600.0)
    notice: float = 120.0


@dataclass(frozen=True)
class Faults:
    """All faults of a cloud; `Faults()` has none. Seconds are real ones. Documents are IAM policies.

    - `capacity`: "type/zone/market" → how many instances can still be had of that pool. Each part may be a
      pattern (`*`); `market` is on-demand or spot. Every instance counts once in every pool it is part of,
      and is not given back. What is not named has no limit.
    - `throttle`: see `Throttle`.
    - `lost_replies`: probability that a RunInstances is carried out and the connection then closed.
    - `never_join`: probability that a VM boots and bills, but never runs its user data.
    - `clock_off`: seconds that the clock of a new VM is fast (negative: slow). EC2 sets the clocks only of
      machines that ask its time service (EC2 user guide, Amazon Time Sync Service). Needs libfaketime.
    - `describe_lag`: how long a new instance is unknown to every other call (EC2 API reference, Eventual
      consistency).
    - `reclaim`: see `Reclaims`.
    - `away`: nobody answers; every connection of the services is closed.
    - `not_found`: probability that a call of DescribeInstances or TerminateInstances knows no instance at all
      (EC2 API reference, Eventual consistency: InvalidInstanceID.NotFound for an instance that exists).
    - `slow_end`: seconds that a machine goes on when EC2 calls it shutting-down (EC2 user guide, Terminate:
      it runs its shutdown scripts, and may take a few minutes).
    - `vcpu_quota`: market → vCPUs that may be pending or running (EC2 user guide, Amazon EC2 service quotas).
    - `policy`: what ordinary callers may do; `vm_policy`: what a VM's temporary credentials may do.
      None: everything.
    - `missing`: actions this cloud does not know ("DescribeInstanceTypes", "*LaunchTemplate*",
      "pricing:*"), as on EC2-like clouds, and `missing_code`, what it then says: InvalidAction (EC2's own)
      or InvalidRequest (OpenStack's ec2-api, `ec2api/api/apirequest.py`).
    - `no_tags_on_create`: RunInstances knows no TagSpecifications, as EC2 itself did not before 2017; and
      `unknown_parameters`, others that it does not know, such as MetadataOptions. EC2-like clouds differ
      here, and some ignore what they do not know; this one answers UnknownParameter (EC2 API reference,
      Common client error codes).
    """

    seed: int = 0
    capacity: Mapping[str, int] = field(default_factory=dict)
    throttle: Throttle = Throttle()
    lost_replies: float = 0.0
    never_join: float = 0.0
    clock_off: float = 0.0
    describe_lag: float = 0.0
    reclaim: Reclaims = Reclaims()
    away: bool = False
    not_found: float = 0.0
    slow_end: float = 0.0
    vcpu_quota: Mapping[str, int] = field(default_factory=dict)
    policy: Mapping[str, Any] | None = None
    vm_policy: Mapping[str, Any] | None = None
    missing: Sequence[str] = ()
    missing_code: str = "InvalidAction"
    no_tags_on_create: bool = False
    unknown_parameters: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, share in {
            "throttle.share": self.throttle.share,
            "lost_replies": self.lost_replies,
            "never_join": self.never_join,
            "not_found": self.not_found,
            "reclaim.share": self.reclaim.share,
        }.items():
            _require(0 <= share <= 1, name, share, "a probability from 0 to 1")
        for name, seconds in {
            "throttle.seconds": self.throttle.seconds,
            "describe_lag": self.describe_lag,
            "slow_end": self.slow_end,
            "reclaim.notice": self.reclaim.notice,
        }.items():
            _require(0 <= seconds < math.inf, name, seconds, "a number of seconds, 0 or more")
        _require(math.isfinite(self.clock_off), "clock_off", self.clock_off, "a number of seconds")
        _require(self.throttle.period > 0, "throttle.period", self.throttle.period, "above 0")
        low, high = self.reclaim.after
        _require(0 <= low <= high < math.inf, "reclaim.after", (low, high), "(LOW, HIGH) seconds")
        for pool, left in self.capacity.items():
            parts = pool.split("/")
            known = len(parts) == 3 and (parts[2] in MARKETS or "*" in parts[2])
            _require(known, "capacity", pool, "type/zone/market, as in c5.*/*/spot")
            _require(left >= 0, f"capacity[{pool!r}]", left, "0 or more")
        for market in self.vcpu_quota:
            _require(market in MARKETS, "vcpu_quota", market, "on-demand or spot")
        codes = ("InvalidAction", "InvalidRequest")
        _require(self.missing_code in codes, "missing_code", self.missing_code, " or ".join(codes))
        for document in (self.policy, self.vm_policy):
            if document is not None:
                Policy.parse(document)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Faults:
        values = json.loads(text)
        throttle = Throttle(**_with_tuples(values.pop("throttle", {})))
        reclaim = Reclaims(**_with_tuples(values.pop("reclaim", {})))
        return cls(**_with_tuples(values), throttle=throttle, reclaim=reclaim)


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {key: tuple(one) if isinstance(one, list) else one for key, one in values.items()}


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise FaultError(f"Faults.{name} is {value!r}: allowed is {allowed}")


@dataclass(frozen=True)
class Fate:
    """What was decided about one instance when it was launched. `reclaimed_after`: seconds after it runs."""

    joins: bool = True
    reclaimed_after: float | None = None


class Injector:
    """The state of the faults: what is left of each pool, and one die per kind of fault.

    `struck`: how often each kind has happened, by its field of Faults; a lack of capacity and reclaims are
    counted by those who see them.
    """

    def __init__(self, faults: Faults, now: float) -> None:
        self.faults = faults
        self.struck: Counter[str] = Counter()
        self.policy = None if faults.policy is None else Policy.parse(faults.policy)
        self.vm_policy = None if faults.vm_policy is None else Policy.parse(faults.vm_policy)
        self._start = now
        self._left = dict(faults.capacity)
        self._dice: dict[str, random.Random] = {}

    def throttles(self, action: str, now: float) -> bool:
        throttle = self.faults.throttle
        if not any(fnmatchcase(action, pattern) for pattern in throttle.actions):
            return False
        in_burst = (now - self._start) % throttle.period < throttle.seconds
        return in_burst and self._happens("throttle", throttle.share)

    def loses_reply(self) -> bool:
        return self._happens("lost_replies", self.faults.lost_replies)

    def knows_nothing(self) -> bool:
        return self._happens("not_found", self.faults.not_found)

    def lacks(self, service: str, action: str) -> bool:
        """Whether this cloud does not know the action; patterns without a service are of EC2's."""
        patterns = [name if ":" in name else f"ec2:{name}" for name in self.faults.missing]
        return any(fnmatchcase(f"{service}:{action}", pattern) for pattern in patterns)

    def fate(self, market: str) -> Fate:
        joins = not self._happens("never_join", self.faults.never_join)
        reclaim = self.faults.reclaim
        if market != SPOT or not self._is_drawn("reclaim", reclaim.share):
            return Fate(joins)
        return Fate(joins, self._die("reclaim after").uniform(*reclaim.after))

    def left(self, instance_type: str, zone: str, market: str) -> int | None:
        """How many instances of this pool can still be had; None without a limit."""
        limits = [self._left[pool] for pool in self._pools(instance_type, zone, market)]
        return min(limits, default=None)

    def take(self, instance_type: str, zone: str, market: str, count: int) -> None:
        for pool in self._pools(instance_type, zone, market):
            self._left[pool] -= count

    def _pools(self, instance_type: str, zone: str, market: str) -> list[str]:
        wanted = f"{instance_type}/{zone}/{market}"
        return [pool for pool in self._left if fnmatchcase(wanted, pool)]

    def _happens(self, kind: str, share: float) -> bool:
        happens = self._is_drawn(kind, share)
        self.struck[kind] += happens
        return happens

    def _is_drawn(self, kind: str, share: float) -> bool:
        return share > 0 and self._die(kind).random() < share

    def _die(self, kind: str) -> random.Random:
        return self._dice.setdefault(kind, random.Random(f"{self.faults.seed} {kind}"))


def fulfilled(left: int | None, least: int, most: int) -> int:
    """How many of `least` to `most` instances EC2 starts when a pool has `left`; 0 when it starts none.

    EC2 API reference, RunInstances: it starts the largest possible number of instances above MinCount, and
    none when it cannot start MinCount.
    """
    count = most if left is None else min(most, left)
    return count if count >= least else 0


def best_zone(
    zones: Sequence[str], left: Callable[[str], int | None], least: int, most: int
) -> tuple[str, int]:
    """The zone in which most instances can start, the first of equals, and how many; 0 if none can."""
    counts = [fulfilled(left(zone), least, most) for zone in zones]
    most_started = max(counts)
    return zones[counts.index(most_started)], most_started
