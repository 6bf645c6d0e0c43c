"""What the recording of one run tells about the next: its tasks, and how long everything took.

Slurm tells starts and ends in whole seconds, cut off; half a second is added where they are compared
with the broker's clock.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .broker import BrokerConfig
from .model import DEFAULT_WALLTIME, SchlouderError, Task
from .prediction import MeasuredBoots
from .recording import Line, PlannedJob, decoded
from .simulate import Lags, Outcome, Scenario, simulate
from .slurm import ClusterView
from .slurm.states import JobPhase
from .tasklist import RecordedTask, TaskList

PERIOD = 0.05
"""Seconds between the rounds of a forecast: what the rounds of the live run cost is in its lags."""

_HALF = 0.5


@dataclass
class _Job:
    """A task of the recorded run; dates in seconds since the epoch, `started` and `ended` those of Slurm."""

    name: str
    rule: str
    received: float
    node: str = ""
    submitted: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    seen: float = 0.0


@dataclass
class Observed:
    """The course of a recorded run: the tasks that ended well by key, and the seconds of each boot."""

    plan: tuple[PlannedJob, ...] = ()
    jobs: dict[str, _Job] = field(default_factory=dict)
    boots: list[float] = field(default_factory=list)

    @property
    def makespan(self) -> float:
        """Seconds from the first task's hand-over to the last one's end."""
        ended = max(job.ended for job in self.jobs.values()) + _HALF
        return ended - min(job.received for job in self.jobs.values())


@dataclass(frozen=True)
class Experience:
    """What a run teaches: seconds by rule, of a boot, and between events."""

    walltimes: Mapping[str, float]
    boot: float
    lags: Lags


def observed(lines: Sequence[Line]) -> Observed:
    """SchlouderError where nothing ended in the recorded run."""
    found = _Reader().read(lines)
    found.jobs = {key: job for key, job in found.jobs.items() if job.seen}
    if not found.jobs or not found.boots:
        raise SchlouderError("the recording holds no task that ended: nothing to learn from")
    return found


def experience(run: Observed) -> Experience:
    by_rule: dict[str, list[float]] = {}
    for job in run.jobs.values():
        by_rule.setdefault(job.rule, []).append(job.ended - job.started)
    walltimes = {rule: statistics.fmean(seconds) for rule, seconds in by_rule.items()}
    return Experience(walltimes, statistics.fmean(run.boots), _lags(run))


def forecast(
    plan: Sequence[PlannedJob], config: BrokerConfig, strategy: str, known: Experience
) -> Outcome:
    """Simulates a workflow under one strategy, where jobs take what the jobs of their rule took; a rule
    nothing is known of takes what was planned for it."""
    scenario = Scenario(
        strategy,
        config.max_vms,
        config.billing,
        boots=MeasuredBoots(),
        period=PERIOD,
        real_boots=MeasuredBoots([known.boot]),
        types=tuple(config.types),
        lags=known.lags,
    )
    return simulate(TaskList(tuple(_task(job, known) for job in plan)), scenario)


def _task(job: PlannedJob, known: Experience) -> RecordedTask:
    planned = DEFAULT_WALLTIME if job.planned is None else job.planned
    real = known.walltimes.get(job.rule, planned)
    return RecordedTask(job.name, 0.0, planned, real, tuple(job.after), job.need, job.rule)


def _lags(run: Observed) -> Lags:
    jobs = list(run.jobs.values())
    starts, following = [], []
    for job in jobs:
        before = _freed_for(job, jobs)
        if before is None:
            starts.append(job.started + _HALF - job.submitted)
        else:
            following.append(job.started - before)
    return Lags(
        start=_mean(starts),
        following=_mean(following),
        notice=_mean([job.seen - job.ended - _HALF for job in jobs]),
        release=_mean(list(_releases(run))),
    )


def _freed_for(job: _Job, jobs: Iterable[_Job]) -> float | None:
    """The end of the job behind which `job` was queued on its VM; None if it found room at once."""
    ends = [
        other.ended
        for other in jobs
        if other.node == job.node
        and job.submitted < other.ended + _HALF
        and other.ended <= job.started
    ]
    return max(ends, default=None)


def _releases(run: Observed) -> Iterator[float]:
    """Seconds from the round that saw the last job end which a job waited for to its hand-over."""
    seen = {job.name: job.seen for job in run.jobs.values()}
    received = {job.name: job.received for job in run.jobs.values()}
    for planned in run.plan:
        waited = [seen[name] for name in planned.after if name in seen]
        if waited and planned.name in received:
            yield received[planned.name] - max(waited)


def _mean(values: Sequence[float]) -> float:
    """0 where there are none; what comes before its cause does so only by the rounding of dates."""
    return max(0.0, statistics.fmean(values)) if values else 0.0


class _Reader:
    """Goes through a recording line by line."""

    def __init__(self) -> None:
        self._found = Observed()
        self._now = 0.0
        self._arriving: list[Task] = []
        self._requested: dict[str, float] = {}
        self._ready: set[str] = set()

    def read(self, lines: Iterable[Line]) -> Observed:
        takes: dict[str, Callable[[Line], None]] = {
            "plan": self._plan,
            "submit": self._handed_over,
            "clock": self._clock,
            "cloud.launch": self._launched,
            "cluster.submit": self._submitted,
            "cluster.view": self._viewed,
        }
        for line in lines:
            if line.name in takes and line.failure is None:
                takes[line.name](line)
        return self._found

    def _plan(self, line: Line) -> None:
        self._found.plan = tuple(decoded(line.asked))

    def _handed_over(self, line: Line) -> None:
        self._arriving = decoded(line.asked)

    def _clock(self, line: Line) -> None:
        self._now = line.answer
        for task in self._arriving:
            self._found.jobs[task.key] = _Job(task.name, task.rule, self._now)
        self._arriving = []

    def _launched(self, line: Line) -> None:
        for text in line.asked:
            self._requested[text.split()[0]] = self._now

    def _submitted(self, line: Line) -> None:
        attempt, node, _, _ = line.asked
        job = self._found.jobs[attempt.rpartition(".")[0]]
        job.node, job.submitted = node, line.at

    def _viewed(self, line: Line) -> None:
        view: ClusterView = decoded(line.answer)
        for name, node in view.nodes.items():
            if name in self._requested and name not in self._ready and node.accepts_jobs:
                self._ready.add(name)
                self._found.boots.append(self._now - self._requested[name])
        for key, status in view.jobs.items():
            job = self._found.jobs.get(key.rpartition(".")[0])
            if job is not None and not job.seen and status.phase == JobPhase.SUCCEEDED:
                job.started, job.ended = status.started or 0.0, status.ended or 0.0
                job.seen = self._now
