"""Prediction before the run: makespan and cost of a task list, with what earlier runs have shown.

Monte-Carlo: every iteration draws walltimes and boots and plays the run in the simulator. Decisions
rest on the user's estimates, as they will in the run itself.

What is drawn: the walltime a task took before (else the user's estimate times the bias of its rule);
times a factor for what runs at once; times a factor that the tasks of a run share; times a deviation
of its own.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

from .prediction import LearnedBoots, LinearBoots, Walltimes
from .simulate import Scenario, simulate
from .tasklist import RecordedBoot, RecordedTask, TaskList, last_word

RUN_SPREAD = 0.03
"""Standard deviation of ln(sum of walltimes) between runs of the same tasks on the same platform,
before several were seen: recorded platforms varied by 3 to 6 %, task by task, less in sums."""

TASK_SPREAD = 0.05
"""Standard deviation of ln(walltime) of a task that runs again, before one was seen twice."""

PLATFORM_SPREAD = 0.15
"""Standard deviation of ln(sum of real walltimes / sum of estimates) between platforms: the `doubt` in
a history of other ones."""

STRATEGY_SPREAD = 0.1
"""The `doubt` in a history of another strategy, beyond the correction for concurrency."""

ESTIMATE_SPREAD = 0.5
"""The doubt where the history does not know the tasks: users' estimates were off by up to 5 times."""

CORRECTION_SPREAD = 0.5
"""Standard deviation of a correction (for tasks running, or VMs booting at once) as a share of itself:
it may not be needed at all, or be twice as large."""

_PILOTS = 4
_PRIOR_RUNS = 3
_SHORTEST = 0.1


def rule_of(name: str) -> str:
    """The rule a task of a task list belongs to: the last word of its name."""
    return last_word(name) or name


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
        return sum(task.real for task in self.tasks.tasks) / max(_SHORTEST, self.makespan)

    def scaled(self, factor: float) -> PastRun:
        """The run as on a platform where everything but boots takes `factor` times as long."""
        tasks = tuple(
            replace(
                task,
                real=task.real * factor,
                computing=None if task.computing is None else task.computing * factor,
            )
            for task in self.tasks.tasks
        )
        return replace(
            self, tasks=replace(self.tasks, tasks=tasks), makespan=self.makespan * factor
        )


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

    `tasks` are real walltimes (s) by name and estimate. `trust` in what they sum up to: 1 when the
    history is of the same platform. With 0 the history only tells which tasks are longer than others,
    and the sum is taken from the user's estimates. `doubt` is the standard deviation of
    ln(sum of real walltimes / sum of expected ones) because the history is of other circumstances,
    `spread` that between runs in the same ones; `deviations` are samples of ln(real / expected) of
    single tasks. `rule_of` gives the rule of a task's name.
    """

    walltimes: Walltimes = field(default_factory=Walltimes)
    boots: LearnedBoots = field(default_factory=LearnedBoots)
    lags: Sequence[float] = (0.0,)
    tasks: Mapping[tuple[str, float], float] = field(default_factory=dict)
    contention: Contention = field(default_factory=Contention)
    trust: float = 1.0
    doubt: float = 0.0
    spread: float = RUN_SPREAD
    deviations: Sequence[float] = ()
    rule_of: Callable[[str], str] = rule_of

    @classmethod
    def of(
        cls, runs: Iterable[PastRun], boots: LinearBoots, trust: float = 1.0, doubt: float = 0.0
    ) -> Knowledge:
        """What `runs` teach for a run whose boots `boots` predicts."""
        past = list(runs)
        tasks = _typical(past)
        known = cls(boots=LearnedBoots(boots), tasks=tasks, trust=trust, doubt=doubt)
        for run in past:
            for task in run.tasks.tasks:
                known.walltimes.learn(known.rule_of(task.name), task.predicted, task.real)
            for booting, boot in enumerate(run.tasks.boots):
                miss = boot.seconds - run.boots.predict(booting)
                alike = booting if trust == 1.0 else 0
                known.boots.learn(boots.predict(alike) + miss, alike)
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
        if self.trust < 1.0 and estimated > 0:
            bias = max(_SHORTEST, sum(walltimes)) / estimated
            factor = (bias * factor) ** self.trust / bias
        return [max(_SHORTEST, walltime * factor) for walltime in walltimes]

    def uncertainty(self, tasks: TaskList, concurrency: float) -> float:
        """Standard deviation of ln(sum of real walltimes / sum of expected ones)."""
        correction = CORRECTION_SPREAD * self.trust * math.log(self.contention.factor(concurrency))
        doubt = self.doubt if self._knows(tasks) else ESTIMATE_SPREAD
        return math.hypot(self.spread, correction, doubt)

    def deviation(self, task: RecordedTask, chance: random.Random) -> float:
        """A draw of ln(real / expected) of one task; sums stay unbiased."""
        if _key(task) not in self.tasks:
            return _gauss(self.walltimes.spread(self.rule_of(task.name)), chance)
        if self.deviations:
            return chance.choice(self.deviations)
        return _gauss(TASK_SPREAD, chance)

    def _alone(self, task: RecordedTask) -> float:
        before = self.tasks.get(_key(task))
        if before is not None:
            return before
        return self.walltimes.expected(self.rule_of(task.name), task.predicted)

    def _knows(self, tasks: TaskList) -> bool:
        """Whether any of these tasks ran before, or others of its rule on the same platform."""
        return any(
            _key(task) in self.tasks
            or (self.trust == 1.0 and self.walltimes.knows(self.rule_of(task.name)))
            for task in tasks.tasks
        )


def _key(task: RecordedTask) -> tuple[str, float]:
    """The same name with another estimate is another task: lists of one use case differ in how work is
    cut into tasks."""
    return task.name, task.predicted


def forecast(
    tasks: TaskList,
    scenario: Scenario,
    knowledge: Knowledge,
    iterations: int = 500,
    seed: int = 0,
) -> Forecast:
    """Makespan and cost of running `tasks`, of which only what the user submitted is used.

    What the predictors of `scenario` learn in one iteration is forgotten before the next.
    """
    chance = random.Random(seed)
    draws = _Draws(tasks, scenario, knowledge).all(max(2, iterations), chance)
    outcomes = [simulate(drawn, copy.deepcopy(scenario)) for drawn in draws]
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
        self._spread = knowledge.uncertainty(tasks, concurrency)

    def all(self, number: int, chance: random.Random) -> Iterator[TaskList]:
        """The factor that the tasks of a run share decides most; its quantiles are taken instead of
        draws, so that few iterations suffice."""
        for turn in range(number):
            shared = self._spread * NormalDist().inv_cdf((turn + 0.5) / number)
            yield self._one(shared, chance)

    def _one(self, shared: float, chance: random.Random) -> TaskList:
        known = self._knowledge
        growth = max(0.0, chance.gauss(1.0, CORRECTION_SPREAD))
        walltimes = [
            walltime * math.exp(shared + known.deviation(task, chance))
            for task, walltime in zip(self._tasks.tasks, self._walltimes, strict=True)
        ]
        boots = [
            RecordedBoot(known.boots.draw(booting, chance, growth), lag=chance.choice(known.lags))
            for booting in range(self._vms)
        ]
        return _played(self._tasks, walltimes, boots)

    def _concurrency(self, scenario: Scenario) -> float:
        """Walltimes depend on how many tasks run at once, and that on the walltimes: played until both
        agree, going half of the way each time."""
        known = self._knowledge
        concurrency = known.contention.concurrency
        if not known.contention.share or not known.trust:
            return concurrency
        lag = statistics.median(known.lags)
        boots = [RecordedBoot(known.boots.expected(n), lag=lag) for n in range(self._vms)]
        for _ in range(_PILOTS):
            walltimes = known.expected(self._tasks, concurrency)
            played = _played(self._tasks, walltimes, boots)
            outcome = simulate(played, copy.deepcopy(scenario))
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


def _typical(runs: Sequence[PastRun]) -> dict[tuple[str, float], float]:
    """What tasks took: each in proportion to its median, for that it hung in one run says nothing about
    the next one; all of them together as much as was measured, for some tasks will hang."""
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    for run in runs:
        for task in run.tasks.tasks:
            found[_key(task)].append(task.real)
    medians = {key: max(_SHORTEST, statistics.median(values)) for key, values in found.items()}
    measured = sum(sum(values) for values in found.values())
    scale = (
        measured / sum(medians[key] * len(values) for key, values in found.items()) if found else 1
    )
    return {key: max(_SHORTEST, median * scale) for key, median in medians.items()}


def _contention(runs: Sequence[PastRun], tasks: Mapping[tuple[str, float], float]) -> Contention:
    """Waiting for others is what walltimes have beyond the computing, and beyond the estimates: these
    are made for a task alone."""
    typical = estimated = computing = concurrency = 0.0
    for run in runs:
        for task in run.tasks.tasks:
            walltime = tasks[_key(task)]
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
            / sum(tasks[_key(task)] for task in run.tasks.tasks)
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
    times = Counter(_key(task) for run in runs for task in run.tasks.tasks)
    return [
        math.log(max(_SHORTEST, task.real) / tasks[_key(task)])
        for run in runs
        for task in run.tasks.tasks
        if times[_key(task)] > 1
    ]
