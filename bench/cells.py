"""The strategies judged on the recorded runs, per cell (use case x VM cap), with the users' estimates.

The means of cells are averaged, so that the 98 runs of one campaign count once. Boots are as predicted,
never beyond the longest recorded on the same platform configuration where the cap is lifted.
"""

from __future__ import annotations

import csv
import functools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.rows import Row
from snakemake_executor_plugin_schlouder import tasklist
from snakemake_executor_plugin_schlouder.model import Billing
from snakemake_executor_plugin_schlouder.pool import Goal
from snakemake_executor_plugin_schlouder.prediction import BootPredictor
from snakemake_executor_plugin_schlouder.replay import RecordedRun, read_runs
from snakemake_executor_plugin_schlouder.simulate import Outcome, Scenario, simulate
from snakemake_executor_plugin_schlouder.tasklist import TaskList

CLASSICS = ("asap", "afap", "first-fit", "worst-fit", "one-vm-for-all", "one-vm-per-job")
DEADLINES = (1.2, 1.5, 2.0, 3.0)
BUDGETS = (1.1, 1.5, 2.0)
BIASED = 0.86
"""What the users' estimates on OMSSA brs were of the real walltimes (notes, 3.5)."""

UNCAPPED = 100_000


@dataclass(frozen=True)
class Unit:
    """A way of billing under which everything is judged; hours are counted in units, the others in
    seconds."""

    name: str
    billing: Billing

    @property
    def is_hour(self) -> bool:
        return self.billing.unit == 3600

    def cost(self, outcome: Outcome) -> float:
        return outcome.units if self.is_hour else outcome.billed

    def bound(self, run: RecordedRun) -> float:
        """The least any schedule costs: the work itself, in whole units where these are hours."""
        work = sum(task.real for task in _tasks(run.path).tasks)
        return max(1, math.ceil(work / 3600)) if self.is_hour else work


HOUR = Unit("1 h", Billing(3600, 0, 50))
MINUTE = Unit("60 s", Billing(60, 0, 50))
SECOND = Unit("1 s", Billing(1, 60, 50))


@dataclass(frozen=True)
class Play:
    """One simulation: what is asked for. `scale`: estimates are this share of the real walltimes."""

    run: RecordedRun
    strategy: str
    unit: Unit
    goal: Goal = field(default_factory=Goal)
    scale: float = 0.0
    longest_boot: float = 0.0


@dataclass(frozen=True)
class LimitedBoots:
    """A rule for boots, cut at the longest boot recorded."""

    rule: BootPredictor
    longest: float

    def predict(self, booting: int) -> float:
        return min(self.longest, self.rule.predict(booting))

    def learn(self, seconds: float, booting: int = 0) -> None: ...


@functools.cache
def _tasks(path: Path) -> TaskList:
    return replace(tasklist.read(path), boots=())


def play(asked: Play) -> Outcome:
    run = asked.run
    tasks = _tasks(run.path)
    if asked.scale:
        scaled = tuple(replace(task, predicted=task.real * asked.scale) for task in tasks.tasks)
        tasks = replace(tasks, tasks=scaled)
    boots: BootPredictor = run.boots
    cap = run.max_vms
    if asked.longest_boot:
        boots, cap = LimitedBoots(run.boots, asked.longest_boot), UNCAPPED
    return simulate(
        tasks, Scenario(asked.strategy, cap, asked.unit.billing, boots, goal=asked.goal)
    )


def cell_of(run: RecordedRun) -> tuple[str, int]:
    return run.usecase, run.max_vms


def mean_of_cells(values: Iterable[tuple[tuple[str, int], float]]) -> float:
    """The mean over cells of the means of their values, given as (cell, value)."""
    cells: dict[tuple[str, int], list[float]] = defaultdict(list)
    for cell, value in values:
        cells[cell].append(value)
    return statistics.fmean(statistics.fmean(cell) for cell in cells.values())


class Field:
    """All recorded runs; outcomes are played side by side, each once."""

    def __init__(self, traces: Path) -> None:
        self.runs = read_runs(traces / "runs.csv")
        self._longest = _longest_boots(traces / "runs.csv")
        self._played: dict[Play, Outcome] = {}

    def play(self, asked: Iterable[Play]) -> list[Outcome]:
        wanted = list(asked)
        missing = [one for one in dict.fromkeys(wanted) if one not in self._played]
        with ProcessPoolExecutor() as pool:
            self._played.update(zip(missing, pool.map(play, missing, chunksize=4), strict=True))
        return [self._played[one] for one in wanted]

    def outcomes(self, strategy: str, unit: Unit) -> dict[str, Outcome]:
        plays = [Play(run, strategy, unit) for run in self.runs]
        return {p.run.name: outcome for p, outcome in zip(plays, self.play(plays), strict=True)}

    def uncapped(self, strategy: str) -> dict[str, Outcome]:
        plays = [
            Play(run, strategy, HOUR, longest_boot=self._longest[run.name]) for run in self.runs
        ]
        return {p.run.name: outcome for p, outcome in zip(plays, self.play(plays), strict=True)}

    def least_units(self, run: RecordedRun, asap: Outcome) -> int:
        """Hours that every schedule pays which ends within 1 % of asap's makespan."""
        tasks = _tasks(run.path).tasks
        boot = LimitedBoots(run.boots, self._longest[run.name]).predict(0)
        begin = boot + min(task.submission for task in tasks)
        lengths = [task.real for task in tasks]
        vms = _least_bins(lengths, 1.01 * asap.makespan - begin)
        return min(asap.units, max(vms, math.ceil(sum(lengths) / 3600)))

    def over_cells(self, values: Mapping[str, float]) -> float:
        """The mean over cells of the means of their runs; runs without a value are left out."""
        found = [run for run in self.runs if run.name in values]
        return mean_of_cells((cell_of(run), values[run.name]) for run in found)


def _longest_boots(path: Path) -> dict[str, float]:
    """The longest boot recorded on the platform configuration of each run."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    longest: dict[tuple[str, str], float] = defaultdict(float)
    for row in rows:
        boots = tasklist.read(path.parent / f"{row['run']}.tasks").boots
        where = row["platform"], row["platform_config"]
        longest[where] = max([longest[where], *(boot.seconds for boot in boots)])
    return {row["run"]: longest[row["platform"], row["platform_config"]] for row in rows}


def _least_bins(lengths: Sequence[float], capacity: float) -> int:
    """How many bins they need at the least: the bound L2 of Martello and Toth (1990)."""
    most = 0
    for edge in {0.0, *(length for length in lengths if length <= capacity / 2)}:
        alone = [length for length in lengths if length > capacity - edge]
        large = [length for length in lengths if capacity / 2 < length <= capacity - edge]
        rest = sum(length for length in lengths if edge <= length <= capacity / 2)
        further = math.ceil((rest - len(large) * capacity + sum(large)) / capacity - 1e-9)
        most = max(most, len(alone) + len(large) + max(0, further))
    return most


def strategy_rows(traces: Path) -> list[Row]:
    if not (traces / "runs.csv").exists():
        names = ("cheapest", "fastest", "deadline", "budget")
        return [Row(name, f"no recorded runs in {traces}", "", None) for name in names]
    field = Field(traces)
    rows: list[Row] = []
    for unit in (HOUR, MINUTE, SECOND):
        rows += _cheapest_rows(field, unit)
        rows += _fastest_rows(field, unit)
        rows += _deadline_rows(field, unit)
        rows += _budget_rows(field, unit)
        if not unit.is_hour:
            rows.append(_sensible_row(field, unit))
    return [*rows, *_biased_rows(field), _uncapped_row(field), *_default_rows(field)]


def _cheapest_rows(field: Field, unit: Unit) -> list[Row]:
    ours, afap, asap = (field.outcomes(name, unit) for name in ("cheapest", "afap", "asap"))
    cost = {run.name: unit.cost(ours[run.name]) / unit.bound(run) for run in field.runs}
    slower = {name: ours[name].makespan / afap[name].makespan for name in ours}
    dearer = {
        name: unit.cost(ours[name]) / min(unit.cost(afap[name]), unit.cost(asap[name]))
        for name in ours
    }
    share = statistics.fmean(value <= 1 + 1e-9 for value in dearer.values())
    title, goal = f"cheapest, unit {unit.name}", 1.12 if unit.is_hour else 1.15
    return [
        _cells_row(f"{title}: cost / the bound", field, cost, goal),
        _cells_row(f"{title}: makespan / afap's", field, slower, 1.0),
        _every_row(f"{title}: makespan / afap's in every run", slower, 1.25),
        Row(
            f"{title}: runs not dearer than the better of asap and afap",
            f"{share:.1%} ({_worst(dearer)})",
            ">= 95 %",
            share >= 0.95,
        ),
    ]


def _fastest_rows(field: Field, unit: Unit) -> list[Row]:
    ours, asap = field.outcomes("fastest", unit), field.outcomes("asap", unit)
    slower = {name: ours[name].makespan / asap[name].makespan for name in ours}
    cost = {name: unit.cost(ours[name]) / unit.cost(asap[name]) for name in ours}
    title = f"fastest, unit {unit.name}"
    return [
        _every_row(f"{title}: makespan / asap's in every run", slower, 1.01),
        _cells_row(f"{title}: cost / asap's", field, cost, 0.95),
    ]


def _deadline_rows(field: Field, unit: Unit) -> list[Row]:
    asap, classics = field.outcomes("asap", unit), _classics(field, unit)
    rows = []
    for times in DEADLINES:
        dates = {run.name: times * asap[run.name].makespan for run in field.runs}
        goals = {name: Goal(deadline=date) for name, date in dates.items()}
        ours = _with_goals(field, unit, "deadline", goals)
        hits = {name: float(ours[name].makespan <= dates[name]) for name in ours}
        cost = {
            name: unit.cost(ours[name])
            / min(unit.cost(o) for o in classics[name] if o.makespan <= dates[name])
            for name in ours
        }
        title = f"deadline {times} x asap's makespan, unit {unit.name}"
        rows += [
            _hits_row(f"{title}: met", field, hits),
            _cells_row(f"{title}: cost / the cheapest classic's", field, cost, 1.15),
        ]
    return rows


def _budget_rows(field: Field, unit: Unit) -> list[Row]:
    classics = _classics(field, unit)
    seconds = 3600 if unit.is_hour else 1
    rows = []
    for times in BUDGETS:
        budgets = {run.name: times * unit.bound(run) for run in field.runs}
        goals = {name: Goal(budget=seconds * budget) for name, budget in budgets.items()}
        ours = _with_goals(field, unit, "budget", goals)
        could = {
            name
            for name, outcomes in classics.items()
            if min(unit.cost(outcome) for outcome in outcomes) <= budgets[name]
        }
        hits = {name: float(unit.cost(ours[name]) <= budgets[name] + 1e-9) for name in could}
        slower = {
            name: ours[name].makespan / min(within)
            for name in ours
            if (within := [o.makespan for o in classics[name] if unit.cost(o) <= budgets[name]])
        }
        title = f"budget {times} x the bound, unit {unit.name}"
        rows += [
            _hits_row(f"{title}: kept where any strategy can", field, hits),
            _cells_row(f"{title}: makespan / the fastest classic's", field, slower, 1.1),
        ]
    return rows


def _sensible_row(field: Field, unit: Unit) -> Row:
    afap, asap = field.outcomes("afap", unit), field.outcomes("asap", unit)
    slower = {name: afap[name].makespan / asap[name].makespan for name in afap}
    return _cells_row(f"afap, unit {unit.name}: makespan / asap's", field, slower, 3.0)


def _biased_rows(field: Field) -> list[Row]:
    """Estimates 14 % too low, where afap is dearer and slower than asap."""
    runs = [run for run in field.runs if cell_of(run) == ("brs", 25)]
    ours, afap = (
        field.play(Play(run, name, HOUR, scale=BIASED) for run in runs)
        for name in ("cheapest", "afap")
    )
    units = {run.name: float(o.units) for run, o in zip(runs, ours, strict=True)}
    slower = {run.name: o.makespan / a.makespan for run, o, a in zip(runs, ours, afap, strict=True)}
    mean, theirs = statistics.fmean(units.values()), statistics.fmean(o.units for o in afap)
    title = f"cheapest, brs with 25 VMs, estimates x {BIASED}"
    return [
        Row(
            f"{title}: units",
            f"{mean:.1f} (afap {theirs:.1f}; {_worst(units)})",
            "<= 42",
            mean <= 42,
        ),
        _every_row(f"{title}: makespan / afap's", slower, 1.0),
    ]


def _uncapped_row(field: Field) -> Row:
    """With the units that every schedule needs to end as soon as asap does, give or take 1 %."""
    ours, asap = field.uncapped("fastest"), field.uncapped("asap")
    cost = {name: ours[name].units / asap[name].units for name in ours}
    mean, parts = field.over_cells(cost), []
    for application in ("omssa", "montage"):
        runs = [run for run in field.runs if run.application == application]
        least = {run.name: field.least_units(run, asap[run.name]) for run in runs}
        bound = field.over_cells({name: least[name] / asap[name].units for name in least})
        reached = field.over_cells({run.name: cost[run.name] for run in runs})
        parts.append(f"{application} {reached:.2f}, no schedule < {bound:.2f}")
    return Row(
        "fastest without a cap, unit 1 h: units / asap's",
        f"{mean:.3f} ({'; '.join(parts)}; {_worst(cost)})",
        "<= 0.6",
        mean <= 0.6,
    )


def _default_rows(field: Field) -> list[Row]:
    """(cost / the bound) x (makespan / asap's) at AWS billing: the strategy with the least is the default."""
    from snakemake_executor_plugin_schlouder import ExecutorSettings

    asap = field.outcomes("asap", SECOND)
    marks = {}
    for name in (*CLASSICS, "cheapest", "fastest"):
        ours = field.outcomes(name, SECOND)
        marks[name] = field.over_cells(
            {
                run.name: SECOND.cost(ours[run.name])
                / SECOND.bound(run)
                * ours[run.name].makespan
                / asap[run.name].makespan
                for run in field.runs
            }
        )
    best = min(marks, key=lambda name: marks[name])
    shown = ", ".join(
        f"{name} {mark:.2f}" for name, mark in sorted(marks.items(), key=lambda m: m[1])
    )
    default = ExecutorSettings().strategy
    return [
        Row(
            f"default strategy ({default}) has the least cost x makespan",
            shown,
            best,
            best == default,
        )
    ]


def _classics(field: Field, unit: Unit) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = defaultdict(list)
    for strategy in CLASSICS:
        for name, outcome in field.outcomes(strategy, unit).items():
            found[name].append(outcome)
    return found


def _with_goals(
    field: Field, unit: Unit, strategy: str, goals: Mapping[str, Goal]
) -> dict[str, Outcome]:
    plays = [Play(run, strategy, unit, goals[run.name]) for run in field.runs]
    return {p.run.name: outcome for p, outcome in zip(plays, field.play(plays), strict=True)}


def _cells_row(name: str, field: Field, values: Mapping[str, float], goal: float) -> Row:
    mean = field.over_cells(values)
    return Row(name, f"{mean:.3f} ({_worst(values)})", f"<= {goal}", mean <= goal)


def _every_row(name: str, values: Mapping[str, float], goal: float) -> Row:
    beyond = sum(value > goal for value in values.values())
    value = f"{len(values) - beyond} of {len(values)} runs within ({_worst(values)})"
    return Row(name, value, f"<= {goal}", beyond == 0)


def _hits_row(name: str, field: Field, hits: Mapping[str, float]) -> Row:
    share = statistics.fmean(hits.values())
    missed: Sequence[str] = [run for run, hit in hits.items() if not hit]
    example = f", missed by {missed[0]}" if missed else ""
    value = f"{share:.1%} of runs, {field.over_cells(hits):.1%} of cells{example}"
    return Row(name, value, ">= 95 %", share >= 0.95)


def _worst(values: Mapping[str, float]) -> str:
    worst = max(values, key=lambda name: values[name])
    return f"worst {values[worst]:.2f}: {worst}"
