"""The table of what is to be done about a VM: every sight there can be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from snakemake_executor_plugin_schlouder.broker.lifecycle import (
    TABLE,
    Action,
    Machine,
    Node,
    Rule,
    Sight,
    decide,
)
from snakemake_executor_plugin_schlouder.model import BOOTING, VMState

DESIGN = Path(__file__).parent.parent / "docs" / "design.md"
ORDER = list(VMState)
LEADS_TO = {
    Action.TAKE: VMState.BOOTING,
    Action.BOOK: VMState.TERMINATING,
    Action.JOIN: VMState.READY,
    Action.FAIL_BOOT: VMState.TERMINATING,
    Action.TAKE_OUT: VMState.DRAINING,
    Action.RECALL: VMState.DRAINING,
    Action.DRAIN: VMState.DRAINING,
    Action.LOSE: VMState.TERMINATING,
    Action.END: VMState.TERMINATING,
    Action.CLOSE: VMState.GONE,
}
"""Where an action leaves the record; others leave it where it is."""

AGAIN = {
    Action.WAIT: "nothing is done",
    Action.ASK: "under the same token EC2 starts nothing more",
    Action.END_STRAY: "by its id; an ended machine stays ended",
    Action.DRAIN_AGAIN: "a drained node stays drained",
    Action.MIND_GUEST: "it is only told, once",
    Action.FORGET: "a deleted node stays deleted",
}
"""What may be done any number of times, and why."""


def sights() -> Iterator[Sight]:
    """All that can be told apart: what counts before a VM is up, and what counts from then on."""
    flags = (False, True)
    seen = itertools.product(VMState, Machine, Node, flags, flags)
    for state, machine, node, known, taken_back in seen:
        sight = Sight(state, machine, node, is_known=known, is_taken_back=taken_back)
        if state in BOOTING:
            for wanted, may_have_come, late in itertools.product(flags, repeat=3):
                yield sight._replace(
                    is_wanted=wanted,
                    may_have_come=may_have_come,
                    boots_for=2.0 if late else 1.0,
                    boot_timeout=1.0,
                )
        else:
            for retires, used, left, overdue, bound, has_node in itertools.product(flags, repeat=6):
                yield sight._replace(
                    retires=retires,
                    is_used=used,
                    is_left_to_ec2=left,
                    is_overdue=overdue,
                    is_bound=bound,
                    has_node=has_node,
                )


def after(sight: Sight, action: Action) -> Sight:
    """The same sight once that is done: nothing has been heard of EC2 and Slurm since."""
    state = LEADS_TO.get(action, sight.state)
    if action in (Action.TAKE, Action.BOOK):
        machine = Machine.ENDED if sight.machine == Machine.STRAY_ENDED else Machine.ALIVE
        sight = sight._replace(is_known=True, machine=machine)
    return sight._replace(state=state, is_overdue=False)


def test_what_was_done_is_not_done_again() -> None:
    for sight in sights():
        done = [decide(sight)]
        while done[-1] not in AGAIN:
            sight = after(sight, done[-1])
            done.append(decide(sight))
            assert len(done) == len(set(done)), (sight, done)


def test_a_record_only_goes_on() -> None:
    """But for a machine that shows itself when its record was closed."""
    for sight in sights():
        action = decide(sight)
        there = ORDER.index(after(sight, action).state) - ORDER.index(sight.state)
        assert there >= 0 or action == Action.BOOK, (sight, action)


def test_nothing_is_ended_on_doubt() -> None:
    """EC2 and Slurm have said nothing, and there is no plan of ours to end it."""
    for sight in sights():
        in_doubt = sight.machine == Machine.UNSEEN and sight.node == Node.UNSEEN
        planned = not sight.is_wanted or sight.retires or sight.is_overdue
        if in_doubt and not planned and sight.boots_for <= sight.boot_timeout:
            assert decide(sight) in AGAIN, sight


def test_no_machine_is_ended_under_a_task_that_runs_there() -> None:
    """Unless EC2 or Slurm say that it is no good any more."""
    lost = (Machine.ABSENT, Machine.ENDING, Machine.ENDED)
    for sight in sights():
        works = sight.is_used and sight.state in (VMState.READY, VMState.DRAINING)
        retires = sight.retires and sight.state == VMState.READY
        if works and not retires and decide(sight) in (Action.END, Action.LOSE, Action.CLOSE):
            assert sight.machine in lost or sight.node in (Node.DOWN, Node.ABSENT), sight


def test_a_record_is_closed_only_when_there_is_no_machine() -> None:
    for sight in sights():
        if decide(sight) == Action.CLOSE:
            ended = sight.machine in (Machine.ENDED, Machine.ABSENT)
            assert ended or (sight.state == VMState.PLANNED and not sight.may_have_come), sight


def test_every_row_is_of_use() -> None:
    first = {id(next(rule for rule in TABLE if rule.fits(s))) for s in sights() if _is_met(s)}
    assert first == {id(rule) for rule in TABLE}


def _is_met(sight: Sight) -> bool:
    return decide(sight) != Action.WAIT


def row(rule: Rule) -> str:
    """As docs/design.md has it."""
    state = "any" if len(rule.states) == len(ORDER) else ", ".join(rule.states)
    when = ", ".join(condition.__name__.replace("_", " ") for condition in rule.when)
    cells = (state, ", ".join(rule.machine), ", ".join(rule.node), when, rule.action)
    return "| " + " | ".join(cell.replace("_", " ") for cell in cells) + " |"


@pytest.mark.skipif(not DESIGN.exists(), reason="there are no docs beside an installed package")
def test_the_docs_have_the_table() -> None:
    assert "\n".join(map(row, TABLE)) in DESIGN.read_text()
