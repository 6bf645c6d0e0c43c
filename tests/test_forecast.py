"""Forecasts: the same every time, honest about what is not known, and blind to what they predict."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from snakemake_executor_plugin_schlouder.forecast import (
    Contention,
    Forecast,
    Interval,
    Knowledge,
    PastRun,
    forecast,
    rule_of,
)
from snakemake_executor_plugin_schlouder.model import Billing
from snakemake_executor_plugin_schlouder.prediction import LearnedBoots, LinearBoots, Walltimes
from snakemake_executor_plugin_schlouder.simulate import Scenario, simulate
from snakemake_executor_plugin_schlouder.tasklist import RecordedBoot, RecordedTask, TaskList

BOOTS = LinearBoots(40, 0)
SCENARIO = Scenario("one-vm-for-all", 5, Billing(3600, 0, 50), BOOTS)


def batch(*reals: float, estimate: float = 100, computing: float | None = None) -> TaskList:
    tasks = tuple(
        RecordedTask(f"chunk_{n}.mgf", 0, estimate, real, (), computing)
        for n, real in enumerate(reals)
    )
    return TaskList(tasks, (RecordedBoot(40, lag=2),))


def past(tasks: TaskList, strategy: str = "one-vm-for-all") -> PastRun:
    outcome = simulate(tasks, replace(SCENARIO, strategy=strategy))
    return PastRun(tasks, outcome.makespan, BOOTS)


def predicted(tasks: TaskList, knowledge: Knowledge, seed: int = 0) -> Forecast:
    return forecast(tasks, SCENARIO, knowledge, iterations=20, seed=seed)


SUBMITTED = batch(*[100] * 6)
BEFORE = Knowledge.of([past(batch(*[150] * 6)), past(batch(*[160] * 6))], BOOTS)


def test_the_same_seed_gives_the_same_forecast() -> None:
    assert predicted(SUBMITTED, BEFORE, 7) == predicted(SUBMITTED, BEFORE, 7)
    assert predicted(SUBMITTED, BEFORE, 7) != predicted(SUBMITTED, BEFORE, 8)


def test_real_walltimes_of_the_run_itself_are_not_looked_at() -> None:
    assert predicted(batch(*[999] * 6), BEFORE) == predicted(SUBMITTED, BEFORE)


def test_predictors_of_the_scenario_learn_nothing_from_a_forecast() -> None:
    boots = LearnedBoots()
    forecast(SUBMITTED, replace(SCENARIO, boots=boots), BEFORE, iterations=3)
    assert vars(boots) == vars(LearnedBoots())


def test_what_a_task_took_before_is_expected_again() -> None:
    makespan = predicted(SUBMITTED, BEFORE).makespan
    assert makespan.median == pytest.approx(42 + 6 * 155, rel=0.03)
    assert makespan.holds(42 + 6 * 155)
    assert makespan.high - makespan.low < 0.25 * makespan.median


def test_other_tasks_of_a_known_rule_are_expected_with_its_bias() -> None:
    others = replace(SUBMITTED, tasks=tuple(replace(t, name=f"x{t.name}") for t in SUBMITTED.tasks))
    known = Knowledge.of([past(batch(*[200] * 100))], BOOTS)
    makespan = predicted(others, known).makespan
    assert makespan.median == pytest.approx(42 + 6 * 200, rel=0.1)


def test_without_history_the_interval_is_wide_around_the_estimates() -> None:
    makespan = predicted(SUBMITTED, Knowledge()).makespan
    assert makespan.low < 0.6 * makespan.median
    assert makespan.high > 1.6 * makespan.median
    assert makespan.median == pytest.approx(60 + 600, rel=0.15)


def test_a_history_of_rules_alone_narrows_it() -> None:
    walltimes = Walltimes()
    for _ in range(100):
        walltimes.learn("mgf", 100, 100)
    makespan = predicted(SUBMITTED, Knowledge(walltimes)).makespan
    assert makespan.high - makespan.low < 0.3 * makespan.median


def test_another_platform_tells_which_tasks_are_longer_but_not_how_long() -> None:
    uneven = past(batch(100, 300, 200))
    elsewhere = Knowledge.of([uneven], BOOTS, trust=0.0)
    assert elsewhere.expected(batch(1, 1, 1), 1) == pytest.approx([50, 150, 100])
    half = Knowledge.of([uneven], BOOTS, trust=0.5)
    at_once = half.contention.concurrency
    assert sum(half.expected(batch(1, 1, 1), at_once)) == pytest.approx(300 * math.sqrt(2))


def test_doubt_widens_the_interval() -> None:
    sure, unsure = BEFORE, replace(BEFORE, doubt=0.2)
    width = [
        f.makespan.high - f.makespan.low for f in (predicted(SUBMITTED, k) for k in (sure, unsure))
    ]
    assert width[1] > 2 * width[0]


def test_what_waited_for_others_is_shorter_when_less_runs_at_once() -> None:
    contention = Contention(share=0.5, concurrency=10)
    assert contention.factor(10) == 1
    assert contention.factor(20) == 1.5
    assert contention.factor(1) == pytest.approx(0.55)


def test_walltimes_beyond_computing_and_estimate_were_waiting_for_others() -> None:
    wide = past(batch(*[200] * 5), "one-vm-per-job")
    assert Knowledge.of([wide], BOOTS).contention.share == pytest.approx(0.5)
    computing = past(batch(*[80] * 5, computing=60), "one-vm-per-job")
    assert Knowledge.of([computing], BOOTS).contention.share == pytest.approx(0.25)


def test_a_run_side_by_side_predicts_one_after_the_other() -> None:
    """5 tasks of 100 s took 200 s, as 4.1 of them shared a server; one VM runs 0.9 at once."""
    wide = past(batch(*[200] * 5), "one-vm-per-job")
    alone = predicted(batch(*[100] * 5), Knowledge.of([wide], BOOTS)).makespan
    share = wide.concurrency
    assert alone.median == pytest.approx(42 + 500 * (1 + 0.9 / share), rel=0.05)


def test_tasks_that_hung_in_one_run_keep_their_share_and_hang_as_often_again() -> None:
    runs = [past(batch(*[100] * 20)), past(batch(*[100] * 19, 2000)), past(batch(*[100] * 20))]
    known = Knowledge.of(runs, BOOTS)
    expected = known.expected(runs[0].tasks, runs[0].concurrency)
    assert expected[0] == expected[19]
    drawn = [
        expected[0] * math.exp(known.deviation(runs[0].tasks.tasks[0], random.Random(seed)))
        for seed in range(1000)
    ]
    assert {round(walltime, -1) for walltime in drawn} == {100, 2000}
    assert sum(drawn) / len(drawn) == pytest.approx(expected[0], rel=0.2)


def test_the_cost_is_counted_in_units_and_seconds() -> None:
    made = predicted(batch(*[100] * 60), BEFORE)
    assert made.billed.median == 3600 * made.units.median
    assert made.units.median >= 2


def test_an_interval_holds_95_percent_of_what_was_drawn() -> None:
    chance = random.Random(1)
    interval = Interval.of([chance.gauss(0, 1) for _ in range(5000)])
    assert interval.low == pytest.approx(-1.96, abs=0.15)
    assert interval.high == pytest.approx(1.96, abs=0.15)
    assert interval.holds(0)
    assert not interval.holds(4)


@pytest.mark.parametrize(
    ("name", "rule"),
    [("F025715DA_1.mgf", "mgf"), ("2mass_pleiades_h_1x1_project_0_9", "project"), ("17", "17")],
)
def test_a_task_belongs_to_the_rule_its_name_ends_with(name: str, rule: str) -> None:
    assert rule_of(name) == rule
