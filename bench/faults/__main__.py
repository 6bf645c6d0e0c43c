"""`make faults`: every fault of the table, one row a promise, also in build/faults.json.

`FAULT="cloud ..." make faults` shows only these. A command that is interrupted goes on where it was, as long
as the code is the same.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.faults import crowd, everyday, histories, load, matrix
from bench.rows import Row, finish

FAULTS: Mapping[str, Callable[[], list[Row]]] = {
    "cloud": everyday.rows,
    "histories": histories.rows,
    "load": load.rows,
    "crowd": crowd.rows,
}
"""What can be shown alone, by its name, beside the faults of the matrix. Each returns its rows, with `ok`
None where something is missing."""


def main(names: list[str]) -> int:
    known = [*FAULTS, *matrix.names()]
    wrong = [name for name in names if name not in known]
    if wrong:
        print(f"faults: no such fault: {', '.join(wrong)}; there are {', '.join(known)}")
        return 2
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    chosen = names or known
    rows = [row for name in chosen if name in FAULTS for row in FAULTS[name]()]
    rows += matrix.rows([name for name in chosen if name not in FAULTS])
    return finish(rows, Path("build/faults.json"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
