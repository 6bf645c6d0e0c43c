"""`make acceptance`: the figures the strategies and the simulator must reach, one row each.

Recorded runs are read from the folder in TRACES (default ../shared/traces); without them, their rows
say so, and the project's own small task list still shows that the strategies do what they promise.
The rows of live runs need root, as the embedded cloud does.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

from bench.cells import strategy_rows
from bench.choice import choice_rows
from bench.forecasts import forecast_rows
from bench.live import live_rows
from bench.rows import Row, finish
from bench.scale import scale_rows
from snakemake_executor_plugin_schlouder import tasklist
from snakemake_executor_plugin_schlouder.model import Billing
from snakemake_executor_plugin_schlouder.prediction import LinearBoots
from snakemake_executor_plugin_schlouder.replay import Fidelity, Replay, read_runs, replay
from snakemake_executor_plugin_schlouder.simulate import Scenario, simulate

TRACES = Path(os.environ.get("TRACES") or "../shared/traces")
OWN_LIST = Path(__file__).parent / "own.tasks"
HOURS = Billing(3600, 0, 50)


def fidelity_rows() -> list[Row]:
    """Goals: what an independent replay of the same 226 runs reached."""
    names = (
        "OMSSA: VM count as recorded",
        "OMSSA: billed units as recorded",
        "OMSSA: median makespan error",
        "Montage: VM count as recorded",
        "Montage: billed units as recorded",
    )
    if not (TRACES / "runs.csv").exists():
        return [Row(name, f"no recorded runs in {TRACES}", "", None) for name in names]
    replays = [replay(run) for run in read_runs(TRACES / "runs.csv")]
    omssa, montage = _of(replays, "omssa"), _of(replays, "montage")
    return [
        _at_least(names[0], omssa.same_vms, 205, omssa.runs),
        _at_least(names[1], omssa.same_units, 188, omssa.runs),
        Row(
            names[2],
            f"{omssa.median_makespan_error:.5f} ({_worst(replays, 'omssa')})",
            "<= 0.001",
            omssa.median_makespan_error <= 0.001,
        ),
        _at_least(names[3], montage.same_vms, 20, montage.runs),
        _at_least(names[4], montage.same_units, 17, montage.runs),
    ]


def own_rows() -> list[Row]:
    """48 tasks of 60 to 900 s whose estimates are up to a fifth off, 25 VMs, hours."""
    tasks = tasklist.read(OWN_LIST)
    units, makespans = {}, {}
    for name in ("asap", "afap", "one-vm-for-all"):
        outcome = simulate(tasks, Scenario(name, 25, HOURS, LinearBoots(48, 6)))
        units[name], makespans[name] = outcome.units, outcome.makespan
    bound = math.ceil(sum(task.real for task in tasks.tasks) / HOURS.unit)
    return [
        Row(
            "own list: units of afap / the bound",
            f"{units['afap'] / bound:.2f} ({units['afap']} / {bound})",
            "< asap's",
            units["afap"] < units["asap"],
        ),
        Row(
            "own list: makespan of asap / afap's",
            f"{makespans['asap'] / makespans['afap']:.2f}",
            "< 1",
            makespans["asap"] < makespans["afap"],
        ),
        Row(
            "own list: units of one-vm-for-all - the bound",
            str(units["one-vm-for-all"] - bound),
            "<= 1",
            units["one-vm-for-all"] - bound <= 1,
        ),
    ]


def _of(replays: list[Replay], application: str) -> Fidelity:
    return Fidelity.of(replay for replay in replays if replay.run.application == application)


def _at_least(name: str, value: int, goal: int, of: int) -> Row:
    return Row(name, f"{value}/{of}", f">= {goal}", value >= goal)


def _worst(replays: list[Replay], application: str) -> str:
    group = [replay for replay in replays if replay.run.application == application]
    worst = max(group, key=lambda replay: replay.makespan_error)
    return f"worst {worst.makespan_error:.2f}: {worst.run.name}"


if __name__ == "__main__":
    rows = [
        *fidelity_rows(),
        *strategy_rows(TRACES),
        *forecast_rows(TRACES),
        *scale_rows(),
        *own_rows(),
        *choice_rows(),
        *live_rows(),
    ]
    sys.exit(finish(rows, Path("build/acceptance.json")))
