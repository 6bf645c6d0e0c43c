"""Bundles: several short tasks in one Slurm job, one after the other, with one start of Snakemake.

To the broker every task stays a submission of its own: what Slurm says of a bundle's job is told as if it
had been said of each of its tasks, with the exit-code files that the tasks leave one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from .model import VM, Task, TaskState
from .slurm import ClusterView, JobStatus
from .slurm.script import GRACE, Exit
from .slurm.states import JobPhase

SHORT = 30.0
"""Seconds up to which a task may be bundled: a start of Snakemake costs two to three."""

LENGTH = 60.0
"""Seconds of work that one bundle holds at most, so that little is lost with it."""

START = 60.0
"""Seconds that a bundle's start of Snakemake takes at most, on a VM that has to load all of it first."""

WORTH = 10.0
"""Seconds of work that are worth a start of Snakemake."""


def may_bundle(task: Task) -> bool:
    """Whether the user allows it, and the task is short against a start of Snakemake and runs on one VM."""
    return task.may_bundle and task.need.nodes == 1 and task.walltime <= SHORT


def fair_share(waiting: int, vms: int, least: int) -> int:
    """Of so many waiting tasks, how many a VM takes at a time: half of what it would get in the end, so that
    all VMs end together (guided self-scheduling, Polychronopoulos and Kuck 1987), but `least` that are
    worth a start of Snakemake, if there are as many for everybody."""
    return min(math.ceil(waiting / vms), max(math.ceil(waiting / (2 * vms)), least))


def slack(count: int) -> float:
    """Seconds that a Slurm job of so many tasks may run beyond the sum of their limits."""
    return START + count * GRACE if count > 1 else 0.0


def take_bundle(vm: VM) -> list[Task]:
    """Takes the head of the VM's queue, and what may run in one Slurm job behind it: a slot's share."""
    first = vm.queue.popleft()
    bundle = [first]
    if not may_bundle(first):
        return bundle
    slots = max(1, vm.type.cpus // first.need.cpus)
    share = math.ceil((len(vm.queue) + 1) / slots)
    seconds = first.walltime
    while vm.queue and len(bundle) < share and _goes_with(first, vm.queue[0]):
        seconds += vm.queue[0].walltime
        if seconds > LENGTH:
            break
        bundle.append(vm.queue.popleft())
    return bundle


def _goes_with(first: Task, task: Task) -> bool:
    return may_bundle(task) and task.need == first.need and task.options == first.options


@dataclass
class _Bundle:
    """Tasks with the attempt that was bundled; `reached`: seconds after its begin at which the last one of
    those that have ended did; `status`: what Slurm said last."""

    members: list[tuple[str, Task]]
    reached: float = 0.0
    status: JobStatus | None = None

    def left(self) -> list[Task]:
        """The tasks that have not ended, and were not submitted again."""
        return [
            task
            for attempt, task in self.members
            if task.attempt_key == attempt
            and task.state in (TaskState.SUBMITTED, TaskState.RUNNING)
        ]


class Bundles:
    """What was bundled. `witness` and `revoke` as the broker's, `exit_file` names a task's."""

    def __init__(
        self,
        witness: Callable[[str], Exit | None],
        revoke: Callable[[str], bool],
        exit_file: Callable[[Task], str],
    ) -> None:
        self._witness = witness
        self._revoke = revoke
        self._exit_file = exit_file
        self._bundles: dict[str, _Bundle] = {}
        self._attempts: set[str] = set()

    def add(self, tasks: Sequence[Task]) -> None:
        """These are submitted together, under the key of the first."""
        self._keep(tasks[0].attempt_key, tasks)

    def _keep(self, key: str, tasks: Sequence[Task]) -> None:
        self._bundles[key] = _Bundle([(task.attempt_key, task) for task in tasks])
        self._attempts.update(task.attempt_key for task in tasks)

    def adopt(self, tasks: Iterable[Task]) -> None:
        """These were submitted by another process."""
        jobs: dict[str, list[Task]] = {}
        for task in sorted(tasks, key=lambda task: task.turn):
            jobs.setdefault(task.submission, []).append(task)
        for key, members in jobs.items():
            if members[-1].turn > 0:
                self._keep(key, members)

    def spread(self, view: ClusterView) -> ClusterView:
        """The view with a status of its own for every task of a bundle."""
        if not self._bundles:
            return view
        jobs = dict(view.jobs)
        for key, bundle in list(self._bundles.items()):
            if view.is_complete or key in jobs:
                bundle.status = jobs.get(key)
            status, left = bundle.status, bundle.left()
            phase = None if status is None else status.phase
            if left and status is not None:
                jobs.pop(key, None)
                jobs.update(self._statuses(bundle, status, left))
            elif not left and phase == JobPhase.RUNNING:
                jobs.pop(key, None)
            elif not left and phase != JobPhase.WAITING:
                self._forget(key)
        return replace(view, jobs=jobs)

    def _forget(self, key: str) -> None:
        bundle = self._bundles.pop(key)
        self._attempts.difference_update(attempt for attempt, _ in bundle.members)

    def holds(self, task: Task) -> bool:
        """Whether it was submitted together with others."""
        return task.attempt_key in self._attempts

    def beside(self, task: Task) -> list[Task]:
        """The others of its Slurm job that have not ended."""
        for bundle in self._bundles.values():
            left = bundle.left()
            if any(other is task for other in left):
                return [other for other in left if other is not task]
        return []

    def shares_job(self, task: Task) -> bool:
        """Whether another task runs in the same Slurm job, so that it must not be cancelled."""
        return any(
            other.slurm_id == task.slurm_id and other.state == TaskState.RUNNING
            for bundle in self._bundles.values()
            for _, other in bundle.members
            if other is not task
        )

    def _statuses(
        self, bundle: _Bundle, status: JobStatus, left: Sequence[Task]
    ) -> Iterator[tuple[str, JobStatus]]:
        """As if Slurm spoke of each task. Where it calls the job a success and a file is missing, it says
        nothing of that task. Files are looked for up to the first that is not there."""
        turn = True
        for task in left:
            ended = self._witness(self._exit_file(task)) if turn else None
            told = replace(status, key=task.attempt_key)
            if ended is not None:
                yield told.key, _ended(told, ended)
                bundle.reached = ended.ended
                continue
            task.is_behind = not turn
            unended = self._unended(task, told, bundle.reached)
            if unended is not None:
                yield told.key, unended
            turn = False

    def _unended(self, task: Task, status: JobStatus, reached: float) -> JobStatus | None:
        """What is told of a task that has left no exit code. Where the job failed, those behind the one in
        turn that had not begun run again."""
        unbegun, exit_file = replace(status, started=None), self._exit_file(task)
        if task.recalled and not self._revoke(exit_file):
            return replace(unbegun, phase=JobPhase.FAILED, state="CANCELLED")
        if task.is_behind and status.phase == JobPhase.RUNNING:
            return replace(unbegun, phase=JobPhase.WAITING, state="PENDING")
        if task.is_behind and status.phase == JobPhase.FAILED and not self._revoke(exit_file):
            return replace(unbegun, phase=JobPhase.DISPLACED, state="REQUEUED")
        return None if status.phase == JobPhase.SUCCEEDED else _begun(status, reached)


def _begun(status: JobStatus, after: float) -> JobStatus:
    return replace(status, started=None if status.started is None else status.started + after)


def _ended(status: JobStatus, ended: Exit) -> JobStatus:
    begun, good = status.started or 0.0, ended.code == 0
    return replace(
        status,
        phase=JobPhase.SUCCEEDED if good else JobPhase.FAILED,
        state="COMPLETED" if good else "FAILED",
        started=begun + ended.begun,
        ended=begun + ended.ended,
    )
