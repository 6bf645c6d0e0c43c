"""Where jobs stand in Snakemake's DAG.

The DAG is no part of the executor interface: whatever of it is missing or unlike what is expected is
left out, and a job of which nothing is known counts as standing alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .model import Task
from .order import Place, places


class Dag:
    """`walltimes` tells what the jobs that are still to run are taken to need (s). Places are looked up
    anew when an unknown job comes, as after a checkpoint."""

    def __init__(self, dag: Any, walltimes: Callable[[], Mapping[Any, float]]) -> None:
        self._dag = dag
        self._walltimes = walltimes
        self._places: dict[Any, Place] = {}
        self._keys: dict[Any, str] = {}

    def note(self, job: Any, task: Task) -> None:
        """Sets the place of `task`, which stands for `job`, and remembers it for those that wait for it.
        A group stands where its first job does, and has the rank of the way through all of them."""
        members = members_of(job)
        self._look_up(members)
        found = [self._places[member] for member in members]
        task.level = min((place.level for place in found), default=0)
        task.rank = max((place.rank for place in found), default=0.0) or None
        task.after = self._after(members)
        for member in members:
            self._keys[_number(member)] = task.key

    def _look_up(self, jobs: list[Any]) -> None:
        if all(job in self._places for job in jobs):
            return
        walltimes = self._walltimes()
        try:
            found = places(dependencies(self._dag), lambda job: walltimes.get(job, 0.0))
        except RuntimeError:  # it grew meanwhile
            found = {}
        alone = {job: Place(0, seconds) for job, seconds in walltimes.items()}
        self._places = {**dict.fromkeys(jobs, Place(0, 0.0)), **alone, **found}

    def _after(self, members: list[Any]) -> tuple[str, ...]:
        """The tasks that were waited for; jobs of a group do not wait for each other."""
        inside, waits = set(members), dependencies(self._dag)
        before = [each for member in members for each in waits.get(member, ())]
        keys = [self._keys.get(_number(each)) for each in before if each not in inside]
        return tuple(dict.fromkeys(key for key in keys if key is not None))


def members_of(job: Any) -> list[Any]:
    """The jobs of a group; a job alone."""
    return list(getattr(job, "jobs", ())) if job.is_group() else [job]


def dependencies(dag: Any) -> Mapping[Any, Mapping[Any, Any]]:
    """What each job waits for, as far as Snakemake tells."""
    found = getattr(dag, "dependencies", None)
    return found if isinstance(found, Mapping) else {}


def _number(job: Any) -> Any:
    """Snakemake's id of a job; it stays when a checkpoint has the job made anew."""
    try:
        return job.jobid
    except (AttributeError, KeyError):
        return job
