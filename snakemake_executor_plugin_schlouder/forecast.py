"""Prediction before the run: makespan and cost of a task list, with what earlier runs have shown.

Monte-Carlo: every iteration draws walltimes and boots and plays the run in the simulator. Decisions
rest on the user's estimates, as they will in the run itself.

What is drawn: the walltime a task took before (else the user's estimate times the bias of its rule);
times a factor for what runs at once; times a factor that the tasks of a run share; times a deviation
of its own.
"""

from __future__ import annotations

import math
import random
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .prediction import LearnedBoots, LinearBoots, Walltimes
from .simulate import Scenario, simulate
from .tasklist import RecordedBoot, RecordedTask, TaskList

RUN_SPREAD = 0.03
"""Standard deviation of ln(sum of walltimes) between runs of the same tasks on the same platform,
before several were seen: recorded platforms varied by 3 to 6 %, task by task, less in sums."""

TASK_SPREAD = 0.05
"""Standard deviation of ln(walltime) of a task that runs again, before one was seen twice."""

PLATFORM_SPREAD = 0.15
"""Standard deviation of ln(sum of real walltimes / sum of estimates) between platforms."""

CORRECTION_SPREAD = 0.5
"""How sure a correction for concurrency is: its standard deviation, as a share of itself."""

_PILOTS = 4
_PRIOR_RUNS = 3
_SHORTEST = 0.1


@dataclass(frozen=True)
class Interval:
    """`low` to `high` holds 95 % of what was drawn."""

    mean: float
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        cuts = statistics.quantiles(values, n=40, method="inclusive")
        return cls(statistics.fmean(values), statistics.median(values), cuts[0], cuts[-1])

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Forecast:
    """`makespan` is the date (s) at which the last task ends, `units` and `billed` (s) the cost."""

    makespan: Interval
    units: Interval
    billed: Interval


@dataclass(frozen=True)
class PastRun:
    """An earlier run: its tasks with real walltimes, its boots in the order of the requests, what its
    boots had been predicted to take, and its makespan (s)."""

    tasks: TaskList
    makespan: float
    boots: LinearBoots

    @property
    def concurrency(self) -> float:
        """Tasks running at once, on average."""
        return sum(task.real for task in self.tasks.tasks) / self.makespan


@dataclass(frozen=True)
class Contention:
    """Tasks that run at once slow each other down, as they share a file server or a network.

    `share` of the walltimes was waiting for others while `concurrency` tasks ran at once. A shared
    server gives each an equal part, so that this share is proportional to the concurrency.
    """

    share: float = 0.0
    concurrency: float = 1.0

    def factor(self, concurrency: float) -> float:
        """Walltimes at `concurrency` / walltimes as learned."""
        return 1.0 - self.share + self.share * concurrency / self.concurrency


@dataclass
class Knowledge:
    """What earlier runs have shown.

    `tasks` are real walltimes (s) by name and estimate. `rescaled`: the history is of another platform.
    It tells which tasks are longer than others; their sum is taken from the user's estimates, which
    proved nearer than what another platform's machines took. `spread` is the standard deviation of
    ln(sum of walltimes) between runs; `deviations` are samples of ln(real / expected) of single tasks.
    """

    walltimes: Walltimes = field(default_factory=Walltimes)
    boots: LearnedBoots = field(default_factory=LearnedBoots)
    lags: Sequence[float] = (0.0,)
    tasks: Mapping[tuple[str, float], float] = field(default_factory=dict)
    contention: Contention = field(default_factory=Contention)
    rescaled: bool = False
    spread: float = RUN_SPREAD
    deviations: Sequence[float] = ()

    @classmethod
    def of(cls, runs: Iterable[PastRun], boots: LinearBoots, rescaled: bool = False) -> Knowledge:
        """What `runs` teach for a run whose boots `boots` predicts."""
        past = list(runs)
        tasks = _medians(past)
        known = cls(boots=LearnedBoots(boots), tasks=tasks, rescaled=rescaled)
        for run in past:
            for task in run.tasks.tasks:
                known.walltimes.learn(rule_of(task.name), task.predicted, task.real)
            for booting, boot in enumerate(run.tasks.boots):
                miss = boot.seconds - run.boots.predict(booting)
                known.boots.learn(boots.predict(booting) + miss, booting)
        known.lags = [boot.lag for run in past for boot in run.tasks.boots] or (0.0,)
        known.contention = _contention(past, tasks)
        known.spread = _run_spread(_levels(past, tasks))
        known.deviations = _deviations(past, tasks)
        return known

    def expected(self, tasks: TaskList, concurrency: float) -> list[float]:
        """Seconds each task is expected to take while `concurrency` tasks run at once."""
        walltimes = [self._alone(task) for task in tasks.tasks]
        factor = self.contention.factor(concurrency)
        estimated = sum(task.predicted for task in tasks.tasks)
        if self.rescaled and sum(walltimes) > 0 and estimated > 0:
            factor = estimated / sum(walltimes)
        return [max(_SHORTEST, walltime * factor) for walltime in walltimes]

    def uncertainty(self, concurrency: float) -> float:
        """Standard deviation of ln(sum of real walltimes / sum of expected ones)."""
        correction = CORRECTION_SPREAD * math.log(self.contention.factor(concurrency))
        platform = PLATFORM_SPREAD if self.rescaled or not self.tasks else 0.0
        return math.hypot(self.spread, correction, platform)

    def deviation(self, task: RecordedTask, chance: random.Random) -> float:
        """A draw of ln(real / expected) of one task; sums stay unbiased."""
        if (task.name, task.predicted) not in self.tasks:
            return _gauss(self.walltimes.spread(rule_of(task.name)), chance)
        if self.deviations:
            return chance.choice(self.deviations)
        return _gauss(TASK_SPREAD, chance)

    def _alone(self, task: RecordedTask) -> float:
        before = self.tasks.get((task.name, task.predicted))
        if before is not None:
            return before
        return self.walltimes.expected(rule_of(task.name), task.predicted)


def rule_of(name: str) -> str:
    """The rule a task of a task list belongs to: the last word of its name. `a_1.mgf`: mgf;
    `2mass_h_1x1_project_0_9`: project."""
    words = re.findall(r"[A-Za-z]+", name)
    return words[-1] if words else name


def forecast(
    tasks: TaskList,
    scenario: Scenario,
    knowledge: Knowledge,
    iterations: int = 500,
    seed: int = 0,
) -> Forecast:
    """Makespan and cost of running `tasks`, of which only what the user submitted is used."""
    chance = random.Random(seed)
    draws = _Draws(tasks, scenario, knowledge)
    outcomes = [simulate(draws.next(chance), scenario) for _ in range(max(2, iterations))]
    return Forecast(
        Interval.of([outcome.makespan for outcome in outcomes]),
        Interval.of([float(outcome.units) for outcome in outcomes]),
        Interval.of([outcome.billed for outcome in outcomes]),
    )


class _Draws:
    """Task lists as the run may turn out."""

    def __init__(self, tasks: TaskList, scenario: Scenario, knowledge: Knowledge) -> None:
        self._tasks = tasks
        self._knowledge = knowledge
        self._vms = min(scenario.max_vms, len(tasks.tasks))
        concurrency = self._concurrency(scenario)
        self._walltimes = knowledge.expected(tasks, concurrency)
        self._spread = knowledge.uncertainty(concurrency)

    def next(self, chance: random.Random) -> TaskList:
        known = self._knowledge
        shared = chance.gauss(0.0, self._spread)
        walltimes = [
            walltime * math.exp(shared + known.deviation(task, chance))
            for task, walltime in zip(self._tasks.tasks, self._walltimes, strict=True)
        ]
        boots = [
            RecordedBoot(known.boots.draw(booting, chance), lag=chance.choice(known.lags))
            for booting in range(self._vms)
        ]
        return _played(self._tasks, walltimes, boots)

    def _concurrency(self, scenario: Scenario) -> float:
        """Walltimes depend on how many tasks run at once, and that on the walltimes: played until both
        agree, going half of the way each time."""
        known = self._knowledge
        concurrency = known.contention.concurrency
        if not known.contention.share:
            return concurrency
        lag = statistics.median(known.lags)
        boots = [RecordedBoot(known.boots.expected(n), lag=lag) for n in range(self._vms)]
        for _ in range(_PILOTS):
            walltimes = known.expected(self._tasks, concurrency)
            outcome = simulate(_played(self._tasks, walltimes, boots), scenario)
            concurrency = math.sqrt(concurrency * sum(walltimes) / outcome.makespan)
        return concurrency


def _played(tasks: TaskList, walltimes: Sequence[float], boots: Sequence[RecordedBoot]) -> TaskList:
    played = [
        RecordedTask(task.name, task.submission, task.predicted, walltime, task.after)
        for task, walltime in zip(tasks.tasks, walltimes, strict=True)
    ]
    return TaskList(tuple(played), tuple(boots))


def _gauss(spread: float, chance: random.Random) -> float:
    """The logarithm of a factor with mean 1."""
    return chance.gauss(-spread * spread / 2, spread)


def _medians(runs: Sequence[PastRun]) -> dict[tuple[str, float], float]:
    """The median walltime of every task: that it hung in one run says nothing about the next one."""
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    for run in runs:
        for task in run.tasks.tasks:
            found[task.name, task.predicted].append(task.real)
    return {key: max(_SHORTEST, statistics.median(values)) for key, values in found.items()}


def _contention(runs: Sequence[PastRun], tasks: Mapping[tuple[str, float], float]) -> Contention:
    """Waiting for others is what walltimes have beyond the computing, and beyond the estimates: these
    are made for a task alone."""
    typical = estimated = computing = concurrency = 0.0
    for run in runs:
        for task in run.tasks.tasks:
            walltime = tasks[task.name, task.predicted]
            typical += walltime
            estimated += task.predicted
            computing += walltime if task.computing is None else task.computing
            concurrency += walltime * run.concurrency
    if typical <= 0:
        return Contention()
    share = 1.0 - min(typical, estimated, computing) / typical
    return Contention(share, concurrency / typical)


def _levels(runs: Sequence[PastRun], tasks: Mapping[tuple[str, float], float]) -> list[float]:
    """ln(sum of real walltimes / sum of typical ones) of every run."""
    return [
        math.log(
            max(_SHORTEST, sum(task.real for task in run.tasks.tasks))
            / sum(tasks[task.name, task.predicted] for task in run.tasks.tasks)
        )
        for run in runs
    ]


def _run_spread(levels: Sequence[float]) -> float:
    prior = _PRIOR_RUNS * RUN_SPREAD**2
    if len(levels) < 2:
        return RUN_SPREAD
    freedom = len(levels) - 1
    return math.sqrt((prior + statistics.variance(levels) * freedom) / (_PRIOR_RUNS + freedom))


def _deviations(runs: Sequence[PastRun], tasks: Mapping[tuple[str, float], float]) -> list[float]:
    """ln(real / typical walltime) of every task that ran in two runs or more."""
    times = Counter((task.name, task.predicted) for run in runs for task in run.tasks.tasks)
    return [
        math.log(max(_SHORTEST, task.real) / tasks[task.name, task.predicted])
        for run in runs
        for task in run.tasks.tasks
        if times[task.name, task.predicted] > 1
    ]
