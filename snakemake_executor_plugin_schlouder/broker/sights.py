"""What EC2 and Slurm say of a VM, in the words of the table in `lifecycle.py`."""

from __future__ import annotations

import re
from datetime import datetime

from ..provision import Instance
from ..slurm import NodeStatus
from .lifecycle import Machine, Node


def machine_sight(instance: Instance) -> Machine:
    """Of a machine that EC2 lists."""
    if instance.is_alive:
        return Machine.ALIVE
    return Machine.ENDED if instance.state == "terminated" else Machine.ENDING


def stray_sight(instance: Instance) -> Machine:
    """Of one that the record of its VM does not name."""
    return Machine.STRAY if instance.is_alive else Machine.STRAY_ENDED


def node_sight(node: NodeStatus | None) -> Node:
    """Of a node that Slurm was asked for; None: it has none of that name."""
    if node is None:
        return Node.ABSENT
    if node.accepts_jobs:
        return Node.UP
    if node.state.startswith("drain"):
        return Node.DRAINED if node.is_drained else Node.DRAINING
    return {"inval": Node.REFUSED, "down": Node.DOWN}.get(node.state, Node.QUIET)


def reclaimed_by(reason: str) -> float | None:
    """When EC2 takes the machine back, if this reason, which its node gave for its drain, says so."""
    found = re.search(r"spot reclaim at (\S+)", reason)
    if found is None:
        return None
    try:
        return datetime.fromisoformat(found[1]).timestamp()
    except ValueError:
        return None


def is_reclaim_of(reason: str) -> bool:
    """Whether a machine ended for this reason because EC2 took it back."""
    return "Server.SpotInstance" in reason or "spot machine back" in reason


def ended_itself(reason: str) -> bool:
    """Whether a machine powered itself off, as when its lease was over."""
    return "Client.InstanceInitiatedShutdown" in reason
