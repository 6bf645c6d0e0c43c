"""The example workflow on an embedded cloud, recorded, played again, and foretold by the simulator.

VMs have one CPU, and as many are allowed as this machine has CPUs: real VMs do not take the processor
from each other. Each run is foretold from the one before it, which was under another strategy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.rows import Row
from snakemake_executor_plugin_schlouder import recording
from snakemake_executor_plugin_schlouder.localcloud import (
    LocalCloud,
    LocalCloudError,
    Options,
    check_machine,
)
from snakemake_executor_plugin_schlouder.rehearsal import Observed, experience, forecast, observed

STRATEGIES = ("asap", "afap", "cheapest", "fastest")
FIRST = "fastest"
"""The strategy of the run before the first that counts."""

WORKFLOW = Path(__file__).resolve().parents[1] / "example_workflow"
RULES = ("make_input", "decoys", "split", "search", "merge", "plot")
CHUNKS = 6
BOOT_SECONDS = 5.0
MOST_VMS = 6
ERROR_GOAL = 0.1


@dataclass(frozen=True)
class Run:
    """One recorded run of the workflow; `path` is the recording."""

    strategy: str
    path: Path
    lines: list[recording.Line]
    course: Observed


def live_rows() -> list[Row]:
    """Two rows a strategy; the reason in the place of the values where nothing can be measured."""
    missing = _missing()
    if missing:
        return [Row(name, missing, "", None) for s in STRATEGIES for name in _names(s)]
    with tempfile.TemporaryDirectory() as folder:
        options = Options(
            name=f"live-{os.getpid()}",
            boot_seconds=(BOOT_SECONDS, BOOT_SECONDS),
            share=[Path(folder), WORKFLOW],
        )
        with LocalCloud.up(options, attached=True) as cloud:
            return _measured(Path(folder), {**os.environ, **cloud.environment()})


def _missing() -> str:
    try:
        check_machine()
    except LocalCloudError as error:
        return str(error)
    searches = shutil.which("comet-ms") or shutil.which("comet")
    return "" if searches else "no comet-ms: apt install comet-ms"


def _names(strategy: str) -> tuple[str, str]:
    return (
        f"live = simulated: {strategy}, decisions alike",
        f"live: makespan foretold from an earlier run, {strategy}",
    )


def _measured(folder: Path, environment: Mapping[str, str]) -> list[Row]:
    rows: list[Row] = []
    try:
        before = _run(FIRST, folder / "before", environment)
        for strategy in STRATEGIES:
            run = _run(strategy, folder / strategy, environment)
            rows += [_alike(run), _foretold(run, before)]
            before = run
    except RuntimeError as error:
        rows.append(Row("live: every run of the workflow succeeds", str(error), "all", False))
    return rows


def _run(strategy: str, directory: Path, environment: Mapping[str, str]) -> Run:
    directory.mkdir()
    path = directory / "run.jsonl"
    chosen = ", ".join(f"{rule}: {strategy}" for rule in RULES)
    command = [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(WORKFLOW / "Snakefile")),
        *("--directory", str(directory), "--executor", "schlouder", "--jobs", "100"),
        *("--schlouder-max-vms", str(min(MOST_VMS, max(2, os.cpu_count() or 1)))),
        *("--schlouder-instance-types", "m3.medium", "--schlouder-record", str(path)),
        *("--config", f"chunks={CHUNKS}", f"strategies={{{chosen}}}"),
    ]
    done = subprocess.run(
        command,
        env={**environment, "XDG_STATE_HOME": str(directory / "state")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{strategy}: " + "\n".join(done.stdout.splitlines()[-20:]))
    lines = recording.read(path)
    return Run(strategy, path, lines, observed(lines))


def _alike(run: Run) -> Row:
    played = recording.replay_recording(run.path)
    value = f"{played.alike} of {played.decisions}"
    if played.differences:
        value += f"; {played.differences[0]}"
    return Row(_names(run.strategy)[0], value, "all", played.is_identical)


def _foretold(run: Run, before: Run) -> Row:
    config = recording.config_of(run.lines)
    known = experience(before.course)
    simulated = forecast(run.course.plan, config, run.strategy, known)
    live = run.course.makespan
    error = (simulated - live) / live
    return Row(
        _names(run.strategy)[1],
        f"{error:+.1%} ({simulated:.1f} s / {live:.1f} s, from {before.strategy})",
        f"within {ERROR_GOAL:.0%}",
        abs(error) <= ERROR_GOAL,
    )
