"""The orders of the queue, and where tasks stand in their workflow."""

from __future__ import annotations

import pytest

from snakemake_executor_plugin_schlouder import order
from snakemake_executor_plugin_schlouder.model import Billing, Need, SchlouderError, Task
from snakemake_executor_plugin_schlouder.prediction import LinearBoots
from snakemake_executor_plugin_schlouder.simulate import Outcome, Scenario, simulate
from snakemake_executor_plugin_schlouder.strategies import Asap, make
from snakemake_executor_plugin_schlouder.tasklist import RecordedTask, TaskList

SECONDS = {"a": 10.0, "b": 20.0, "c": 5.0, "d": 1.0}


def task(key: str, seconds: float, level: int = 0, rank: float | None = None) -> Task:
    made = Task(key, key, "r", key, "s", Need(), "", planned=seconds)
    made.level, made.rank = level, rank
    return made


def names(tasks: object) -> str:
    assert isinstance(tasks, list)
    return "".join(task.key for task in tasks)


def test_the_upward_rank_is_the_longest_way_to_the_end() -> None:
    """d waits for b and c, both for a; d waits for a as well."""
    places = order.places({"b": "a", "c": "a", "d": "abc"}, SECONDS.__getitem__)
    assert places == {"a": (0, 31), "b": (1, 21), "c": (1, 6), "d": (2, 1)}


def test_the_level_is_that_of_the_longest_row_of_predecessors() -> None:
    places = order.places({"b": "a", "c": "b", "d": "ac"}, SECONDS.__getitem__)
    assert [places[name].level for name in "abcd"] == [0, 1, 2, 3]


def test_long_chains_are_no_matter() -> None:
    after = {number: (number - 1,) for number in range(1, 100_001)}
    places = order.places(after, lambda node: 1.0)
    assert places[0] == (0, 100_001)
    assert places[100_000] == (100_000, 1)


def test_tasks_that_wait_for_each_other_have_no_place() -> None:
    assert order.places({"a": "b", "b": "a", "d": "c"}, SECONDS.__getitem__).keys() == {"c", "d"}


def test_a_task_list_tells_places_by_the_estimates() -> None:
    tasks = TaskList((RecordedTask("a", 0, 10, 99), RecordedTask("b", 0, 5, 5, ("a",))))
    assert tasks.places == {"a": (0, 15), "b": (1, 5)}


TASKS = [task("a", 10, 1, 10), task("b", 30, 1, 30), task("c", 20, 1, 90), task("d", 5, 0, 50)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (order.RANK, "cdba"),
        (order.LEVEL, "dbca"),
        (order.SHORTEST_OF_LEVEL, "dacb"),
        (order.ONE_LONG_OF_LEVEL, "dbac"),
    ],
)
def test_orders(name: str, expected: str) -> None:
    assert names(order.in_order(name, TASKS)) == expected


def test_without_a_rank_the_walltime_counts_and_equal_tasks_keep_their_turn() -> None:
    tasks = [task("a", 10), task("b", 30), task("c", 10), task("d", 5, rank=20)]
    assert names(order.in_order(order.RANK, tasks)) == "bdac"


def test_groups_are_ordered_among_themselves_and_keep_their_turns() -> None:
    tasks = [task("a", 1), task("X", 1), task("b", 2), task("c", 3), task("Y", 2)]
    found = order.in_turns(
        tasks,
        lambda task: task.key.isupper(),
        lambda task: order.SUBMISSION if task.key.isupper() else order.RANK,
    )
    assert names(found) == "cXbaY"


def test_an_unknown_order_is_answered_with_the_known_ones() -> None:
    with pytest.raises(SchlouderError, match="order: 'size' is unknown; known are submission, ran"):
        order.checked("size")


class Odd(Asap):
    order = "sideways"


def test_a_strategy_with_an_unknown_order_is_told() -> None:
    with pytest.raises(SchlouderError, match="has an unknown order: 'sideways'"):
        make(f"{__name__}:Odd")


def asap(name: str, tasks: TaskList) -> Outcome:
    return simulate(
        tasks, Scenario("asap", 2, Billing(3600, 0, 50), LinearBoots(40, 0), order=name)
    )


def test_by_rank_the_task_others_wait_for_comes_first() -> None:
    """Two VMs: y, 600 s from the end, is the third that was submitted."""
    tasks = TaskList(
        (
            *(RecordedTask(name, 0, 100, 100) for name in ("a", "b", "y")),
            RecordedTask("z", 0, 500, 500, ("y",)),
        )
    )
    assert asap("submission", tasks).makespan == 40 + 100 + 100 + 500
    assert asap("rank", tasks).makespan == 40 + 100 + 500


def test_by_level_the_longest_task_comes_first() -> None:
    tasks = TaskList(tuple(RecordedTask(f"t{s}", 0, s, s) for s in (100, 101, 200)))
    assert asap("submission", tasks).makespan == 40 + 100 + 200
    assert asap("level", tasks).makespan == 40 + 101 + 100


def test_a_simulation_in_an_unknown_order_is_refused() -> None:
    with pytest.raises(SchlouderError, match="order: 'size'"):
        asap("size", TaskList((RecordedTask("a", 0, 1, 1),)))
