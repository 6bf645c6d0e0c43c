"""`python -m bench.faults.watched FILE ARGUMENTS`: Snakemake, with every round of the broker measured.

FILE gets one line a round: seconds it took, seconds of CPU of this thread, resident memory in KiB, tasks that
have ended so far.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from snakemake.cli import main

from snakemake_executor_plugin_schlouder.broker import Broker
from snakemake_executor_plugin_schlouder.model import Task


def watch(path: Path) -> None:
    """From now on."""
    tick, ended = Broker.tick, 0
    output = path.open("w", buffering=1)

    def measured(broker: Broker) -> list[Task]:
        nonlocal ended
        begun, used = time.perf_counter(), time.thread_time()
        tasks = tick(broker)
        ended += len(tasks)
        took, used = time.perf_counter() - begun, time.thread_time() - used
        print(took, used, _resident(), ended, file=output)
        return tasks

    Broker.tick = measured  # type: ignore[assignment, method-assign]


def _resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1])


if __name__ == "__main__":
    watch(Path(sys.argv[1]))
    main(sys.argv[2:])
