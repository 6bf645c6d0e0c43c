"""What the recording of one run tells about the next: its tasks, and how long everything took.

Slurm tells starts and ends in whole seconds only. So a task is taken to run from its submission, or from
the end of the one it was queued behind, to the round that saw its end, less the mean time a round comes
late: Slurm's own delay in starting it is contained.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .broker import BrokerConfig
from .model import SchlouderError, Task, estimate_of
from .prediction import LearnedBoots
from .recording import Line, PlannedJob, decoded
from .simulate import Lags, Scenario, simulate
from .slurm import ClusterView
from .slurm.states import JobPhase
from .tasklist import RecordedTask, TaskList

PERIOD = 0.05
"""Seconds between the rounds of a forecast: what the rounds of the live run cost is in its lags."""

_HALF = 0.5
"""What Slurm's whole seconds lack on average."""


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
        """Seconds from the first task's hand-over to the round that saw the last one's end."""
        jobs = self.jobs.values()
        return max(job.seen for job in jobs) - min(job.received for job in jobs)


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
    jobs = list(run.jobs.values())
    notice = _mean([job.seen - job.ended - _HALF for job in jobs])
    by_rule: dict[str, list[float]] = {}
    for job in jobs:
        before = _queued_behind(job, jobs)
        begun = job.submitted + notice if before is None else before.seen
        by_rule.setdefault(job.rule, []).append(job.seen - begun)
    walltimes = {rule: _mean(seconds) for rule, seconds in by_rule.items()}
    lags = Lags(notice, _mean(list(_releases(run))))
    return Experience(walltimes, statistics.fmean(run.boots), lags)


def forecast(
    plan: Sequence[PlannedJob], config: BrokerConfig, strategy: str, known: Experience
) -> float:
    """The makespan (as `Observed.makespan`) of a workflow under one strategy, simulated: jobs take what
    the jobs of their rule took; a rule nothing is known of takes what was planned for it."""
    boots = LearnedBoots()
    boots.learn(known.boot)
    scenario = Scenario(
        strategy,
        config.max_vms,
        config.billing,
        boots=LearnedBoots(),
        period=PERIOD,
        real_boots=boots,
        types=tuple(config.types),
        lags=known.lags,
    )
    tasks = TaskList(tuple(_task(job, known) for job in plan))
    return simulate(tasks, scenario).makespan + known.lags.notice


def _task(job: PlannedJob, known: Experience) -> RecordedTask:
    planned = estimate_of(job.planned)
    real = known.walltimes.get(job.rule, planned)
    return RecordedTask(
        job.name, 0.0, planned, real, tuple(job.after), need=job.need, group=job.rule
    )


def _queued_behind(job: _Job, jobs: Iterable[_Job]) -> _Job | None:
    """The job whose end made room for `job` on its VM; None if there was room at its submission."""
    ended = [
        other
        for other in jobs
        if other.node == job.node and other.seen > job.submitted and other.ended <= job.started
    ]
    return max(ended, key=lambda other: other.ended, default=None)


def _releases(run: Observed) -> Iterator[float]:
    """Seconds from the round that saw the last job end which a job waited for to its hand-over."""
    seen = {job.name: job.seen for job in run.jobs.values()}
    received = {job.name: job.received for job in run.jobs.values()}
    for planned in run.plan:
        waited = [seen[name] for name in planned.after if name in seen]
        if waited and planned.name in received:
            yield received[planned.name] - max(waited)


def _mean(values: Sequence[float]) -> float:
    """At least 0, as where there are none: what comes before its cause does so by rounding only."""
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
        for attempt, node, _, _ in line.asked:
            job = self._found.jobs[attempt.rpartition(".")[0]]
            job.node, job.submitted = node, self._now

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
