"""Prediction before the run, judged on the recorded runs of the original Schlouder.

Every run is predicted from what its user submitted (names, estimates, dates, dependencies, the cap and
the rule for boots) and from the real walltimes, boots and lags of other runs. What of a run is not
allowed to be known never reaches the prediction: its real walltimes are replaced by the estimates.

Runs of one campaign were submitted alike, up to seconds in the submission dates. They share one
forecast, counted from the first submission.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from bench.cells import cell_of, mean_of_cells
from bench.rows import Row
from snakemake_executor_plugin_schlouder import tasklist
from snakemake_executor_plugin_schlouder.forecast import (
    PLATFORM_SPREAD,
    STRATEGY_SPREAD,
    Forecast,
    Interval,
    Knowledge,
    PastRun,
    forecast,
)
from snakemake_executor_plugin_schlouder.replay import RecordedRun, read_runs
from snakemake_executor_plugin_schlouder.simulate import Scenario
from snakemake_executor_plugin_schlouder.tasklist import TaskList

ITERATIONS = 60
"""Enough for medians and 95 % intervals, as the forecast takes the quantiles of what matters most."""

MISS = 0.05
"""What an interval may miss: 95 %."""


@dataclass(frozen=True)
class Platform:
    """A cloud, the version of its configuration, and the storage of the campaign."""

    cloud: str
    config: str
    storage: str

    @property
    def version(self) -> int:
        """The number in `v3`, else 0."""
        return int(re.sub(r"\D", "", self.config) or 0)

    def distance(self, other: Platform) -> tuple[bool, int, bool, int]:
        """Other clouds are farthest; of versions equally far the earlier one is nearer."""
        return (
            self.cloud != other.cloud,
            abs(self.version - other.version),
            self.storage != other.storage,
            other.version,
        )


@dataclass(frozen=True)
class Case:
    """A recorded run and where it ran."""

    run: RecordedRun
    platform: Platform

    @cached_property
    def tasks(self) -> TaskList:
        return tasklist.read(self.run.path)

    @cached_property
    def past(self) -> PastRun:
        return PastRun(self.tasks, self.run.makespan, self.run.boots)

    @property
    def first_submission(self) -> float:
        return min(task.submission for task in self.tasks.tasks)

    @property
    def submitted(self) -> TaskList:
        """The tasks as the user submitted them, from date 0 on; nothing of what was measured."""
        first = self.first_submission
        return TaskList(
            tuple(
                replace(
                    task, submission=task.submission - first, real=task.predicted, computing=None
                )
                for task in self.tasks.tasks
            )
        )

    @cached_property
    def work(self) -> object:
        """Equal for runs of the same tasks under the same strategy."""
        tasks = tuple((task.name, task.predicted, task.after) for task in self.tasks.tasks)
        return self.run.strategy, self.run.usecase, tasks

    @property
    def alike(self) -> object:
        """Equal for runs that were submitted alike."""
        return self.work, self.run.max_vms, self.platform


@dataclass(frozen=True)
class Judged:
    """A run and its forecast; dates of both count from the first submission."""

    case: Case
    forecast: Forecast

    @property
    def makespan(self) -> float:
        return self.case.run.makespan - self.case.first_submission

    @property
    def makespan_error(self) -> float:
        return abs(self.forecast.makespan.median - self.makespan) / self.case.run.makespan

    @property
    def units_error(self) -> float:
        return abs(self.forecast.units.median - self.case.run.units) / self.case.run.units


@dataclass(frozen=True)
class Allowed:
    """The runs of which a prediction may know, with `trust` and `doubt` in what their walltimes sum up to
    (see Knowledge); `speed`: walltimes expected here / there."""

    cases: list[Case]
    trust: float
    doubt: float
    speed: float = 1.0

    def knowledge(self, case: Case) -> Knowledge:
        past = [other.past.scaled(self.speed) for other in self.cases]
        return Knowledge.of(past, case.run.boots, self.trust, self.doubt)


History = Callable[[Case, Sequence[Case]], Allowed]


def other_strategy(case: Case, cases: Sequence[Case]) -> Allowed:
    """The same use case under the other strategy: on the same platform, else on all others."""
    allowed = [
        other
        for other in cases
        if other.run.usecase == case.run.usecase and other.run.strategy != case.run.strategy
    ]
    here = [other for other in allowed if other.platform == case.platform]
    if here:
        return Allowed(here, 1.0, STRATEGY_SPREAD)
    return Allowed(_same_storage(case, allowed), 0.0, math.hypot(PLATFORM_SPREAD, STRATEGY_SPREAD))


def other_platforms(case: Case, cases: Sequence[Case]) -> Allowed:
    """Other platform configurations only: the same tasks under the same strategy on the nearest one,
    trusted as much as the estimates; else what there is of the use case or the application."""
    where = case.platform.cloud, case.platform.config
    allowed = [other for other in cases if (other.platform.cloud, other.platform.config) != where]
    same = [other for other in allowed if other.work == case.work]
    if not same:
        usecase = [other for other in allowed if other.run.usecase == case.run.usecase]
        related = [other for other in allowed if other.run.application == case.run.application]
        return Allowed(_same_storage(case, usecase or related), 0.0, PLATFORM_SPREAD)
    there = _nearest(case.platform, _same_storage(case, same))
    latest = _nearest(case.platform, _same_storage(case, allowed))
    speed = _speed(case.run.strategy, allowed, latest, there)
    return Allowed(
        [other for other in same if other.platform == there], 0.5, PLATFORM_SPREAD, speed
    )


def _nearest(platform: Platform, cases: Iterable[Case]) -> Platform:
    """Of the platforms of `cases` the one most like `platform`: machines are renewed from version to
    version."""
    return min({case.platform for case in cases}, key=platform.distance)


def _speed(strategy: str, cases: Sequence[Case], here: Platform, there: Platform) -> float:
    """Walltimes on `here` / on `there`: the median over the work that ran on both."""
    sums: dict[Platform, dict[object, list[float]]] = {here: {}, there: {}}
    for case in cases:
        if case.platform in sums and case.run.strategy == strategy:
            total = sum(task.real for task in case.tasks.tasks)
            sums[case.platform].setdefault(case.work, []).append(total)
    both = sums[here].keys() & sums[there].keys()
    ratios = [
        statistics.median(sums[here][work]) / statistics.median(sums[there][work]) for work in both
    ]
    return statistics.median(ratios) if ratios else 1.0


def forecast_rows(traces: Path) -> list[Row]:
    histories: list[tuple[str, History, float, float]] = [
        ("other strategy", other_strategy, 0.10, 0.06),
        ("other platforms", other_platforms, 0.15, 0.08),
    ]
    if not (traces / "runs.csv").exists():
        return [
            Row(f"forecast, {name}", f"no recorded runs in {traces}", "", None)
            for name, *_ in histories
        ]
    cases = read_cases(traces)
    rows: list[Row] = []
    for name, history, makespan_goal, units_goal in histories:
        judged = judge(cases, history)
        title = f"forecast, history of {name}"
        rows += _error_rows(title, judged, makespan_goal, units_goal)
        rows += _interval_rows(title, judged)
    return [*rows, _time_row(cases)]


def _time_row(cases: Sequence[Case]) -> Row:
    """SimSchlouder took 15 CPU-minutes for as many iterations of the same batch."""
    name = "forecast: CPU seconds for 500 iterations of 223 tasks"
    batch = next((case for case in cases if len(case.tasks.tasks) == 223), None)
    if batch is None:
        return Row(name, "no recorded run has 223 tasks", "<= 10", None)
    question = _question(batch, other_strategy(batch, cases))
    begun = time.process_time()
    forecast(*question, iterations=50)
    seconds = 10 * (time.process_time() - begun)
    return Row(name, f"{seconds:.1f} (10 x 50)", "<= 10", seconds <= 10)


def read_cases(traces: Path) -> list[Case]:
    path = traces / "runs.csv"
    with path.open(newline="") as file:
        platforms = [
            Platform(row["platform"], row["platform_config"], row["storage"])
            for row in csv.DictReader(file)
        ]
    return [Case(run, where) for run, where in zip(read_runs(path), platforms, strict=True)]


def judge(cases: Sequence[Case], history: History) -> list[Judged]:
    """All runs with their forecasts."""
    groups: dict[object, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.alike].append(case)
    questions = [_question(group[0], history(group[0], cases)) for group in groups.values()]
    with ProcessPoolExecutor() as pool:
        answers = list(pool.map(_forecast, questions))
    return [
        Judged(case, answer)
        for group, answer in zip(groups.values(), answers, strict=True)
        for case in group
    ]


_Question = tuple[TaskList, Scenario, Knowledge]


def _question(case: Case, allowed: Allowed) -> _Question:
    run = case.run
    scenario = Scenario(run.strategy, run.max_vms, run.billing, run.boots)
    return case.submitted, scenario, allowed.knowledge(case)


def _forecast(question: _Question) -> Forecast:
    return forecast(*question, iterations=ITERATIONS)


def _same_storage(case: Case, allowed: list[Case]) -> list[Case]:
    """Those whose campaign used the same storage, if there are any: it decides what transfers cost."""
    same = [other for other in allowed if other.platform.storage == case.platform.storage]
    return same or allowed


def _error_rows(title: str, judged: list[Judged], makespan: float, units: float) -> list[Row]:
    return [
        _mean_row(f"{title}: makespan error", judged, lambda one: one.makespan_error, makespan),
        _mean_row(f"{title}: cost error", judged, lambda one: one.units_error, units),
    ]


def _mean_row(
    name: str, judged: list[Judged], error: Callable[[Judged], float], goal: float
) -> Row:
    """The mean over runs, which the goals (and SimSchlouder's figures) are; over cells for comparison."""
    runs = statistics.fmean(error(one) for one in judged)
    cells = mean_of_cells((cell_of(one.case.run), error(one)) for one in judged)
    worst = max(judged, key=error)
    value = (
        f"{runs:.3f} (mean of cells {cells:.3f}; worst {error(worst):.2f}: {worst.case.run.name})"
    )
    return Row(name, value, f"<= {goal}", runs <= goal)


def _interval_rows(title: str, judged: list[Judged]) -> list[Row]:
    return [
        _interval_row(
            f"{title}: 95 % interval holds makespan",
            [(one.case, one.forecast.makespan, one.makespan) for one in judged],
        ),
        _interval_row(
            f"{title}: 95 % interval holds cost",
            [(one.case, one.forecast.units, float(one.case.run.units)) for one in judged],
        ),
    ]


def _interval_row(name: str, judged: list[tuple[Case, Interval, float]]) -> Row:
    held = sum(interval.holds(real) for _, interval, real in judged) / len(judged)
    width = statistics.fmean((i.high - i.low) / real for _, i, real in judged)
    score = statistics.fmean(_interval_score(i, real) / real for _, i, real in judged)
    case, interval, real = max(judged, key=lambda one: _interval_score(one[1], one[2]) / one[2])
    value = (
        f"{held:.3f} (mean width {width:.2f}, mean interval score {score:.2f} of the real value; "
        f"worst {_interval_score(interval, real) / real:.1f}: {case.run.name})"
    )
    return Row(name, value, ">= 0.9", held >= 0.9)


def _interval_score(interval: Interval, real: float) -> float:
    """Width, and 2 / MISS times what the interval misses the value by (Gneiting and Raftery 2007, 6.2)."""
    missed = max(0.0, interval.low - real, real - interval.high)
    return interval.high - interval.low + 2 / MISS * missed
