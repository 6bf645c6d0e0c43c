"""A mixed workflow on machines chosen by price, against the exact optimum."""

from __future__ import annotations

import pytest

from bench.choice import JOBS, STRATEGIES, optimum, simulated
from snakemake_executor_plugin_schlouder.market.offers import packed
from snakemake_executor_plugin_schlouder.model import InstanceType

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pulp")

KINDS = [
    InstanceType(f"{family}.{size}", cpus, cpus * ratio * 1024)
    for family, ratio in (("c", 2), ("m", 4), ("r", 8))
    for size, cpus in (("large", 2), ("xlarge", 4), ("2xlarge", 8), ("4xlarge", 16))
]
ALL_ROUNDER = next(kind for kind in KINDS if kind.name == "m.4xlarge")
PRICES = {
    kind.name: kind.cpus * {"c": 0.042, "m": 0.05, "r": 0.063}[kind.name[0]] for kind in KINDS
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_mixed_workflow_costs_hardly_more_than_the_optimum(strategy: str) -> None:
    """The optimum also fills what one rule leaves over of its machines with tasks of another."""
    outcome, used = simulated(strategy, KINDS, PRICES)
    best = optimum(KINDS, PRICES)
    assert outcome.makespan == pytest.approx(660, abs=1)
    assert outcome.usd is not None
    assert best - 1e-6 <= outcome.usd <= 1.15 * best
    assert outcome.usd < (simulated(strategy, [ALL_ROUNDER], PRICES)[0].usd or 0.0)
    assert len(used) > 1


def test_the_optimum_of_what_one_machine_holds_is_its_price() -> None:
    one = InstanceType("all.in.one", 400, 10_000_000)
    assert optimum([one], {one.name: 3.0}) == pytest.approx(3.0 * 660 / 3600)
    assert sum(count for _, count in JOBS.values()) == 130


def test_tasks_of_different_widths_fill_one_machine_together() -> None:
    """14 machines hold them all; as many of the widest as fit, side by side, would take 17."""
    assert packed(ALL_ROUNDER, dict(JOBS.values())) == 14
    outcome, _ = simulated("fastest", [ALL_ROUNDER], PRICES)
    assert outcome.vms <= 15
    assert outcome.makespan == pytest.approx(660, abs=1)
