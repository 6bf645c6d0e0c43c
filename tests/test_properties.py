"""A few of the histories of `make faults`, and bugs planted to see that the same machine finds them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from fakes import World
from machine import Cloud, Disk, History, Slurm, Violation, play

from snakemake_executor_plugin_schlouder.model import VM
from snakemake_executor_plugin_schlouder.provision import Instance, LaunchRequest
from snakemake_executor_plugin_schlouder.slurm import (
    ClusterView,
    JobRequest,
    JobStatus,
    SubmitOutcome,
)
from snakemake_executor_plugin_schlouder.slurm.states import JobPhase

HISTORIES = 60
MOST_TO_FIND = 400


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A history has hundreds of warnings."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_whatever_happens_the_promises_hold() -> None:
    play(History, HISTORIES)


class ForgetsIntent(Disk):
    """A machine is written down only when it is there."""

    def write(self, run: str, vms: Iterable[VM] = (), *rows: Any, **more: Any) -> None:
        super().write(run, [vm for vm in vms if vm.instance_id is not None], *rows, **more)


class TagsLater(Cloud):
    """Machines get their tags by a call of its own, after the reply to their launch."""

    def _start(self, request: LaunchRequest) -> Instance:
        started = super()._start(replace(request, run=""))
        self.history.fuse.passes()
        machine = self.world.machines[started.id]
        machine.instance = replace(machine.instance, run=request.run)
        return machine.instance


class TerminatesByCount(Cloud):
    """Ends as many machines as it was told to, the newest ones."""

    def terminate(self, instance_ids: Sequence[str]) -> None:
        alive = [id for id, one in self.world.machines.items() if one.instance.is_alive]
        super().terminate(alive[-len(instance_ids) :] or instance_ids)


class BelievesNotFound(Cloud):
    """What is not listed once is gone."""

    def __init__(self, world: World, history: History) -> None:
        super().__init__(world, history)
        self.seen: dict[str, Instance] = {}

    def instances(self, *runs: str) -> list[Instance]:
        listed = {one.id: one for one in super().instances(*runs)}
        gone = [
            replace(one, state="terminated") for id, one in self.seen.items() if id not in listed
        ]
        self.seen |= listed
        return [*listed.values(), *gone]


class ReportsUnknownAsSuccess(Slurm):
    """A job that Slurm does not know any more has ended well."""

    def __init__(self, world: World, history: History) -> None:
        super().__init__(world, history)
        self.asked: list[JobRequest] = []

    def submit(self, jobs: Sequence[JobRequest]) -> list[SubmitOutcome]:
        self.asked += jobs
        return super().submit(jobs)

    def view(self, run: str, nodes: bool = True) -> ClusterView:
        view = super().view(run, nodes)
        unknown = {
            job.key: JobStatus(job.key, "0", JobPhase.SUCCEEDED, "COMPLETED", "", None, None)
            for job in self.asked
            if job.key not in view.jobs
        }
        return replace(view, jobs={**view.jobs, **unknown})


class WithoutIntent(History):
    journal_of = ForgetsIntent


class WithLateTags(History):
    cloud_of = TagsLater


class WithCounts(History):
    cloud_of = TerminatesByCount


class WithBelief(History):
    cloud_of = BelievesNotFound


class WithoutDoubt(History):
    """And without the other witness, which would deny it."""

    slurm_of = ReportsUnknownAsSuccess
    slurm_is_true = True


PLANTED: dict[str, tuple[type[History], tuple[str, ...]]] = {
    "forgot intent": (WithoutIntent, ("I1",)),
    "tag later": (WithLateTags, ("I1",)),
    "terminate by count": (WithCounts, ("I4", "I3", "I1")),
    "believe NotFound": (WithBelief, ("I1", "I2", "I4", "I5", "I6")),
    "report unknown as success": (WithoutDoubt, ("I5",)),
}
"""Each with the promises of which it breaks one."""


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str) -> None:
    machine, promises = PLANTED[bug]
    with pytest.raises(Violation) as found:
        play(machine, MOST_TO_FIND, shrinks=False)
    assert str(found.value).startswith(promises)
