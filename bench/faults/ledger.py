"""What the jobs of a trial have written down (`workflow/job.py`), and what that means."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

SILENCE = 1.0
"""Seconds after the last line of a job that has not ended, from which on it counts as dead."""


@dataclass(frozen=True)
class Attempt:
    """One execution of a job: it lived from `begun` to `last` at least (seconds of time.monotonic), and has
    written its output if it has `ended`."""

    job: str
    name: str
    node: str
    begun: float
    last: float
    ended: bool

    def lives(self, now: float) -> bool:
        return not self.ended and now - self.last < SILENCE


def read(path: Path) -> list[Attempt]:
    """All of them in the order of their begin; a line that a full disk has cut short is skipped."""
    found: dict[str, Attempt] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        known = found.get(entry["attempt"])
        begun = entry["at"] if known is None else known.begun
        found[entry["attempt"]] = Attempt(
            entry["job"],
            entry["attempt"],
            entry["node"],
            begun,
            entry["at"],
            entry["what"] == "end",
        )
    return sorted(found.values(), key=lambda attempt: attempt.begun)


def done(files: Path) -> set[str]:
    """Names of the attempts whose Slurm job came to a good end, by the logs and exit codes in the folders of
    runs below `files`. An attempt has ended a second before."""
    found = set()
    for log in files.glob("*/*.log"):
        number, attempt = log.name.split("-")[0], log.name.split(".")[-2]
        codes = [_text(path) for path in log.parent.glob(f"{number}-*.{attempt}.exit")]
        if [(code or "").split()[:1] for code in codes] == [["0"]]:
            found.update(re.findall(r"^attempt (\S+)$", _text(log) or "", re.MULTILINE))
    return found


def done_twice(attempts: Iterable[Attempt], done: Set[str]) -> list[str]:
    """The jobs of which two attempts are among those that were `done`."""
    jobs = [attempt.job for attempt in attempts if attempt.name in done]
    return sorted({job for job in jobs if jobs.count(job) > 1})


def lived_at_once(attempts: Sequence[Attempt]) -> list[str]:
    """The jobs of which two attempts could write the output at the same time, and where."""
    return [
        f"{one.job} on {one.node} and {other.node}"
        for one, other in combinations(attempts, 2)
        if one.job == other.job and other.begun < one.last and one.begun < other.last
    ]


def lost(directory: Path, expected: Mapping[str, str]) -> list[str]:
    """The outputs (below `directory`) that are not what they must be."""
    return [name for name, text in expected.items() if _text(directory / name) != text]


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
