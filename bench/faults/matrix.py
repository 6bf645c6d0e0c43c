"""The fault matrix: all faults, some at a time, each in a process and on a cloud of its own."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.faults import disk, ec2, kills, process, slurm, vm
from bench.faults.fault import RESUMES, Fault, Result, run
from bench.faults.kept import Kept
from bench.faults.place import GRACE
from bench.rows import Row
from snakemake_executor_plugin_schlouder.localcloud import LocalCloudError, check_machine
from snakemake_executor_plugin_schlouder.settings import ExecutorSettings

HERE = Path("build/faults-matrix").resolve()
FAULTS: Mapping[str, Fault] = {
    **process.FAULTS,
    **slurm.FAULTS,
    **ec2.FAULTS,
    **vm.FAULTS,
    **disk.FAULTS,
}
AT_ONCE = 2
NOTHING = "lost 0, twice 0, two live 0, left 0, foreign 0"


def names() -> list[str]:
    return [kills.NAME, *FAULTS]


def rows(chosen: Sequence[str]) -> list[Row]:
    results = _results(chosen)
    _show([results[name] for name in chosen if name in results])
    return [_row(name, results.get(name)) for name in chosen]


def _pieces(name: str) -> list[str]:
    """What can be done, and kept, each by itself."""
    return [f"{name}-{n}" for n in range(kills.SHARDS)] if name == kills.NAME else [name]


def _row(name: str, result: Result | None) -> Row:
    expected = RESUMES if name == kills.NAME else FAULTS[name].expected
    goal = f"{expected}; {NOTHING}"
    if result is None:
        return Row(name, _missing(name) or "not run", goal, None)
    counted = ", ".join(f"{what} {len(found)}" for what, found in _bad(result).items())
    value = "; ".join(filter(None, [result.outcome, counted, result.wrong, *result.notes]))
    return Row(name, f"{value}; {result.seconds:.0f} s", goal, result.holds)


def _bad(result: Result) -> dict[str, Sequence[str]]:
    return {
        "lost": result.lost,
        "twice": result.twice,
        "two live": result.at_once,
        "left": [*result.left, *result.launched_twice],
        "foreign": result.touched,
    }


def _missing(name: str) -> str:
    try:
        check_machine()
    except LocalCloudError as error:
        return str(error)
    if name in FAULTS and (lacks := FAULTS[name].missing()):
        return lacks
    is_leased = name in FAULTS and FAULTS[name].leased
    knows_leases = any(field.name == "lease" for field in dataclasses.fields(ExecutorSettings))
    return "no setting --schlouder-lease" if is_leased and not knows_leases else ""


def _results(chosen: Sequence[str]) -> dict[str, Result]:
    """Of all that can be struck here. What an interrupted command has left is not repeated."""
    kept = Kept(HERE / "kept")
    pieces = {name: _pieces(name) for name in chosen if not _missing(name)}
    _strike([one for all_ in pieces.values() for one in all_ if kept.get(one) is None])
    found = {name: [kept.get(one) for one in all_] for name, all_ in pieces.items()}
    whole = {name: [one for one in all_ if one] for name, all_ in found.items() if all(all_)}
    if len(whole) == len(pieces):
        kept.forget()
    return {name: _result(name, all_) for name, all_ in whole.items()}


def _result(name: str, found: Sequence[dict[str, Any]]) -> Result:
    if name == kills.NAME:
        return kills.total([Result(**one) for piece in found for one in piece["kills"]])
    return Result(**found[0])


def _strike(names: Sequence[str]) -> None:
    """Each in a process of its own, which ends with this one."""
    waiting, running = list(names), dict[str, subprocess.Popen[bytes]]()
    try:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                name = waiting.pop(0)
                running[name] = subprocess.Popen(
                    [sys.executable, "-m", "bench.faults.matrix", name]
                )
            running = {name: one for name, one in running.items() if one.poll() is None}
            time.sleep(0.2)
    finally:
        for one in running.values():
            one.send_signal(signal.SIGTERM)
        for one in running.values():
            one.wait(2 * GRACE)


def _show(results: Sequence[Result]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    headings = (
        *("fault", "expected", "result", "s", "lost", "run twice", "two live", "VMs left"),
        *("foreign touched", ""),
    )
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for result in results:
        counts = [str(len(found)) for found in _bad(result).values()]
        remarks = "; ".join(filter(None, [result.wrong, *result.notes]))
        table.add_row(
            *(result.name, result.expected, "as expected" if result.holds else result.outcome),
            *(f"{result.seconds:.0f}", *counts, remarks),
        )
    Console(width=170).print(table)


def strike_one(name: str) -> None:
    """In this process; the result is kept, and told in one line."""
    directory, cloud = HERE / name, f"faults-{os.getpid()}"
    shutil.rmtree(directory, ignore_errors=True)
    if name in FAULTS:
        result = run(FAULTS[name], directory, cloud)
        found = result.to_json()
    else:
        each = kills.shard(int(name.rpartition("-")[2]), directory, cloud)
        found = {"kills": each}
        result = kills.total([Result(**one) for one in each])
    Kept(HERE / "kept").put(name, found)
    verdict = "as expected" if result.holds else "FALLS SHORT"
    bad = [f"{what}: {found}" for what, found in _bad(result).items() if found]
    line = [f"faults: {name}", verdict, f"{result.seconds:.0f} s", result.outcome, result.wrong]
    print(" | ".join(filter(None, [*line, *bad, *result.notes])), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    strike_one(sys.argv[1])
