"""The tasks that Slurm has: what their two witnesses say, and what becomes of each attempt.

One witness is Slurm's state of the job, the other the exit-code file that its script leaves. "Unknown to
Slurm" is neither success nor failure.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from ..bundles import Bundles
from ..model import NEVER, ONLY, PREFER, SPOT, TASK_ENDED, VM, Task, TaskState, VMState
from ..slurm import ClusterUnavailable, ClusterView, JobStatus
from ..slurm.script import TIMED_OUT, Exit, WitnessSilent
from ..slurm.states import JobPhase, advice_on, failure_of, sentence_of
from .desk import Absences, Desk
from .sights import is_reclaim_of

MAX_LOSSES = 3
"""Machines a task may lose before it counts as failed."""

_STUCK_PATIENCE = 10.0
_ABSENT_JOB = 5.0
_LATE_SUBMISSION = 15.0
_SILENT_SCRIPT = 90.0
"""Seconds; network file systems show a new file within 60 (acdirmax of NFS)."""


class Attempts:
    """`submitted` are the tasks that Slurm has, or may have, by attempt."""

    def __init__(
        self,
        desk: Desk,
        witness: Callable[[str], Exit | None],
        revoke: Callable[[str], bool],
        begun: Callable[[str], bool],
        lose: Callable[[VM, str], None],
        take_out: Callable[[VM, str], None],
        look: Callable[[], bool],
        has_answered: Callable[[VM, float], bool],
    ) -> None:
        """`lose` gives up a machine, for a reason, `take_out` gives it no further tasks; `look` asks EC2, and
        is False if it does not answer; `has_answered`: Slurm has heard of a VM since a date."""
        self._desk = desk
        self._witness = witness
        self._revoke = revoke
        self._begun = begun
        self._lose = lose
        self._take_out = take_out
        self._look = look
        self._has_answered = has_answered
        self.bundles = Bundles(witness, revoke, desk.config.exit_file)
        self.submitted: dict[str, Task] = {}
        self.news = desk.now
        self.claims = threading.RLock()
        self._ended: list[Task] = []
        self._absent = Absences()
        self._silent = Absences()
        self._seen_ended: dict[str, float] = {}
        self._stuck: dict[str, float] = {}

    def take_ended(self) -> list[Task]:
        """The tasks that have ended since this was asked last."""
        with self.claims:
            ended, self._ended = self._ended, []
        return ended

    def has_ended(self, task: Task) -> None:
        """`task` is to be told as ended; under `claims`."""
        self._ended.append(task)

    def adopt(self, task: Task, vm: VM) -> None:
        """What was to be taken back when the run was killed still is."""
        vm.active[task.key] = task
        self.submitted[task.attempt_key] = task
        is_waiting = task.state == TaskState.SUBMITTED
        task.recalled |= vm.state in (VMState.TERMINATING, VMState.GONE)
        task.recalled |= vm.state == VMState.DRAINING and is_waiting

    def update(self, view: ClusterView) -> None:
        for key, status in view.jobs.items():
            task = self.submitted.get(key)
            if task is not None:
                self._absent.end(key)
                self._unless_silent(self._update_task, task, status)
        if view.is_complete:
            for key in [key for key in self.submitted if key not in view.jobs]:
                self._unless_silent(self._missing, key, self.submitted[key])
        self._cancel_strays(view)

    def _unless_silent(self, judge: Callable[..., None], *about: object) -> None:
        """What Slurm says of a job is not acted on while the other witness cannot be asked: a later round
        hears both."""
        try:
            judge(*about)
        except WitnessSilent as error:
            self._desk.tell(f"Exit codes cannot be read, waiting for them: {error}")

    def _cancel_strays(self, view: ClusterView) -> None:
        """Submissions that were given up, because no reply came, and arrived all the same."""
        strays = {
            status.slurm_id: key
            for key, status in view.jobs.items()
            if key not in self.submitted and status.phase in (JobPhase.WAITING, JobPhase.RUNNING)
        }
        if strays:
            self._desk.try_cluster(lambda: self._desk.cluster.cancel(strays))

    def _update_task(self, task: Task, status: JobStatus) -> None:
        task.slurm_id = status.slurm_id
        if status.phase != JobPhase.WAITING and task.started is None and status.started is not None:
            task.started = status.started
            self._desk.vm_of(task).has_begun(task, status.started)
            self._desk.changed(self._desk.vm_of(task))
        if status.phase == JobPhase.RUNNING and task.state == TaskState.SUBMITTED:
            task.state = TaskState.RUNNING
            self._desk.books.task(task)
        elif status.phase == JobPhase.SUCCEEDED:
            self._judge_succeeded(task, status)
        elif status.phase == JobPhase.FAILED and not task.recalled:
            task.ended = status.ended
            self._judge_failed(task, status)
        elif status.phase == JobPhase.DISPLACED and not task.recalled:
            self._displaced(task, sentence_of(status.state))
        elif status.phase in (JobPhase.FAILED, JobPhase.DISPLACED, JobPhase.LOST):
            self._replace(task, status)
        elif task.recalled or self._is_launch_lost(task, status):
            self.recall([task])
        elif status.phase == JobPhase.WAITING:
            self._update_waiting(task, status)

    def _judge_succeeded(self, task: Task, status: JobStatus) -> None:
        """Slurm says that the job succeeded. Its script has said so first, be it that a network file system
        shows that later; a slurmctld that lost its last jobs may take the end of another one for it."""
        left = Exit(0) if self._desk.config.slurm_is_true else self.exit_of(task)
        if left is not None:
            task.ended = status.ended
            self._judge(task, left)
        elif self._silent.last(status.key, self._desk.now, _SILENT_SCRIPT):
            why = f"Slurm job {status.slurm_id} succeeded, but its script left no exit code"
            if self._desk.gangs.is_gone(self._desk.vm_of(task)):
                self._rescue(self._desk.vm_of(task), task)
            else:
                self._lose(self._desk.vm_of(task), why)

    def _is_launch_lost(self, task: Task, status: JobStatus) -> bool:
        """Slurm says that the job runs, but its node never heard of it: slurmctld was restarted between
        the two, and may take half an hour to notice. A slow prolog gets more time with every attempt."""
        return (
            status.state == "RUNNING"
            and task.started is not None
            and self._desk.now - task.started > self._desk.config.launch_timeout * task.attempt
            and not self.bundles.holds(task)
            and not self._begun(self._desk.config.exit_file(task))
        )

    def _update_waiting(self, task: Task, status: JobStatus) -> None:
        """A job that ran was put back into the queue by an operator. One that Slurm will not start by
        itself stays ours, but its VM costs money: the user is told once for every rule and reason."""
        if task.state == TaskState.RUNNING:
            task.state, task.started = TaskState.SUBMITTED, None
            self._desk.vm_of(task).recount(self._desk.now)
            self._desk.changed(self._desk.vm_of(task))
            self._desk.books.task(task)
        advice = advice_on(status.reason, status.slurm_id)
        if advice is None:
            self._stuck.pop(task.key, None)
        elif self._desk.now - self._stuck.setdefault(task.key, self._desk.now) >= _STUCK_PATIENCE:
            self._desk.tell(
                f"A job of rule {task.rule} waits on {task.vm} and will not start by itself: Slurm job "
                f"{status.slurm_id}, {status.reason}: {advice}.",
                logging.WARNING,
                about=f"{task.rule} {status.reason.split(',')[0]}",
            )

    def _displaced(self, task: Task, why: str) -> None:
        """Its submission has ended for certain, and its VM is good: the task runs there again, unless its
        script was done by then."""
        left = self.exit_of(task)
        if left is not None:
            self._judge(task, left)
        else:
            self._once_more(self._desk.vm_of(task), task, f"{why}, {_times(task.losses + 1)}")

    def _once_more(self, vm: VM, task: Task, why: str) -> None:
        """Runs `task` again, which was lost without its doing, unless that has happened too often. Spot
        machines taken back are no such loss, as long as the task can do without."""
        is_reclaim = self._is_taken_back(vm)
        if is_reclaim:
            self._count_reclaim(task)
            too_often = task.spot == ONLY and task.reclaims > self._desk.config.reclaims
        else:
            too_often = task.losses + 1 >= MAX_LOSSES
        if too_often or self._desk.is_stopping:
            self.finish(task, TaskState.FAILED, why)
        else:
            task.losses += not is_reclaim
            self.again(vm, task)

    def _count_reclaim(self, task: Task) -> None:
        """One that has lost too many spot machines gets one on demand, if it may."""
        task.reclaims += 1
        if self.has_lost_too_many(task):
            task.spot = NEVER
            self._desk.log.info(
                f"{task.name} has lost {task.reclaims} spot machines; it goes on without."
            )

    def has_lost_too_many(self, task: Task) -> bool:
        """Whether `task` may do without spot machines, and should."""
        return task.reclaims >= self._desk.config.reclaims and task.spot == PREFER

    def _replace(self, task: Task, status: JobStatus) -> None:
        """A submission has ended without the task's doing. Where the machine is the cause, the task waits
        until that is gone: it may still write. One that was taken back may have been done by then."""
        vm, left = self._desk.vm_of(task), self.exit_of(task)
        if self._desk.gangs.is_gone(vm):
            self._rescue(vm, task)
        elif status.phase == JobPhase.LOST:
            self._lose(vm, sentence_of(status.state))
        elif task.recalled and left is not None and left.code == 0:
            self._judge(task, left)
        elif task.recalled and vm.state not in (VMState.TERMINATING, VMState.GONE):
            if self._is_over(vm, task):
                self._after_recall(vm, task)
        else:
            self._lose(vm, sentence_of(status.state))

    def _is_over(self, vm: VM, task: Task) -> bool:
        """Whether nothing of a submission that Slurm calls ended can write any more: on a machine that is cut
        off its script goes on. So each of its nodes must have answered since."""
        if task.started is None:
            return True
        since = self._seen_ended.setdefault(task.attempt_key, self._desk.now)
        return all(self._has_answered(member, since) for member in self._desk.gangs.members(vm))

    def _after_recall(self, vm: VM, task: Task) -> None:
        """Only what had begun has lost something to a machine that EC2 takes back."""
        if task.state == TaskState.RUNNING and self._is_taken_back(vm):
            losses = task.losses + task.reclaims + 1
            self._once_more(vm, task, f"its spot machine was taken back, {_times(losses)}")
        else:
            self.again(vm, task)

    def _is_taken_back(self, vm: VM) -> bool:
        """Whether EC2 takes one of the machines on which its tasks run, or has done so."""
        return any(
            member.market == SPOT and is_reclaim_of(member.reason)
            for member in self._desk.gangs.members(vm)
        )

    def recall(self, tasks: Sequence[Task]) -> None:
        """Takes submissions back, so that none of them can start elsewhere or later; and with them what
        shares a Slurm job that must be cancelled for it. What becomes of their tasks is decided when Slurm
        says that they have ended: the journal knows before that it was us."""
        ending = [task for task in tasks if not self.bundles.shares_job(task)]
        beside = [other for task in ending for other in self.bundles.beside(task)]
        for task in (*tasks, *beside):
            if not task.recalled:
                task.recalled = True
                self._desk.books.task(task)
            self._revoke(self._desk.config.exit_file(task))
        self._desk.flush()
        known = {task.slurm_id: task.submission for task in ending if task.slurm_id is not None}
        if known:
            self._desk.try_cluster(lambda: self._desk.cluster.cancel(known))

    def _missing(self, key: str, task: Task) -> None:
        """Slurm does not know the submission. Unknown is neither success nor failure."""
        left = self.exit_of(task)
        if left is not None:
            task.ended = self._desk.now
            self._judge(task, left)
        elif self._is_gone(key, task):
            vm = self._desk.vm_of(task)
            begun = self._revoke(self._desk.config.exit_file(task))
            if self._desk.gangs.is_gone(vm):
                self._rescue(vm, task)
            elif not begun:
                self.again(vm, task)
            else:
                self._lose(vm, f"Slurm lost its job {task.slurm_id or task.attempt_key}")

    def _is_gone(self, key: str, task: Task) -> bool:
        """Absence counts only when it lasts, and, for a job that Slurm once had, when Slurm says so."""
        patience = _LATE_SUBMISSION if task.slurm_id is None else _ABSENT_JOB
        if not self._absent.last(key, self._desk.now, patience):
            return False
        if task.slurm_id is None:
            return True
        try:
            return not self._desk.cluster.knows(task.slurm_id, task.submission)
        except ClusterUnavailable:
            return False

    def exit_of(self, task: Task) -> Exit | None:
        """How the script of its last attempt ended, as far as that has left it in a file."""
        return self._witness(self._desk.config.exit_file(task))

    def _judge(self, task: Task, left: Exit) -> None:
        if left.code == 0:
            self.finish(task, TaskState.COMPLETE, "")
        elif not self._may_have_lost_a_machine(task):
            self.finish(task, TaskState.FAILED, _told(task, left))
        elif self._desk.gangs.is_gone(self._desk.vm_of(task)):
            self._rescue(self._desk.vm_of(task), task)

    def _may_have_lost_a_machine(self, task: Task) -> bool:
        """Whether a task over several VMs failed because one of them was lost: the ranks on the others notice
        that before Slurm and our next look at EC2."""
        if task.need.nodes == 1:
            return False
        vm = self._desk.vm_of(task)
        return self._desk.gangs.has_lost(vm) or not self._look() or self._desk.gangs.has_lost(vm)

    def _judge_failed(self, task: Task, status: JobStatus) -> None:
        """Slurm says that the job failed. A script that left exit code 0 had done its work by then, unless
        memory ran out: that may have cost it a part of it. A job that was cancelled before its script began
        is no failure of the task: slurmd could not launch it, as where the VM's disk is full."""
        left = self.exit_of(task)
        out_of_memory = status.state == "OUT_OF_MEMORY"
        if left is not None and (
            status.state == "FAILED" or (left.code == 0 and not out_of_memory)
        ):
            self._judge(task, left)
        elif (
            left is None
            and status.state.startswith("CANCELLED")
            and not self._revoked_too_late(task)
        ):
            vm, why = (
                self._desk.vm_of(task),
                f"Slurm cancelled job {status.slurm_id} before it began",
            )
            self._take_out(vm, why)
            self._once_more(vm, task, f"{why}, {_times(task.losses + 1)}")
        else:
            why = failure_of(status.state, status.reason, task.need.memory, task.limit)
            self.finish(task, TaskState.FAILED, why)

    def _revoked_too_late(self, task: Task) -> bool:
        """Forbids its script to begin; whether it had."""
        is_told_by_slurm = self._desk.config.slurm_is_true
        return is_told_by_slurm or self._revoke(self._desk.config.exit_file(task))

    def _rescue(self, vm: VM, task: Task) -> None:
        """A task whose machine went away under it runs again, unless its script was done: a failure may be
        the work of the machine's end."""
        left = self.exit_of(task)
        if left is not None and left.code == 0:
            task.ended = vm.ended
            self._judge(task, left)
        else:
            losses = task.losses + task.reclaims + 1
            why = f"its machine was lost, {_times(losses)} ({vm.reason})"
            self._once_more(vm, task, why)

    def finish(self, task: Task, state: TaskState, reason: str) -> None:
        """Ends a task that Slurm had."""
        self.news = self._desk.now
        self._stuck.pop(task.key, None)
        self.submitted.pop(task.attempt_key, None)
        self._forget(task.attempt_key)
        vm = self._desk.machines.get(task.vm)
        if vm is not None and vm.active.pop(task.key, None) is not None:
            if vm.is_unused:
                vm.idle_since = self._desk.now
            vm.has_ended(task, self._desk.now)
            self._desk.changed(vm)
        if state == TaskState.COMPLETE and task.started is not None:
            took = (task.ended or self._desk.now) - task.started
            self._desk.walltimes.learn(task.rule, task.planned, took)
        self.end(task, state, reason)

    def _forget(self, key: str) -> None:
        self._absent.end(key)
        self._silent.end(key)
        self._seen_ended.pop(key, None)

    def end(self, task: Task, state: TaskState, reason: str) -> None:
        if task.state not in TASK_ENDED:
            with self.claims:
                task.state, task.reason = state, reason
                if task.is_wanted:
                    self._ended.append(task)
            self._desk.is_stopping |= state == TaskState.FAILED and task.ends_run
            self._desk.books.task(task)

    def again(self, vm: VM, task: Task) -> None:
        """A task whose submission is void is planned anew: on its VM while that takes work, else anywhere."""
        with self.claims:
            if not task.is_wanted:
                self.finish(task, TaskState.CANCELLED, "it was not asked for again")
                return
        self.submitted.pop(task.attempt_key, None)
        self._forget(task.attempt_key)
        vm.active.pop(task.key, None)
        task.slurm_id = task.started = task.ended = None
        if vm.is_open:
            task.state = TaskState.SCHEDULED
            vm.queue.appendleft(task)
            vm.recount(self._desk.now)
        else:
            task.state, task.vm = TaskState.PENDING, None
            self._desk.waiting.insert(0, task)
        self._desk.changed(vm)
        self._desk.books.task(task)

    def give_up(self) -> None:
        for task in self.submitted.values():
            if task.started is None and self._begun(self._desk.config.exit_file(task)):
                task.started = self._desk.now
            self.end(task, TaskState.CANCELLED, "the run was ended")
        self.submitted.clear()
        for vm in self._desk.machines:
            vm.active.clear()


def _told(task: Task, left: Exit) -> str:
    """For a person, how a script ended."""
    took = left.ended - left.begun
    if left.code == TIMED_OUT and task.limit is not None and took >= task.limit:
        return failure_of("TIMEOUT", "", task.need.memory, task.limit)
    return f"ended with exit code {left.code}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
