"""Ten thousand generated histories of a run (`tests/machine.py`), and bugs that are planted to be found.

In shards, each with dice of its own, so that an interrupted command goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.faults.kept import Kept
from bench.rows import Row
from bench.site import ROOT

HERE = Path("build/faults-histories").resolve()
GOAL = 10_000
SHARDS, EACH = 20, 510
"""Some histories of a shard are cut short by hypothesis, as repetitions: they count for less than one."""

AT_ONCE = 2
BUGS = (
    *("forgot intent", "tag later", "terminate by count", "believe NotFound"),
    "report unknown as success",
)
LONGEST = 3600.0
"""Seconds of one shard, with the search for the shortest history that breaks a promise."""


def rows() -> list[Row]:
    kept = Kept(HERE / "kept")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        shards = list(pool.map(lambda number: _shard(kept, number), range(SHARDS)))
    bugs = _planted(kept)
    kept.forget()
    return [_histories(shards), *bugs]


def _shard(kept: Kept, number: int) -> Mapping[str, Any]:
    """What the histories of one shard were made of, and the violation that was found, if any."""
    name = f"shard-{number}"
    found = kept.get(name)
    if found is None:
        done = _run("machine.py", str(number), str(EACH))
        if done.returncode != 0:
            raise RuntimeError(f"histories: {name} did not end well: {done.stderr}")
        found = json.loads(done.stdout.splitlines()[-1])
        kept.put(name, found)
    told = found["violation"] or "no violation"
    print(f"faults: histories | {name} | {found['histories']} | {told}", flush=True)
    return found


def _run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONGEST,
        check=False,
    )


def _histories(shards: Sequence[Mapping[str, Any]]) -> Row:
    total: Counter[str] = Counter()
    for shard in shards:
        total.update({name: n for name, n in shard.items() if name != "violation"})
    violations = [shard["violation"] for shard in shards if shard["violation"]]
    value = (
        f"{total['histories']}: {total['tasks']} tasks, {total['launches']} VMs, {total['kills']} kills, "
        f"{len(violations)} violations"
    )
    ok = total["histories"] >= GOAL and not violations
    return Row("histories: generated, and promises broken", value, f">= {GOAL}, 0 violations", ok)


def _planted(kept: Kept) -> list[Row]:
    found = kept.get("planted")
    if found is None:
        test = str(ROOT / "tests" / "test_properties.py")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-rA", "-k", "planted", test],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LONGEST,
            check=False,
        )
        found = {
            bug: any(_is_passed(line, bug) for line in done.stdout.splitlines()) for bug in BUGS
        }
        kept.put("planted", found)
    missed = [bug for bug in BUGS if not found[bug]]
    value = "; ".join([f"{len(BUGS) - len(missed)}/{len(BUGS)}", *missed])
    return [Row("histories: planted bugs found", value, f"{len(BUGS)}/{len(BUGS)}", not missed)]


def _is_passed(line: str, bug: str) -> bool:
    return line.startswith("PASSED") and line.endswith(f"[{bug}]")
