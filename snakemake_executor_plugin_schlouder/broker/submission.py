"""Hands tasks over to Slurm, each pinned to its VM."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..bundles import slack, take_bundle
from ..model import VM, Task, TaskState, VMState
from ..slurm import ClusterUnavailable, JobRequest, SubmissionRefused, SubmitOutcome
from ..slurm.script import VM_DIRECTORY, BundledJob, bundle_script, vm_log
from .attempts import Attempts
from .desk import Desk


class Submission:
    """`script` writes the one that runs a command and leaves its exit code in a file; `lose` gives up a
    machine."""

    def __init__(
        self,
        desk: Desk,
        attempts: Attempts,
        script: Callable[[str, str, str], str],
        lose: Callable[[VM, str], None],
    ) -> None:
        self._desk = desk
        self._attempts = attempts
        self._script = script
        self._lose = lose

    def submit_ready(self) -> None:
        """Hands over what the VMs have room for; what was not tried stays with its VM."""
        due = self._take_due()
        if not due:
            return
        self._attempts.news = self._desk.now
        tried = 0
        if self._desk.flush():
            outcomes = self._desk.cluster.submit([self._request(vm, tasks) for vm, tasks in due])
            tried = len(outcomes)
            for (vm, tasks), outcome in zip(due, outcomes, strict=False):
                self._take_reply(vm, tasks, outcome)
        for vm, tasks in reversed(due[tried:]):
            for task in reversed(tasks):
                self._attempts.again(vm, task)

    def _take_due(self) -> list[tuple[VM, list[Task]]]:
        """Moves the heads of the VMs' queues to what Slurm has, as far as there is room: what becomes one
        Slurm job each."""
        due = []
        for vm in self._desk.machines.feedable():
            while vm.state == VMState.READY and vm.queue and self._takes_one_more(vm):
                tasks = take_bundle(vm)
                for turn, task in enumerate(tasks):
                    self._hand_over(vm, task, turn)
                    task.submission = tasks[0].attempt_key
                if len(tasks) > 1:
                    self._attempts.bundles.add(tasks)
                due.append((vm, tasks))
            self._desk.machines.fed(vm)
        return due

    def _hand_over(self, vm: VM, task: Task, turn: int) -> None:
        task.attempt += 1
        task.state, task.recalled = TaskState.SUBMITTED, False
        task.turn, task.is_behind = turn, turn > 0
        vm.active[task.key] = task
        vm.idle_since = None
        self._desk.machines.note(vm)
        self._attempts.submitted[task.attempt_key] = task
        self._desk.books.task(task)

    def _takes_one_more(self, vm: VM) -> bool:
        """A task that fits beside the running ones, or else one task ahead."""
        need = vm.queue[0].need
        return vm.has_room(need) or vm.takes_ahead(need.gpus)

    def _take_reply(self, vm: VM, tasks: Sequence[Task], outcome: SubmitOutcome) -> None:
        if isinstance(outcome, ClusterUnavailable):
            self._desk.tell(f"Slurm does not answer, waiting for it: {outcome}")
        elif isinstance(outcome, SubmissionRefused) and "Invalid node name" in str(outcome):
            self._lose(vm, "Slurm no longer has the node")
        for task in tasks:
            if isinstance(outcome, str):
                task.slurm_id = outcome
            elif isinstance(outcome, SubmissionRefused) and vm.is_open:
                self._attempts.finish(task, TaskState.FAILED, f"Slurm refused the job: {outcome}")
            self._desk.books.task(task)

    def _request(self, vm: VM, tasks: Sequence[Task]) -> JobRequest:
        task = tasks[0]
        limits = [each.limit for each in tasks if each.limit is not None]
        return JobRequest(
            key=task.attempt_key,
            run=self._desk.config.job_name,
            node=vm.name,
            script=self._script_of(tasks),
            cpus=task.need.cpus,
            memory=task.need.memory,
            limit=sum(limits) + slack(len(tasks)) if len(limits) == len(tasks) else None,
            workdir=self._desk.config.workdir if self._desk.config.shares_files else VM_DIRECTORY,
            log=self._log_on_vm(tasks),
            partition=self._desk.config.partition,
            options=task.options,
            companions=tuple(vm.name for vm in self._desk.gangs.companions(vm)),
        )

    def _log_on_vm(self, tasks: Sequence[Task]) -> str:
        config, task = self._desk.config, tasks[0]
        if not config.shares_files:
            return vm_log(config.exit_file(task))
        return config.log_file(task) if len(tasks) == 1 else config.bundle_log(task)

    def _script_of(self, tasks: Sequence[Task]) -> str:
        config = self._desk.config
        if len(tasks) == 1:
            return self._script(tasks[0].name, tasks[0].command, config.exit_file(tasks[0]))
        jobs = [
            BundledJob(t.name, t.command, config.log_file(t), config.exit_file(t), t.limit)
            for t in tasks
        ]
        return bundle_script(jobs)
