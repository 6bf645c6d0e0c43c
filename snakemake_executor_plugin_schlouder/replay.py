"""Recorded runs of the original Schlouder, played again by our broker and compared with what was measured.

A `runs.csv` has one line a run; `RUN.tasks` beside it is its task list. Decisions rest on the users'
estimates and the original's boot prediction; boots, provisioning dates, lags and walltimes are the
recorded ones.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import tasklist
from .model import Billing, SchlouderError
from .prediction import LinearBoots
from .simulate import Outcome, Scenario, simulate

_NUMBERS = (
    *("b0_s", "b1_s", "btu_s", "shutdown_margin_s", "max_vms", "boots_recorded"),
    *("real_vms", "real_btu", "real_makespan_s"),
)


@dataclass(frozen=True)
class RecordedRun:
    """`max_vms` is the cap that held: the recorded number of VMs where it exceeds the configured one."""

    name: str
    application: str
    usecase: str
    strategy: str
    boots: LinearBoots
    billing: Billing
    max_vms: int
    vms: int
    units: int
    makespan: float
    path: Path


@dataclass(frozen=True)
class Replay:
    run: RecordedRun
    outcome: Outcome

    @property
    def same_vms(self) -> bool:
        return self.outcome.vms == self.run.vms

    @property
    def same_units(self) -> bool:
        return self.outcome.units == self.run.units

    @property
    def makespan_error(self) -> float:
        """Absolute, relative to the measured makespan."""
        return abs(self.outcome.makespan - self.run.makespan) / self.run.makespan


@dataclass(frozen=True)
class Fidelity:
    """How often a group of replays agrees with reality."""

    runs: int
    same_vms: int
    same_units: int
    median_makespan_error: float

    @classmethod
    def of(cls, replays: Iterable[Replay]) -> Fidelity:
        group = list(replays)
        return cls(
            len(group),
            sum(replay.same_vms for replay in group),
            sum(replay.same_units for replay in group),
            statistics.median(replay.makespan_error for replay in group),
        )


def read_runs(path: Path) -> list[RecordedRun]:
    """The runs of a `runs.csv`; SchlouderError names file, line and what was expected."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            return [_run(row, path, number) for number, row in enumerate(reader, 2)]
    except OSError as error:
        raise SchlouderError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise SchlouderError(f"{path}: expected a CSV file in UTF-8: {error}") from error


def replay(run: RecordedRun, strategy: str | None = None) -> Replay:
    """Plays one run, with another strategy than the recorded one if `strategy` names it."""
    scenario = Scenario(strategy or run.strategy, run.max_vms, run.billing, run.boots)
    return Replay(run, simulate(tasklist.read(run.path), scenario))


def _run(row: dict[str, str], path: Path, line: int) -> RecordedRun:
    try:
        numbers = {name: float(row[name]) for name in _NUMBERS}
        return RecordedRun(
            name=row["run"],
            application=row["application"],
            usecase=row["usecase"],
            strategy=row["strategy"],
            boots=LinearBoots(numbers["b0_s"], numbers["b1_s"]),
            billing=Billing(numbers["btu_s"], 0.0, numbers["shutdown_margin_s"], keeps_late=True),
            max_vms=int(max(numbers["max_vms"], numbers["boots_recorded"])),
            vms=int(numbers["real_vms"]),
            units=int(numbers["real_btu"]),
            makespan=numbers["real_makespan_s"],
            path=path.parent / f"{row['run']}.tasks",
        )
    except KeyError as error:
        raise SchlouderError(f"{path}: expected a column {error.args[0]}") from None
    except (TypeError, ValueError) as error:
        raise SchlouderError(f"{path}, line {line}: expected a number: {error}") from None
