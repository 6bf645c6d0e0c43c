"""The lease of a VM: how long it stays without a word from its owner, and the words that owner leaves.

The owner writes them into the comment of the VM's Slurm node record, which the VM reads with its own Slurm
client: no shared file system and no cloud credentials are needed. The VM counts `seconds` by its own clock
from when it saw the comment change; `written` is for others, who look once (`schlouder gc`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DEFAULT = 600.0
"""Seconds; what a VM whose owner died may cost beyond what was already paid."""

RENEWALS = 4
"""How often a lease is renewed in its time, so that some may be lost."""

NOTICED = 60.0
"""Seconds after its lease, or its last job, within which a VM is gone where units are short."""

_WORDS = re.compile(
    r"\bschlouder run=([A-Za-z0-9_.-]+) lease=([0-9]{1,12}) at=([0-9]{1,12})( kept)?(?!\S)"
)


@dataclass(frozen=True)
class Lease:
    """Given by `run` at `written` (seconds since the epoch, by its clock) for `seconds`. `kept`: the run is
    over, and the VM stays idle for the next one."""

    run: str
    seconds: int
    written: int
    kept: bool = False

    @property
    def until(self) -> int:
        return self.written + self.seconds

    @property
    def text(self) -> str:
        """Another one at every renewal, or the VM would not see it."""
        kept = " kept" if self.kept else ""
        return f"schlouder run={self.run} lease={self.seconds} at={self.written}{kept}"


def parse(comment: str) -> Lease | None:
    """The lease in a node's comment; None: there is none, or not in words of ours."""
    found = _WORDS.search(comment)
    if found is None:
        return None
    run, seconds, written, kept = found.groups()
    return Lease(run, int(seconds), int(written), bool(kept))
