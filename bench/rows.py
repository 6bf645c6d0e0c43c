"""Rows of figures: one line each for people, the same as JSON for programs, and an exit code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """`ok` is None where the peer, the data or a library is not there; `value` then says which."""

    name: str
    value: str
    goal: str
    ok: bool | None


def finish(rows: Sequence[Row], path: Path) -> int:
    """Prints and writes the rows; 1 when one falls short."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("name", "value", "goal", ""):
        table.add_column(heading, overflow="fold")
    verdicts = {True: "holds", False: "falls short", None: "not measured"}
    for row in rows:
        table.add_row(row.name, row.value, row.goal, verdicts[row.ok])
    Console(width=120).print(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 1 if any(row.ok is False for row in rows) else 0
