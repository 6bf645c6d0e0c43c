"""Predictors believe the users at first, are not swung by two results, and end up unbiased."""

from __future__ import annotations

import math
import random
import time

import pytest

from snakemake_executor_plugin_schlouder.model import DEFAULT_BOOT_TIME, DEFAULT_WALLTIME
from snakemake_executor_plugin_schlouder.prediction import (
    PRIOR_SPREAD,
    LearnedBoots,
    LinearBoots,
    Walltimes,
)


def learned(*pairs: tuple[float | None, float]) -> Walltimes:
    walltimes = Walltimes()
    for estimate, real in pairs:
        walltimes.learn("search", estimate, real)
    return walltimes


def test_estimates_are_believed_before_anything_was_measured() -> None:
    walltimes = Walltimes()
    assert walltimes.expected("search", 70) == 70
    assert walltimes.expected("search", None) == DEFAULT_WALLTIME
    assert walltimes.spread("search") == PRIOR_SPREAD


def test_two_results_do_not_swing_it() -> None:
    assert learned((100, 200), (100, 200)).expected("search", 100) == pytest.approx(140)


def test_many_results_outweigh_the_prior() -> None:
    walltimes = learned(*[(100.0, 120.0)] * 1000)
    assert walltimes.expected("search", 100) == pytest.approx(120, rel=0.01)


def test_what_every_task_costs_at_its_start_is_told_from_what_grows_with_it() -> None:
    """Tasks that all take 80 s more than the users think."""
    walltimes = learned(*[(float(x), x + 80.0) for x in range(50, 550, 5)])
    assert walltimes.expected("search", 0) == pytest.approx(80, rel=0.1)
    assert walltimes.expected("search", 1000) == pytest.approx(1080, rel=0.02)


def test_doubt_grows_away_from_the_estimates_that_were_seen_to_hold() -> None:
    line = learned(*[(500.0 + x % 20, 520.0 + x % 7) for x in range(100)]).line("search")
    assert line is not None
    assert line.spread(50) > 2 * line.spread(510)


def test_sums_are_unbiased_where_single_ratios_are_not() -> None:
    """The mean of real/estimate is 1.5 here; the sum of real walltimes is 1.02 of the estimates."""
    pairs = [(10.0, 20.0), (500.0, 500.0)] * 500
    walltimes = learned(*pairs)
    expected = sum(walltimes.expected("search", estimate) for estimate, _ in pairs)
    assert expected == pytest.approx(sum(real for _, real in pairs), rel=0.001)


def test_without_an_estimate_the_mean_of_the_rule_counts() -> None:
    walltimes = learned((None, 10), (None, 30))
    assert walltimes.expected("search", None) == pytest.approx(20)


def test_rules_are_kept_apart() -> None:
    walltimes = learned(*[(100.0, 200.0)] * 100)
    assert walltimes.expected("plot", 100) == 100
    assert walltimes.knows("search")
    assert not walltimes.knows("plot")


@pytest.mark.parametrize("spread", [0.02, 0.1, 0.5])
def test_the_spread_of_many_results_is_found(spread: float) -> None:
    chance = random.Random(1)
    pairs = [(100.0, 100 * math.exp(chance.gauss(0.3, spread))) for _ in range(2000)]
    assert learned(*pairs).spread("search") == pytest.approx(spread, rel=0.15)


def test_a_task_that_hung_hardly_moves_the_spread() -> None:
    chance = random.Random(1)
    pairs = [(100.0, 100 * math.exp(chance.gauss(0, 0.1))) for _ in range(200)]
    usual, with_hung = learned(*pairs), learned(*pairs, (100.0, 100000.0))
    assert with_hung.spread("search") < 1.1 * usual.spread("search")
    assert with_hung.expected("search", 100) < 1.02 * usual.expected("search", 100)


def test_estimates_of_zero_do_no_harm() -> None:
    walltimes = learned((0, 8), (0, 0))
    assert 0 <= walltimes.expected("search", 0) <= 8


def test_a_hundred_thousand_results_are_cheap() -> None:
    walltimes = Walltimes()
    begun = time.perf_counter()
    for number in range(100_000):
        walltimes.learn("search", 100.0, 90.0 + number % 20)
        walltimes.expected("search", 100.0)
    assert time.perf_counter() - begun < 5


def test_boots_follow_the_rule_until_one_was_measured() -> None:
    assert LearnedBoots().predict(3) == DEFAULT_BOOT_TIME
    assert LearnedBoots(LinearBoots(48, 6)).predict(3) == 72


def test_the_median_miss_corrects_the_rule_so_that_a_hung_boot_changes_nothing() -> None:
    boots = LearnedBoots(LinearBoots(48, 6))
    for booting in range(10):
        boots.learn(48 + 6 * (booting + 1) - 10, booting)
    boots.learn(2000, 0)
    assert boots.predict(4) == 68


def test_predicted_boots_are_never_beyond_the_longest_measured() -> None:
    """A cloud that boots all side by side, where the rule says that they wait for each other."""
    boots = LearnedBoots(LinearBoots(48, 6))
    for booting in range(10):
        boots.learn(33, booting)
    assert boots.predict(200) == 33
    assert boots.predict(0) < boots.predict(1) <= 33
    assert boots.expected(200) > 1000


def test_drawn_boots_scatter_as_the_measured_ones() -> None:
    boots = LearnedBoots(LinearBoots(40, 0))
    for seconds in (30, 40, 90):
        boots.learn(seconds)
    drawn = {boots.draw(0, random.Random(seed)) for seed in range(50)}
    assert drawn == {30, 40, 90}


def test_what_the_rule_adds_for_more_boots_than_were_seen_may_be_scaled() -> None:
    boots = LearnedBoots(LinearBoots(40, 5))
    boots.learn(50, 1)
    chance = random.Random(0)
    assert boots.draw(11, chance) == 100
    assert boots.draw(11, chance, growth=0) == 50
