"""Requests slurmctld has answered, as it counts them itself (`sdiag`, its message types)."""

from __future__ import annotations

import re
import subprocess

OWN = "REQUEST_STATS_INFO"
"""What sdiag itself asks."""


def reset() -> None:
    subprocess.run(["sdiag", "--reset"], check=True, capture_output=True)


def counted() -> dict[str, int]:
    """Requests by message type since the last reset."""
    done = subprocess.run(["sdiag"], check=True, capture_output=True, text=True)
    return by_type(done.stdout)


def by_type(text: str) -> dict[str, int]:
    """The section by message type; each request also stands in the one by user."""
    section = text.partition("statistics by message type")[2].partition("\n\n")[0]
    found = re.findall(r"^\s*(\S+)\s+\(\s*\d+\)\s+count:(\d+)", section, re.MULTILINE)
    return {name: int(count) for name, count in found if name != OWN}
