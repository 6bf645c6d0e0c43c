"""The choice of instance types: a mixed workflow at the prices of a table, against the exact optimum.

100 jobs of 1 CPU and 1 GiB, 20 of 4 CPUs and 8 GiB, 10 of 2 CPUs and 30 GiB, ten minutes each. All run at
once, so that every schedule compared here has the same makespan: one boot and one job. The optimum is that
of a set-covering integer program over all ways to fill a machine of each type.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pulp  # type: ignore[import-untyped]

from bench.rows import Row
from snakemake_executor_plugin_schlouder.market.tables import Table, prices_of, types_of
from snakemake_executor_plugin_schlouder.market.tariff import Tariff
from snakemake_executor_plugin_schlouder.model import Billing, InstanceType, Need
from snakemake_executor_plugin_schlouder.prediction import LinearBoots
from snakemake_executor_plugin_schlouder.simulate import Outcome, Scenario, Simulation
from snakemake_executor_plugin_schlouder.tasklist import RecordedTask, TaskList

PRICES = Path(os.environ.get("PRICES") or "../shared/prices/us-east-1.csv")
JOBS = {"small": (Need(1, 1024), 100), "wide": (Need(4, 8192), 20), "deep": (Need(2, 30720), 10)}
WALLTIME, BOOT = 600.0, 60.0
HOURS_UP = (WALLTIME + BOOT) / 3600
STRATEGIES = ("fastest", "cheapest")


def choice_rows() -> list[Row]:
    """Goal: at most 1.1 times the optimum."""
    names = {name: f"types by price, {name}: total / optimum" for name in STRATEGIES}
    if not PRICES.exists():
        return [Row(name, f"no prices in {PRICES}", "", None) for name in names.values()]
    table = Table("PRICES", PRICES.name, PRICES.read_text())
    prices = prices_of(table, "us-east-1").on_demand
    kinds = [kind for kind in types_of(table) if kind.arch == "x86_64"]
    best, of_type = optimum(kinds, prices), cheapest_type(kinds, prices)
    return [_row(name, strategy, kinds, prices, best, of_type) for strategy, name in names.items()]


def _row(
    name: str,
    strategy: str,
    kinds: Sequence[InstanceType],
    prices: dict[str, float],
    best: float,
    of_type: tuple[str, float],
) -> Row:
    outcome, used = simulated(strategy, kinds, prices)
    assert outcome.usd is not None
    chosen = ", ".join(f"{count} {kind}" for kind, count in used.most_common())
    value = (
        f"{outcome.usd / best:.3f} ({outcome.usd:.3f} / {best:.3f} USD: {chosen}; best single type "
        f"{of_type[0]} {of_type[1]:.3f} USD; makespan {outcome.makespan:.0f} s)"
    )
    same_makespan = math.isclose(outcome.makespan, WALLTIME + BOOT, abs_tol=1.0)
    return Row(name, value, "<= 1.1", same_makespan and outcome.usd <= 1.1 * best)


def simulated(
    strategy: str, kinds: Sequence[InstanceType], prices: dict[str, float]
) -> tuple[Outcome, Counter[str]]:
    """What the broker makes of it, and how many machines of which type it starts."""
    tasks = [
        RecordedTask(f"{rule}_{number}", 0.0, WALLTIME, WALLTIME, need=need)
        for rule, (need, count) in JOBS.items()
        for number in range(count)
    ]
    scenario = Scenario(
        strategy,
        len(tasks),
        Billing(),
        LinearBoots(BOOT, 0.0),
        types=tuple(kinds),
        tariff=Tariff(prices, {}, PRICES.name),
    )
    simulation = Simulation(TaskList(tuple(tasks)), scenario)
    outcome = simulation.run()
    return outcome, Counter(vm.type.name for vm in simulation.broker.vms() if vm.instance_id)


def cheapest_type(kinds: Sequence[InstanceType], prices: dict[str, float]) -> tuple[str, float]:
    """The type on which everything costs least if there may be no other, packed as well as can be."""
    able = [kind for kind in kinds if all(kind.fits(need) for need, _ in JOBS.values())]
    return min(
        ((kind.name, optimum([kind], prices)) for kind in able), key=lambda choice: choice[1]
    )


def optimum(kinds: Sequence[InstanceType], prices: dict[str, float]) -> float:
    """USD that the cheapest set of machines costs on which all jobs run at once."""
    problem = pulp.LpProblem("machines", pulp.LpMinimize)
    filled = [(kind, filling) for kind in kinds for filling in fillings(kind)]
    counts = [pulp.LpVariable(f"n{number}", 0, cat="Integer") for number in range(len(filled))]
    problem += pulp.lpSum(
        prices[kind.name] * count for (kind, _), count in zip(filled, counts, strict=True)
    )
    for place, (_, wanted) in enumerate(JOBS.values()):
        held = (filling[place] * count for (_, filling), count in zip(filled, counts, strict=True))
        problem += pulp.lpSum(held) >= wanted
    problem.solve(pulp.PULP_CBC_CMD(msg=False))
    if pulp.LpStatus[problem.status] != "Optimal":
        raise RuntimeError(f"the integer program is {pulp.LpStatus[problem.status]}")
    return float(pulp.value(problem.objective)) * HOURS_UP


def fillings(kind: InstanceType) -> Iterator[tuple[int, ...]]:
    """How many jobs of each class one machine may run at a time; as many of the first as still fit."""
    (first, _), *others = JOBS.values()
    most = [min(kind.cpus // need.cpus, kind.node_memory // need.memory) for need, _ in others]
    for counts in itertools.product(*(range(count + 1) for count in most)):
        cpus = kind.cpus - sum(n * need.cpus for n, (need, _) in zip(counts, others, strict=True))
        memory = kind.node_memory - sum(
            n * need.memory for n, (need, _) in zip(counts, others, strict=True)
        )
        if cpus >= 0 and memory >= 0:
            yield min(cpus // first.cpus, memory // first.memory), *counts
