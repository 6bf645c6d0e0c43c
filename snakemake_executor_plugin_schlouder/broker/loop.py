"""The one loop: observe, decide, act."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..clock import SteadyClock
from ..journal import Remains
from ..keeping import Shelf
from ..model import TASK_ENDED, VM, Task, TaskState, VMState
from ..pool import Announcement
from ..prediction import BootPredictor, Walltimes
from ..provision import Cloud
from ..slurm import Cluster, ClusterUnavailable, ClusterView
from ..slurm.script import Exit, exit_of, has_begun, job_script, revoke
from .attempts import Attempts
from .claims import Claims
from .desk import CONSISTENCY_WINDOW, BrokerConfig, Desk
from .ending import Ending
from .handover import HandOver
from .keeper import LEAVING, NODE_MOVING, Keeper
from .notebook import Books
from .starting import Starter
from .submission import Submission

_NODES_SELDOM = 5.0
_ASK_OFTEN, _ASK_SELDOM = 2.0, 15.0
_FEW = 4


class Broker:
    """`claim`, `submit`, `tick`, `stop`, `hurry`, `hand_over` and `release` may be called from different
    threads."""

    def __init__(
        self,
        config: BrokerConfig,
        cloud: Cloud,
        cluster: Cluster,
        journal: Books,
        log: logging.Logger,
        clock: Callable[[], float] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        boots: BootPredictor | None = None,
        walltimes: Walltimes | None = None,
        witness: Callable[[str], Exit | None] = exit_of,
        revoke: Callable[[str], bool] = revoke,
        begun: Callable[[str], bool] = has_begun,
        script: Callable[[str, str, str], str] = job_script,
        shelf: Shelf | None = None,
    ) -> None:
        """`witness` reads how a job's script ended from the file it left, None if there is none, and raises
        WitnessSilent where that cannot be told; `revoke`
        forbids the script with this exit-code file to begin, and says whether it has begun, as `begun`
        does; `script` writes one that runs a command and leaves its exit code in a file. `shelf`: where VMs
        wait for the next run; None: none are taken and none are kept."""
        self._clock = clock = clock or SteadyClock()
        self._desk = desk = Desk(config, cloud, cluster, journal, log, clock(), boots, walltimes)
        self._attempts = Attempts(
            *(desk, witness, revoke, begun),
            lose=lambda vm, why: self._keeper.lose(vm, why),
            take_out=lambda vm, why: self._keeper.take_out(vm, why),
            look=lambda: self._keeper.describe(),
            has_answered=lambda vm, since: self._keeper.has_answered(vm, since),
        )
        self._keeper = Keeper(
            desk,
            take=lambda vm, instance: self._starter.take(vm, instance),
            recall=self._attempts.recall,
        )
        self._starter = Starter(desk, self._keeper.close)
        self._submission = Submission(desk, self._attempts, script, self._keeper.lose)
        self._claims = Claims(desk, self._attempts)
        self._ending = Ending(desk, self._attempts, self._keeper, clock, sleep, revoke)
        self._handover = HandOver(desk, self._keeper, shelf, self._ending.cancel_jobs)
        desk.keeps_vms = shelf is not None
        self._lock = threading.RLock()
        self._inbox: list[Task] = []
        self._unwritten: list[Task] = []
        self._released = False
        self._nodes_seen = -math.inf
        self._asked = -math.inf

    # -- what the executor calls

    def expect(self, tasks: Iterable[Announcement]) -> None:
        """Announces tasks that may come, so that machines can be chosen and kept with them in view."""
        self._desk.planner.expect(tasks)

    def adopt(self, left: Remains) -> None:
        """Goes on with what a killed run of this name has left; before the first tick. Dates that are still
        to come are of a clock that was set back since."""
        desk = self._desk
        _date_back([*left.vms, *left.tasks], desk.now)
        desk.vm_count = left.vm_count
        for vm in left.vms:
            if vm.token and vm.instance_id is None:
                until = vm.requested + CONSISTENCY_WINDOW
                desk.orphans_until = max(desk.orphans_until, until)
        desk.gangs.adopt(left.vms)
        for vm in left.vms:
            if vm.state in (VMState.PLANNED, VMState.REQUESTED):
                vm.state, vm.retry_at = VMState.PLANNED, desk.now
            desk.machines.add(vm)
        for task in left.tasks:
            self._claims.adopt(task)
            if task.state not in TASK_ENDED:
                self._attempts.adopt(task, desk.vm_of(task))
        self._attempts.bundles.adopt(self._attempts.submitted.values())
        for vm in left.vms:
            vm.idle_since = desk.now if vm.is_unused else None
            vm.recount(desk.now)
            if vm.leader is None:
                desk.planner.adopt(vm)
            desk.machines.note(vm)

    def take_kept(self) -> list[VM]:
        """Makes VMs that earlier runs have kept this one's, as far as the announced tasks will look for such;
        before the first tick. Returns those that can be used."""
        with self._lock:
            self._desk.now = self._clock()
            return self._handover.take()

    def has_left(self, identity: str) -> bool:
        """Whether a killed run left something that makes one of these results."""
        return self._claims.has_left(identity)

    def claim(self, task: Task, changed: float, is_made: bool) -> Task | None:
        """What a killed run left that makes the same results as `task`: see `Claims`."""
        return self._claims.claim(task, changed, is_made)

    def submit(self, tasks: Sequence[Task]) -> None:
        """Takes over these tasks. They are in the journal when this returns, or, while that cannot be
        written, before anything is done for them."""
        now = self._clock()
        for task in tasks:
            task.received = now
        if not self._desk.books.take(tasks):
            self._unwritten.extend(tasks)
        self._inbox.extend(tasks)

    def stop(self) -> None:
        """No further VM starts, and what Slurm has not got yet is dropped; what runs goes on.
        No VM is kept for the next run."""
        self._desk.is_stopping, self._desk.keeps_vms = True, False

    def tick(self) -> list[Task]:
        """One round. Returns the tasks that ended since the last one; raises nothing that a later
        round may mend."""
        with self._lock:
            self._desk.now = self._clock()
            self._take_inbox()
            view = self._observe()
            self._check_spend()
            if self._desk.is_stopping:
                self._drop_unsubmitted()
            self._place_all()
            self._act(view)
            return self._attempts.take_ended()

    @property
    def is_busy(self) -> bool:
        """Whether anything is going on that the next tick should see soon."""
        waiting = self._inbox or self._desk.waiting or self._claims.is_waiting
        return bool(waiting or self._desk.machines.alive)

    @property
    def has_news(self) -> bool:
        """Whether one of a few submitted tasks has left its exit code. Among many, whose ends come often, it
        is not looked for: they are seen soon enough. Nor is it where Slurm tells of ends as soon."""
        submitted = list(self._attempts.submitted.values())
        is_worth = self._desk.config.asks_seldom and len(submitted) <= _FEW
        return is_worth and any(self._attempts.exit_of(task) is not None for task in submitted)

    def vms(self) -> list[VM]:
        """Every VM there was, in the order of their request."""
        return list(self._desk.machines)

    def next_change(self) -> float:
        """When the passing of time alone makes the next tick act, without any event; infinite: never."""
        desk = self._desk
        if desk.machines.has(*LEAVING):
            return desk.now
        return min(desk.machines.next_retirement(), desk.planner.next_look())

    @property
    def is_written(self) -> bool:
        """Whether the journal has every end of a task that `tick` has returned."""
        return self._desk.books.has_all_tasks

    @property
    def is_released(self) -> bool:
        """Whether every VM of the run, if there was one, was given back."""
        return self._released or not len(self._desk.machines)

    def log_of(self, task: Task) -> Path:
        """Where the output of a task's last attempt is; where it made none, that of its bundle."""
        config = self._desk.config
        own, bundle = Path(config.log_file(task)), Path(config.bundle_log(task))
        return bundle if bundle.exists() and not own.exists() else own

    def exit_file(self, task: Task) -> str:
        """That of a task's last attempt."""
        return self._desk.config.exit_file(task)

    def hurry(self) -> None:
        """The user waits for the end: Slurm is waited for only shortly from now on, also by a round that
        another thread is in. No VM is kept for the next run. Returns at once."""
        self._desk.is_stopping, self._desk.keeps_vms = True, False
        self._desk.cluster.hurry()

    def hand_over(self) -> None:
        """At the normal end of a run, before `release`: idle VMs stay for the next one, as `keep` says."""
        self._desk.is_stopping = True
        with self._lock:
            self._desk.now = self._clock()
            self._handover.give()

    def release(self) -> None:
        """Cancels what still runs and gives every VM back. Idempotent; returns when the cloud has
        confirmed it, or says what it could not do.

        A VM on which somebody else's job runs is kept: nothing of others is ever killed. A journal
        that cannot be written keeps no VM alive.
        """
        desk = self._desk
        desk.is_stopping = True
        with self._lock:
            desk.now = self._clock()
            if desk.is_over or not len(desk.machines):
                return
            self._drop_unsubmitted()
            self._released = self._ending.release()
            desk.is_over = True

    # -- observe

    def _take_inbox(self) -> None:
        desk = self._desk
        for task in self._claims.take_claimed():
            desk.planner.has_come(task)
        while self._unwritten:
            desk.books.task(self._unwritten.pop())
        count = len(self._inbox)
        for task in self._inbox[:count]:
            desk.planner.has_come(task)
            if not self._claims.holds(task):
                desk.waiting.append(task)
        del self._inbox[:count]

    def _observe(self) -> ClusterView | None:
        """Brings VMs and tasks up to what Slurm and EC2 say; None: Slurm says nothing."""
        view = self._view()
        self._keeper.look_at_cloud()
        if view is not None:
            self._keeper.update(view, self._nodes_seen == self._desk.now)
        self._keeper.keep_gangs_together()
        if view is not None:
            self._attempts.update(view)
            self._claims.end_replaced()
            self._keeper.finish(view)
        return view

    def _view(self) -> ClusterView | None:
        desk, bundles = self._desk, self._attempts.bundles
        if desk.is_over or not desk.machines.unsettled:
            return None
        if desk.config.asks_seldom and not self._is_asking_due():
            return bundles.spread(ClusterView(is_complete=False))
        due = desk.now - self._nodes_seen >= _NODES_SELDOM
        nodes = due or desk.machines.has(*NODE_MOVING)
        try:
            view = bundles.spread(desk.cluster.view(desk.config.job_name, nodes))
        except ClusterUnavailable as error:
            desk.tell(f"Slurm does not answer, waiting for it: {error}")
            return None
        self._asked = desk.now
        if nodes:
            self._nodes_seen = desk.now
        return view

    def _is_asking_due(self) -> bool:
        """Whether Slurm has something to tell: a node is on its way, a job has left its exit code, or the
        last answer is old; the older the last news, the longer it holds."""
        desk, attempts = self._desk, self._attempts
        pause = min(_ASK_SELDOM, max(_ASK_OFTEN, (desk.now - attempts.news) / 10))
        if desk.now - self._asked >= pause or desk.machines.has(*NODE_MOVING):
            return True
        return any(
            task.recalled or attempts.exit_of(task) is not None
            for task in attempts.submitted.values()
            if not attempts.bundles.holds(task)
        )

    # -- decide

    def _check_spend(self) -> None:
        desk = self._desk
        if not desk.is_stopping and desk.launcher.is_spent(desk.machines, desk.now):
            desk.is_stopping, desk.why_stopping = True, "--schlouder-max-spend is used up"
            desk.log.error(f"{desk.why_stopping}: nothing further is started; what runs goes on.")

    def _drop_unsubmitted(self) -> None:
        desk = self._desk
        self._take_inbox()
        dropped = [*desk.waiting, *self._claims.drop(), *desk.planner.take_backlog()]
        desk.waiting.clear()
        for vm in desk.machines:
            dropped += vm.queue
            vm.queue.clear()
            desk.changed(vm)
        for task in dropped:
            self._attempts.end(task, TaskState.CANCELLED, f"not started: {desk.why_stopping}")

    def _place_all(self) -> None:
        """Has every waiting task planned, and takes note of the outcome."""
        desk = self._desk
        refusal, alive = desk.launcher.refusal, desk.machines.alive
        room = 0 if desk.is_stopping or refusal else desk.config.max_vms - alive
        plan = desk.planner.place(desk.waiting, desk.now, room, refusal, alive)
        desk.waiting = plan.left
        for leader in plan.started:
            for vm in desk.gangs.assemble(leader, desk.new_vm):
                desk.machines.add(vm)
        for task in plan.assigned:
            desk.machines.note(desk.vm_of(task))
            desk.books.task(task)
        for task, reason in plan.failed:
            self._attempts.end(task, TaskState.FAILED, reason)
        if plan.broken:
            desk.is_stopping, desk.why_stopping = True, plan.broken
            desk.log.error(f"{plan.broken}. Nothing further is started; what runs goes on.")

    # -- act

    def _act(self, view: ClusterView | None) -> None:
        """Nothing is begun that the journal does not know."""
        if self._desk.flush():
            self._starter.launch_planned()
            if view is not None:
                self._submission.submit_ready()
        if view is not None:
            self._keeper.retire_idle()
            self._keeper.renew_leases()
        self._desk.flush()


def _date_back(left: Iterable[VM | Task], now: float) -> None:
    for of in left:
        for name in ("requested", "ready", "started", "ended"):
            date = getattr(of, name, None)
            if date is not None and date > now:
                setattr(of, name, now)
