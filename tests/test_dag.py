"""What is read from Snakemake's DAG, and that nothing of it is relied on."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from snakemake_executor_plugin_schlouder.dag import Dag
from snakemake_executor_plugin_schlouder.model import Need, Task


class Job:
    def __init__(self, jobid: int, *before: Job) -> None:
        self.jobid, self.before = jobid, before

    def is_group(self) -> bool:
        return False


class Group:
    def __init__(self, *jobs: Job) -> None:
        self.jobs = frozenset(jobs)

    def is_group(self) -> bool:
        return True


class Site:
    """A DAG of jobs that take 10 s each; counts how often it was asked for walltimes."""

    def __init__(self, *jobs: Job) -> None:
        self.asked = 0
        self.jobs = list(jobs)
        self.snakemakes = SimpleNamespace(dependencies={})
        self.dag = Dag(self.snakemakes, self._walltimes)
        self.add(jobs)

    def add(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self.jobs.append(job)
            if job.before:
                self.snakemakes.dependencies[job] = {each: set() for each in job.before}

    def _walltimes(self) -> dict[Any, float]:
        self.asked += 1
        return dict.fromkeys(self.jobs, 10.0)


def noted(dag: Dag, job: Any, key: str) -> tuple[int, float | None, tuple[str, ...]]:
    task = Task(key, key, "r", key, "s", Need(), "")
    dag.note(job, task)
    return task.level, task.rank, task.after


def test_a_job_gets_level_rank_and_the_tasks_it_waited_for() -> None:
    first, beside = Job(1), Job(2)
    last = Job(3, first, beside)
    site = Site(first, beside, last)
    assert noted(site.dag, first, "k1") == (0, 20, ())
    assert noted(site.dag, beside, "k2") == (0, 20, ())
    assert noted(site.dag, last, "k3") == (1, 10, ("k1", "k2"))
    assert site.asked == 1


def test_jobs_that_ran_elsewhere_are_no_predecessors() -> None:
    here, local = Job(1), Job(2)
    last = Job(3, here, local)
    site = Site(here, last)
    noted(site.dag, here, "k1")
    assert noted(site.dag, last, "k3") == (1, 10, ("k1",))


def test_a_retried_job_is_waited_for_under_its_last_key() -> None:
    first = Job(1)
    last = Job(2, first)
    site = Site(first, last)
    noted(site.dag, first, "k1")
    noted(site.dag, first, "k2")
    assert noted(site.dag, last, "k3")[2] == ("k2",)


def test_a_group_stands_where_its_first_job_does_and_waits_for_nothing_of_its_own() -> None:
    before, first = Job(1), Job(2)
    inner = Job(3, before)
    end = Job(4, inner, first)
    after = Job(5, end)
    site = Site(before, first, inner, end, after)
    noted(site.dag, before, "k1")
    noted(site.dag, first, "k2")
    level, rank, waited = noted(site.dag, Group(inner, end), "k3")
    assert (level, rank, sorted(waited)) == (1, 30, ["k1", "k2"])
    assert noted(site.dag, after, "k4") == (3, 10, ("k3",))


def test_jobs_that_a_checkpoint_adds_are_looked_up_and_remade_ones_recognised() -> None:
    first = Job(1)
    site = Site(first)
    assert noted(site.dag, first, "k1") == (0, 10, ())
    added = Job(2, Job(1))
    site.add([added])
    assert noted(site.dag, added, "k2") == (1, 10, ("k1",))


def test_many_jobs_that_stand_alone_are_looked_up_once() -> None:
    jobs = [Job(number) for number in range(5)]
    site = Site(*jobs)
    for job in jobs:
        assert noted(site.dag, job, "k") == (0, 10, ())
    assert site.asked == 1


def test_without_a_dag_a_job_stands_alone() -> None:
    for dag in (None, SimpleNamespace(), SimpleNamespace(dependencies=3)):
        assert noted(Dag(dag, dict), Job(1), "k") == (0, None, ())
        assert noted(Dag(dag, dict), Group(), "k") == (0, None, ())
        assert noted(Dag(dag, dict), Group(Job(1), Job(2)), "k") == (0, None, ())
