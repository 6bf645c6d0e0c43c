"""How the cost of a simulation grows: CPU time a task, and what twice the tasks cost."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from bench.rows import Row
from snakemake_executor_plugin_schlouder.model import Billing
from snakemake_executor_plugin_schlouder.prediction import LinearBoots
from snakemake_executor_plugin_schlouder.simulate import Scenario, simulate
from snakemake_executor_plugin_schlouder.tasklist import RecordedTask, TaskList

TASKS, VMS = 100_000, 1000
REPEATS = 2
"""The better of two: machines are noisy, and nothing makes a program faster than it is."""


def scale_rows() -> Iterator[Row]:
    for strategy in ("asap", "afap", "cheapest", "fastest"):
        half, whole = (
            min(_seconds(strategy, count) for _ in range(REPEATS)) for count in (TASKS // 2, TASKS)
        )
        each = whole / TASKS * 1e6
        name = f"simulator, {strategy}, {TASKS:,} tasks on {VMS:,} VMs"
        yield Row(f"{name}: CPU time a task", f"{each:.0f} us", "<= 100 us", each <= 100)
        times = whole / half
        yield Row(f"{name}: time for twice the tasks", f"{times:.2f} x", "<= 2.2 x", times <= 2.2)


def _seconds(strategy: str, count: int) -> float:
    """CPU seconds of this process."""
    tasks = batch(count)
    scenario = Scenario(strategy, VMS, Billing(3600, 0, 50), LinearBoots(60, 0.05))
    begun = time.process_time()
    simulate(tasks, scenario)
    return time.process_time() - begun


def batch(count: int) -> TaskList:
    """Tasks of one to ten minutes that arrive within ten seconds; estimates are 5 % too low on average
    and scatter by 15 %."""
    chance = random.Random(0)
    tasks = []
    for number in range(count):
        estimate = chance.uniform(60, 600)
        real = estimate * chance.lognormvariate(0.05, 0.15)
        tasks.append(RecordedTask(f"task_{number}.mgf", number % 10, estimate, real))
    return TaskList(tuple(tasks))
