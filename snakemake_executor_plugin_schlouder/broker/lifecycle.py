"""The life of a VM as one table: what our record says, what EC2 says of the machine, what Slurm says of the
node, and how long that has lasted, make one action. Pure: no clock, no I/O, nothing remembered.

    planned -> requested -> booting -> ready -> draining -> terminating -> gone

At the end of a run a ready VM may be handed over to the next one, for which it is ready from the beginning.

Every row holds just after a cold restart too, for a record is written before anything is done about it. What
was done once is not done again: after its action a VM is in a state in which the same sight asks for no more
than waiting, or for a question that may be repeated (a launch under its token, an end by its id).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import NamedTuple

from ..model import VMState


class Machine(StrEnum):
    """What EC2 says. `stray`: a machine that was started for the VM and is not the one in its record."""

    UNSEEN = auto()
    ABSENT = auto()
    ALIVE = auto()
    ENDING = auto()
    ENDED = auto()
    STRAY = auto()
    STRAY_ENDED = auto()


class Node(StrEnum):
    """What Slurm says. `quiet`: it has the node, which does not answer; `refused`: it has less than was
    declared for it."""

    UNSEEN = auto()
    ABSENT = auto()
    QUIET = auto()
    UP = auto()
    DRAINING = auto()
    DRAINED = auto()
    REFUSED = auto()
    DOWN = auto()


class Action(StrEnum):
    """What is to be done about a VM."""

    WAIT = auto()
    ASK = auto()
    TAKE = auto()
    BOOK = auto()
    END_STRAY = auto()
    JOIN = auto()
    FAIL_BOOT = auto()
    TAKE_OUT = auto()
    RECALL = auto()
    LOSE = auto()
    DRAIN = auto()
    DRAIN_AGAIN = auto()
    MIND_GUEST = auto()
    END = auto()
    CLOSE = auto()
    FORGET = auto()


class Sight(NamedTuple):
    """All that counts of one VM in one round. What was not looked at has the value that asks for nothing.

    `is_wanted`: something is planned for it or may come; `may_have_come`: it was asked for and not answered,
    and Describe may not show its machine yet; `is_known`: the record has an instance id; `is_taken_back`: EC2
    ends a spot machine, as it says itself or as its node says in the reason of its drain; `boots_for`:
    seconds since it was requested, of `boot_timeout`; `retires`: it is idle and its date has come; `is_used`:
    a task of ours is there; `is_left_to_ec2`: which is about to end it without charge; `is_overdue`: its end
    was asked for in vain, or not at all; `is_bound`: Slurm still has jobs that are pinned to it; `has_node`:
    Slurm may have a record of it."""

    state: VMState
    machine: Machine = Machine.UNSEEN
    node: Node = Node.UNSEEN
    is_wanted: bool = True
    may_have_come: bool = False
    is_known: bool = True
    is_taken_back: bool = False
    boots_for: float = 0.0
    boot_timeout: float = float("inf")
    retires: bool = False
    is_used: bool = False
    is_left_to_ec2: bool = False
    is_overdue: bool = False
    is_bound: bool = False
    has_node: bool = False


Condition = Callable[[Sight], bool]


def unwanted(sight: Sight) -> bool:
    return not sight.is_wanted


def surely_not_started(sight: Sight) -> bool:
    return not sight.may_have_come


def without_machine(sight: Sight) -> bool:
    return not sight.is_known


def taken_back(sight: Sight) -> bool:
    return sight.is_taken_back


def boots_too_long(sight: Sight) -> bool:
    return sight.boots_for > sight.boot_timeout


def retiring(sight: Sight) -> bool:
    return sight.retires


def used(sight: Sight) -> bool:
    return sight.is_used


def unused(sight: Sight) -> bool:
    return not sight.is_used


def ours_to_end(sight: Sight) -> bool:
    return not sight.is_left_to_ec2


def overdue(sight: Sight) -> bool:
    return sight.is_overdue


def nothing_pinned(sight: Sight) -> bool:
    return not sight.is_bound


def node_left(sight: Sight) -> bool:
    return sight.has_node


@dataclass(frozen=True)
class Rule:
    """One row: in one of these states, with one of these sights (empty: whatever it is), when all conditions
    hold, this is done."""

    states: tuple[VMState, ...]
    action: Action
    machine: tuple[Machine, ...] = ()
    node: tuple[Node, ...] = ()
    when: tuple[Condition, ...] = ()

    def fits(self, sight: Sight) -> bool:
        return (
            sight.state in self.states
            and (not self.machine or sight.machine in self.machine)
            and (not self.node or sight.node in self.node)
            and all(condition(sight) for condition in self.when)
        )


_UNSTARTED = (VMState.PLANNED, VMState.REQUESTED)
_UP = (VMState.READY, VMState.DRAINING)
_STRAYS = (Machine.STRAY, Machine.STRAY_ENDED)
_OVER = (Machine.ENDING, Machine.ENDED)
_WITHOUT_JOB = (Node.ABSENT, Node.DRAINED, Node.DOWN)
_OUT = (Node.DRAINING, Node.DRAINED)

TABLE: tuple[Rule, ...] = (
    # A machine whose launch was never answered, or of which EC2 had lost sight.
    Rule(_UNSTARTED, Action.TAKE, machine=_STRAYS),
    Rule(tuple(VMState), Action.BOOK, machine=_STRAYS, when=(without_machine,)),
    Rule(tuple(VMState), Action.END_STRAY, machine=(Machine.STRAY,)),
    Rule((VMState.GONE,), Action.BOOK, machine=(Machine.ALIVE,)),
    # The launch.
    Rule((VMState.PLANNED,), Action.CLOSE, when=(unwanted, surely_not_started)),
    Rule(_UNSTARTED, Action.ASK),
    # What EC2 says.
    Rule((VMState.BOOTING,), Action.LOSE, machine=_OVER, when=(taken_back,)),
    Rule((VMState.BOOTING,), Action.FAIL_BOOT, machine=_OVER),
    Rule(_UP, Action.LOSE, machine=_OVER),
    Rule((VMState.BOOTING, *_UP), Action.LOSE, machine=(Machine.ABSENT,)),
    Rule((VMState.TERMINATING,), Action.CLOSE, machine=(Machine.ENDED, Machine.ABSENT)),
    # What Slurm says.
    Rule((VMState.BOOTING,), Action.JOIN, node=(Node.UP,)),
    Rule((VMState.BOOTING,), Action.LOSE, node=_OUT, when=(taken_back,)),
    Rule((VMState.BOOTING,), Action.FAIL_BOOT, node=(Node.REFUSED, *_OUT)),
    Rule((VMState.BOOTING,), Action.FAIL_BOOT, when=(boots_too_long,)),
    Rule((VMState.BOOTING,), Action.END, when=(unwanted,)),
    Rule((VMState.READY,), Action.LOSE, node=(Node.DOWN, Node.ABSENT)),
    Rule((VMState.READY,), Action.RECALL, node=_OUT, when=(taken_back,)),
    Rule((VMState.READY,), Action.TAKE_OUT, node=_OUT),
    Rule((VMState.READY,), Action.DRAIN, when=(retiring,)),
    # The end: drained, without any job, ended, and no record left in Slurm.
    Rule((VMState.DRAINING,), Action.LOSE, node=(Node.DOWN,), when=(used,)),
    Rule((VMState.DRAINING,), Action.END, node=_WITHOUT_JOB, when=(unused, ours_to_end)),
    Rule((VMState.DRAINING,), Action.MIND_GUEST, node=(Node.DRAINING,), when=(unused, ours_to_end)),
    Rule(
        (VMState.DRAINING,),
        Action.DRAIN_AGAIN,
        node=(Node.UP, Node.QUIET, Node.REFUSED),
        when=(unused, ours_to_end),
    ),
    Rule((VMState.TERMINATING,), Action.END, when=(overdue,)),
    Rule((VMState.GONE,), Action.FORGET, when=(node_left, nothing_pinned)),
)


def decide(sight: Sight) -> Action:
    """What the first row that fits says; where none does, nothing is to be done."""
    for rule in TABLE:
        if rule.fits(sight):
            return rule.action
    return Action.WAIT
