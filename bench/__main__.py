"""`make bench`: all measurements, one row a figure, also in build/bench.json; half an hour.

Every single run is in build/bench-runs.json.

`python -m bench PART...` measures only these parts: one, chain, many, start, submission, memory.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from bench import comparison, memory, node_start, submission, table
from bench.rows import Row, finish
from bench.runs import Results, Workload
from bench.site import Site, running_site

WORKLOADS = {"one": comparison.ONE, "chain": comparison.CHAIN, "many": comparison.MANY}
OTHERS = {"start": node_start.rows, "submission": submission.rows}
PARTS = (*WORKLOADS, *OTHERS, "memory")


def main(parts: list[str]) -> int:
    wrong = [part for part in parts if part not in PARTS]
    if wrong:
        print(f"bench: no such part: {', '.join(wrong)}; there are {', '.join(PARTS)}")
        return 2
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    chosen = parts or list(PARTS)
    rows = memory.rows() if "memory" in chosen else []
    with running_site() as site:
        rows = [*on_site(site, chosen), *rows]
    return finish(rows, Path("build/bench.json"))


def on_site(site: Site, chosen: list[str]) -> list[Row]:
    measured: dict[Workload, Results] = {}
    rows: list[Row] = []
    for workload in (WORKLOADS[part] for part in chosen if part in WORKLOADS):
        measured[workload] = comparison.measured(site, workload)
        rows += comparison.rows(workload, measured[workload])
    for part in chosen:
        if part in OTHERS:
            rows += OTHERS[part](site)
    if measured:
        table.finish(measured, Path("build/bench-runs.json"))
    return rows


sys.exit(main(sys.argv[1:]))
