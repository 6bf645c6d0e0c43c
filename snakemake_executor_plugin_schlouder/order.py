"""The orders in which waiting tasks are placed, and where a task stands in its workflow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

from .model import SchlouderError, Task
from .printable import shown

SUBMISSION = "submission"
RANK = "rank"
LEVEL = "level"
SHORTEST_OF_LEVEL = "shortest of level"
ONE_LONG_OF_LEVEL = "one long of level"

NAMES = (SUBMISSION, RANK, LEVEL)
"""What a user may ask for; the others belong to strategies."""

Node = TypeVar("Node", bound=Hashable)


class Place(NamedTuple):
    """`level`: the most tasks that follow each other before this one. `rank` (upward rank, s): the longest
    way from its start to the workflow's end, rank(t) = walltime(t) + max of rank over its successors."""

    level: int
    rank: float


def places(
    after: Mapping[Node, Collection[Node]], walltime: Callable[[Node], float]
) -> dict[Node, Place]:
    """Where every node that waits or is waited for stands; `after` tells what a node waits for. Takes
    time in proportion to nodes and edges, and no recursion. Nodes that wait for each other are left out."""
    levels = _levels(after)
    ranks = dict.fromkeys(levels, 0.0)
    for node in reversed(levels):
        rank = ranks[node] = ranks[node] + walltime(node)
        for before in after.get(node, ()):
            if rank > ranks[before]:
                ranks[before] = rank
    return {node: Place(level, ranks[node]) for node, level in levels.items()}


def _levels(after: Mapping[Node, Collection[Node]]) -> dict[Node, int]:
    """By node, every one behind those it waits for."""
    missing = {node: len(waits) for node, waits in after.items()}
    followers: dict[Node, list[Node]] = {}
    for node, waits in after.items():
        for before in waits:
            followers.setdefault(before, []).append(node)
    levels = {node: 0 for node in [*missing, *followers] if not missing.get(node)}
    ready = list(levels)
    for node in ready:
        for follower in followers.get(node, ()):
            missing[follower] -= 1
            if not missing[follower]:
                levels[follower] = levels[node] + 1
                ready.append(follower)
    return levels


def checked(name: str) -> str:
    """The name of an order a user gave; SchlouderError if there is none of that name."""
    if name not in NAMES:
        raise SchlouderError(f"order: {shown(name)} is unknown; known are {', '.join(NAMES)}")
    return name


def in_order(name: str, tasks: Sequence[Task]) -> Sequence[Task]:
    """The tasks in the order of this name; equal ones stay as they were submitted."""
    return _ORDERS[name](tasks)


def in_turns(
    tasks: Sequence[Task], group: Callable[[Task], Hashable], order: Callable[[Task], str]
) -> list[Task]:
    """Every group in its order, which is that of each of its tasks; the turns stay with the groups."""
    groups: dict[Hashable, list[Task]] = {}
    keys = [group(task) for task in tasks]
    for key, task in zip(keys, tasks, strict=True):
        groups.setdefault(key, []).append(task)
    queues = {key: iter(in_order(order(found[0]), found)) for key, found in groups.items()}
    return [next(queues[key]) for key in keys]


def is_known(name: object) -> bool:
    """Whether a strategy may name this order as its own."""
    return name in _ORDERS


def _by_rank(tasks: Iterable[Task]) -> list[Task]:
    return sorted(tasks, key=lambda task: -(task.walltime if task.rank is None else task.rank))


def _longest_of_level(tasks: Iterable[Task]) -> list[Task]:
    return sorted(tasks, key=lambda task: (task.level, -task.walltime))


def _shortest_of_level(tasks: Iterable[Task]) -> list[Task]:
    return sorted(tasks, key=lambda task: (task.level, task.walltime))


def _one_long_of_level(tasks: Iterable[Task]) -> list[Task]:
    """The longest of a level, so that the others can be held against it, then from the shortest on."""
    found: list[Task] = []
    for _, level in groupby(_shortest_of_level(tasks), key=lambda task: task.level):
        *short, long = level
        found += [long, *short]
    return found


_ORDERS: dict[str, Callable[[Sequence[Task]], Sequence[Task]]] = {
    SUBMISSION: lambda tasks: tasks,
    RANK: _by_rank,
    LEVEL: _longest_of_level,
    SHORTEST_OF_LEVEL: _shortest_of_level,
    ONE_LONG_OF_LEVEL: _one_long_of_level,
}
