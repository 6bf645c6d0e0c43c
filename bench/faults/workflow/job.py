"""A job that writes down what it does: `job.py LEDGER GATE FREE SECONDS OUTPUT [INPUT ...]`.

Standard library only.
One line of JSON in the ledger when it begins, another one ten times a second while it lives, one when it has
written its output. It also marks its output all the time, so that two attempts at once would spoil it. While
the file GATE exists only the first FREE jobs to begin come to their end. Times are of the clock that all VMs
of a machine share and nobody sets.
"""

import json
import os
import sys
import time
from pathlib import Path

BEAT = 0.1


def result(output: Path, inputs: list[Path]) -> str:
    """What the output must hold: its name, and what its inputs hold."""
    return "".join([f"{output.name}\n", *(path.read_text() for path in inputs)])


def passes(gate: str, free: int) -> bool:
    """Whether a ticket is left."""
    for number in range(free):
        try:
            os.close(os.open(f"{gate}.{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return True
    return False


def main(ledger: str, gate: str, free: str, seconds: str, output: str, *inputs: str) -> None:
    begun, node = time.monotonic(), os.environ.get("SLURMD_NODENAME", "")
    line = {"job": output, "node": node, "attempt": f"{node}:{os.getpid()}:{begun:.6f}"}
    book = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def note(what: str) -> None:
        text = json.dumps({**line, "what": what, "at": time.monotonic()})
        os.write(book, text.encode() + b"\n")

    # In the log of its Slurm job, beside which the exit code of that is.
    print(f"attempt {line['attempt']}", flush=True)
    note("begin")
    is_held = not passes(gate, int(free))
    with Path(output).open("w") as file:
        while time.monotonic() < begun + float(seconds) or (is_held and Path(gate).exists()):
            time.sleep(BEAT)
            note("beat")
            file.write(".")
            file.flush()
        file.seek(0)
        file.truncate()
        file.write(result(Path(output), [Path(name) for name in inputs]))
    note("end")


if __name__ == "__main__":
    main(*sys.argv[1:])
