"""Any history of a run, as rules of a hypothesis state machine: the real broker, launcher and journal between
fakes in virtual time. What must hold whatever happens, I1 to I7, is looked at after every second.

`python tests/machine.py SEED COUNT` plays so many histories and prints, as JSON, what they were made of and
the shortest one that breaks a promise.
"""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import hypothesis
from fakes import FakeCloud, FakeSlurm, Machine, SlurmJob, World
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as values
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from snakemake_executor_plugin_schlouder import strategies
from snakemake_executor_plugin_schlouder.broker import Broker, BrokerConfig
from snakemake_executor_plugin_schlouder.clock import SteadyClock
from snakemake_executor_plugin_schlouder.journal import Journal, RunRecord
from snakemake_executor_plugin_schlouder.launcher import Limits
from snakemake_executor_plugin_schlouder.market.tariff import Tariff
from snakemake_executor_plugin_schlouder.model import (
    NEVER,
    ON_DEMAND,
    ONLY,
    PREFER,
    SPOT,
    VM,
    Billing,
    InstanceType,
    Need,
    Task,
    TaskState,
)
from snakemake_executor_plugin_schlouder.pool import Announcement
from snakemake_executor_plugin_schlouder.provision import (
    CloudUnavailable,
    Instance,
    LaunchOutcome,
    LaunchRequest,
)
from snakemake_executor_plugin_schlouder.slurm import (
    ClusterUnavailable,
    JobRequest,
    SubmitOutcome,
)
from snakemake_executor_plugin_schlouder.slurm.script import has_begun

RUN = "r1"
TYPES = (
    InstanceType("m5.large", 2, 8192),
    InstanceType("c5.xlarge", 4, 8192),
    InstanceType("m5.4xlarge", 16, 65536),
)
ZONES = ("a", "b")
PRICES = {"m5.large": 0.096, "c5.xlarge": 0.17, "m5.4xlarge": 0.768}
BOOT_TIMEOUT = 100.0
LEASE = 600.0
QUIET = 120.0
"""Seconds for which EC2 may not list a machine: what was launched without a reply may appear so late."""

SLACK = 300.0
"""Seconds that a machine may stay idle beyond what its boot and its unit explain (I6)."""

MOST = 24
"""Tasks of one history, about."""

STEPS = 25
LONGEST = 4 * 3600.0
EFFECTS = ("terminate", "cancel", "cancel_run", "drain", "fail", "delete", "renew", "write")
ENDINGS = ("complete", "complete", "stop", "release", "abandoned")

TALLY: Counter[str] = Counter()
"""What all histories of this process were made of."""


class Killed(BaseException):
    """SIGKILL: nothing catches it."""


class Violation(AssertionError):
    """Begins with the invariant that does not hold."""


@dataclass(frozen=True)
class Work:
    """What the workflow wants done, whatever becomes of the process that asks for it."""

    identity: str
    content: str
    command: str
    strategy: str
    need: Need
    spot: str
    may_bundle: bool
    planned: float


class Fuse:
    """Ends the process at one of its effects: `left` more moments, of which each effect has one before and
    one after; below 0: never."""

    left = -1

    def passes(self) -> None:
        if self.left == 0:
            self.left = -1
            raise Killed
        self.left -= self.left > 0


class Fused:
    """A port, or the journal, every effect of which may be the last thing that the process does."""

    def __init__(self, real: Any, fuse: Fuse) -> None:
        self._real = real
        self._fuse = fuse

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._real, name)
        if name not in EFFECTS:
            return call

        def effect(*arguments: Any, **more: Any) -> Any:
            self._fuse.passes()
            result = call(*arguments, **more)
            self._fuse.passes()
            return result

        return effect

    def launch(self, requests: Sequence[LaunchRequest]) -> list[LaunchOutcome]:
        """A call of EC2 for each batch, as `Ec2Cloud` makes them."""
        outcomes: dict[str, LaunchOutcome] = {}
        for token in dict.fromkeys(request.token for request in requests):
            batch = [request for request in requests if request.token == token]
            self._fuse.passes()
            found = self._real.launch(batch)
            outcomes.update({r.node: o for r, o in zip(batch, found, strict=True)})
            self._fuse.passes()
        return [outcomes[request.node] for request in requests]

    def submit(self, jobs: Sequence[JobRequest]) -> list[SubmitOutcome]:
        """An sbatch for each job."""
        outcomes: list[SubmitOutcome] = []
        for job in jobs:
            self._fuse.passes()
            outcomes += self._real.submit([job])
            self._fuse.passes()
            if isinstance(outcomes[-1], ClusterUnavailable):
                break
        return outcomes


class Recorded:
    """A port, or the journal, to which nothing is done: what a process decides, without any effect (I7)."""

    def __init__(self, real: Any, seen: list[str]) -> None:
        self._real = real
        self._seen = seen

    def __getattr__(self, name: str) -> Any:
        if name not in EFFECTS:
            return getattr(self._real, name)

        def effect(*arguments: Any, **more: Any) -> None:
            told = [_plain(one) for one in (*arguments, *more.values())]
            self._seen.append(f"{name} {told}")
            if name == "terminate":
                raise CloudUnavailable("not done")
            if name != "write":
                raise ClusterUnavailable("not done")

        return effect

    def launch(self, requests: Sequence[LaunchRequest]) -> list[LaunchOutcome]:
        self._seen.append(f"launch {requests}")
        return [CloudUnavailable("not done") for _ in requests]

    def submit(self, jobs: Sequence[JobRequest]) -> list[SubmitOutcome]:
        self._seen.append(f"submit {[(job.key, job.nodes) for job in jobs]}")
        return []


def _plain(value: object) -> object:
    """What tells two decisions apart."""
    if isinstance(value, VM):
        return value.name, value.state, value.instance_id, value.token
    if isinstance(value, Task):
        return value.key, value.state, value.vm, value.attempt, value.recalled
    if isinstance(value, str) or not isinstance(value, Iterable):
        return repr(value)
    return [_plain(one) for one in value]


class Cloud(FakeCloud):
    """Asks `may_end` before it ends a machine, and tells `has_started` of every new one."""

    def __init__(self, world: World, history: History) -> None:
        super().__init__(world)
        self.allow_kill = True
        self.history = history

    def _end(self, machine: Machine) -> None:
        self.history.may_end(machine)
        super()._end(machine)

    def _start(self, request: LaunchRequest) -> Instance:
        self.history.may_start(request)
        return super()._start(request)


class Slurm(FakeSlurm):
    """Asks `may_stop` before it stops a job."""

    def __init__(self, world: World, history: History) -> None:
        super().__init__(world)
        self.history = history

    def cancel(self, jobs: Mapping[str, str]) -> None:
        if not self.away:
            for job in self.world.jobs.values():
                if job.slurm_id in jobs:
                    self.history.may_stop(job)
        super().cancel(jobs)

    def fail(self, node: str, reason: str) -> None:
        if not self.away:
            for job in self.world.running_on(node):
                self.history.may_stop(job)
        super().fail(node, reason)


class Disk(Journal):
    """A journal on a disk that may be full."""

    is_full = False

    def write(self, run: str, *rows: Any, **more: Any) -> None:
        if self.is_full:
            raise sqlite3.OperationalError("database or disk is full")
        super().write(run, *rows, **more)


COUNTS = values.integers(1, 4)
INDEX = values.integers(0, 7)
SECONDS = values.sampled_from((5, 20, 60, 200))


class History(RuleBasedStateMachine):
    """One run, with everything that may happen to it.

    `cloud_of`, `slurm_of` and `journal_of` make what the broker stands between; a test that plants a bug
    makes others.
    """

    cloud_of: ClassVar[type[Cloud]] = Cloud
    slurm_is_true = False
    slurm_of: ClassVar[type[Slurm]] = Slurm
    journal_of: ClassVar[type[Disk]] = Disk

    def __init__(self) -> None:
        super().__init__()
        TALLY["histories"] += 1
        self.directory = Path(tempfile.mkdtemp(prefix="history-"))
        self.broker: Broker | None = None
        self.is_over = False
        self.works: dict[str, Work] = {}
        self.reported: dict[str, Task] = {}
        self.waiting: dict[str, str] = {}
        self.made = 0
        self.maker: dict[str, tuple[str, str]] = {}
        self.struck: set[str] = set()
        self.excused: set[str] = set()
        self.tokens: dict[str, str] = {}
        self.idle: dict[str, float] = {}
        self.heals: list[tuple[float, Callable[[], None]]] = []
        self.restart_at = 0.0
        self.away = 0.0
        self.changes = False
        self.skew = 0.0
        self.is_releasing = False
        self.has_quiet = 0.0

    @initialize(
        cap=values.integers(1, 6),
        unit=values.sampled_from((1.0, 60.0, 600.0)),
        boot=values.sampled_from((8.0, 30.0)),
        end_time=values.sampled_from((0.0, 30.0)),
        booting=values.sampled_from((1_000_000, 2)),
        types=values.sampled_from((TYPES, TYPES[:2], TYPES[2:], TYPES[:1])),
        strategies=values.lists(values.sampled_from(strategies.known()), min_size=1, max_size=2),
        asks_seldom=values.booleans(),
        ending=values.sampled_from(ENDINGS),
        first=values.integers(1, 8),
        pace=values.sampled_from((1.0, 5.0, 15.0)),
        effects=values.integers(-1, 20),
    )
    def begin(
        self,
        cap: int,
        unit: float,
        boot: float,
        end_time: float,
        booting: int,
        types: Sequence[InstanceType],
        strategies: list[str],
        asks_seldom: bool,
        ending: str,
        first: int,
        pace: float,
        effects: int,
    ) -> None:
        """Begins with some work: a history of nothing shows nothing. `pace`: seconds between two events,
        `effects`: moments after which the process is killed for the first time."""
        self.strategies, self.ending, self.pace = strategies, ending, pace
        self.world = World(
            boot_time=boot,
            end_time=end_time,
            notices=60.0,
            first_lease=BOOT_TIMEOUT + LEASE,
        )
        self.fuse = Fuse()
        self.cloud = self.cloud_of(self.world, self)
        self.slurm = self.slurm_of(self.world, self)
        self.journal = self.journal_of(":memory:")
        names = [kind.name for kind in types]
        self.config = BrokerConfig(
            run=RUN,
            workdir=self.directory,
            partition="schlouder",
            types=tuple(types),
            max_vms=cap,
            billing=Billing(unit, 60.0),
            boot_timeout=BOOT_TIMEOUT,
            tariff=Tariff(PRICES, {(n, z): PRICES[n] / 3 for n in names for z in ZONES}, "test"),
            zones=dict.fromkeys(names, ZONES),
            limits=Limits(max_booting=booting),
            asks_seldom=asks_seldom,
            lease=LEASE,
            slurm_is_true=self.slurm_is_true,
        )
        self.config.files.mkdir(parents=True)
        record = RunRecord(RUN, str(self.directory), "h", 1, "r", "e", "s", 0.0)
        self.journal.begin_run(record)
        self.broker = self._make_broker()
        self.fuse.left = effects
        self._give(first, Need(1, 1000), 60, NEVER, may_bundle=False)

    # -- the process

    def _clock(self) -> float:
        return self.world.now + self.skew

    def _make_broker(self) -> Broker:
        return Broker(
            self.config,
            Fused(self.cloud, self.fuse),
            Fused(self.slurm, self.fuse),
            Fused(self.journal, self.fuse),
            logging.getLogger("history"),
            clock=SteadyClock(self._clock, lambda: self.world.now),
            sleep=self._sleep,
        )

    def _sleep(self, seconds: float) -> None:
        self.world.pass_time(seconds)
        self._look()

    def _within(self, action: Callable[[Broker], None]) -> None:
        """Does it, if the process lives, which may end in the course of it."""
        if self.broker is None:
            return
        try:
            action(self.broker)
        except Killed:
            self._die()

    def _die(self) -> None:
        TALLY["kills"] += 1
        self.broker = None
        self.restart_at = self.world.now + self.away
        if self.changes:
            for name, work in self.works.items():
                if name not in self.reported:
                    self.works[name] = replace(work, content=f"{work.content}x")

    def _take_over(self) -> None:
        first, second = self._decisions(), self._decisions()
        if first != second:
            self._violates(
                "I7", f"it decides otherwise when it is started again: {first}, {second}"
            )
        self.broker = self._make_broker()
        self._within(self._adopt)

    def _adopt(self, broker: Broker) -> None:
        left = self.journal.remains(RUN, {kind.name: kind for kind in TYPES})
        self.made = left.task_count
        self.waiting.clear()
        todo = [work for name, work in self.works.items() if name not in self.reported]
        broker.expect(
            [Announcement(w.strategy, "rule", w.need, w.planned, w.spot) for w in todo],
        )
        broker.adopt(left)
        self._hand_over(broker, todo)

    def _decisions(self) -> list[str]:
        """What a process that is started now would do, without its doing it."""
        seen: list[str] = []
        made, waiting, maker, struck = (
            self.made,
            dict(self.waiting),
            dict(self.maker),
            set(self.struck),
        )
        broker = Broker(
            self.config,
            Recorded(self.cloud, seen),
            Recorded(self.slurm, seen),
            Recorded(self.journal, seen),
            logging.getLogger("history"),
            clock=SteadyClock(self._clock, lambda: self.world.now),
            sleep=self._sleep,
            revoke=has_begun,
        )
        coming = Counter(self.cloud.coming)
        self._adopt(broker)
        seen += [f"reports {task.key} {task.state}" for task in broker.tick()]
        self.cloud.coming = coming
        self.made, self.waiting, self.maker, self.struck = made, waiting, maker, struck
        return seen

    def _hand_over(self, broker: Broker, works: Sequence[Work]) -> None:
        new = []
        for work in works:
            self.made += 1
            task = self._task_of(work)
            self.maker[task.key] = work.identity, work.content
            is_made = work.identity in {self.maker[key][0] for key in self.world.done}
            live = broker.claim(task, 0.0, is_made)
            self.waiting[task.key if live is None else live.key] = work.identity
            if live is None:
                new.append(task)
                self._excuse_replaced(work)
        broker.submit(new)

    def _excuse_replaced(self, work: Work) -> None:
        """Another attempt at what is to be done in another way now may be stopped."""
        self.excused |= {
            key for key, (identity, _) in self.maker.items() if identity == work.identity
        }

    def _task_of(self, work: Work) -> Task:
        return Task(
            key=f"{RUN}-{self.made}",
            name=f"task{self.made}",
            rule="rule",
            jobid=str(self.made),
            strategy=work.strategy,
            need=work.need,
            command=work.command,
            spot=work.spot,
            may_bundle=work.may_bundle,
            planned=work.planned,
            identity=work.identity,
            content=work.content,
        )

    # -- time

    def _second(self, seconds: float = 1.0) -> None:
        if self.broker is None and self.world.now >= self.restart_at:
            self._take_over()
        self._within(self._tick)
        self.world.pass_time(seconds)
        self.slurm.deliver()
        self._heal([entry for entry in self.heals if entry[0] <= self.world.now])
        self._look()
        self._count_idle(seconds)

    def _wait(self, seconds: float) -> None:
        end = self.world.now + seconds
        while self.world.now < end:
            self._second(1.0 if end - self.world.now <= 40 else 4.0)

    def _heal(self, due: Sequence[tuple[float, Callable[[], None]]]) -> None:
        for entry in due:
            self.heals.remove(entry)
            entry[1]()

    def _until(self, seconds: float, heal: Callable[[], None]) -> None:
        self.heals.append((self.world.now + seconds, heal))

    def _tick(self, broker: Broker) -> None:
        for task in broker.tick():
            self._report(task)

    # -- what must hold

    def _violates(self, invariant: str, what: str) -> None:
        self.is_over = True
        raise Violation(f"{invariant}: {what} (at {self.world.now - 1000:.0f} s)")

    def may_start(self, request: LaunchRequest) -> None:
        """I2: a machine is started once for every name, and only after the journal has heard of it."""
        TALLY["launches"] += 1
        known = {vm.name for vm in self.journal.vms(RUN)}
        if request.node not in known:
            self._violates("I1", f"{request.node} is launched before the journal knows of it")
        if request.node in self.tokens:
            self._violates("I2", f"{request.node} is launched twice")
        self.tokens[request.node] = request.token

    def may_end(self, machine: Machine) -> None:
        """I3 and I4: no job loses its machine, but by one of these policies: the run is ended, the machine is
        struck by what gives it up (lost, drained, taken back), or belongs to a gang with such a one."""
        node = machine.instance.node
        guests = self.slurm.foreign.get(node)
        slurm_tells = not self.slurm.away
        if guests and machine.instance.is_alive and slurm_tells and node not in self.struck:
            self._violates("I3", f"{node} is ended with jobs of others: {guests}")
        for job in self.world.jobs.values():
            if node in job.request.nodes:
                self.may_stop(job)

    def may_stop(self, job: SlurmJob) -> None:
        writing = self.world.writing(job)
        if not writing or self.is_releasing or self.struck.intersection(job.request.nodes):
            return
        if self.excused.issuperset(writing) or job.request.key in self.excused:
            return
        self._violates("I4", f"job {job.request.key} of {writing} is stopped for no reason")

    def _report(self, task: Task) -> None:
        """I5: once, and complete only when its work was done."""
        TALLY[task.state] += 1
        identity = self.waiting.pop(task.key, None)
        if identity is None or identity in self.reported:
            self._violates("I5", f"{task.key} is reported twice")
            return
        self.reported[identity] = task
        work = self.works[identity]
        done = {self.maker.get(key) for key in self.world.done}
        if task.state == TaskState.COMPLETE and (identity, work.content) not in done:
            self._violates("I5", f"{task.key} is reported complete, and was not done")

    def _look(self) -> None:
        machines = [m for m in self.world.machines.values() if m.instance.is_alive]
        for machine in machines:
            if machine.instance.run != RUN:
                self._violates("I1", f"{machine.instance.id} has no tag by which it could be found")
        if len(machines) > self.config.max_vms:
            self._violates("I2", f"{len(machines)} VMs, of {self.config.max_vms} allowed")
        if self.cloud.touched or self.slurm.touched:
            touched = [*self.cloud.touched, *self.slurm.touched]
            self._violates("I3", f"{touched} of somebody else was to be ended")
        writing = Counter(
            self.maker[task][0]
            for job in self.world.jobs.values()
            for task in self.world.writing(job)
        )
        twice = [identity for identity, count in writing.items() if count > 1]
        if twice:
            self._violates("I5", f"two attempts at {twice} write at a time")

    def _count_idle(self, seconds: float) -> None:
        """I6: a machine that does nothing costs its boot, its unit and no more than that."""
        billing = self.config.billing
        most = max(billing.unit, billing.minimum) + BOOT_TIMEOUT + SLACK
        is_fault = self.broker is None or self.heals or self.world.now < self.has_quiet
        for id, machine in self.world.machines.items():
            node = machine.instance.node
            is_used = bool(self.world.running_on(node)) or node in self.slurm.foreign
            if is_fault or is_used or not machine.instance.is_alive:
                self.idle.pop(id, None)
                continue
            self.idle[id] = self.idle.get(id, 0.0) + seconds
            if self.idle[id] > most:
                self._violates("I6", f"{node} does nothing for {self.idle[id]:.0f} s")

    # -- rules: what the user and the process do

    @rule(
        count=values.integers(1, 6),
        which=values.integers(0, 1),
        seconds=values.sampled_from((3, 20, 90, 300)),
        cpus=values.sampled_from((1, 1, 2, 4)),
        nodes=values.sampled_from((1, 1, 1, 1, 2, 3)),
        spot=values.sampled_from((NEVER, NEVER, PREFER, ONLY)),
        may_bundle=values.booleans(),
        code=values.sampled_from((0, 0, 0, 0, 1)),
    )
    def give(
        self,
        count: int,
        which: int,
        seconds: int,
        cpus: int,
        nodes: int,
        spot: str,
        may_bundle: bool,
        code: int,
    ) -> None:
        if len(self.works) < MOST:
            need = Need(cpus, 1000, nodes=min(nodes, self.config.max_vms))
            self._give(count, need, seconds, spot, may_bundle, code, which)

    def _give(
        self,
        count: int,
        need: Need,
        seconds: int,
        spot: str,
        may_bundle: bool,
        code: int = 0,
        which: int = 0,
    ) -> None:
        strategy = self.strategies[which % len(self.strategies)]
        command = f"run {seconds} {code}"
        names = [f"t{len(self.works) + at}" for at in range(count)]
        made = [
            Work(name, "", command, strategy, need, spot, may_bundle, float(seconds))
            for name in names
        ]
        self.works.update(zip(names, made, strict=True))
        TALLY["tasks"] += count
        self._within(lambda broker: self._hand_over(broker, made))
        self._wait(self.pace)

    @rule(seconds=values.sampled_from((3, 15, 40, 120)))
    def wait(self, seconds: int) -> None:
        self._wait(seconds)

    @rule(
        effects=values.integers(0, 14),
        away=values.sampled_from((0, 3, 30, 200)),
        changed=values.sampled_from((False, False, False, True)),
    )
    def kill(self, effects: int, away: int, changed: bool) -> None:
        """At so manieth moment of an effect from now; it is started again `away` seconds later, perhaps with
        another version of what it does."""
        self.fuse.left, self.away, self.changes = effects, float(away), changed
        self._wait(self.pace)

    @rule(away=values.sampled_from((0, 3, 30, 200)), changed=values.sampled_from((False, True)))
    def kill_between_effects(self, away: int, changed: bool) -> None:
        self.away, self.changes = float(away), changed
        if self.broker is not None:
            self._die()
        self._wait(self.pace)

    @rule(step=values.sampled_from((-300.0, -30.0, 30.0, 300.0)))
    def step_clock(self, step: float) -> None:
        self.skew += step
        self._wait(self.pace)

    @rule(seconds=SECONDS)
    def fill_disk(self, seconds: int) -> None:
        self.journal.is_full = True
        self._until(seconds, lambda: setattr(self.journal, "is_full", False))
        self._wait(self.pace)

    # -- rules: what EC2 does

    @rule(
        what=values.sampled_from(
            (
                "launch lost",
                "terminate lost",
                "terminate idle",
                "throttle",
                "partial",
                "hang",
                "unfit",
            )
        ),
        count=COUNTS,
    )
    def spoil(self, what: str, count: int) -> None:
        """What happens to the next calls or machines (`FakeCloud.coming`)."""
        self.cloud.coming[what] += count
        if what == "terminate idle":
            self.has_quiet = self.world.now + 1000
        self._until(120, lambda: self.cloud.coming.clear())
        self._wait(self.pace)

    @rule(lag=values.sampled_from((10.0, 60.0)))
    def lag(self, lag: float) -> None:
        """New machines are not listed for so long, during two minutes."""
        self.cloud.lag = lag
        self.has_quiet = self.world.now + 2 * QUIET
        self._until(120, lambda: setattr(self.cloud, "lag", 0.0))
        self._wait(self.pace)

    @rule(index=INDEX, seconds=values.sampled_from((5, 20, 60)))
    def hide(self, index: int, seconds: int) -> None:
        """A machine that lives is not listed, for no longer than EC2 lags, and then it is for as long."""
        machine = self._some_machine(index)
        if machine is None:
            return
        if self.cloud.hidden.get(machine.instance.id, 0.0) + 60 <= self.world.now:
            self.cloud.hidden[machine.instance.id] = self.world.now + seconds
            self._wait(self.pace)

    @rule(seconds=SECONDS)
    def cloud_away(self, seconds: int) -> None:
        self.cloud.away = True
        self._until(seconds, lambda: setattr(self.cloud, "away", False))
        self._wait(self.pace)

    @rule(index=INDEX, seconds=SECONDS)
    def no_capacity(self, index: int, seconds: int) -> None:
        """In some of the pools, or in all."""
        pools = [
            (kind.name, zone, market)
            for kind in self.config.types
            for zone in ZONES
            for market in (ON_DEMAND, SPOT)
        ]
        self.cloud.out |= {
            pool for at, pool in enumerate(pools) if index == 7 or at % 3 == index % 3
        }
        self._until(seconds, lambda: self.cloud.out.clear())
        self._wait(self.pace)

    @rule(cpus=values.sampled_from((0, 4, 16)), seconds=SECONDS)
    def quota(self, cpus: int, seconds: int) -> None:
        self.cloud.quota = {ON_DEMAND: cpus, SPOT: cpus}
        self._until(seconds, lambda: self.cloud.quota.clear())
        self._wait(self.pace)

    @rule(index=INDEX)
    def lose_machine(self, index: int) -> None:
        """It fails, or somebody ends it by hand; Slurm notices a minute later."""
        machine = self._some_machine(index)
        if machine is not None:
            self.struck.add(machine.instance.node)
            self.world.kill_machine(machine.instance.node, "Server.InternalError")
            self._wait(self.pace)

    @rule(index=INDEX, notice=values.sampled_from((0, 5, 120)), told=values.booleans())
    def reclaim(self, index: int, notice: int, told: bool) -> None:
        machine = self._some_machine(index, SPOT)
        if machine is None:
            return
        node = machine.instance.node
        self.struck.add(node)
        end = self.world.now + notice
        if told and self.world.nodes.get(node) in ("idle", "mixed", "allocated"):
            date = datetime.fromtimestamp(end + self.skew, UTC)
            self.slurm.reasons[node] = f"schlouder: spot reclaim at {date:%Y-%m-%dT%H:%M:%SZ}"
            self.world.nodes[node] = "draining"
        self._until(notice, lambda: self.world.kill_machine(node))
        self._wait(self.pace)

    @rule(index=INDEX)
    def cut_off(self, index: int) -> None:
        """From the network: its jobs go on to write."""
        node = self._some_node(index)
        if node is not None:
            self.struck.add(node)
            self.world.cut.add(node)
            self._until(60, lambda: self._silence(node))
            self._wait(self.pace)

    def _silence(self, node: str) -> None:
        if node in self.world.nodes:
            self.world.fail_node(node)

    # -- rules: what Slurm does

    @rule(seconds=SECONDS)
    def slurm_away(self, seconds: int) -> None:
        self.slurm.away = True
        self._until(seconds, lambda: setattr(self.slurm, "away", False))
        self._wait(self.pace)

    @rule(count=COUNTS)
    def lose_submissions(self, count: int) -> None:
        """They arrive, and the reply does not."""
        self.slurm.submit_lost += count
        self._wait(self.pace)

    @rule(delays=values.lists(values.sampled_from((1.0, 8.0, 20.0, 60.0)), min_size=1, max_size=3))
    def delay_submissions(self, delays: list[float]) -> None:
        """They arrive late, and the reply does not."""
        self.slurm.delays += delays
        self._wait(self.pace)

    @rule(seconds=values.sampled_from((2.0, 30.0)))
    def forget_ended(self, seconds: float) -> None:
        self.slurm.remembers = seconds

    @rule(index=INDEX)
    def unknown(self, index: int) -> None:
        """Slurm has lost its memory of a job, which ran or waited."""
        jobs = sorted(set(self.world.jobs) - self.slurm.forgotten)
        if jobs:
            job = self.world.jobs[jobs[index % len(jobs)]]
            if job.state in ("PENDING", "RUNNING"):
                self.struck.update(job.request.nodes)
            self.slurm.forgotten.add(job.request.key)
            self._wait(self.pace)

    # -- rules: what others do

    @rule(index=INDEX, what=values.sampled_from(("draining", "down", "deleted")))
    def operate(self, index: int, what: str) -> None:
        """An operator drains a node, sets it down or deletes it."""
        node = self._some_node(index)
        if node is None or (what == "deleted" and self.world.running_on(node)):
            return
        self.struck.add(node)
        if what == "draining":
            self.world.nodes[node] = what
        elif what == "down":
            self.world.fail_node(node)
        else:
            self.world.remove_node(node)
        self._wait(self.pace)

    @rule(index=INDEX)
    def cancel_job(self, index: int) -> None:
        """Somebody cancels it by hand."""
        live = [job for job in self.world.jobs.values() if job.state in ("PENDING", "RUNNING")]
        if live:
            job = live[index % len(live)]
            self.world.cancel(job)
            self._wait(self.pace)

    @rule(index=INDEX, seconds=SECONDS)
    def guest(self, index: int, seconds: int) -> None:
        """Somebody else's job runs on a node of ours."""
        node = self._some_node(index)
        if node is not None and self.world.nodes[node] in ("idle", "mixed", "allocated"):
            self.slurm.foreign[node] = ["999999"]
            self._until(seconds, lambda: self._guest_leaves(node))
            self._wait(self.pace)

    def _guest_leaves(self, node: str) -> None:
        self.slurm.foreign.pop(node, None)

    @precondition(lambda self: not self.cloud.foreign)
    @rule()
    def stranger(self) -> None:
        """Machines of others, with names and tags that look like ours."""
        for number, (node, run) in enumerate(
            ((f"schlouder-{RUN}-1", f"{RUN}0"), (f"schlouder-{RUN}-10", f"{RUN} "), ("", "R1"))
        ):
            id = f"i-foreign{number}"
            self.cloud.foreign[id] = Instance(id, node, run, "running", "m5.large", "")

    def _some_machine(self, index: int, market: str = "") -> Machine | None:
        alive = [
            machine
            for machine in self.world.machines.values()
            if machine.instance.is_alive and market in ("", machine.instance.market)
        ]
        return alive[index % len(alive)] if alive else None

    def _some_node(self, index: int) -> str | None:
        nodes = sorted(self.world.nodes)
        return nodes[index % len(nodes)] if nodes else None

    # -- the end

    def teardown(self) -> None:
        try:
            if hasattr(self, "world") and not self.is_over:
                self._end()
                TALLY["seconds"] += int(self.world.now)
                TALLY[f"ends {self.ending}"] += 1
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _end(self) -> None:
        """Every cause is mended; then nothing may be left, neither work nor machines."""
        last = self.world.now
        if self.ending != "release":
            self._mend()
        self.fuse.left = -1
        if self.ending == "abandoned":
            self.broker = None
            self._abandon()
            return
        if self.broker is None:
            self._take_over()
        if self.ending == "stop":
            self._within(lambda broker: broker.stop())
        if self.ending != "release":
            end = self.world.now + LONGEST
            while len(self.reported) < len(self.works) and self.world.now < end:
                self._second(1.0 if self.world.now < last + 300 else 5.0)
        self._release()

    def _mend(self) -> None:
        self._heal(list(self.heals))
        self.cloud.coming.clear()
        self.cloud.hidden.clear()

    def _release(self) -> None:
        self.is_releasing = True
        assert self.broker is not None
        self.broker.release()
        self._tick(self.broker)
        left = [name for name in self.works if name not in self.reported]
        if left:
            self._violates("I5", f"{left} are never reported")
        if self.ending == "release":
            self._mend()
            self._abandon()
            return
        unlisted = {m.instance.node for m in self.world.machines.values() if not self.is_listed(m)}
        self.world.pass_time(self.world.end_time + 1)
        alive = set(self.world.alive()) - unlisted
        if alive:
            self._violates("I1", f"{sorted(alive)} live when the run has ended")
        self._check_records(unlisted)
        self._abandon()

    def is_listed(self, machine: Machine) -> bool:
        """Whether EC2 would have told of it by now."""
        return machine.listed <= self.world.now

    def _check_records(self, unlisted: set[str]) -> None:
        """Every machine that was ever started is in the books, as soon as EC2 tells of it."""
        known = {vm.name: vm.instance_id for vm in self.journal.vms(RUN)}
        for id, machine in self.world.machines.items():
            is_seen = machine.listed <= self.world.now - QUIET
            if is_seen and known.get(machine.instance.node) != id:
                self._violates(
                    "I1", f"{machine.instance.node} is {id}, of which there is no record"
                )

    def _abandon(self) -> None:
        """The process is gone for good: what still runs may end, and then the machines end themselves."""
        end = self.world.now + LONGEST
        while self.world.alive() and self.world.now < end:
            self.world.pass_time(5.0)
            self.slurm.deliver()
            self._look()
        if self.world.alive():
            self._violates("I1", f"{self.world.alive()} outlive their owner")


def play(
    machine: type[History], count: int, number: int | None = None, shrinks: bool = True
) -> None:
    """So many histories, always the same for a `number`; raises what breaks a promise, with the shortest
    history that does so."""
    phases = (Phase.generate, Phase.shrink) if shrinks else (Phase.generate,)
    settings = hypothesis.settings(
        max_examples=count,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        derandomize=number is None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=phases,
    )
    made = machine if number is None else hypothesis.seed(number)(machine)
    run_state_machine_as_test(made, settings=settings)


def main(number: int, count: int) -> None:
    logging.disable(logging.CRITICAL)
    violation = ""
    try:
        play(History, count, number)
    except Exception as error:
        violation = "".join(traceback.format_exception_only(error))
    print(json.dumps({"violation": violation, **TALLY}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
